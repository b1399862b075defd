"""Process supervision: values of single steps of a completion, and the tokens that earn them.

A reward may say of spans of a completion what each is worth (`records.Stepped`): an equation is true or false, a claim
holds or does not. A step's credit is its value minus the mean over its group's steps of the same kind. A token that
belongs to two steps has the credit of both.

- ``local``: each token of a step has the step's credit. Nothing else is credited with it, so it teaches which steps to
  write rather than how many.
- ``cumulative``: a token has the sum of the credits of all steps that end at it or later (arXiv 2402.03300, section
  4.1.3).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from mlx_traces.engine.offsets import pieces, token_offsets
from mlx_traces.errors import UserError
from mlx_traces.evaluation.completion import Completion
from mlx_traces.models.loading import LoadedModel
from mlx_traces.records import Stepped

POSITIONS = 5  # the first so many steps of a completion have metrics of their own; later ones share one
EPS = 1e-4  # added to a standard deviation, as in `losses.group_advantages`


class Step(NamedTuple):
    """A span of a completion's text, by characters ``start`` to ``end`` and tokens ``first`` to ``stop``, exclusive."""

    kind: str
    start: int
    end: int
    value: float
    first: int
    stop: int


Located = tuple[Step, ...]  # the steps of a completion, as they follow each other


def checked(name: str, stepped: Stepped, length: int, number: Callable[[Any], float]) -> Stepped:
    """Return what a reward returned, each kind's steps in their order.

    Args:
        name: of the reward, for messages.
        stepped: what it returned.
        length: of the completion, in characters.
        number: returns a finite float or raises UserError.

    Raises:
        UserError: naming the reward, for a span that is not (start, end, value), is empty, is not within the
            completion or overlaps with another one of its kind; for a value that is not a finite number; for a kind
            whose name is no name.
    """
    if not isinstance(stepped.steps, Mapping):
        raise UserError(f"reward {name}: its steps are a {type(stepped.steps).__name__}, not a dict of spans by kind")
    found = {}
    for kind, spans in stepped.steps.items():
        if not isinstance(kind, str) or not kind.replace("_", "").replace("-", "").isalnum() or len(kind) > 40:
            raise UserError(f"reward {name}: {str(kind)[:40]!r} is not the name of a kind of steps; use letters and _")
        if not isinstance(spans, Sequence):
            what = f"an {type(spans).__name__}" if type(spans) is int else f"a {type(spans).__name__}"
            raise UserError(f"reward {name}: the steps of {kind!r} are {what}, not a list of spans")
        own = []
        for span in spans:
            try:
                start, end, value = span
                start, end = start.__index__(), end.__index__()
            except (TypeError, ValueError, AttributeError):
                raise UserError(f"reward {name}: {str(span)[:60]} of {kind!r} is not (start, end, value)") from None
            if not 0 <= start < end <= length:
                where = f"({start}, {end}) of {kind!r}"
                raise UserError(f"reward {name}: step {where} is not within the completion's {length} characters")
            own.append((start, end, number(value)))
        own.sort()
        for one, other in pairwise(own):
            if one[1] > other[0]:
                raise UserError(f"reward {name}: steps {one[:2]} and {other[:2]} of {kind!r} overlap")
        found[kind] = own
    return Stepped(None if stepped.value is None else number(stepped.value), found)


def located(loaded: LoadedModel, completions: Sequence[Completion], steps: Sequence[Sequence]) -> list[Located]:
    """Find the tokens of steps.

    Args:
        loaded: the model that sampled.
        completions: of it.
        steps: for each completion rows of kind, start, end and value, in characters of the assistant's whole turn.

    Returns:
        For each completion its steps, in characters and tokens of what was sampled. What the prompt already held, and
        what no token wrote, is left out.
    """
    ids = {token for one, own in zip(completions, steps, strict=True) if own for token in one.rollout.completion_ids}
    known = pieces(loaded.tokenizer, ids) if ids else {}
    found = []
    for completion, own in zip(completions, steps, strict=True):
        places = []
        if own:
            rollout, before = completion.rollout, len(completion.opened)
            starts, ends = token_offsets(loaded, rollout.completion_ids, rollout.text, known).T
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
        scales: divide a kind's credits by this.
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
    """Return the values of all steps of some completions by kind."""
    values: dict[str, list[float]] = {}
    for own in group:
        for step in own:
            values.setdefault(step.kind, []).append(step.value)
    return values


def spread(own: Located, earned: Sequence[float], tokens: int) -> np.ndarray:
    """Return (T,) float64, at each token the sum of what the steps have earned that it belongs to (``local``)."""
    found = np.zeros(tokens)
    for step, value in zip(own, earned, strict=True):
        found[step.first : step.stop] += value
    return found


def at_ends(own: Located, earned: Sequence[float], tokens: int) -> np.ndarray:
    """Return (T,) float64, at each token the sum of what the steps have earned whose last token it is."""
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
    """Return each completion's advantages by token: the outcome's, plus ``weight`` times what its steps earn there.

    Args:
        outcomes: (B,), the advantages of whole completions.
        steps: of the completions, group by group, B in all.
        tokens: (B,), the number of each one's tokens.
        weight: of the steps' credits.
        supervision: ``local`` or ``cumulative``.
        scale: for ``cumulative``: divide the credits by the standard deviation of their kind in the group (``std``, as
            in the paper) or in the batch (``batch``), plus 1e-4; else not.

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
    """Return the mean value of each kind's steps, how many a completion has, and the means by their position."""
    row, count = {}, len(completions)
    for kind, values in sorted(by_kind(completions).items()):
        places: dict[str, list[float]] = {str(place): [] for place in [*range(1, POSITIONS + 1), "later"]}
        for own in completions:
            for place, step in enumerate((step for step in own if step.kind == kind), 1):
                places[str(place) if place <= POSITIONS else "later"].append(step.value)
        row |= {f"steps/{kind}": sum(values) / len(values), f"steps/{kind}_count": len(values) / count}
        row |= {f"steps/{kind}_{place}": sum(own) / len(own) for place, own in places.items() if own}
    return row
