"""How one token is drawn and when a completion ends: what the engine and the fallback share."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_traces.engine.logprobs import blocks
from mlx_traces.engine.thinking import Thinking, reader_of
from mlx_traces.errors import UserError
from mlx_traces.models.chat import Rendered
from mlx_traces.models.loading import LoadedModel
from mlx_traces.records import Rollout
from mlx_traces.tasks.thoughts import after_last, still_open, usual

# Numbers of a vocabulary-wide buffer on a CPU, 8 MiB: MLX keeps freed buffers, 32 MiB in all, for reuse. A larger one
# comes from the system page by page, and an addition takes 2.2 ns a number instead of 0.2.
DRAWN_AT_ONCE = 2**21
LONGEST_TAG = 64  # tokens that a tag of a thought may take
CONTEXT = 8  # number of earlier tokens on which a token's text may depend
NO_TOKEN = -1  # in place of a token where the logits are not finite numbers
UNSURE = -2  # in place of a token where the filters may keep tokens outside the candidates
MOST = 1 - 2**-23  # of a share: one that rounds to 1 would point behind the last token
FINE = 32  # tokens of a block of candidates
CANDIDATES = 256  # blocks that filters search at first: 8,192 tokens, or 256 that lie far apart


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn and when a completion ends.

    ``temperature`` 0 is greedy and ignores the filters. Otherwise, as in mlx_lm: ``top_p``, then ``min_p``,
    then ``top_k`` drop tokens by their probabilities at temperature 1, and one of those left is drawn at
    ``temperature``. ``top_p`` 1, ``min_p`` 0 and ``top_k`` 0 drop nothing. ``max_tokens`` counts the stop
    token. A completion also ends with any of the ``stop_tokens`` (ids, or tokens as the vocabulary writes them), which
    is kept like the model's own stop token. It ends before any of the strings in ``stop``; within a thought they count
    only with ``stop_in_thoughts``.

    ``think_tokens`` is the most tokens of thought, and ``max_tokens`` then bounds the rest. A closing tag that this
    budget brings counts as rest, as does ``think_then``, which follows it and begins the answer. A thought that would
    end before ``think_at_least`` tokens goes on with ``think_more``. See `engine.thinking`.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int | str, ...] = ()
    stop_in_thoughts: bool = False
    think_tokens: int | None = None
    think_at_least: int = 0
    think_more: str = "Wait"
    think_then: str = ""

    @property
    def bound(self) -> str:
        """The name of the setting that bounds thoughts, empty if none does."""
        return "think_tokens" if self.think_tokens is not None else "think_at_least" if self.think_at_least else ""

    @property
    def longest(self) -> int:
        """The most tokens of a completion, its thought included."""
        return self.max_tokens + (self.think_tokens or 0)

    def check(self) -> None:
        """Raise UserError for a setting outside its range."""
        if self.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature must be 0 (greedy) or above, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (off) or above, not {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must be from 0 to 1, not {self.min_p}")
        if "" in self.stop:
            raise UserError("a stop string is empty; it would end every completion at once")
        if (self.think_tokens or 0) < 0 or self.think_at_least < 0:
            raise UserError("think_tokens and think_at_least must be 0 or above")
        if self.think_tokens is not None and self.think_at_least > self.think_tokens:
            raise UserError(
                f"think_at_least {self.think_at_least} is above think_tokens {self.think_tokens}, where thoughts end"
            )
        if self.think_at_least and not self.think_more:
            raise UserError("think_more is empty; think_at_least continues a thought with it")


@dataclass(frozen=True)
class Request:
    """A prompt to complete once; ``seed`` is that of this row's own random stream.

    ``opened`` is the beginning of the assistant's turn that the prompt already has, such as an open thought;
    ``thoughtless`` says why the completion will have no thought, see `Rendered`.
    """

    prompt_ids: tuple[int, ...]
    seed: int = 0
    opened: str = ""
    thoughtless: str = ""

    @classmethod
    def of(cls, prompt: Rendered, seed: int = 0) -> "Request":
        """Return the request to complete a rendered prompt."""
        return cls(prompt.ids, seed, prompt.opened, prompt.thoughtless)


def stop_ids(loaded: LoadedModel, params: SamplingParams) -> frozenset[int]:
    """Return the ids that end a completion: the model's and the settings' own.

    Raises:
        UserError: for a stop token that the vocabulary does not have.
    """
    if not params.stop_tokens:
        return loaded.stop_ids
    vocabulary = loaded.tokenizer.get_vocab()
    size, own = loaded.config.get("vocab_size") or len(vocabulary), set()
    for token in params.stop_tokens:
        number = vocabulary.get(token, -1) if isinstance(token, str) else token
        if not 0 <= number < size:
            raise UserError(f"unknown stop token {token!r}: {loaded.name} has no such token; give a text as stop")
        own.add(number)
    return loaded.stop_ids | own


class Ending:
    """The end of one completion: finds it, and makes the rollout.

    Until then only as many last tokens are decoded as stop strings and tags of thoughts can span.
    """

    def __init__(self, loaded: LoadedModel, request: Request, params: SamplingParams):
        self.loaded, self.request, self.params = loaded, request, params
        self.begun = bool(request.opened)
        self.stop_ids = stop_ids(loaded, params)
        self.stops = (*params.stop, *loaded.stop_strings)
        # A model's own stop strings stand for the token that ends its turn, so they count in thoughts too.
        self.always = frozenset(self.stops if params.stop_in_thoughts else loaded.stop_strings)
        self.seen, self.thinking = 0, False  # tokens searched for tags so far, and whether a thought was open there
        self.thought = self._bounds()

    def _bounds(self) -> Thinking | None:
        params, tokenizer = self.params, self.loaded.tokenizer
        if not params.bound:
            return None
        more = tokenizer.encode(params.think_more, add_special_tokens=False) if params.think_at_least else ()
        reader, bounds = reader_of(tokenizer, self.loaded.own_tags), (params.think_tokens, params.think_at_least, more)
        return Thinking(reader, self.request.opened, params.max_tokens, *bounds, self.stop_ids, params.think_then)

    def rollout(self, ids: list[int], logprobs: np.ndarray | None = None) -> Rollout | None:
        """Return the rollout of ``ids`` if its newest token ended it, else None.

        Args:
            ids: tokens drawn so far, at least one.
            logprobs: (len(ids), 2) of the tokens, as ``draw`` returns them.
        """
        limit = self.thought.limit if self.thought else self.params.max_tokens
        at_stop, at_limit = ids[-1] in self.stop_ids, len(ids) >= limit
        cut, stop = (None, None) if at_stop else self._find_stop(ids)
        if not (at_stop or at_limit) and stop is None:
            return None
        text = text_of(self.loaded, ids[:-1] if at_stop else ids, cut, begun=self.begun)
        reason = "length" if stop is None and not at_stop else "stop"
        forced = [place for place in self.thought.forced if place < len(ids)] if self.thought else []
        columns = [None, None] if logprobs is None else logprobs.T.tolist()
        for column in filter(None, columns):
            for place in forced:
                column[place] = None
        columns = (column and tuple(column) for column in columns)
        spans = self._spans(ids, forced, len(text))
        return Rollout(self.request.prompt_ids, tuple(ids), text, reason, *columns, stop, tuple(forced), spans)

    def _spans(self, ids: list[int], forced: list[int], length: int) -> tuple[tuple[int, int], ...]:
        """Return where each run of forced tokens begins and ends in the text, in characters.

        The tokens between two ends of runs are decoded after `CONTEXT` earlier ones, not after all of them.
        """
        places, spans, at, found = {*forced}, [], 0, 0
        for place in sorted({*forced, *(place + 1 for place in forced)}):
            if (place in places) != (place - 1 in places):  # a run begins or ends here
                before = max(0, at - CONTEXT)
                while before and "\ufffd" in decode(self.loaded.tokenizer, ids[before : before + 1]):
                    before -= 1  # not within a character
                until = [len(text_of(self.loaded, ids[before:end], begun=self.begun)) for end in (at, place)]
                found += until[1] - until[0]
                at = place
                spans.append(min(found, length))
        return tuple(zip(spans[::2], spans[1::2], strict=True))

    def _find_stop(self, ids: list[int]) -> tuple[int | None, str | None]:
        """Return where in the text the first stop string starts, and which, if the newest token completed one.

        Only as many last tokens are decoded as a stop string can span: a token is at least a byte, bar a few special
        ones. A string found there is searched again in the whole text, which a tokenizer may decode differently.
        """
        if not self.stops:
            return None, None
        span = max(len(stop.encode()) for stop in self.stops) + 8
        tail = decode(self.loaded.tokenizer, ids[-span:], self.begun)
        found = [stop for stop in self.stops if stop in tail]
        if not found or (self.always.isdisjoint(found) and self._in_thought(ids)):
            return None, None
        text = decode(self.loaded.tokenizer, ids, self.begun)
        answer, thinking = after_last(usual(self.request.opened + text, self.loaded.own_tags))
        start = len(text) if thinking else max(0, len(text) - len(answer))
        places = ((text.find(stop, 0 if stop in self.always else start), stop) for stop in self.stops)
        return min((place for place in places if place[0] >= 0), default=(None, None))

    def _in_thought(self, ids: list[int]) -> bool:
        """Whether a thought is open now; reads the tokens since the last call and as many before as a tag can span."""
        text = decode(self.loaded.tokenizer, ids[max(0, self.seen - LONGEST_TAG) :], self.begun)
        text = text if self.seen > LONGEST_TAG else self.request.opened + text
        self.seen, self.thinking = len(ids), still_open(usual(text, self.loaded.own_tags), self.thinking)
        return self.thinking


def uniforms_of(request: Request, params: SamplingParams) -> np.ndarray:
    """Return (longest,) float32 in [0, 1), the random numbers of one completion: Philox keyed by its seed."""
    if not params.temperature:
        return np.zeros(params.longest, np.float32)
    stream = np.random.Generator(np.random.Philox(key=request.seed))
    return stream.random(params.longest, np.float32)


def settings_of(params: SamplingParams) -> np.ndarray:
    """Return (4,) float32: temperature, top_p, min_p, top_k."""
    return np.array([params.temperature, params.top_p, params.min_p, params.top_k], np.float32)


def draw(
    logits: mx.array, uniforms: np.ndarray, settings: np.ndarray, logprobs: bool, candidates: int | None = None
) -> tuple[mx.array, mx.array | None]:
    """Draw a token of every row by inverting the distribution at a uniform number.

    One random number a row replaces Gumbel noise over the vocabulary: it is cheaper, and each row has its own stream.
    A block of the vocabulary is drawn first, by the blocks' sums, then a token inside it. With one float32 sum over
    151,936 tokens, one draw in four is not the token of the exact distribution; with these two sums, one in fifty.

    Args:
        logits: (R, V), of the model's own type.
        uniforms: (R,) in [0, 1).
        settings: (R, 4): temperature (0 takes the likeliest), top_p, min_p, top_k (0 keeps all).
        logprobs: whether to return log-probabilities.
        candidates: number of blocks of `FINE` tokens, those with the greatest logits, in which the filters search for
            the tokens that they keep; None for the whole vocabulary.

    Returns:
        (R,) int32 tokens, `NO_TOKEN` where the logits are not finite numbers, `UNSURE` where the candidates do not hold
        all that the filters keep; (R, 2) float32 log-probabilities of them under the distribution drawn from and under
        the model's own, or None.
    """
    rows, most = len(settings), max(1, DRAWN_AT_ONCE // logits.shape[-1])
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    if rows > most and on_cpu:
        parts = [slice(at, at + most) for at in range(0, rows, most)]
        drawn = [draw(logits[part], uniforms[part], settings[part], logprobs, candidates) for part in parts]
        tokens, values = zip(*drawn, strict=True)
        return mx.concatenate(tokens), mx.concatenate(values) if logprobs else None
    temperature = settings[:, 0]
    greedy = temperature == 0
    filtered = ~greedy & (settings[:, 1:] != (1, 0, 0)).any(axis=1)
    kind = _Kind(
        greedy=_share(greedy),
        filtered=_share(filtered),
        plain=bool((temperature[~greedy] == 1).all()),
        logprobs=logprobs,
        candidates=candidates,
    )
    given: tuple[np.ndarray, ...] = ()
    if kind.greedy < 1:
        divisor = np.where(greedy, 1, np.maximum(temperature, 1e-6))
        columns = (uniforms, 1 / divisor, *settings[:, 1:].T)
        given = (*(np.asarray(column, np.float32) for column in columns), greedy, filtered)
    tokens, *values = _drawing(kind, not on_cpu)(logits, *map(mx.array, given))
    return tokens, values[0] if logprobs else None


@dataclass(frozen=True)
class _Kind:
    """The variant of a draw: whether all, some or none (1, 0.5, 0) of its rows are greedy, and filtered.

    ``plain``: the temperature of all other rows is 1.
    """

    greedy: float
    filtered: float
    plain: bool
    logprobs: bool
    candidates: int | None


def _share(rows: np.ndarray) -> float:
    return 1 if rows.all() else 0.5 if rows.any() else 0


@cache
def _drawing(kind: _Kind, compiled: bool) -> Callable[..., list[mx.array]]:
    """Return the function that draws; if ``compiled``, MLX keeps a trace for each shape of the logits."""

    def drawn(*arrays: mx.array) -> list[mx.array]:
        return _draw(kind, *arrays)

    return mx.compile(drawn) if compiled else drawn


def _draw(kind: _Kind, logits: mx.array, *given: mx.array) -> list[mx.array]:
    """Return the tokens, and log-probabilities if they are wanted; see `draw`.

    ``given``, (R,) each: uniforms, factor, top_p, min_p, top_k, greedy, filtered. Nothing is given if all rows are
    greedy: moving it to the device would take longer than a small model's draw.
    """
    best, greatest = _likeliest(logits) if kind.greedy else (None, None)
    if kind.greedy == 1:
        if not kind.logprobs:
            return [mx.where(mx.isfinite(greatest), best, NO_TOKEN)]
        own = greatest.astype(mx.float32) - _total(logits.astype(mx.float32))
        return [mx.where(mx.isfinite(own), best, NO_TOKEN), mx.stack([mx.zeros_like(own), own], axis=-1)]
    uniforms, factor, top_p, min_p, top_k, greedy, filtered = given
    wide = logits.astype(mx.float32)
    if kind.filtered < 1:
        scaled = wide if kind.plain else wide * factor[:, None]
        tokens, value, total = _invert(scaled, uniforms)
        sampled = value - total
    if kind.filtered or (kind.logprobs and not kind.plain):
        total = _total(wide)
    finite = mx.isfinite(total) if kind.filtered == 1 else mx.isfinite(sampled + total)
    if kind.filtered:
        kept, chosen, unsure = _kept(wide, total, (top_p, min_p, top_k), kind.candidates)
        place, value, whole = _invert(kept * factor[:, None], uniforms)
        picked = _pick(chosen, place // FINE) * FINE + place % FINE
        if unsure is not None:
            picked = mx.where(unsure, UNSURE, picked)
        both = kind.filtered == 1
        tokens = picked if both else mx.where(filtered, picked, tokens)
        sampled = value - whole if both else mx.where(filtered, value - whole, sampled)
    if kind.greedy:
        tokens, finite = mx.where(greedy, best, tokens), mx.where(greedy, mx.isfinite(greatest), finite)
    tokens = mx.where(finite, tokens, NO_TOKEN)
    if not kind.logprobs:
        return [tokens]
    if kind.plain and not kind.filtered and not kind.greedy:
        return [tokens, mx.stack([sampled, sampled], axis=-1)]
    own = _pick(wide, mx.maximum(tokens, 0)) - total
    return [tokens, mx.stack([mx.where(greedy, 0, sampled) if kind.greedy else sampled, own], axis=-1)]


def _likeliest(logits: mx.array) -> tuple[mx.array, mx.array]:
    """Return (R,) int32 tokens of the greatest logits, the first of equal ones, and those logits.

    One pass over the (R, V) logits finds the greatest of each block. A NaN is returned as one, where ``argmax`` alone
    may pass it over.
    """
    parts = blocks(logits, -mx.inf)
    tops = parts.max(axis=-1)
    block = mx.argmax(tops, axis=-1, keepdims=True)
    place = mx.argmax(mx.take_along_axis(parts, block[:, :, None], axis=1)[:, 0], axis=-1)
    return (block[:, 0] * parts.shape[-1] + place).astype(mx.int32), tops.max(axis=-1)


def _invert(scaled: mx.array, uniforms: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return (R,) tokens where the cumulative (R, V) distributions pass ``uniforms``, their logits, and (R,) logsumexp.

    A token of probability 0 is not drawn.
    """
    parts = blocks(scaled, -mx.inf)
    sums = mx.logsumexp(parts, axis=-1)
    top = sums.max(axis=-1, keepdims=True)
    weights = mx.exp(sums - top)
    block, mass, target = _passing(weights, uniforms[:, None])
    own = mx.take_along_axis(weights, block, axis=-1)
    share = mx.clip((target - mx.take_along_axis(mass, block, axis=-1) + own) / own, 0, MOST)
    inside = mx.take_along_axis(parts, block[:, :, None], axis=1)[:, 0]
    place, *_ = _passing(mx.exp(inside - inside.max(axis=-1, keepdims=True)), share)
    tokens = (block * parts.shape[-1] + place)[:, 0].astype(mx.int32)
    return tokens, mx.take_along_axis(inside, place, axis=-1)[:, 0], mx.logsumexp(sums, axis=-1)


