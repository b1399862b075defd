"""Findings of a study: a summary, every pair of runs tested, a sentence for each pair, the cost of fewer bits. No MLX.

Frames hold fractions; texts and rendered tables hold percent and points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from mlx_traces.evaluation import comparison, stats
from mlx_traces.evaluation.comparison import Run
from mlx_traces.text import interval, p_relation, percent, times

if TYPE_CHECKING:
    import pandas as pd


CUT_OFF = 0.02  # share of answers cut off at the token cap from which a sentence mentions it


@dataclass(frozen=True)
class Pair:
    """Two runs of a study on the same problems.

    ``wins`` are problems that ``a`` answered right and ``b`` did not (with several samples: right more often),
    ``losses`` the reverse. ``diff`` is a's accuracy minus b's, ``low`` and ``high`` its 95 % interval (paired
    bootstrap), all fractions. ``ratio`` is a's accuracy divided by b's, ``ratio_low`` and ``ratio_high`` its 95 %
    interval (paired bootstrap); NaN if unknown or both are 0. ``clusters``, if problems form clusters, is their number.
    ``p_holm`` is adjusted over the ``family`` pairs tested together. ``cut_a`` and ``cut_b`` are the shares of answers
    that were cut off at the token cap.
    """

    a: str
    b: str
    problems: int
    wins: int
    losses: int
    diff: float
    low: float
    high: float
    p: float
    p_holm: float
    family: int
    cut_a: float = 0.0
    cut_b: float = 0.0
    ratio: float = math.nan
    ratio_low: float = math.nan
    ratio_high: float = math.nan
    clusters: int | None = None

    @property
    def least_reach(self) -> float:
        """The upper end of Wilson's interval of 0 in n problems or clusters.

        A difference up to there is compatible even with runs that never disagree, whose bootstrap has no width.
        """
        return stats.wilson(0, self.clusters or self.problems)[1]

    def swapped(self) -> Pair:
        """Return the same pair seen from ``b``."""
        turned = {"a": self.b, "b": self.a, "wins": self.losses, "losses": self.wins}
        ends = {"diff": -self.diff, "low": -self.high, "high": -self.low}
        ratios = {"ratio": self.ratio, "ratio_low": self.ratio_high, "ratio_high": self.ratio_low}
        ratios = {name: _inverse(value) for name, value in ratios.items()}
        return replace(self, **turned, **ends, **ratios, cut_a=self.cut_b, cut_b=self.cut_a)


def _inverse(ratio: float) -> float:
    return ratio if math.isnan(ratio) else 1 / ratio if ratio else math.inf


def summary(runs: Sequence[Run]) -> pd.DataFrame:
    """Count the correct and incorrect answers of each run.

    Returns:
        One row a run: ``model`` (its label), ``total_cases``, ``success_rate``, ``correct``, ``incorrect``,
        ``ci_low``, ``ci_high``, as in `comparison.compare_runs`. Cases are samples where a problem has several.
    """
    rows = []
    for run, name in zip(runs, comparison.labels(runs), strict=True):
        figures, _ = comparison.accuracy_of(run)
        total, correct = figures["total_questions"], figures["correct_count"]
        rows.append(
            {
                "model": name,
                "total_cases": total,
                "success_rate": figures["accuracy"],
                "correct": correct,
                "incorrect": total - correct,
                "ci_low": figures["ci_low"],
                "ci_high": figures["ci_high"],
            }
        )
    return comparison.frame(rows)


def pairs(runs: Sequence[Run], baseline: int | None = None) -> list[Pair]:
    """Test every pair of runs, or each run with the baseline, on the problems they share.

    The p-value is that of McNemar's exact test (with several samples a problem, of the exact sign-flip test; of runs
    that stopped early, anytime-valid). Holm's adjustment is over all pairs returned. ``diff`` is the accuracy of the
    later run minus that of the earlier one, or of the baseline.

    Args:
        runs: runs over the same problems.
        baseline: index of the run that all others are paired with; None: every pair.

    Raises:
        UserError: if the problems differ, or a run has no or uneven samples.
    """
    names = comparison.labels(runs)
    indices = range(len(runs))
    chosen = combinations(indices, 2) if baseline is None else ((baseline, i) for i in indices if i != baseline)
    tested = [(i, j, comparison.paired(runs[j], runs[i])) for i, j in chosen]
    adjusted = stats.holm([figures["p_value"] for _, _, figures in tested])
    return [
        Pair(
            a=names[j],
            b=names[i],
            problems=figures["problems"],
            wins=figures["wins"],
            losses=figures["losses"],
            diff=figures["diff"],
            low=figures["diff_low"],
            high=figures["diff_high"],
            p=figures["p_value"],
            p_holm=p_holm,
            family=len(tested),
            cut_a=comparison.cut_off(runs[j]),
            cut_b=comparison.cut_off(runs[i]),
            ratio=figures["ratio"],
            ratio_low=figures["ratio_low"],
            ratio_high=figures["ratio_high"],
            clusters=figures["clusters"],
        )
        for (i, j, figures), p_holm in zip(tested, adjusted, strict=True)
    ]


def sentence(pair: Pair) -> str:
    """State what a pair shows, and no more.

    Either one of the two is right more often after Holm's adjustment, or no difference is shown. That does not
    mean that they are equal, so the sentence gives the largest difference that the data leave open: the end of the 95 %
    interval farther from zero, and at least `Pair.least_reach`.
    """
    if pair.diff < 0:
        pair = pair.swapped()
    adjusted = f"; after Holm over {pair.family} pairs {p_relation(pair.p_holm)}" if pair.family > 1 else ""
    tested = f"p {p_relation(pair.p)}{adjusted}"
    points = f"{percent(pair.diff, signed=True)} points {interval(pair.low, pair.high)}"
    change, counts = f"{points} on {pair.problems:,} problems", f"{pair.wins:,} won and {pair.losses:,} lost"
    if pair.p_holm < stats.LEVEL:
        if math.isfinite(pair.ratio):
            often = f"{times(pair.ratio)} times as often [{times(pair.ratio_low)}, {times(pair.ratio_high)}]"
            change = f"{points}, {often}, on {pair.problems:,} problems"
        text = f"{pair.a} is right more often than {pair.b}: {change}, {counts} ({tested})."
    else:
        reach = max(abs(pair.low), abs(pair.high), pair.least_reach)
        seen = f"{change}, {counts} ({tested})"
        if pair.wins == pair.losses == 0:
            seen = f"they are right on the same ones of {pair.problems:,} problems"
        by = "by the test" if pair.p >= stats.LEVEL else "after Holm"  # what the interval alone would exclude
        either = "either way is compatible" if pair.low <= 0 else f"is compatible; {by}, none is compatible too"
        open_ = f"a difference of up to {percent(reach)} points {either}"
        text = f"No difference shown between {pair.a} and {pair.b}: {seen}; {open_}."
    cut = [(pair.a, pair.cut_a), (pair.b, pair.cut_b)]
    cut = [f"{percent(share)} % of {name}" for name, share in cut if share >= CUT_OFF]
    return f"{text} Cut off at the token cap: {' and '.join(cut)}." if cut else text


def abstract(runs: Sequence[Run], found: Sequence[Pair], protocol: str) -> str:
    """Summarize runs and the tests of their pairs in three sentences.

    Args:
        runs: runs over the same problems.
        found: the pairs of them that were tested.
        protocol: task, extractor, token cap and decoding, in words (`tables.protocol_line`).
    """
    rows = sorted(summary(runs).to_dict("records"), key=lambda row: row["success_rate"])
    problems = len(comparison.outcomes_of(runs[0]))
    text = f"{len(runs):,} {'run' if len(runs) == 1 else 'runs'} on the same {problems:,} problems ({protocol})."
    ends = [
        f"{percent(row['success_rate'])} % {interval(row['ci_low'], row['ci_high'])} ({row['model']})"
        for row in (rows[0], rows[-1])
    ]
    text += f" Success rates are from {ends[0]} to {ends[1]}." if len(runs) > 1 else f" The success rate is {ends[0]}."
    if not found:
        return text
    differ = sum(pair.p_holm < stats.LEVEL for pair in found)
    if not differ:
        where = f"any of the {len(found)} pairs" if len(found) > 1 else "the one pair"
        return f"{text} No difference is shown in {where} tested (paired test, no p after Holm below {stats.LEVEL:g})."
    of = f"Of {len(found)} pairs tested" if len(found) > 1 else "Of the one pair tested"
    shown = f"{differ} {'differs' if differ == 1 else 'differ'} (paired test, p after Holm below {stats.LEVEL:g})"
    open_ = f"; in the other {len(found) - differ} no difference is shown" if 0 < differ < len(found) else ""
    return f"{text} {of}, {shown}{open_}."


def key_points(runs: Sequence[Run], found: Sequence[Pair], most: int = 10) -> list[str]:
    """Return the sentences on the pairs that differ in one thing: first the prompt, then the model; at most ``most``.

    If there are more, the last point counts them.
    """
    kinds = {
        name: (run.result["model"], run.result.get("adapter"), comparison.prompt_of(run.result))
        for name, run in zip(comparison.labels(runs), runs, strict=True)
    }
    same = [[x == y for x, y in zip(kinds[pair.a], kinds[pair.b], strict=True)] for pair in found]
    prompts = [pair for pair, (model, adapter, _) in zip(found, same, strict=True) if model and adapter]
    models = [pair for pair, (*_, prompt) in zip(found, same, strict=True) if prompt and pair not in prompts]
    one_thing = [*prompts, *models]
    chosen = one_thing or list(found)
    left, which = len(chosen) - most, " that differ in one thing" if one_thing else ""
    more = [f"{left} more pairs{which} are in the table of pairs."] if left > 0 else []
    return [*map(sentence, chosen[:most]), *more]


def bits_frame(runs: Sequence[Run], about: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Tabulate what fewer bits cost in accuracy and save in memory and time.

    Args:
        runs: runs of one model in one prompt; the one with the most bits is the baseline.
        about: for each run ``bits``, ``group_size``, ``bits_per_weight``, ``file_mb`` (1e6 bytes of weights on disk)
            and ``ran_as`` (the weights and their type that computed the answers).

    Returns:
        One row a run, in their order: ``label``, the entries of ``about``, ``peak_memory_gb``, ``tokens_per_second``,
        ``accuracy``, ``correct_count``, ``total_questions``, ``ci_low``, ``ci_high``, and ``diff``, ``diff_low``,
        ``diff_high``, ``p_value``, ``p_holm`` against the first row with the most bits; Holm is over these rows.
    """
    most = max(range(len(runs)), key=lambda i: (about[i]["bits"] or 0, -i))
    compared = comparison.compare_runs(runs, most).to_dict("records")
    kept = ("accuracy", "correct_count", "total_questions", "ci_low", "ci_high")
    tested = ("diff", "diff_low", "diff_high", "p_value", "p_holm")
    return comparison.frame(
        [
            {
                "label": row["label"],
                **facts,
                "peak_memory_gb": run.result.get("peak_memory_gb"),
                "tokens_per_second": row["tokens_per_second"],
                **{key: row[key] for key in (*kept, *tested)},
            }
            for run, row, facts in zip(runs, compared, about, strict=True)
        ]
    )
