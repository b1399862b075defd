"""The anytime-valid test and interval: against the martingale written out, and exact null distributions."""

import math
from itertools import product

import numpy as np
import pytest

from mlx_traces.evaluation import anytime as module
from mlx_traces.evaluation import stats
from mlx_traces.evaluation.anytime import anytime, log_wealth


def differences(wins, losses, ties):
    return np.repeat([1.0, -1.0, 0.0], [wins, losses, ties])


def wealth(xs, mean):
    """The gambler's wealth, problem by problem and bet by bet."""
    bets = [(2 * k + 1) / 128 for k in range(64)]
    weights = [(1 - u * u) ** (module._SHAPE - 1) for u in bets]
    total = 0.0
    for u, weight in zip(bets, weights, strict=True):
        product_ = 1.0
        for x in xs:
            product_ *= 1 + u / (1 + abs(mean)) * (x - mean)
        total += weight / sum(weights) * product_
    return total


def test_the_wealth_is_that_of_betting_problem_by_problem():
    xs = [1, 0, -1, 1, 1, 0.5, 0]
    values, counts = np.unique(xs, return_counts=True)
    for mean in (-0.9, -0.2, 0.0, 0.3, 0.8):
        assert math.exp(log_wealth(values, counts, mean)) == pytest.approx(wealth(xs, mean))


def test_the_expected_wealth_is_one_at_the_true_mean_and_less_below_it():
    chances = {1: 0.3, 0: 0.6, -1: 0.1}

    def expected(mean):
        return sum(
            math.prod(chances[x] for x in xs) * math.exp(log_wealth(*np.unique(xs, return_counts=True), mean))
            for xs in product(chances, repeat=5)
        )

    assert expected(0.2) == pytest.approx(1.0)
    assert expected(0.25) < 1 < expected(0.1)


@pytest.mark.parametrize("counts", [(30, 10, 160), (7, 40, 100), (12, 0, 300), (5, 5, 20)])
def test_the_interval_leaves_out_what_the_test_rejects(counts):
    mean, low, high, p = anytime(differences(*counts))
    assert mean == pytest.approx((counts[0] - counts[1]) / sum(counts)) and -1 <= low < mean < high <= 1
    assert (p <= 0.05) == (not low <= 0 <= high)
    mirrored = anytime(-differences(*counts))
    assert mirrored == pytest.approx((-mean, -high, -low, p))
    x = differences(*counts)
    for edge, sign in ((low, 1), (high, -1)):
        values, seen = np.unique(sign * x, return_counts=True)
        assert log_wealth(values, seen, sign * edge) == pytest.approx(math.log(40), abs=1e-6)


def test_it_is_wider_than_a_test_that_looks_once():
    for counts in ((30, 10, 160), (60, 40, 900)):
        x = differences(*counts)
        _, low, high, p = anytime(x)
        _, once_low, once_high = stats.paired_bootstrap(x, np.zeros(len(x)))
        assert p > stats.mcnemar(*counts[:2]) and low < once_low < once_high < high


def chance_to_reject(problems, rejects):
    """Return the exact chance that a look after each of the discordant problems rejects equal models."""
    alive, rejected = {0: 1.0}, 0.0
    for m in range(1, problems + 1):
        following: dict[int, float] = {}
        for wins, chance in alive.items():
            for now in (wins, wins + 1):
                following[now] = following.get(now, 0.0) + chance / 2
        rejected += sum(following.pop(wins) for wins in [*following] if rejects(wins, m - wins))
        alive = following
    return rejected


def test_looking_after_every_problem_rejects_equal_models_too_seldom_to_matter():
    """The wealth of either side seldom reaches 40 within 400 discordant problems; the fixed test often rejects."""
    values, wall = np.array([-1.0, 1.0]), math.log(40)

    def rejects(wins, losses):
        return any(log_wealth(values, np.array(counts), 0.0) >= wall for counts in ((losses, wins), (wins, losses)))

    assert 0.01 < chance_to_reject(400, rejects) < 0.05
    assert chance_to_reject(100, lambda wins, losses: stats.mcnemar(wins, losses) <= 0.05) > 0.15


@pytest.mark.parametrize("bad", [[], [2.0], [math.nan], [[1.0]]])
def test_it_takes_differences_only(bad):
    with pytest.raises(ValueError, match="differences from -1 to 1"):
        anytime(bad)
