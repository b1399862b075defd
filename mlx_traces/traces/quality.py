r"""Scores of a trace: functions from text to a number from 0 to 1, or to None if a score does not apply. No MLX.

Each takes time linear in the text; nothing is executed, and no number has more than 40 digits. They are pure functions,
so the same ones filter a data set and reward a policy.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mlx_traces.config import ScoreConfig, TracesConfig
from mlx_traces.records import Problem, Score, Trace
from mlx_traces.tasks import Task, get_task, task_of
from mlx_traces.tasks.thoughts import SKY, TAGS, UNTAGGED, Pair, first_thought
from mlx_traces.traces.equations import faithfulness

COMPONENTS = ("correct", "format", "structure", "faithfulness", "length", "repetition", "perplexity", "judge")
Scores = dict[str, float | None]

MAX_TEXT = 200_000  # characters that structure and repetition read, from the start


def text_scores(
    completion: str, finish_reason: str | None, tokens: int | None, settings: ScoreConfig, prompt: str = ""
) -> Scores:
    """Return the scores that need no model, by name.

    Args:
        completion: the assistant's whole turn, including what its template or prompt opened.
        finish_reason: ``"stop"``, ``"length"``, or None if unknown.
        tokens: length of the completion, or None if unknown; then words are counted.
        settings: tags and the length limit.
        prompt: the user's last turn; a thought that only copies it is no thought.
    """
    thought = thought_of(completion, settings.tags)
    return {
        "format": format_score(completion, finish_reason, settings.tags, prompt),
        "structure": structure(thought),
        "faithfulness": faithfulness(thought),
        "length": length(len(words(completion)) if tokens is None else tokens, settings.length_limit),
        "repetition": repetition(completion),
    }


def headline(task: Task, problem: Problem, completion: str) -> Score:
    """Judge a completion by the task's headline extractor."""
    return task.grade(problem, completion)[task.extractors[0]]


def named(config: TracesConfig) -> dict[str, str]:
    """Load the task that the user names for a file of traces; return its entry in the manifest (empty: no plug-in)."""
    return get_task(config.task).identity if config.task else {}


def problem_of(trace: Trace, where: str) -> Problem | None:
    """Return the problem that a trace answers, None without a task; UserError with ``where`` for an unknown task."""
    if not trace.task:
        return None
    return task_of(trace.task, where).parse(trace.columns, where)


def own_words(trace: Trace) -> str:
    """Return a completion without its prompt's prefill, which the model did not write."""
    prompts = task_of(trace.task, f"trace {trace.id}").prompts if trace.task else {}
    prefill = prompts[trace.prompt].prefill.removesuffix("<think>") if trace.prompt in prompts else ""
    return trace.completion.removeprefix(prefill)


def last_turn(trace: Trace) -> str:
    """Return the text of the turn that the completion answers; empty if there is none."""
    return trace.messages[-1]["content"] if trace.messages else ""


def combined(scores: Mapping[str, float | None], mix: Mapping[str, float]) -> float:
    """Return one score: 0 for a wrong trace, (1 + m) / 2 for a correct one, m for one that was not graded.

    m is the mean, weighted by ``mix``, of the other components that apply, and 1 if none does. So every correct trace
    has at least 0.5, and a wrong answer scores 0 whatever its form.
    """
    correct = scores.get("correct")
    if correct is not None and correct < 1:
        return 0.0
    parts = [(mix.get(name, 0.0), value) for name, value in scores.items() if name != "correct" and value is not None]
    total = sum(weight for weight, _ in parts)
    mean = min(1.0, sum(weight * value for weight, value in parts) / total) if total else 1.0
    return mean if correct is None else (1 + mean) / 2


# ---------------------------------------------------------------------------------------------- format


@dataclass(frozen=True)
class Style:
    """Tags around the thought and around the answer or solution; None if all text after the thought is the answer."""

    thought: tuple[str, str]
    answer: tuple[str, str] | None


STYLES = {
    "think": Style(("<think>", "</think>"), ("<answer>", "</answer>")),
    "r1": Style(("<think>", "</think>"), None),
    "sky-t1": Style(SKY, ("<|begin_of_solution|>", "<|end_of_solution|>")),
}
_ALL_TAGS = {tag.lower() for pair in TAGS for tag in pair if tag != UNTAGGED} | {
    tag for style in STYLES.values() if style.answer for tag in style.answer
}


