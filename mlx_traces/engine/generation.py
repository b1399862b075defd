"""The sampling engine: prompts in, rollouts out as they finish, for evaluation and for reinforcement learning.

One decode step serves every row at once. Rows that finish free their slots, and new rows join in waves, in place
(`kv_cache`). A prompt that several completions share is read once, and so is a beginning that all prompts share. The
next step is dispatched before the previous tokens are read. No array as wide as the vocabulary leaves the step.

Models of known layers are decoded by fewer operations than their modules have (`fused`). On a GPU the draw is compiled,
and a probe first tests attention on slices of longer buffers (`attention`). The step as a whole is not compiled: on a
CPU that gains little (20 to 21 ms instead of 21 to 23, a step of nano with 128 rows).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_traces.engine import attention, cpu_trunk, fused
from mlx_traces.engine.attention import SLICES, Reading
from mlx_traces.engine.kv_cache import STEP, SlotCache, Window, align_right, mask_axes
from mlx_traces.engine.mlx_lm_fallback import generate_plainly
from mlx_traces.engine.sampling import (
    CANDIDATES,
    UNSURE,
    Ending,
    Request,
    SamplingParams,
    draw,
    refuse_no_token,
    settings_of,
    stop_ids,
    uniforms_of,
)
from mlx_traces.engine.thinking import NONE, State, Thinking
from mlx_traces.errors import UserError
from mlx_traces.models import adapters
from mlx_traces.models.convert import weight_name
from mlx_traces.models.loading import LoadedModel
from mlx_traces.records import Rollout
from mlx_traces.runtime import blas, cores, distributed
from mlx_traces.runtime.device import limits

MIN_SHARED = 16  # tokens; a beginning of all prompts that is at least as long is read once
# Prompt tokens read at once, padding included. On a CPU few: products of that size are at full speed already, and
# batches of near-equal prompts pad little (GSM8K: 2,204 tokens read for 2,019, where batches of 2,048 read 2,828).
PREFILL_TOKENS = {"cpu": 512, "metal": 8192, "cuda": 16_384}
WAVE = 8  # new rows join when an eighth of the slots is free
# Float32 buffers, (rows, vocabulary), that drawing takes, measured on a CPU: at temperature 0 or 1 (one, or two where
# steps overlap), at another temperature, and with top-p, top-k or min-p.
DRAWN, DRAWN_SCALED, DRAWN_FILTERED = 1.6, 2.0, 10.5
MEMORY_SHARE = 0.8  # of the device's memory that a run may plan for
ONE_ROW = "with a single row ({told}): lower --max-tokens, shorten the prompt, or take a smaller model or fewer bits"
CHOICES = ("forced", "guard", "more")  # arrays that say what replaces a drawn token, an entry for each slot
DROP = 0.75  # idle slots are dropped when at most this share of the slots is busy


@dataclass
class Usage:
    """Counts of one run of the engine: seconds and tokens of prompts and of decoding, steps, and rows times steps.

    ``prompt_tokens`` includes padding, and counts a shared prompt once. ``first_token_seconds`` is the time from the
    start to the first tokens. ``occupancy`` is the share of row-steps that made a token of a rollout.
    """

    first_token_seconds: float = 0.0
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    completion_tokens: int = 0
    decode_seconds: float = 0.0
    steps: int = 0
    row_steps: int = 0

    @property
    def occupancy(self) -> float:
        """Share of computed row-steps that were used."""
        return self.completion_tokens / self.row_steps if self.row_steps else 0.0


def generate(
    loaded: LoadedModel,
    requests: Sequence[Request],
    params: SamplingParams | Sequence[SamplingParams],
    rows: int = 32,
    *,
    logprobs: bool = False,
    memory_gb: float | None = None,
    usage: Usage | None = None,
) -> Iterator[tuple[int, Rollout]]:
    """Complete prompts, ``rows`` at once; yield (index into ``requests``, rollout) as each finishes.

    Requests with the same prompt are a group: the prompt is read once. The longest prompts start first.

    Guaranteed: the same requests, settings, ``rows`` and device give the same rollouts. A row's random numbers
    depend on its seed and on how many tokens it has drawn, not on its neighbours, its place or ``rows``, so another
    batch draws the same completion again up to rounding, which differs with the shape of a batch and can decide a
    near tie. Not guaranteed: equality across devices, dtypes or versions.

    Args:
        loaded: the model. Its ``stop_ids`` end a completion, as do its ``stop_strings`` and ``params.stop``.
        requests: prompts as token ids.
        params: how to draw, for all requests or for each.
        rows: completions decoded at once.
        logprobs: also return the float32 log-probability of each sampled token, in nats: ``logprobs`` of the
            distribution that was sampled, filters and temperature included (all 0 where greedy), and
            ``model_logprobs`` of the model's own, at temperature 1 and unfiltered.
        memory_gb: most memory to plan for, weights included, in 1e9 bytes; default: 80 % of the device's. Fewer
            rows are decoded at once if ``rows`` would not fit (`rows_that_fit`), and after memory has run out
            (`MemoryBudget`); notes in ``loaded.notes`` say so.
        usage: is filled in as the engine runs.

    Raises:
        UserError: before anything runs, for a setting outside its range, an empty prompt, ``rows`` below 1, bounds on
            thoughts for a prompt after which there is no thought, or a prompt that leaves no room for ``max_tokens``
            in the model's context; as it runs, if the model's outputs are not finite numbers, or a single row does
            not fit in the memory.
    """
    requests = list(requests)
    each = [params] * len(requests) if isinstance(params, SamplingParams) else list(params)
    for settings in {params} if isinstance(params, SamplingParams) else set(each):
        settings.check()
        stop_ids(loaded, settings)
    if rows < 1:
        raise UserError(f"rows must be at least 1, not {rows}")
    for index, (request, settings) in enumerate(zip(requests, each, strict=True)):
        length = len(request.prompt_ids)
        if not length:
            raise UserError(f"prompt {index + 1} of {len(requests)} is empty")
        if settings.bound and request.thoughtless:
            raise UserError(
                f"{settings.bound}: {loaded.name}, prompt {index + 1} of {len(requests)}: {request.thoughtless}"
            )
        if loaded.context is not None and length + settings.longest > loaded.context:
            limits = "--think-tokens, --max-tokens" if settings.think_tokens else "--max-tokens"
            raise UserError(
                f"prompt {index + 1} of {len(requests)} has {length} tokens; {settings.longest} more exceed "
                f"the model's context of {loaded.context}; lower {limits} or shorten the prompt"
            )
    if not requests:
        return iter(())
    fit = rows_that_fit(loaded, requests, each, memory_gb)
    if fit < rows:
        _note(loaded, f"{fit} rows at once instead of {rows}: more do not fit in the memory")
    return _run(loaded, requests, each, min(rows, fit, len(requests)), logprobs, usage or Usage())


def rows_that_fit(
    loaded: LoadedModel, requests: Sequence[Request], params: Sequence[SamplingParams], memory_gb: float | None = None
) -> int:
    """Return how many rows the memory holds, at least 1.

    A row takes its keys and values, 2 x layers x key-value heads x head size x bytes a number x (longest prompt + most
    tokens + ``kv_cache.STEP``), and its float32 logits, three times or as often as `buffers_of_a_draw` says. Rows share
    the memory that is left beside the weights and a batch of prompt tokens (``PREFILL_TOKENS``, each with 16 hidden and
    4 feed-forward activations).
    """
    heads, hidden = loaded.size("num_attention_heads") or 1, loaded.size("hidden_size")
    size = loaded.size("head_dim") or hidden // heads
    itemsize = adapters.activation_bytes(loaded.model)
    length = max(len(r.prompt_ids) + p.longest for r, p in zip(requests, params, strict=True)) + STEP
    layers = len(loaded.model.layers)
    row = 2 * layers * (loaded.size("num_key_value_heads") or heads) * size * itemsize * length
    row += int(max(3.0, *map(buffers_of_a_draw, params)) * 4 * loaded.size("vocab_size"))
    activations = 16 * hidden + 4 * loaded.size("intermediate_size")
    prefill = PREFILL_TOKENS[loaded.backend.name] * itemsize * activations
    limit = 1e9 * (memory_gb or MEMORY_SHARE * loaded.backend.memory_gb)
    weights = adapters.sampling_bytes(loaded.model, loaded.backend) + fused.extra_bytes(loaded.model)
    return max(1, int((limit - weights - prefill) // max(row, 1)))


def buffers_of_a_draw(params: Any) -> float:
    """Return the number of float32 buffers, (rows, vocabulary) each, that drawing a token by these settings takes."""
    if params.temperature and (params.top_p, params.top_k, params.min_p) != (1, 0, 0):
        return DRAWN_FILTERED
    return DRAWN if params.temperature in (0, 1) else DRAWN_SCALED


def _run(
    loaded: LoadedModel,
    requests: list[Request],
    params: list[SamplingParams],
    rows: int,
    logprobs: bool,
    usage: Usage,
) -> Iterator[tuple[int, Rollout]]:
    """Run the engine, or mlx_lm's for a model with a special cache; rows that memory did not hold are decoded again."""
    plain = all(type(cache) is KVCache for cache in make_prompt_cache(loaded.model))
    reading = reading_of(loaded) if plain else SLICES
    left, budget = list(range(len(requests))), loaded.row_budget
    while left:
        at_once = min(budget.size(rows), len(left))
        asked, settings, done = [requests[i] for i in left], [params[i] for i in left], set()
        threads = blas.threads_for(loaded.model, at_once, distributed.world().size())
        with budget.trying(at_once, advice=ONE_ROW), limits(), threads:
            step = fused.step_of(loaded.model, loaded.backend.name, reading) if plain else None
            # A step that was found right needs no probe of the mask: it decodes rows of different lengths.
            axes = 4 if step else mask_axes(loaded.model, reading) if plain else 0
            if axes is None and rows > 1:
                _note(loaded, f"{loaded.name} cannot decode rows of different lengths together: one row at once")
                rows = 1
                continue
            if axes != 0:
                stream = _Engine(loaded, asked, settings, at_once, logprobs, usage, axes or 4, reading, step).run()
            else:
                stream = generate_plainly(loaded, asked, settings, at_once, logprobs)
            for place, rollout in stream:
                done.add(left[place])
                yield left[place], rollout
        stream = None  # free its arrays before the next try
        left = [index for index in left if index not in done]
        loaded.notes += [line for line in budget.notes if line not in loaded.notes]


