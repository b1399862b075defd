"""Log-probabilities in chunks against a float64 softmax of one sequence at a time; layers that are computed twice."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from factories import make_model
from mlx.utils import tree_flatten

from mlx_traces.config import AdapterConfig
from mlx_traces.engine.batching import Example, pad
from mlx_traces.engine.logprobs import (
    Split,
    _frozen_chunk,
    head_logprobs,
    logsumexp,
    rows_per_chunk,
    split,
    token_logprobs,
)
from mlx_traces.models import adapters
from mlx_traces.train.gradients import checkpointed

VOCABULARY = 128
SMALL = 5 * 4 * VOCABULARY / 2**20  # MiB of five rows of logits


def rows(lengths=(9, 4, 12, 2), seed=0):
    """Return sequences of uneven length, some tokens of each learned."""
    draw = np.random.default_rng(seed)
    return [
        Example(
            f"row-{i}", tuple(draw.integers(0, 98, length).tolist()), (*(draw.random(length - 1) < 0.7).tolist(), True)
        )
        for i, length in enumerate(lengths)
    ]


def trained(targets=None, kind="lora", seed=3, size=0.05, model=None, **changes):
    """Return a model with a random adapter in training."""
    model = make_model(**changes) if model is None else model
    mx.random.seed(seed)
    adapters.start(model, AdapterConfig(rank=4, kind=kind, targets=targets, dropout=changes.pop("dropout", 0.0)))
    if kind != "full":
        shake(model, size)
    return model.train()


def shake(model, size=0.05):
    """Give what is trained random values."""
    arrays = tree_flatten(model.trainable_parameters())
    moved = [(name, array + size * mx.random.normal(array.shape).astype(array.dtype)) for name, array in arrays]
    model.load_weights(moved, strict=False)


def quantized(tied):
    model = make_model(tie_word_embeddings=tied)
    nn.quantize(model, group_size=32, bits=4)
    return model


class Capped(nn.Module):
    """A model whose head is not linear: soft-capped logits."""

    def __init__(self, inner):
        super().__init__()
        self.model, self.lm_head = inner.model, inner.lm_head

    def __call__(self, ids):
        return 4 * mx.tanh(self.lm_head(self.model(ids)) / 4)

    @property
    def layers(self):
        return self.model.layers


MODELS = {
    "tied": lambda: trained(),
    "untied": lambda: trained(tie_word_embeddings=False),
    "dora": lambda: trained(kind="dora"),
    "full": lambda: trained(kind="full"),
    "trained head": lambda: trained(["lm_head", "self_attn.q_proj"], tie_word_embeddings=False),
    "trained embedding": lambda: trained(["model.embed_tokens"]),
    "4-bit tied": lambda: trained(model=quantized(True)),
    "4-bit": lambda: trained(model=quantized(False)),
    "trained 4-bit head": lambda: trained(["lm_head"], model=quantized(False)),
    "soft-capped": lambda: trained(model=Capped(make_model(tie_word_embeddings=False))),
    "soft-capped, trained head": lambda: trained(["lm_head"], model=Capped(make_model(tie_word_embeddings=False))),
}


def sums(model, logits_mb, temperature=1.0, weights=None):
    """Return log-probabilities, entropies and the gradient of a weighted sum of log-probabilities."""
    halves = split(model)
    ids, positions = pad(rows())
    weights = mx.ones(len(positions)) if weights is None else weights

    def loss():
        logprobs, entropies = token_logprobs(
            halves, mx.array(ids), positions, temperature=temperature, logits_mb=logits_mb
        )
        return (logprobs * weights).sum(), logprobs, entropies

    (_, logprobs, entropies), grads = nn.value_and_grad(model, loss)()
    return np.array(logprobs), np.array(entropies), flat(grads)


def flat(grads):
    return {name: np.array(array.astype(mx.float32)) for name, array in tree_flatten(grads)}


def plain_gradient(model, temperature, weights):
    """Return the gradient of the same sum by MLX's own softmax over all logits at once."""
    ids, positions = pad(rows())

    def loss():
        logits = model(mx.array(ids[:, :-1])).astype(mx.float32) / temperature
        wanted = mx.array(ids[:, 1:].reshape(-1)[positions])
        losses = nn.losses.cross_entropy(logits.reshape(-1, VOCABULARY)[mx.array(positions)], wanted)
        return -(losses * weights).sum()

    return flat(nn.value_and_grad(model, loss)()[1])