def format_score(completion: str, finish_reason: str | None, tags: str, prompt: str = "") -> float:
    """Return 1 for one thought and then one answer or solution with nothing before, between or after; else 0.

    As a reward it is hard to exploit: every tag occurs exactly once, in order, so no answer is repeated or hidden in
    the thought; no tag of another style occurs; thought and answer have a letter or digit; the thought does not only
    copy the prompt; and the completion was not cut off. A Sky-T1 solution may mark its answer by one
    ``<answer>…</answer>``. With tags ``"none"`` any text that is not empty and was not cut off is well-formed.
    """
    if finish_reason == "length":
        return 0.0
    text = completion.strip()
    if tags == "none":
        return float(bool(text))
    style, lower = STYLES[tags], text.lower()
    wanted = (*style.thought, *(style.answer or ()))
    if tags == "sky-t1" and "<answer>" in lower:
        wanted = (*wanted[:3], *STYLES["think"].answer, wanted[3])
    if any(lower.count(tag) != 1 for tag in wanted) or any(tag in lower for tag in _ALL_TAGS - set(wanted)):
        return 0.0
    between = re.split("|".join(map(re.escape, wanted)), lower)
    before, thought, *rest = between
    gap, *answer, after = rest if style.answer else ("", *rest, "")
    in_order = [lower.find(tag) for tag in wanted] == sorted(lower.find(tag) for tag in wanted)
    if not in_order or before.strip() or gap.strip() or after.strip():
        return 0.0
    stated = answer[1] if len(answer) > 1 else answer[0]  # the text in <answer> tags, else the whole solution
    return float(bool(_WORD.search(stated)) and _adds(thought, prompt))


_WORD = re.compile(r"\w")


def _adds(thought: str, prompt: str) -> bool:
    """Whether a thought has words, and more than copies of the prompt or a part of it."""
    said, asked = (f" {' '.join(text.lower().split())} " for text in (thought, prompt))
    if asked.strip():
        said = said.replace(asked.rstrip(), "")
    return bool(_WORD.search(said)) and said not in asked


def thought_of(completion: str, tags: str) -> str | None:
    """Return the first thought, up to the text's end if it is open; None without one; the whole text for tags none."""
    span = thought_span(completion, tags)
    return span and completion[slice(*span)]


def thought_span(completion: str, tags: str, own: Pair | None = None) -> tuple[int, int] | None:
    """Return the first character of the thought that `thought_of` returns, and the one after its last.

    The style's own tags are tried first, then all of ``thoughts.TAGS``, then the model's (``own``).
    """
    if tags == "none":
        return 0, len(completion)
    return first_thought(completion, (STYLES[tags].thought, *TAGS, *filter(None, [own])))


# ---------------------------------------------------------------------------------------------- structure

STEPS, VERIFICATIONS, REFLECTIONS = 5, 2, 2  # numbers that score highest; more add nothing
_STEP = re.compile(r"\n+|(?<=[.!?])\s+")
_VERIFICATION = re.compile(
    r"\b(?:double[- ]check|check|checks|checked|checking|verify|verifies|verified|verifying|verification|confirm"
    r"|confirms|confirmed|confirming|make sure|plug back|substitute back)\b|\b(?:yes|no)[.!,]?$"
)
_REFLECTION = re.compile(
    r"\b(?:wait|hmm|however|alternatively|actually|instead|mistake|mistaken|reconsider|rethink|re-?examine|let me try"
    r"|try again|another way|another approach|on second thought|go back|not right|that's wrong|that is wrong)\b"
)


def structure(thought: str | None) -> float | None:
    """Return min(1, s/5) / 2 + min(1, v/2) / 4 + min(1, r/2) / 4; 0 without a word, None without a thought.

    s is the number of different steps, which are lines and sentences of at least two words. v is the number of steps
    with a word of verification (*check*, *verify*, ..., or a final *yes* or *no*, as in nano's search), r that of steps
    with a word of reflection (*wait*, *however*, *alternatively*, ...). Only whole words count: *waiter* is not *wait*.
    """
    if thought is None:
        return None
    steps = {" ".join(step.lower().split()) for step in _STEP.split(thought[:MAX_TEXT])}
    steps = {step for step in steps if " " in step and _WORD.search(step)}
    verified = sum(bool(_VERIFICATION.search(step)) for step in steps)
    reflected = sum(bool(_REFLECTION.search(step)) for step in steps)
    parts = (len(steps) / STEPS, verified / VERIFICATIONS, reflected / REFLECTIONS)
    return sum(share * min(1.0, part) for share, part in zip((0.5, 0.25, 0.25), parts, strict=True))


# ---------------------------------------------------------------------------------------------- length, repetition

N = 4  # words in an n-gram
_UNSPACED = re.compile(  # Han, kana, bopomofo: written without spaces; Korean has them
    "[\u3005-\u3007\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff]"
)


def words(text: str) -> list[str]:
    """Return a text's words in lower case; each Chinese or Japanese character is a word, as there are no spaces."""
    return _UNSPACED.sub(r" \g<0> ", text.lower()).split()


def length(amount: int, limit: int) -> float:
    """Return 1 - amount / limit, at least 0."""
    return max(0.0, 1 - amount / limit)


def repetition(text: str) -> float | None:
    """Return the number of different 4-grams of words over that of all, or the same for lines if that is lower.

    The former is 1 - seq-rep-4 of Welleck et al. (arXiv 1908.04319). None for fewer than 4 words.
    """
    said = words(text := text[:MAX_TEXT])
    if len(said) < N:
        return None
    grams = list(zip(*(said[i:] for i in range(N)), strict=False))
    lines = [line for line in map(str.strip, text.lower().splitlines()) if line]
    return min(len(set(grams)) / len(grams), len(set(lines)) / len(lines))
