"""Uncertainty of an accuracy and of a difference: small exact or seeded functions of arrays. No MLX.

The tests check them against SciPy. It is not used here, since loading it takes longer than a comparison.

One problem is one unit of evidence. Several samples of a problem are not independent, so functions for several samples
work on per-problem values: ``wilson_clustered``, ``paired_bootstrap``, ``sign_flip``.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.05  # of Holm-adjusted p-values: the chance of any false "more often" in a table is at most this
_CHUNK = 1 << 20  # bootstrap draws held at once: 8 MB of indices and 8 MB of values
_UNITS = 1 << 15  # least units that `sign_flip_of_reals` rounds to; they bound its time and memory


def wilson(correct: float, total: float, level: float = 0.95) -> tuple[float, float]:
    """Interval for a share of independent yes/no outcomes (Wilson 1927, without continuity correction).

    Args:
        correct: number of successes, 0 to ``total``; a fraction is allowed for an effective sample size.
        total: number of outcomes, above 0.
        level: share of such intervals that hold the true value, between 0 and 1.

    Raises:
        ValueError: if the counts are out of range.
    """
    if not 0 <= correct <= total or total == 0:  # also refuses nan
        raise ValueError(f"{correct} correct of {total} is not a share")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, shrink = correct / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    low = 0.0 if correct == 0 else middle - half  # the rounding of middle - half may leave -1e-19
    high = 1.0 if correct == total else middle + half
    return low, high


def wilson_clustered(correct: ArrayLike, samples: ArrayLike) -> tuple[float, float]:
    """Wilson interval for the accuracy over problems with several samples each.

    The sample size is divided by the design effect (Kish 1965): the effective n is the one at which
    independent outcomes would have the variance seen between problems. It is kept between the number of
    problems (all samples of a problem equal; also assumed when every sample is right or every sample
    wrong) and the number of samples. With one sample a problem it is ``wilson``.

    Args:
        correct: (P,) correct samples of each problem.
        samples: (P,) samples of each problem, or one number for all.
    """
    correct, samples = np.broadcast_arrays(np.asarray(correct, dtype=float), samples)
    problems, total = correct.size, float(samples.sum())
    share = float(correct.sum()) / total
    effective = float(problems)
    if problems > 1 and 0 < share < 1:
        spread = float(np.square(correct - share * samples).sum())
        variance = spread / total**2 * problems / (problems - 1)
        effective = min(max(share * (1 - share) / variance, problems), total) if variance else total
    return wilson(share * effective, effective)


def accuracy(outcomes: Sequence[Sequence[bool]]) -> dict[str, float | int]:
    """Return accuracy, correct_count, total_questions, ci_low and ci_high, as result.json has them.

    Args:
        outcomes: for each problem whether each of its samples is correct; samples, not problems, are counted.

    Raises:
        ValueError: if there is no sample.
    """
    correct, samples = [sum(map(bool, row)) for row in outcomes], [len(row) for row in outcomes]
    count, total = sum(correct), sum(samples)
    if not total:
        raise ValueError("no samples to take the accuracy of")
    low, high = wilson_clustered(correct, samples)
    return {
        "accuracy": count / total,
        "correct_count": count,
        "total_questions": total,
        "ci_low": low,
        "ci_high": high,
    }


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p-value of McNemar's test: the sign test on the problems where two models disagree.

    Args:
        wins: problems that only the first model got right.
        losses: problems that only the second model got right.

    Returns:
        The p-value; 1.0 when the models never disagree.
    """
    pairs = wins + losses
    term, tail = 1, 1  # C(pairs, k) and its sum for k up to the rarer outcome, as exact integers
    for k in range(min(wins, losses)):
        term = term * (pairs - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**pairs)


def sign_flip(differences: ArrayLike) -> float:
    """Exact two-sided p-value of the paired sign-flip permutation test on the sum (Fisher 1935).

    If two models were equal, each problem's difference could as well have had the other sign. All 2^P sign
    patterns are counted by dynamic programming over the sum of the positive ones, so nothing is drawn at
    random. With differences of -1, 0 and 1 (one sample a problem) it is ``mcnemar``.

    Args:
        differences: (P,) integers: correct samples of one model minus those of the other, for each problem.

    Returns:
        The p-value; 1.0 when all differences are 0.

    Raises:
        ValueError: if a difference is not an integer.
    """
    values = np.asarray(differences)
    if values.size and (values != np.round(values)).any():
        raise ValueError("sign_flip takes integer differences: counts of correct samples, not shares")
    values = values.astype(np.int64)
    sizes = np.abs(values[values != 0])
    if not sizes.size:
        return 1.0
    sizes = np.sort(sizes) // np.gcd.reduce(sizes)
    chance = np.zeros(int(sizes.sum()) + 1)  # chance[t]: probability that the positive differences sum to t
    chance[0], reach = 1.0, 0
    for size in sizes.tolist():
        reach += size
        chance[size : reach + 1] += chance[: reach - size + 1].copy()
        chance[: reach + 1] *= 0.5
    total = int(values.sum()) // int(np.gcd.reduce(np.abs(values)))
    sums = 2 * np.arange(len(chance)) - (len(chance) - 1)
    return min(1.0, float(chance[np.abs(sums) >= abs(total)].sum()))


