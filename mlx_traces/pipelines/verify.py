"""Check stored runs: grade their completions again, recompute their figures, check their files.

Only the check of an adapter loads MLX.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mlx_traces.config import EvalConfig, build
from mlx_traces.errors import UserError, first_line
from mlx_traces.evaluation import comparison, evaluator
from mlx_traces.evaluation.completion import rehead
from mlx_traces.models import adapter_config
from mlx_traces.models.names import local_folder
from mlx_traces.readers import read_jsonl
from mlx_traces.records import EvalResult, Problem, problem_id
from mlx_traces.runtime.device import import_mlx
from mlx_traces.runtime.run_folder import SAMPLE_COLUMNS, RunFolder, best_of, existing
from mlx_traces.tasks import GRADER, Task, task_of
from mlx_traces.tasks.prompts import Prompt
from mlx_traces.tasks.thoughts import OPENERS, usual
from mlx_traces.text import clean
from mlx_traces.traces import files
from mlx_traces.traces.quality import problem_of as problem_of_trace

SHOWN = 10  # maximum lines of differences per run
NOT_COMPUTED = ("run", "timestamp", "peak_memory_gb", "notes")  # fields of a result that do not follow from its samples
FIGURES = ("valid/accuracy", "valid/loss", "time/total", "memory/peak_gb")  # fields of metrics.jsonl


def verify(path: str | Path) -> tuple[str, list[str]]:
    """Check a finished evaluation or training, or a file of traces; ``mlx-traces verify`` from Python.

    Returns:
        A clause that says what agrees, and a line for each difference.

    Raises:
        UserError: if the folder is not a finished run, a file in it cannot be read, or a file of traces has changed
            since its manifest was written.
    """
    if str(path).endswith(".jsonl"):
        return verify_traces(Path(path))
    folder = existing(path, "run.json", "result.json")
    identity, result = folder.identity, folder.result or {}
    if "best_step" in result:
        return verify_training(folder, identity, result)
    if "problems" not in identity:
        raise UserError(f"{path}: neither an evaluation nor a training by sft, grpo or ppo; verify checks no others")
    return verify_evaluation(folder, identity)


def other_folder(path: str | Path) -> str | None:
    """Say what a folder is that other commands write beside runs, and that has nothing to check; None for the rest."""
    folder = Path(path)
    if not folder.is_dir() or RunFolder(folder).begun:
        return None
    if (folder / "provenance.json").exists():  # `report.export` writes it; to import that loads matplotlib
        return "a comparison"
    if _is_model(folder):
        return "a model"
    inner = [part for part in folder.iterdir() if not part.name.startswith(".")]
    return "a folder of models" if inner and all(map(_is_model, inner)) else None


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").exists() and any(folder.glob("model*.safetensors"))


def shown(lines: list[str]) -> list[str]:
    """Return at most `SHOWN` lines; of more, the last line counts the rest."""
    if len(lines) <= SHOWN:
        return lines
    return [*lines[: SHOWN - 1], f"and {len(lines) - SHOWN + 1:,} more"]


# ------------------------------------------------------------------------------------------------ evaluations


def verify_evaluation(folder: RunFolder, identity: dict[str, Any]) -> tuple[str, list[str]]:
    """Grade every sample of an evaluation again, and recompute its figures."""
    result = comparison.read_run(folder.path).result
    planned = plan_of(folder.path, identity, result)
    columns = (*SAMPLE_COLUMNS, "prompt", "completion")
    samples, found, lines = [], [], []
    about = folder.about
    own_tags = about["own_tags"] if is_pair(about.get("own_tags")) else None
    for where, row in read_jsonl(folder.samples_path, columns):
        new = regraded(planned, row, where, own_tags)
        samples.append(row)
        found.append(new)
        lines += _verdict_lines(row, new)
    if not samples:
        raise UserError(f"{folder.samples_path}: no samples; evaluate it anew")
    lines += _problem_lines(planned, samples, identity["problems"])
    if set(Counter(row["id"] for row in found).values()) != {planned.config.samples}:
        lines.append("result.json: its figures were not checked, as not every problem has all its samples once")
    else:
        summary = asdict(evaluator.summarize(planned, found, "", 0.0, []))
        lines += [
            f"result.json: {name} is {_brief(stored)}, the samples give {_brief(computed)}"
            for key in EvalResult.__dataclass_fields__
            if key not in NOT_COMPUTED and not (key == "pass_hat_k" and result[key] is None)
            for name, stored, computed in _differing(key, result[key], summary[key])
        ]
    rules = about.get("grader", 1)
    if lines and rules != GRADER:
        lines.insert(0, f"graded by version {_brief(rules)} of the graders' rules, found by version {GRADER}")
    return f"{len(samples):,} samples, verdicts and figures agree", lines


def plan_of(path: Path, identity: dict[str, Any], result: dict[str, Any]) -> evaluator.Plan:
    """Rebuild a run's plan from its identity, without problems: the samples have them. ``path`` is in errors."""
    where = f"{path / 'run.json'}"
    prompt = identity.get("prompt")
    if not isinstance(prompt, dict) or not {"name", "user"} <= set(prompt):
        raise UserError(f"{where}: 'prompt' is missing; the file is damaged")
    settings = {name: identity[name] for name in EvalConfig.model_fields if name in identity}
    config = build(EvalConfig, {**settings, "prompt": prompt["name"]}, where)
    task = task_of(config.task, where)
    if result["extractor"] not in task.extractors:
        raise UserError(f"{path / 'result.json'}: {task.name} has no extractor {result['extractor']!r}")
    try:
        return evaluator.Plan(config, task, Prompt(**prompt), result["extractor"], [])
    except TypeError as error:
        raise UserError(f"{where}: 'prompt' is not one ({first_line(error)})") from None


