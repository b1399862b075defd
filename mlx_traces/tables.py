"""The model-comparison table: runs over the same problems in, one row a run out, in every form it is read in.

Accuracies, intervals and differences are fractions in the frames, CSV and JSON, and percent in the terminal,
Markdown and the chart. Differences and p-values pair the runs problem by problem. No MLX.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_traces import origins, stats
from mlx_traces.errors import UserError, unknown
from mlx_traces.readers import is_number
from mlx_traces.tasks import TASKS, get_task
from mlx_traces.text import clean, fold, interval, p_text, percent, visible, whole

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table


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
PROTOCOL = ("task", "split", "extractor", "max_tokens", "temperature", "samples_per_problem")

_GENERIC_FOLDERS = {"adapter", "adapters", "best", "last", "final"}
_FORMULA_START = tuple("=+-@\t\r\n＝＋－＠")
_NUMBER = re.compile(r"[+-]?(\d[\d,]*(\.\d*)?|\.\d+)([eE][+-]?\d+)?%?")
_MARKDOWN_SYNTAX = str.maketrans({c: f"\\{c}" for c in "\\`*[]<>|~"})


@dataclass(frozen=True)
class Run:
    """A finished evaluation as its run folder holds it.

    ``result`` is result.json, ``samples`` the rows of samples.jsonl: one for each sample of each problem; ``about`` is
    run.json, as far as it is known: what the run was made with.
    """

    name: str
    result: dict[str, Any]
    samples: list[dict[str, Any]]
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse, by UserError, values of another kind than an evaluation writes."""
        _check_kinds(self.result, _RESULT_KINDS, f"run {clean(self.name)}: result.json")
        check_samples(self.samples, f"run {clean(self.name)}")


