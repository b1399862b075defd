"""A model's chat template: the text of a conversation, the place of each turn in it, its tokens. No MLX.

To find a turn, the conversation is rendered again with a mark in the turn's place. The text around the mark is what the
template writes around the turn. This works for any template.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Any

from mlx_traces.errors import UserError, choices, first_line
from mlx_traces.tasks.prompts import Message
from mlx_traces.tasks.thoughts import OPENERS, TAGS, Pair, after_last, closing_of, own_pair, usual
from mlx_traces.text import clean

SWITCHES = ("enable_thinking", "thinking", "reasoning", "enable_reasoning")  # names of the thinking switch
PROBE = ({"role": "user", "content": "Hello."},)
_DIRECTIVES = (f"%{flag}{letter}" for letter in "aAbBcdDeFGhHIjmMpSTuUVwWxXyYzZ" for flag in ("-", ""))
DIRECTIVES = tuple(_DIRECTIVES)  # of strftime
# Of transformers' renderer, beside tools and documents: not variables of a template.
RESERVED = (
    *("conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
    *("sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
)


@dataclass(frozen=True)
class Rendered:
    """A problem as the model reads it.

    ``ids`` are the prompt's tokens, ``text`` is their text. ``opened`` is what the assistant's turn holds before the
    first sampled token: a thought that the template opens, the prompt's prefill. Graders get ``opened`` + completion.
    ``turn`` is all that the template writes after the last message, the head of the assistant's turn included, and
    ``closed`` says that it closes a thought there. ``messages`` are the turns as the template got them; a system
    message may have been moved. ``thoughtless`` says, for an error message, why the completion will have no thought; it
    is empty if there may be one.
    """

    ids: tuple[int, ...]
    text: str
    opened: str
    turn: str = ""
    closed: bool = False
    messages: tuple[Message, ...] = ()
    thoughtless: str = ""


@dataclass
class Chat:
    """A model's chat template with its fixed variables; a plain template if the model has none.

    ``arguments`` are the template's other variables (``reasoning_effort``), ``day`` is the date that it prints, None
    for today's. ``notes`` gets lines that the user should see, each once.

    Raises:
        UserError: for an argument that is not a variable of templates but a setting of what renders them.
    """

    tokenizer: Any
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    day: date | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if name := next((name for name in self.arguments if name in RESERVED), None):
            raise UserError(f"template_args: {name} is a setting of the renderer, no template's variable; leave it out")

    # ------------------------------------------------------------------------------------------ text

    def text(self, messages: Sequence[Message], thinking: bool | None = None, reply: bool = True) -> str:
        """Render turns; with ``reply`` also the beginning of the assistant's next turn.

        Raises:
            UserError: if the template refuses them or fails.
        """
        if not self.tokenizer.has_chat_template:
            return _as_plain_chat(messages, reply)
        switch = {} if thinking is None else {self.switch or SWITCHES[0]: thinking}
        return self._apply(messages, reply, {**self.arguments, **switch})

    def _apply(self, messages: Sequence[Message], reply: bool, arguments: Mapping[str, Any]) -> str:
        given = {"tokenize": False, "add_generation_prompt": reply, **arguments}
        turns = [dict(turn) for turn in messages]
        try:
            if self._in_python:
                return self.tokenizer.apply_chat_template(turns, **given)
            tokenizer = self.tokenizer._tokenizer  # without a template if its class renders conversations itself
            if self.day and tokenizer.chat_template and "strftime_now" in (own := tokenizer.get_chat_template()):
                given["chat_template"] = _dated(own, self.day)
            # mlx_lm's wrapper sets the switch itself; the tokenizer's own method leaves the template its default.
            return tokenizer.apply_chat_template(turns, **given)
        except Exception as error:  # a template is a program and may raise anything
            told = clean(first_line(error))
            raise UserError(f"{self.name}: its chat template refuses this conversation ({told})") from None

    @property
    def _in_python(self) -> bool:
        return self.tokenizer._chat_template is not None  # a template in Python, which only mlx_lm knows

    @cached_property
    def switch(self) -> str | None:
        """The name of the template's thinking switch: the first that changes a prompt, ``None`` if none does."""
        return next((name for name in SWITCHES if self._differ({name: True}, {name: False})), None)

    @cached_property
    def dated(self) -> bool:
        """Whether the template prints the date."""
        if self._in_python or not self.tokenizer.has_chat_template:
            return False
        days = (date(2001, 2, 3), date(2014, 11, 25))
        texts = [Chat(self.tokenizer, self.name, self.arguments, day)._try({}) for day in days]
        return texts[0] != texts[1]

    def _try(self, arguments: Mapping[str, Any]) -> str | None:
        try:
            return self._apply(PROBE, True, {**self.arguments, **arguments})
        except UserError:
            return None

    def _differ(self, *arguments: Mapping[str, Any]) -> bool:
        """Whether the prompts with these arguments differ; those that the template refuses are ignored."""
        texts = [self._try(given) for given in arguments]
        return None not in texts and len(set(texts)) == len(texts)

    def _tell(self, thinking: bool | None) -> None:
        """Note a switch or a variable that the template does not use."""
        if not self.tokenizer.has_chat_template:
            self.note(f"{self.name} has no chat template; a plain one is used: 'User: ...', 'Assistant:'")
            return
        if thinking is not None and self.switch is None:
            self.note(f"{self.name}: its chat template has no thinking switch{self._others}")
        for name in self._idle:
            self.note(f"{self.name}: its chat template does not use {name}{self._others}")

    @cached_property
    def _idle(self) -> list[str]:
        """The arguments without effect: a prompt is the same with their value, with another value and without.

        transformers refuses any other value of tools and documents.
        """
        found = []
        for name, value in self.arguments.items():
            rest = {other: given for other, given in self.arguments.items() if other != name}
            bare = Chat(self.tokenizer, self.name, rest, self.day)
            values = (value,) if name in ("tools", "documents") else (value, "x", True)
            if len({bare._try(given) for given in ({}, *({name: given} for given in values))}) == 1:
                found.append(name)
        return found

    @cached_property
    def _others(self) -> str:
        """Name the variables that the template reads and that may be set."""
        if self._in_python:
            return ""
        from jinja2 import Environment, TemplateError, meta

        usual = {
            "messages",
            "tools",
            "documents",
            "add_generation_prompt",
            "raise_exception",
            "strftime_now",
            "namespace",
        }
        usual |= {*self.tokenizer._tokenizer.special_tokens_map, *self.arguments, "loop", "range"}
        try:
            read = meta.find_undeclared_variables(Environment().parse(self.tokenizer._tokenizer.get_chat_template()))
        except (TemplateError, ValueError):  # a tag that only transformers knows, or no default template
            return ""
        names = sorted(name for name in read - usual if not name.endswith("_token"))[:8]
        return f"; it reads {choices(names)}, which --template-arg NAME=VALUE sets" if names else ""

    @property
    def own_tags(self) -> Pair | None:
        """The tags that the tokenizer names for thoughts, if they are not among ``thoughts.TAGS``."""
        return own_pair(self.tokenizer.think_start, self.tokenizer.think_end)

    @property
    def tags(self) -> Pair | None:
        """The tags that the tokenizer names for thoughts; else, if <think> is no token, a pair of ``TAGS`` that are."""
        if self.tokenizer.think_start and self.tokenizer.think_end:
            return self.tokenizer.think_start, self.tokenizer.think_end
        pairs = () if self._is_token(TAGS[0][0]) else TAGS
        return next((pair for pair in pairs if all(map(self._is_token, pair))), None)

    def _is_token(self, text: str) -> bool:
        token = self.tokenizer._tokenizer.convert_tokens_to_ids(text)
        return token is not None and self.tokenizer._tokenizer.convert_ids_to_tokens(token) == text

    def note(self, line: str) -> None:
        """Add a note that is not there yet."""
        if line not in self.notes:
            self.notes.append(line)

    # ------------------------------------------------------------------------------------------ the prompt

    def prompt(self, messages: Sequence[Message], prefill: str = "", thinking: bool | None = None) -> Rendered:
        """Render a conversation up to the assistant's next turn, which begins with ``prefill``.

        Raises:
            UserError: if the template refuses it, with a system message and without.
        """
        self._tell(thinking)
        messages, text = self._settled(list(messages), thinking)
        turn = self.around(messages, len(messages) - 1, thinking)[1]
        turn = turn if text.endswith(turn) else ""
        opened = self._opened(turn)
        closed = any(closing in turn for _, closing in (*TAGS, *filter(None, [self.own_tags])))
        if closing_of(opened, self.own_tags) and any(opener in prefill for opener in OPENERS):
            text, opened = text[: -len(opened)], ""  # the prefill opens the thought itself
        if prefill and not self.tokenizer.has_chat_template:
            text += " "
        text, opened = text + prefill, opened + prefill
        thoughtless = self._thoughtless(text, opened, closed)
        return Rendered(self.ids(text), text, opened, turn, closed, tuple(messages), thoughtless)

    def plain(self, text: str, prefill: str = "") -> Rendered:
        """Encode a text without the template; ``prefill`` is the end of the text."""
        return Rendered(self.encode(text), text, prefill, thoughtless=self._thoughtless(text, prefill, closed=False))

    def _thoughtless(self, text: str, opened: str, closed: bool) -> str:
        """Say why a completion will have no thought: none is open or requested, or the template closes it."""
        if after_last(usual(opened, self.own_tags))[1]:
            return ""
        if closed:
            return "the chat template leaves no thought to bound; pass --thinking"
        asked = text.lower()
        if self.tags is not None or any(opening.lower() in asked for opening in OPENERS):
            return ""
        return (
            "neither the model nor the prompt has a tag for thoughts; pass a prompt that asks for one "
            f"(--prompt thinking), or open one with --prefill {TAGS[0][0]!r}"
        )

    def _settled(self, messages: list[Message], thinking: bool | None) -> tuple[list[Message], str]:
        """Render; system messages that the template refuses or drops are joined, else put before the next question."""
        first = next((at for at, turn in enumerate(messages) if turn["role"] != "system"), len(messages))
        later = any(turn["role"] == "system" for turn in messages[first:])
        for kept in dict.fromkeys((len(messages), first, 0)):
            turns = messages if kept == len(messages) else _moved(messages, kept, self.name)
            last = kept == 0 or not (first or later)
            try:
                text = self.text(turns, thinking)
            except UserError:
                if last:
                    raise
                continue
            if last or self._has_systems(turns, text, thinking):
                break
        if kept < len(messages):
            if kept < first:
                self.note(f"{self.name} takes no system message; it is put before the first question")
            elif first > 1:
                self.note(f"{self.name} takes one system message; those at the beginning are joined")
            if later:
                self.note(f"{self.name} takes no system message within a conversation; it is put before the question")
        return turns, text

    def _has_systems(self, messages: Sequence[Message], text: str, thinking: bool | None) -> bool:
        """Whether a rendered text has all system messages; a template may take words out of one (``/no_think``)."""
        return all(
            turn["content"].strip() in text or any(self.around(messages, place, thinking))
            for place, turn in enumerate(messages)
            if turn["role"] == "system"
        )

    def _opened(self, turn: str) -> str:
        """Return what the template itself writes into the assistant's turn: ``<think>`` and what follows."""
        own = self.tokenizer.think_start
        starts = [turn.find(opener) for opener in (*OPENERS, *([own] if own else []))]
        return turn[min(found) :] if (found := [start for start in starts if start >= 0]) else ""

    def around(
        self, messages: Sequence[Message], place: int, thinking: bool | None = None, reply: bool = True
    ) -> tuple[str, str, str]:
        """Return the text before the turn at ``place``, from that turn to the next, and after the next turn.

        All three are empty if the template does not write the turn, or refuses the mark in its place.
        """
        contents = "".join(turn["content"] for turn in messages)
        digest = hashlib.sha256(contents.encode("utf-8", "replace")).hexdigest()[:12]
        marks = {place: f"\ue000{digest}", place + 1: f"\ue001{digest}"}  # private characters, in no text
        marked = [{**turn, "content": marks.get(at, turn["content"])} for at, turn in enumerate(messages)]
        try:
            before, found, rest = self.text(marked, thinking, reply).partition(marks[place])
        except UserError:
            return "", "", ""
        between, _, after = rest.partition(marks[place + 1])
        return (before, between, after) if found else ("", "", "")

    # ------------------------------------------------------------------------------------------ tokens

    def ids(self, text: str) -> tuple[int, ...]:
        """Encode a rendered text. A template writes all special tokens itself, so the tokenizer adds none."""
        if self.tokenizer.has_chat_template:
            return tuple(self.tokenizer.encode(text, add_special_tokens=False))
        return self.encode(text)

    def encode(self, text: str) -> tuple[int, ...]:
        """Encode a text without a template, as one that goes on: without the end (EOS) that some tokenizers append."""
        ids = self.tokenizer.encode(text)
        return tuple(ids[: len(ids) - self._appended])

    @cached_property
    def _appended(self) -> int:
        """The number of special tokens that the tokenizer appends to a text."""
        own, ids = self.tokenizer.encode("x", add_special_tokens=False), self.tokenizer.encode("x")
        more = len(ids) - len(own)
        return next((more - at for at in range(more) if ids[at : at + len(own)] == own), 0)

    def flags(self, text: str, ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[bool]:
        """Return for each token whether a part of it lies in one of the spans, each a range of the text's characters.

        Uses the tokenizer's own character offsets. Without those, the text up to each end of a span is encoded and
        compared with the beginning of ``ids``.
        """
        if not spans:
            return [False] * len(ids)
        trained = [False] * len(ids)
        places = self._places(text, ids)
        for start, stop in spans:
            if places is not None:
                for at, (first, last) in enumerate(places):
                    trained[at] |= first < stop and (last > start or first == start)
            else:
                for at in range(_common(self.ids(text[:start]), ids), _common(self.ids(text[:stop]), ids)):
                    trained[at] = True
        return trained

    def _places(self, text: str, ids: Sequence[int]) -> list[tuple[int, int]] | None:
        """Return each token's range of characters, the end exclusive; ``None`` if the tokenizer does not know it."""
        special = not self.tokenizer.has_chat_template
        try:
            found = self.tokenizer._tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        except (NotImplementedError, TypeError, ValueError):
            return None
        same = found["input_ids"][: len(ids)] == list(ids)  # an end that the tokenizer appends is not among the ids
        return [tuple(pair) for pair in found["offset_mapping"][: len(ids)]] if same else None


def _moved(messages: Sequence[Message], kept: int, name: str) -> list[Message]:
    """Join the first ``kept`` turns, which are system messages, and put later ones before the next question."""
    turns = [{"role": "system", "content": "\n\n".join(turn["content"] for turn in messages[:kept])}] if kept else []
    waiting: list[str] = []
    for turn in messages[kept:]:
        if turn["role"] == "system":
            waiting.append(turn["content"])
            continue
        if turn["role"] == "user":
            turn = {**turn, "content": "\n\n".join((*waiting, turn["content"]))}
            waiting = []
        turns.append(turn)
    if waiting:
        raise UserError(f"{name} takes no system message, and there is no question to put it before")
    return turns


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of two sequences' common prefix."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _dated(template: str, day: date) -> str:
    """Return the template with a macro before it that makes ``strftime_now`` print this day, at midnight."""
    parts = "".join(f'|replace("{directive}", "{day.strftime(directive)}")' for directive in DIRECTIVES)
    return "{% macro strftime_now(format) %}{{ format" + parts + " }}{% endmacro %}\n" + template


def _as_plain_chat(messages: Sequence[Message], reply: bool) -> str:
    """Write turns for a model without a chat template, each after its role's name; instructions have none."""
    labels = {"system": "", "developer": ""}
    turns = [labels.get(turn["role"], f"{turn['role'].capitalize()}: ") + turn["content"] for turn in messages]
    return "\n\n".join([*turns, "Assistant:"] if reply else turns)
