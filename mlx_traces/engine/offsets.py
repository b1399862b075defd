"""Map each token of a completion to the characters of its text, for any tokenizer that decodes."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_traces.engine.sampling import decode
from mlx_traces.engine.thinking import Pieces
from mlx_traces.models.loading import LoadedModel


def token_offsets(
    loaded: LoadedModel, ids: Sequence[int], text: str, pieces: Pieces | None = None, *, begun: bool = False
) -> np.ndarray:
    """Return (T, 2) int64: where each token's characters begin and end in ``text``, the end exclusive.

    The ids are decoded, never encoded again. Each token that holds a part of a character has the whole character. A
    token that is not in the text (a stop token, a sign that the text leaves out, one after a stop string) has an
    empty range.

    Args:
        loaded: the model; its tokenizer, and the ``signs`` that the text leaves out.
        ids: of the completion, its stop token included.
        text: as in `Rollout`.
        pieces: of the tokenizer, to share between completions; default: made here.
        begun: whether the prompt holds the beginning of the assistant's turn, as for the text (`decode`).
    """
    ids, pieces = list(ids), Pieces(loaded.tokenizer) if pieces is None else pieces
    whole = decode(loaded.tokenizer, ids, begun)
    return np.minimum(_kept_places(loaded, ids, whole)[exact_offsets(ids, whole, pieces, begun)], len(text))


def exact_offsets(ids: Sequence[int], whole: str, pieces: Pieces, begun: bool = False) -> np.ndarray:
    """Return (T, 2) int64 as `token_offsets`, in the exact text of the ids, ``decode(tokenizer, ids, begun)``."""
    data = [pieces[token] for token in ids]
    found = _by_bytes(data, whole)
    return _by_bisection(pieces.tokenizer, list(ids), data, whole, begun) if found is None else found


def _by_bytes(data: Sequence[bytes], whole: str) -> np.ndarray | None:
    """Return (T, 2) if the tokens' bytes, perhaps without a first space, add up to the text; else None."""
    joined = b"".join(data)
    decoded = joined.decode("utf-8", "replace")
    dropped = int(decoded != whole and decoded[:1] == " ")
    if decoded[dropped:] != whole:
        return None
    joined = joined[dropped:]
    first = np.frombuffer(joined, np.uint8) & 0xC0 != 0x80  # bytes that begin a character
    at = 0
    while at < len(joined):
        try:
            str(memoryview(joined)[at:], "utf-8")
            break
        except UnicodeDecodeError as error:  # these bytes together are a replacement character
            first[at + error.start : at + error.end] = False
            first[at + error.start], at = True, at + error.end
    character = np.append(np.cumsum(first) - 1, len(whole))
    ends = np.maximum(np.cumsum([len(piece) for piece in data], dtype=np.int64) - dropped, 0)
    starts = np.append(0, ends)[:-1]
    stops = np.where(ends > starts, character[ends - 1] + 1, character[starts])
    return np.stack([character[starts], stops], axis=1)


def _by_bisection(tokenizer: Any, ids: list[int], data: Sequence[bytes], whole: str, begun: bool = False) -> np.ndarray:
    """Return (T, 2) for a decoder that looks at the neighbours of a token.

    Where the tokens' texts do not add up to the whole one, the tokens up to there are decoded and compared with it.
    """
    parts = [decode(tokenizer, ids[:1], begun), *(piece.decode("utf-8", "replace") for piece in data[1:])]
    starts, ends = np.zeros(len(ids) + 1, np.int64), np.zeros(len(ids) + 1, np.int64)
    starts[-1] = ends[-1] = len(whole)

    def common(text: str) -> tuple[int, int]:
        """Return the length of this text's common prefix with the whole, and the length of this text."""
        return bisect_left(range(len(text)), True, key=lambda at: not whole.startswith(text[: at + 1])), len(text)

    def fill(low: int, high: int) -> None:
        """Fill ``starts`` and ``ends`` between the tokens ``low`` and ``high``, where they are known."""
        own = parts[low:high]
        if ends[low] == starts[low] and "".join(own) == whole[starts[low] : starts[high]]:
            starts[low:high] = ends[low:high] = starts[low] + np.cumsum([0, *map(len, own[:-1])])
        elif high - low > 1:
            middle = (low + high) // 2
            same, written = common(decode(tokenizer, ids[:middle], begun))
            for place in range(middle - 1, max(low, middle - 4), -1) if same < written else ():
                # A part of a character may spoil those before it (SentencePiece's bytes); it has at most three tokens.
                same = max(same, common(decode(tokenizer, ids[:place], begun))[0])
            same = min(max(same, starts[low]), starts[high])
            starts[middle], ends[middle] = same, same + (same < min(written, len(whole)))
            fill(low, middle)
            fill(middle, high)

    fill(0, len(ids))
    return np.stack([starts[:-1], ends[1:]], axis=1)  # a token ends where the next begins, or a character further


def _kept_places(loaded: LoadedModel, ids: Sequence[int], whole: str) -> np.ndarray:
    """Return, for each place in the exact text, its place in the text without the signs, as `text_of` makes it."""
    places = np.arange(len(whole) + 1)
    for token in {*ids} & loaded.signs.keys():
        kept, at, sign = np.ones(len(whole), int), 0, loaded.signs[token]
        while sign and (at := whole.find(sign, at)) >= 0:
            kept[at : at + len(sign)] = 0
            at += len(sign)
        places, whole = np.concatenate([[0], np.cumsum(kept)])[places], whole.replace(sign, "")
    return places
