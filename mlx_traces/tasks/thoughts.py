r"""Thoughts in a response: the list of thinking tags, and how to find a thought and the text after it. No MLX.

Tags match in upper and lower case. The opening tag may be missing, since a chat template may have written it.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from mlx_traces.errors import unknown

Pair = tuple[str, str]

FINAL = "<|channel|>final<|message|>"
UNTAGGED = "Here are my reasoning steps:"  # Apriel's; it opens a thought only at the start of a response
SKY = ("<|begin_of_thought|>", "<|end_of_thought|>")
TAGS: tuple[Pair, ...] = (  # the first is the usual one
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),  # EXAONE Deep, Marco-o1
    ("<reasoning>", "</reasoning>"),
    ("<scratchpad>", "</scratchpad>"),
    ("<start_working_out>", "<end_working_out>"),  # Unsloth's GRPO
    SKY,  # Sky-T1
    ("[THINK]", "[/THINK]"),  # Magistral, Ministral
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<mm:think>", "</mm:think>"),  # MiniMax
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<unused94>thought", "<unused95>"),  # MedGemma
    ("<|channel|>analysis", FINAL),  # gpt-oss, as is the next one
    ("<|channel|>commentary", FINAL),
    (UNTAGGED, "[BEGIN FINAL RESPONSE]"),
)
OPENERS = tuple(opening for opening, _ in TAGS)
MARKUP: tuple[Pair, ...] = (("<solution>", "</solution>"), ("<response>", "</response>"), ("<output>", "</output>"))
AROUND_ANSWERS = (  # tags around what follows a thought
    *(tag for pair in MARKUP for tag in pair),  # Unsloth's GRPO, ERNIE, Marco-o1
    *("<|begin_of_solution|>", "<|end_of_solution|>"),
    *("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
    *("<|open|>response<|sep|>", "<|close|>response<|sep|>", "[END FINAL RESPONSE]"),
    *("<|begin_of_box|>", "<|end_of_box|>"),  # GLM-V
)
ENDS = (  # tokens that end a turn, in text that was decoded with them
    *("</s>", "<eos>", "<|im_end|>", "<|end|>", "<|return|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>"),
    *(
        "<|end_of_text|>",
        "<|end_of_role|>",
        "<|END_OF_TURN_TOKEN|>",
        "<end_of_turn>",
        "<turn|>",
        "<｜end▁of▁sentence｜>",
    ),
)


def _any(tags: Iterable[str]) -> str:
    return "|".join(re.escape(tag.lower()) for tag in sorted(set(tags), key=len, reverse=True))


# Both patterns match text in lower case: a pattern that ignores case is ten times as slow.
_AROUND = re.compile(_any(AROUND_ANSWERS))
_TAG = re.compile(
    rf"(?=<[a-z/|]|[\[◁][a-z/]|\A)(?!<\|end\|>(?!<\|(?:start|channel)\|>))(?:(?:<\|end\|>)?(?:<\|start\|>assistant)?(?:"
    rf"(?P<open>{_any(tag for tag in OPENERS if tag != UNTAGGED)})(?:<\|message\|>)?"
    rf"|(?P<close>{_any(closing for _, closing in TAGS)}))"
    rf"|(?P<opens>\A\s*{UNTAGGED.lower()}(?=(?s:.*){re.escape(TAGS[-1][1].lower())}))|{_AROUND.pattern})"
)


def tags(text: str) -> Iterator[re.Match]:
    """Yield the tags in a text; ``lastgroup`` is ``open``, ``opens``, ``close``, or None for one around an answer."""
    return _TAG.finditer(small(text))


def own_pair(opening: str | None, closing: str | None) -> Pair | None:
    """Return the thinking tags that a model's tokenizer names, if they are not among ``TAGS``."""
    return (opening, closing) if opening and closing and opening not in OPENERS else None