def reading_of(loaded: LoadedModel) -> Reading:
    """Return how keys and values are passed to this backend's attention; note a slow way in ``loaded.notes``.

    Raises:
        UserError: if attention is wrong even of whole buffers.
    """
    if loaded.backend.name == "cpu":  # there it is computed step by step
        return SLICES
    dtype = loaded.model(mx.array([[0]])).dtype  # of an array that is never computed
    found = attention.reading(dtype)
    if found != SLICES:
        way = "copied for each step" if found.copied else "read from their buffer's beginning"
        _note(loaded, f"attention misreads slices in {weight_name(dtype)} here, so keys and values are {way}: slower")
    return found


def _note(loaded: LoadedModel, line: str) -> None:
    if line not in loaded.notes:
        loaded.notes.append(line)


@dataclass
class _Step:
    """A step that was dispatched: its number, the tokens that it read and those that it drew, (R,) on the device.

    ``logprobs`` are those of the tokens, if wanted. ``logits`` are kept if the filters may have to draw again.
    """

    number: int
    read: Any
    logits: Any | None
    tokens: Any
    logprobs: Any | None

    def of(self, rows: Any) -> "_Step":
        """Return the step of some rows only."""
        parts = (self.read, self.logits, self.tokens, self.logprobs)
        return _Step(self.number, *(None if part is None else part[rows] for part in parts))


