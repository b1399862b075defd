"""Policy-gradient functions against token-by-token formulas in float64, finite differences and an enumerated bandit."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_traces.errors import UserError
from mlx_traces.rl.losses import (
    KINDS,
    SCALES,
    explained_variance,
    gae,
    group_advantages,
    kl_k3,
    kl_sampler,
    overlong_penalty,
    policy_loss,
    reinforce_advantages,
    rloo_advantages,
    sampler_weights,
    token_weights,
    value_loss,
    whiten,
)

LENGTHS = (7, 3, 5, 1, 6, 4)
CUT = 4  # the row that was truncated and is masked out
LOW, HIGH = 0.2, 0.28
CLIPPED = ("grpo", "dr_grpo", "dapo", "gspo")


class Batch:
    """Six completions of unequal lengths, one of them truncated and one with a hole; padding holds poison."""

    def __init__(self, poison=1e4, seed=3):
        random = np.random.default_rng(seed)
        shape = (len(LENGTHS), max(LENGTHS))
        self.mask = np.arange(shape[1]) < np.array(LENGTHS)[:, None]
        self.mask[CUT] = False
        self.mask[0, 2] = False
        self.old = random.uniform(-3, -0.2, shape)
        self.new = self.old + random.normal(0.05, 0.35, shape)
        self.ref = self.new + random.normal(0, 0.5, shape)
        self.importance = random.uniform(0.2, 2, shape)
        self.advantages = random.normal(0, 1, shape[0])
        for array in (self.old, self.new, self.ref, self.importance):
            array[~self.mask] = poison * random.choice([-1, 1], (~self.mask).sum())

    def take(self, rows, width=None):
        """Return the rows, in this order, padded or cut to a width."""
        other = Batch.__new__(Batch)
        for name, array in vars(self).items():
            array = array[rows]
            if width and array.ndim == 2:
                fill = np.zeros((len(array), max(0, width - array.shape[1])), array.dtype)
                array = np.concatenate([array, fill if array.dtype == bool else fill + 777], axis=1)[:, :width]
            setattr(other, name, array)
        return other


def weights_of(batch, kind, **options):
    return token_weights(mx.array(batch.mask), kind, max_tokens=9, **options)


def loss_of(batch, kind, weights=None, new=None, **options):
    """Return (loss, metrics) of the package."""
    arrays = [mx.array(a, mx.float32) for a in (batch.new, batch.old, batch.advantages)]
    if new is not None:
        arrays[0] = new
    for name, array in options.items():
        if isinstance(array, np.ndarray):
            options[name] = mx.array(array, mx.float32)
    weights = weights_of(batch, kind) if weights is None else weights
    options = {"clip_eps": LOW, "clip_eps_high": HIGH, **options}
    return policy_loss(*arrays, mx.array(batch.mask), weights, kind=kind, **options)


def gradient_of(batch, kind, weights=None, **options):
    new = mx.array(batch.new, mx.float32)
    return np.array(mx.grad(lambda x: loss_of(batch, kind, weights, x, **options)[0])(new))


def reference(batch, kind, new=None, kl_coef=0.0, unbiased_kl=False, importance=False, weigh=None):
    """Return the loss of a step, written out token by token in float64; the ratio of cispo stays that of the batch."""
    new = batch.new if new is None else new
    total = 0.0
    for i in range(len(new)):
        tokens = [t for t in range(new.shape[1]) if batch.mask[i, t]]
        advantage, row = batch.advantages[i], 0.0
        for t in tokens:
            ratio = math.exp(new[i, t] - batch.old[i, t])
            if kind == "gspo":
                ratio = math.exp(sum(new[i, u] - batch.old[i, u] for u in tokens) / len(tokens))
            if kind == "reinforce":
                loss = -advantage * new[i, t]
            elif kind == "cispo":
                loss = -min(math.exp(batch.new[i, t] - batch.old[i, t]), 1 + HIGH) * advantage * new[i, t]
            else:
                loss = -min(ratio * advantage, min(max(ratio, 1 - LOW), 1 + HIGH) * advantage)
            if importance:
                loss *= batch.importance[i, t]
            if kl_coef:
                inverse = math.exp(batch.ref[i, t] - new[i, t])
                loss += kl_coef * (inverse - 1 - math.log(inverse)) * (ratio if unbiased_kl else 1)
            row += loss
        if kind in ("grpo", "gspo"):
            total += row / max(1, len(tokens)) / len(new)
        elif kind == "dr_grpo":
            total += row / (len(new) * 9)
        elif kind == "reinforce":
            total += row / len(new)
        else:
            total += row / batch.mask.sum()
    return total


def test_the_batch_reaches_both_bounds_a_truncated_row_and_unequal_lengths():
    batch = Batch()
    ratio = np.exp(np.where(batch.mask, batch.new - batch.old, 0))
    advantages = batch.advantages[:, None]
    assert ((ratio < 1 - LOW) & (advantages < 0)).any() and ((ratio > 1 + HIGH) & (advantages > 0)).any()
    assert ((ratio < 1 - LOW) & (advantages > 0)).any() and ((ratio > 1 + HIGH) & (advantages < 0)).any()
    assert not batch.mask[CUT].any() and len(set(batch.mask.sum(axis=1))) > 3


VARIANTS = [
    {},
    {"kl_coef": 0.3},
    {"kl_coef": 0.3, "unbiased_kl": True},
    {"importance": True},
    {"importance": True, "kl_coef": 0.3},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_loss_and_gradient_are_the_formula_token_by_token(kind, variant):
    batch = Batch()
    options = {"ref_logprobs": batch.ref} | variant
    if "importance" in variant:
        options["importance"] = batch.importance
    assert float(loss_of(batch, kind, **options)[0]) == pytest.approx(reference(batch, kind, **variant), abs=2e-6)
    expected, step = np.zeros(batch.new.shape), 1e-6
    for cell in zip(*np.nonzero(batch.mask), strict=True):
        nudge = np.zeros(batch.new.shape)
        nudge[cell] = step
        up = reference(batch, kind, batch.new + nudge, **variant)
        expected[cell] = (up - reference(batch, kind, batch.new - nudge, **variant)) / (2 * step)
    np.testing.assert_allclose(gradient_of(batch, kind, **options), expected, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_the_padding_is_never_read(kind):
    clean = Batch(poison=0)
    for poison in (1e4, math.inf, math.nan):
        dirty = Batch(poison)
        options = {"kl_coef": 0.1, "unbiased_kl": True}
        pair = [(loss_of(b, kind, ref_logprobs=b.ref, importance=b.importance, **options), b) for b in (clean, dirty)]
        (loss, metrics), (other, others) = pair[0][0], pair[1][0]
        assert float(loss) == float(other)
        assert {k: float(v) for k, v in metrics.items()} == {k: float(v) for k, v in others.items()}
        gradients = [
            gradient_of(b, kind, ref_logprobs=b.ref, importance=b.importance, **options) for b in (clean, dirty)
        ]
        np.testing.assert_array_equal(*gradients)
        assert (gradients[1][~dirty.mask] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(3, 3), (1, 2, 3), (1,) * 6])
def test_micro_batches_add_up_to_the_step(kind, sizes):
    batch = Batch()
    weights = weights_of(batch, kind)
    whole, metrics = loss_of(batch, kind, weights, ref_logprobs=batch.ref, kl_coef=0.1)
    gradient = gradient_of(batch, kind, weights, ref_logprobs=batch.ref, kl_coef=0.1)
    loss, sums, start = 0.0, dict.fromkeys(metrics, 0.0), 0
    for size in sizes:
        rows = list(range(start, start + size))
        part = batch.take(rows, width=max(LENGTHS[row] for row in rows))  # as narrow as its rows allow
        mine = weights[start : start + size, : part.mask.shape[1]]
        value, parts = loss_of(part, kind, mine, ref_logprobs=part.ref, kl_coef=0.1)
        loss += float(value)
        sums = {name: sums[name] + float(parts[name]) for name in sums}
        mine_gradient = gradient_of(part, kind, mine, ref_logprobs=part.ref, kl_coef=0.1)
        np.testing.assert_allclose(mine_gradient, gradient[rows, : part.mask.shape[1]], atol=1e-6)
        start += size
    assert loss == pytest.approx(float(whole), abs=1e-5)
    assert sums == pytest.approx({name: float(value) for name, value in metrics.items()}, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_row_order_and_padding_do_not_matter(kind):
    batch, order = Batch(), [4, 2, 5, 0, 3, 1]
    turned = batch.take(order, width=12)
    assert float(loss_of(turned, kind)[0]) == pytest.approx(float(loss_of(batch, kind)[0]), abs=1e-6)
    gradient = gradient_of(turned, kind)
    np.testing.assert_allclose(gradient[:, :7], gradient_of(batch, kind)[order], atol=1e-7)
    assert (gradient[:, 7:] == 0).all()


def test_swapping_the_two_rewards_of_a_group_flips_the_update():
    batch = Batch()
    batch.new = batch.old.copy()
    for kind in KINDS:
        gradients = []
        for rewards in ([[1.0, 0.0]], [[0.0, 1.0]]):
            batch.advantages = np.array(group_advantages(mx.array(rewards * 3))).reshape(-1)
            gradients.append(gradient_of(batch, kind))
        np.testing.assert_allclose(gradients[0], -gradients[1], atol=1e-7)
        assert np.abs(gradients[0]).max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_give_no_gradient_at_all(kind):
    batch = Batch()
    batch.advantages = np.array(group_advantages(mx.full((2, 3), 0.1))).reshape(-1)
    assert (gradient_of(batch, kind) == 0).all()


def test_the_first_update_has_the_whole_gradient():
    """At a ratio of 1 both sides of the minimum are equal; the gradient is that of -A log p, not half of it."""
    batch = Batch()
    batch.new = batch.old.copy()
    plain = gradient_of(batch, "reinforce", weights_of(batch, "dapo"))
    for kind in ("grpo", "dr_grpo", "dapo", "cispo"):
        np.testing.assert_allclose(gradient_of(batch, kind, weights_of(batch, "dapo")), plain, atol=1e-7)


def test_kinds_differ_where_their_definitions_do():
    batch = Batch()
    losses = {kind: float(loss_of(batch, kind)[0]) for kind in KINDS}
    ordered = sorted(losses.values())
    assert min(np.diff(ordered)) > 1e-3
    even = batch.take([1, 1, 1])
    even.advantages = np.array([0.5, -1.0, 2.0])
    assert float(loss_of(even, "grpo")[0]) == pytest.approx(float(loss_of(even, "dapo")[0]), abs=1e-6)


def test_weights_by_hand():
    mask = mx.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]])
    expected = {
        "grpo": [1 / 8, 1 / 4, 0, 1 / 12],
        "gspo": [1 / 8, 1 / 4, 0, 1 / 12],
        "dr_grpo": [1 / 20, 1 / 20, 0, 1 / 20],
        "dapo": [1 / 6, 1 / 6, 0, 1 / 6],
        "cispo": [1 / 6, 1 / 6, 0, 1 / 6],
        "reinforce": [1 / 4, 1 / 4, 0, 1 / 4],
    }
    assert set(expected) == set(KINDS)
    for kind, rows in expected.items():
        weights = token_weights(mask, kind, max_tokens=5)
        np.testing.assert_allclose(weights, np.array(rows)[:, None] * np.array(mask), atol=1e-7)
        nothing = token_weights(mx.zeros((2, 3)), kind, max_tokens=5)
        assert (np.array(nothing) == 0).all()


def test_metrics_are_counted_token_by_token():
    batch = Batch()
    ratio = np.exp(np.where(batch.mask, batch.new - batch.old, 0))
    advantages = batch.advantages[:, None]
    low = batch.mask & (ratio < 1 - LOW) & (advantages < 0)
    high = batch.mask & (ratio > 1 + HIGH) & (advantages > 0)
    expected = {
        "tokens": batch.mask.sum(),
        "ratios": batch.mask.sum(),
        "ratio": ratio[batch.mask].sum(),
        "clip_low": low.sum(),
        "clip_high": high.sum(),
        "clip": (low | high).sum(),
        "kl_old": (ratio - 1 - np.log(ratio))[batch.mask].sum(),
    }
    for kind in ("grpo", "dr_grpo", "dapo"):
        metrics = loss_of(batch, kind)[1]
        assert {k: float(v) for k, v in metrics.items()} == pytest.approx(expected, rel=1e-5)
    cispo = {**expected, "clip_low": 0, "clip": high.sum()}
    assert {k: float(v) for k, v in loss_of(batch, "cispo")[1].items()} == pytest.approx(cispo, rel=1e-5)
    none = {**expected, "clip_low": 0, "clip_high": 0, "clip": 0}
    assert {k: float(v) for k, v in loss_of(batch, "reinforce")[1].items()} == pytest.approx(none, rel=1e-5)


def test_metrics_of_gspo_are_counted_row_by_row():
    batch = Batch()
    batch.new += np.where(batch.advantages > 0, 0.4, -0.4)[:, None]
    rows = [i for i in range(6) if batch.mask[i].any()]
    ratio = np.array([math.exp((batch.new - batch.old)[i][batch.mask[i]].mean()) for i in rows])
    low = (ratio < 1 - LOW) & (batch.advantages[rows] < 0)
    high = (ratio > 1 + HIGH) & (batch.advantages[rows] > 0)
    assert low.any() and high.any() and len(rows) == 5
    metrics = {k: float(v) for k, v in loss_of(batch, "gspo")[1].items()}
    assert metrics["ratios"] == 5 and metrics["tokens"] == batch.mask.sum()
    assert metrics["ratio"] == pytest.approx(ratio.sum(), rel=1e-5)
    assert (metrics["clip_low"], metrics["clip_high"], metrics["clip"]) == (low.sum(), high.sum(), (low | high).sum())


def test_kl_is_zero_with_zero_gradient_at_the_reference():
    logprobs = mx.array(np.random.default_rng(0).uniform(-20, 0, 50).astype(np.float32))
    assert (np.array(kl_k3(logprobs, logprobs)) == 0).all()
    assert (np.array(mx.grad(lambda x: kl_k3(x, logprobs).sum())(logprobs)) == 0).all()


def test_kl_is_the_formula_and_unbiased():
    random = np.random.default_rng(1)
    new, ref = random.uniform(-5, 0, 100), random.uniform(-5, 0, 100)
    expected = np.exp(ref - new) - 1 - (ref - new)
    np.testing.assert_allclose(kl_k3(mx.array(new), mx.array(ref)), expected, rtol=1e-5, atol=1e-6)
    close = new + 1e-3 * random.normal(size=100)
    seen = np.float32(close).astype(float) - np.float32(new)
    near = np.array(kl_k3(mx.array(new), mx.array(close)))
    np.testing.assert_allclose(near, np.expm1(seen) - seen, atol=1e-9)
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    mean = (p * np.array(kl_k3(mx.array(np.log(p)), mx.array(np.log(q))))).sum()
    assert mean == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)


def test_far_ratios_stay_finite_for_either_sign():
    for kind in KINDS:
        for gap in (-500.0, 500.0):
            batch = Batch()
            batch.new = batch.old + gap
            options = {"ref_logprobs": batch.old, "kl_coef": 0.1, "unbiased_kl": True}
            assert np.isfinite(float(loss_of(batch, kind, **options)[0]))
            assert np.isfinite(gradient_of(batch, kind, **options)).all()


def test_advantages_of_each_token_and_bfloat16_are_taken():
    batch = Batch()
    row = loss_of(batch, "dapo")[0]
    batch.advantages = np.where(batch.mask, batch.advantages[:, None], np.nan)
    assert float(loss_of(batch, "dapo")[0]) == pytest.approx(float(row), abs=1e-6)
    half = loss_of(batch, "dapo", new=mx.array(batch.new, mx.bfloat16))[0]
    assert half.dtype == mx.float32 and float(half) == pytest.approx(float(row), abs=0.05)


def test_only_the_policys_own_log_probabilities_get_a_gradient():
    batch = Batch()
    mask, weights = mx.array(batch.mask), weights_of(batch, "grpo")

    def loss(old, ref, importance, kind):
        new, advantages = mx.array(batch.new, mx.float32), mx.array(batch.advantages, mx.float32)
        options = {"ref_logprobs": ref, "importance": importance, "kl_coef": 0.1, "unbiased_kl": True}
        return policy_loss(new, old, advantages, mask, weights, kind=kind, **options)[0]

    arrays = [mx.array(a, mx.float32) for a in (batch.old, batch.ref, batch.importance)]
    for kind in KINDS:
        for gradient in mx.grad(loss, argnums=(0, 1, 2))(*arrays, kind):
            assert (np.array(gradient) == 0).all()


def test_group_advantages():
    rewards = np.array([[1.0, 0.0, 0.5, 2.0], [0.1, 0.1, 0.1, 0.1], [100.0, 101.0, 100.5, 99.0]])
    assert np.ptp(rewards[1]) == 0
    for scale in SCALES:
        expected = np.zeros(rewards.shape)
        for i, group in enumerate(rewards):
            sample = {"std": group, "batch": rewards.reshape(-1), "none": None}[scale]
            spread = 1.0
            if sample is not None:
                mean = sum(sample) / len(sample)
                spread = math.sqrt(sum((r - mean) ** 2 for r in sample) / (len(sample) - 1)) + 1e-4
            for j, reward in enumerate(group):
                expected[i, j] = (reward - sum(group) / 4) / spread
        found = np.array(group_advantages(mx.array(rewards), scale))
        np.testing.assert_allclose(found, expected, atol=2e-5)
        assert (found[1] == 0).all()


def test_equal_groups_are_exactly_zero_whatever_their_reward():
    for value in np.random.default_rng(0).normal(0, 10, 50).astype(np.float32):
        for size in (2, 3, 5, 7):
            rewards = mx.full((1, size), float(value))
            for advantages in (group_advantages(rewards), rloo_advantages(rewards)):
                assert (np.array(advantages) == 0).all()


def test_rloo_and_reinforce_advantages():
    rewards = np.random.default_rng(2).normal(size=(3, 4))
    expected = [[r - (sum(group) - r) / 3 for r in group] for group in rewards]
    np.testing.assert_allclose(rloo_advantages(mx.array(rewards)), expected, atol=1e-6)
    np.testing.assert_allclose(reinforce_advantages(mx.array(rewards)), rewards - rewards.mean(), atol=1e-6)
    np.testing.assert_allclose(reinforce_advantages(mx.array(rewards), False), rewards, atol=1e-6)


def test_what_is_refused():
    for rewards in (mx.zeros((3, 1)), mx.zeros((4,))):
        for advantages in (group_advantages, rloo_advantages):
            with pytest.raises(ValueError, match="at least 2"):
                advantages(rewards)
    batch = Batch()
    mask = mx.array(batch.mask)
    with pytest.raises(UserError, match="choose std"):
        group_advantages(mx.zeros((1, 2)), "group")
    with pytest.raises(UserError, match="did you mean 'grpo'"):
        token_weights(mask, "gropo")
    with pytest.raises(UserError, match="unknown loss"):
        loss_of(batch, "ppo", weights_of(batch, "dapo"))
    with pytest.raises(UserError, match="token or sequence"):
        sampler_weights(mask, mask, mask, level="row")
    with pytest.raises(ValueError, match="max_tokens"):
        token_weights(mask, "dr_grpo")
    with pytest.raises(ValueError, match="ref_logprobs"):
        loss_of(batch, "grpo", kl_coef=0.1)
    with pytest.raises(ValueError, match="does not fit"):
        overlong_penalty(mx.array([1]), 10, 11)


def test_overlong_penalty():
    lengths = mx.array([0, 15, 16, 18, 20, 21, 500])
    assert overlong_penalty(lengths, 20, 4).tolist() == [0, 0, 0, -0.5, -1, -1, -1]
    assert overlong_penalty(lengths, 20, 0).tolist() == [0, 0, 0, 0, 0, -1, -1]


def test_sampler_weights():
    batch = Batch()
    trainer, sampler, mask = mx.array(batch.new), mx.array(batch.old), mx.array(batch.mask)
    cap, seen = 1.2, set()
    for level in ("token", "sequence"):
        for drop in (False, True):
            found = np.array(sampler_weights(trainer, sampler, mask, cap=cap, level=level, drop=drop))
            for i, t in np.ndindex(*batch.mask.shape):
                gaps = [batch.new[i, u] - batch.old[i, u] for u in range(7) if batch.mask[i, u]]
                expected = math.exp(sum(gaps) if level == "sequence" else 0)
                if level == "token" and batch.mask[i, t]:
                    expected = math.exp(batch.new[i, t] - batch.old[i, t])
                seen.add((level, drop, expected > cap))
                if expected > cap:
                    expected = 0 if drop else cap
                assert found[i, t] == pytest.approx(expected if batch.mask[i, t] else 0, rel=1e-5)
    assert len(seen) == 8
    kept = (batch.new - batch.old)[batch.mask]
    found = kl_sampler(trainer, sampler, mask)
    assert float(found) == pytest.approx((np.exp(kept) - 1 - kept).sum(), rel=1e-5)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.97, 0.0), (1.0, 1.0)])
def test_gae_is_the_discounted_sum_of_errors(gamma, lam):
    random, batch = np.random.default_rng(5), Batch()
    rewards, values = random.normal(size=(2, 6, 7))
    poisoned = [np.where(batch.mask, array, np.nan) for array in (rewards, values)]
    advantages, returns = gae(*map(mx.array, poisoned), mx.array(batch.mask), gamma=gamma, lam=lam)
    expected = np.zeros((6, 7))
    for i in range(6):
        tokens = np.flatnonzero(batch.mask[i])
        for at, t in enumerate(tokens):
            for ahead, u in enumerate(tokens[at:]):
                following = values[i, tokens[at + ahead + 1]] if at + ahead + 1 < len(tokens) else 0.0
                expected[i, t] += (gamma * lam) ** ahead * (rewards[i, u] + gamma * following - values[i, u])
    np.testing.assert_allclose(advantages, expected, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(batch.mask, expected + values, 0), atol=1e-5)
    if lam == 1:
        for i in range(6):
            tokens = np.flatnonzero(batch.mask[i])
            np.testing.assert_allclose(np.array(returns)[i, tokens], rewards[i, tokens][::-1].cumsum()[::-1], atol=1e-5)


def test_whiten():
    batch, x = Batch(), np.random.default_rng(6).normal(3, 2, (6, 7))
    kept = x[batch.mask]
    poisoned = mx.array(np.where(batch.mask, x, np.inf))
    expected = np.where(batch.mask, (x - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8), 0)
    mask = mx.array(batch.mask)
    np.testing.assert_allclose(whiten(poisoned, mask), expected, atol=1e-5)
    expected = np.where(batch.mask, expected + kept.mean(), 0)
    np.testing.assert_allclose(whiten(poisoned, mask, shift=False), expected, atol=1e-5)
    assert (np.array(whiten(mx.array([2.0, 5.0]), mx.array([True, False]))) == 0).all()
    assert (np.array(whiten(mx.full((4,), 2.0), mx.ones((4,)))) == 0).all()


def test_value_loss_and_its_gradient():
    batch, random = Batch(), np.random.default_rng(7)
    old = random.normal(size=(6, 7))
    values, returns = old + random.normal(0, 0.4, (6, 7)), old + random.normal(0, 1, (6, 7))
    weights, mask = weights_of(batch, "dapo"), mx.array(batch.mask)

    def token(value, i, t):
        held = min(max(value, old[i, t] - 0.2), old[i, t] + 0.2)
        return 0.5 * max((value - returns[i, t]) ** 2, (held - returns[i, t]) ** 2) / batch.mask.sum()

    cells = list(zip(*np.nonzero(batch.mask), strict=True))
    expected, clipped = np.zeros((6, 7)), 0
    for i, t in cells:
        held = np.clip(values[i, t], old[i, t] - 0.2, old[i, t] + 0.2)
        clipped += abs(held - returns[i, t]) > abs(values[i, t] - returns[i, t])
        expected[i, t] = (token(values[i, t] + 1e-6, i, t) - token(values[i, t] - 1e-6, i, t)) / 2e-6
    assert 3 < clipped < len(cells) - 3
    poisoned = [mx.array(np.where(batch.mask, array, 1e4)) for array in (values, old, returns)]
    loss, metrics = value_loss(*poisoned, mask, weights)
    assert float(loss) == pytest.approx(sum(token(values[i, t], i, t) for i, t in cells), rel=1e-5)
    assert float(metrics["value_clip"]) == clipped and float(metrics["tokens"]) == len(cells)
    assert float(metrics["value_error"]) == pytest.approx(np.square(values - returns)[batch.mask].sum(), rel=1e-5)
    gradient = mx.grad(lambda v: value_loss(v, *poisoned[1:], mask, weights)[0])(poisoned[0])
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_explained_variance():
    batch, random = Batch(), np.random.default_rng(8)
    values, returns = random.normal(size=(2, 6, 7))
    mask = mx.array(batch.mask)
    poisoned = [mx.array(np.where(batch.mask, array, np.nan)) for array in (values, returns)]
    expected = 1 - np.var((returns - values)[batch.mask]) / np.var(returns[batch.mask])
    assert float(explained_variance(*poisoned, mask)) == pytest.approx(expected, rel=1e-5)
    assert float(explained_variance(poisoned[1] + 3, poisoned[1], mask)) == pytest.approx(1, abs=1e-5)
    assert not np.isfinite(float(explained_variance(poisoned[0], mx.ones((6, 7)), mask)))


def test_targets_and_sampler_weights_carry_no_gradient():
    batch = Batch()
    mask, weights = mx.array(batch.mask), weights_of(batch, "dapo")
    new, old, ref = (mx.array(array) for array in (batch.new, batch.old, batch.ref))
    functions = [
        lambda x: sampler_weights(x, old, mask).sum(),
        lambda x: sampler_weights(old, x, mask).sum(),
        lambda x: gae(new, x, mask)[0].sum(),
        lambda x: gae(new, x, mask)[1].sum(),
        lambda x: value_loss(new, x, old, mask, weights)[0],
        lambda x: value_loss(new, old, x, mask, weights)[0],
    ]
    for function in functions:
        assert (np.array(mx.grad(function)(ref)) == 0).all()


BATCHES, GROUPS, SIZE = 300, 16, 4


class Bandit:
    """Completions of one or two tokens out of three, token 0 ends one; a softmax table is the policy."""

    def __init__(self):
        random = np.random.default_rng(11)
        self.table = random.normal(0, 0.7, (4, 3))  # row 0: the first token; row 1 + first: the second
        self.rewards = random.normal(0, 1, (3, 3))  # of (first, second); a completion that ends has second 0
        self.p = np.exp(self.table) / np.exp(self.table).sum(axis=1, keepdims=True)

    def exact(self):
        """Return the gradient of the expected reward with respect to the table, by enumeration."""
        gradient = np.zeros((4, 3))
        for first in range(3):
            for second in range(3 if first else 1):
                chance = self.p[0, first] * (self.p[1 + first, second] if first else 1)
                score = np.zeros((4, 3))
                score[0] = np.eye(3)[first] - self.p[0]
                if first:
                    score[1 + first] = np.eye(3)[second] - self.p[1 + first]
                gradient += chance * self.rewards[first, second] * score
        return gradient

    def sampled(self, kind="reinforce", sign=1.0, masked=True):
        """Return (BATCHES, 4, 3) ascent directions of independent batches, with a leave-one-out baseline."""
        random, rows = np.random.default_rng(12), GROUPS * SIZE
        mixed = mx.array(self.table.astype(np.float32))
        gradients = []
        for _ in range(BATCHES):
            first = random.choice(3, rows, p=self.p[0])
            second = np.array([random.choice(3, p=self.p[1 + f]) if f else 1 for f in first])
            rewards = self.rewards[first, np.where(first == 0, 0, second)].reshape(GROUPS, SIZE)
            advantages = sign * rloo_advantages(mx.array(rewards)).reshape(-1)
            mask = np.stack([np.ones(rows), (first > 0) | (not masked)], axis=1)
            states, tokens = np.stack([0 * first, 1 + first], axis=1), np.stack([first, second], axis=1)
            gradients.append(-np.array(self._step(mixed, states, tokens, advantages, mx.array(mask), kind)))
        return np.array(gradients)

    @staticmethod
    def _step(table, states, tokens, advantages, mask, kind):
        def loss(table):
            rows = table - mx.logsumexp(table, axis=1, keepdims=True)
            logprobs = mx.take_along_axis(rows[mx.array(states)], mx.array(tokens)[..., None], axis=-1)[..., 0]
            weights = token_weights(mask, kind)
            old = mx.stop_gradient(logprobs)
            return policy_loss(logprobs, old, advantages, mask, weights, kind=kind)[0]

        return mx.grad(loss)(table)

    def deviation(self, **fault):
        """Return the largest distance of the mean direction from the exact one, in standard errors."""
        sampled = self.sampled(**fault)
        error = sampled.std(axis=0, ddof=1) / math.sqrt(BATCHES)
        return (np.abs(sampled.mean(axis=0) - self.exact()) / (error + 1e-7)).max()


def test_the_sampled_gradient_is_the_exact_one():
    assert np.abs(Bandit().exact()).max() > 0.05
    assert Bandit().deviation() < 4


@pytest.mark.parametrize("fault", [{"sign": -1.0}, {"masked": False}, {"kind": "grpo"}], ids=str)
def test_a_planted_fault_is_caught(fault):
    assert Bandit().deviation(**fault) > 10
