"""bench, nano and doctor: measure and check this machine, build the embedded model."""

import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from mlx_traces.cli.options import ConfigFile, configured, settings_options
from mlx_traces.config import GRPOConfig, LoadConfig, NanoConfig, PPOConfig, RLConfig, SFTConfig, build
from mlx_traces.errors import UserError
from mlx_traces.runtime.device import import_mlx
from mlx_traces.runtime.files import to_json
from mlx_traces.runtime.provenance import provenance

NOT_BENCHED = (
    *("adapter", "data", "valid", "valid_share", "epochs", "over_long", "checkpoint_layers", "eval_every", "evaluate"),
    *("patience", "save_every", "betas", "warmup", "final_rate", "weight_decay", "report_to", "thinking"),
)  # settings of sft that do not change the cost of a step, or that the peer lacks

NOT_BENCHED_RL = (
    *("adapter", "num_steps", "prompts_per_step", "max_resamples", "pass_rate_low", "pass_rate_high", "probe_samples"),
    *("kl_coef", "reference", "eval_every", "evaluate", "patience", "save_every", "rewards", "report_to"),
    *("value_warmup_steps", "unbiased_kl"),
)


@click.group("bench")
def bench_group() -> None:
    """Measure the speed of this machine, also against other packages."""


class Ranked(click.Command):
    """A bench with ``--ranks``: one process runs the command, then several ranks on this machine share it."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        text = "Time one process, then this many that share its work on this machine; print both and their ratio."
        self.params.append(click.Option(["--ranks"], type=click.IntRange(2), help=text))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the arguments as given, to pass them to other processes."""
        ctx.meta["given"] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the bench here, or with ``--ranks`` in other processes."""
        ranks = ctx.params.pop("ranks")
        if ranks is None:
            return super().invoke(ctx)
        if ctx.params.get("against"):
            raise UserError("--ranks does not time a peer; leave out --against")
        if ctx.params.get("busy"):
            raise UserError("--ranks starts processes of its own; leave out --busy")
        from mlx_traces.diagnostics import bench_ranks

        arguments = ["bench", ctx.info_name or "", *_without_ranks(ctx.meta["given"])]
        results, about = bench_ranks.scaling(arguments, ranks, lambda line: click.echo(line, err=True))
        if ctx.params["as_json"]:
            click.echo(to_json({**about, **provenance(), "rows": [asdict(line) for line in results]}), nl=False)
            return None
        for line in results:
            click.echo(bench_ranks.text_of(line))
        return None


def _without_ranks(arguments: list[str]) -> list[str]:
    """Return arguments without ``--ranks`` and its value, and without ``--json``, which `bench_ranks` adds."""
    kept, left = [], iter(arguments)
    for argument in left:
        if argument == "--ranks":
            next(left)
        elif argument != "--json" and not argument.startswith("--ranks="):
            kept.append(argument)
    return kept


def _print(lines: Sequence[dict[str, Any]], config: dict[str, Any], loaded: Any) -> None:
    """Print measurements as JSON, with versions, device, every setting and the model."""
    about = {**provenance(), "config": config, "model": loaded.about()}
    click.echo(to_json({**about, "rows": list(lines)}), nl=False)


def _by(ranks: int) -> str:
    """Return the number of processes as text, if there are several."""
    return f", {ranks} ranks" if ranks > 1 else ""


@bench_group.command("generate", cls=Ranked)
@click.option("--model", default="nano", show_default=True, help="nano, a folder, or a hub id.")
@click.option("--rows", default="32", show_default=True, help="Batch sizes of decoding, as in 32,128.")
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="Longest completion.")
@click.option("--count", type=click.IntRange(1), default=512, show_default=True, help="Number of prompts.")
@click.option("--prompts", type=click.Path(), help="File of GSM8K-like questions.  [default: Countdown problems]")
@click.option("--against", type=click.Choice(["mlx-lm"]), help="Peer to time in the same run, on the same weights.")
@click.option("--as-shipped", is_flag=True, help="Let the peer load the weights by its own defaults.")
@click.option("--busy", type=click.IntRange(0), default=0, help="Repeat each run beside this many busy processes.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Number of timed runs.")
@click.option("--json", "as_json", is_flag=True, help="Print rows and provenance as JSON.")
@settings_options(LoadConfig)
def bench_generate_command(
    model: str,
    rows: str,
    max_tokens: int,
    count: int,
    prompts: str | None,
    against: str | None,
    as_shipped: bool,
    busy: int,
    repeats: int,
    as_json: bool,
    settings: dict,
) -> None:
    """Time the sampling engine.

    Prints tokens per second, milliseconds per step, memory, and the ratio to a peer.
    """
    if not all(part.strip().isdecimal() and int(part) for part in rows.split(",")):
        raise UserError(f"--rows {rows}: give numbers from 1 up, as in 32,128")
    from mlx_traces.diagnostics import bench_generate
    from mlx_traces.models import loading

    loaded = loading.load(model, **settings)
    texts = bench_generate.bench_prompts(loaded, Path(prompts) if prompts else None, count)
    lines = bench_generate.bench_generate(
        loaded,
        texts,
        [int(part) for part in rows.split(",")],
        max_tokens,
        against,
        as_shipped,
        repeats,
        lambda line: click.echo(line, err=True),
        busy,
    )
    if as_json:
        arguments = {"prompts": prompts, "count": count, "max_tokens": max_tokens, "repeats": repeats, "busy": busy}
        config = {**build(LoadConfig, settings).model_dump(mode="json"), **arguments, "as_shipped": as_shipped}
        _print([asdict(line) for line in lines], config, loaded)
        return
    where = f"{model}, {loaded.backend.description}{_by(lines[0].ranks)}"
    click.echo(f"{where}; {count} prompts, at most {max_tokens} tokens each, greedy")
    for line in lines:
        click.echo(
            f"{line.rows:>5} rows  {line.tokens_per_second:8.1f} tokens/s  {line.ms_per_step:7.1f} ms a step  "
            f"prompts {line.prompt_tokens_per_second:8.0f} tokens/s  first token {line.first_token_seconds:.2f} s  "
            f"occupancy {line.occupancy:.0%}  {line.peak_memory_gb:.2f} GB  warm-up {line.warmup_seconds:.1f} s"
        )
        if line.busy_ratio is not None:
            click.echo(
                f"{'':>10}  {line.busy_tokens_per_second:8.1f} tokens/s beside busy processes ({line.busy}), "
                f"{line.busy_ratio:.0%} of that"
            )
        if line.ratio is not None:
            click.echo(
                f"{'':>10}  {line.peer_tokens_per_second:8.1f} tokens/s by {line.peer} ({line.peer_weights} weights), "
                f"{line.peer_peak_memory_gb:.2f} GB, warm-up {line.peer_warmup_seconds:.1f} s: "
                f"ratio {line.ratio:.2f}"
            )


@bench_group.command("graph")
@click.option("--model", default="nano", show_default=True, help="nano, a folder, or a hub id.")
@click.option("--rows", type=click.IntRange(1), default=256, show_default=True, help="Batch size of decoding.")
@click.option(
    "--backend",
    type=click.Choice(["metal", "cuda"]),
    default="metal",
    show_default=True,
    help="Kind of GPU to count for.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
def bench_graph_command(model: str, rows: int, backend: str, as_json: bool) -> None:
    """Count the kernels and bytes of a step on a GPU.

    Counts a decode step and an update. No GPU is needed; nothing is computed.
    """
    from mlx_traces.diagnostics import bench_graph

    counts = bench_graph.bench_graph(model, rows, backend)
    if as_json:
        lines = [asdict(row) for row in counts]
        click.echo(to_json({"rows": lines, "model": model, "rows_at_once": rows, "backend": backend}), nl=False)
        return
    click.echo(f"{model}, {rows} rows, counted for {backend}; a pass is rows x vocabulary float32 numbers")
    click.echo(f"{'':<45}{'operations':>11}{'kernels':>8}{'GB':>8}{'passes':>8}")
    for row in counts:
        name = f"{row.what}, {row.variant}{', log-probabilities' if row.logprobs else ''}"
        numbers = f"{row.primitives:>11,}{row.kernels:>8,}{row.gb:>8.2f}{row.vocabulary_passes:>8.1f}"
        click.echo(f"{name:<45}{numbers}")


@bench_group.command("all")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON file; an existing one is replaced.")
@click.option("--model", help="nano, a folder, or a hub id.  [default: a 4-bit Qwen2.5 of 0.5B; nano on a CPU]")
@click.option("--quick", is_flag=True, help="Fewer and shorter steps; the default model is nano.")
@click.option("--data", type=click.Path(), help="File of GSM8K-like problems.  [default: the hub's, else Countdown]")
@click.option("--minutes", default=20.0, show_default=True, type=click.FloatRange(0), help="Time limit of all benches.")
def bench_all_command(out: Path, model: str | None, quick: bool, data: str | None, minutes: float) -> None:
    """Run every bench on this machine.

    Each bench runs in its own process. One file holds all results; `bench show` prints it.
    """
    from mlx_traces.diagnostics import bench_all, bench_file

    try:
        file = bench_all.bench_all(out, model, quick, data, minutes, lambda line: click.echo(line, err=True))
    except KeyboardInterrupt:
        again = "the command would begin anew and replace it"
        click.echo(f"\nstopped; {out} has the benches that ended, for bench show; {again}", err=True)
        click.get_current_context().exit(128 + signal.SIGINT)
    bench_file.show([file])
    click.echo(f"written to {out}")


@bench_group.command("show")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--png", type=click.Path(path_type=Path), help="Also draw the curves into this file.")
@click.option("--markdown", is_flag=True, help="Print the table as Markdown instead.")
def bench_show_command(files: tuple[Path, ...], png: Path | None, markdown: bool) -> None:
    """Show files that `bench all` wrote.

    Prints a table by machine and curves of tokens per second.
    """
    from mlx_traces.diagnostics import bench_file
    from mlx_traces.report import tables

    read = [bench_file.read(file) for file in files]
    if markdown:
        click.echo(tables.cells_to_markdown(bench_file.cells(read)), nl=False)
    else:
        bench_file.show(read)
    if png:
        bench_file.draw(read, png)


@bench_group.command("sft", cls=Ranked)
@click.option("--data", type=click.Path(), help="File of traces.  [default: traces of Countdown's solver]")
@click.option("--problems", type=click.Path(), help="File of GSM8K-like problems, whose solutions become traces.")
@click.option("--count", type=click.IntRange(1), default=64, show_default=True, help="Number of traces.")
@click.option("--against", type=click.Choice(["mlx-lm"]), help="Peer to time in the same run, on the same weights.")
@click.option("--as-shipped", is_flag=True, help="Let the peer load the weights by its own defaults.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Number of timed epochs.")
@click.option("--json", "as_json", is_flag=True, help="Print the row and its provenance as JSON.")
@settings_options(SFTConfig, *NOT_BENCHED, batch_size=8)
def bench_sft_command(
    data: str | None,
    problems: str | None,
    count: int,
    against: str | None,
    as_shipped: bool,
    repeats: int,
    as_json: bool,
    settings: dict,
) -> None:
    """Time optimizer steps of SFT.

    Prints real tokens per second, memory, and the ratio to a peer on the same sequences.
    """
    config = build(SFTConfig, {**settings, "data": data or ""})
    from mlx_traces.models import loading

    import_mlx()
    from mlx_traces.diagnostics import bench_sft
    from mlx_traces.models import adapters
    from mlx_traces.train import memory

    load = {name: getattr(config, name) for name in LoadConfig.model_fields}
    loaded = loading.load(config.model, **load)
    files = [Path(file) if file else None for file in (data, problems)]
    rows = bench_sft.bench_rows(loaded, config, *files, count)
    line = bench_sft.bench_sft(
        loaded, rows, config, against, as_shipped, repeats, lambda line: click.echo(line, err=True)
    )
    model = bench_sft.twin(loaded.model)
    adapters.start(model, config)
    estimated = memory.of_sft(replace(loaded, model=model), config, max(len(row.ids) for row in rows)).peak
    if as_json:
        arguments = {"problems": problems, "count": count, "repeats": repeats, "as_shipped": as_shipped}
        row = asdict(line) | {"estimated_memory_gb": estimated}
        _print([row], {**config.model_dump(mode="json"), **arguments}, loaded)
        return
    where = f"{config.model}, {loaded.backend.description}{_by(line.ranks)}"
    click.echo(f"{where}; {line.examples} traces, {line.batch_size} a step")
    click.echo(
        f"{line.tokens_per_second:8.1f} tokens/s  {line.seconds_per_step:7.3f} s a step  "
        f"{line.peak_memory_gb:.2f} GB ({estimated:.2f} estimated)  padding {line.padding:.1%}  "
        f"warm-up {line.warmup_seconds:.1f} s  "
        f"({line.tokens:,} tokens an epoch, {line.learned:,} learned)"
    )
    if line.ratio is not None:
        click.echo(
            f"{line.peer_tokens_per_second:8.1f} tokens/s  {line.peer_seconds_per_step:7.3f} s a step  "
            f"{line.peer_peak_memory_gb:.2f} GB  padding {line.peer_padding:.1%}  "
            f"warm-up {line.peer_warmup_seconds:.1f} s  by {line.peer} ({line.peer_weights} weights): "
            f"ratio {line.ratio:.2f}"
        )


def _reinforcement_options(form: type[RLConfig], peer: str, of_peer: str) -> Callable:
    """Add the options that the benches of GRPO and PPO share."""
    options = (
        click.option("--prompts", type=click.IntRange(1), default=8, show_default=True, help="Problems per step."),
        click.option("--against", type=click.Choice([peer]), help=of_peer),
        click.option(
            "--repeats",
            type=click.IntRange(0),
            default=3,
            show_default=True,
            help="Number of timed steps, after a warm-up step; 0: time that step.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the row and its provenance as JSON."),
        settings_options(form, *NOT_BENCHED_RL),
    )

    def decorate(function: Callable) -> Callable:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


@bench_group.command("grpo", cls=Ranked)
@click.option("--as-shipped", is_flag=True, help="Let the peer load the weights by its own defaults.")
@click.option("--every-row", is_flag=True, help="Train on every rollout: distinct rewards replace the grader's.")
@_reinforcement_options(GRPOConfig, "mlx-lm-lora", "Peer to time in the same run, on the same weights.")
def bench_grpo_command(as_shipped: bool, every_row: bool, **given: Any) -> None:
    """Time steps of GRPO.

    Prints seconds of sampling and of the update, memory, and the ratio to a peer.
    """
    _bench_reinforcement(GRPOConfig, as_shipped=as_shipped, every_row=every_row, **given)


@bench_group.command("ppo", cls=Ranked)
@_reinforcement_options(PPOConfig, "grpo", "Time our GRPO on the same sizes and problems in the same run.")
def bench_ppo_command(**given: Any) -> None:
    """Time steps of PPO.

    Prints seconds of sampling and of the update, memory, and the ratio to GRPO; no peer on MLX has PPO.
    """
    _bench_reinforcement(PPOConfig, **given)


def _bench_reinforcement(
    form: type[RLConfig],
    prompts: int,
    against: str | None,
    repeats: int,
    as_json: bool,
    settings: dict,
    as_shipped: bool = False,
    every_row: bool = False,
) -> None:
    """Time steps of GRPO or PPO and print the results."""
    config = build(form, {**settings, "prompts_per_step": prompts})
    from mlx_traces.models import loading

    import_mlx()
    from mlx_traces.diagnostics import bench_rl

    if against in bench_rl.PEERS:
        bench_rl.trainer()
    loaded = loading.load(config.model, **{name: getattr(config, name) for name in LoadConfig.model_fields})
    line = bench_rl.bench_grpo(
        loaded, config, against, as_shipped, repeats, every_row, lambda line: click.echo(line, err=True)
    )
    if as_json:
        arguments = {"repeats": repeats, "as_shipped": as_shipped, "every_row": every_row}
        _print([asdict(line)], {**config.model_dump(mode="json"), **arguments}, loaded)
        return
    sizes = f"{line.prompts} x {line.group_size} x {line.max_tokens}"
    where = f"{config.model}, {loaded.backend.description}{_by(line.ranks)}"
    click.echo(f"{where}; {sizes} (problems, rollouts of each, maximum tokens)")
    click.echo(
        f"{line.seconds:8.2f} s a step (sampling {line.sample_seconds:.2f}, update {line.update_seconds:.2f})  "
        f"{line.tokens_per_second:8.1f} tokens/s  {line.peak_memory_gb:.2f} GB ({line.estimated_memory_gb:.2f} "
        f"estimated)  {line.completion_tokens:,.0f} tokens a step, {line.learned:.0%} of the rollouts learned  "
        f"warm-up {line.warmup_seconds:.1f} s"
    )
    if line.ratio is not None:
        click.echo(
            f"{line.peer_seconds:8.2f} s a step (sampling {line.peer_sample_seconds:.2f}, "
            f"update {line.peer_update_seconds:.2f})  {line.peer_tokens_per_second:8.1f} tokens/s  "
            f"{line.peer_peak_memory_gb:.2f} GB  {line.peer_completion_tokens:,.0f} tokens a step  "
            f"warm-up {line.peer_warmup_seconds:.1f} s  by {line.peer} ({line.peer_weights} weights): "
            f"ratio {line.ratio:.2f} by seconds, {line.tokens_ratio:.2f} by tokens/s"
        )


@click.group("nano")
def nano_group() -> None:
    """Build the embedded model."""


@nano_group.command("build")
@click.option("--config", "config_file", type=ConfigFile(), help="YAML file of these settings; options win over it.")
@click.option("--resume", is_flag=True, help="Continue an interrupted build.")
@settings_options(NanoConfig)
def nano_build(config_file: str | None, resume: bool, settings: dict) -> None:
    """Train nano from scratch. Writes a quantized model; takes under an hour on two CPU cores."""
    config = configured(NanoConfig, config_file, settings)
    import_mlx()
    from mlx_traces.runtime.progress import progress
    from mlx_traces.train import nano

    with progress("nano") as shown:
        out = nano.build(
            config,
            resume,
            lambda stage, step, steps, loss: shown.update(step, steps, [f"{stage}, loss {loss:.3f}"]),
        )
    data = "-".join(map(str, dict.fromkeys(config.operands)))
    click.echo(f"written to {out}; try: mlx-traces eval --model {out} --task countdown --data {data}-numbers")


@nano_group.command("reference")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON file; an existing one is replaced.")
def nano_reference(out: Path) -> None:
    """Write the reference numbers of doctor's self-test.

    They are computed with nano in float32 on this CPU. Repeat this after every build of nano:
    --out mlx_traces/assets/selftest.json.
    """
    from mlx_traces.diagnostics import selftest

    content = selftest.write_reference(out)
    tokens = sum(len(completion["tokens"]) for completion in content["completions"])
    click.echo(f"written to {out}: {tokens} log-probabilities and a training step")


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the lines as JSON.")
@click.option("--self-test/--no-self-test", default=True, help="Generate and train a step against stored results.")
def doctor_command(as_json: bool, self_test: bool) -> None:
    """Check this machine, and print a fix for each fault.

    Checks versions, device, memory, BLAS speed, disk and hub, and compares generation and a training step of the
    embedded model with stored results. The exit status is 1 if commands would fail or results cannot be trusted.
    """
    from mlx_traces.diagnostics import doctor

    lines = doctor.report(self_test)
    if as_json:
        click.echo(json.dumps(doctor.as_rows(lines), indent=1))
    else:
        doctor.show(lines)
    if any(line.failed for line in lines):
        raise SystemExit(1)
