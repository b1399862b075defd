"""A prompt read once for its rows gives what whole rows give: states, losses, gradients."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from factories import by_modules, make_model
from mlx.utils import tree_flatten

from mlx_traces.config import AdapterConfig
from mlx_traces.engine import forward
from mlx_traces.engine.batching import Example
from mlx_traces.engine.logprobs import Split, head_logprobs, split
from mlx_traces.errors import UserError
from mlx_traces.models import adapters, loading
from mlx_traces.runtime import device, distributed
from mlx_traces.train import gradients


def lora(kind="lora", **changes):
    model = make_model(**changes)
    mx.random.seed(1)
    adapters.start(model, AdapterConfig(rank=4, kind=kind))
    trained = tree_flatten(model.trainable_parameters())
    arrays = [(name, array + 0.1 * mx.random.normal(array.shape)) for name, array in trained]
    model.load_weights(arrays, strict=False)
    return model


def groups(lengths, size=3, seed=0, rest=9):
    """Return rows with unequal completions, ``size`` to a prompt; some tokens in the middle are not trained."""
    draw = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        prompt = tuple(draw.integers(0, 98, length).tolist())
        for _ in range(size):
            count = int(draw.integers(1, rest))
            trained = [True] * count
            if count > 4:
                trained[2] = False
            ids = prompt + tuple(draw.integers(0, 98, count).tolist())
            rows.append(Example(f"{len(rows)}", ids, (False,) * length + tuple(trained)))
    return rows


def measured(model, rows, budget, shares, halves=None):
    halves = halves or (forward.split(model) if shares else split(model))
    draws = [np.random.default_rng(i).normal(size=row.count) for i, row in enumerate(rows)]
    weights = [mx.array(draw.astype(np.float32)) for draw in draws]

    def loss_of(states, targets, indices):
        logprobs, entropies = head_logprobs(halves, states, targets, 0.7)
        return (logprobs * mx.concatenate([weights[i] for i in indices])).sum(), {"entropy": -entropies.sum()}

    return gradients.accumulate(model, halves, rows, budget, loss_of)


def distance(one, other):
    pairs = zip(tree_flatten(one), tree_flatten(other), strict=True)
    return max((mx.abs(a - b).max() / mx.abs(a).max()).item() for (_, a), (_, b) in pairs)


@pytest.mark.parametrize("lengths", [(12, 9, 14, 7), (10, 10, 10), (11,), (1, 30)], ids=str)
@pytest.mark.parametrize("budget", [16, 64, 4096])
def test_gradient_is_that_of_whole_rows(lengths, budget):
    model, rows = lora(), groups(lengths)
    loss, grads, sums = measured(model, rows, budget, True)
    plain_loss, plain_grads, plain_sums = measured(model, rows, 64, False)
    assert loss == pytest.approx(plain_loss, rel=1e-5) and distance(plain_grads, grads) < 2e-5
    assert sums["entropy"] == pytest.approx(plain_sums["entropy"], rel=1e-5) and sums["entropy"] < 0


@pytest.mark.parametrize("kind", ["dora", "full"])
def test_other_adapters(kind):
    model, rows = lora(kind), groups((12, 9))
    assert distance(measured(model, rows, 64, False)[1], measured(model, rows, 64, True)[1]) < 2e-5


def test_a_prompt_that_asks_for_nothing_is_seen(monkeypatch):
    """The prompts' share of the gradient is not small: without it the comparison above fails."""
    model, rows = lora(), groups((12, 9, 14, 7))
    whole = measured(model, rows, 64, False)[1]
    monkeypatch.setattr(forward.Prompts, "pull_back", lambda *_: iter(()))
    assert distance(whole, measured(model, rows, 64, True)[1]) > 0.01


def test_each_prompt_is_read_once_where_that_saves_tokens(monkeypatch):
    model, read = lora(), []
    whole = forward.Prompts._read

    def counted(self, halves, chunk):
        read.append(len(self.ids[chunk]))
        return whole(self, halves, chunk)

    monkeypatch.setattr(forward.Prompts, "_read", counted)
    measured(model, groups((12, 9, 14, 7)), 4096, True)
    assert read == [2, 4, 4]  # to try it out on two rows; once forward; once more for the gradient
    read.clear()
    measured(model, groups((2, 3), size=1), 4096, True)
    assert read == [2]


def test_states_without_a_gradient():
    model, rows = lora(), groups((12, 9, 14, 7))
    found = {}
    for shares in (False, True):
        halves = forward.split(model) if shares else split(model)
        for indices, (states, targets) in forward.each(halves, rows, 64, lambda *micro: micro):
            ends = np.cumsum([rows[index].count for index in indices])[:-1]
            for index, own, ids in zip(
                indices, np.split(np.array(states), ends), np.split(np.array(targets), ends), strict=True
            ):
                assert ids.tolist() == [i for i, t in zip(rows[index].ids, rows[index].trained, strict=True) if t]
                found.setdefault(index, []).append(own)
    assert len(found) == len(rows)
    for whole, shared in found.values():
        np.testing.assert_allclose(shared, whole, atol=1e-5)


