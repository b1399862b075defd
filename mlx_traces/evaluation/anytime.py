"""Anytime-valid test and interval of a mean difference: valid after any number of looks, at any stop. No MLX.

Testing by betting (Waudby-Smith and Ramdas, JRSS B 86, 2024; arXiv 2010.09686): a gambler bets on the differences x of
one problem after another, each from -1 to 1. If their mean is m or less, her wealth, the product of 1 + b (x - m) for a
bet b >= 0, is a nonnegative supermartingale, and so is its mean over bets with weights fixed in advance (Robbins 1970).
By Ville's inequality the probability that it ever reaches 2 / alpha is at most alpha / 2. The same holds from above.

With one completion a problem, differences are -1, 0 and 1. Against m = 0 the wealth is then a mixture of likelihood
ratios of the discordant problems: a McNemar test that remains valid after every look.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

# Weights of the bets u against a mean of 0: a discordant problem is a win with probability (1 + u) / 2, which has the
# distribution Beta(_SHAPE, _SHAPE). Fixed: with bets that depend on the budget, a sequence could not be extended.
_SHAPE = 2.0
_BETS = (np.arange(64) + 0.5) / 64
_LOG_WEIGHTS = (_SHAPE - 1) * np.log1p(-(_BETS**2))
_LOG_WEIGHTS -= np.log(np.exp(_LOG_WEIGHTS).sum())


def log_wealth(values: np.ndarray, counts: np.ndarray, mean: float) -> float:
    """Return the logarithm of the wealth against "the mean is ``mean`` or less"; it falls as ``mean`` rises.

    Args:
        values: (V,) distinct differences, -1 to 1.
        counts: (V,) how often each was seen.
        mean: above -1 and below 1.
    """
    bets = _BETS / (1 + abs(mean))  # so that no bet can lose more than everything
    gains = np.log1p(bets[:, None] * (values - mean)) @ counts + _LOG_WEIGHTS
    top = gains.max()
    return float(top + np.log(np.exp(gains - top).sum()))


def anytime(differences: ArrayLike, level: float = 0.95) -> tuple[float, float, float, float]:
    """Return the mean difference, its anytime-valid interval, and the anytime-valid p-value of "no difference".

    They do not depend on the order or the blocks of the differences. Each is valid at any time of stopping that depends
    only on the differences so far. The interval excludes 0 if the p-value is at most ``1 - level``. The problems must
    be drawn at random, or be in a random order.

    Args:
        differences: (P,) for each problem the share of correct completions of one model minus the other's.
        level: coverage of the interval.

    Returns:
        (difference, low, high, p).

    Raises:
        ValueError: if there are none, or one is not from -1 to 1.
    """
    x = np.asarray(differences, dtype=float)
    if x.ndim != 1 or not x.size or not (np.abs(x) <= 1).all():
        raise ValueError("anytime takes one or more differences from -1 to 1")
    values, counts = np.unique(np.round(x, 12), return_counts=True)
    threshold = math.log(2 / (1 - level))
    low = _lower_end(values, counts, threshold)
    high = -_lower_end(-values[::-1], counts[::-1], threshold)
    wealth = max(log_wealth(values, counts, 0.0), log_wealth(-values, counts, 0.0))
    return float(x.mean()), low, high, min(1.0, 2 * math.exp(-wealth))


def _lower_end(values: np.ndarray, counts: np.ndarray, threshold: float) -> float:
    """Return the largest mean against which the log wealth reaches the threshold; -1 if there is none."""
    low, high = -1.0, float(values @ counts / counts.sum())  # against the mean itself no bet gains
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if log_wealth(values, counts, middle) >= threshold else (low, middle)
    return low
