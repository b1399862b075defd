"""Intervals for means over problems, clusters of problems and trainings of one recipe. No MLX.

A recipe is trained with several seeds, and every training answers the same problems. Its accuracy varies between
trainings and between problems; both are samples, so the interval includes both variances.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


@dataclass(frozen=True)
class Estimate:
    """A mean, and its variances: ``between_problems`` and ``between_trainings``, each with its degrees of freedom."""

    mean: float
    between_problems: tuple[float, float]
    between_trainings: tuple[float, float] = (0.0, 0.0)

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return math.sqrt(self.between_problems[0] + self.between_trainings[0])

    def reach(self, level: float) -> float:
        """Return half of the width of the interval.

        With one variance it is Student's. With two, Satterthwaite's degrees of freedom (1946) make it too narrow where
        most of the variance is between few trainings, and Howe's sum of squared half-widths (1974) too wide where most
        is not. So the squared half-width is their mean, with the trainings' share of the variance as Howe's weight; and
        at least Student's for the variance between trainings alone.

        Of intervals at 95 %, 94.9 to 96 % hold the true mean from two degrees of freedom between trainings on, whatever
        the share. With one (two trainings, alone or against one) it is 95 to 97.7 %: the critical value must rise from
        2.0 to 12.7 with a share that one difference of two accuracies hardly determines.
        """
        parts = (self.between_problems, self.between_trainings)
        if not self.error:
            return 0.0
        total = sum(part for part, _ in parts)
        share = self.between_trainings[0] / total
        problems, trainings = (part * student_quantile(level, freedom) ** 2 if part else 0.0 for part, freedom in parts)
        freedom = total**2 / sum(part**2 / freedom for part, freedom in parts if part)
        satterthwaite = total * student_quantile(level, freedom) ** 2
        return math.sqrt(max((1 - share) * satterthwaite + share * (problems + trainings), trainings))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the interval of the mean."""
        reach = self.reach(level)
        return self.mean - reach, self.mean + reach

    def share_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the interval of a mean of shares. The mean is above 0 and below 1, and its error above 0.

        It is Wilson's (1927), within 0 and 1, at the number of independent outcomes that would have the same error; its
        critical value is that of `reach`, and so is the coverage at accuracies near one half. Near 0 and 1 it covers 95
        to 98 %, where `interval` covers 85 to 90 %.
        """
        reach = self.reach(level)
        square = reach**2 / (self.mean * (1 - self.mean))
        half = math.sqrt(reach**2 + square**2 / 4)
        return (self.mean + square / 2 - half) / (1 + square), (self.mean + square / 2 + half) / (1 + square)

    @property
    def p(self) -> float:
        """The two-sided p-value of a mean of 0: the level at which the interval just holds 0."""
        if not self.error:
            return float(self.mean == 0)
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.reach(1 - middle) >= abs(self.mean) else (low, middle)
        return high


@lru_cache(maxsize=1024)
def _height(freedom: float) -> float:
    """Return Student's density at 0."""
    if freedom < 100:
        return math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    # Stirling's series, as the difference of two large logarithms is inexact.
    return math.exp(-1 / (4 * freedom) + 1 / (24 * freedom**3)) / math.sqrt(2 * math.pi)


def student_p(t: float, freedom: float) -> float:
    """Return the two-sided p-value of Student's t.

    Args:
        t: the statistic.
        freedom: degrees of freedom, 1 or more; a fraction is allowed.
    """
    if math.isinf(t):
        return 0.0
    height, square = 2 * math.sqrt(freedom) * _height(freedom), freedom / (freedom + t * t)
    # With t = sqrt(freedom) tan(a) the density is proportional to cos(a) ** (freedom - 1), and square is cos(a) ** 2.
    if square > 0.05:
        end = math.acos(math.sqrt(square))
        inside = end / 2 * float(_WEIGHTS @ np.cos(end / 2 * (1 + _NODES)) ** (freedom - 1))
        return min(1.0, max(0.0, 1 - height * inside))
    # Far out the tail itself, over cos(a) ** freedom: as the difference from 1 it would be inexact.
    outside = float(_WEIGHTS @ (1 - square * ((1 + _NODES) / 2) ** (2 / freedom)) ** -0.5) / 2
    return min(1.0, height * square ** (freedom / 2) * outside / freedom)