def test_what_ranks_read_is_put_together_row_by_row(monkeypatch):
    """Each rank reads its part of the rows; all have every row's numbers afterwards, in the rows' order."""
    model, rows = lora(), groups((12, 9, 14))
    halves = forward.split(model)

    def read(states, targets):
        return targets.astype(mx.float32), states.sum(axis=-1)

    whole = forward.by_row(halves, rows, 64, read)
    for row, (targets, sums) in zip(rows, whole, strict=True):
        assert targets.tolist() == [i for i, t in zip(row.ids, row.trained, strict=True) if t]
        assert len(sums) == row.count and sums.dtype == targets.dtype == np.float32
    parts, sent = (range(0, 4), range(4, 9)), []
    monkeypatch.setattr(distributed, "gather", lambda own: sent.append(own) or own)
    for part in parts:
        monkeypatch.setattr(distributed, "share", lambda count, part=part: part)
        forward.by_row(halves, rows, 64, read)
    monkeypatch.setattr(distributed, "gather", lambda own: sent[0] + own)
    for found, expected in zip(forward.by_row(halves, rows, 64, read), whole, strict=True):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)


def test_models_are_asked_whether_they_can(monkeypatch):
    model = lora()
    assert forward.split(model).caches == len(model.layers)
    monkeypatch.setattr(forward._Continued, "make_mask", lambda self, N, **_: None)  # every token sees every other
    assert not forward.split(model).caches


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("name", ["tiny", "nano"])
def test_rounding_is_let_pass_and_keys_that_are_lost_are_not(name, dtype, monkeypatch):
    model = make_model() if name == "tiny" else loading.load(name, dtype="float32").model
    model.set_dtype(dtype)
    states, begin = forward.Prompts.states, forward._Continued.__init__

    def rounded(self, *given):  # as another order of summation moves a real model's
        found, tokens = states(self, *given)
        share = 1e-3 if dtype == mx.float32 else 0.03
        return found * (1 + share * mx.random.normal(found.shape)).astype(dtype), tokens

    monkeypatch.setattr(forward.Prompts, "states", rounded)
    assert forward.split(model).caches == len(model.layers)
    monkeypatch.setattr(
        forward._Continued, "__init__", lambda self, keys, *given: begin(self, mx.zeros_like(keys), *given)
    )
    assert not forward.split(model).caches


# ------------------------------------------------------------------------------------------------ on a GPU


def on(monkeypatch, backend):
    monkeypatch.setattr(device, "select", lambda *_: backend)


@pytest.mark.parametrize(
    ("lengths", "budget", "shares"),
    [
        *(((12, 9, 14, 7), budget, shares) for budget in (16, 200, 4096) for shares in (False, True)),
        *(((128, 128), budget, budget != 200) for budget in (16, 200, 4096)),
        *(((1, 30), budget, budget == 200) for budget in (16, 200, 4096)),
    ],
    ids=str,
)
def test_padding_to_a_few_shapes_changes_nothing(lengths, budget, shares, monkeypatch):
    """Rows, queries and prompts are padded for CUDA; a row by itself is not padded at all."""
    model, rows = lora(tie_word_embeddings=False), groups(lengths)
    rows = [replace(row, ids=tuple(max(1, token) for token in row.ids)) for row in rows]
    table = model.model.embed_tokens.weight  # of the token 0, which is what pads, the embedding is far off
    table[0] = 1e4 * mx.random.normal(table.shape[1:])
    loss, grads, sums = measured(model, rows, 1, False)
    on(monkeypatch, "cuda")
    padded_loss, padded, padded_sums = measured(model, rows, budget, shares)
    assert padded_loss == pytest.approx(loss, rel=1e-5) and distance(grads, padded) < 2e-5
    assert padded_sums["entropy"] == pytest.approx(sums["entropy"], rel=1e-5)


class Trunk:
    """Stands in for a model: notes the shapes that it is called with, and returns zeros."""

    def __init__(self):
        self.shapes = []

    def __call__(self, ids, cache=None):
        rows, queries = ids.shape
        keys, _ = cache[0].update_and_fetch(*2 * [mx.zeros((rows, 1, queries, 1))]) if cache else (ids[:, None], None)
        self.shapes.append((rows, queries, keys.shape[2] - queries))
        return mx.zeros((rows, queries, 1))


def steps_of_grpo(steps=70, seed=0, micro_tokens=8192):
    """Return the shapes of steps of 16 x 16 rollouts with lengths like GSM8K's, half of the groups without a gradient,
    and the share of padding."""
    draw, trunk, real = np.random.default_rng(seed), Trunk(), 0
    halves = Split(trunk, lambda states: states, lambda: None, True, caches=1)
    for _ in range(steps):
        rows = []
        for prompt in draw.integers(60, 221, 16)[draw.random(16) < 0.5].tolist():
            own = tuple(draw.integers(0, 98, prompt).tolist())
            for count in np.clip(draw.normal(170, 55, 16), 60, 300).astype(int).tolist():
                rows.append(Example("", own + (1,) * count, (False,) * prompt + (True,) * count))
            real += prompt
        real += sum(row.count - 1 for row in rows)  # the last token of a prompt is the first one's query
        forward.each(halves, rows, micro_tokens, lambda states, targets: states)
    return trunk.shapes, 1 - real / sum(rows * queries for rows, queries, _ in trunk.shapes)


