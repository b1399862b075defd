"""Statistics against scipy, closed forms, exhaustive enumeration and simulation."""

import itertools
import math
import time
import tracemalloc

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_traces.evaluation import stats


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("total", [1, 7, 64, 1319, 100_000])
def test_wilson_is_scipys(total, level):
    for correct in {0, 1, total // 3, total - 1, total}:
        expected = scipy.stats.binomtest(correct, total).proportion_ci(level, method="wilson")
        assert stats.wilson(correct, total, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_the_known_gsm8k_result():
    assert [round(100 * bound, 1) for bound in stats.wilson(410, 1319)] == [28.6, 33.6]


def test_wilson_stays_within_zero_and_one():
    for total in range(1, 200):
        low, high = stats.wilson(0, total)[0], stats.wilson(total, total)[1]
        assert (low, high) == (0.0, 1.0)


@pytest.mark.parametrize(("correct", "total"), [(1, 0), (0, 0), (-1, 5), (6, 5), (math.nan, 5)])
def test_wilson_refuses_what_is_no_share(correct, total):
    with pytest.raises(ValueError, match="not a share"):
        stats.wilson(correct, total)


def test_wilson_clustered_with_one_sample_is_wilson():
    for correct in (0, 1, 9, 20):
        outcomes = [1] * correct + [0] * (20 - correct)
        assert stats.wilson_clustered(outcomes, 1) == pytest.approx(stats.wilson(correct, 20))


def test_wilson_clustered_counts_alike_samples_once_and_independent_ones_fully():
    assert stats.wilson_clustered([8, 8, 0, 0, 0], 8) == pytest.approx(stats.wilson(2, 5))
    assert stats.wilson_clustered([4, 4, 4, 4, 4], 8) == pytest.approx(stats.wilson(20, 40))
    assert stats.wilson_clustered([0, 0, 0], 8) == pytest.approx(stats.wilson(0, 3))
    assert stats.wilson_clustered([8, 8, 8], 8) == pytest.approx(stats.wilson(3, 3))


def test_wilson_clustered_divides_n_by_the_design_effect():
    counts = np.array([4, 1, 0, 2, 2])
    share = counts.sum() / 20
    effective = share * (1 - share) / (np.var(counts / 4, ddof=1) / 5)
    assert 5 < effective < 20
    assert stats.wilson_clustered(counts, 4) == pytest.approx(stats.wilson(share * effective, effective))


def test_wilson_clustered_covers_and_wilson_on_samples_does_not():
    rng = np.random.default_rng(0)
    covered, naive, runs = 0, 0, 1000
    for _ in range(runs):
        correct = rng.binomial(8, rng.beta(0.6, 1.4, size=100))  # true accuracy 0.3
        low, high = stats.wilson_clustered(correct, 8)
        covered += low <= 0.3 <= high
        low, high = stats.wilson(correct.sum(), 800)
        naive += low <= 0.3 <= high
    assert 0.925 < covered / runs < 0.975
    assert naive / runs < 0.8


def test_accuracy_counts_samples_also_where_problems_have_uneven_numbers():
    result = stats.accuracy([[True, False], [True], [False, False, False]])
    assert (result["accuracy"], result["correct_count"], result["total_questions"]) == (2 / 6, 2, 6)
    assert 0 < result["ci_low"] < 1 / 3 < result["ci_high"] < 1
    with pytest.raises(ValueError, match="no samples"):
        stats.accuracy([])


def test_mcnemar_is_scipys_exact_sign_test():
    for wins, losses in itertools.product([0, 1, 2, 5, 17, 40, 300], repeat=2):
        expected = scipy.stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        assert stats.mcnemar(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_many_pairs():
    assert stats.mcnemar(1000, 0) == 2.0**-999
    assert stats.mcnemar(5000, 5000) == 1.0


def enumerated_sign_flip(values):
    observed = abs(sum(values))
    signs = itertools.product([1, -1], repeat=len(values))
    sums = [abs(sum(s * v for s, v in zip(row, values, strict=True))) for row in signs]
    return sum(total >= observed for total in sums) / len(sums)


@settings(max_examples=150)
@given(st.lists(st.integers(-6, 6), min_size=1, max_size=9))
def test_sign_flip_is_the_enumeration_of_all_signs(values):
    assert stats.sign_flip(values) == pytest.approx(enumerated_sign_flip(values), abs=1e-12)


def test_sign_flip_with_one_sample_is_mcnemar():
    for wins, losses, ties in [(0, 0, 9), (1, 0, 3), (7, 2, 0), (30, 55, 400), (400, 300, 619)]:
        values = [1] * wins + [-1] * losses + [0] * ties
        assert stats.sign_flip(values) == pytest.approx(stats.mcnemar(wins, losses), rel=1e-9)


def test_sign_flip_does_not_depend_on_the_unit_or_the_order():
    values = np.random.default_rng(0).integers(-8, 9, 200)
    p = stats.sign_flip(values)
    assert 0 < p < 1
    assert stats.sign_flip(7 * values) == p
    assert stats.sign_flip(-values[::-1]) == pytest.approx(p)


def test_sign_flip_refuses_shares():
    with pytest.raises(ValueError, match="integer"):
        stats.sign_flip([0.5, -0.25])


def test_sign_flip_rejects_as_often_as_it_says():
    rng = np.random.default_rng(1)
    ps = []
    for _ in range(1000):
        chance = rng.beta(0.5, 0.5, size=60)  # both models alike, problems very unlike
        ps.append(stats.sign_flip(rng.binomial(4, chance) - rng.binomial(4, chance)))
    assert 0.03 < np.mean(np.array(ps) <= 0.05) < 0.065


def test_sign_flip_of_reals_is_scipys_permutation_test_and_sign_flip_on_integers():
    rng = np.random.default_rng(3)
    for size in (9, 13):
        values = rng.normal(0.4, 1, size)
        expected = scipy.stats.permutation_test(
            (values, np.zeros(size)), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=np.inf
        ).pvalue
        assert stats.sign_flip_of_reals(values) == pytest.approx(expected, abs=0.003)  # rounded to a 32,768th
    values = rng.integers(-3, 4, 60)
    assert stats.sign_flip_of_reals(values / 128) == pytest.approx(stats.sign_flip(values), rel=0.02)
    assert stats.sign_flip_of_reals([0.0, 1e-17, -1e-16]) == 1.0  # what rounding leaves is no difference
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "_UNITS", 8)  # fewer than differences: none is lost in rounding
        assert stats.sign_flip_of_reals(np.ones(20)) == 2 * 0.5**20
    one_sided = stats.sign_flip_of_reals(rng.random(40) + 0.1)
    assert one_sided == pytest.approx(2 * 0.5**40, rel=1e-9)


def test_sign_flip_of_reals_is_fast_and_rejects_as_often_as_it_says():
    rng = np.random.default_rng(4)
    ps = [stats.sign_flip_of_reals(rng.standard_t(3, 40)) for _ in range(400)]
    assert np.mean(np.array(ps) <= 0.05) == pytest.approx(0.05, abs=0.025)
    values, start = rng.normal(size=3000), time.process_time()
    stats.sign_flip_of_reals(values)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("samples", [1, 4])
def test_paired_ratio_is_scipys_percentile_bootstrap(samples):
    rng = np.random.default_rng(2)
    hard = rng.random(400)
    a, b = (rng.binomial(samples, np.clip(hard * share, 0, 1)) / samples for share in (1.2, 0.4))
    ratio, low, high = stats.paired_ratio(a, b)
    expected = scipy.stats.bootstrap(
        (a, b), lambda x, y, axis: x.mean(axis=axis) / y.mean(axis=axis), paired=True, method="percentile", rng=3
    ).confidence_interval
    assert ratio == pytest.approx(a.mean() / b.mean())
    assert (low, high) == pytest.approx(tuple(expected), abs=0.05 * (high - low))
    turned = stats.paired_ratio(b, a)
    assert (1 / turned[2], 1 / turned[1]) == pytest.approx((low, high), rel=0.02)


def test_paired_ratio_of_nothing():
    assert all(np.isnan(stats.paired_ratio([0, 0], [0, 0])))
    ratio, low, high = stats.paired_ratio([1, 1, 0], [0, 0, 0])
    assert (ratio, low, high) == (np.inf, np.inf, np.inf)
    assert stats.paired_ratio([0, 0, 0], [1, 1, 0]) == (0, 0, 0)
    ratio, low, high = stats.paired_ratio([1] * 9 + [0] * 90, [1] + [0] * 98)
    assert ratio == pytest.approx(9) and 1 < low < 9 and high == np.inf  # a third of the resamples have no baseline
    with pytest.raises(ValueError, match="one length"):
        stats.paired_ratio([1, 0], [1])


def test_paired_ratio_covers():
    rng = np.random.default_rng(7)
    covered = 0
    for i in range(400):
        kind = rng.choice(4, size=200, p=[0.1, 0.2, 0.05, 0.65])  # both, a alone, b alone, neither
        _, low, high = stats.paired_ratio(kind < 2, (kind == 0) | (kind == 2), resamples=1000, seed=i)
        covered += low <= 2 <= high
    assert 0.91 < covered / 400 < 0.98


def test_holm_of_a_worked_example():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([]) == []
    assert stats.holm([0.7]) == [0.7]
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]


@settings(max_examples=100)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_holm_is_the_closed_test_of_bonferroni_tests(ps):
    indices = range(len(ps))
    expected = [0.0] * len(ps)
    for size in range(1, len(ps) + 1):
        for subset in itertools.combinations(indices, size):
            p = min(1.0, size * min(ps[i] for i in subset))
            for i in subset:
                expected[i] = max(expected[i], p)
    assert stats.holm(ps) == pytest.approx(expected)


@pytest.mark.parametrize("samples", [1, 4, None])
def test_paired_bootstrap_is_scipys_percentile_bootstrap(samples):
    rng = np.random.default_rng(2)
    if samples:
        a, b = rng.binomial(samples, 0.6, 300) / samples, rng.binomial(samples, 0.4, 300) / samples
    else:  # all differences distinct: drawn problem by problem
        a, b = rng.random(300) ** 0.5, rng.random(300)
    diff, low, high = stats.paired_bootstrap(a, b)
    expected = scipy.stats.bootstrap((a - b,), np.mean, method="percentile", n_resamples=10_000, rng=3)
    assert diff == pytest.approx(a.mean() - b.mean())
    width = high - low
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval), abs=0.03 * width)


