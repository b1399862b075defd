"""A model's replies about traces: one greedy completion each, sampled in batches and cached by a hash of the prompt.

The cache is a file, so no request is repeated, even after an interruption. A judge grades a trace by a rubric.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_traces.config import RLConfig, ScoreConfig
from mlx_traces.errors import UserError
from mlx_traces.readers import read_jsonl
from mlx_traces.records import Problem, Trace
from mlx_traces.tasks.prompts import Prompt, load_prompt
from mlx_traces.tasks.thoughts import answer_part
from mlx_traces.traces.quality import last_turn


class Cache:
    """A model's replies by key, in a file of JSON lines that grows with each reply."""

    def __init__(self, path: Path, option: str = "--judge-cache"):
        self.path, self.option = path, option
        self.replies: dict[str, str] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        """Read the file; end its last line, or remove one that an interrupted writer left incomplete after whole ones.

        Nothing else is changed: a file that is no cache is refused and stays as it is.
        """
        try:
            content = self.path.read_bytes()
            *lines, last = content.split(b"\n")
            whole, read, end = sum(bool(line.strip()) for line in lines), 0, b"\n"
            try:
                for where, row in read_jsonl(self.path, ("key", "reply")):
                    if not isinstance(row["key"], str) or not isinstance(row["reply"], str):
                        raise UserError(f"{where}: 'key' and 'reply' must be texts; remove the file to begin a new one")
                    self.replies[row["key"]] = row["reply"]
                    read += 1
            except UserError:
                if not last or not read or read < whole:
                    raise
                content, end = content[: -len(last)], b""
            if last:
                with self.path.open("r+b") as file:
                    file.truncate(len(content))
                    file.seek(len(content))
                    file.write(end)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}); choose another {self.option}") from None

    def add(self, key: str, reply: str) -> None:
        """Add a reply, also to the file."""
        self.replies[key] = reply
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "reply": reply}) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); choose another {self.option}"
            ) from None


def replies(
    loaded: Any,
    prompt: Prompt,
    questions: Sequence[Mapping[str, Any]],
    cache: Cache,
    max_tokens: int,
    rows: int,
    memory_limit: float | None = None,
) -> list[str | None]:
    """Complete a prompt greedily for each question; return the replies.

    The key in the cache is a hash of the model, the prompt's tokens and the token limit.

    Args:
        loaded: the model.
        prompt: with placeholders for the questions' columns.
        questions: for each one its columns.
        cache: new replies are added to it.
        max_tokens: maximum length of a reply.
        rows: batch size.
        memory_limit: in GB.

    Returns:
        The replies, without what the template opens; None if question and reply do not fit in the model's context.
    """
    from mlx_traces.engine import generation, sampling
    from mlx_traces.models import adapters

    name, adapter, files, adapter_files = identity_of(loaded)
    identity = [name, adapter, files, max_tokens, adapter_files, list(prompt.stop)]
    keys, requests = [], {}
    for columns in questions:
        rendered = loaded.render(prompt, Problem("", dict(columns), ""))
        key = hashlib.sha256(json.dumps([*identity, rendered.ids]).encode()).hexdigest()[:24]
        keys.append(key)
        fits = loaded.context is None or len(rendered.ids) + max_tokens <= loaded.context
        if fits and key not in cache.replies:
            requests[key] = sampling.Request.of(rendered)
    asked, params = list(requests), sampling.SamplingParams(max_tokens=max_tokens, stop=prompt.stop)
    if asked:
        with adapters.merged(loaded.model, loaded.backend):
            done = generation.generate(loaded, list(requests.values()), params, rows, memory_gb=memory_limit)
            for index, rollout in done:
                cache.add(asked[index], rollout.text)
    return [cache.replies.get(key) for key in keys]


def identity_of(loaded: Any) -> list[str | None]:
    """Return the names of a model and its adapter, then the fingerprints of their files."""
    files = loaded.fingerprints
    return [loaded.name, loaded.adapter, loaded.revision or files["model"], files["adapter"]]


# ---------------------------------------------------------------------------------- a judge

RUBRIC = Prompt(
    name="rubric",
    user="""You grade the reasoning of a solution.

Question:
{question}

Reasoning and answer:
{trace}

Grade the reasoning from 0 to 1: are its steps correct, does each follow from the ones before, is nothing missing, and \
is nothing there that does not help? Write one short paragraph, then end with one line of exactly this form:
Score: 0.5""",
)
_SCORE = re.compile(r"Score: ?(0(?:\.[0-9]{1,6})?|1(?:\.0{1,6})?)")
_ANY_SCORE = re.compile(r"^[\s*#>_-]*score\b", re.IGNORECASE | re.MULTILINE)


def parse_judgement(reply: str) -> float | None:
    """Return the number from 0 to 1 in the last line, ``Score: 0.8``; None for another form or a second score.

    The judge's own thought is not read.
    """
    reply = answer_part(reply).strip()
    match = _SCORE.fullmatch(reply.rpartition("\n")[2].strip())
    return float(match[1]) if match and len(_ANY_SCORE.findall(reply)) == 1 else None


def judge(
    loaded: Any, traces: Sequence[Trace], problems: Sequence[Problem | None], config: ScoreConfig | RLConfig
) -> list[float | None]:
    """Grade each trace with a model, by the rubric; None if its reply has no grade, or does not fit in its context.

    Raises:
        UserError: if more than a share ``judge_failures`` of them is None, or the rubric or the cache cannot be read.
    """
    said = judgements(loaded, traces, problems, config)
    grades = [parse_judgement(reply or "") for reply in said]
    refuse_failures(loaded, grades.count(None), len(grades), said, config)
    return grades


def judgements(
    loaded: Any, traces: Sequence[Trace], problems: Sequence[Problem | None], config: ScoreConfig | RLConfig
) -> list[str | None]:
    """Return the judge's replies, None if trace and reply do not fit in its context; UserError as in `judge`."""
    prompt = load_prompt(Path(config.judge_prompt)) if config.judge_prompt else RUBRIC
    questions = [
        {"question": question_of(trace, problem), "trace": trace.completion}
        for trace, problem in zip(traces, problems, strict=True)
    ]
    cache = Cache(Path(config.judge_cache))
    rows = config.sized(loaded.backend.sizes).rows
    return replies(loaded, prompt, questions, cache, config.judge_max_tokens, rows, config.memory_limit)


def refuse_failures(
    loaded: Any, failed: int, total: int, said: Sequence[str | None], config: ScoreConfig | RLConfig
) -> None:
    """Raise UserError if more than a share ``judge_failures`` of the judge's replies has no grade."""
    if failed <= config.judge_failures * total:
        return
    bad = [reply for reply in said if reply is not None and parse_judgement(reply) is None]
    sample = bad[0] if bad else "nothing: the traces are too long"
    raise UserError(
        f"{loaded.name} gave no 'Score: 0.8' line for {failed} of {total} traces (it says "
        f"{sample.strip()[-60:]!r}); take another judge, or raise --judge-failures"
    )


def question_of(trace: Trace, problem: Problem | None) -> str:
    """Return the problem's question, or the last user's turn if it has none."""
    return str((problem.columns if problem else {}).get("question") or last_turn(trace))
