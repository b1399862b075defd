"""How one token is drawn and when a completion ends: what the engine and the fallback share."""

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_traces.engine.logprobs import blocks
from mlx_traces.errors import UserError
from mlx_traces.models.loading import LoadedModel
from mlx_traces.records import Rollout
from mlx_traces.tasks.thoughts import after_last, still_open, usual

# Numbers of a vocabulary-wide buffer on a CPU, 8 MiB: MLX keeps those that were freed, up to 32 MiB, for the next of
# their size. A larger one comes from the system page by page, and an addition takes 2.2 ns a number instead of 0.2.
DRAWN_AT_ONCE = 2**21
LONGEST_TAG = 64  # tokens that a tag of a thought may take
NO_TOKEN = -1  # in place of a token where the logits are not finite numbers


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn and when a completion ends.

    ``temperature`` 0 is greedy and ignores the filters. Otherwise, as in mlx_lm: ``top_p``, then ``min_p``,
    then ``top_k`` drop tokens by their probabilities at temperature 1, and one of those left is drawn at
    ``temperature``. ``top_p`` 1, ``min_p`` 0 and ``top_k`` 0 drop nothing. ``max_tokens`` counts the stop
    token. A completion also ends with any of the ``stop_tokens`` (ids, or tokens as the vocabulary writes them), which
    is kept like the model's own stop token, and before any of the strings in ``stop``, those within a thought left out
    unless ``stop_in_thoughts``.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int | str, ...] = ()
    stop_in_thoughts: bool = False

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


@dataclass(frozen=True)
class Request:
    """A prompt to complete once; ``seed`` is that of this row's own random stream.

    ``opened`` is what the prompt holds of the assistant's turn: a thought that stands open there.
    """

    prompt_ids: tuple[int, ...]
    seed: int = 0
    opened: str = ""


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
            raise UserError(f"unknown stop token {token!r}: {loaded.name} has no such token; a text goes into stop")
        own.add(number)
    return loaded.stop_ids | own


class Ending:
    """Tells when one completion ends, and makes its rollout.

    Of its text no more is decoded than stop strings and tags of thoughts can span, until it ends.
    """

    def __init__(self, loaded: LoadedModel, request: Request, params: SamplingParams):
        self.loaded, self.request, self.params = loaded, request, params
        self.stop_ids = stop_ids(loaded, params)
        self.stops = (*params.stop, *loaded.stop_strings)
        # A model's own stop strings stand for the token that ends its turn, so they count in thoughts too.
        self.always = frozenset(self.stops if params.stop_in_thoughts else loaded.stop_strings)
        self.seen, self.thinking = 0, False  # tokens that were looked at for tags, and whether a thought was open there

    def rollout(self, ids: list[int], logprobs: np.ndarray | None = None) -> Rollout | None:
        """Return the rollout of ``ids`` if its newest token ended it, else None.

        Args:
            ids: tokens drawn so far, at least one.
            logprobs: (len(ids), 2) of the tokens, as ``draw`` returns them.
        """
        at_stop, at_limit = ids[-1] in self.stop_ids, len(ids) >= self.params.max_tokens
        cut, stop = (None, None) if at_stop else self._find_stop(ids)
        if not (at_stop or at_limit) and stop is None:
            return None
        text = text_of(self.loaded, ids[:-1] if at_stop else ids, cut)
        reason = "length" if stop is None and not at_stop else "stop"
        columns = (None, None) if logprobs is None else (tuple(column) for column in logprobs.T.tolist())
        return Rollout(self.request.prompt_ids, tuple(ids), text, reason, *columns, stop)

    def _find_stop(self, ids: list[int]) -> tuple[int | None, str | None]:
        """Return where in the text the first stop string starts, and which, if the newest token completed one.

        Only as many last tokens are decoded as a stop string can span: a token is at least a byte, bar a few special
        ones. What they show is looked for again in the whole text, which a tokenizer may write otherwise.
        """
        if not self.stops:
            return None, None
        tail = decode(self.loaded.tokenizer, ids[-max(len(stop.encode()) for stop in self.stops) - 8 :])
        found = [stop for stop in self.stops if stop in tail]
        if not found or (self.always.isdisjoint(found) and self._in_thought(ids)):
            return None, None
        text = decode(self.loaded.tokenizer, ids)
        answer, thinking = after_last(usual(self.request.opened + text, self.loaded.own_tags))
        start = len(text) if thinking else max(0, len(text) - len(answer))
        places = ((text.find(stop, 0 if stop in self.always else start), stop) for stop in self.stops)
        return min((place for place in places if place[0] >= 0), default=(None, None))

    def _in_thought(self, ids: list[int]) -> bool:
        """Whether a thought is open now, by the tokens since the last look and as many before as a tag can span."""
        text = decode(self.loaded.tokenizer, ids[max(0, self.seen - LONGEST_TAG) :])
        text = text if self.seen > LONGEST_TAG else self.request.opened + text
        self.seen, self.thinking = len(ids), still_open(usual(text, self.loaded.own_tags), self.thinking)
        return self.thinking