class _Closers:
    """Which tokens would end a thought, for each state of its reader.

    ``table`` is (states, vocabulary) on the device; no token ends what its row 0 stands for.
    """

    def __init__(self, loaded: LoadedModel):
        size = 1 + max(loaded.tokenizer.get_vocab().values())
        self.table = mx.zeros((1, max(size, loaded.config.get("vocab_size") or 0)), mx.bool_)
        self.rows: dict[tuple[State, frozenset[int]], int] = {}

    def row_of(self, thought: Thinking) -> int:
        """Return the table's row for the thought's state; a new state is added."""
        key = thought.state, frozenset(thought.stop_ids)
        if key not in self.rows:
            own = np.zeros((1, self.table.shape[1]), bool)
            own[0, [*thought.reader.closers(thought.state), *thought.stop_ids]] = True
            self.rows[key] = len(self.table)
            self.table = mx.concatenate([self.table, mx.array(own)])
        return self.rows[key]


class _Engine:
    """The state of one run: slots on the device, and what each slot works on."""

    def __init__(
        self,
        loaded: LoadedModel,
        requests: list[Request],
        params: list[SamplingParams],
        rows: int,
        logprobs: bool,
        usage: Usage,
        axes: int,
        reading: Reading,
        step: fused.Step | None,
    ):
        self.loaded, self.requests, self.params, self.usage = loaded, requests, params, usage
        # Groups stay together, and prompts come longest first: later ones then fit where earlier ones were.
        self.pending = deque(
            sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), requests[i].prompt_ids))
        )
        longest = max(settings.longest for settings in params)
        self.endings: dict[int, Ending] = {}  # of the requests that are being decoded
        self.ids: dict[int, list[int]] = {}  # their tokens drawn
        self.request_of = np.full(rows, -1)  # what each slot works on; -1 for nothing
        self.joined = np.zeros(rows, np.int64)  # the first step of each slot's request
        self.age = np.zeros(rows, np.int64)  # tokens drawn
        self.limit = np.zeros(rows, np.int64)  # most tokens to draw
        self.logprobs = np.zeros((rows, longest, 2), np.float32) if logprobs else None
        self.uniforms = np.zeros((rows, longest), np.float32)
        self.settings = np.tile(np.array([[0, 1, 0, 0]], np.float32), (rows, 1))  # temperature, top_p, min_p, top_k
        self.forced = np.full(rows, NONE, np.int32)  # the next token of each row's completion, if it is forced
        self.guard = np.zeros(rows, np.int32)  # row of the table of `closers` with the tokens not allowed next
        self.more = np.zeros(rows, np.int32)  # the token that replaces one of those
        self.closers = _Closers(loaded) if any(settings.think_at_least for settings in params) else None
        self.stop_ids = np.array(sorted(frozenset().union(*(stop_ids(loaded, p) for p in set(params)))), np.int32)
        self.bounded = any(settings.bound for settings in params)
        self.watch_text = bool(loaded.stop_strings) or any(settings.stop for settings in params)
        self.steps = 0  # steps begun
        self.candidates = CANDIDATES
        self.fused = step
        self.window = Window(rows, axes, reading)
        self.caches = [SlotCache(self.window) for _ in loaded.model.layers]
        self.tokens = mx.zeros((rows,), mx.int32)  # what each row reads next
        self.shared = common_beginning([request.prompt_ids for request in requests])
        self.shared_caches: list[tuple[Any, Any]] = []
        self.last_read: tuple[tuple[int, ...], list[tuple[Any, Any]]] = ((), [])

    def run(self) -> Iterator[tuple[int, Rollout]]:
        """Decode until all requests are done; the next step is dispatched before the previous tokens are read."""
        self.began = perf_counter()
        self._admit()
        under_way = self._begin_step()
        while under_way is not None:
            ahead = self._begin_step() if self._need_more() else None
            if self._unsure(under_way).any():
                under_way = self._draw_again(under_way, ahead)
                continue
            yield from self._take(under_way)
            if self.pending:
                free = int((self.request_of < 0).sum())
                if free * WAVE >= len(self.request_of) or ahead is None:
                    self._admit()
            elif ahead is not None:
                ahead = self._drop_idle(ahead)
            under_way = ahead or (self._begin_step() if (self.request_of >= 0).any() else None)

    def _need_more(self) -> bool:
        """Whether some row still has tokens to draw after the dispatched step, if it draws no stop token there."""
        return bool(((self.request_of >= 0) & (self.steps - self.joined < self.limit)).any())

    # ------------------------------------------------------------------------------------------ one step

    def _begin_step(self) -> _Step:
        """Dispatch a step of all rows; it takes the previous step's tokens on the device, before the host has them."""
        start = perf_counter()
        cores.look()
        self._make_room()
        read = self._chosen()
        if self.fused is None:
            logits = self.loaded.model(read[:, None], cache=self.caches)[:, -1]
        else:
            logits = self.fused(read, self.caches)
        self.window.advance()
        step = self._draw(logits, self.steps, read)
        self.tokens = step.tokens
        self.steps += 1
        self.usage.decode_seconds += perf_counter() - start
        self.usage.steps += 1
        self.usage.row_steps += len(self.joined)
        return step

    def _chosen(self) -> Any:
        """Return the tokens that the next step reads: those drawn, or those that replace them."""
        begun, tokens = (self.request_of >= 0) & (self.joined < self.steps), self.tokens
        if (guard := np.where(begun, self.guard, 0)).any():
            tokens = mx.where(self.closers.table[mx.array(guard), tokens], mx.array(self.more), tokens)
        if (forced := begun & (self.forced != NONE)).any():
            tokens = mx.where(mx.array(forced), mx.array(self.forced), tokens)
        return tokens

    def _choose(self, rows: np.ndarray, drawn: np.ndarray) -> None:
        """Put the next tokens of rows' completions in place of those drawn, and prepare for the ones after them."""
        thoughts = [self.endings[index].thought for index in self.request_of[rows].tolist()]
        bound = [row for row, thought in zip(rows.tolist(), thoughts, strict=True) if thought is not None]
        thoughts = [*filter(None, thoughts)]
        drawn[bound] = [thought.take(token) for thought, token in zip(thoughts, drawn[bound].tolist(), strict=True)]
        self._prepare(bound, thoughts)

    def _prepare(self, rows: list[int], thoughts: Sequence[Thinking]) -> None:
        """Note what the bounds on some rows' thoughts say of their next tokens."""
        self.limit[rows] = [thought.limit for thought in thoughts]
        self.forced[rows] = [thought.next for thought in thoughts]
        self.guard[rows] = [self.closers.row_of(thought) if thought.kept_open else 0 for thought in thoughts]

    def _draw(self, logits: Any, number: int, read: Any) -> _Step:
        """Draw the tokens of a step, each row by its own random number for it."""
        place = np.clip(number - self.joined, 0, self.uniforms.shape[1] - 1)
        uniforms = self.uniforms[np.arange(len(place)), place]
        tokens, logprobs = draw(logits, uniforms, self.settings, self.logprobs is not None, self.candidates)
        # On a CPU this waits until nearly all is done.
        mx.async_eval(tokens if logprobs is None else [tokens, logprobs])
        return _Step(number, read, logits if (self.settings[:, 1:] != (1, 0, 0)).any() else None, tokens, logprobs)

    def _unsure(self, step: _Step) -> np.ndarray:
        """Return (R,) whether a row's filters may keep tokens outside the candidates; waits for the step."""
        working = (self.request_of >= 0) & (self.joined <= step.number)
        return working & (np.array(step.tokens) == UNSURE) if step.logits is not None else working & False

    def _draw_again(self, step: _Step, ahead: _Step | None) -> _Step:
        """Draw a step's unsure tokens again, with four times as many candidates, also for all later steps.

        The step ahead, which read those tokens, is undone.
        """
        self.candidates *= 4
        if ahead is not None:
            self.window.advance(-1)
            self.steps -= 1
        unsure, found = mx.array(self._unsure(step)), self._draw(step.logits, step.number, step.read)
        tokens, logprobs = mx.where(unsure, found.tokens, step.tokens), step.logprobs
        if logprobs is not None:
            logprobs = mx.where(unsure[:, None], found.logprobs, logprobs)
        # A slot that was given a new request since reads the end of its prompt.
        self.tokens = mx.where(unsure, found.tokens, self.tokens if ahead is None else ahead.read)
        return _Step(step.number, step.read, step.logits, tokens, logprobs)

    def _make_room(self) -> None:
        """Before the buffers are full, move the window to their beginning, if that frees a quarter of them."""
        window, next_prompt = self.window, len(self.requests[self.pending[0]].prompt_ids) if self.pending else 0
        idle = self.request_of < 0
        if window.write % STEP or not window.write:
            return
        window.start[idle] = window.write  # idle slots need no keys
        by = min(int(window.start.min()), window.write - next_prompt)
        if by >= window.write // 4:
            self._move(by)
        self._settle()

    def _settle(self) -> None:
        """Copy the rows' places to the device; if all rows began at one place, move that to the buffers' beginning.

        There they need no mask, which some backends have no kernel for.
        """
        first = int(self.window.start.min())
        if first and (self.window.start == first).all():
            self._move(first)
        self.window.refresh()

    def _move(self, by: int) -> None:
        for cache in self.caches:
            cache.shift(by)
            mx.eval([array for array in (cache.keys, cache.values) if array is not None])  # copies one layer at a time
        self.window.write -= by
        self.window.start -= by

    def _take(self, step: _Step) -> Iterator[tuple[int, Rollout]]:
        """Wait for a step, record its tokens, and yield the rollouts that it finished."""
        start = perf_counter()
        drawn = np.array(step.tokens)
        now = perf_counter()
        self.usage.decode_seconds += now - start
        self.usage.first_token_seconds = self.usage.first_token_seconds or now - self.began
        rows = np.flatnonzero((self.request_of >= 0) & (self.joined <= step.number))
        refuse_no_token(self.loaded, drawn[rows])
        if self.bounded:
            self._choose(rows, drawn)
        for index, token in zip(self.request_of[rows].tolist(), drawn[rows].tolist(), strict=True):
            self.ids[index].append(token)
        if step.logprobs is not None:
            self.logprobs[rows, self.age[rows]] = np.array(step.logprobs)[rows]
        self.age[rows] += 1
        self.usage.completion_tokens += len(rows)
        stopped = np.isin(drawn[rows], self.stop_ids)
        full = self.age[rows] >= self.limit[rows]
        watched = rows if self.watch_text else rows[stopped | full]
        for row in watched.tolist():
            index = int(self.request_of[row])
            kept = None if self.logprobs is None else self.logprobs[row, : self.age[row]]
            rollout = self.endings[index].rollout(self.ids[index], kept)
            if rollout is not None:
                self.request_of[row] = -1
                del self.endings[index], self.ids[index]
                yield index, rollout

    def _drop_idle(self, ahead: _Step) -> _Step:
        """Keep only the busy slots, once many are idle and no request is waiting."""
        keep = np.flatnonzero(self.request_of >= 0)
        if not len(keep) or len(keep) > DROP * len(self.request_of):
            return ahead
        rows = mx.array(keep)
        for cache in self.caches:
            cache.keep(rows)
        for name in (*("request_of", "joined", "age", "limit", "uniforms", "settings"), *CHOICES):
            setattr(self, name, getattr(self, name)[keep])
        if self.logprobs is not None:
            self.logprobs = self.logprobs[keep]
        self.window.start = self.window.start[keep]
        self._settle()
        self.tokens = self.tokens[rows]
        return ahead.of(rows)

    # ------------------------------------------------------------------------------------------ prompts

    def _admit(self) -> None:
        """Give free slots their next prompts: all but the last token is read here, the last by the next step."""
        start = perf_counter()
        free = np.flatnonzero(self.request_of < 0).tolist()
        taken = [(slot, self.pending.popleft()) for slot in free[: len(self.pending)]]
        if not taken:
            return
        if len(free) == len(self.request_of):  # no row stays, so the longest prompt begins at the buffers' beginning
            self.window.write = len(self.requests[taken[0][1]].prompt_ids) - 1
        members: dict[tuple[int, ...], list[int]] = {}
        for slot, index in taken:
            members.setdefault(self.requests[index].prompt_ids, []).append(slot)
        self._read(members)
        for slot, index in taken:
            request, settings = self.requests[index], self.params[index]
            self.request_of[slot], self.joined[slot], self.age[slot] = index, self.steps, 0
            self.limit[slot] = settings.longest
            ending = self.endings[index] = Ending(self.loaded, request, settings)
            self.ids[index] = []
            self.forced[slot], self.guard[slot] = NONE, 0
            if ending.thought is not None:
                self.more[slot] = (*ending.thought.more, 0)[0]
                self._prepare([slot], [ending.thought])
            self.settings[slot] = settings_of(settings)
            self.window.start[slot] = self.window.write - len(request.prompt_ids) + 1
            self.uniforms[slot, : settings.longest] = uniforms_of(request, settings)
        self.window.start[self.request_of < 0] = self.window.write
        self._settle()
        last = [self.requests[index].prompt_ids[-1] for _, index in taken]
        self.tokens[mx.array([slot for slot, _ in taken])] = mx.array(last, mx.int32)
        mx.eval(self.tokens, [(cache.keys, cache.values) for cache in self.caches if cache.keys is not None])
        self.usage.prompt_seconds += perf_counter() - start

    def _read(self, members: dict[tuple[int, ...], list[int]]) -> None:
        """Read prompts, in batches of bounded size, into the slots of their groups."""
        budget = PREFILL_TOKENS[self.loaded.backend.name]
        again, layers = self.last_read
        if again in members:  # the rest of a group whose prompt was read for an earlier wave
            self._fill([members.pop(again)], layers)
        prompts = [prompt for prompt in members if len(prompt) > 1]
        while prompts:
            width = len(prompts[0]) - 1 - self.shared
            count = max(1, budget // max(width, 1))
            batch, prompts = prompts[:count], prompts[count:]
            layers = self._prefill([prompt[:-1] for prompt in batch], budget)
            self._fill([members[prompt] for prompt in batch], layers)
            own = slice(1 - len(batch[-1]), None)  # without the batch's padding, for which there may be no room later
            self.last_read = batch[-1], [(keys[-1:, :, own], values[-1:, :, own]) for keys, values in layers]
        if not self.pending or self.requests[self.pending[0]].prompt_ids != self.last_read[0]:
            self.last_read = (), []

    def _fill(self, slots: list[list[int]], layers: list[tuple[Any, Any]]) -> None:
        """Copy the keys and values of each prompt into every slot of its group."""
        order = sorted((slot, row) for row, group in enumerate(slots) for slot in group)
        rows = mx.array([row for _, row in order])
        alike = [row for _, row in order] == list(range(len(slots)))
        for cache, (keys, values) in zip(self.caches, layers, strict=True):
            cache.fill([slot for slot, _ in order], *((keys, values) if alike else (keys[rows], values[rows])))

    def _prefill(self, bodies: list[tuple[int, ...]], budget: int) -> list[tuple[Any, Any]]:
        """Return each layer's keys and values, (k, heads, longest, size), of token sequences, aligned right."""
        if self.shared and not self.shared_caches:
            self.shared_caches = self._run_prompt(np.array([bodies[0][: self.shared]]), budget)
        lengths = [len(body) for body in bodies]
        tokens = np.zeros((len(bodies), max(lengths) - self.shared), np.int32)
        for row, body in zip(tokens, bodies, strict=True):
            row[: len(body) - self.shared] = body[self.shared :]
        layers = self._run_prompt(tokens, budget)
        return [(align_right(keys, lengths), align_right(values, lengths)) for keys, values in layers]

    def _run_prompt(self, tokens: np.ndarray, budget: int) -> list[tuple[Any, Any]]:
        """Read (k, L) right-padded tokens after the shared beginning, a piece at a time.

        Padding stands behind every real token, so the causal mask alone keeps it out.
        """
        caches = make_prompt_cache(self.loaded.model)
        for cache, (keys, values) in zip(caches, self.shared_caches, strict=False):
            cache.keys, cache.values = (mx.repeat(array, len(tokens), axis=0) for array in (keys, values))
            cache.offset = keys.shape[2]
        read = self.loaded.model if self.fused is None else cpu_trunk.trunk(self.loaded.model)
        piece = max(1, budget // len(tokens))
        for at in range(0, tokens.shape[1], piece):
            read(mx.array(tokens[:, at : at + piece]), cache=caches)
            mx.eval([cache.state[:2] for cache in caches])  # the logits are never computed
        self.usage.prompt_tokens += tokens.size
        return [cache.keys_and_values() for cache in caches]


def common_beginning(prompts: Sequence[tuple[int, ...]]) -> int:
    """Return the length of the prompts' common prefix, the last tokens left out; 0 if it is below `MIN_SHARED`."""
    first, last = min(prompts), max(prompts)
    length = min(len(first), len(last), *(len(prompt) - 1 for prompt in prompts)) if first != last else 0
    same = next((i for i in range(length) if first[i] != last[i]), length)
    return same if same >= MIN_SHARED else 0
