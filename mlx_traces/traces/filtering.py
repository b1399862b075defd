"""Filter traces by rules, in order, and report how many each rule removed. No MLX.

The result keeps the traces' order. It depends only on the traces, the settings and the seed.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

from mlx_traces.config import FilterConfig
from mlx_traces.errors import UserError
from mlx_traces.records import Problem, Trace, problem_id
from mlx_traces.tasks import get_task, task_of
from mlx_traces.tasks.prompts import Prompt
from mlx_traces.traces.files import read_traces, refuse_written, source_of, write_traces
from mlx_traces.traces.quality import headline, named, problem_of, words

SHINGLE = 5  # words
SHORT_QUESTION = 8  # words; a shorter question is not searched for within a text
Report = list[tuple[str, int, int]]
_SCORE_FIRST = "run `mlx-traces score` on the file first"


def select(
    traces: Sequence[Trace], config: FilterConfig, eval_problems: Sequence[Problem] = ()
) -> tuple[list[Trace], Report]:
    """Apply the rules that ``config`` switches on.

    Args:
        traces: the rules on components need their ``scores``; ``min_score`` and "best" need their ``score``.
        config: the rules.
        eval_problems: problems of an evaluation, which must not be trained on.

    Returns:
        The kept traces in their order, and for each rule its name, how many traces it removed and how many were left.

    Raises:
        UserError: if there are no traces, a score is missing, or a rule removes the last ones; it names the rule.
    """
    if not traces:
        raise UserError("there are no traces to select from")
    verdicts = [verdict_of(trace) for trace in traces] if config.correct_only or config.balance else []
    kept, report = list(range(len(traces))), []
    for name, rule in _rules(traces, verdicts, config, eval_problems):
        stay = set(rule(kept))
        left = [index for index in kept if index in stay]
        report.append((name, len(kept) - len(left), len(left)))
        if not left:
            lost = f"removed the last {len(kept)} of {len(traces)} traces"
            raise UserError(f"nothing is left: rule {name!r} {lost}; relax that rule")
        kept = left
    return [traces[index] for index in kept], report


Rule = Callable[[list[int]], Iterable[int]]


def _rules(
    traces: Sequence[Trace], verdicts: list[str | None], config: FilterConfig, eval_problems: Sequence[Problem]
) -> list[tuple[str, Rule]]:
    """Return the active rules: for each its name, and a function from indices to those that stay."""

    def keep(wanted: Callable[[int], bool]) -> Rule:
        return lambda indices: [index for index in indices if wanted(index)]

    def at_least(name: str, least: float) -> Rule:
        def wanted(index: int) -> bool:
            if name not in traces[index].scores:
                raise UserError(f"trace {traces[index].id} has no score {name!r}; {_SCORE_FIRST}")
            value = traces[index].scores[name]
            return value is None or value >= least

        return keep(wanted)

    wanted: list[tuple[Any, str, Rule]] = [
        (config.correct_only, "correct only", keep(lambda i: verdicts[i] in (None, "correct"))),
        (config.well_formed, "well-formed", at_least("format", 1)),
        (config.finished, "finished", keep(lambda i: traces[i].finish_reason != "length")),
        (config.min_faithfulness is not None, "faithful", at_least("faithfulness", config.min_faithfulness)),
        (config.min_score is not None, "score", keep(lambda i: score_of(traces[i]) >= config.min_score)),
        (config.duplicates, "duplicates", partial(without_duplicates, traces)),
        (config.near_duplicates is not None, "near duplicates", partial(without_near, traces, config.near_duplicates)),
        (eval_problems, "evaluation problems", keep(overlap(eval_problems, config, traces))),
        (
            config.per_problem is not None,
            f"{config.per_problem} a problem, {config.prefer}",
            partial(capped, traces, config.per_problem, config),
        ),
        (config.balance is not None, "balance", partial(balanced, traces, verdicts, config.balance, config)),
    ]
    return [(name, rule) for on, name, rule in wanted if on]


def verdict_of(trace: Trace) -> str | None:
    """Return a trace's verdict, or grade the trace if it has none; None if no task can grade it.

    Raises:
        UserError: for an unknown task, or columns that it cannot read.
    """
    if trace.verdict is not None or not trace.task:
        return trace.verdict
    task = task_of(trace.task, f"trace {trace.id}")
    return headline(task, task.parse(trace.columns, f"trace {trace.id}"), trace.completion).verdict


def score_of(trace: Trace) -> float:
    """Return a trace's score; UserError if it has none."""
    if trace.score is None:
        raise UserError(f"trace {trace.id} has no score; {_SCORE_FIRST}")
    return trace.score


# ---------------------------------------------------------------------------------- duplicates