def _passing(weights: mx.array, shares: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return where the cumulative (R, n) weights pass (R, 1) shares of their sum: (R, 1) places, the sums, the targets.

    A GPU adds in parallel and rounds each sum in its own way, so a sum may grow where a weight is 0, or even fall. The
    place is the first of positive weight at which the sum is above the target.
    """
    mass = mx.where(weights > 0, mx.cumsum(weights, axis=-1), 0)
    target = mx.minimum(shares, MOST) * mass.max(axis=-1, keepdims=True)
    return mx.argmax(mass > target, axis=-1, keepdims=True), mass, target


def _total(logits: mx.array) -> mx.array:
    """Return the (R,) logsumexp of (R, V) logits by blocks: one pass, and as exact as `logprobs.logsumexp`."""
    return mx.logsumexp(mx.logsumexp(blocks(logits, -mx.inf), axis=-1), axis=-1)


def _kept(
    logits: mx.array, total: mx.array, settings: tuple[mx.array, mx.array, mx.array], candidates: int | None
) -> tuple[mx.array, mx.array, mx.array | None]:
    """Find the tokens that top_p, min_p and top_k keep, by their probabilities at temperature 1, without a long sort.

    As in mlx_lm each filter sees what the one before left, without renormalising. The kept tokens have the greatest
    logits, so only the blocks of `FINE` tokens with the greatest logits are searched. Of equal logits at the border the
    first ones are kept.

    Args:
        logits: (R, V) float32.
        total: (R,) their logsumexp.
        settings: top_p, min_p and top_k, (R,) float32 each.
        candidates: number of blocks to search, C; None for all of them.

    Returns:
        (R, C * FINE) logits of the candidates in the vocabulary's order, -inf for those that are dropped; (R, C)
        numbers of their blocks; (R,) whether tokens elsewhere may be kept too, None if there are no others.
    """
    parts = blocks(logits, -mx.inf, FINE)
    rows, count = parts.shape[:2]
    tops, unsure, elsewhere = parts.max(axis=-1), None, None
    if candidates is None or candidates >= count:
        chosen, near = mx.broadcast_to(mx.arange(count), (rows, count)), parts.reshape(rows, -1)
    else:
        order = mx.argsort(-tops, axis=-1)
        chosen = mx.sort(order[:, :candidates], axis=-1)
        near = mx.take_along_axis(parts, chosen[:, :, None], axis=1).reshape(rows, -1)
        elsewhere = mx.take_along_axis(tops, order[:, candidates : candidates + 1], axis=-1)
    top = tops.max(axis=-1, keepdims=True)
    descending = -mx.sort(-near, axis=-1)
    weights = mx.exp(descending - top)
    top_p, min_p, top_k = (setting[:, None] for setting in settings)
    enough = top_p * mx.exp(total[:, None] - top)

    def inside(before: mx.array, weights: mx.array, rank: mx.array) -> mx.array:
        by_mass = (before < enough) | (top_p >= 1)
        return by_mass & (weights >= min_p) & ((rank < top_k) | (top_k == 0))

    within = inside(mx.cumsum(weights, axis=-1) - weights, weights, mx.arange(near.shape[-1]))
    number = within.sum(axis=-1, keepdims=True)
    border = mx.take_along_axis(descending, number - 1, axis=-1)
    above, equal = near > border, near == border
    spare = number - above.sum(axis=-1, keepdims=True)
    kept = above | (equal & (mx.cumsum(equal.astype(mx.int32), axis=-1) <= spare))
    if elsewhere is not None:  # the greatest logit there: its place among the candidates says whether it is kept
        over = descending > elsewhere
        mass, rank = mx.where(over, weights, 0).sum(axis=-1, keepdims=True), over.sum(axis=-1, keepdims=True)
        unsure = (inside(mass, mx.exp(elsewhere - top), rank) & (elsewhere > -mx.inf))[:, 0]
    return mx.where(kept, near, -mx.inf), chosen, unsure


class NotFinite(UserError):
    """A model's outputs are not finite numbers."""


def refuse_no_token(loaded: LoadedModel, tokens: np.ndarray) -> None:
    """Raise NotFinite if a token could not be drawn, as its logits were not finite numbers.

    Args:
        loaded: the model, which the message names.
        tokens: as ``draw`` returns them.
    """
    if (tokens >= 0).all():
        return
    model = f"{loaded.name} with the adapter {loaded.adapter}" if loaded.adapter else loaded.name
    small = f", or {loaded.backend.dtype or 'its own type'} cannot hold its numbers: pass --dtype float32"
    raise NotFinite(
        f"{model}: its outputs are not finite numbers (NaN or infinity), so no token can be drawn. The weights or the "
        "adapter are broken, by a learning rate that was too high or by a damaged file: take an earlier checkpoint or "
        f"another adapter, or copy the model anew{small if loaded.backend.dtype != 'float32' else ''}"
    )


def _pick(array: mx.array, tokens: mx.array) -> mx.array:
    """Return (R,) elements of (R, V), one a row."""
    return mx.take_along_axis(array, tokens[:, None], axis=-1)[:, 0]


def decode(tokenizer: Any, ids: list[int], begun: bool = False) -> str:
    """Return the ids' exact text, special tokens such as ``<think>`` included.

    SentencePiece drops a text's first space. If ``begun``, the ids go on with one, so theirs is kept.
    """
    if begun and ids and str(tokenizer.convert_ids_to_tokens(ids[0])).startswith(("▁", "<0x20>")):
        return decode(tokenizer, [ids[0], *ids])[len(decode(tokenizer, ids[:1])) :]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def text_of(loaded: LoadedModel, ids: list[int], cut: int | None = None, *, begun: bool = False) -> str:
    """Return a completion's text, up to ``cut`` characters of its exact text, without the model's ``signs``.

    ``begun``: the prompt holds the beginning of the assistant's turn, see `decode`.
    """
    text = decode(loaded.tokenizer, ids, begun)[:cut]
    for token in {*ids} & loaded.signs.keys():
        text = text.replace(loaded.signs[token], "")
    return text
