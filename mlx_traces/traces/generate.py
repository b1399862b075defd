"""The command ``generate``: a model completes training problems, and its completions become traces."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_traces.config import GenerateConfig
from mlx_traces.errors import UserError
from mlx_traces.evaluation import evaluator, local
from mlx_traces.models import adapters, loading
from mlx_traces.models.loading import LoadedModel
from mlx_traces.readers import read_json
from mlx_traces.records import Problem, Trace
from mlx_traces.runtime import distributed
from mlx_traces.runtime.files import held, on_the_way, to_json, write_atomic
from mlx_traces.runtime.interrupts import Stopped, listening
from mlx_traces.runtime.run_folder import doubts, whole_lines
from mlx_traces.traces.files import (
    discard_unfinished,
    manifest_of,
    manifest_path,
    refuse_nameless,
    refuse_written,
    write_traces,
)


def generate(
    config: GenerateConfig, out: str | Path, resume: bool = False, show: Callable | None = None
) -> dict[str, int]:
    """Sample completions of problems and write them as a file of traces with its manifest.

    Each finished trace is written to ``.NAME.part.jsonl``; the file appears, in the problems' order, when all are done.

    Args:
        config: the settings; ``samples`` completions of each problem.
        out: ``NAME.jsonl``.
        resume: continue an interrupted run; the samples are those of an uninterrupted one.
        show: called with each trace and the total number of traces.

    Returns:
        The numbers of written, correct and cut-off completions, and of those that a stop string ended, if any.

    Raises:
        UserError: if the input is wrong, the file exists, or the part was begun with other settings.
        Stopped: after Ctrl-C; finished completions are kept.
    """
    out = Path(out)
    refuse_nameless(out)
    with ExitStack() as stack:
        if distributed.first():
            stack.enter_context(held(out.with_name(f".{out.stem}.lock")))
        pressed = stack.enter_context(listening(say=distributed.first()))
        return _generate(config, out, resume, show, lambda: distributed.any_of(pressed()))


def _generate(
    config: GenerateConfig, out: Path, resume: bool, show: Callable | None, stop: Callable[[], bool]
) -> dict[str, int]:
    """Do it under the lock. Of several ranks only the first reads and writes files; it tells the others what exists."""
    part, begun = (out.with_name(f".{out.stem}.{name}") for name in ("part.jsonl", "part.json"))
    planned, kept = evaluator.plan(config), []
    if distributed.first() and not resume:
        _refuse(out, part, begun, resume)
    made_with: dict[str, Any] = {}  # settings of the completions that exist
    if resume and begun.exists():
        made_with = read_json(begun)
    elif resume and out.exists() and manifest_path(out).exists():
        made_with = manifest_of(out)["config"]
    planned = replace(planned, config=loading.of_its_day(planned.config, made_with))
    loaded = loading.load(planned.config.model, planned.config.adapter, **planned.config.load_arguments())
    planned = replace(planned, config=planned.config.sized(distributed.sizes(loaded.backend)))
    identity = planned.identity() | local.identity_of(loaded)
    made = distributed.gather(
        [manifest_of(out)["counts"]] if distributed.first() and resume and _made(out, identity) else []
    )
    if made:
        if distributed.first():
            part.unlink(missing_ok=True)
            begun.unlink(missing_ok=True)
        return made[0]
    if distributed.first():
        _refuse(out, part, begun, resume)
        _begin(begun, identity, out)
        kept = whole_lines(part, ("id",))
    traces = [Trace.from_row(row, str(part)) for row in distributed.gather(kept)]
    done = {(trace.id, trace.sample): trace for trace in traces}
    wanted = planned.wanted
    todo = [(problem, sample) for problem, sample in wanted if (problem.id, sample) not in done]
    for trace in done.values():
        show and show(trace, len(wanted))
    if todo:
        lines = part if distributed.first() else Path(os.devnull)
        for trace in _traces(planned, loaded, todo, stop):
            with on_the_way(lines), lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(trace.to_row(), ensure_ascii=False) + "\n")
            done[trace.id, trace.sample] = trace
            show and show(trace, len(wanted))
    if len(done) < len(wanted):
        raise Stopped(f"stopped after {len(done):,} of {len(wanted):,} completions")
    traces = [done[problem.id, sample] for problem, sample in wanted]
    counts = {
        "correct": sum(trace.verdict == "correct" for trace in traces),
        "cut off": sum(trace.finish_reason == "length" for trace in traces),
    }
    if stopped := sum(trace.stop_string is not None for trace in traces):
        counts["ended by a stop string"] = stopped
    if distributed.first():
        source = "+".join(filter(None, (planned.config.model, planned.config.adapter)))
        manifest = {"source": source, "config": {**planned.config.model_dump(mode="json"), **identity}}
        manifest |= {"seed": config.seed, "counts": counts, "problems": planned.problems}
        write_traces(out, traces, {**manifest, "models": {"model": loaded.about()}})
        part.unlink(missing_ok=True)
        begun.unlink(missing_ok=True)
    return {"written": len(traces), **counts}


def _made(out: Path, identity: dict[str, Any]) -> bool:
    """Whether the file is complete and was made with these settings."""
    if not (out.exists() and manifest_path(out).exists()):
        return False
    made = manifest_of(out)["config"]
    return all(made.get(name) == value for name, value in identity.items())


def _refuse(out: Path, part: Path, begun: Path, resume: bool) -> None:
    """Raise UserError if the file exists, or was begun and ``resume`` is False."""
    if resume and begun.exists():
        discard_unfinished(out)
    refuse_written(out)
    if part.exists() and not resume:
        raise UserError(f"{out} was begun and cut off; pass --resume to continue it, or remove {part}")


def _begin(begun: Path, identity: dict[str, Any], out: Path) -> None:
    """Store the settings that determine the completions; UserError if the file was begun with others."""
    try:
        begun.parent.mkdir(parents=True, exist_ok=True)
        if begun.exists() and (stored := read_json(begun)) != identity:
            changed = [key for key in dict.fromkeys((*stored, *identity)) if stored.get(key) != identity.get(key)]
            if (unsure := doubts(stored, identity)) and len(unsure) == len(changed):
                raise UserError(
                    f"{out} cannot be continued, since its files may have changed ({'; '.join(unsure)}); "
                    f"remove {begun}, or choose another --out"
                )
            raise UserError(
                f"{out} was begun with other settings ({', '.join(changed)}); repeat those, or remove {begun}"
            )
        write_atomic(begun, to_json(identity))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None


def _traces(
    planned: evaluator.Plan, loaded: LoadedModel, todo: list[tuple[Problem, int]], stop: Callable[[], bool]
) -> Iterator[Trace]:
    """Complete the problems; yield each completion as a graded trace, until ``stop`` returns True."""
    config = planned.config
    source = "+".join(filter(None, (config.model, config.adapter)))
    with adapters.merged(loaded.model, loaded.backend):
        for index, completion in local.completions_of(loaded, planned, logprobs=True, stop=stop)(todo):
            problem, sample = todo[index]
            rollout = completion.rollout
            text = completion.whole
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
                logprobs=tuple(value and round(value, 5) for value in rollout.logprobs or ()),
                finish_reason=rollout.finish_reason,
                verdict=planned.task.grade(problem, text)[planned.extractor].verdict,
                thinking=config.thinking,
                template_args=config.template_args or {},
                stop_string=rollout.stop_string,
                forced=rollout.forced or None,
                forced_text=completion.forced or None,
            )
