"""Accuracy against the budget of a thought: curves of a model's runs, and where more thinking stops paying. No MLX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from mlx_traces.evaluation import comparison, stats
from mlx_traces.evaluation.comparison import Run
from mlx_traces.evaluation.pairs import Pair, pairs
from mlx_traces.text import clean, interval, p_relation, percent

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Point:
    """One run of a curve: its budget (None: no bound) and its accuracy with Wilson's 95 % interval.

    ``tokens`` is the mean length of a completion, its thought included (None if a server did not count); ``forced`` is
    the share of completions whose thought was closed or kept open, ``cut_off`` of those that reached ``max_tokens``,
    which bounds what is not thought, and without a budget thought and answer together.
    """

    budget: int | None
    accuracy: float
    low: float
    high: float
    tokens: float | None
    forced: float
    max_tokens: int | None = None
    cut_off: float = 0.0


@dataclass(frozen=True)
class Curve:
    """A model's runs in one prompt, the smallest budget first, on the same problems.

    ``pairs`` are all pairs of them, the larger budget as ``a``; Holm's adjustment is over these.
    """

    name: str
    points: list[Point]
    pairs: list[Pair]


def curves(runs: Sequence[Run]) -> list[Curve]:
    """Return a curve for each model and prompt that has runs with different budgets.

    Of several runs with one budget the first is on the first curve, the second on a second one, and so on.

    Raises:
        UserError: if the problems differ, or a run has no or uneven samples.
    """
    groups: dict[tuple[Any, ...], dict[int | None, Run]] = {}
    for run in runs:
        unbounded, budget = {**run.result, "think_tokens": None}, run.result.get("think_tokens")
        key = (unbounded["model"], unbounded.get("adapter"), comparison.prompt_of(unbounded))
        number = next(n for n in count(1) if budget not in groups.get((*key, n), {}))
        groups.setdefault((*key, number), {})[budget] = run
    groups = {key: group for key, group in groups.items() if len(group) > 1}
    short = Counter((comparison.model_name(model, adapter), *rest) for model, adapter, *rest in groups)
    found = []
    for (model, adapter, prompt, number), group in groups.items():
        name = comparison.model_name(model, adapter)
        if short[name, prompt, number] > 1:
            name = clean("+".join(filter(None, (model, adapter))))
        ordered = [group[budget] for budget in sorted(group, key=lambda budget: (budget is None, budget))]
        name = f"{name}_{clean(prompt)}" + (f" ({number})" if number > 1 else "")
        found.append(Curve(name, [_point(run) for run in ordered], pairs(ordered)))
    return found


def _point(run: Run) -> Point:
    share, _ = comparison.accuracy_of(run)
    tokens = [row["tokens"] for row in run.samples]
    return Point(
        run.result.get("think_tokens"),
        share["accuracy"],
        share["ci_low"],
        share["ci_high"],
        None if None in tokens else sum(tokens) / len(tokens),
        sum(bool(row.get("forced")) for row in run.samples) / len(run.samples),
        run.result.get("max_tokens"),
        comparison.cut_off(run),
    )


def budget_name(budget: int | None) -> str:
    """Return a budget as text."""
    return "no budget" if budget is None else f"{budget:,} tokens"


def sentence(curve: Curve) -> str:
    """State where more thinking stops paying, and no more than the tests allow.

    That is the smallest budget that no larger one beats significantly (Holm's adjustment over all pairs of the curve).
    For the most accurate larger budget the sentence gives the largest gain that its interval leaves open. A second one
    says how a run without a budget is bounded.
    """
    last = curve.points[-1]
    together = ""
    if last.budget is None and last.max_tokens is not None:
        together = (
            f" Without a budget, max_tokens ({last.max_tokens:,.0f}) bounds thought and answer together: "
            f"{percent(last.cut_off)} % of the completions were cut off there."
        )
    size = len(curve.points)
    places = [(low, high) for low in range(size) for high in range(low + 1, size)]
    pair = dict(zip(places, curve.pairs, strict=True))
    names = [budget_name(point.budget) for point in curve.points]

    def significant(low: int, high: int) -> bool:
        return pair[low, high].p_holm < stats.LEVEL

    def gains(low: int) -> list[int]:
        return [high for high in range(low + 1, size) if significant(low, high) and pair[low, high].diff > 0]

    def evidence(low: int, high: int) -> str:
        one = pair[low, high]
        after = f" after Holm over {one.family} pairs" if one.family > 1 else ""
        change = f"{percent(one.diff, signed=True)} points {interval(one.low, one.high)}"
        return f"{change} on {one.problems:,} problems, p {p_relation(one.p_holm)}{after}"

    stop = next(low for low in range(size) if not gains(low))
    text = f"{curve.name}: no thinking beyond {names[0]} is shown to pay"
    if stop:
        better = gains(stop - 1)
        most = stop if stop in better else max(better, key=lambda high: curve.points[high].accuracy)
        text = f"{curve.name}: thinking beyond {names[stop - 1]} pays, {names[most]} {evidence(stop - 1, most)}"
    if stop == size - 1:
        return f"{text}; {names[stop]} is the largest budget that was tried.{together}"
    best = max(range(stop + 1, size), key=lambda high: curve.points[high].accuracy)
    room = max(pair[stop, best].high, pair[stop, best].least_reach)
    text += f"; beyond {names[stop]} no gain is shown" if stop else ""
    text += f": {names[best]} {evidence(stop, best)}; a gain of up to {percent(room)} points is compatible."
    worse = [high for high in range(stop + 1, size) if significant(stop, high) and pair[stop, high].diff < 0]
    text += "".join(f" With {names[high]} it is right less often ({evidence(stop, high)})." for high in worse)
    return text + together


def frame(found: Sequence[Curve]) -> pd.DataFrame:
    """Return the points of curves as rows: ``curve``, then the fields of a `Point`."""
    return comparison.frame([{"curve": curve.name, **vars(point)} for curve in found for point in curve.points])
