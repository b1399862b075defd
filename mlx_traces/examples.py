"""Traces as token sequences: the prompt as the model's chat template writes it, the completion and its end learned."""

from collections.abc import Iterable
from dataclasses import dataclass

from mlx_traces.batching import Example
from mlx_traces.errors import UserError
from mlx_traces.models import THINK_OPENERS, LoadedModel, Rendered
from mlx_traces.records import Trace
from mlx_traces.traces import parts


@dataclass
class Encoded:
    """Examples, and what became of the traces that are not among them."""

    examples: list[Example]
    over_long: int = 0
    cut: int = 0


def encode_all(
    loaded: LoadedModel,
    traces: Iterable[tuple[str, Trace]],
    max_length: int,
    over_long: str,
    thinking: bool | None = None,
) -> Encoded:
    """Encode (where, trace) pairs; sequences of more than ``max_length`` tokens are skipped, cut or refused.

    Raises:
        UserError: for a trace that the chat template refuses, an empty completion, or, with ``over_long`` "refuse",
            one that is too long; each with its place.
    """
    encoded = Encoded([])
    end = turn_end(loaded)
    for where, trace in traces:
        if not trace.completion.strip():
            raise UserError(f"{where}: 'completion' is empty; there is nothing to learn")
        try:
            example = encode(loaded, trace, end, thinking)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if len(example.ids) > max_length:
            if over_long == "refuse":
                raise UserError(
                    f"{where}: {len(example.ids)} tokens, more than max_length {max_length}; raise it, "
                    "or set over_long to skip or cut"
                )
            if over_long == "skip":
                encoded.over_long += 1
                continue
            example = Example(example.id, example.ids[:max_length], example.trained[:max_length])
            if not example.count:
                encoded.over_long += 1
                continue
            encoded.cut += 1
        encoded.examples.append(example)
    return encoded


def encode(loaded: LoadedModel, trace: Trace, end: int, thinking: bool | None = None) -> Example:
    """Encode one trace: learned are the completion, its stop token ``end``, and earlier turns of the assistant.

    ``thinking`` sets the template's switch for the last turn, as `LoadedModel.render` does.
    A completion that was cut off (``finish_reason`` "length") has no stop token to learn.
    An earlier turn is learned where the template leaves it as it was; templates of reasoning models strip thoughts
    from them. What the template itself opens (a ``<think>``) is part of the prompt; a completion without a thought
    closes it first. A trace without messages is a text, learned from its first token on.
    """
    stop = () if trace.finish_reason == "length" else (end,)
    if not trace.messages:
        ids = [*loaded.tokenizer.encode(trace.completion), *stop]
        return Example(trace.id, tuple(ids), (True,) * len(ids))
    messages = [dict(turn) for turn in trace.messages]
    rendered = loaded.render_turns(messages, thinking=thinking)
    completion = trace.completion
    if rendered.opened and completion.startswith(rendered.opened.strip()):
        completion = completion.removeprefix(rendered.opened).removeprefix(rendered.opened.strip())
    elif rendered.opened.strip() in THINK_OPENERS and stop and parts(completion)[0] is None:
        completion = f"\n</think>\n\n{completion}"  # or the model would learn to end its turn inside the thought
    ids, trained = list(rendered.ids), [False] * len(rendered.ids)
    if any(turn["role"] == "assistant" for turn in messages):
        ids, trained = _with_turns(loaded, messages, rendered)
    answer = [*_ids(loaded, completion), *stop]
    return Example(trace.id, (*ids, *answer), (*trained, *[True] * len(answer)))


def _with_turns(
    loaded: LoadedModel, messages: list[dict[str, str]], rendered: Rendered
) -> tuple[list[int], list[bool]]:
    """Encode a rendered prompt in pieces, its assistant turns and their stop tokens marked as learned."""
    text, at = rendered.text, 0
    ids = list(rendered.ids[: len(rendered.ids) - len(_ids(loaded, text))])  # what no template writes: a first token
    trained = [False] * len(ids)
    for place, turn in enumerate(messages):
        if turn["role"] != "assistant" or place == 0:
            continue
        start = len(before) if text.startswith(before := loaded.render_turns(messages[:place]).text) else -1
        said = start  # a plain chat has a space before the turn, which is learned with it as in the last turn
        if start >= 0 and not loaded.tokenizer.has_chat_template:
            said += len(text[start:]) - len(text[start:].lstrip())
        # Templates differ in whether they strip a turn.
        content = next((c for c in (turn["content"], turn["content"].strip()) if text.startswith(c, said)), None)
        if start < at or content is None:
            continue
        stop = said + len(content)
        for piece, learned in ((text[at:start], False), (text[start:stop], True)):
            more = _ids(loaded, piece)
            ids, trained = ids + more, trained + [learned] * len(more)
        at = stop
        after = _ids(loaded, text[stop : stop + 64])
        if after and after[0] in loaded.stop_ids:
            ids, trained = [*ids, after[0]], [*trained, True]
            at = stop + len(loaded.tokenizer.decode([after[0]], skip_special_tokens=False))
    rest = _ids(loaded, text[at:])
    return ids + rest, trained + [False] * len(rest)


def turn_end(loaded: LoadedModel) -> int:
    """Return the token that ends the assistant's turn: what the chat template writes there, else the model's own.

    Raises:
        UserError: if the model names none; without it no model learns to stop.
    """
    if loaded.tokenizer.has_chat_template:
        turns = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "y"},
            {"role": "user", "content": "z"},
        ]
        text = loaded.render_turns(turns).text
        after = _ids(loaded, text[text.rfind("y", 0, text.rfind("z")) + 1 :])
        if after and after[0] in loaded.stop_ids:
            return after[0]
    eos = loaded.tokenizer.eos_token_id
    if eos is None and not loaded.stop_ids:
        raise UserError(f"{loaded.name} names no token that ends a text; a model trained without one never stops")
    return eos if eos is not None else min(loaded.stop_ids)


def _ids(loaded: LoadedModel, text: str) -> list[int]:
    return list(loaded.tokenizer.encode(text, add_special_tokens=False)) if text else []


def describe(encoded: Encoded, max_length: int) -> list[str]:
    """Say in lines what was left out or cut."""
    lines = []
    if encoded.over_long:
        lines.append(f"{encoded.over_long} traces have more than {max_length} tokens and are left out (max_length)")
    if encoded.cut:
        lines.append(f"{encoded.cut} traces were cut at {max_length} tokens and lost their end (max_length)")
    return lines
