"""Curves of a run's metrics, finished or not. No MLX."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from mlx_traces.evaluation import stats
from mlx_traces.readers import is_number
from mlx_traces.report.run_view import EVALUATION, FINE_TUNING, Record, whole
from mlx_traces.text import clean, number


@dataclass(frozen=True)
class Metric:
    """The display of one key of ``metrics.jsonl``.

    ``share``: a fraction, shown in percent. ``better``: 1 if higher is better, -1 if lower is, 0 for neither.
    """

    key: str
    title: str
    share: bool = False
    better: int = 0


METRICS = (
    Metric("valid/accuracy", "Held-out accuracy", share=True, better=1),
    Metric("valid/accuracy_strict", "Held-out accuracy, strict", share=True, better=1),
    Metric("valid/loss", "Held-out loss, nats a token", better=-1),
    Metric("reward/mean", "Reward", better=1),
    Metric("steps/equations", "True equations", share=True, better=1),
    Metric("steps/claims", "True claims", share=True, better=1),
    Metric("steps/numbers", "Equations of the given numbers", share=True, better=1),
    Metric("loss", "Loss"),
    Metric("rollout/length", "Tokens a completion"),
    Metric("rollout/finished", "Finished completions", share=True, better=1),
    Metric("rollout/forced", "Thoughts closed or kept open", share=True),
    Metric("policy/entropy", "Entropy, nats a token"),
    Metric("policy/kl_ref", "KL to the reference"),
    Metric("policy/kl_old", "KL of the step's updates"),
    Metric("policy/kl_sampler", "KL to the sampler"),
    Metric("policy/clip_fraction", "Clipped ratios", share=True),
    Metric("rollout/zero_std_groups", "Groups of equal reward", share=True, better=-1),
    Metric("valid/finished", "Held-out, finished", share=True, better=1),
    Metric("valid/length", "Held-out, tokens an answer"),
    Metric("optim/grad_norm", "Norm of the gradient"),
    Metric("optim/lr", "Learning rate"),
    Metric("tokens_per_second", "Tokens a second", better=1),
    Metric("time/step", "Seconds a step", better=-1),
    Metric("memory/peak_gb", "Peak memory, GB"),
)
TITLES = {
    "reward/": "Reward: ",
    "steps/": "Steps: ",
    "policy/": "Policy: ",
    "valid/": "Held-out ",
    "value/": "Value: ",
    "time/": "Seconds: ",
}
ASIDE = {"step", "tokens", "time/total", "optim/updates", "rollout/groups", "time/sample", "time/update", "time/reward"}


@dataclass(frozen=True)
class Curve:
    """The values of a metric over steps; ``low`` and ``high`` are 95 % intervals, empty if there are none."""

    metric: Metric
    steps: list[float]
    values: list[float]
    low: list[float]
    high: list[float]

    @property
    def constant(self) -> bool:
        """Whether all values are equal, so that a curve shows nothing."""
        return len(self.values) > 1 and len(set(self.values)) == 1

    @property
    def best(self) -> float | None:
        """The best value; None if neither higher nor lower is better."""
        if not self.metric.better:
            return None
        return max(self.values) if self.metric.better > 0 else min(self.values)

    def text(self, value: float | None) -> str:
        """Format a value of this metric."""
        if value is None:
            return "–"
        return f"{100 * value:.1f} %" if self.metric.share else number(value)


def curves(record: Record) -> list[Curve]:
    """Return a run's curves in the order of ``METRICS``, other metrics last.

    An evaluation has one curve: the accuracy so far, over its samples.
    """
    if record.kind == EVALUATION:
        correct = list(accumulate(bool(row["correct"]) for row in record.samples))
        values = [right / count for count, right in enumerate(correct, 1)]
        metric = Metric("accuracy", "Correct so far", share=True)
        return [Curve(metric, list(range(1, len(values) + 1)), values, [], [])] if values else []
    rows = [_derived(row) for row in record.metrics]
    metrics = {metric.key: metric for metric in METRICS}
    if record.kind == FINE_TUNING:  # for a policy's loss, neither higher nor lower is better
        metrics["loss"] = replace(metrics["loss"], better=-1)
    for key in dict.fromkeys(key for row in rows for key in row if key not in ASIDE):
        prefix = next((prefix for prefix in TITLES if key.startswith(prefix)), "")
        title = TITLES.get(prefix, "") + key.removeprefix(prefix).replace("_", " ")
        metrics.setdefault(key, Metric(key, clean(title)))
    found = []
    for metric in metrics.values():
        points = [(row["step"], float(row[metric.key])) for row in rows if is_number(row.get(metric.key))]
        if points:
            found.append(Curve(metric, [step for step, _ in points], [value for _, value in points], [], []))
    mean = next((curve.values for curve in found if curve.metric.key == "reward/mean"), None)
    alone = [curve for curve in found if curve.metric.key.startswith("reward/") and curve.values == mean]
    return [_with_intervals(curve, record) for curve in found if curve not in alone[1:]]


def _derived(row: dict[str, Any]) -> dict[str, Any]:
    """Add tokens per second and seconds per step, if the line has the figures for them."""
    parts = [row.get(key) for key in ("time/sample", "time/update")]
    if not all(map(is_number, parts)):
        return row
    seconds = sum(parts) + (row["time/reward"] if is_number(row.get("time/reward")) else 0)
    speed = {"tokens_per_second": row["tokens"] / sum(parts)} if is_number(row.get("tokens")) and sum(parts) else {}
    return {"time/step": seconds, **speed, **row}


def _with_intervals(curve: Curve, record: Record) -> Curve:
    """Add Wilson intervals to held-out accuracies, if the number of problems is known."""
    held_out = record.settings.get("evaluate")
    count = whole(held_out.get("limit")) if isinstance(held_out, dict) else None
    if curve.metric.key != "valid/accuracy" or not count:
        return curve
    correct = [value * count for value in curve.values]
    if any(abs(value - round(value)) > 1e-6 or not 0 <= value <= count for value in correct):
        return curve  # the validation had fewer problems than the limit
    ends = [stats.wilson(round(value), count) for value in correct]
    return replace(curve, low=[low for low, _ in ends], high=[high for _, high in ends])