def in_float64(model, temperature=1.0):
    """Return what `sums` does by a softmax in float64 over one unpadded row at a time."""
    logprobs, entropies = [], []
    for row in rows():
        every = np.array(model(mx.array([row.ids[:-1]]))[0].astype(mx.float32)).astype(np.float64)
        for at, logits in enumerate(every, 1):
            if row.trained[at]:
                scaled = logits / temperature
                normalised = scaled - scaled.max() - math.log(np.exp(scaled - scaled.max()).sum())
                logprobs.append(normalised[row.ids[at]])
                entropies.append(-(np.exp(normalised) * normalised).sum())
    return np.array(logprobs), np.array(entropies)


def assert_same(found, expected, tolerance):
    """Compare gradients by name, each relative to its own size."""
    assert found.keys() == expected.keys() and found
    for name, array in expected.items():
        assert np.abs(array).max() > 0, name
        np.testing.assert_allclose(found[name], array, rtol=0, atol=tolerance * np.abs(array).max(), err_msg=name)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_entropies_and_gradients(name, temperature):
    model = MODELS[name]()
    weights = mx.array(np.random.default_rng(5).normal(size=len(pad(rows())[1])).astype(np.float32))
    logprobs, entropies, grads = sums(model, SMALL, temperature, weights)
    expected = in_float64(model, temperature)
    np.testing.assert_allclose(logprobs, expected[0], atol=1e-4)
    np.testing.assert_allclose(entropies, expected[1], atol=1e-4)
    assert_same(grads, plain_gradient(model, temperature, weights), 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_chunks_change_nothing(name):
    model = MODELS[name]()
    whole, parts, single = sums(model, 128), sums(model, SMALL), sums(model, 1e-9)
    for other in (parts, single):
        np.testing.assert_allclose(other[0], whole[0], atol=1e-5)
        np.testing.assert_allclose(other[1], whole[1], atol=1e-5)
        assert_same(other[2], whole[2], 1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16(tied):
    model = make_model(tie_word_embeddings=tied)
    model.set_dtype(mx.bfloat16)
    model = trained(model=model)
    whole, parts = sums(model, 128), sums(model, SMALL)
    assert whole[0].dtype == np.float32 and parts[0].dtype == np.float32
    np.testing.assert_allclose(parts[0], whole[0], atol=0.1)  # bfloat16 logits near 16 are 0.06 apart
    assert_same(parts[2], whole[2], 0.02)
    assert_same(parts[2], plain_gradient(model, 1.0, mx.ones(len(parts[0]))), 0.05)
    # The softmax itself is in float32: probabilities add up to 1 far better than bfloat16 could.
    halves, states = split(model), mx.random.normal((1, 64)).astype(mx.bfloat16)
    every = mx.arange(VOCABULARY)
    logprobs, _ = head_logprobs(halves, mx.repeat(states, VOCABULARY, axis=0), every, slopes=False)
    assert abs(mx.exp(logprobs).sum().item() - 1) < 1e-5


def test_mixed_types_of_head_and_states():
    head = nn.Linear(64, VOCABULARY, bias=False)  # float32 under bfloat16 states
    halves = Split(lambda ids: ids, head, lambda: head, True)
    states, targets = mx.random.normal((7, 64)).astype(mx.bfloat16), mx.arange(7)
    grad = mx.grad(lambda s: head_logprobs(halves, s, targets)[0].sum())(states)
    plain = mx.grad(lambda s: -nn.losses.cross_entropy(head(s).astype(mx.float32), targets, reduction="sum"))(states)
    assert grad.dtype == mx.bfloat16
    np.testing.assert_allclose(np.array(grad.astype(mx.float32)), np.array(plain.astype(mx.float32)), atol=0.02)


@pytest.mark.parametrize("frozen", [True, False])
def test_tokens_of_minus_infinity_are_as_if_they_were_not_there(frozen):
    """Phi-3 small gives those of its vocabulary that do not exist -inf."""
    own = nn.Linear(64, 99)

    def wider(states):
        return mx.concatenate([own(states), mx.full((len(states), 7), -mx.inf)], axis=-1)

    def loss(states, head):
        halves = Split(lambda ids: ids, head, lambda: None, frozen)
        logprobs, entropies = head_logprobs(halves, states, mx.arange(9), 0.7, SMALL, entropy_slopes=True)
        return (logprobs + 2 * entropies).sum()

    states = mx.random.normal((9, 64), key=mx.random.key(0))
    found, expected = (mx.value_and_grad(loss)(states, head) for head in (wider, own))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["tied", "trained head"])
def test_padding_is_never_seen(name):
    model = MODELS[name]()
    halves = split(model)
    examples = rows()
    ids, positions = pad(examples)
    other = ids.copy()
    for row, example in enumerate(examples):
        other[row, len(example.ids) :] = 77
    assert (ids != other).sum() > 10

    def loss(ids):
        return token_logprobs(halves, mx.array(ids), positions)[0].sum()

    (value, grads), (again, others) = (nn.value_and_grad(model, loss)(cells) for cells in (ids, other))
    assert value.item() == again.item()
    for (name, array), (_, same) in zip(tree_flatten(grads), tree_flatten(others), strict=True):
        assert mx.array_equal(array, same), name


def test_only_wanted_positions_count():
    model, halves = (model := make_model()), split(model)
    ids, positions = pad(rows())
    some, _ = token_logprobs(halves, mx.array(ids), positions)
    every, _ = token_logprobs(halves, mx.array(ids), np.arange(ids.shape[0] * (ids.shape[1] - 1)))
    np.testing.assert_allclose(np.array(some), np.array(every)[positions], atol=1e-6)


@pytest.mark.parametrize("targets", [None, ["lm_head", "self_attn.q_proj"]])
def test_no_buffer_is_wider_than_the_bound(targets):
    bound, count = 0.5, 300  # all logits at once are 11 MiB, in several copies
    model = trained(targets, vocab_size=10_000, num_hidden_layers=1, tie_word_embeddings=False)
    halves, ids = split(model), mx.array(np.random.default_rng(0).integers(0, 99, (1, count + 1)))

    def peak(logits_mb):
        def loss():
            logprobs, spread = token_logprobs(halves, ids, np.arange(count), logits_mb=logits_mb)
            return logprobs.sum(), spread.sum()

        before = mx.get_active_memory()
        mx.clear_cache()
        mx.reset_peak_memory()
        mx.eval(nn.value_and_grad(model, loss)())
        return (mx.get_peak_memory() - before) / 2**20

    bounded, unbounded = peak(bound), peak(1000)
    assert unbounded > 34 and bounded < 18


@pytest.mark.parametrize("width", [151_936, 50_257, 10_007, 1], ids=str)  # primes too, whose last block is filled up
def test_sums_as_wide_as_a_vocabulary_are_float32s_own(width):
    wide = np.random.default_rng(0).normal(0, 3, (3, width)).astype(np.float32)
    exact = np.log(np.exp(wide.astype(np.float64)).sum(axis=-1))
    found, plain = (np.array(f(mx.array(wide)), np.float64) for f in (logsumexp, lambda x: mx.logsumexp(x, -1)))
    assert found.shape == (3,)
    np.testing.assert_allclose(found, exact, atol=1e-5)
    if width == 151_936 and mx.default_device() == mx.Device(mx.cpu):
        assert np.abs(plain - exact).max() > 1e-4  # what they are for


def test_a_wide_vocabularys_logprobs_and_slopes_are_exact_ones():
    draw = np.random.default_rng(0)
    states, weights = draw.normal(0, 1, (4, 8)), draw.normal(0, 1, (8, 151_936))
    targets = np.array([3, 70_000, 151_935, 0])
    weight = mx.array(weights.astype(np.float32))
    halves = Split(lambda ids: ids, lambda states: states @ weight, lambda: None, True)
    found, entropy = _frozen_chunk(halves, mx.array(states.astype(np.float32)), mx.array(targets), 0.8, True, True)
    wide = states.astype(np.float32).astype(np.float64) @ weights.astype(np.float32).astype(np.float64) / 0.8
    logs = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    probs, rows = np.exp(logs), np.arange(4)
    np.testing.assert_allclose(np.array(found[0]), logs[rows, targets], atol=1e-5)
    np.testing.assert_allclose(np.array(entropy[0]), -(probs * logs).sum(axis=-1), atol=2e-5)
    onehot = np.zeros_like(probs)
    onehot[rows, targets] = 1
    np.testing.assert_allclose(np.array(found[1]), (onehot - probs) @ weights.T / 0.8, atol=2e-5)
    slant = -probs * (logs - (probs * logs).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(np.array(entropy[1]), slant @ weights.T / 0.8, atol=1e-4)


def test_rows_per_chunk():
    assert rows_per_chunk(2**15, 1) == 8
    assert rows_per_chunk(2**18, 128) == 128
    assert rows_per_chunk(2**18, 0.1) == 1


# ---------------------------------------------------------------------------------- halves


def test_halves():
    model = make_model()
    assert split(model).trunk is model.model
    assert not split(model).frozen_head  # nothing is frozen before a training starts
    model.freeze()
    assert split(model).frozen_head
    untied = make_model(tie_word_embeddings=False)
    states = mx.random.normal((3, 64))
    assert mx.array_equal(split(untied).head(states), untied.lm_head(states))


def test_a_head_that_is_not_linear_is_left_whole():
    model = Capped(make_model(tie_word_embeddings=False))
    halves = split(model)
    assert halves.trunk is model
    logprobs, _ = token_logprobs(halves, mx.array(pad(rows())[0]), pad(rows())[1], logits_mb=SMALL)
    np.testing.assert_allclose(np.array(logprobs), in_float64(model)[0], atol=1e-4)


def test_dropout_hides_no_halves():
    model = make_model()
    adapters.start(model, AdapterConfig(rank=4, dropout=0.5))
    shake(model)
    model.train()
    assert split(model).frozen_head
    assert model.training and model.layers[0].self_attn.q_proj.dropout.training


def test_halves_follow_an_adapter_that_is_left_out():
    model = make_model(tie_word_embeddings=False)
    ids, positions = pad(rows())
    base, _ = token_logprobs(split(model), mx.array(ids), positions)
    model = trained(["lm_head", "self_attn.q_proj"], model=model)
    halves = split(model)
    adapted, _ = token_logprobs(halves, mx.array(ids), positions)
    with adapters.switched_off(model):
        without, _ = token_logprobs(halves, mx.array(ids), positions)
    assert mx.array_equal(without, base) and not mx.allclose(adapted, base, atol=0.1)


# ---------------------------------------------------------------------------------- layers computed twice


def gradient(model, ids, positions, wanted):
    halves = split(model)
    with checkpointed(model.layers, wanted):
        value, grads = nn.value_and_grad(model, lambda: token_logprobs(halves, mx.array(ids), positions)[0].sum())()
        mx.eval(value, grads)
    return value.item(), flat(grads)


@pytest.mark.parametrize("name", ["tied", "full", "dora", "trained 4-bit head"])
def test_checkpointed_layers_have_the_same_gradients(name):
    model = MODELS[name]()
    (value, grads), (again, others) = (gradient(model, *pad(rows()), wanted) for wanted in (False, True))
    assert value == again
    assert_same(others, grads, 1e-6)


def test_checkpointing_is_of_these_layers_and_ends():
    model, other = trained(), trained(seed=4)
    kind = type(model.layers[0])
    call = kind.__call__
    with pytest.raises(KeyError), checkpointed(model.layers[1:]):
        assert type(model.layers[1]) is not kind and type(model.layers[0]) is kind
        assert all(type(layer) is kind for layer in other.layers) and kind.__call__ is call
        raise KeyError
    assert all(type(layer) is kind for layer in (*model.layers, *other.layers)) and kind.__call__ is call


def test_checkpointed_layers_are_computed_twice(monkeypatch):
    model = trained()
    calls = []
    monkeypatch.setattr(type(model.layers[0].mlp), "__call__", counted(type(model.layers[0].mlp).__call__, calls))
    gradient(model, *pad(rows()), False)
    once = len(calls)
    gradient(model, *pad(rows()), True)
    assert (once - 4, len(calls) - once - 4) == (2, 4)  # splitting into halves calls each of two layers twice


def counted(call, calls):
    def counting(self, *args):
        calls.append(self)
        return call(self, *args)

    return counting


def test_checkpointed_layers_drop_the_same_twice():
    model = make_model()
    mx.random.seed(0)
    adapters.start(model, AdapterConfig(rank=4, dropout=0.5))
    shake(model)
    model.train()
    halves = split(model)
    ids, positions = pad(rows())

    def loss():
        return token_logprobs(halves, mx.array(ids), positions)[0].sum()

    with checkpointed(model.layers):
        mx.random.seed(3)
        _, grads = nn.value_and_grad(model, loss)()
        mx.eval(grads)
        slopes = {name: mx.array(array) for name, array in tree_flatten(grads)}
        squared = sum((array**2).sum().item() for array in slopes.values())
        at = {name: mx.array(array) for name, array in tree_flatten(model.trainable_parameters())}
        found = []
        for sign in (1, -1):
            step = sign * 1e-3 / math.sqrt(squared)
            moved = [(name, at[name] + step * slope) for name, slope in slopes.items()]
            model.load_weights(moved, strict=False)
            mx.random.seed(3)
            found.append(loss().item())
        mx.random.seed(4)
        other = loss().item()
    assert (found[0] - found[1]) / 2e-3 == pytest.approx(math.sqrt(squared), rel=0.01)
    assert abs(other - found[1]) > 0.1  # another seed drops others


def test_the_stream_goes_on_after_checkpointed_layers():
    model = make_model()
    adapters.start(model, AdapterConfig(rank=4, dropout=0.5))
    shake(model)
    model.train()
    with checkpointed(model.layers):
        mx.random.seed(3)
        values = [gradient_value(model) for _ in range(4)]
    assert len({round(value, 3) for value in values}) == 4  # a micro-batch drops others than the one before


def gradient_value(model):
    halves, (ids, positions) = (
        Split(model.model, model.model.embed_tokens.as_linear, lambda: None, True),
        pad(rows()),
    )
    value, grads = nn.value_and_grad(model, lambda: token_logprobs(halves, mx.array(ids), positions)[0].sum())()
    mx.eval(value, grads)
    return value.item()
