"""Prompt styles: templates that turn a problem into the turns of a chat. No MLX."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_traces.errors import UserError
from mlx_traces.records import Problem

Message = dict[str, str]
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{(\w+)\}")


@dataclass(frozen=True)
class Prompt:
    r"""A prompt style: templates over the problem's columns.

    ``{column}`` in ``user`` is replaced by that column's text; ``{}`` (as in ``\boxed{}``) stays, ``{{`` and ``}}`` are
    literal braces. ``shots`` are earlier (user, assistant) turns, already filled in. ``prefill`` opens the assistant's
    turn; it is part of the response that is graded. With ``chat`` false the turns are joined as plain text, without the
    model's chat template. Generation ends at any of the ``stop`` strings.
    """

    name: str
    user: str
    system: str | None = None
    prefill: str = ""
    shots: tuple[tuple[str, str], ...] = ()
    chat: bool = True
    stop: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The text of every turn of the prompt, its placeholders unfilled."""
        return "\n".join([self.system or "", *(turn for shot in self.shots for turn in shot), self.user, self.prefill])

    def messages(self, problem: Problem) -> list[Message]:
        """Return the turns of the chat for ``problem``, the last one the user's."""
        turns = [{"role": "system", "content": self.system}] if self.system else []
        for user, assistant in self.shots:
            turns += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        return [*turns, {"role": "user", "content": fill(self.user, problem.columns, self.name)}]


def fill(template: str, columns: Mapping[str, Any], name: str) -> str:
    """Put a problem's columns into a template; raise UserError for a placeholder that is not a column."""

    def value(match: re.Match) -> str:
        if match[1] is None:
            return match[0][0]
        if match[1] not in columns:
            raise UserError(
                f"prompt {name}: {{{match[1]}}} is not a column; the problems have {', '.join(columns)} "
                f"(write {{{{{match[1]}}}}} for literal braces)"
            )
        return str(columns[match[1]])

    return _PLACEHOLDER.sub(value, template)


def as_text(messages: list[Message]) -> str:
    """Join turns as one text, as lm-eval does: a blank line between pairs, a space before an answer."""
    text = ""
    for message in messages:
        if message["role"] == "assistant":
            text += ("" if text[-1:].isspace() else " ") + message["content"]
        else:
            text += ("\n\n" if text else "") + message["content"]
    return text


def columns_of(template: str) -> list[str]:
    """Return the names of the columns that a template shows."""
    return list(dict.fromkeys(match[1] for match in _PLACEHOLDER.finditer(template) if match[1]))


def load_prompt(path: Path, gold: Sequence[str] = ()) -> Prompt:
    """Read a prompt file: a YAML mapping with ``user`` and optional ``system``, ``prefill``, ``stop`` and ``chat``.

    Args:
        path: the file.
        gold: columns that hold the answer; a prompt shows them only with ``show_gold: true``.

    Raises:
        UserError: if the file is missing, is no such mapping, has other fields, or shows the answer without show_gold.
    """
    from mlx_traces.yaml_files import read_yaml  # here, so that --help does not load PyYAML

    fields = {"user": str, "system": str, "prefill": str, "stop": list, "chat": bool, "show_gold": bool}
    content = read_yaml(path, "prompt")
    if "user" not in content:
        raise UserError(f"{path}: a prompt needs a 'user' template, and may have system, prefill, stop and chat")
    for key, value in content.items():
        if key not in fields:
            raise UserError(f"{path}: unknown field {key!r}; a prompt has {', '.join(fields)}")
        if not isinstance(value, fields[key]):
            raise UserError(f"{path}: {key!r} must be a {fields[key].__name__}, not {value!r}")
    shown = [name for name in columns_of(content["user"]) if name in gold]
    if shown and not content.pop("show_gold", False):
        raise UserError(
            f"{path}: {{{shown[0]}}} would show the model the answer; take it out, or add 'show_gold: true'"
        )
    content.pop("show_gold", None)
    stop = tuple(str(text) for text in content.pop("stop", ()))
    return replace(Prompt(name=path.stem, user=""), stop=stop, **content)