def without_duplicates(traces: Sequence[Trace], kept: list[int]) -> list[int]:
    """Keep the first trace of each problem and text; white space is ignored."""
    first: dict[tuple[str, str], int] = {}
    for index in kept:
        first.setdefault((traces[index].id, " ".join(traces[index].completion.split())), index)
    return list(first.values())


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Return the 5-grams of words, ignoring white space and case. A shorter text is one shingle."""
    said = words(text)
    return frozenset(tuple(said[at : at + SHINGLE]) for at in range(max(1, len(said) - SHINGLE + 1)))


def jaccard(a: frozenset, b: frozenset) -> float:
    """Return the Jaccard similarity of two sets: the number of common elements over that of all elements."""
    common = len(a & b)
    return common / (len(a) + len(b) - common)


def without_near(traces: Sequence[Trace], threshold: float, kept: list[int]) -> list[int]:
    """Keep a trace unless a kept earlier one of its problem has a Jaccard similarity of ``threshold`` or more to it.

    The result is exact, and the time is not quadratic if traces differ. Two sets of similarity t share an element among
    the first (1 - t) n + 1 of each in any fixed order, here rarest first (prefix filtering, Chaudhuri et al. 2006), so
    only traces that share one of those are compared.
    """
    sets = {index: shingles(traces[index].completion) for index in kept}
    counts = Counter((traces[index].id, shingle) for index in kept for shingle in sets[index])
    holders: dict[Hashable, list[int]] = defaultdict(list)
    stay = []
    for index in kept:
        group = traces[index].id
        own = sorted(sets[index], key=lambda shingle: (counts[group, shingle], shingle))
        common = max(1, ceil(threshold * len(own) - 1e-9))  # rounding may have put it just above a whole number
        prefix = own[: len(own) - common + 1]
        rivals = {rival for shingle in prefix for rival in holders[group, shingle]}
        if any(jaccard(sets[index], sets[rival]) >= threshold for rival in rivals):
            continue
        stay.append(index)
        for shingle in prefix:
            holders[group, shingle].append(index)
    return stay


# ---------------------------------------------------------------------------------- evaluation problems


def same_problem(problems: Sequence[Problem], prompt: Prompt) -> Callable[[Problem | Trace], bool]:
    """Return a function that says whether a problem or trace is one of these problems, by its content.

    It is True for the same id, and if the question or a user's turn contains the whole question or prompt of one of
    them; case and white space are ignored. A question of fewer than `SHORT_QUESTION` words must be the whole text.
    """
    ids = {problem_id(problem.id) for problem in problems}
    asked = [str(problem.columns.get("question", "")) for problem in problems]
    asked += [prompt.messages(problem)[-1]["content"] for problem in problems]
    whole = {tuple(words(text.casefold())) for text in asked} - {()}
    starts: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    for said in whole:
        if len(said) >= SHORT_QUESTION:
            starts[said[:SHORT_QUESTION]].append(said)

    def within(said: tuple[str, ...]) -> bool:
        return said in whole or any(
            said[at : at + len(question)] == question
            for at, gram in enumerate(_grams(said, SHORT_QUESTION))
            for question in starts.get(gram, ())
        )

    def same(one: Problem | Trace) -> bool:
        texts = [str(one.columns.get("question", ""))]
        texts += [turn["content"] for turn in getattr(one, "messages", ()) if turn["role"] == "user"]
        return problem_id(one.id) in ids or any(within(tuple(words(text.casefold()))) for text in texts)

    return same


def problems_of(traces: Iterable[Trace]) -> Callable[[str], str]:
    """Return a function from a trace's id to the id that all traces of its problem share.

    They have the same id or question, or the same only turn of a user after the same system's turns; case and white
    space are ignored.
    """
    parent: dict[Hashable, Hashable] = {}  # of ids and texts; the smallest id of a problem is its own parent

    def root(key: Hashable) -> Hashable:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]  # halves the path for the next time
        return key

    for trace in traces:
        name = root(problem_id(trace.id))
        asked = [str(trace.columns.get("question", ""))]
        if sum(turn["role"] == "user" for turn in trace.messages) == 1:  # a system's turn may hold the problem
            turns = [turn["content"] for turn in trace.messages if turn["role"] not in ("assistant", "tool")]
            asked.append(" ".join(turns))
        for text in {" ".join(words(text.casefold())) for text in asked} - {""}:
            key = (text,)  # no id is equal to it
            other = root(key) if key in parent else name
            parent[name] = parent[other] = parent[key] = min(name, other)
            name = min(name, other)
    return lambda identity: root(problem_id(identity))


def overlap(problems: Sequence[Problem], config: FilterConfig, traces: Sequence[Trace]) -> Callable[[int], bool]:
    """Return a function that says whether the trace at an index is free of these problems.

    It is not if it has the id of one, or an id that belongs to their split (``Task.in_split``), or if its question,
    last user's turn or completion shares ``config.overlap_words`` words in a row with one of their questions; case and
    punctuation are ignored. The default of 13 is that of GPT-3 (arXiv 2005.14165, appendix C) and open-r1. A shorter
    question of 8 words or more must occur as a whole. With 0 only ids count.
    """
    shared, ids = config.overlap_words, {problem_id(problem.id) for problem in problems}
    in_split = get_task(config.eval_task).in_split if config.eval_task else None
    known: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    for problem in problems if shared else ():
        asked = _words(str(problem.columns.get("question", "")))
        size = min(shared, len(asked))
        if size >= min(shared, SHORT_QUESTION):
            known[size].update(_grams(asked, size))

    def free(index: int) -> bool:
        trace = traces[index]
        if problem_id(trace.id) in ids or (in_split and in_split(trace.id, config.eval_split, config.eval_data)):
            return False
        texts = [str(trace.columns.get("question", "")), trace.completion]
        texts += [turn["content"] for turn in trace.messages[-1:]]
        parts = [_words(text) for text in texts] if known else []
        return not any(gram in grams for size, grams in known.items() for part in parts for gram in _grams(part, size))

    return free


def _words(text: str) -> list[str]:
    """Return a text's words without punctuation."""
    return words(re.sub(r"[\W_]+", " ", text))