def check_samples(rows: Iterable[dict[str, Any]], where: str) -> None:
    """Raise UserError, starting with ``where``, if a value in an evaluation's samples is not of its kind."""
    for number, row in enumerate(rows, 1):
        _check_kinds(row, _SAMPLE_KINDS, f"{where}: sample {number}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _are_shares(value: Any) -> bool:
    return isinstance(value, dict) and all(re.fullmatch("[0-9]{1,9}", k) and is_number(v) for k, v in value.items())


_Kind = tuple[str, Callable[[Any], bool]]
_TEXT: _Kind = ("a text", _is_text)
_COUNT: _Kind = ("a whole number", _is_whole)
_FIGURE: _Kind = ("a number", is_number)
_SHARES: _Kind = ("shares by number of samples", _are_shares)
_SAMPLE_KINDS = {
    **dict.fromkeys(("id", "question", "gold", "finish_reason", "verdict"), _TEXT),
    **{"sample": _COUNT, "tokens?": _COUNT, "correct": ("true or false", lambda value: isinstance(value, bool))},
    **{"verdicts": ("an object of texts", _are_texts), "extracted?": _TEXT, "stratum?": _TEXT},
}
_RESULT_KINDS = {
    **dict.fromkeys(("model", "prompt"), _TEXT),
    **dict.fromkeys(("adapter?", "task?", "split?", "extractor?", "timestamp?"), _TEXT),
    **dict.fromkeys(("max_tokens?", "temperature?"), _FIGURE),
    **dict.fromkeys(("pass_at_k?", "maj_at_k?"), _SHARES),
}  # with ? it may be null


def _check_kinds(row: dict[str, Any], kinds: dict[str, _Kind], where: str) -> None:
    for key, (what, right) in kinds.items():
        name = key.removesuffix("?")
        if name in row and not right(row[name]) and (row[name] is not None or name == key):
            raise UserError(f"{where}: {name!r} must be {what}, not {type(row[name]).__name__}; evaluate it anew")


def compare_runs(runs: Sequence[Run], baseline: int | str = 0) -> pd.DataFrame:
    """Compare runs over the same problems with a baseline among them.

    The interval of an accuracy is Wilson's, with several samples a problem at their effective number
    (``stats.wilson_clustered``). The interval of a difference is the paired bootstrap over problems. The
    p-value is McNemar's exact test; with several samples a problem it is the exact sign-flip permutation test
    on the differences of correct counts, which is McNemar's where there is one. Holm's adjustment is over the
    runs compared with the baseline.

    Args:
        runs: at least one run; rows keep their order.
        baseline: index, run name or label of the run that the others are compared with.

    Returns:
        One row a run: ``JSON_KEYS``, then ``run``, ``label``, ``truncated`` (share of answers cut off), the
        protocol (task to samples_per_problem) and, where runs have them, ``pass@k`` and ``maj@k``.
        ``correct_count`` of ``total_questions`` counts samples where a problem has several. The baseline has
        no difference and no p-value.

    Raises:
        UserError: if a run has no or uneven samples, the problems differ, or there is no such baseline.
    """
    import pandas as pd

    names = labels(runs)
    first = _baseline_index(runs, names, baseline)
    outcomes = [outcomes_of(run) for run in runs]
    for run, own in zip(runs, outcomes, strict=True):
        _require_same_problems(runs[first], run, outcomes[first], own)
    counts = [np.array([sum(own[id]) for id in outcomes[first]]) for own in outcomes]
    samples = [len(next(iter(own.values()))) for own in outcomes]

    rows: list[dict[str, Any]] = []
    for i, run in enumerate(runs):
        overall = stats.accuracy(list(outcomes[i].values()))
        comparison = dict.fromkeys(("diff", "diff_low", "diff_high", "p_value", "p_holm"), math.nan)
        if i != first:
            comparison |= _paired(counts[i], samples[i], counts[first], samples[first])
        rows.append(
            {
                "model": run.result["model"],
                "adapter": run.result.get("adapter") or None,
                "prompt": run.result["prompt"],
                **overall,
                **comparison,
                "tokens_per_answer": _mean([row["tokens"] for row in run.samples]),
                "tokens_per_second": speed if is_number(speed := run.result.get("tokens_per_second")) else None,
                "run": run.name,
                "label": names[i],
                "truncated": sum(row["finish_reason"] == "length" for row in run.samples) / len(run.samples),
                **{key: run.result.get(key) for key in PROTOCOL},
                "samples_per_problem": samples[i],
                **{f"pass@{k}": share for k, share in (run.result.get("pass_at_k") or {}).items()},
                **{f"maj@{k}": share for k, share in (run.result.get("maj_at_k") or {}).items()},
            }
        )
    others = [row for i, row in enumerate(rows) if i != first]
    for row, adjusted in zip(others, stats.holm([row["p_value"] for row in others]), strict=True):
        row["p_holm"] = adjusted
    return pd.DataFrame(rows)


def paired(one: Run, two: Run) -> dict[str, float | int]:
    """Compare two runs problem by problem, as ``compare_runs`` does.

    Returns:
        ``problems``; ``wins`` and ``losses``, problems that ``one`` answered right more, or less, often than ``two``;
        ``diff``, ``diff_low``, ``diff_high`` and ``p_value`` of ``one`` minus ``two``.

    Raises:
        UserError: if a run has no or uneven samples, or the problems differ.
    """
    outcomes = [outcomes_of(run) for run in (one, two)]
    _require_same_problems(one, two, *outcomes)
    a, b = (np.array([sum(own[id]) for id in outcomes[0]]) for own in outcomes)
    samples_a, samples_b = (len(next(iter(own.values()))) for own in outcomes)
    more, less = a * samples_b > b * samples_a, a * samples_b < b * samples_a
    counts = {"problems": len(a), "wins": int(more.sum()), "losses": int(less.sum())}
    return counts | _paired(a, samples_a, b, samples_b)


def differences(runs: Sequence[Run]) -> list[str]:
    """Return a line for each setting, prompts apart, in which the runs differ and so are hard to compare.

    Then one for each thing that they were made with and that differs: versions, device, weights, files, prompt texts.
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
    return lines + origins.differences(dict(zip(names, (run.about for run in runs), strict=True)))


def label(run: Run) -> str:
    """Name a run briefly: ``model+adapter_prompt``, folders by their last part."""
    return f"{model_name(run.result['model'], run.result.get('adapter'))}_{clean(run.result['prompt'])}"


def labels(runs: Sequence[Run]) -> list[str]:
    """Name each run briefly and uniquely: ``label``, with the run's name where two would be alike."""
    names = [label(run) for run in runs]
    seen = Counter(names)
    names = [f"{name}_{clean(runs[i].name)}" if seen[name] > 1 else name for i, name in enumerate(names)]
    seen = Counter(names)
    return [f"{name}_{i}" if seen[name] > 1 else name for i, name in enumerate(names, start=1)]


def model_name(model: str, adapter: str | None) -> str:
    """Shorten ``org/model`` and the folder of an adapter to ``model+adapter``."""
    short = clean(model).rstrip("/").rsplit("/", 1)[-1]
    if not isinstance(adapter, str) or not adapter:  # a frame holds nan for none
        return short
    parts = clean(adapter).rstrip("/").split("/")
    return f"{short}+{'/'.join(parts[-2:] if parts[-1] in _GENERIC_FOLDERS else parts[-1:])}"


def protocol_line(frame: pd.DataFrame) -> str:
    """State what the numbers depend on: ``gsm8k test · tolerant extractor · at most 400 tokens · greedy``."""

    def values(key: str) -> str:
        return " / ".join(dict.fromkeys(clean(value) for value in frame[key]))

    greedy = all(value == 0 for value in frame["temperature"])
    parts = [
        f"{values('task')} {values('split')}",
        f"{values('extractor')} extractor",
        f"at most {values('max_tokens')} tokens",
        "greedy" if greedy else f"temperature {values('temperature')}",
    ]
    if frame["samples_per_problem"].max() > 1:
        parts.append(f"{values('samples_per_problem')} samples a problem")
    return " · ".join(parts)


def n_text(row: dict[str, Any]) -> str:
    """State the size of a row: ``1,319``, or problems and samples of each: ``200 × 8``."""
    problems, samples = row["total_questions"] // row["samples_per_problem"], row["samples_per_problem"]
    return f"{problems:,}" if samples == 1 else f"{problems:,} × {samples}"


def to_terminal(frame: pd.DataFrame) -> Table:
    """Lay the comparison out for a terminal, 100 columns or wider; intervals stand below their values."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(protocol_line(frame), style="bold"),
        caption=Text(_caption(frame)),
        caption_justify="left",
        box=box.HORIZONTALS,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_lines=True,
    )
    table.add_column("model", overflow="fold")
    table.add_column("prompt", max_width=8, overflow="fold")
    for heading in ("accuracy %", "correct", "difference", "p\nHolm", "tokens\nspeed", "cut\noff"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in frame.to_dict("records"):
        name = model_name(row["model"], row["adapter"])
        if row["label"] != f"{name}_{clean(row['prompt'])}":
            name += f" ({clean(row['run'])})"
        accuracy = f"{percent(row['accuracy'])} %\n{interval(row['ci_low'], row['ci_high'])}"
        for kind in ("pass", "maj"):
            if (share := row.get(f"{kind}@{row['samples_per_problem']}", math.nan)) == share:
                accuracy += f"\n{kind}@{row['samples_per_problem']} {percent(share)} %"
        difference, p = "baseline", "–"
        if not math.isnan(row["diff"]):
            difference = f"{percent(row['diff'], signed=True)}\n{interval(row['diff_low'], row['diff_high'])}"
            p = f"{p_text(row['p_value'])}\n{p_text(row['p_holm'])}"
        cells = (
            "\n".join(fold(name, 23)),
            "\n".join(fold(clean(row["prompt"]), 8)),
            accuracy,
            f"{row['correct_count']:,}\nof {n_text(row)}",
            difference,
            p,
            f"{whole(row['tokens_per_answer'])}\n{whole(row['tokens_per_second'])}/s",
            f"{percent(row['truncated'])} %",
        )
        table.add_row(*(Text(cell) for cell in cells))
    return table


def to_markdown(frame: pd.DataFrame) -> str:
    """Return the comparison as a Markdown table with its protocol above it."""
    headings = [
        "model",
        "prompt",
        "accuracy",
        "95 % interval",
        "correct",
        "n",
        "difference",
        "95 % interval",
        "p",
        "p (Holm)",
        "tokens/answer",
        "tokens/s",
        "cut off",
    ]
    extra = [name for name in frame.columns if name.startswith(("pass@", "maj@"))]
    lines = []
    for row in frame.to_dict("records"):
        none = math.isnan(row["diff"])
        cells = [
            model_name(row["model"], row["adapter"]),
            clean(row["prompt"]),
            f"{percent(row['accuracy'])} %",
            interval(row["ci_low"], row["ci_high"]),
            f"{row['correct_count']:,}",
            n_text(row),
            "baseline" if none else percent(row["diff"], signed=True),
            "–" if none else interval(row["diff_low"], row["diff_high"]),
            p_text(row["p_value"]),
            p_text(row["p_holm"]),
            whole(row["tokens_per_answer"]),
            whole(row["tokens_per_second"]),
            f"{percent(row['truncated'])} %",
            *("–" if math.isnan(row[name]) else f"{percent(row[name])} %" for name in extra),
        ]
        lines.append(cells)
    table = markdown([*headings, *extra], lines, left=2)
    return f"{_escape_markdown(protocol_line(frame))}\n\n{table}\n{_escape_markdown(_caption(frame))}\n"


def to_csv(frame: pd.DataFrame) -> str:
    """Return any frame as CSV; text that a spreadsheet would run as a formula gets a leading apostrophe."""
    safe = frame.map(_csv_cell).rename(columns=_csv_cell)
    return safe.to_csv(index=False, lineterminator="\n")


def to_json(frame: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """Return the comparison as ``{"rows": [...]}``, each row with ``JSON_KEYS``; what is missing is None."""
    rows = frame.to_dict("records")
    return {"rows": [{key: None if row[key] != row[key] else row[key] for key in JSON_KEYS} for row in rows]}


def per_question(runs: Sequence[Run]) -> pd.DataFrame:
    """Lay the runs side by side, one row a problem.

    Returns:
        ``question_id``, ``question``, ``correct_answer``, and for each run ``<label>_prediction`` and
        ``<label>_correct`` (True or False). With several samples a problem the prediction is the majority's
        and ``correct`` the share of correct samples.

    Raises:
        UserError: if the problems of the runs differ.
    """
    import pandas as pd

    outcomes = [outcomes_of(run) for run in runs]
    for run, own in zip(runs, outcomes, strict=True):
        _require_same_problems(runs[0], run, outcomes[0], own)
    first = {row["id"]: row for row in reversed(runs[0].samples)}
    columns: dict[str, list[Any]] = {
        "question_id": list(outcomes[0]),
        "question": [first[id]["question"] for id in outcomes[0]],
        "correct_answer": [first[id]["gold"] for id in outcomes[0]],
    }
    for run, name, own in zip(runs, labels(runs), outcomes, strict=True):
        answers: dict[str, list[str | None]] = {id: [] for id in own}
        for row in run.samples:
            answers[row["id"]].append(row["extracted"])
        columns[f"{name}_prediction"] = [_winner(run, answers[id], first[id]["gold"]) for id in outcomes[0]]
        columns[f"{name}_correct"] = [
            bool(own[id][0]) if len(own[id]) == 1 else sum(own[id]) / len(own[id]) for id in outcomes[0]
        ]
    return pd.DataFrame(columns, dtype=object)


def _winner(run: Run, answers: Sequence[str | None], gold: str) -> str | None:
    """Return the majority's answer, as its first voter wrote it; of an unknown task equal texts vote alike."""
    task, extractor = run.result["task"], run.result["extractor"]
    votes = get_task(task).votes(answers, gold, extractor) if task in TASKS else list(answers)
    return answers[votes.index(stats.majority(votes))]


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
    """Split the accuracy of each run by stratum.

    Returns:
        One row a stratum and run: ``part`` (the stratum), ``label``, ``accuracy``, ``correct_count``,
        ``total_questions``, ``ci_low``, ``ci_high``; None if the problems have fewer than two strata.
    """
    frame = _split(runs, lambda row: {row.get("stratum") or "": row["correct"]})
    return None if frame is None else frame.sort_values("part", kind="stable", ignore_index=True)


def extractors(runs: Sequence[Run]) -> pd.DataFrame | None:
    """Judge each run by every extractor; like ``strata``, with the extractor as ``part``."""
    return _split(runs, lambda row: {name: verdict == "correct" for name, verdict in row["verdicts"].items()})


def strata_table(runs: Sequence[Run]) -> Table | None:
    """Lay the accuracies by stratum out for a terminal; None if there are fewer than two strata."""
    frame = strata(runs)
    return None if frame is None else _parts_table(frame, "accuracy by stratum")


def extractors_table(runs: Sequence[Run]) -> Table | None:
    """Lay the accuracies by extractor out for a terminal; None if there are fewer than two extractors."""
    frame = extractors(runs)
    return None if frame is None else _parts_table(frame, "accuracy by extractor")


def parts_to_markdown(frame: pd.DataFrame) -> str:
    """Return ``strata`` or ``extractors`` as a Markdown table: one row a run, one column a part."""
    headings, rows = _parts_cells(frame)
    return markdown(headings, [[cell.replace("\n", " ") for cell in row] for row in rows], left=1)


def _split(runs: Sequence[Run], judge: Callable[[dict[str, Any]], dict[str, bool]]) -> pd.DataFrame | None:
    """Compute accuracies by part; ``judge`` says whether a sample is correct, for each part it belongs to."""
    import pandas as pd

    rows = []
    for run, name in zip(runs, labels(runs), strict=True):
        parts: dict[str, dict[str, list[bool]]] = {}
        for sample in run.samples:
            for part, correct in judge(sample).items():
                parts.setdefault(part, {}).setdefault(sample["id"], []).append(correct)
        rows += [
            {"part": part, "label": name, **stats.accuracy(list(problems.values()))} for part, problems in parts.items()
        ]
    return pd.DataFrame(rows) if len({row["part"] for row in rows}) > 1 else None


def _parts_cells(frame: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Pivot parts to (headings, rows); a cell has accuracy, interval and counts on a line each."""
    names = list(dict.fromkeys(frame["part"]))
    rows: dict[str, dict[str, str]] = {}
    for row in frame.to_dict("records"):
        counts = f"{row['correct_count']:,} of {row['total_questions']:,}"
        cell = f"{percent(row['accuracy'])} %\n{interval(row['ci_low'], row['ci_high'])}\n{counts}"
        rows.setdefault(row["label"], {})[row["part"]] = cell
    cells = [[name, *(row.get(part, "–") for part in names)] for name, row in rows.items()]
    return ["model", *(clean(name) or "(none)" for name in names)], cells


def _parts_table(frame: pd.DataFrame, title: str) -> Table:
    return grid(title, *_parts_cells(frame))


def grid(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> Table:
    """Lay rows of cells out for a terminal: the first column is a name, the others are numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title, style="bold"),
        caption=Text(caption) if caption else None,
        caption_justify="left",
        box=box.HORIZONTALS,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_lines=True,
    )
    for i, heading in enumerate(headings):
        table.add_column(Text(heading), justify="right" if i else "left", overflow="fold")
    for name, *cells in rows:
        table.add_row(Text("\n".join(line for part in name.split("\n") for line in fold(part, 34))), *map(Text, cells))
    return table