@lru_cache(maxsize=1024)
def student_quantile(level: float, freedom: float) -> float:
    """Return the critical value of Student's t for a two-sided test at ``1 - level``."""
    t = NormalDist().inv_cdf((1 + level) / 2)  # below the root; the p-value is convex, so Newton's steps stay below it
    for _ in range(100):
        density = _height(freedom) * (1 + t * t / freedom) ** (-(freedom + 1) / 2)
        step = (student_p(t, freedom) - (1 - level)) / (2 * density)
        t += step
        if step <= 1e-10 * t:
            break
    return t


def estimate(one: ArrayLike, other: ArrayLike | None = None, clusters: Sequence[object] | None = None) -> Estimate:
    """Estimate the mean of one recipe over trainings and problems, or the mean difference of two.

    The variance between trainings is that of the two-way crossed analysis of variance (Searle, Casella and McCulloch
    1992): the mean square of the trainings' levels, pooled over the recipes, which are taken to vary alike; at least
    that of rounding to whole answers, as levels may tie on few problems. The one between problems is that of the
    problems' means over the trainings, minus the residual that the former already contains; with clusters both are the
    delete-one-cluster jackknife's (CR3 of MacKinnon and White 1985), which for clusters of one size is the robust
    variance (Liang and Zeger 1986) times G / (G - 1). Clusters of several sizes have the degrees of freedom of as many
    of one size as weigh alike (Kish 1965), at least one. Of a recipe with one training nothing shows how much its
    trainings vary: the result is about that training, not about its recipe.

    Args:
        one: (S, P) for each training and problem the share of correct completions.
        other: (S', P) the same of another recipe on the same problems; the result is ``one`` minus ``other``.
        clusters: (P,) the cluster of each problem; default: every problem is its own.

    Raises:
        ValueError: if the arrays do not pair up, or there are fewer than two problems or clusters.
    """
    recipes = [np.asarray(rows, dtype=float) for rows in (one, other) if rows is not None]
    problems = recipes[0].shape[-1]
    if any(rows.ndim != 2 or rows.shape[1] != problems for rows in recipes):
        raise ValueError("estimate needs arrays of (trainings, problems), of the same problems")
    means = recipes[0].mean(axis=0) - (recipes[1].mean(axis=0) if other is not None else 0)
    names, place = np.unique(np.arange(problems) if clusters is None else [*map(str, clusters)], return_inverse=True)
    groups = len(names)
    if groups < 2:
        raise ValueError("estimate needs two clusters or more")

    sizes = np.bincount(place)
    alike = problems**2 / float(np.square(sizes).sum())  # clusters of one size that would weigh as much (Kish)
    alike = max(2.0, alike)  # Student's t needs a degree of freedom

    def robust(rows: np.ndarray) -> float:
        """Return the jackknife variance of a mean over problems; of several rows, the sum of theirs."""
        shifts = [
            np.bincount(place, row, minlength=groups) / (problems - sizes) for row in rows
        ]  # without each cluster
        return float(np.square(shifts).sum()) * (groups - 1) / groups

    mean = float(means.mean())
    variance = robust(means[None] - mean)
    several = [rows for rows in recipes if len(rows) > 1]
    if not several:
        return Estimate(mean, (variance, alike - 1))
    freedom = sum(len(rows) - 1 for rows in several)
    share = sum(1 / len(rows) for rows in several)
    levels = sum(float(np.square(rows.mean(axis=1) - rows.mean()).sum()) for rows in several) / freedom
    levels = max(levels, 1 / (12 * problems**2))  # that of rounding to whole answers (Sheppard 1898): levels may tie
    rest = [rows - rows.mean(axis=1, keepdims=True) - rows.mean(axis=0) + rows.mean() for rows in several]
    residual = sum(map(robust, rest)) / freedom
    return Estimate(mean, (max(0.0, variance - residual * share), alike - 1), (levels * share, freedom))