def sign_flip_of_reals(differences: ArrayLike) -> float:
    """Exact two-sided p-value of the paired sign-flip permutation test on real differences, rounded to integers.

    The unit of rounding is a 32,768th of the sum of their sizes, so the sum that is tested is off by at most P / 65,536
    of that; with more than 16,384 differences it is half of their mean size. Rounding is symmetric about 0, so the
    p-value is as valid as that of `sign_flip`.

    Args:
        differences: (P,) one model's mean minus the other's, for each problem.

    Returns:
        The p-value; 1.0 when all differences are 0.
    """
    values = np.round(np.asarray(differences, dtype=float), 12)
    total = np.abs(values).sum()
    return sign_flip(np.rint(values / (total / max(_UNITS, 2 * values.size)))) if total else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm 1979); valid under any dependence.

    Args:
        p_values: the p-values of one family of comparisons, in any order.

    Returns:
        Adjusted p-values in the same order, each at least the raw one and at most 1.
    """
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of ``a - b`` with its percentile bootstrap interval (Efron 1979), problems drawn with replacement.

    A problem is drawn with all its samples and with both models' results, so the interval allows for samples
    of one problem being alike and for the models finding the same problems hard. Where the models never
    differ the interval is [0, 0].

    Args:
        a: (P,) per-problem mean of one model, such as its share of correct samples.
        b: (P,) the same of the baseline, problems in the same order.
        resamples: number of redrawn data sets.
        level: share of such intervals that hold the true value.
        seed: seed of the draws; the same arguments give the same interval.

    Returns:
        (difference, low, high), in the unit of ``a``.

    Raises:
        ValueError: if the arrays do not pair up or are empty.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(f"paired_bootstrap needs two arrays of one length, not {a.shape} and {b.shape}")
    differences = a - b
    values, counts = np.unique(np.round(differences, 12), return_counts=True)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    rows = max(1, _CHUNK // a.size)
    for start in range(0, resamples, rows):
        chunk = means[start : start + rows]
        if len(values) <= 200:  # the same distribution as drawing problems, 10 to 100 times faster
            chunk[:] = rng.multinomial(a.size, counts / a.size, size=len(chunk)) @ values / a.size
        else:
            chunk[:] = differences.take(rng.integers(a.size, size=(len(chunk), a.size))).mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(differences.mean()), float(low), float(high)


def paired_ratio(
    a: ArrayLike, b: ArrayLike, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of ``a`` divided by the mean of ``b``, with its percentile bootstrap interval, problems drawn as pairs.

    As in `paired_bootstrap`, a problem is drawn with the results of both models. Resamples in which both means are 0
    have no ratio and are left out.

    Args:
        a: (P,) per-problem mean of one model, such as its share of correct samples; none below 0.
        b: (P,) the same of the baseline, problems in the same order.
        resamples: number of redrawn data sets.
        level: share of such intervals that hold the true value.
        seed: seed of the draws.

    Returns:
        (ratio, low, high). An end is infinite if the baseline's mean is 0 in the resamples at that end; all are NaN if
        both models' means are 0.

    Raises:
        ValueError: if the arrays do not pair up or are empty.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(f"paired_ratio needs two arrays of one length, not {a.shape} and {b.shape}")
    if not (a.any() or b.any()):
        return math.nan, math.nan, math.nan
    kinds, counts = np.unique(np.round(np.stack([a, b], axis=1), 12), axis=0, return_counts=True)
    rng, rows = np.random.default_rng(seed), max(1, _CHUNK // len(kinds))
    sizes = (min(rows, resamples - start) for start in range(0, resamples, rows))
    drawn = np.concatenate([rng.multinomial(a.size, counts / a.size, size=size) @ kinds for size in sizes])
    drawn = drawn[drawn.any(axis=1)]
    share = drawn[:, 0] / drawn.sum(axis=1)  # from 0 to 1, as ratios are not
    ends = [a.sum() / (a.sum() + b.sum()), *np.quantile(share, [(1 - level) / 2, (1 + level) / 2])]
    ratio, low, high = (float(end / (1 - end)) if end < 1 else math.inf for end in ends)
    return ratio, low, high


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of ``k`` samples is correct, unbiased from ``n`` samples (arXiv 2107.03374, eq. 1).

    Args:
        n: samples of the problem.
        c: correct ones among them.
        k: samples allowed, 1 to ``n``.

    Raises:
        ValueError: if the counts are out of range.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be computed from {c} correct of {n} samples")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_hat_k(n: int, c: int, k: int) -> float:
    """Chance that all of ``k`` samples are correct (pass^k), unbiased from ``n`` samples (arXiv 2406.12045).

    Arguments and errors are those of `pass_at_k`.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass^{k} cannot be computed from {c} correct of {n} samples")
    return math.comb(c, k) / math.comb(n, k)


def majority(answers: Sequence[Hashable | None]) -> Hashable | None:
    """Return the most common answer; among equally common ones the one seen first.

    ``None`` (no answer found) has no vote: it is returned only if there is no other answer. Answers must
    already be in one form (``18`` and ``18.00`` are two answers here).
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.__getitem__) if votes else None
