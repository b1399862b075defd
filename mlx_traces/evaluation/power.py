"""How many problems a comparison needs, and which differences it can see: the exact McNemar test's power. No MLX.

A problem is a win if the first model alone is right, a loss if the second alone is; both are discordant. The number of
discordant problems is itself random, so power is unconditional: the mean over its binomial distribution.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from mlx_traces.errors import UserError

MOST_DISCORDANT = 100_000  # discordant problems of the largest plan, which takes a fifth of a second
MOST_PROBLEMS = 10_000_000  # problems of the largest plan, whose table of logarithms takes 80 MB
_LEAST_ALPHA = 1e-15  # below it 1 - alpha / 2 is rounded to 1
_AT_ONCE = 512  # numbers of problems whose power is computed from one another
_TAIL = 9.0  # the binomial distribution is summed over so many standard deviations; the rest is below 1e-17


@lru_cache(maxsize=4)
def _log_factorials(most: int) -> np.ndarray:
    """Return log(0!) to log(most!)."""
    return np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, most + 1)))))


def binomial(n: int | np.ndarray, k: int | np.ndarray, share: float) -> np.ndarray:
    """Return the probability of ``k`` successes in ``n``, elementwise; 0 where ``k`` is not in 0 to ``n``."""
    n, k = np.broadcast_arrays(n, k)
    if share in (0, 1):
        return (k == n * share).astype(float)
    facts, inside = _log_factorials(int(n.max())), (k >= 0) & (k <= n)
    kept = np.where(inside, k, 0)
    logs = facts[n] - facts[kept] - facts[n - kept] + kept * math.log(share) + (n - kept) * math.log1p(-share)
    return np.where(inside, np.exp(logs), 0.0)


@lru_cache(maxsize=4)
def critical(most: int, alpha: float) -> np.ndarray:
    """Return for each number of discordant problems the most losses (or wins) at which the exact test rejects.

    Args:
        most: largest number of discordant problems.
        alpha: level of the two-sided test.

    Returns:
        (most + 1,) integers; -1 where it never rejects.
    """
    found = np.full(most + 1, -1)
    count, tail, term = -1, 0.0, 0.0  # P(X <= count) and P(X = count) for X binomial (m, 1/2)
    for m in range(most + 1):
        if m:
            tail -= term / 2
            term *= m / (2 * (m - count)) if count >= 0 else 0.0
        # The critical value rises by at most 1. The tail's rounding errors stay below 1e-12.
        following = term * (m - count) / (count + 1) if count >= 0 else math.ldexp(1.0, -m) if m < 1000 else 0.0
        if count + 1 <= m and 2 * (tail + following) <= alpha * (1 + 1e-12):
            count, tail, term = count + 1, tail + following, following
        found[m] = count
    return found


def conditional(most: int, win_share: float, alpha: float) -> np.ndarray:
    """Return the exact test's power for each number of discordant problems, 0 to ``most``.

    Args:
        most: largest number of discordant problems.
        win_share: probability that a discordant problem is a win.
        alpha: level of the two-sided test; a rejection in either direction counts.

    Returns:
        (most + 1,) probabilities.
    """
    limit = critical(most, alpha)
    m, before = np.arange(1, most + 1), limit[:-1]
    power = np.zeros(most + 1)
    for share in (win_share, 1 - win_share):
        # P(X <= c) changes from m - 1 to m by -share P(X = c), and by P(X = c + 1) where c grows.
        grown = np.where(limit[1:] > before, binomial(m, limit[1:], share), 0.0)
        power[1:] += np.cumsum(grown - share * binomial(m - 1, before, share))
    return np.clip(power, 0.0, 1.0)


def _mean_over_pairs(values: np.ndarray, problems: int, discordant: float) -> float:
    """Return the mean of ``values[m]`` over m binomial (``problems``, ``discordant``)."""
    low, high = _range(problems, discordant)
    m = np.arange(low, high + 1)
    return float(binomial(problems, m, discordant) @ values[m])


def _means_over_pairs(values: np.ndarray, first: int, last: int, discordant: float) -> np.ndarray:
    """Return `_mean_over_pairs` for ``first`` to ``last`` problems; one more problem is one more chance of a pair."""
    low, high = _range(first, discordant)
    weights = binomial(first, np.arange(low, high + 1), discordant)
    window, found = values[low : high + 1 + last - first], []
    window = np.pad(window, (0, len(weights) + last - first - len(window)), mode="edge")  # of negligible probability
    for _ in range(first, last + 1):
        found.append(weights @ window[: len(weights)])
        window = (1 - discordant) * window[:-1] + discordant * window[1:]
    return np.array(found)


def _range(problems: int, discordant: float) -> tuple[int, int]:
    """Return the range of discordant problems outside of which the probability is negligible."""
    mean, spread = problems * discordant, math.sqrt(problems * discordant * (1 - discordant))
    reach = _TAIL * spread + _TAIL**2
    return max(0, math.floor(mean - reach)), min(problems, math.ceil(mean + reach))


def power(problems: int, difference: float, discordant: float, alpha: float = 0.05) -> float:
    """Return the chance that McNemar's exact test finds a difference.

    Args:
        problems: number of problems, one completion each.
        difference: true difference of the accuracies, as a fraction; its sign does not matter.
        discordant: share of the problems that one of the two models alone gets right; at least the difference.
        alpha: level of the two-sided test. For K comparisons with Holm's adjustment, ``alpha / K`` is always safe.

    Raises:
        UserError: if an argument is out of range, or the plan is too large to compute.
    """
    _check(difference, discordant, alpha)
    if problems < 1:
        raise UserError(f"{problems} problems: power needs one or more")
    if problems > MOST_PROBLEMS or problems * discordant > MOST_DISCORDANT:
        raise UserError(
            f"{problems:,} problems are too many to plan for: at most {MOST_PROBLEMS:,}, of which at most "
            f"{MOST_DISCORDANT:,} may be discordant"
        )
    most = _range(problems, discordant)[1]
    share = (1 + abs(difference) / discordant) / 2
    return _mean_over_pairs(conditional(most, share, alpha), problems, discordant)


def problems_needed(difference: float, discordant: float, target: float = 0.8, alpha: float = 0.05) -> int:
    """Return the smallest number of problems from which on the power stays at the target or above.

    Power is a saw-tooth: one more problem can lower it, because the exact test's level jumps. So the first number that
    reaches the target may not be enough; no number above the one returned falls below the target.

    Args:
        difference: as in `power`, not 0.
        discordant: as in `power`.
        target: wanted power, between 0 and 1.
        alpha: as in `power`.

    Raises:
        UserError: if an argument is out of range, or the plan is too large to compute.
    """
    _check(difference, discordant, alpha)
    _check_target(target)
    if not difference:
        raise UserError("a difference of 0 cannot be found by any number of problems; name one above 0")
    share = (1 + abs(difference) / discordant) / 2
    normal = NormalDist()
    z = normal.inv_cdf(1 - alpha / 2) + max(0.0, normal.inv_cdf(target))
    rough = z / difference * z / difference * discordant  # the normal approximation, from above; infinite at worst
    top = 1.2 * rough + 40 / discordant
    if top > MOST_PROBLEMS or rough * discordant > MOST_DISCORDANT:
        raise UserError(
            f"a difference of {100 * abs(difference):g} points at {100 * discordant:g} % discordant pairs needs about "
            f"{rough:,.0f} problems, more than can be planned for; name a larger difference"
        )
    top = math.ceil(top)
    values = conditional(_range(top, discordant)[1], share, alpha)
    # From m on, no number of discordant problems has less power than floor[m]. Its mean rises with the problems.
    floor = np.minimum.accumulate(values[::-1])[::-1]
    found = smallest(lambda n: _mean_over_pairs(floor, n, discordant) >= target, 1, top)
    while found > 1:
        first = max(1, found - _AT_ONCE)
        low = np.flatnonzero(_means_over_pairs(values, first, found - 1, discordant) < target)
        if len(low):
            return first + int(low[-1]) + 1
        found = first
    return found


def detectable(problems: int, discordant: float, target: float = 0.8, alpha: float = 0.05) -> float | None:
    """Return the smallest difference that the test finds with the wanted power; None if it can find none.

    For a difference above ``discordant``, the discordant share is taken to be the difference.

    Args:
        problems: as in `power`.
        discordant: as in `power`; 0 is allowed, for two models that never differed.
        target: wanted power, between 0 and 1.
        alpha: as in `power`.

    Returns:
        The difference as a fraction, a multiple of 1e-5.

    Raises:
        UserError: if an argument is out of range, or the plan is too large to compute.
    """
    _check_target(target)
    if discordant < 0:
        raise UserError(f"{100 * discordant:g} % discordant pairs is not between 0 and 100")

    def seen(step: int) -> bool:
        return power(problems, step / 1e5, max(discordant, step / 1e5), alpha) >= target

    # A larger share of discordant problems cannot be computed, and shows smaller differences than that share.
    most = max(discordant, min(1.0, MOST_DISCORDANT / max(problems, 1)))
    top = int(1e5 * most)
    return smallest(seen, 1, top) / 1e5 if seen(top) else None


def smallest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Return the smallest number from ``low`` to ``high`` that meets a monotone condition; ``high`` must meet it."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _check_target(target: float) -> None:
    if not 0 < target < 1:
        raise UserError(f"a power of {100 * target:g} % is not between 0 and 100")


def _check(difference: float, discordant: float, alpha: float) -> None:
    if not -1 <= difference <= 1:
        raise UserError(f"a difference of {100 * difference:g} points is not between 0 and 100")
    if not 0 < discordant <= 1:
        raise UserError(f"{100 * discordant:g} % discordant pairs is not above 0 and at most 100")
    if abs(difference) > discordant:
        raise UserError(
            f"{100 * discordant:g} % discordant pairs cannot give a difference of {100 * abs(difference):g} points, "
            "which needs at least as many problems that one model alone gets right; pass a larger share"
        )
    if not _LEAST_ALPHA <= alpha < 1:
        raise UserError(f"a level of {100 * alpha:g} % is not between {100 * _LEAST_ALPHA:g} and 100")