def is_pair(tags: Any) -> bool:
    """Whether a value from a file is a pair of tags."""
    return isinstance(tags, list) and len(tags) == 2 and all(isinstance(tag, str) and tag for tag in tags)


def regraded(
    planned: evaluator.Plan, row: dict[str, Any], where: str, own_tags: Sequence[str] | None = None
) -> dict[str, Any]:
    """Grade a sample again, from its question, gold answer and completion alone.

    ``own_tags`` are the model's own tags around a thought, from ``run.json``. Samples of older versions lack
    ``opened``, the beginning of the assistant's turn before the completion; it is read from their prompt.
    """
    problem = problem_of(planned.task, row, where)
    opened = row.get("opened")
    if opened is None:
        opened = opened_of(planned.prompt, problem, row["prompt"], (own_tags or ())[:1])
    scores = planned.task.grade(problem, usual(opened + row["completion"], own_tags))
    judged = {
        "extractions": {name: score.extracted for name, score in scores.items()},
        "verdicts": {name: score.verdict for name, score in scores.items()},
    }
    return rehead({**row, **judged, "gold": problem.gold, "stratum": problem.stratum}, planned.extractor)


def problem_of(task: Task, row: dict[str, Any], where: str) -> Problem:
    """Rebuild a sample's problem from its question, as `evaluator.question_of` wrote it, and its gold answer.

    Raises:
        UserError: if the question cannot be read, or does not belong to the sample's id.
    """
    columns: dict[str, Any] = {"question": row["question"], "answer": row["gold"]}
    if isinstance(kept := row.get("columns"), dict):
        columns |= kept
    elif "question" not in task.columns:
        match = re.fullmatch(", ".join(rf"{name} (?P<{name}>.+)" for name in task.columns), row["question"])
        try:
            columns = {name: json.loads(text) for name, text in match.groupdict().items()} if match else {}
        except ValueError:
            columns = {}
    problem = task.parse(columns, where)
    if problem.id != problem_id(row["id"]):
        raise UserError(f"{where}: {row['id']} has the question of {problem.id}; the line was changed")
    return problem


def opened_of(prompt: Prompt, problem: Problem, text: str, own: Sequence[str] = ()) -> str:
    """Read the beginning of the assistant's turn from a prompt: an opened thought, a prefill."""
    try:
        asked = prompt.messages(problem)[-1]["content"].strip()
    except UserError:  # samples lack a column of the prompt
        asked = str(problem.columns.get("question", "")).strip()
    turn = text.removesuffix(prompt.prefill).rpartition(asked)[2] if prompt.chat else ""
    starts = [start for opener in (*OPENERS, *own) if (start := turn.find(opener)) >= 0]
    return (turn[min(starts) :] if starts else "") + prompt.prefill


