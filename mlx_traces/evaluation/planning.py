"""``mlx-traces plan eval``: problems, time and tokens of a comparison, and the differences that runs could detect.

No MLX.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_traces.errors import UserError
from mlx_traces.evaluation import comparison, stats
from mlx_traces.evaluation import power as power_of
from mlx_traces.evaluation.comparison import Run
from mlx_traces.readers import is_number
from mlx_traces.text import clean, duration

SHARES = (10.0, 15.0, 25.0)  # percent of discordant pairs to plan with if none is given


@dataclass(frozen=True)
class Size:
    """A plan's figures at one share of discordant pairs, in percent; differences are in points.

    ``needed`` is the number of problems for the difference, None without one. ``detectable`` and ``even`` are the
    smallest differences that the test finds on the given problems with the wanted power, and half of the time; None
    without a number of problems, or if it can find none.
    """

    discordant: float
    needed: int | None = None
    detectable: float | None = None
    even: float | None = None


@dataclass(frozen=True)
class EvalPlan:
    """A plan: its sizes by share of discordant pairs, and figures of finished runs.

    ``problems`` is the number of available problems: given, or that of the runs. ``seconds`` and ``tokens`` are
    estimates of all runs together for the largest number of problems needed; None without runs or where a run lacks
    them. ``seen`` are wins, losses and problems of two runs, ``span`` the problems needed at the ends of Wilson's
    interval of their discordant share.
    """

    difference: float | None
    power: float
    alpha: float
    holm: int
    problems: int | None
    sizes: list[Size]
    seconds: float | None = None
    tokens: float | None = None
    seen: tuple[int, int, int] | None = None
    span: tuple[int, int] | None = None

    def lines(self) -> list[str]:
        """Return the plan as lines of text."""
        family = f" after Holm over {self.holm} comparisons" if self.holm > 1 else ""
        test = f"exact McNemar test, {self.alpha:g} % level{family}"
        found = []
        if self.difference is not None:
            found.append(f"to see a difference of {self.difference:g} points {self.power:g} % of the time ({test}):")
            found += [f"  {size.needed:,} problems at {size.discordant:.3g} % discordant pairs" for size in self.sizes]
        if self.span:
            low, high = self.span
            found.append(f"  {low:,} to {high:,} within the 95 % interval of the runs' share of discordant pairs")
        if self.seconds is not None:
            tokens = "" if self.tokens is None else f" and {self.tokens:,.0f} tokens"
            most = "at most " if len(self.sizes) > 1 else ""
            found.append(f"  {most}{duration(self.seconds)}{tokens} at the speed of the runs, one after the other")
        if self.problems is not None:
            wins, losses, total = self.seen or (0, 0, 0)
            runs = f", {wins:,} won and {losses:,} lost" if total == self.problems else f" ({test})"
            found.append(f"with {self.problems:,} problems{runs}:")
            found += [f"  at {size.discordant:.3g} % discordant pairs {self._missed(size)}" for size in self.sizes]
        return found

    def _missed(self, size: Size) -> str:
        if size.even is None:
            return "the test finds no difference"
        full = "" if size.detectable is None else f"{size.detectable:.1f} points {self.power:g} % of the time, "
        return f"the test finds {full}{size.even:.1f} points half of the time"


def plan_eval(
    *,
    difference: float | None = None,
    runs: Sequence[str | Path] = (),
    discordant: float | None = None,
    problems: int | None = None,
    power: float = 80.0,
    alpha: float = 5.0,
    holm: int = 1,
) -> EvalPlan:
    """Plan a paired comparison of two accuracies; ``mlx-traces plan eval`` from Python, with the names of its flags.

    Args:
        difference: the smallest difference that the test should find, in points.
        runs: one or two finished runs like the planned ones; they give time and tokens, two also the discordant share.
        discordant: percent of the problems that one of the two models alone gets right; default: that of two ``runs``,
            else several are tried.
        problems: the number of available problems; default: that of the ``runs``.
        power: chance in percent that the test finds the difference.
        alpha: level of the two-sided test, in percent.
        holm: number of comparisons that Holm's adjustment is over. Each is planned at ``alpha / holm``, the level of
            the adjustment's first step, so it has its power whatever the others show.

    Raises:
        UserError: if a number is out of range, if a run is not finished or has several completions a problem, or if the
            two runs have different problems.
    """
    if len(runs) > 2:
        raise UserError(f"--from takes one or two runs, not {len(runs)}")
    if holm < 1:
        raise UserError(f"--holm {holm}: must be 1 or more")
    stored = [comparison.read_run(path) for path in runs]
    for run in stored:
        if (samples := len(next(iter(comparison.outcomes_of(run).values())))) > 1:
            raise UserError(f"{clean(run.name)} has {samples} completions a problem; McNemar's test takes one")
    seen = _seen(stored) if len(stored) == 2 else None
    if stored and problems is None:
        problems = seen[2] if seen else len(stored[0].samples)
    if difference is not None and difference < 0:
        raise UserError(f"a difference of {difference:g} points is not between 0 and 100")
    if difference is None and problems is None:
        raise UserError("pass --difference to plan the number of problems, or --problems to plan the difference")
    if discordant is None and seen and seen[0] + seen[1] == 0:
        agree = f"the runs agree on all {seen[2]:,} problems"
        raise UserError(f"{agree}; pass --discordant, the percent on which two models will differ")
    shares = SHARES if discordant is None else (discordant,)
    if discordant is None and seen:
        shares = (100 * (seen[0] + seen[1]) / seen[2],)
    elif discordant is None and difference is not None:
        shares = tuple(share for share in SHARES if share >= abs(difference)) or (abs(difference),)
    wanted, level = power / 100, alpha / 100 / holm
    sizes = []
    for share in shares:
        try:
            sizes.append(_size(share, difference, problems, wanted, level))
        except UserError:  # a larger share takes more problems, perhaps more than can be planned for
            if not sizes:
                raise
    needed, span = max((size.needed for size in sizes if size.needed), default=None), None
    if needed is not None and seen and discordant is None:
        ends = stats.wilson(seen[0] + seen[1], seen[2])
        least = abs(difference or 0) / 100
        low, high = (power_of.problems_needed(least, max(end, least), wanted, level) for end in ends)
        span = (low, high)
    seconds = tokens = None
    if needed is not None and stored:
        seconds = _total(stored, "wall_seconds", needed)
        tokens = _total(stored, "mean_tokens", needed)
    return EvalPlan(difference, power, alpha, holm, problems, sizes, seconds, tokens, seen, span)


def _seen(runs: Sequence[Run]) -> tuple[int, int, int]:
    """Return the problems that the second run won from the first, those it lost, and all."""
    pair = comparison.paired(runs[1], runs[0])
    return pair["wins"], pair["losses"], pair["problems"]


def _size(share: float, difference: float | None, problems: int | None, wanted: float, level: float) -> Size:
    needed = None
    if difference is not None:
        needed = power_of.problems_needed(difference / 100, share / 100, wanted, level)
    if problems is None:
        return Size(share, needed)
    found = (power_of.detectable(problems, share / 100, target, level) for target in (wanted, 0.5))
    return Size(share, needed, *(None if one is None else 100 * one for one in found))


def _total(runs: Sequence[Run], key: str, problems: int) -> float | None:
    """Return the sum of a figure over the runs, scaled to ``problems``; None if a run lacks the figure."""
    each = [run.result.get(key) for run in runs]
    if not all(map(is_number, each)):
        return None
    sizes = [1 if key == "mean_tokens" else len(run.samples) for run in runs]
    return sum(value / size for value, size in zip(each, sizes, strict=True)) * problems
