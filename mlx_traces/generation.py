"""The second station: a model's own completions of training problems, as traces, through the sampling engine."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_traces import evaluation
from mlx_traces.config import GenerateConfig
from mlx_traces.errors import UserError
from mlx_traces.records import Problem, Trace
from mlx_traces.runs import read_json, to_json, whole_lines, write_atomic
from mlx_traces.traces import discard_unfinished, manifest_path, write_traces


def generate(
    config: GenerateConfig, out: str | Path, resume: bool = False, show: Callable | None = None
) -> dict[str, int]:
    """Sample completions of problems and write them as a file of traces with its manifest.

    Finished traces go to ``.NAME.part.jsonl`` at once; the file appears, in the problems' order, when all are there.

    Args:
        config: the settings; ``samples`` completions of each problem.
        out: ``NAME.jsonl``.
        resume: continue what was cut off; a sample does not depend on when it was drawn.
        show: called with each trace and the number of them all.

    Returns:
        How many completions were written, were correct, and were cut off.

    Raises:
        UserError: if the input is wrong, the file exists, or the part was begun with other settings.
    """
    out = Path(out)
    part, begun = (out.with_name(f".{out.stem}.{name}") for name in ("part.jsonl", "part.json"))
    if resume and begun.exists():
        discard_unfinished(out)
    for file in (out, manifest_path(out)):
        if file.exists():
            raise UserError(f"{file} exists; remove it, or choose another --out")
    if part.exists() and not resume:
        raise UserError(f"{out} was begun and cut off; pass --resume to continue it, or remove {part}")
    planned = evaluation.plan(config)
    identity = planned.identity()
    _begin(begun, identity, out)
    kept = (Trace.from_row(row, str(part)) for row in whole_lines(part, ("id",)))
    done = {(trace.id, trace.sample): trace for trace in kept}
    wanted = [(problem, sample) for problem in planned.problems for sample in range(config.samples)]
    todo = [(problem, sample) for problem, sample in wanted if (problem.id, sample) not in done]
    for trace in done.values():
        show and show(trace, len(wanted))
    if todo:
        with part.open("a", encoding="utf-8") as file:
            for trace in _traces(planned, todo):
                file.write(json.dumps(trace.to_row(), ensure_ascii=False) + "\n")
                file.flush()
                done[trace.id, trace.sample] = trace
                show and show(trace, len(wanted))
    traces = [done[problem.id, sample] for problem, sample in wanted]
    counts = {
        "correct": sum(trace.verdict == "correct" for trace in traces),
        "cut off": sum(trace.finish_reason == "length" for trace in traces),
    }
    source = "+".join(filter(None, (planned.config.model, planned.config.adapter)))
    manifest = {"source": source, "config": {**planned.config.model_dump(mode="json"), **identity}, "seed": config.seed}
    written = write_traces(out, traces, {**manifest, "counts": counts})
    part.unlink(missing_ok=True)
    begun.unlink(missing_ok=True)
    return {"written": written, **counts}


def _begin(begun: Path, identity: dict[str, Any], out: Path) -> None:
    """Note what decides the completions; UserError if the part was begun with something else."""
    try:
        begun.parent.mkdir(parents=True, exist_ok=True)
        if begun.exists() and (stored := read_json(begun)) != identity:
            changed = [key for key in dict.fromkeys((*stored, *identity)) if stored.get(key) != identity.get(key)]
            raise UserError(
                f"{out} was begun with other settings ({', '.join(changed)}); repeat those, or remove {begun}"
            )
        write_atomic(begun, to_json(identity))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None


def _traces(planned: evaluation.Plan, todo: list[tuple[Problem, int]]) -> Iterator[Trace]:
    """Load the model, complete the problems, and yield each completion as a graded trace."""
    from mlx_traces import adapters, models

    config = planned.config
    loaded = models.load(config.model, config.adapter, **config.load_arguments())
    source = "+".join(filter(None, (config.model, config.adapter)))
    with adapters.merged(loaded.model):
        for index, completion in evaluation.completions_of(loaded, planned, logprobs=True)(todo):
            problem, sample = todo[index]
            rollout = completion.rollout
            text = completion.opened + rollout.text
            yield Trace(
                id=problem.id,
                messages=tuple(planned.prompt.messages(problem)),
                completion=text,
                task=planned.task.name,
                columns=problem.columns,
                prompt=planned.prompt.name,
                source=source,
                sample=sample,
                completion_ids=rollout.completion_ids,
                logprobs=tuple(round(value, 5) for value in rollout.logprobs or ()),
                finish_reason=rollout.finish_reason,
                verdict=planned.task.grade(problem, text)[planned.extractor].verdict,
            )