def test_steps_have_few_shapes_on_cuda(monkeypatch):
    shapes, padding = steps_of_grpo()
    assert len(set(shapes)) > 200 and padding < 0.2
    on(monkeypatch, "cuda")
    shapes, padding = steps_of_grpo()
    assert len(set(shapes)) <= 40 and padding <= 0.25, (len(set(shapes)), padding)
    assert len(set(steps_of_grpo(seed=1, micro_tokens=16_384)[0])) <= 40


@pytest.mark.parametrize("shares", [False, True])
def test_a_gpu_is_not_waited_for_and_has_two_micro_batches_at_most(shares, monkeypatch):
    model, rows = lora(), groups((12, 9, 14, 7))
    by_modules(monkeypatch)
    expected = measured(model, rows, 30, shares)
    events, submit, wait, halves = [], mx.async_eval, mx.eval, forward.split(model) if shares else split(model)

    def noted(kind, call):
        def inner(*arrays):
            events.append(kind)
            return call(*arrays)

        return inner

    on(monkeypatch, "metal")
    monkeypatch.setattr(mx, "async_eval", noted("submit", submit))
    monkeypatch.setattr(mx, "eval", noted("wait", wait))
    found = measured(model, rows, 30, shares, halves)
    assert events.count("submit") > 4
    under_way, most = 0, 0
    for event in events:
        under_way = under_way + 1 if event == "submit" else max(0, under_way - 1)
        most = max(most, under_way)
    assert most == 2
    assert found[0] == expected[0] and distance(expected[1], found[1]) == 0 and found[2] == expected[2]


def failing(monkeypatch, above):
    """Let memory run out for every forward pass of more than so many tokens to learn; return what was asked for."""
    whole, asked = head_logprobs, []

    def logprobs(halves, states, targets, *given):
        asked.append(states.shape[0])
        if states.shape[0] > above:
            raise RuntimeError("[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum")
        return whole(halves, states, targets, *given)

    monkeypatch.setitem(globals(), "head_logprobs", logprobs)
    return asked


@pytest.mark.parametrize("shares", [False, True])
def test_memory_that_runs_out_halves_the_micro_batches_and_changes_nothing(monkeypatch, shares):
    model, rows = lora(), groups((12, 9, 14, 7))
    loss, grads, sums = measured(model, rows, 4096, shares)
    before = dict(tree_flatten(model.trainable_parameters()))
    asked = failing(monkeypatch, above=20)
    again_loss, again, again_sums = measured(model, rows, 4096, shares)
    assert max(asked) > 20 and asked[-1] <= 20 and len(asked) > 4
    assert again_loss == pytest.approx(loss, rel=1e-5) and distance(grads, again) < 2e-5
    assert again_sums["entropy"] == pytest.approx(sums["entropy"], rel=1e-5)
    after = dict(tree_flatten(model.trainable_parameters()))
    assert all(mx.array_equal(array, after[name]).item() for name, array in before.items())


def test_what_does_not_fit_is_remembered_and_told():
    model, rows = lora(), groups((12, 9, 14, 7))
    halves = split(model)
    read = [states.shape[0] for _, (states, _) in forward.each(halves, rows, 4096, lambda *micro: micro)]
    assert halves.room.metrics() == {} and len(read) == 1
    asked = []

    def take(states, targets):
        asked.append(len(targets))
        if len(asked) <= 2:
            raise RuntimeError("[metal::malloc] out of memory")
        return targets

    found = forward.each(halves, rows, 4096, take)
    assert asked[:2] == [read[0]] * 2 and sum(asked[2:]) == read[0] and len(asked) > 3  # the same once more, then half
    assert sorted(row for indices, _ in found for row in indices) == [*range(len(rows))]
    metrics, told = halves.room.metrics(), "[metal::malloc] out of memory"
    most, width = metrics["memory/micro_tokens"], max(len(row.ids) for row in rows)
    assert most == len(rows) * width // 2 and metrics["memory/message"] == f"{told}; {told}"
    assert halves.room.notes == [
        f"memory ran out ({told}); once more with {2 * most} tokens in a micro-batch, MLX's cache cleared",
        f"memory ran out again ({told}): at most {most} tokens in a micro-batch from here on",
    ]
    assert len(forward.each(halves, rows, 4096, lambda *micro: micro)) == len(found)  # from then on


def test_memory_that_does_not_hold_one_row_is_told_in_a_line(monkeypatch):
    model, rows = lora(), groups((12, 9))
    failing(monkeypatch, above=0)
    with pytest.raises(UserError, match=r"memory ran out on one sequence of \d+ tokens alone \(.metal::malloc"):
        measured(model, rows, 64, False)
    monkeypatch.setitem(globals(), "head_logprobs", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # any other fault stays one
        measured(model, rows, 64, False)
