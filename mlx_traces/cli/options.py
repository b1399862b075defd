"""Options derived from the settings, and a click group that prints an error as one line."""

import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import click

from mlx_traces.cli.configs import shipped_configs
from mlx_traces.cli.unused import unused
from mlx_traces.config import Config, find_config, read_config
from mlx_traces.errors import Lost, UserError, choices
from mlx_traces.runtime.interrupts import Stopped
from mlx_traces.text import clean

if TYPE_CHECKING:
    from rich.console import Console

SHARED = ("eval", "generate", "sft", "grpo", "ppo", "bench")  # commands that can run on several ranks


class Commands(click.Group):
    """A group of commands that prints a UserError as one line, and after Ctrl-C how to continue."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Of several ranks (``mlx.launch``) only the first prints; the others print errors alone."""
        rank = os.environ.get("MLX_RANK", "0")
        try:
            with _silent(rank != "0"):
                return super().invoke(ctx)
        except Stopped as stopped:
            click.echo(f"\n{stopped}; go on with {_again(ctx)}", err=True)
            ctx.exit(128 + signal.SIGINT)
        except Lost as error:
            if rank == "0":
                raise click.ClickException(clean(error)) from None
            ctx.exit(1)  # the lost rank, or its launcher, says what happened
        except UserError as error:
            raise click.ClickException(clean(error) if rank == "0" else f"rank {rank}: {clean(error)}") from None
        except click.MissingParameter as error:
            raise click.ClickException(_missing(error)) from None
        except KeyboardInterrupt:
            click.echo("\nstopped; finished parts are kept; repeat the command (eval: with --resume)", err=True)
            ctx.exit(128 + signal.SIGINT)
        except BrokenPipeError:  # the reader of our output, such as `head`, closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(128 + signal.SIGPIPE)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise  # not the disk's doing
            file = error.filename or "the output"
            if error.filename is None:  # stdout: writing the rest at exit would fail again
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            message = f"{clean(file)} cannot be written ({error.strerror}); make room, then repeat the command"
            raise click.ClickException(message) from None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple:
        """Find the command; refuse one that cannot run on several ranks, and a word that no file of a run can hold."""
        name, command, rest = super().resolve_command(ctx, args)
        for word in rest:
            if any("\ud800" <= letter <= "\udfff" for letter in word):  # how Python reads bytes that are not UTF-8
                raise UserError(f"{word!r}: not UTF-8, as files of a run are; rename it, or choose another")
        if "MLX_RANK" in os.environ and ctx.parent is None and name not in SHARED and "--help" not in rest:
            raise UserError(f"{name} runs in one process; mlx.launch can start {choices(SHARED)}")
        return name, command, rest


def _again(ctx: click.Context) -> str:
    """Say how to continue the interrupted command."""
    name = ctx.invoked_subcommand or ""
    command = ctx.command.get_command(ctx, name) if isinstance(ctx.command, click.Group) else None
    resumes = command is not None and any(option.name == "resume" for option in command.params)
    return "--resume" if resumes else "the same command"


def _missing(error: click.MissingParameter) -> str:
    """Return the message for a missing argument: how to call the command, if possible with a shipped configuration."""
    ctx, param = error.ctx, error.param
    if ctx is None or param is None:
        return error.format_message()
    called = ctx.command_path
    if isinstance(param.type, ConfigFile):
        names = [name for name, command, _ in shipped_configs() if command == ctx.info_name]
        shipped = next((name for name in names if "nano" in name), "FILE.yaml")
        return f"CONFIG is missing: a YAML file, or the name of a shipped one (mlx-traces configs): {called} {shipped}"
    wanted = [other for other in ctx.command.params if other.required]
    words = [" ".join((*other.opts[: isinstance(other, click.Option)], other.make_metavar(ctx))) for other in wanted]
    name = param.opts[0] if isinstance(param, click.Option) else param.make_metavar(ctx)
    return f"{name} is missing: {called} {' '.join(words)}; --help says more"


@contextmanager
def _silent(wanted: bool) -> Iterator[None]:
    """Print nothing while the context lasts."""
    with ExitStack() as stack:
        if wanted:
            nothing = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(redirect_stdout(nothing))
            stack.enter_context(redirect_stderr(nothing))
        yield


class ConfigFile(click.ParamType):
    """A configuration file, by path or by name."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the path of the configuration."""
        return str(find_config(value))


