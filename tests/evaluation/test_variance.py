"""Intervals over problems, clusters and trainings, against SciPy and plain formulas."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from mlx_traces.evaluation import variance


def test_students_t_is_scipys():
    for freedom in (1, 1.5, 2, 3.7, 29, 1e4):
        for t in (0.1, 1.0, 2.5, 12.0):
            expected = 2 * scipy_stats.t.sf(t, freedom)
            assert variance.student_p(t, freedom) == pytest.approx(expected, abs=1e-9)
        for level in (0.95, 0.9999):  # with one degree of freedom 12.7 and 6,366
            expected = scipy_stats.t.ppf((1 + level) / 2, freedom)
            assert variance.student_quantile(level, freedom) == pytest.approx(expected, rel=1e-7)
    assert variance.student_p(1e6, 1) == pytest.approx(2 * scipy_stats.t.sf(1e6, 1), rel=1e-6)


def test_one_training_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    one, two = rng.random((1, 40)) < 0.6, rng.random((1, 40)) < 0.4
    found = variance.estimate(one, two)
    expected = scipy_stats.ttest_rel(one[0].astype(float), two[0].astype(float))
    low, high = expected.confidence_interval()
    assert found.interval() == pytest.approx((low, high)) and found.p == pytest.approx(expected.pvalue, abs=1e-9)
    assert variance.estimate(one, one).p == 1 and variance.estimate(one, one).interval() == (0, 0)


def test_clusters_are_the_jackknife():
    """By its definition: the mean without each cluster; Student's t at the number of clusters that weigh alike."""
    rng = np.random.default_rng(1)
    place = np.repeat(np.arange(12), rng.integers(1, 6, 12))
    one = (rng.random((1, len(place))) < 0.3 + 0.04 * place).astype(float)
    found = variance.estimate(one, clusters=[f"document {i}" for i in place])
    without = np.array([one[0][place != g].mean() for g in range(12)])
    assert found.error == pytest.approx(np.sqrt(11 / 12 * np.square(without - one.mean()).sum()))
    assert found.error > variance.estimate(one).error  # problems of one document are alike
    freedom = len(place) ** 2 / sum((place == g).sum() ** 2 for g in range(12)) - 1
    assert freedom < 11 and found.interval()[1] - found.mean == pytest.approx(
        found.error * scipy_stats.t.ppf(0.975, freedom)
    )


def test_trainings_and_problems_are_the_two_way_table():
    rng = np.random.default_rng(2)
    rows = 0.5 + rng.normal(0, 0.1, (4, 1)) + rng.normal(0, 0.3, 50) + rng.normal(0, 0.2, (4, 50))
    found = variance.estimate(rows)
    trainings, problems = rows.shape
    levels, means = rows.mean(axis=1), rows.mean(axis=0)
    ms_trainings = problems * levels.var(ddof=1)
    ms_problems = trainings * means.var(ddof=1)
    rest = rows - levels[:, None] - means + rows.mean()
    ms_rest = (rest**2).sum() / ((trainings - 1) * (problems - 1))
    assert found.error**2 == pytest.approx((ms_trainings + ms_problems - ms_rest) / rows.size)
    assert found.between_trainings == (pytest.approx(ms_trainings / rows.size), 3)
    # Between the two approximations that it is the mean of, and its p-value is the interval's.
    parts = (found.between_problems, found.between_trainings)
    freedom = found.error**4 / sum(v**2 / f for v, f in parts)
    narrow = found.error * scipy_stats.t.ppf(0.975, freedom)
    wide = np.sqrt(sum(v * scipy_stats.t.ppf(0.975, f) ** 2 for v, f in parts))
    assert narrow < found.reach(0.95) < wide
    share = found.between_trainings[0] / found.error**2
    assert found.reach(0.95) ** 2 == pytest.approx((1 - share) * narrow**2 + share * wide**2)
    shifted = variance.estimate(rows - rows.mean() + found.reach(0.99))
    assert shifted.p == pytest.approx(0.01, abs=1e-6)


