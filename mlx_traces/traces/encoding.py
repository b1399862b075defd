"""Encode traces as token sequences: the prompt by the model's chat template, then the completion and its end.

Prompt, answer and end are encoded as one text, so the tokens are those of the template's own text. The model learns all
that follows its prompt: what the template writes before an answer (a space, the frame of a channel), the completion,
what the template writes after it, and the token at which generation ends. What the template itself opens (a
``<think>``) is part of the prompt.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_traces.engine.batching import Example
from mlx_traces.engine.offsets import exact_offsets
from mlx_traces.engine.sampling import decode, text_of
from mlx_traces.engine.thinking import reader_of
from mlx_traces.errors import UserError
from mlx_traces.models.chat import Chat, Rendered
from mlx_traces.models.loading import LoadedModel
from mlx_traces.records import Trace
from mlx_traces.tasks.thoughts import FINAL, TAGS, closing_of, move_spans, parts, tagged_parts, usual

ANSWER = {"role": "assistant", "content": "x"}  # a placeholder where only the text around an answer matters
CLOSED = {TAGS[0][1]: f"\n{TAGS[0][1]}\n\n", TAGS[-1][1]: f"\n{TAGS[-1][1]}\n"}  # an empty thought
TALK = ({"role": "user", "content": "x"}, ANSWER, {"role": "user", "content": "x"})


@dataclass
class Encoded:
    """Examples, and counts of what was left out or changed.

    ``over_long`` counts skipped traces, ``empty`` those without a token to learn, ``cut`` those that lost their end,
    ``turns`` earlier turns of the assistant that are not learned, ``thinking`` traces with a thought for which the
    template's thinking switch was turned on.
    """

    examples: list[Example]
    over_long: int = 0
    empty: int = 0
    cut: int = 0
    turns: int = 0
    thinking: int = 0


def encode_all(
    loaded: LoadedModel,
    traces: Iterable[tuple[str, Trace]],
    max_length: int,
    over_long: str,
    thinking: bool | None = None,
) -> Encoded:
    """Encode (where, trace) pairs; ``over_long`` (skip, cut or refuse) is for those of more than ``max_length`` tokens.

    ``thinking`` sets the template's switch; None leaves it as each trace was made.

    Raises:
        UserError: with the trace's place, if the chat template refuses it, its completion is empty or has a thought for
            which the prompt leaves no room, or it is too long and ``over_long`` is "refuse".
    """
    encoded = Encoded([])
    end = turn_end(loaded)
    for where, trace in traces:
        if not trace.completion.strip():
            raise UserError(f"{where}: 'completion' is empty; there is nothing to learn")
        try:
            example = encode(loaded, trace, end, thinking, encoded)
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
        elif not example.count:
            encoded.empty += 1
            continue
        encoded.examples.append(example)
    return encoded


def encode(
    loaded: LoadedModel, trace: Trace, end: int | None, thinking: bool | None = None, counts: Encoded | None = None
) -> Example:
    """Encode one trace; the completion, its stop token ``end`` and earlier turns of the assistant are learned.

    A completion that was cut off (``finish_reason`` "length") has no stop token to learn, nor has one with an open
    thought that does not say how it ended (None). One that this model sampled is learned as its exact tokens. Those
    that were inserted to close a thought or to keep it open are not learned, and in another model's tokens no token
    that has a part of their text. A trace without messages is plain text, learned from its first token on.

    An earlier turn is learned, with its end, if the template writes it unchanged, and one with a thought only if it
    stands there as the model would write it. Templates of reasoning models strip thoughts from earlier turns or write
    them as an answer; the model never wrote such a turn.

    Args:
        loaded: the model; its ``template_args``, if set, override the trace's.
        trace: the conversation.
        end: the token of `turn_end`; with None only the completion is learned, without earlier turns and an end.
        thinking: the template's thinking switch; None for the trace's.
        counts: its ``turns`` and ``thinking`` are increased.

    Raises:
        UserError: if the template refuses the conversation, the completion has a thought that the prompt rules out, or
            it has inserted tokens of another model and does not say where their text is.
    """
    counts = counts if counts is not None else Encoded([])
    cut = trace.finish_reason == "length" or (trace.finish_reason is None and tagged_parts(trace.completion)[2])
    stop = None if cut else end
    if not trace.messages:
        ids = list(loaded.chat.encode(trace.completion))
        trained = _sampled(loaded, trace, ids, [True] * len(ids), "", trace.completion)
        ending = () if stop is None else (stop,)
        return Example(trace.id, (*ids, *ending), (*trained, *[True] * len(ending)))
    chat = loaded.chat
    if trace.template_args and not loaded.template_args:
        chat = replace(chat, arguments=trace.template_args)
    thinking = trace.thinking if thinking is None else thinking
    prompt, completion, thinking = _render(chat, trace, thinking, counts)
    ending = "" if stop is None else decode(loaded.tokenizer, [stop])
    frame = _frame(chat, prompt, thinking, ending)
    spans = []
    if end is not None:
        turns = [place for place, turn in enumerate(trace.messages) if turn["role"] == "assistant"]
        learned = [place not in (trace.not_learned or ()) for place in turns]
        spans = _earlier(loaded, chat, prompt, frame, thinking, learned, counts)
    own, size = list(trace.completion_ids or ()), len(loaded.tokenizer._tokenizer)
    if not all(isinstance(token, int) and 0 <= token < size for token in own):
        own = []  # another model's tokens
    body = own[:-1] if own and own[-1] in loaded.stop_ids else own
    ways = (usual(text_of(loaded, body, begun=begun), loaded.own_tags) for begun in (True, False))
    if said := next((text for text in ways if text and completion.endswith(text)), ""):
        before = completion.removesuffix(said)
        ids, trained = _joined(chat, prompt, before, spans)
        own = own if stop is not None or cut else body
        forced = {*(trace.forced or ())}
        return Example(trace.id, (*ids, *own), (*trained, *(place not in forced for place in range(len(own)))))
    answer = _answer(chat, prompt, completion, trace.completion, thinking, frame, stop is not None)
    ids, trained = _joined(chat, prompt, answer + ending, spans)
    if stop is not None and ids[-1] != stop:
        ids, trained = [*ids, stop], [*trained, True]
    body = len(ids) - (stop is not None)
    marks = (*(loaded.own_tags or ()), *(part.strip() for part in frame[:2]))
    drawn = _sampled(loaded, trace, ids[:body], trained[:body], prompt.text, completion, marks)
    return Example(trace.id, tuple(ids), (*drawn, *trained[body:]))


def _sampled(
    loaded: LoadedModel,
    trace: Trace,
    ids: list[int],
    trained: list[bool],
    prompt: str,
    completion: str,
    marks: Sequence[str] = (),
) -> list[bool]:
    """Return ``trained``, but False for each token that has a part of a text that was inserted into the trace.

    ``completion`` is the trace's, without a beginning that is the end of the ``prompt``. The ids are those of both
    texts, with ``marks`` that the template writes around them.
    """
    if trace.forced and trace.forced_text is None:
        raise UserError(
            "tokens were forced into this completion, and only the model that sampled it knows their words, since an "
            "earlier version wrote the trace; train that model, or generate the trace anew"
        )
    if not trace.forced_text:
        return trained
    shift = len(prompt) - len(trace.completion) + len(completion)
    whole = decode(loaded.tokenizer, ids)
    spans = [(start + shift, end + shift) for start, end in trace.forced_text]
    starts, ends = exact_offsets(ids, whole, reader_of(loaded.tokenizer, loaded.own_tags).pieces).T
    edges = np.zeros(len(whole) + 1, np.int64)
    for start, end in move_spans(spans, prompt + completion, whole, marks):
        edges[start] += 1
        edges[end] -= 1
    before = np.append(0, np.cumsum(np.cumsum(edges) > 0))  # characters of the spans before each place
    return [own and not put for own, put in zip(trained, before[ends] > before[starts], strict=True)]


def _render(chat: Chat, trace: Trace, thinking: bool | None, counts: Encoded) -> tuple[Rendered, str, bool | None]:
    """Return the prompt, the completion without what the prompt already opens, and the thinking switch.

    An unset switch is turned on if the prompt would otherwise leave no room for the completion's thought.
    """
    messages = [dict(turn) for turn in trace.messages]
    for switch in dict.fromkeys((thinking, True if thinking is None else thinking)):
        prompt = chat.prompt(messages, thinking=switch)
        completion = _unopened(prompt, trace.completion)
        if completion != trace.completion or not prompt.closed or parts(completion)[0] is None:
            counts.thinking += switch != thinking
            return prompt, completion, switch
    way = "set thinking (--thinking)" if chat.switch else "its template has no thinking switch; leave such traces out"
    raise UserError(f"the completion has a thought, and the prompt, {prompt.text[-20:]!r}, leaves it no room; {way}")


def _unopened(prompt: Rendered, said: str) -> str:
    """Return a completion without what the prompt already opens."""
    return said.removeprefix(prompt.opened if said.startswith(prompt.opened) else prompt.opened.strip())


def _frame(chat: Chat, prompt: Rendered, thinking: bool | None, ending: str) -> tuple[str, str, str]:
    """Return what the template writes before an answer, between the answer and the stop token, and after the answer.

    The first text begins after the prompt; it is without a thought that the template writes, usually an empty one. The
    third is all that follows the answer.
    """
    place = len(prompt.messages) - 1
    _, between, after = chat.around([*prompt.messages, ANSWER], place, thinking, reply=False)
    asked = prompt.turn if between.startswith(prompt.turn) else prompt.turn.removesuffix(prompt.opened)
    head = between.removeprefix(asked) if between.startswith(asked) else ""
    if head.strip() != FINAL and any(tag in head for tags in TAGS for tag in tags):
        head = ""  # FINAL ends a thought, but also comes before an answer without one
    at = after.find(ending) if ending else -1
    return head, after[:at] if at > 0 else "", after


def _answer(
    chat: Chat,
    prompt: Rendered,
    completion: str,
    said: str,
    thinking: bool | None,
    frame: tuple[str, str, str],
    whole: bool,
) -> str:
    """Return the text that is learned after the prompt; if ``whole``, with what the template writes after an answer.

    ``said`` is the ``completion`` with what the prompt already opens. An open thought has no answer to put a frame
    around.
    """
    head, tail, after = frame
    tail = tail if whole else ""
    thought, answer, is_open = tagged_parts(said)
    closing = closing_of(prompt.opened, chat.own_tags)
    if completion.startswith(TAGS[0][0]):
        if head.strip() == FINAL:  # of gpt-oss, whose thought and answer are messages of their own
            final = "" if is_open else f"<|end|><|start|>assistant{FINAL}{answer}"
            return f"<|channel|>analysis<|message|>{thought}{final}{tail}"
        completion = _in_own_tags(chat, prompt, completion, closing)
    elif closing and whole and thought is None:
        # or the model would learn to end its turn inside the thought
        return CLOSED.get(closing, closing) + head + completion.lstrip() + tail
    if tail.strip() and completion.rstrip().endswith(tail.strip()):  # sampled with the template's own words
        completion = completion.rstrip().removesuffix(tail.strip())
    if head.strip():
        if is_open:
            return completion
        if head.strip() in completion:
            return completion + tail
        tags = (*TAGS, *filter(None, [chat.own_tags]))
        thought = max((completion.rfind(tag) + len(tag) for _, tag in tags if tag in completion), default=0)
        return completion[:thought] + head + completion[thought:].strip() + tail
    written = _written(chat, prompt, completion, thinking, head, after) or completion
    written = written.lstrip() if head else written
    return head + (written.rstrip() if tail else written) + tail


def _in_own_tags(chat: Chat, prompt: Rendered, completion: str, closing: str | None) -> str:
    """Put a thought into the model's own tags instead of the usual ones; the prompt may hold the opening one."""
    opening, own = chat.tags or (None, None)
    if closing:
        opening, own = "", closing
        completion = completion.removeprefix(TAGS[0][0] + "\n" if prompt.opened.endswith("\n") else TAGS[0][0])
    return completion.replace(TAGS[0][0], opening, 1).replace(TAGS[0][1], own, 1) if own else completion


