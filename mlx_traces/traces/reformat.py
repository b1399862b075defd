r"""The command ``reformat``: rewrite traces as a thought and a solution; keep those that are still correct.

Sky-T1's data was made in this way, from another model's answers. Without a model only tags and the white space around
them change: the parts are those of `thoughts.parts`; an answer without tags is split before the line of its last
``<answer>``, ``\boxed{}`` or ``####``, or before the formula or code block around that line. With a model the words
change too: it completes ``REWRITING``, and its reply is used only if it has exactly the form that the prompt asks for.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_traces.config import ReformatConfig
from mlx_traces.errors import UserError
from mlx_traces.records import Problem, Trace
from mlx_traces.tasks import get_task
from mlx_traces.tasks.prompts import Prompt, load_prompt
from mlx_traces.tasks.thoughts import SKY, after_last, move_spans, parts, restyle
from mlx_traces.traces import judge
from mlx_traces.traces.files import read_traces, refuse_written, source_of, write_traces
from mlx_traces.traces.quality import format_score, headline, last_turn, named, own_words, problem_of

REWRITING = Prompt(
    name="rewriting",
    user="""Below are a question and a worked answer. Rewrite the answer as a thought and a solution.

Question:
{question}

Answer:
{trace}

Keep every step, number and result; leave out only what is repeated. Reply with exactly this and nothing else:
<|begin_of_thought|>
the thinking, step by step
<|end_of_thought|>
<|begin_of_solution|>
a short solution that ends with the final answer, written exactly as the answer above writes it
<|end_of_solution|>""",
)
MARKS = ("<answer>", "\\boxed", "####")  # of a final answer
BLOCKS = (("\\begin{", "\\end{"), ("\\[", "\\]"), ("$$", "$$"), ("```", "```"))  # that are not cut


def reformat_file(source: Path, out: Path, config: ReformatConfig) -> tuple[int, Counter]:
    """Rewrite the traces of a file into a new one with its manifest.

    Returns:
        The number of written traces, and the numbers of dropped ones by reason.

    Raises:
        UserError: if ``out`` exists, before anything is read; if no trace is left; for a malformed trace, an unknown
            task, or a model or prompt that cannot be loaded.
    """
    dropped: Counter[str] = Counter()
    used: dict[str, Any] = {}
    prompt = load_prompt(Path(config.model_prompt)) if config.model_prompt else REWRITING
    settings = config.model_dump(mode="json") | named(config) | ({"rewriting": prompt.user} if config.model else {})
    refuse_written(out)
    origin = source_of(source)
    located = list(read_traces(source))
    if not located:
        raise UserError(f"{source} has no traces")
    problems = [problem_of(trace, where) for where, trace in located]
    rewritten = reformat([trace for _, trace in located], problems, config, prompt, dropped, used)
    manifest = {**origin, "config": settings, "counts": {"dropped": dropped}, "seed": None, "models": used}
    return write_traces(out, rewritten, manifest), dropped


def reformat(
    traces: Sequence[Trace],
    problems: Sequence[Problem | None],
    config: ReformatConfig,
    prompt: Prompt = REWRITING,
    dropped: Counter | None = None,
    used: dict[str, Any] | None = None,
) -> Iterator[Trace]:
    """Rewrite traces in order; yield those that are correct before and after.

    Token ids, log-probabilities and scores belong to the old text and are removed. Text that was inserted into a
    completion to bound its thought stays marked; a model would rewrite it with the rest, so such traces are dropped.

    Args:
        traces: in any form.
        problems: the traces' problems; None for a trace that no task can grade.
        config: the form to write, and the model that rewrites, if any.
        prompt: the instruction for the model.
        dropped: counts the dropped traces, by reason.
        used: gets a description of the ``model``, if one was loaded.
    """
    dropped = Counter() if dropped is None else dropped
    judged = []
    for trace, problem in zip(traces, problems, strict=True):
        if fault := _fault(trace, problem, config):
            dropped[fault] += 1
        else:
            judged.append((trace, problem))
    if config.model:
        texts = _by_model(judged, config, prompt, {} if used is None else used)
    else:
        texts = [by_rule(own_words(trace)) for trace, _ in judged]
    for (trace, problem), text in zip(judged, texts, strict=True):
        completion, own = restyle(text or "", config.to), own_words(trace)
        cut = len(trace.completion) - len(own)
        forced = [(max(0, start - cut), max(0, end - cut)) for start, end in trace.forced_text or ()]
        if fault := _fault_of(text, completion, trace, problem):
            dropped[fault] += 1
            continue
        yield replace(
            trace,
            completion=completion,
            source=f"{trace.source}, rewritten by {config.model}".lstrip(", ") if config.model else trace.source,
            completion_ids=None,
            forced=None,
            forced_text=tuple(move_spans(forced, own, completion)) if forced else None,
            logprobs=None,
            verdict="correct",
            scores={},
            score=None,
        )


def by_rule(completion: str) -> str:
    """Return a completion in Sky-T1's form; if it lacks a part, that is empty or missing."""
    thought, solution = parts(completion)
    if thought is None:
        mark = max(solution.rfind(mark) for mark in MARKS)
        line = _before_block(solution, solution.rfind("\n", 0, max(0, mark)) + 1)
        thought, solution = solution[:line].strip(), solution[line:].strip()
    return restyle(f"<think>\n{thought}\n</think>\n{solution}", "sky-t1")