SECTIONS = {  # of a command's help, most used options first; all other options come under More
    "Model": ("model", "models", "adapter", "weights", "dtype", "device"),
    "Task and data": (
        *("task", "data", "valid", "valid_share", "split", "limit", "prompt", "prompts", "shots", "thinking"),
        *("extractor",),
    ),
    "Sampling": (
        *("max_tokens", "think_tokens", "think_at_least", "temperature", "samples", "group_size", "top_p", "top_k"),
        *("min_p", "rows"),
    ),
    "Training": (
        *("num_steps", "epochs", "prompts_per_step", "batch_size", "learning_rate", "rewards", "loss", "advantage"),
        *("clip_eps", "kl_coef", "kind", "rank", "scale", "layers", "targets", "eval_every", "patience"),
    ),
    "Output": (
        *("config_file", "out", "runs_dir", "baseline", "format_", "extractors", "quality", "scoring", "reward_file"),
        *("resume", "as_json", "report_to"),
    ),
}


class Sectioned(click.Command):
    """A command whose help sorts its options into the ``SECTIONS``."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, section by section."""
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        left = {str(param.name): record for param in options if (record := param.get_help_record(ctx))}
        for title, names in SECTIONS.items():
            if rows := [left.pop(name) for name in names if name in left]:
                with formatter.section(title):
                    formatter.write_dl(rows)
        with formatter.section("More"):
            formatter.write_dl(list(left.values()))


def console() -> "Console":
    """Return a console on stdout, as wide as the terminal, or 100 columns if there is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 100, highlight=False)


def configured(kind: type[Config], path: str | None, given: dict[str, Any]) -> Any:
    """Read a file's settings, overridden by those ``given``; note on stderr those that change nothing."""
    config = read_config(kind, path, given)
    note_unused(config)
    return config


def note_unused(config: Config) -> None:
    """Note on stderr the settings that change nothing, each once."""
    for line in dict.fromkeys(unused(config)):
        click.echo(f"note: {line}", err=True)


def settings_options(kind: type[Config], *leave_out: str, **defaults: Any) -> Callable:
    """Add an option for every field of the settings; the function gets the given values as ``settings``.

    ``defaults`` replace the settings' own defaults.
    """

    def decorate(function: Callable) -> Callable:
        names = [name for name in kind.model_fields if name not in leave_out]

        def call(**arguments: Any) -> Any:
            taken = {name: arguments.pop(name) for name in names}
            given = {name: value for name, value in taken.items() if value not in (None, (), {})}
            return function(settings={**defaults, **given}, **arguments)

        call.__name__, call.__doc__ = function.__name__, function.__doc__
        call.__click_params__ = list(getattr(function, "__click_params__", []))
        for name in reversed(names):
            call = _option(name, kind, defaults)(call)
        return call

    return decorate


def _option(name: str, kind: type[Config], defaults: dict[str, Any]) -> Callable:
    """Make the click option of one field; the settings validate the value."""
    if name == "template_args":
        text = f"{kind.model_fields[name].description}  Repeat for more."
        return click.option(
            "--template-arg", name, multiple=True, metavar="NAME=VALUE", callback=_template_args, help=text
        )
    field = kind.model_fields[name]
    flag = "--" + name.replace("_", "-")
    shown = None if field.is_required() else defaults.get(name, field.get_default())
    text = (field.description or "") + (f"  [default: {shown}]" if shown not in (None, "") else "")
    types = [
        get_args(part)[0] if get_origin(part) is Annotated else part
        for part in (get_args(field.annotation) or (field.annotation,))
        if part is not type(None)
    ]
    if types == [bool]:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
    literal = next((part for part in (field.annotation, *types) if get_origin(part) is Literal), None)
    if literal is not None:
        choices = [str(value) for value in get_args(literal)]
        return click.option(flag, name, type=click.Choice(choices), default=None, help=text)
    if any(get_origin(part) is list for part in types):
        return click.option(flag, name, multiple=True, help=text + "  Repeat for more.")
    if get_origin(field.annotation) is tuple:
        pair = "LOW HIGH" if types[0] is int else "FIRST SECOND"
        return click.option(flag, name, type=types[0], nargs=2, default=None, metavar=pair, help=text)
    simple = next((part for part in (int, float) if part in types), str)
    return click.option(flag, name, type=simple, default=None, help=text)


def _template_args(_: click.Context, __: click.Parameter, items: tuple[str, ...]) -> dict[str, Any]:
    """Read NAME=VALUE pairs; a JSON value keeps its type, so ``true`` is a boolean and ``512`` a number."""
    given = {}
    for item in items:
        name, sign, value = item.partition("=")
        if not sign or not name.isidentifier():
            raise UserError(f"--template-arg {item}: give NAME=VALUE, as in reasoning_effort=high")
        try:
            given[name] = json.loads(value)
        except ValueError:
            given[name] = value
    return given
