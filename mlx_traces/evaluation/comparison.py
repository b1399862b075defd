"""Read stored runs, and compare runs on the same problems."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from mlx_traces.errors import UserError, unknown
from mlx_traces.evaluation import power, stats, variance
from mlx_traces.evaluation.anytime import anytime
from mlx_traces.evaluation.completion import at_k, rehead
from mlx_traces.evaluation.differences import OPTIONAL, SAMPLING
from mlx_traces.evaluation.differences import differences as provenance_differences
from mlx_traces.evaluation.differences import part as part_of
from mlx_traces.readers import is_number
from mlx_traces.records import EvalResult, strata_of
from mlx_traces.runtime.run_folder import existing
from mlx_traces.tasks import get_task, is_known
from mlx_traces.text import clean

if TYPE_CHECKING:
    import pandas as pd


def read_run(path: str | Path) -> Run:
    """Read a finished run folder.

    Raises:
        UserError: if it is not one, or has no result yet.
    """
    folder = existing(path, "result.json")
    known = fields(EvalResult)
    later = {one.name: one.default for one in known if one.default is not MISSING}
    result = later | (folder.result or {})
    missing = [one.name for one in known if one.name not in result]
    if missing:
        raise UserError(f"{path}: result.json lacks {', '.join(missing)}; evaluate it anew")
    samples = [interned(row) for row in folder.samples]
    return Run(folder.path.name, result, samples, folder.about, folders=(str(path),))


def interned(value: Any, depth: int = 2) -> Any:
    """Return a sample whose texts, except completions, are stored once for all samples and runs.

    Keys, ids, questions and prompts repeat from run to run; this halves the memory of twenty runs. Values nested deeper
    than ``depth`` objects stay as they are.
    """
    if type(value) is str:
        return sys.intern(value)
    if type(value) is not dict or not depth:
        return value
    return {
        sys.intern(key): inner if key == "completion" else interned(inner, depth - 1) for key, inner in value.items()
    }


def by_extractor(run: Run, extractor: str) -> Run:
    """Return a run with another of its extractors as the headline."""
    samples = [rehead(row, extractor) for row in run.samples]
    result = run.result | {"extractor": extractor}
    if extractor != run.result.get("extractor"):
        result |= at_k(samples, partial(_votes, result))
    return replace(run, result=result, samples=samples)


JSON_KEYS = (
    "model",
    "adapter",
    "prompt",
    "accuracy",
    "correct_count",
    "total_questions",
    "ci_low",
    "ci_high",
    "diff",
    "diff_low",
    "diff_high",
    "p_value",
    "p_holm",
    "tokens_per_answer",
    "tokens_per_second",
)
GREW = (  # below a table of stored runs that grow, tested at a fixed number of problems
    "Some of these runs grow block by block. If their results decided where they ended, as with --stop-when-decided, "
    "these p-values are too small and the intervals of differences too narrow; that command and, of the folder of its "
    "--out, `mlx-traces report` print valid ones."
)
# Settings of run.json that the trainings of one recipe share; None where a run does not store them.
HOW_SAMPLED = (*SAMPLING, *OPTIONAL, "think_tokens", "think_at_least", "thinking")
PROTOCOL = ("task", "split", "extractor", "max_tokens", "temperature", "samples_per_problem")

_GENERIC_FOLDERS = {"adapter", "adapters", "best", "last", "final"}


@dataclass(frozen=True)
class Run:
    """A finished evaluation as its run folder holds it.

    ``result`` is result.json, ``samples`` the rows of samples.jsonl: one for each sample of each problem; ``about`` is
    run.json, if there is one: settings, versions, device, fingerprints. A run that `recipe` made of several has their
    number as ``trainings``, and each sample says in ``training`` which of them it is from. ``clusters``, if `clustered`
    set them, have the cluster of each problem by its id; all statistics of the run then allow for them. ``stopped``, if
    results decided how many problems there are, is the sentence on that; differences then have anytime-valid figures.
    ``folders`` are those that it was read from, one for each training.
    """

    name: str
    result: dict[str, Any]
    samples: list[dict[str, Any]]
    about: dict[str, Any] = field(default_factory=dict)
    trainings: int = 1
    clusters: dict[str, str] = field(default_factory=dict)
    stopped: str = ""
    folders: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise UserError for a value of another type than an evaluation writes."""
        _check(_Result, self.result, f"run {clean(self.name)}: result.json")
        check_samples(self.samples, f"run {clean(self.name)}")