def coverage(level, freedom, ratio):
    """The exact coverage where the variance between trainings is ``ratio`` times the known one between problems."""
    drawn = scipy_stats.chi2.ppf((np.arange(150) + 0.5) / 150, freedom) / freedom
    reach = [variance.Estimate(0.5, (1.0, 10_000), (ratio * each, freedom)).reach(level) for each in drawn]
    return (2 * scipy_stats.norm.cdf(np.array(reach) / np.sqrt(1 + ratio)) - 1).mean()


@pytest.mark.parametrize(("freedom", "least", "most"), [(1, 0.95, 0.978), (2, 0.949, 0.96), (3, 0.95, 0.957)])
def test_the_interval_covers_whatever_the_trainings_share_of_the_variance(freedom, least, most):
    shares = [coverage(0.95, freedom, ratio) for ratio in (0.03, 0.1, 0.3, 1, 3, 10, 30, 100)]
    assert least < min(shares) and max(shares) < most
    assert min(coverage(0.99, freedom, ratio) for ratio in (0.3, 3, 30)) > 0.989  # as Holm's adjustment asks for


def test_clusters_of_equal_size_are_as_good_as_their_means():
    rng = np.random.default_rng(4)
    own = rng.normal([[[0.0]], [[0.1]], [[0.3]]], 0.3, (3, 12, 1))  # each training is good at some of the clusters
    rows = (0.5 + rng.normal(0, 0.2, (12, 1)) + own + rng.normal(0, 0.3, (3, 12, 5))).reshape(3, 60)
    found = variance.estimate(rows, rows[:1] - 0.1, np.repeat(np.arange(12), 5).tolist())
    means = rows.reshape(3, 12, 5).mean(axis=2)
    expected = variance.estimate(means, means[:1] - 0.1)
    assert found.between_problems == pytest.approx(expected.between_problems) and found.between_problems[0] > 0
    assert found.between_trainings == pytest.approx(expected.between_trainings)


@pytest.mark.parametrize("problems", [12, 100])
def test_trainings_that_tie_are_no_proof(problems):
    """Of equal recipes few differ by chance at a small level, however well the trainings' accuracies agree."""
    rng = np.random.default_rng(problems)
    hardness = rng.uniform(0.15, 0.85, (400, 1, problems))
    drawn = rng.random((400, 4, problems)) < hardness
    drawn[:4, 1], drawn[:4, 3] = drawn[:4, 0], drawn[:4, 2]  # two seeds that answer alike, twice
    found = [variance.estimate(rows[:2], rows[2:]) for rows in drawn]
    at = {p: [abs(one.mean) > one.reach(1 - p) for one in found] for p in (0.01, 1e-4)}  # whether its p is below this
    assert not any(at[1e-4]) and np.mean(at[0.01][4:]) < 0.02
    tied = variance.estimate([[1, 1, 0, 0], [0, 0, 1, 1]], [[1, 0, 0, 0], [0, 0, 0, 1]])
    assert tied.p > 0.05 and tied.interval()[0] < 0 < tied.mean


def test_one_large_cluster_leaves_an_interval():
    rows = np.random.default_rng(0).random((2, 300)) < 0.5
    found = variance.estimate(rows[:1], rows[1:], [0] * 299 + [1])
    assert found.reach(0.95) == pytest.approx(scipy_stats.t.ppf(0.975, 1) * found.error)


def test_arrays_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError, match="of the same problems"):
        variance.estimate(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(ValueError, match="two clusters or more"):
        variance.estimate(np.ones((1, 3)), clusters="aaa")


def test_the_interval_of_a_share_is_wilsons_at_the_effective_number():
    rows = np.random.default_rng(3).random((3, 80)) < 0.95
    found = variance.estimate(rows)
    low, high = found.share_interval()
    z, n = found.reach(0.95) / found.error, found.mean * (1 - found.mean) / found.error**2
    for end in (low, high):  # where the score test at that critical value just rejects
        assert abs(found.mean - end) == pytest.approx(z * np.sqrt(end * (1 - end) / n))
    assert 0 < low < found.interval()[0] and high < min(1, found.interval()[1])