def outcomes_of(run: Run) -> dict[str, list[bool]]:
    """Return whether each sample of each problem is correct, by problem id in the run's order.

    Raises:
        UserError: if there are none, a sample is there twice, or problems have different numbers of samples.
    """
    outcomes: dict[str, list[bool]] = {}
    seen = set()
    for row in run.samples:
        if (key := (row["id"], row.get("sample", 0))) in seen:
            raise UserError(f"run {run.name}: sample {key[1]} of problem {key[0]} is there twice; repeat the run")
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


def _require_same_problems(one: Run, two: Run, ids_one: Collection[str], ids_two: Collection[str]) -> None:
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
            "evaluate both with the same --task, --data, --split, --limit and --seed"
        )


def _baseline_index(runs: Sequence[Run], names: Sequence[str], baseline: int | str) -> int:
    """Find the baseline by index, run name or label."""
    if not runs:
        raise UserError("there are no runs to compare; name at least one run folder")
    if isinstance(baseline, int):
        if not -len(runs) <= baseline < len(runs):
            raise UserError(f"baseline {baseline}: there are {len(runs)} runs, counted from 0")
        return baseline % len(runs)
    for known in ([run.name for run in runs], names):
        if baseline in known:
            return list(known).index(baseline)
    raise unknown("baseline", baseline, [run.name for run in runs])


