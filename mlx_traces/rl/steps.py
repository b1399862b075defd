"""Process supervision: credit for single steps of a completion, and the tokens that get it.

A reward may give values to spans of a completion (`records.Stepped`), for example 1 to a true equation and 0 to a false
one. A step's credit is its value minus the mean over its group's steps of the same kind. A token that belongs to two
steps has the credit of both. With ``overlong: mask`` GRPO leaves out only the tokens of a cut-off completion: its steps
count in these means, as its reward counts in the group's. PPO leaves out the whole completion.

- ``local``: each token of a step has the step's credit. No other token has it, so it teaches which steps to write
  rather than how many.
- ``cumulative``: a token has the sum of the credits of all steps that end at it or later (arXiv 2402.03300, section
  4.1.3).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mlx_traces.engine.offsets import token_offsets
from mlx_traces.engine.thinking import Pieces
from mlx_traces.evaluation.completion import Completion
from mlx_traces.models.loading import LoadedModel

POSITIONS = 5  # each of a completion's first steps has its own metric; later ones share one
EPS = 1e-4  # added to a standard deviation, as in `losses.group_advantages`


class Step(NamedTuple):
    """A span of a completion's text, by characters ``start`` to ``end`` and tokens ``first`` to ``stop``, exclusive."""

    kind: str
    start: int
    end: int
    value: float
    first: int
    stop: int


Located = tuple[Step, ...]  # the steps of a completion, in the order of the text


def located(loaded: LoadedModel, completions: Sequence[Completion], steps: Sequence[Sequence]) -> list[Located]:
    """Find the tokens of steps.

    Args:
        loaded: the model that sampled.
        completions: its completions.
        steps: for each completion, rows of kind, start, end and value, in characters of the assistant's whole turn.

    Returns:
        For each completion, its steps in characters and tokens of the completion alone. The part of a step that the
        prompt already held is left out, and so is a step without tokens.
    """
    found, pieces = [], Pieces(loaded.tokenizer)
    for completion, own in zip(completions, steps, strict=True):
        places = []
        if own:
            rollout, before = completion.rollout, len(completion.opened)
            offsets = token_offsets(loaded, rollout.completion_ids, rollout.text, pieces, begun=bool(completion.opened))
            starts, ends = offsets.T
            for kind, start, end, value in own:
                start, end = max(0, start - before), end - before
                first, stop = int(np.searchsorted(ends, start, "right")), int(np.searchsorted(starts, end, "left"))
                if first < stop and start < end:
                    places.append(Step(kind, start, end, value, first, stop))
        found.append(tuple(sorted(places, key=lambda step: (step.start, step.end, step.kind))))
    return found


def credits_of(group: Sequence[Located], scales: Mapping[str, float] | None = None) -> list[list[float]]:
    """Return the credit of each step: its value minus the mean of its kind in the group, in float64.

    Args:
        group: the steps of each completion.
        scales: divisor of each kind's credits; default: 1.
    """
    means = {}
    for kind, values in by_kind(group).items():
        means[kind] = values[0] if len(set(values)) == 1 else sum(values) / len(values)  # exactly 0 where all are alike
    return [[(step.value - means[step.kind]) / (scales or {}).get(step.kind, 1) for step in own] for own in group]


def deviations(group: Iterable[Located]) -> dict[str, float]:
    """Return the unbiased standard deviation of each kind's values, plus `EPS`."""
    return {
        kind: (float(np.std(values, ddof=1)) if len(values) > 1 else 0.0) + EPS
        for kind, values in by_kind(group).items()
    }


def by_kind(group: Iterable[Located]) -> dict[str, list[float]]:
    """Return the values of all steps of these completions, by kind."""
    values: dict[str, list[float]] = {}
    for own in group:
        for step in own:
            values.setdefault(step.kind, []).append(step.value)
    return values


def spread(own: Located, earned: Sequence[float], tokens: int) -> np.ndarray:
    """Return (T,) float64: for each token the sum of the credits of the steps that it belongs to (``local``)."""
    found = np.zeros(tokens)
    for step, value in zip(own, earned, strict=True):
        found[step.first : step.stop] += value
    return found


def at_ends(own: Located, earned: Sequence[float], tokens: int) -> np.ndarray:
    """Return (T,) float64: for each token the sum of the credits of the steps that end at it."""
    found = np.zeros(tokens)
    for step, value in zip(own, earned, strict=True):
        found[step.stop - 1] += value
    return found


def token_advantages(
    outcomes: Sequence[float],
    steps: Sequence[Sequence[Located]],
    tokens: Sequence[int],
    *,
    weight: float,
    supervision: str = "local",
    scale: str = "none",
) -> list[np.ndarray]:
    """Return each completion's advantages by token: the outcome's, plus ``weight`` times the steps' credits.

    Args:
        outcomes: (B,), the advantages of whole completions.
        steps: for each group the steps of its completions, B in all.
        tokens: (B,), the number of tokens of each completion.
        weight: of the steps' credits.
        supervision: ``local`` or ``cumulative``.
        scale: for ``cumulative``: divide the credits by the standard deviation of their kind in the group (``std``, as
            in the paper) or in the batch (``batch``), plus 1e-4; any other value: do not divide.

    Returns:
        B arrays, (T,) float32 each.
    """
    of_all = deviations(own for group in steps for own in group) if scale == "batch" else None
    found: list[np.ndarray] = []
    for group in steps:
        scales = None if supervision == "local" else deviations(group) if scale == "std" else of_all
        for own, earned in zip(group, credits_of(group, scales), strict=True):
            count = tokens[len(found)]
            if supervision == "local":
                credit = spread(own, earned, count)
            else:
                credit = at_ends(own, earned, count)[::-1].cumsum()[::-1]
            found.append((outcomes[len(found)] + weight * credit).astype(np.float32))
    return found


def differ(group: Iterable[Located]) -> bool:
    """Whether steps of one kind have different values in a group; if not, all credits are 0."""
    return any(len(set(values)) > 1 for values in by_kind(group).values())


def figures(completions: Sequence[Located]) -> dict[str, float]:
    """Return the mean value of each kind's steps, their number per completion, and the means by position."""
    row, count = {}, len(completions)
    for kind, values in sorted(by_kind(completions).items()):
        places: dict[str, list[float]] = {str(place): [] for place in [*range(1, POSITIONS + 1), "later"]}
        for own in completions:
            for place, step in enumerate((step for step in own if step.kind == kind), 1):
                places[str(place) if place <= POSITIONS else "later"].append(step.value)
        row |= {f"steps/{kind}": sum(values) / len(values), f"steps/{kind}_count": len(values) / count}
        row |= {f"steps/{kind}_{place}": sum(own) / len(own) for place, own in places.items() if own}
    return row