def _grams(said: Sequence[str], size: int) -> Iterable[tuple[str, ...]]:
    return zip(*(said[at:] for at in range(size)), strict=False)


# ---------------------------------------------------------------------------------- choice and balance


def capped(traces: Sequence[Trace], most: int, config: FilterConfig, kept: list[int]) -> list[int]:
    """Keep at most ``most`` traces of each problem, by ``config.prefer``.

    ``short``: the shortest, in tokens if all of the problem's traces have them, else in characters (Sky-T1-Flash
    prefers the shortest correct one). ``best``: the highest score. ``diverse``: first the highest score (the first
    trace if there are no scores), then repeatedly the trace whose nearest chosen one is farthest, by Jaccard distance
    of 5-grams. ``random``: drawn by the seed and the problem's id, independent of other problems. Of equal ones the
    first is kept.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index in kept:
        groups[traces[index].id].append(index)
    stay = []
    for identity, group in groups.items():
        if len(group) <= most:
            stay += group
        elif config.prefer == "random":
            stay += random.Random(f"{config.seed} {identity}").sample(group, most)
        elif config.prefer == "diverse":
            stay += _diverse(traces, group, most)
        elif config.prefer == "best":
            stay += sorted(group, key=lambda index: -score_of(traces[index]))[:most]
        else:
            known = all(traces[index].completion_ids is not None for index in group)
            stay += sorted(group, key=lambda i: len(traces[i].completion_ids if known else traces[i].completion))[:most]
    return stay


def _diverse(traces: Sequence[Trace], group: list[int], most: int) -> list[int]:
    """Choose the best trace, then repeatedly the one that is farthest from all chosen ones."""
    sets = {index: shingles(traces[index].completion) for index in group}
    chosen = [max(group, key=lambda index: traces[index].score or 0.0)]
    nearest = dict.fromkeys(group, 2.0)
    while len(chosen) < most:
        for index in group:
            nearest[index] = min(nearest[index], 1 - jaccard(sets[index], sets[chosen[-1]]))
        nearest[chosen[-1]] = -1.0
        chosen.append(max(group, key=nearest.__getitem__))
    return chosen


def balanced(
    traces: Sequence[Trace], verdicts: list[str | None], most: float, config: FilterConfig, kept: list[int]
) -> list[int]:
    """Keep for each difficulty at most ``most`` times the median number of traces per difficulty, and at least one.

    A problem's difficulty is its stratum, or the bin of its pass rate over all given traces, before any rule. Problems
    that no task can grade form a separate difficulty. The kept traces are drawn by the seed.
    """
    judged: dict[str, list[bool]] = defaultdict(list)
    for trace, verdict in zip(traces, verdicts, strict=True):
        if verdict is not None:
            judged[trace.id].append(verdict == "correct")
    bins: dict[str, list[int]] = defaultdict(list)
    for index in kept:
        trace, label = traces[index], ""
        if config.difficulty == "stratum":
            problem = problem_of(trace, f"trace {trace.id}")
            label = problem.stratum if problem else ""
        elif outcomes := judged.get(trace.id):
            label = str(min(int(sum(outcomes) / len(outcomes) * config.bins), config.bins - 1))
        bins[label].append(index)
    cap = max(1, int(most * median(len(members) for members in bins.values())))
    stay = []
    for name, members in sorted(bins.items()):
        draw = random.Random(f"{config.seed} balance {name}")
        stay += members if len(members) <= cap else draw.sample(members, cap)
    return stay


def filter_file(source: Path, out: Path, config: FilterConfig) -> Report:
    """Write the selected traces of a file to a new one with its manifest; return the report of `select`.

    Raises:
        UserError: if ``out`` exists, before anything is read; for the reasons of `select`.
    """
    refuse_written(out)
    origin = source_of(source)
    settings = config.model_dump(mode="json") | named(config)
    traces = [trace for _, trace in read_traces(source)]
    if not traces:
        raise UserError(f"{source} has no traces")
    problems = []
    if config.eval_task:
        problems = get_task(config.eval_task).load(
            config.eval_split, config.eval_data, config.eval_limit, config.eval_seed
        )
    elif config.eval_data:
        raise UserError(f"--eval-data {config.eval_data}: name its task with --eval-task")
    kept, report = select(traces, config, problems)
    counts = {"removed": {rule: removed for rule, removed, _ in report}}
    manifest = {**origin, "config": settings, "counts": counts, "seed": config.seed, "problems": problems}
    write_traces(out, kept, manifest)
    return report