def test_paired_bootstrap_is_seeded_and_turns_with_its_arguments():
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 2, 100), rng.integers(0, 2, 100)
    first = stats.paired_bootstrap(a, b)
    assert stats.paired_bootstrap(a, b) == first
    assert stats.paired_bootstrap(a, b, seed=1) != first
    diff, low, high = stats.paired_bootstrap(b, a)
    assert diff == -first[0]
    assert (-high, -low) == pytest.approx(first[1:], abs=0.02)
    narrow = stats.paired_bootstrap(a, b, level=0.5)
    assert first[1] < narrow[1] < narrow[2] < first[2]
    assert stats.paired_bootstrap(a, a) == (0.0, 0.0, 0.0)


def test_paired_bootstrap_refuses_what_does_not_pair():
    for a, b in [([1, 0], [1]), ([], []), ([[1, 0]], [[0, 1]])]:
        with pytest.raises(ValueError, match="one length"):
            stats.paired_bootstrap(a, b)


def test_paired_bootstrap_covers_by_problem_and_not_by_sample():
    rng = np.random.default_rng(5)
    covered, naive, unpaired_width, paired_width, runs = 0, 0, 0.0, 0.0, 400
    for i in range(runs):
        hardness = rng.beta(0.5, 0.5, size=100)
        swap = rng.random(100) < 0.6  # the models' chances are related problem by problem
        other = np.where(swap, hardness, rng.beta(0.5, 0.5, size=100))  # true difference 0
        a = rng.random((100, 8)) < hardness[:, None]
        b = rng.random((100, 8)) < other[:, None]
        _, low, high = stats.paired_bootstrap(a.mean(axis=1), b.mean(axis=1), resamples=1000, seed=i)
        covered += low <= 0 <= high
        if i % 4:  # what the others show takes fewer tables
            continue
        paired_width += high - low
        _, low, high = stats.paired_bootstrap(a.ravel(), b.ravel(), resamples=1000, seed=i)
        naive += low <= 0 <= high
        shuffled = rng.permutation(b.mean(axis=1))
        _, low, high = stats.paired_bootstrap(a.mean(axis=1), shuffled, resamples=1000, seed=i)
        unpaired_width += high - low
    assert 0.91 < covered / runs < 0.98
    assert naive / (runs / 4) < 0.85
    assert unpaired_width > 1.2 * paired_width


@pytest.mark.parametrize("distinct", [False, True])
def test_paired_bootstrap_of_a_whole_test_set_is_fast_and_small(distinct):
    rng = np.random.default_rng(6)
    a = rng.random(1319) if distinct else rng.integers(0, 2, 1319)
    start = time.process_time()
    stats.paired_bootstrap(a, a[::-1])
    assert time.process_time() - start < 0.5
    tracemalloc.start()
    stats.paired_bootstrap(a, a[::-1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


def test_pass_at_k_is_the_share_of_subsets_with_a_hit():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert stats.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
            assert stats.pass_hat_k(n, c, k) == pytest.approx(sum(map(all, subsets)) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="pass@"):
        stats.pass_at_k(n, c, k)
    with pytest.raises(ValueError, match="pass\\^"):
        stats.pass_hat_k(n, c, k)


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["18", "20", "20"], "20"),
        (["18", "20"], "18"),
        (["20", "18", "18", "20"], "20"),
        ([None, None, "7"], "7"),
        ([None, None], None),
        ([], None),
    ],
)
def test_majority(answers, winner):
    assert stats.majority(answers) == winner