def _before_block(text: str, line: int) -> int:
    """Return the start of the line that opens the block which is open at the start of a line, if text is before it."""
    for opening, closing in BLOCKS:
        head = text[:line]
        start = head.rfind(opening)
        is_open = head.count(opening) % 2 if opening == closing else start > head.rfind(closing)
        begin = head.rfind("\n", 0, max(0, start)) + 1
        if is_open and "\n\n" not in head[start:] and head[:begin].strip():
            line = begin
    return line


def _by_model(
    judged: Sequence[tuple[Trace, Problem]], config: ReformatConfig, prompt: Prompt, used: dict[str, Any]
) -> list[str | None]:
    """Return a model's replies without its own thoughts; None if a trace and its reply do not fit in its context."""
    from mlx_traces.models import loading

    loaded = loading.load(config.model, **config.load_arguments())
    used["model"] = loaded.about()
    questions: list[dict[str, Any]] = [
        {"question": judge.question_of(trace, problem), "trace": own_words(trace)} for trace, problem in judged
    ]
    cache = judge.Cache(Path(config.cache), "--cache")
    rows = config.sized(loaded.backend.sizes).rows
    said = judge.replies(loaded, prompt, questions, cache, config.max_tokens, rows, config.memory_limit)
    return [reply and after_last(reply, but=SKY)[0].strip() for reply in said]


def _fault(trace: Trace, problem: Problem | None, config: ReformatConfig) -> str | None:
    """Return why a trace is dropped before it is rewritten, or None."""
    if problem is None:
        return "no task can judge it"
    if trace.finish_reason == "length":
        return "cut off"
    if config.model and (trace.forced or trace.forced_text):
        return "a model would rewrite the words that were forced into it"
    if trace.forced and trace.forced_text is None:
        return "it does not say which words were forced into it"
    return None if headline(get_task(trace.task), problem, trace.completion).correct else "wrong before"


def _fault_of(text: str | None, completion: str, trace: Trace, problem: Problem) -> str | None:
    """Return why a trace is dropped after it was rewritten as ``text``, in Sky-T1's form, or None."""
    if text is None:
        return "too long for the model"
    if not format_score(text, None, "sky-t1", last_turn(trace)):
        return "not a thought and a solution"
    return None if headline(get_task(trace.task), problem, completion).correct else "wrong after"