def usual(text: str, own: Sequence[str] | None) -> str:
    """Return a model's text with the usual tags in place of its own ones, which graders do not know."""
    for tag, usual_tag in zip(own or (), TAGS[0], strict=False):
        text = text.replace(tag, usual_tag)
    return text


def small(text: str) -> str:
    """Return the text in lower case with the same length; only İ has a lower case of two characters."""
    return text.replace("İ", "I").lower()


_AROUND_SMALL = tuple(tag.lower() for tag in AROUND_ANSWERS)
_MARKUP_TAGS = frozenset(tag for pair in MARKUP for tag in pair)
_SMALL = tuple((opening.lower(), closing.lower()) for opening, closing in TAGS)
_CLOSINGS = {**dict(_SMALL), None: _SMALL[-1][1]}  # UNTAGGED is in a group of its own
_STYLED = (TAGS[0][1], SKY[1])


_ENDS_BACKWARDS = re.compile(rf"(?>(?:\s|{'|'.join(re.escape(end[::-1]) for end in ENDS)})*)")


def without_ends(text: str) -> str:
    """Return a text without the tokens of ``ENDS`` at its end; without any it is unchanged."""
    if not text.rstrip().endswith(ENDS):
        return text
    return text[: len(text) - _ENDS_BACKWARDS.match(text[::-1]).end()]


def answer_part(response: str) -> str:
    """Return what follows the last closed thought; empty if a thought is still open.

    Without any of ``TAGS`` the whole response is the answer.
    """
    part, thinking = after_thought(response)
    return "" if thinking else part


@lru_cache(maxsize=2)  # every extractor of a task calls it with the same response
def after_thought(response: str) -> tuple[str, bool]:
    """Return the text after the last closed thought, and whether it opens another thought.

    Tags around answers are removed from the text, and so are tokens at its end that end a turn.
    """
    part, thinking = after_last(response)
    lower = small(part)
    if not any(tag in lower for tag in _AROUND_SMALL):  # much faster than the pattern in a text with many "<"
        return part if thinking else without_ends(part), thinking
    pieces, start = [], 0
    for tag in _AROUND.finditer(lower):
        pieces.append(part[start : tag.start()])
        start = tag.end()
    part = "".join((*pieces, part[start:]))
    return part if thinking else without_ends(part), thinking


def after_last(response: str, but: Pair | None = None) -> tuple[str, bool]:
    """Return the text after the last closed thought, unchanged, and whether another is open; ignore tags ``but``."""
    lower = small(response)
    begins = lower.lstrip().startswith(_SMALL[-1][0])
    if not begins and not any(mark in response for mark in "<[◁"):
        return response, False
    pairs = [pair for pair in _SMALL if pair != but]
    start = max((at + len(closing) for _, closing in pairs if (at := lower.rfind(closing)) >= 0), default=0)
    thinking = (begins and not start) or any(lower.find(opening, start) >= 0 for opening, _ in pairs[:-1])
    return response[start:], thinking


def still_open(text: str, before: bool) -> bool:
    """Whether a thought is open at the end of a piece of text; ``before`` says whether one was open at its start."""
    part, thinking = after_last(text)
    return thinking or (before and len(part) == len(text))


def first_thought(text: str, pairs: Sequence[Pair] = TAGS) -> tuple[int, int] | None:
    """Return the first character of a text's first thought and the one after its last; None without tags.

    The thought is the text after the first opening tag of ``pairs``, else the text before the first closing tag.
    """
    lower = small(text)
    starts = [lower.find(opening.lower()) for opening, _ in pairs]
    for (opening, closing), start in zip(pairs, starts, strict=True):
        if start >= 0 and not (opening == UNTAGGED and lower[:start].strip()):
            end = lower.find(closing.lower(), start)
            whole = text[start + len(opening) : end if end >= 0 else None]
            thought = whole.removeprefix("<|message|>")
            begin = start + len(opening) + len(whole) - len(thought)
            return begin, begin + len(thought.removesuffix("<|start|>assistant").removesuffix("<|end|>"))
    ends = (lower.find(closing.lower()) for _, closing in pairs)
    return next(((0, end) for end in ends if end >= 0), None)