_TEXT = Field(None, description="a text")
_COUNT = Field(None, description="a whole number", gt=-(2**53), lt=2**53)
_FIGURE = Field(None, description="a number", allow_inf_nan=False)
_SHARES = Field(None, description="shares by number of samples")
_Shares = dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}\z")], Annotated[float, Field(allow_inf_nan=False)]]


class _Sample(BaseModel, strict=True):
    """Types of the values in a line of samples.jsonl; any may be missing. Descriptions are used in messages."""

    id: str = _TEXT
    sample: int = _COUNT
    question: str = _TEXT
    prompt: str = _TEXT
    opened: str = _TEXT
    completion: str = _TEXT
    tokens: int | None = _COUNT  # a server may not count them
    finish_reason: str = _TEXT
    extracted: str | None = _TEXT
    extractions: dict[str, str | None] = Field(None, description="an object of texts")
    verdicts: dict[str, str] = Field(None, description="an object of texts")
    gold: str = _TEXT
    correct: bool = Field(None, description="true or false")
    verdict: str = _TEXT
    stratum: str | None = _TEXT
    elapsed: float = _FIGURE


class _Result(BaseModel, strict=True):
    """Types of the values in result.json."""

    model: str = _TEXT
    adapter: str | None = _TEXT
    prompt: str = _TEXT
    task: str | None = _TEXT
    split: str | None = _TEXT
    extractor: str | None = _TEXT
    timestamp: str | None = _TEXT
    max_tokens: float | None = _FIGURE
    temperature: float | None = _FIGURE
    think_tokens: int | None = _COUNT
    think_at_least: int | None = _COUNT
    pass_at_k: _Shares | None = _SHARES
    pass_hat_k: _Shares | None = _SHARES
    maj_at_k: _Shares | None = _SHARES


def check_samples(rows: Iterable[dict[str, Any]], where: str) -> None:
    """Raise UserError, starting with ``where``, if a value in an evaluation's samples has the wrong type."""
    for number, row in enumerate(rows, 1):
        _check(_Sample, row, f"{where}: sample {number}")


def _check(kind: type[BaseModel], row: dict[str, Any], where: str) -> None:
    try:
        kind.model_validate(row)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        what, found = kind.model_fields[name].description, type(row[name]).__name__
        raise UserError(f"{where}: {name!r} must be {what}, not {found}; evaluate it anew") from None