def _verdict_lines(row: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Describe the first difference between a stored sample and the same sample graded now, if there is one."""
    name = row["id"] if not row["sample"] else f"{row['id']} sample {row['sample']}"
    for key in ("verdicts", "extractions"):
        for extractor in dict.fromkeys((*new[key], *row[key])):
            stored, found = (part[key].get(extractor, "none") for part in (row, new))
            if stored != found:
                return [f"{name}: {key.removesuffix('s')} by {extractor} is {_brief(stored)}, found {_brief(found)}"]
    for key in ("verdict", "correct", "extracted", "gold", "stratum"):
        if row[key] != new[key]:
            return [f"{name}: {key} is {_brief(row[key])}, found {_brief(new[key])}"]
    return []


def _problem_lines(planned: evaluator.Plan, samples: list[dict[str, Any]], digest: str) -> list[str]:
    """List the samples that are missing, repeated, or not of the problems of ``run.json``."""
    config, lines = planned.config, []
    golds = {row["id"]: row["gold"] for row in samples}
    counts = Counter((row["id"], row["sample"]) for row in samples)
    wanted = {(name, number) for name in golds for number in range(config.samples)}
    lines += [f"{name}: sample {number} is missing" for name, number in sorted(wanted - set(counts))]
    lines += [f"{name}: sample {number} is unexpected" for name, number in sorted(set(counts) - wanted)]
    lines += [f"{name}: sample {number} occurs {n} times" for (name, number), n in counts.items() if n > 1]
    lines += [
        f"{row['id']}: {row['tokens']} tokens, and max_tokens is {config.max_tokens}"
        + (f", think_tokens {config.think_tokens}" if config.think_tokens is not None else "")
        for row in samples
        if row["tokens"] is not None and not 0 <= row["tokens"] <= config.longest
    ]
    if _digest(list(golds.items())) == digest:
        return lines
    try:
        asked = planned.task.load(config.split, config.data, config.limit, config.problem_seed)
    except UserError:  # the data are not on this machine
        if config.growing:  # its digest is of all of the data
            return lines
        asked = []
    pairs = [(problem.id, problem.gold) for problem in asked]
    if _digest(pairs) != digest:
        return [*lines, f"the {len(golds):,} problems are not those of run.json, or not in their order"]
    if config.growing:
        so_far = config.model_copy(update={"limit": len(golds)})
        pairs = [(problem.id, problem.gold) for problem in evaluator.sequence(planned.task, so_far, asked)]
        if pairs == list(golds.items()):
            return lines
    missing = [name for name, _ in pairs if name not in golds]
    strange = sorted(set(golds) - {name for name, _ in pairs})
    lines += [f"{name}: no sample of this problem" for name in missing]
    lines += [f"{name}: not a problem of this run" for name in strange]
    return lines if missing or strange else [*lines, "the samples are not in the order of the problems"]


def _digest(pairs: list[tuple[str, str]]) -> str:
    """Return the hash that `evaluator.Plan.identity` calls ``problems``."""
    return hashlib.sha256(json.dumps([list(pair) for pair in pairs]).encode()).hexdigest()[:12]


def _differing(name: str, stored: Any, computed: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, stored, computed) of each figure that differs by more than rounding, also within dictionaries."""
    if isinstance(stored, dict) and isinstance(computed, dict):
        for key in dict.fromkeys((*computed, *stored)):
            yield from _differing(f"{name} {key}", stored.get(key), computed.get(key))
    elif not _same(stored, computed):
        yield name, stored, computed


def _same(stored: Any, computed: Any) -> bool:
    if isinstance(stored, float) and isinstance(computed, int | float):
        return math.isclose(stored, computed, rel_tol=1e-9, abs_tol=1e-12)
    return stored == computed


def _brief(value: Any) -> str:
    return clean(f"{value:.6g}" if isinstance(value, float) else value)[:60]


# ---------------------------------------------------------------------------------------------------- traces


def verify_traces(file: Path) -> tuple[str, list[str]]:
    """Grade the traces of a file that have a verdict again, by the same extractor, and recount them."""
    manifest, lines, seen = files.manifest_of(file), [], Counter()
    config = manifest.get("config") if isinstance(manifest.get("config"), dict) else {}
    for where, trace in files.read_traces(file):
        seen["written"] += 1
        seen["cut off"] += trace.finish_reason == "length"
        problem = problem_of_trace(trace, where) if trace.verdict else None
        if problem is None:
            continue
        task = task_of(trace.task, where)
        name = config.get("extractor")
        found = task.grade(problem, trace.completion)[name if name in task.extractors else task.extractors[0]].verdict
        seen["correct"] += found == "correct"
        seen["graded"] += 1
        if found != trace.verdict:
            lines.append(f"{trace.id} sample {trace.sample}: verdict is {_brief(trace.verdict)}, found {_brief(found)}")
    counts = manifest.get("counts") if isinstance(manifest.get("counts"), dict) else {}
    for name in ("written", "correct", "cut off"):
        if name in counts and counts[name] != seen[name]:
            lines.append(f"manifest: {name} is {_brief(counts[name])}, the traces give {seen[name]}")
    return f"{seen['written']:,} traces, {seen['graded']:,} verdicts and the manifest agree", lines


# -------------------------------------------------------------------------------------------------- trainings


def verify_training(folder: RunFolder, identity: dict[str, Any], result: dict[str, Any]) -> tuple[str, list[str]]:
    """Check a training: its steps are complete, its figures follow from its metrics, its adapter loads."""
    metrics = []
    for where, row in read_jsonl(folder.path / "metrics.jsonl", ("step",), finite=False):
        if strange := [name for name in ("step", *FIGURES) if not isinstance(row.get(name, 0), int | float)]:
            raise UserError(f"{where}: {strange[0]!r} must be a number, not {_brief(row[strange[0]])}")
        metrics.append(row)
    steps = [row["step"] for row in metrics]
    lines = _step_lines(steps, result.get("steps"))
    planned = identity.get("num_steps") or folder.about.get("steps")
    if planned and steps and (steps[-1] > planned or (steps[-1] < planned and not identity.get("patience"))):
        lines.append(f"metrics.jsonl: it ends with step {steps[-1]}, and {planned} were planned")
    lines += [
        f"result.json: {name} is {_brief(result.get(name))}, metrics.jsonl gives {_brief(value)}"
        for name, value in figures_of(metrics).items()
        if name in result and not _same(result[name], value)
    ]
    lines += _adapter_lines(folder.path / "adapter", identity)
    return f"{result.get('steps')} steps, figures and adapter agree", lines


def _step_lines(steps: list[Any], last: Any) -> list[str]:
    """Describe the first gap in the steps 1, 2, ..., ``last``; step 0 is a validation before training."""
    wanted = list(range(0 if steps[:1] == [0] else 1, last + 1)) if isinstance(last, int) else []
    for place, step in enumerate(steps):
        if place >= len(wanted) or step != wanted[place]:
            expected = f"step {wanted[place]}" if place < len(wanted) else "the end"
            return [f"metrics.jsonl: row {place + 1} is of step {_brief(step)}, expected {expected}"]
    return [f"metrics.jsonl: step {wanted[len(steps)]} is missing"] if len(steps) < len(wanted) else []


def figures_of(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Compute a training's figures from its metrics: the first of the best validations, time and memory."""
    best = best_of(metrics) or {}
    start = metrics[0] if metrics and metrics[0]["step"] == 0 else {}
    return {
        "best_step": best.get("step"),
        "accuracy": best.get("valid/accuracy"),
        "accuracy_before": start.get("valid/accuracy"),
        "valid_loss": best.get("valid/loss"),
        "seconds": next((row["time/total"] for row in reversed(metrics) if "time/total" in row), 0.0),
        "peak_memory_gb": max((row.get("memory/peak_gb", 0.0) for row in metrics), default=0.0),
    }


def _adapter_lines(folder: Path, identity: dict[str, Any]) -> list[str]:
    """Describe what is wrong with an adapter; load it on its model too, if that is nano or a folder."""
    try:
        adapter_config.read_config(folder)
        try:
            with safe_open(folder / adapter_config.WEIGHTS, "numpy") as file:  # checks the file's length
                names = list(file.keys())
        except SafetensorError as error:
            return [f"{adapter_config.WEIGHTS}: damaged ({first_line(error)})"]
        if not names:
            return [f"{adapter_config.WEIGHTS}: no weights in it"]
        mx = import_mlx()
        weights = mx.load(str(folder / adapter_config.WEIGHTS))
        if strange := [name for name in names if not mx.isfinite(weights[name]).all().item()]:
            return [f"{adapter_config.WEIGHTS}: {strange[0]} has numbers that are not finite"]
        model = str(identity.get("model"))
        if local_folder(model):
            from mlx_traces.models import loading

            loading.load(model, str(folder), weights=identity.get("weights"), dtype=identity.get("dtype"))
    except UserError as error:
        return [f"adapter: {error}"]
    return []
