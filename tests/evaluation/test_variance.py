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
        assert variance.student_quantile(0.95, freedom) == pytest.approx(scipy_stats.t.ppf(0.975, freedom), rel=1e-7)


def test_one_training_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    one, two = rng.random((1, 40)) < 0.6, rng.random((1, 40)) < 0.4
    found = variance.estimate(one, two)
    expected = scipy_stats.ttest_rel(one[0].astype(float), two[0].astype(float))
    low, high = expected.confidence_interval()
    assert found.interval() == pytest.approx((low, high)) and found.p == pytest.approx(expected.pvalue, abs=1e-9)
    assert variance.estimate(one, one).p == 1 and variance.estimate(one, one).interval() == (0, 0)


def test_clusters_are_the_robust_formula():
    rng = np.random.default_rng(1)
    place = np.repeat(np.arange(12), rng.integers(1, 6, 12))
    one = (rng.random((1, len(place))) < 0.3 + 0.04 * place).astype(float)
    found = variance.estimate(one, clusters=[f"document {i}" for i in place])
    residuals = one[0] - one[0].mean()
    sums = [residuals[place == g].sum() for g in range(12)]
    assert found.error == pytest.approx(np.sqrt(12 / 11 * np.square(sums).sum()) / len(place))
    assert found.error > variance.estimate(one).error  # problems of one document are alike
    assert found.interval()[1] - found.mean == pytest.approx(found.error * scipy_stats.t.ppf(0.975, 11))


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
    shifted = variance.estimate(rows - rows.mean() + found.reach(0.99))
    assert shifted.p == pytest.approx(0.01, abs=1e-6)


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