def recipe(name: str, runs: Sequence[Run]) -> Run:
    """Join runs of several trainings of one recipe, on the same problems, into one run: one row of a table.

    Runs that sample one model with several seeds are joined in the same way: the seeds are then the trainings.

    Args:
        name: the row's name in tables.
        runs: one run for each training or seed; the first one's settings are shown.

    Raises:
        UserError: if there are fewer than two runs or problems, the runs differ in problems or in the settings of
            `PROTOCOL` and `HOW_SAMPLED`, or two are the same evaluation.
    """
    if len({run.name for run in runs}) < len(runs) or len(runs) < 2:
        raise UserError(f"recipe {clean(name)}: name two or more runs, each once (got {len(runs)})")
    outcomes = [outcomes_of(run) for run in runs]
    if len(outcomes[0]) < 2:
        raise UserError(f"recipe {clean(name)}: its runs have one problem; an interval needs two or more")
    size = len(next(iter(outcomes[0].values())))
    settings = [part_of(run.about, "identity") for run in runs]
    for run, outcome, own in zip(runs, outcomes, settings, strict=True):
        require_same_problems(runs[0], run, outcomes[0], outcome)
        shared = {key: (runs[0].result.get(key), run.result.get(key)) for key in ("prompt", *PROTOCOL)}
        shared |= {key: (settings[0].get(key), own.get(key)) for key in HOW_SAMPLED}
        for key, (first, value) in shared.items():
            if first != value:
                found = f"{clean(first)} and {clean(value)}"
                raise UserError(f"recipe {clean(name)}: {key} is {found}; only their training and seed may differ")
    for (run, own), (other, same) in combinations(zip(runs, settings, strict=True), 2):
        if own and own == same:
            both = f"{clean(run.name)} and {clean(other.name)}"
            raise UserError(f"recipe {clean(name)}: {both} are the same evaluation; name each training or seed once")
    samples = [
        row | {"sample": row.get("sample", 0) + size * number, "training": number}
        for number, run in enumerate(runs)
        for row in run.samples
    ]
    speeds = [speed for run in runs if is_number(speed := run.result.get("tokens_per_second"))]
    result = {"model": name, "adapter": None, "tokens_per_second": sum(speeds) / len(speeds) if speeds else None}
    result |= {"pass_at_k": {}, "pass_hat_k": {}, "maj_at_k": {}}
    about = runs[0].about | {"trainings": [run.name for run in runs]}
    folders = tuple(folder for run in runs for folder in run.folders)
    return Run(runs[0].name, runs[0].result | result, samples, about, len(runs), folders=folders)


def shares(run: Run, ids: Sequence[str], samples: Sequence[dict[str, Any]] | None = None) -> np.ndarray:
    """Return the (trainings, problems) shares of correct completions; ``samples`` are the run's, or a part of them."""
    place = {id: i for i, id in enumerate(ids)}
    counts, rows = np.zeros((run.trainings, len(ids))), run.samples if samples is None else samples
    for row in rows:
        counts[row.get("training", 0), place[row["id"]]] += row["correct"]
    return counts * counts.size / len(rows)


def clusters_of(runs: Sequence[Run], column: str, ids: Sequence[str]) -> list[str]:
    """Return the value of a column for each problem, from its stored samples or the data of a run.

    Raises:
        UserError: if a problem has no such column there, or all problems have the same value.
    """
    found: dict[str, str] = {}
    for row in (row for run in runs for row in run.samples):
        value = part_of(row, "columns").get(column, row.get(column))
        if value is not None:
            found[row["id"]] = str(value)
    names: set[str] = set()
    for run in runs if len(found) < len(ids) else ():
        identity = run.about.get("identity") or {}
        if not is_known(identity.get("task") or ""):
            continue
        try:
            source = (identity.get(key) for key in ("split", "data", "limit"))
            seed = identity.get("data_seed", identity.get("seed"))
            problems = get_task(identity["task"]).load(*source, seed)
        except UserError:  # the data are not on this machine
            continue
        names |= {name for problem in problems for name in problem.columns}
        found |= {problem.id: str(problem.columns[column]) for problem in problems if column in problem.columns}
    if missing := [id for id in ids if id not in found]:
        where = f"the data have {', '.join(sorted(names))}" if names else "the data are not on this machine"
        raise UserError(f"--cluster {clean(column)}: problem {clean(missing[0])} has no such column; {where}")
    if len({found[id] for id in ids}) < 2:
        raise UserError(f"--cluster {clean(column)}: all problems have the same value; name another column")
    return [found[id] for id in ids]


def clustered(runs: Sequence[Run], column: str | None) -> list[Run]:
    """Return runs whose problems with equal values in a column form clusters; the same runs without a column.

    Raises:
        UserError: if a run has no samples, the problems differ, or there is no such column.
    """
    if column is None:
        return list(runs)
    outcomes = [outcomes_of(run) for run in runs]
    for run, outcome in zip(runs, outcomes, strict=True):
        require_same_problems(runs[0], run, outcomes[0], outcome)
    ids = list(outcomes[0])
    clusters = dict(zip(ids, clusters_of(runs, column, ids), strict=True))
    return [replace(run, clusters=clusters) for run in runs]


