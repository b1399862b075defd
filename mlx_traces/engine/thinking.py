"""Bounds on a thought: a budget that ends it, and a least length that keeps it open (budget forcing, arXiv 2501.19393).

A small state machine reads each completion token by token. It knows whether a thought is open and how long it is. After
``think_tokens`` tokens of thought the closing tag replaces the tokens that the model draws. ``think_then``, in that
paper "Final Answer:", may follow it. A closing tag or a stop token that comes before ``think_at_least`` tokens is
replaced by ``think_more``, such as "Wait". The machine depends on the completion alone, so a row has the same tokens in
a batch as alone.

A decode step is dispatched before the host has the token that it reads. But the host has all tokens before that one, so
it knows which token is forced there, or which tokens would close the thought; the device then replaces the drawn token.
"""

import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

from mlx_traces.tasks.thoughts import FINAL, SKY, TAGS, Pair

NONE = -1  # no forced token, or no open thought
AHEAD = 256  # GPT-2 writes the byte number n of those that are not printable as the character 256 + n
_PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
_UNPRINTED = [byte for byte in range(256) if byte not in _PRINTED]
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # SentencePiece's
BYTE_OF = {chr(byte): byte for byte in _PRINTED} | {chr(AHEAD + i): byte for i, byte in enumerate(_UNPRINTED)}

State = tuple[int, bytes]  # number of the pair whose thought is open, or NONE; the end of the text that may begin a tag


class Pieces(dict):
    """The bytes that each token of a tokenizer stands for, even where several tokens spell one character."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __missing__(self, token: int) -> bytes:
        text = self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        written = str(self.tokenizer.convert_ids_to_tokens(token))
        if BYTE_TOKEN.fullmatch(written):
            found = bytes([int(written[3:5], 16)])
        elif "\ufffd" in text and set(written) <= BYTE_OF.keys():
            found = bytes(BYTE_OF[character] for character in written)
        else:  # decoded alone, a token of SentencePiece loses its space
            found = (" " * (written.startswith("▁") and not text.startswith(" ")) + text).encode()
        self[token] = found
        return found


class Reader:
    """Finds thinking tags in a text that comes token by token, as `tasks.thoughts` finds them in a whole one."""

    def __init__(self, tokenizer: Any, own: Pair | None):
        self.tokenizer, self.pieces = tokenizer, Pieces(tokenizer)
        self.tags = (*filter(None, [own]), *TAGS)
        self.pairs = [tuple(tag.lower().encode() for tag in pair) for pair in self.tags]
        self.openings = [opening for opening, _ in self.pairs]
        self.moves: dict[tuple[State, int], State] = {}
        self.enders: dict[State, list[int]] = {}

    def begun(self, opened: str) -> State:
        """Return the state after ``opened``, the beginning of the assistant's turn that the prompt has."""
        return self._read((NONE, b""), opened.encode(), self.openings)

    def after(self, state: State, token: int) -> State:
        """Return the state after another token."""
        found = self.moves.get((state, token))
        if found is None:  # UNTAGGED, the last one, opens a thought at the start of a turn only
            found = self.moves[state, token] = self._read(state, self.pieces[token], self.openings[:-1])
        return found

    def _read(self, state: State, piece: bytes, openings: list[bytes]) -> State:
        pair, text = state[0], state[1] + piece.lower()
        while True:
            tags = openings if pair == NONE else [self.pairs[pair][1]]
            places = ((text.find(tag), -len(tag), number) for number, tag in enumerate(tags))
            at, size, number = min((place for place in places if place[0] >= 0), default=(-1, 0, 0))
            if at < 0:
                break
            pair, text = number if pair == NONE else NONE, text[at - size :]
        ends = (text[-size:] for size in range(min(len(text), max(map(len, tags)) - 1), 0, -1))
        return pair, next((end for end in ends if any(tag.startswith(end) for tag in tags)), b"")

    def closes(self, state: State, token: int) -> bool:
        """Whether a token completes the closing tag of the thought that is open in ``state``."""
        return self.after(state, token)[0] != state[0]

    def closers(self, state: State) -> list[int]:
        """Return all tokens that `closes` accepts; the first call for a state reads the vocabulary."""
        if state not in self.enders:
            last = self.pairs[state[0]][1][-1:].decode(errors="ignore")  # empty for a byte that is no character
            vocabulary = self.tokenizer.get_vocab().items()
            some = (token for text, token in vocabulary if last in text.lower() or BYTE_TOKEN.fullmatch(text))
            self.enders[state] = [token for token in some if self.closes(state, token)]
        return self.enders[state]

    def closing(self, state: State, then: str = "") -> list[int]:
        """Return the tokens that close the thought open in ``state``: its tag, the usual line feeds, and ``then``.

        Reasoning models leave an empty line after ``</think>``. Where the vocabulary lacks that tag, the prompt asks
        for it, and the traces of this project have no empty line there.
        """
        closing = self.tags[state[0]][1]
        text = {
            TAGS[0][1]: f"\n{closing}\n" + "\n" * (self.tokenizer.think_end == closing),
            SKY[1]: f"\n\n{closing}\n\n",
            FINAL: f"<|end|><|start|>assistant{FINAL}",
            TAGS[-1][1]: f"\n{closing}\n",
        }.get(closing, closing)
        return list(self.tokenizer.encode(text + then, add_special_tokens=False))