def closing_of(opened: str, own: Pair | None = None) -> str | None:
    """Return the closing tag if the text is only an opening tag; None for any other text."""
    opening = opened.strip().removesuffix("<|message|>")
    closing = next((closing for tag, closing in (*TAGS, *filter(None, [own])) if tag == opening), None)
    return f"<|end|><|start|>assistant{FINAL}" if closing == FINAL else closing


# ---------------------------------------------------------------------------------- tags

STYLES = ("think", "sky-t1")


def parts(text: str) -> tuple[str | None, str]:
    """Split a completion into (thought, solution), both without tags and surrounding white space.

    The thought goes from the start to the last closing tag. Text before the opening tag belongs to it, and the opening
    tag may be missing. If the thought is still open at the end, the solution is empty.
    If the text begins with an opening tag, or its first tag is a closing one, only tags of that pair and of ``STYLES``
    count, and any that close a thought which these leave open; others are words of the text, as in ``Vec<Thought>``.
    Tags within either (nested, repeated, around the solution) become line ends. Without tags the thought is None.
    The tags are ``TAGS`` and ``AROUND_ANSWERS``, in upper or lower case, but ``MARKUP`` only around the solution or the
    whole text: elsewhere it is the text's own. ``ENDS`` at the end of either part are dropped.
    """
    return tagged_parts(text)[:2]


def tagged_parts(text: str, opened: bool = False) -> tuple[str | None, str, bool]:
    """Return thought, solution, and whether the thought is still open.

    If ``opened``, only a thought that the text begins with counts.
    """
    text = _unwrapped(text, whole=True)
    pieces, start, closed, is_open = [], 0, 0, False
    for tag in _counted(text, opened):
        pieces.append(text[start : tag.start()].strip())
        start, kind = tag.end(), tag.lastgroup
        if kind:
            is_open = kind.startswith("open")
            closed = closed if is_open else len(pieces)
    pieces.append(text[start:].strip())
    closed = len(pieces) if is_open else closed
    both = ("\n".join(filter(None, part)) for part in (pieces[:closed], pieces[closed:]))
    thought, solution = next(both), _unwrapped(next(both))
    return without_ends(thought) if closed else None, solution, is_open


def _counted(text: str, opened: bool) -> list[re.Match]:
    """Return the tags that are not the text's own, by the rules of `parts`."""
    found = [tag for tag in tags(text) if tag[0] not in _MARKUP_TAGS]
    first = next((tag for tag in found if tag.lastgroup), None)
    begins = first is not None and first.lastgroup != "close" and not text[: first.start()].strip()
    if opened and not begins:
        return [tag for tag in found if not tag.lastgroup]
    if not begins and (first is None or first.lastgroup != "close"):
        return found
    closings = [tag["close"] or _CLOSINGS[tag["open"]] if tag.lastgroup else None for tag in found]
    own = {None, closings[found.index(first)], *_STYLED}  # the styles' tags, or restyling would not keep the parts
    ours = [closing in own for closing in closings]
    is_open = [tag["close"] is None for tag, one in zip(found, ours, strict=True) if one and tag.lastgroup][-1]
    return [tag for tag, one in zip(found, ours, strict=True) if one or (is_open and tag["close"])]


def _unwrapped(text: str, whole: bool = False) -> str:
    """Remove ``MARKUP`` around a text, of which one tag may be missing if not ``whole``, and ``ENDS`` at its end."""
    for opening, closing in MARKUP * len(MARKUP):  # in any order
        text = without_ends(text).strip()
        lower = small(text)
        start = len(opening) if lower.startswith(opening) else 0
        end = len(text) - (len(closing) if lower.endswith(closing) else 0)
        complete = start and end < len(text)
        if (complete or not whole) and opening[:-1] not in lower[start:end] and closing not in lower[start:end]:
            text = text[start:end]
    return text.strip()