def compare_runs(runs: Sequence[Run], baseline: int | str = 0) -> pd.DataFrame:
    """Compare runs over the same problems with a baseline among them.

    The interval of an accuracy is Wilson's, with several samples a problem at their effective number
    (``stats.wilson_clustered``). The interval of a difference is the paired bootstrap over problems. The
    p-value is McNemar's exact test; with several samples a problem it is the exact sign-flip permutation test
    on the differences of correct counts, which equals McNemar's with one sample. Holm's adjustment is over the
    runs compared with the baseline. `tested` has the methods for clusters, several trainings and stopped runs.

    Args:
        runs: at least one run; rows keep their order.
        baseline: index, run name or label of the run that the others are compared with.

    Returns:
        One row a run: ``JSON_KEYS``, then ``run``, ``label``, ``truncated`` (share of answers cut off), the
        protocol (task to samples_per_problem), ``test`` (a key of ``tables.TESTS``), ``missed`` (where no difference is
        shown, the difference that would have been missed half of the time), ``trainings``, ``spread`` (the standard
        deviation of their accuracies) and, where runs have them, ``pass@k``, ``pass^k`` and ``maj@k``.
        ``correct_count`` of ``total_questions`` counts samples where a problem has several. The baseline has
        no difference and no p-value. ``attrs["stopped"]`` has the sentences of runs that stopped, or is `GREW` if
        growing runs are tested as runs of fixed size.

    Raises:
        UserError: if a run has no or uneven samples, the problems differ, or there is no such baseline.
    """
    names = labels(runs)
    first = baseline_index(runs, baseline)
    outcomes = [outcomes_of(run) for run in runs]
    for run, outcome in zip(runs, outcomes, strict=True):
        require_same_problems(runs[first], run, outcomes[first], outcome)
    ids = list(outcomes[first])

    rows: list[dict[str, Any]] = []
    for i, run in enumerate(runs):
        figures, spread = accuracy_of(run)
        tokens = [row["tokens"] for row in run.samples]
        found = dict.fromkeys(("diff", "diff_low", "diff_high", "p_value", "p_holm"), math.nan)
        found |= {"test": None, "missed": math.nan}
        if i != first:
            found |= tested(run, runs[first], outcomes[i], outcomes[first])
        rows.append(
            {
                "model": run.result["model"],
                "adapter": run.result.get("adapter") or None,
                "prompt": prompt_of(run.result),
                **figures,
                **{key: found[key] for key in ("diff", "diff_low", "diff_high", "p_value", "p_holm")},
                "tokens_per_answer": math.nan if None in tokens else sum(tokens) / len(tokens),
                "tokens_per_second": speed if is_number(speed := run.result.get("tokens_per_second")) else None,
                "run": run.name,
                "label": names[i],
                "truncated": cut_off(run),
                **{key: run.result.get(key) for key in PROTOCOL},
                "samples_per_problem": len(outcomes[i][ids[0]]),
                **{key: found[key] for key in ("test", "missed")},
                "trainings": run.trainings,
                "spread": spread,
                **{
                    f"{sign}{k}": share
                    for sign, key in (("pass@", "pass_at_k"), ("pass^", "pass_hat_k"), ("maj@", "maj_at_k"))
                    for k, share in (run.result.get(key) or {}).items()
                },
            }
        )
    others = [row for i, row in enumerate(rows) if i != first]
    for row, adjusted in zip(others, stats.holm([row["p_value"] for row in others]), strict=True):
        row["p_holm"] = adjusted
    for i, row in enumerate(rows):
        if i != first and row["test"] != "anytime" and row["p_holm"] >= stats.LEVEL:
            row["missed"] = missed(runs[i], runs[first], ids, stats.LEVEL / len(others))
    table = frame(rows)
    said = [run.stopped for run in runs if run.stopped]
    if others and not said and any((run.about.get("identity") or {}).get("growing") for run in runs):
        said = [GREW]
    if said:
        table.attrs["stopped"] = " ".join(dict.fromkeys(said))
    return table


