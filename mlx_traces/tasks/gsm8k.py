"""GSM8K: grade-school word problems with a number as the answer (arXiv 2110.14168). No MLX."""

import random
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_traces.errors import UserError, unknown
from mlx_traces.readers import file_rows, is_file
from mlx_traces.records import Problem, Score, problem_id
from mlx_traces.tasks import Task
from mlx_traces.tasks.answers import (
    flexible,
    judge_lm_eval,
    judge_number,
    lm_eval_text,
    same_number,
    strict,
    tolerant,
)
from mlx_traces.tasks.data import content_id, hub_rows, load_rows, split_slice, text_column
from mlx_traces.tasks.numbers import last_number, parse_number
from mlx_traces.tasks.prompts import Prompt

HUB, CONFIG, SPLITS = "openai/gsm8k", "main", ("train", "test")
INSTEAD = 'pass --data FILE with one {"question", "answer"} object per line'
SHOTS_INSTEAD = INSTEAD.replace("--data", "--shots-data")

BY_VALUE = {"tolerant": tolerant, "last_number": last_number}
BY_LM_EVAL = {"strict": strict, "flexible": flexible}


def grade(problem: Problem, response: str) -> dict[str, Score]:
    """Judge a response by every extractor: two compare exact values, lm-eval's two filters compare text as it does."""
    gold = parse_number(problem.gold)
    scores = {name: judge_number(find(response), gold) for name, find in BY_VALUE.items()}
    scores |= {name: judge_lm_eval(find(response), problem.gold) for name, find in BY_LM_EVAL.items()}
    return {name: scores[name] for name in TASK.extractors}


def same(extracted: str, gold: str, extractor: str) -> str:
    """Return the canonical form of an answer: its exact value, or its text as lm-eval compares it."""
    return (same_number if extractor in BY_VALUE else lm_eval_text)(extracted)


def parse(row: dict[str, Any], where: str) -> Problem:
    """Make a Problem of a row; ``answer`` is a number or a worked solution that ends in ``#### number``.

    A row without a ``question`` can be graded but not become a prompt.
    """
    question, answer = text_column(row, "question", where, default=""), text_column(row, "answer", where)
    gold = answer.rpartition("####")[2].strip()
    if parse_number(gold) is None:  # with its commas, as 12,50 is no number
        raise UserError(f"{where}: 'answer' has no number, alone or after ####: {answer[-60:]!r}")
    return Problem(content_id("gsm8k", question or answer), dict(row), gold.replace(",", ""))


def _parse_asked(row: dict[str, Any], where: str) -> Problem:
    text_column(row, "question", where)
    return parse(row, where)


def load(split: str, data: str | None, limit: int | None, seed: int, instead: str = INSTEAD) -> list[Problem]:
    """Return problems of the hub's GSM8K, of a JSON-lines file, or of another hub set with the same columns.

    Args:
        split: ``train`` or ``test``, or a part such as ``test[:64]``; for a file only the part counts.
        data: a file, a hub data set ``owner/name``, or None for ``openai/gsm8k``.
        limit: size of a seeded sample of those rows, or None for all.
        seed: of the sample.
        instead: the end of the message about a failed download.
    """
    name, span = split_slice(split)
    source = data or HUB
    if data and is_file(data):
        rows = file_rows(Path(data), TASK.columns)
    elif source.partition("@")[0] == HUB:
        if name not in SPLITS:
            raise unknown("split", name, SPLITS)
        rows = hub_rows(source, CONFIG, name, instead)
    else:
        rows = hub_rows(source, None, name, instead)
    return load_rows(islice(rows, span.start or 0, span.stop), _parse_asked, limit, seed, source)


# ---------------------------------------------------------------------------------- prompt styles

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."  # Qwen2.5-Math's
PROMPTS = {
    prompt.name: prompt
    for prompt in (
        Prompt(name="plain", user="{question}"),
        Prompt(name="boxed", system=BOXED, user="{question}"),
        Prompt(
            name="hash",
            user="{question}\n\nSolve this step by step. "
            "Then end with one line: #### followed by the answer as a number.",
        ),
        Prompt(
            name="brief",
            user="{question}\n\nSolve it in one or two short sentences, then write #### and the number.",
        ),
        Prompt(
            name="thinking",
            user="{question}\n\nThink first, between <think> and </think>. "
            "Then give the answer alone, as a number: <answer>number</answer>.",
        ),
    )
}

STOP = ("Question:", "</s>", "<|im_end|>")  # lm-eval's


def _examples(shots: int, seed: int, data: str | None, leave_out: frozenset[str]) -> list[tuple[str, str]]:
    """Draw distinct training problems, none in ``leave_out``, as (question, worked solution), both verbatim."""
    problems = load("train", data, None, seed, SHOTS_INSTEAD)
    unasked = {problem.id for problem in problems if "#" not in problem.id}
    unasked -= {problem_id(identity) for identity in leave_out}
    if not 0 <= shots <= len(unasked):
        way = "the rest is in the evaluation: pass other examples with --shots-data FILE" if leave_out else "take fewer"
        raise UserError(f"--shots {shots}: {data or HUB} has {len(unasked)} to choose from; {way}")
    drawn = random.Random(seed).sample(problems, len(problems))  # all, so leaving one out does not change the others
    chosen = [problem for problem in drawn if problem.id in unasked][:shots]
    return [(str(problem.columns["question"]), str(problem.columns["answer"])) for problem in chosen]


def fewshot(shots: int, seed: int, data: str | None, leave_out: frozenset[str] = frozenset()) -> Prompt:
    """Return lm-eval's prompt: examples and question as one text, without a chat template.

    Args:
        shots: number of examples.
        seed: of the sample of examples.
        data: a file or hub data set of training problems, or None for ``openai/gsm8k``.
        leave_out: ids of the problems to evaluate; none of them becomes an example.
    """
    examples = _examples(shots, seed, data, leave_out)
    examples = (f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in examples)
    text = "".join(examples).replace("{", "{{").replace("}", "}}")
    return Prompt(name="fewshot", user=f"{text}Question: {{question}}\nAnswer:", chat=False, stop=STOP)


def fewshot_chat(shots: int, seed: int, data: str | None, leave_out: frozenset[str] = frozenset()) -> Prompt:
    """Return lm-eval's prompt with each example as two turns of the chat; arguments as for ``fewshot``."""
    examples = _examples(shots, seed, data, leave_out)
    turns = tuple((f"Question: {question}\nAnswer:", answer) for question, answer in examples)
    return Prompt(name="fewshot-chat", user="Question: {question}\nAnswer:", shots=turns, stop=STOP)


TASK = Task(
    name="gsm8k",
    columns=("question", "answer"),
    graded_columns=("answer",),
    gold_columns=("answer",),
    extractors=("tolerant", "strict", "flexible", "last_number"),
    prompts=PROMPTS,
    default_prompt="plain",
    parse=parse,
    load=load,
    grade=grade,
    same=same,
    few_shot={"fewshot": fewshot, "fewshot-chat": fewshot_chat},
)
