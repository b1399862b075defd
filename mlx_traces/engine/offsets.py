"""Map each token of a completion to the characters of its text, for any tokenizer that decodes."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_traces.engine.sampling import decode
from mlx_traces.models.loading import LoadedModel


def pieces(tokenizer: Any, ids: Sequence[int]) -> dict[int, str]:
    """Return, by id, the text that each token adds after another one; U+FFFD stands for a part of a character."""
    before = tokenizer.encode("1", add_special_tokens=False)[-1:]
    start = len(decode(tokenizer, before))
    return {token: decode(tokenizer, [*before, token])[start:] for token in {*ids}}


def token_offsets(
    loaded: LoadedModel, ids: Sequence[int], text: str, known: Mapping[int, str] | None = None
) -> np.ndarray:
    """Return (T, 2) int64: where each token's characters begin and end in ``text``, the end exclusive.

    The ids are decoded, never encoded again. Where the tokens' pieces do not add up to the text (a character of several
    tokens, a decoder that looks at the neighbours), the tokens up to there are decoded and compared, by bisection.
    Each token that holds a part of a character has the whole character. A token that is not in the text (a stop token,
    a sign that the text leaves out, one after a stop string) has an empty range.

    Args:
        loaded: the model; its tokenizer, and the ``signs`` that the text leaves out.
        ids: of the completion, its stop token included.
        text: as in `Rollout`.
        known: `pieces` of at least these tokens; default: computed here.
    """
    ids, tokenizer, known = list(ids), loaded.tokenizer, known or pieces(loaded.tokenizer, ids)
    parts = [decode(tokenizer, ids[:1]), *(known[token] for token in ids[1:])]
    whole = decode(tokenizer, ids)
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
            same, written = common(decode(tokenizer, ids[:middle]))
            for place in range(middle - 1, max(low, middle - 4), -1) if same < written else ():
                # A part of a character may spoil those before it (SentencePiece's bytes); it has at most three tokens.
                same = max(same, common(decode(tokenizer, ids[:place]))[0])
            same = min(max(same, starts[low]), starts[high])
            starts[middle], ends[middle] = same, same + (same < min(written, len(whole)))
            fill(low, middle)
            fill(middle, high)

    fill(0, len(ids))
    found = np.stack([starts[:-1], ends[1:]], axis=1)  # a token ends where the next begins, or a character further
    return np.minimum(_kept_places(loaded, ids, whole)[found], len(text))


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