def accuracy_of(run: Run, samples: Sequence[dict[str, Any]] | None = None) -> tuple[dict[str, float | int], float]:
    """Return the figures of ``stats.accuracy``, and the standard deviation of the trainings' accuracies.

    The interval is Wilson's at the effective number of samples, with several trainings or clusters at that of
    `variance.estimate`, from two problems or clusters on.

    Args:
        run: the evaluation.
        samples: those of its samples to count, judged anew perhaps; default: all.
    """
    rows = run.samples if samples is None else samples
    groups: dict[str, list[bool]] = {}
    for row in rows:
        groups.setdefault(run.clusters.get(row["id"], row["id"]), []).append(row["correct"])
    figures = stats.accuracy(list(groups.values()))
    if run.trainings == 1 and not run.clusters:
        return figures, math.nan
    ids = list(dict.fromkeys(row["id"] for row in rows))
    found = shares(run, ids, rows)
    if len(groups) > 1 and 0 < figures["accuracy"] < 1:
        estimate = variance.estimate(found, clusters=clusters_in(run, ids))
        if estimate.error:
            figures |= dict(zip(("ci_low", "ci_high"), estimate.share_interval(), strict=True))
    return figures, float(found.mean(axis=1).std(ddof=1)) if run.trainings > 1 else math.nan


def clusters_in(run: Run, ids: Sequence[str]) -> list[str] | None:
    """Return the cluster of each problem; None where each problem stands by itself."""
    return [run.clusters[id] for id in ids] if run.clusters else None


def missed(one: Run, two: Run, ids: Sequence[str], level: float) -> float:
    """Return the difference of two runs that a test at ``level`` finds half of the time on these problems.

    With one completion a problem it follows from the power of McNemar's exact test at the observed share of discordant
    problems, else it is half the width of the interval at that level. NaN if the test can find no difference on so few
    problems or clusters, or if the differences do not vary.
    """
    a, b, clusters = shares(one, ids), shares(two, ids), clusters_in(two, ids)
    single = one.trainings == two.trainings == 1
    if single and clusters is None and len(one.samples) == len(two.samples) == len(ids) <= power.MOST_DISCORDANT:
        discordant = float((a != b).mean())
        return math.nan if (found := power.detectable(len(ids), discordant, 0.5, level)) is None else found
    units = len(ids if clusters is None else set(clusters))
    if single and 2.0 ** (1 - units) > level:  # the smallest p-value of the sign-flip test
        return math.nan
    return variance.estimate(a, b, clusters).reach(1 - level) or math.nan


def frame(content: Any) -> pd.DataFrame:
    """Return rows or columns as a frame, whose values keep their types if they are given by columns."""
    import pandas as pd  # takes a second, and only tables need it

    return pd.DataFrame(content, dtype=object if isinstance(content, dict) else None)


def cut_off(run: Run) -> float:
    """Return the share of a run's completions that reached the token limit."""
    return sum(row["finish_reason"] == "length" for row in run.samples) / len(run.samples)


def paired(one: Run, two: Run) -> dict[str, Any]:
    """Compare two runs problem by problem, as ``compare_runs`` does.

    Returns:
        ``problems``; ``wins`` and ``losses``, problems that ``one`` answered right more, or less, often than ``two``;
        ``diff``, ``diff_low``, ``diff_high``, ``p_value`` and ``test`` of ``one`` minus ``two``; ``ratio``,
        ``ratio_low`` and ``ratio_high`` of their accuracies (`stats.paired_ratio`), NaN where problems are not all
        that varies: with clusters, several trainings, or if stopped; ``clusters``, their number or None.

    Raises:
        UserError: if a run has no or uneven samples, or the problems differ.
    """
    outcomes = [outcomes_of(run) for run in (one, two)]
    require_same_problems(one, two, *outcomes)
    (a, samples_a), (b, samples_b) = (counts_of(outcome, outcomes[0]) for outcome in outcomes)
    more, less = a * samples_b > b * samples_a, a * samples_b < b * samples_a
    counts = {"problems": len(a), "wins": int(more.sum()), "losses": int(less.sum())}
    counts["clusters"] = len(set(clusters)) if (clusters := clusters_in(two, list(outcomes[1]))) else None
    found = tested(one, two, *outcomes)
    by_problem = found["test"] in ("McNemar", "sign-flip")
    ratio = stats.paired_ratio(a / samples_a, b / samples_b) if by_problem else (math.nan,) * 3
    return counts | found | dict(zip(("ratio", "ratio_low", "ratio_high"), ratio, strict=True))