def _written(chat: Chat, prompt: Rendered, completion: str, thinking: bool | None, head: str, after: str) -> str | None:
    """Return a completion as the template writes it; ``None`` if that differs in more than white space."""
    turns = [*prompt.messages, {"role": "assistant", "content": completion}]
    try:
        text = chat.text(turns, thinking, reply=False)
    except UserError:
        return None
    start = prompt.text + head
    if not text.startswith(start) or not text.endswith(after):
        return None
    found = text[len(start) : len(text) - len(after)]
    return found if found.split() == completion.split() else None


def _earlier(
    loaded: LoadedModel,
    chat: Chat,
    prompt: Rendered,
    frame: tuple[str, str, str],
    thinking: bool | None,
    learned: Sequence[bool],
    counts: Encoded,
) -> list[tuple[int, int]]:
    """Find the spans of the assistant's earlier turns, with their ends, in the prompt; count those that are not found.

    ``learned`` says for each of these turns whether it may be learned.
    """
    text, head, spans, wanted = prompt.text, frame[0], [], iter(learned)
    for place, turn in enumerate(prompt.messages):
        if turn["role"] != "assistant" or not next(wanted):
            continue
        before, after, _ = chat.around(prompt.messages, place, thinking)
        said = turn["content"]
        contents = (said, said.strip(), said.lstrip(), said.rstrip())  # templates differ in what they strip
        start = len(before)
        if not before or not text.startswith(before):
            contents = ()
        elif parts(said)[0] is not None:  # a template may write the answer's frame or an empty thought before it
            asked = chat.around(prompt.messages, place - 1, thinking)[1]
            own = prompt.turn + _answer(chat, prompt, _unopened(prompt, said), said, thinking, frame, whole=False)
            same = "".join((asked + said).split()) == "".join(own.split())
            contents = contents if same and not prompt.closed else ()
        content = next((one for one in contents if one and text.startswith(one + after, start)), None)
        if content is None:
            counts.turns += 1
            continue
        _, after = _until_end(loaded, after)
        start -= len(head) if head and before.endswith(head) else 0
        spans.append((start, len(before) + len(content) + len(after)))
    return spans