def uniforms_of(request: Request, params: SamplingParams) -> np.ndarray:
    """Return (max_tokens,) float32 in [0, 1), the random numbers of one completion: Philox keyed by its seed."""
    if not params.temperature:
        return np.zeros(params.max_tokens, np.float32)
    stream = np.random.Generator(np.random.Philox(key=request.seed))
    return stream.random(params.max_tokens, np.float32)


def settings_of(params: SamplingParams) -> np.ndarray:
    """Return (4,) float32: temperature, top_p, min_p, top_k."""
    return np.array([params.temperature, params.top_p, params.min_p, params.top_k], np.float32)


def draw(logits: Any, uniforms: np.ndarray, settings: np.ndarray, logprobs: bool) -> tuple[Any, Any | None]:
    """Draw a token of every row by inverting the distribution at a uniform number.

    One random number a row replaces Gumbel noise over the vocabulary: that is cheaper, and each row has its own stream.
    A block of the vocabulary is drawn first, by the blocks' sums, then a token inside it. With one float32 sum over
    151,936 tokens, one draw in four is not the token of the exact distribution; with these two sums, one in fifty.

    Args:
        logits: (R, V) float32.
        uniforms: (R,) in [0, 1).
        settings: (R, 4): temperature (0 takes the likeliest), top_p, min_p, top_k (0 keeps all).
        logprobs: whether to return log-probabilities.

    Returns:
        (R,) int32 tokens, -1 where the logits are not finite numbers; (R, 2) float32 log-probabilities of them under
        the distribution drawn from and under the model's own, or None.
    """
    rows, most = len(settings), max(1, DRAWN_AT_ONCE // logits.shape[-1])
    if rows > most and mx.default_device() == mx.Device(mx.cpu):
        parts = [slice(at, at + most) for at in range(0, rows, most)]
        drawn = [draw(logits[part], uniforms[part], settings[part], logprobs) for part in parts]
        tokens, values = zip(*drawn, strict=True)
        return mx.concatenate(tokens), mx.concatenate(values) if logprobs else None
    temperature = settings[:, 0]
    greedy = temperature == 0
    settings = np.where(greedy[:, None], (0, 1, 0, 0), settings).astype(np.float32)
    plain, filtered = bool((temperature[~greedy] == 1).all()), bool((settings[:, 1:] != (1, 0, 0)).any())
    best = mx.argmax(logits, axis=-1).astype(mx.int32) if greedy.any() else None
    if greedy.all():
        tokens, scaled, total = best, logits, _total(logits) if logprobs else 0
    else:
        scaled = logits if plain and not filtered else logits - logits.max(axis=-1, keepdims=True)
        kept = _kept(scaled, settings) if filtered else None
        if not plain:
            divisor = np.where(greedy, 1, np.maximum(temperature, 1e-6))
            scaled = scaled * mx.array((1 / divisor).astype(np.float32))[:, None]
        if filtered:
            scaled = mx.where(kept, scaled, -mx.inf)
        tokens, total = _invert(scaled, mx.array(uniforms))
        tokens = tokens if best is None else mx.where(mx.array(greedy), best, tokens)
    picked = _pick(scaled, tokens)
    sampled = picked - total
    if logprobs and scaled is not logits:
        own = _pick(logits, tokens) - _total(logits)
    else:
        own = sampled
    tokens = mx.where(mx.isfinite(own), tokens, NO_TOKEN)
    return tokens, mx.stack([mx.where(mx.array(greedy), 0, sampled), own], axis=-1) if logprobs else None


def _invert(scaled: Any, uniforms: Any) -> tuple[Any, Any]:
    """Return (R,) tokens where the distributions of (R, V) logits pass (R,) numbers, and (R,) logsumexp of the logits.

    A token without weight is not drawn.
    """
    parts, most = blocks(scaled, -mx.inf), 1 - 2**-23  # what rounds to the whole would point behind the last one
    sums = mx.logsumexp(parts, axis=-1)
    top = sums.max(axis=-1, keepdims=True)
    weights = mx.exp(sums - top)
    mass = mx.cumsum(weights, axis=-1)
    target = mx.minimum(uniforms[:, None], most) * mass[:, -1:]
    block = (mass <= target).sum(axis=-1, keepdims=True)
    own = mx.take_along_axis(weights, block, axis=-1)
    share = mx.clip((target - mx.take_along_axis(mass, block, axis=-1) + own) / own, 0, most)
    inside = mx.take_along_axis(parts, block[:, :, None], axis=1)[:, 0]
    heights = mx.cumsum(mx.exp(inside - inside.max(axis=-1, keepdims=True)), axis=-1)
    place = (heights <= share * heights[:, -1:]).sum(axis=-1, keepdims=True)
    return (block * parts.shape[-1] + place)[:, 0].astype(mx.int32), mx.logsumexp(sums, axis=-1)


def _total(logits: Any) -> Any:
    """Return (R,) logsumexp of (R, V) logits, of the blocks first: one pass, and as exact as `logprobs.logsumexp`."""
    return mx.logsumexp(mx.logsumexp(blocks(logits, -mx.inf), axis=-1), axis=-1)


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


def _pick(array: Any, tokens: Any) -> Any:
    """Return (R,) elements of (R, V), one a row."""
    return mx.take_along_axis(array, tokens[:, None], axis=-1)[:, 0]


def _kept(logits: Any, settings: np.ndarray) -> Any:
    """Return (R, V): which tokens top_p, min_p and top_k keep, by their probabilities at temperature 1.

    As in mlx_lm the next filter sees what the one before left, without renormalising. ``logits`` have 0 at their
    greatest.
    """
    weights = mx.exp(logits)
    order = mx.argsort(-logits, axis=-1)
    descending = mx.take_along_axis(weights, order, axis=-1)
    before = mx.cumsum(descending, axis=-1) - descending
    top_p, min_p, top_k = (mx.array(settings[:, i])[:, None] for i in (1, 2, 3))
    inside = (before < top_p * weights.sum(axis=-1, keepdims=True)) | (top_p >= 1)
    inside &= descending >= min_p
    inside &= (mx.arange(logits.shape[-1]) < top_k) | (top_k == 0)
    return mx.put_along_axis(mx.zeros(logits.shape, mx.bool_), order, inside, axis=-1)


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Return the ids' exact text, special tokens such as ``<think>`` included."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def text_of(loaded: LoadedModel, ids: list[int], cut: int | None = None) -> str:
    """Return a completion's text, up to ``cut`` characters of its exact text, without tokens that are not text."""
    text = decode(loaded.tokenizer, ids)[:cut]
    for token in {*ids} & loaded.signs.keys():
        text = text.replace(loaded.signs[token], "")
    return text