def differences(runs: Sequence[Run]) -> list[str]:
    """Return a line for each difference that makes the runs hard to compare.

    First the settings in `PROTOCOL`, then those of `evaluation.differences`: versions, device, weights, files, prompts.
    """
    lines = []
    for key in PROTOCOL:
        groups: dict[str, list[str]] = {}
        for run in runs:
            groups.setdefault(str(run.result.get(key)), []).append(run.name)
        if len(groups) > 1:
            shown = "; ".join(f"{value} in {', '.join(names)}" for value, names in groups.items())
            lines.append(clean(f"{key} differs: {shown}"))
    seen = Counter(run.name for run in runs)
    names = [f"{run.name} (row {i})" if seen[run.name] > 1 else run.name for i, run in enumerate(runs, start=1)]
    return lines + provenance_differences(dict(zip(names, (run.about for run in runs), strict=True)))


def label(run: Run) -> str:
    """Return a run's short name: ``model+adapter_prompt``, folders by their last part."""
    return f"{model_name(run.result['model'], run.result.get('adapter'))}_{clean(prompt_of(run.result))}"


def prompt_of(result: Mapping[str, Any]) -> str:
    """Return the prompt's name, with the bounds on the thought if there are any: ``thinking ≥8 ≤64``."""
    least, budget = result.get("think_at_least"), result.get("think_tokens")
    bounds = [f"≥{least}" if least else "", "" if budget is None else f"≤{budget}"]
    return " ".join(filter(None, (result["prompt"], *bounds)))


def labels(runs: Sequence[Run]) -> list[str]:
    """Return a short unique name for each run: ``label``, with the run's name where two would be the same."""
    names = [label(run) for run in runs]
    seen = Counter(names)
    names = [f"{name}_{clean(runs[i].name)}" if seen[name] > 1 else name for i, name in enumerate(names)]
    seen = Counter(names)
    return [f"{name}_{i}" if seen[name] > 1 else name for i, name in enumerate(names, start=1)]


def model_name(model: str, adapter: str | None) -> str:
    """Shorten ``org/model`` and the folder of an adapter to ``model+adapter``."""
    short = clean(model).rstrip("/").rsplit("/", 1)[-1]
    if not isinstance(adapter, str) or not adapter:  # NaN in a frame means none
        return short
    parts = clean(adapter).rstrip("/").split("/")
    return f"{short}+{'/'.join(parts[-2:] if parts[-1] in _GENERIC_FOLDERS else parts[-1:])}"


def per_question(runs: Sequence[Run]) -> pd.DataFrame:
    """Lay the runs side by side, one row a problem.

    Returns:
        ``question_id``, ``question``, ``correct_answer``, and for each run ``<label>_prediction`` and
        ``<label>_correct`` (True or False). With several samples a problem the prediction is the majority's
        and ``correct`` the share of correct samples.

    Raises:
        UserError: if the problems of the runs differ.
    """
    outcomes = [outcomes_of(run) for run in runs]
    for run, outcome in zip(runs, outcomes, strict=True):
        require_same_problems(runs[0], run, outcomes[0], outcome)
    first = {row["id"]: row for row in reversed(runs[0].samples)}
    columns: dict[str, list[Any]] = {
        "question_id": list(outcomes[0]),
        "question": [first[id]["question"] for id in outcomes[0]],
        "correct_answer": [first[id]["gold"] for id in outcomes[0]],
    }
    for run, name, outcome in zip(runs, labels(runs), outcomes, strict=True):
        answers: dict[str, list[str | None]] = {id: [] for id in outcome}
        for row in run.samples:
            answers[row["id"]].append(row["extracted"])
        columns[f"{name}_prediction"] = [majority_answer(run, answers[id], first[id]["gold"]) for id in outcomes[0]]
        columns[f"{name}_correct"] = [
            bool(outcome[id][0]) if len(outcome[id]) == 1 else sum(outcome[id]) / len(outcome[id]) for id in outcomes[0]
        ]
    return frame(columns)