def normalise(text: str) -> str:
    """Rewrite a completion in the normal form; an open thought stays open."""
    return restyle(text, "think")


def restyle(text: str, style: str) -> str:
    """Rewrite a completion with the tags of ``think`` (the normal form) or ``sky-t1``.

    Only tags and the white space around them change, so ``normalise`` undoes any style.
    """
    if style not in STYLES:
        raise unknown("style", style, STYLES)
    return _styled(*tagged_parts(text), style)


def move_spans(
    spans: Iterable[tuple[int, int]], old: str, new: str, marks: Iterable[str] = ()
) -> list[tuple[int, int]]:
    """Return where spans of a text are in its other form, which differs in tags, ``marks`` and white space.

    A letter keeps its spans. What stands between two letters (tags, ``ENDS``, ``marks``, white space) is the same in
    both texts, or a span that has a part of the old one gets all of the new one. If the letters differ too, they are
    compared from both ends, and what lies between counts as such a part. So a span may grow, but loses nothing.

    Args:
        spans: starts and ends (exclusive) in ``old``, in characters.
        old: a completion, also with the prompt before it.
        new: the same in the form of another style, template or tokenizer.
        marks: texts that a template may have written, such as a model's own tags.
    """
    aside = re.compile("|".join(re.escape(mark) for mark in (*ENDS, *marks) if mark))
    places: list[list[int]] = []
    for text in (old, new):
        letters = [not character.isspace() for character in text]
        for found in (*tags(text), *aside.finditer(text)):
            letters[found.start() : found.end()] = [False] * len(found[0])
        places.append([at for at, letter in enumerate(letters) if letter])
    was, now = places
    most = min(len(was), len(now))
    first = next((i for i in range(most) if old[was[i]] != new[now[i]]), most)
    last = next((i for i in range(most - first) if old[was[-1 - i]] != new[now[-1 - i]]), most - first)
    was = [-1, *was[:first], *was[len(was) - last :], len(old)]
    now = [-1, *now[:first], *now[len(now) - last :], len(new)]

    def moved(at: int, is_end: bool) -> int:
        i = bisect_left(was, at)  # the letter at this place or after it
        begin, stop, moved_begin, moved_stop = was[i - 1] + 1, was[i], now[i - 1] + 1, now[i]
        if old[begin:stop] == new[moved_begin:moved_stop]:
            return moved_begin + at - begin
        if is_end:
            return moved_begin if at == begin else moved_stop
        return moved_stop if at == stop else moved_begin

    return [(moved(start, False), moved(end, True)) for start, end in spans if start < end]


def with_thought(thought: str, content: str, style: str) -> str:
    """Join a thought and the content that follows it, with the tags of ``style``.

    A thought that ``content`` begins with is appended to it, or kept alone if it contains it. Tags of `parts` within a
    thought become line ends.
    """
    inner, rest, _ = tagged_parts(thought, opened=True)
    thought = tagged_parts(_styled("\n".join(filter(None, (inner, rest))), "", False, style))[0] or ""
    own, solution, is_open = tagged_parts(content, opened=True)
    if own is None:
        return _styled(thought, solution, False, style)
    kept = own if thought in own else "\n".join(filter(None, (thought, own)))
    return _styled(kept, solution, is_open, style)


def _styled(thought: str | None, solution: str, is_open: bool, style: str) -> str:
    """Write the parts of a completion with the tags of a style."""
    sky = style == "sky-t1"
    gap = "\n\n" if sky else "\n"
    opening, closing = ("<|begin_of_thought|>", "<|end_of_thought|>") if sky else ("<think>", "</think>")
    pieces = [] if thought is None else [opening, thought] if is_open else [opening, thought, closing]
    if solution:
        pieces += ["<|begin_of_solution|>", solution, "<|end_of_solution|>"] if sky else [solution]
    return gap.join(pieces)