def _paired(a: np.ndarray, samples_a: int, b: np.ndarray, samples_b: int) -> dict[str, float]:
    """Return difference, interval and p-value of two models on the same problems, from (P,) correct counts."""
    change = stats.paired_bootstrap(a / samples_a, b / samples_b)
    p_value = _paired_p_value(a, samples_a, b, samples_b)
    return dict(zip(("diff", "diff_low", "diff_high"), change, strict=True)) | {"p_value": p_value}


def _paired_p_value(a: np.ndarray, samples_a: int, b: np.ndarray, samples_b: int) -> float:
    """Test two models on the same problems, from (P,) correct counts: exact McNemar, or exact sign flips."""
    if samples_a == samples_b == 1:
        return stats.mcnemar(int((a > b).sum()), int((a < b).sum()))
    common = math.lcm(samples_a, samples_b)  # shares of both models as integers of this unit
    return stats.sign_flip(a * (common // samples_a) - b * (common // samples_b))


def _caption(frame: pd.DataFrame) -> str:
    """Say how to read the table."""
    text = "95 % intervals: Wilson for an accuracy"
    several = frame["samples_per_problem"].max() > 1
    if several:
        text += " (samples of a problem clustered)"
    if frame["diff"].isna().all():
        return text + "."
    base = frame.loc[frame["diff"].isna(), "label"].iloc[0]
    test = "sign-flip permutation" if several else "McNemar"
    return f"{text}, paired bootstrap for the difference in points to {base}; p: exact {test} test, then Holm-adjusted."


def _mean(counts: Sequence[int | None]) -> float:
    """Return the mean of counts; not a number if one is not known."""
    return math.nan if None in counts else sum(counts) / len(counts)


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """Lay out a Markdown table whose first ``left`` columns are text and whose other columns are numbers."""
    lines = [
        [_escape_markdown(clean(heading)) for heading in headings],
        [":--" if i < left else "--:" for i in range(len(headings))],
    ]
    lines += [[*(_escape_markdown(cell) for cell in row[:left]), *row[left:]] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _escape_markdown(text: str) -> str:
    return text.translate(_MARKDOWN_SYNTAX)


def _csv_cell(value: Any) -> Any:
    """Make text safe for spreadsheets and terminals: no formula, no control characters, nothing beyond UTF-8."""
    if not isinstance(value, str):
        return value
    text = f"'{value}" if value.startswith(_FORMULA_START) and not _NUMBER.fullmatch(value) else value
    # pandas does not quote a bare \r, and readers split at it.
    return visible(text.replace("\r\n", "\n").replace("\r", "\n"))