def majority_answer(run: Run, answers: Sequence[str | None], gold: str) -> str | None:
    """Return the most frequent answer, as first written."""
    votes = _votes(run.result, answers, gold)
    return answers[votes.index(stats.majority(votes))]


def _votes(result: dict[str, Any], answers: Sequence[str | None], gold: str) -> list[str | None]:
    """Return a problem's answers as votes; those of an unknown task are compared as texts."""
    task = result["task"]
    return get_task(task).votes(answers, gold, result["extractor"]) if is_known(task) else list(answers)


def source_results(runs: Sequence[Run]) -> dict[str, Any]:
    """Return ``{"models": [{model_type, accuracy, correct, total, timestamp}], "timestamp"}``.

    Accuracy is a fraction. The outer timestamp is that of the newest run: the same runs give the same file.
    """
    models = []
    for run, name in zip(runs, labels(runs), strict=True):
        overall = stats.accuracy(list(outcomes_of(run).values()))
        models.append(
            {
                "model_type": name,
                "accuracy": overall["accuracy"],
                "correct": overall["correct_count"],
                "total": overall["total_questions"],
                "timestamp": run.result.get("timestamp"),
            }
        )
    return {"models": models, "timestamp": max((m["timestamp"] or "" for m in models), default="") or None}


def strata(runs: Sequence[Run]) -> pd.DataFrame | None:
    """Compute the accuracy of each run by stratum.

    Returns:
        One row a stratum and run: ``part`` (the stratum), ``label``, ``accuracy``, ``correct_count``,
        ``total_questions``, ``ci_low``, ``ci_high``; None if the problems have fewer than two strata.
    """
    parts = by_part(runs, lambda row: dict.fromkeys(strata_of(row.get("stratum") or "") or [""], row["correct"]))
    return None if parts is None else parts.sort_values("part", kind="stable", ignore_index=True)


def extractors(runs: Sequence[Run]) -> pd.DataFrame | None:
    """Compute the accuracy of each run by extractor, in the form of ``strata`` with the extractor as ``part``."""
    return by_part(runs, lambda row: {name: verdict == "correct" for name, verdict in row["verdicts"].items()})


def by_part(runs: Sequence[Run], judge: Callable[[dict[str, Any]], dict[str, bool]]) -> pd.DataFrame | None:
    """Compute accuracies by part; ``judge`` returns, for each part a sample belongs to, whether it is correct."""
    rows = []
    for run, name in zip(runs, labels(runs), strict=True):
        parts: dict[str, list[dict[str, Any]]] = {}
        for sample in run.samples:
            for part, correct in judge(sample).items():
                parts.setdefault(part, []).append(sample | {"correct": correct})
        rows += [{"part": part, "label": name, **accuracy_of(run, samples)[0]} for part, samples in parts.items()]
    return frame(rows) if len({row["part"] for row in rows}) > 1 else None


def outcomes_of(run: Run) -> dict[str, list[bool]]:
    """Return whether each sample of each problem is correct, by problem id in the run's order.

    Raises:
        UserError: if there are no samples, one occurs twice, or problems have different numbers of samples.
    """
    outcomes: dict[str, list[bool]] = {}
    seen = set()
    for row in run.samples:
        if (key := (row["id"], row.get("sample", 0))) in seen:
            raise UserError(f"run {run.name}: sample {key[1]} of problem {key[0]} occurs twice; repeat the run")
        seen.add(key)
        outcomes.setdefault(row["id"], []).append(bool(row["correct"]))
    if not outcomes:
        raise UserError(f"run {run.name} has no samples; evaluate it first")
    sizes = Counter(map(len, outcomes.values()))
    if len(sizes) > 1:
        few = min(outcomes, key=lambda id: len(outcomes[id]))
        raise UserError(
            f"run {run.name}: problem {few} has {len(outcomes[few])} samples where others have {max(sizes)}; "
            "finish the run with --resume"
        )
    return outcomes