def _until_end(loaded: LoadedModel, after: str) -> tuple[int | None, str]:
    """Return the first stop token in a text, and the text up to and including it; None and "" without one."""
    ends = ((after.find(text), token, text) for token in loaded.stop_ids if (text := decode(loaded.tokenizer, [token])))
    at, token, text = min((end for end in ends if end[0] >= 0), default=(0, None, ""))
    return token, after[:at] + text


def _joined(chat: Chat, prompt: Rendered, more: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """Encode the prompt and the learned text ``more`` together; return token ids and whether each is learned.

    The prompt's tokens stay those of sampling: if the tokenizer would merge its end with the text after it, that text
    is encoded alone.
    """
    text, first = prompt.text + more, list(prompt.ids)
    ids, count = list(chat.ids(text)), len(first)
    if ids[:count] != first:
        apart = first + list(chat.tokenizer.encode(more, add_special_tokens=False))
        if decode(chat.tokenizer, apart) == decode(chat.tokenizer, ids):
            return apart, [*chat.flags(prompt.text, first, spans), *[True] * (len(apart) - count)]
        spans, count = [*spans, (len(prompt.text), len(text))], len(ids)  # the token at the border is learned
    trained = chat.flags(text, ids, spans)
    return ids, [*trained[:count], *[True] * (len(ids) - count)]


def turn_end(loaded: LoadedModel) -> int:
    """Return the token that ends the assistant's turn: the one that the chat template writes, else the model's own.

    Raises:
        UserError: if the model names none; without it no model learns to stop.
    """
    if loaded.tokenizer.has_chat_template:
        for turns in (TALK[:2], TALK):  # at the end of a conversation, and within one
            after = loaded.chat.around(turns, 1, reply=False)[1]
            if (end := _until_end(loaded, after)[0]) is not None:
                return end
    eos = loaded.tokenizer.eos_token_id
    if eos is None and not loaded.stop_ids:
        raise UserError(f"{loaded.name} names no token that ends a text; a model trained without one never stops")
    return eos if eos is not None else min(loaded.stop_ids)


def describe(encoded: Encoded, max_length: int) -> list[str]:
    """Return lines on what was left out or changed."""
    lines = []
    if encoded.over_long:
        lines.append(f"{encoded.over_long} traces have more than {max_length} tokens and are left out (max_length)")
    if encoded.empty:
        lines.append(f"{encoded.empty} traces have no token to learn and are left out")
    if encoded.cut:
        lines.append(f"{encoded.cut} traces were cut at {max_length} tokens and lost their end (max_length)")
    if encoded.turns:
        lines.append(
            f"{encoded.turns} earlier turns of the assistant are not learned: the template writes them differently, "
            "mostly without their thoughts"
        )
    if encoded.thinking:
        lines.append(f"{encoded.thinking} traces with a thought are learned with the thinking switch on (thinking)")
    return lines