@lru_cache(maxsize=2)
def reader_of(tokenizer: Any, own: Pair | None) -> Reader:
    """Return the reader for a tokenizer and a model's own tags; the two used last are kept."""
    return Reader(tokenizer, own)


class Thinking:
    """The bounds on the thoughts of one completion.

    ``forced`` has the places of the tokens that were not drawn. ``limit`` is the most tokens of the completion; with a
    budget at most ``max_tokens`` of them lie outside of thoughts.

    Args:
        reader: of the model's tokenizer.
        opened: the beginning of the assistant's turn that the prompt has.
        max_tokens: most tokens outside of thoughts, or without a budget of the whole completion.
        budget: tokens of thought after which it is closed; None for no bound. Several thoughts share it.
        least: tokens of thought before which it is not closed.
        more: tokens that continue a thought.
        stop_ids: tokens that end the completion, and so an open thought.
        then: text that follows the closing tag once the budget is used up.
    """

    def __init__(
        self,
        reader: Reader,
        opened: str,
        max_tokens: int,
        budget: int | None,
        least: int = 0,
        more: Sequence[int] = (),
        stop_ids: Collection[int] = (),
        then: str = "",
    ):
        self.reader, self.state = reader, reader.begun(opened)
        self.max_tokens, self.budget, self.least = max_tokens, budget, least
        self.more, self.stop_ids, self.then = list(more), stop_ids, then
        self.limit = max_tokens + (budget or 0)
        self.length = self.thought = self.outside = 0  # tokens so far: all, in thoughts, outside of thoughts
        self.queue: list[int] = []  # what has to come next
        self.closing = False  # whether that closes the thought
        self.forced: list[int] = []
        self._bound()

    @property
    def next(self) -> int:
        """The token that is forced at the next place, or NONE."""
        return self.queue[0] if self.queue else NONE

    @property
    def kept_open(self) -> bool:
        """Whether the next token must not end the thought; ``more`` stands in place of one that would."""
        return self.state[0] != NONE and not self.queue and self.thought < self.least

    def take(self, token: int) -> int:
        """Read the token drawn for the next place; return the token that the completion gets there."""
        after = self.reader.after(self.state, token)
        if self.kept_open and (token in self.stop_ids or after[0] != self.state[0]):
            self.queue = self.more.copy()
        if self.queue:
            token = self.queue.pop(0)
            after = self.reader.after(self.state, token)
            self.forced.append(self.length)
        inside = self.state[0] != NONE and not self.closing
        self.length += 1
        if inside:
            self.thought += 1
        if not inside or self.budget is None:
            self.outside += 1
            if self.outside == self.max_tokens:
                self.limit = min(self.limit, self.length)
        self.state = after
        if self.closing and not self.queue:  # even if the tag's tokens are not read as a tag
            self.closing, self.state = False, (NONE, b"")
        if self.thought == self.budget:
            self._bound()
        return token

    def _bound(self) -> None:
        """Begin to close the thought if its budget is used up."""
        if self.budget is not None and self.state[0] != NONE and not self.closing and self.thought >= self.budget:
            self.queue, self.closing = self.reader.closing(self.state, self.then), True