def require_same_problems(one: Run, two: Run, ids_one: Collection[str], ids_two: Collection[str]) -> None:
    """Refuse runs over different problems; say how many ids each has alone, and the first few."""
    only_one = [id for id in ids_one if id not in ids_two]
    only_two = [id for id in ids_two if id not in ids_one]
    if only_one or only_two:
        parts = []
        for run, only in ((one, only_one), (two, only_two)):
            few = f" ({', '.join(clean(id) for id in only[:3])}{', ...' if len(only) > 3 else ''})" if only else ""
            parts.append(f"{len(only)} only in {clean(run.name)}{few}")
        raise UserError(
            f"runs {clean(one.name)} and {clean(two.name)} are over different problems: {', '.join(parts)}; "
            "evaluate both with the same --task, --data, --split, --limit and --seed, or --data-seed "
            "where the seeds differ"
        )


def baseline_index(runs: Sequence[Run], baseline: int | str) -> int:
    """Return the index of the baseline: an index, or a run's name, label or model's name; UserError if none matches."""
    if not runs:
        raise UserError("there are no runs to compare; name at least one run folder")
    if isinstance(baseline, int):
        if not -len(runs) <= baseline < len(runs):
            raise UserError(f"baseline {baseline}: there are {len(runs)} runs, counted from 0")
        return baseline % len(runs)
    known = [(run.name, name, label(run), run.result["model"]) for run, name in zip(runs, labels(runs), strict=True)]
    for names in zip(*known, strict=True):
        if baseline in names:
            return names.index(baseline)
    raise unknown("baseline", baseline, dict.fromkeys(name for names in known for name in names if name))


def counts_of(outcomes: dict[str, list[bool]], ids: Iterable[str]) -> tuple[np.ndarray, int]:
    """Return the (P,) correct completions of each problem, and how many completions each has."""
    return np.array([sum(outcomes[id]) for id in ids]), len(next(iter(outcomes.values())))


def tested(
    one: Run,
    two: Run,
    outcomes_one: dict[str, list[bool]],
    outcomes_two: dict[str, list[bool]],
) -> dict[str, Any]:
    """Return difference, interval and p-value of two runs on the same problems, and ``test``, the method.

    ``McNemar`` and ``sign-flip`` (several samples a problem): the paired bootstrap and the exact test. ``clusters``:
    the robust interval of `variance.estimate`, and the exact sign-flip test of the clusters' sums. ``trainings``: both
    by `variance.estimate`. ``anytime`` (a run that stopped): both by `anytime.anytime`.
    """
    ids = list(outcomes_two)
    clusters = clusters_in(two, ids)
    (a, samples_a), (b, samples_b) = counts_of(outcomes_one, ids), counts_of(outcomes_two, ids)
    common = math.lcm(samples_a, samples_b)  # shares of both models as integers of this unit
    changes = a * (common // samples_a) - b * (common // samples_b)
    if one.stopped or two.stopped:
        *change, p_value = anytime(changes / common)
        test = "anytime"
    elif one.trainings > 1 or two.trainings > 1 or clusters is not None:
        found = variance.estimate(shares(one, ids), shares(two, ids), clusters)
        change = (found.mean, *np.clip(found.interval(), -1, 1).tolist())
        if one.trainings == two.trainings == 1:
            sums = np.bincount(np.unique(clusters, return_inverse=True)[1], changes)
            p_value, test = stats.sign_flip(sums), "clusters"
        else:
            p_value, test = found.p, "trainings"
    else:
        change = stats.paired_bootstrap(a / samples_a, b / samples_b)
        if samples_a == samples_b == 1:
            p_value, test = stats.mcnemar(int((a > b).sum()), int((a < b).sum())), "McNemar"
        else:
            p_value, test = stats.sign_flip(changes), "sign-flip"
    return dict(zip(("diff", "diff_low", "diff_high"), change, strict=True)) | {"p_value": p_value, "test": test}
