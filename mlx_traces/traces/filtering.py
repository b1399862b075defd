"""Which traces are kept: rules applied in order, each telling how many it removed. No MLX.

The result keeps the traces' order and depends on the traces, the settings and the seed alone.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from statistics import median

from mlx_traces.config import FilterConfig
from mlx_traces.errors import UserError
from mlx_traces.records import Problem, Trace, problem_id
from mlx_traces.tasks import get_task, task_of
from mlx_traces.tasks.prompts import Prompt
from mlx_traces.traces.files import read_traces, refuse_written, source_of, write_traces
from mlx_traces.traces.quality import headline, named, words

SHINGLE = 5  # words
SHORT_QUESTION = 8  # words; a shorter one is known by its problem's id alone
Report = list[tuple[str, int, int]]
_SCORE_FIRST = "run `mlx-traces score` on the file first"


def select(
    traces: Sequence[Trace], config: FilterConfig, eval_problems: Sequence[Problem] = ()
) -> tuple[list[Trace], Report]:
    """Apply the rules that ``config`` switches on.

    Args:
        traces: their ``scores`` are needed by the rules on scores, and ``score`` for "best".
        config: the rules.
        eval_problems: what will be evaluated and so must not be trained on.

    Returns:
        The kept traces in their order, and for each rule its name, how many traces it removed and how many were left.

    Raises:
        UserError: where there are no traces, a score is missing, or a rule removes the last ones; it names the rule.
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
            raise UserError(f"nothing is left: rule {name!r} removed the last {len(kept)} of {len(traces)} traces")
        kept = left
    return [traces[index] for index in kept], report


Rule = Callable[[list[int]], Iterable[int]]


def _rules(
    traces: Sequence[Trace], verdicts: list[str | None], config: FilterConfig, eval_problems: Sequence[Problem]
) -> list[tuple[str, Rule]]:
    """Return the rules that are switched on: names, and functions from indices to those that stay."""

    def keep(wanted: Callable[[int], bool]) -> Rule:
        return lambda indices: [index for index in indices if wanted(index)]

    def at_least(name: str, least: float) -> Rule:
        def wanted(index: int) -> bool:
            value = _score(traces[index], name)
            return value is None or value >= least

        return keep(wanted)

    groups = [trace.id for trace in traces]
    rules: list[tuple[str, Rule | None]] = [
        ("correct only", keep(lambda i: verdicts[i] in (None, "correct")) if config.correct_only else None),
        ("well-formed", at_least("format", 1) if config.well_formed else None),
        ("finished", keep(lambda i: traces[i].finish_reason != "length") if config.finished else None),
        ("faithful", _when(config.min_faithfulness, lambda least: at_least("faithfulness", least))),
        ("score", _when(config.min_score, lambda least: keep(lambda i: _combined(traces[i]) >= least))),
        ("duplicates", (lambda kept: _unlike(traces, kept)) if config.duplicates else None),
        (
            "near duplicates",
            _when(config.near_duplicates, lambda t: lambda kept: _without_near(traces, groups, kept, t)),
        ),
        (
            "evaluation problems",
            keep(overlap(eval_problems, config.overlap_words, traces)) if eval_problems else None,
        ),
        (
            f"{config.per_problem} a problem, {config.prefer}",
            _when(config.per_problem, lambda most: lambda kept: _capped(traces, kept, most, config)),
        ),
        (
            "balance",
            _when(config.balance, lambda most: lambda kept: _balanced(traces, verdicts, kept, most, config)),
        ),
    ]
    return [(name, rule) for name, rule in rules if rule is not None]


def _when(value: float | None, make: Callable[[float], Rule]) -> Rule | None:
    return None if value is None else make(value)


def verdict_of(trace: Trace) -> str | None:
    """Return a trace's verdict, judging it if that was not done; None if no task can.

    Raises:
        UserError: for an unknown task, or columns that it cannot read.
    """
    if trace.verdict is not None or not trace.task:
        return trace.verdict
    task = task_of(trace.task, f"trace {trace.id}")
    return headline(task, task.parse(trace.columns, f"trace {trace.id}"), trace.completion).verdict


def _score(trace: Trace, name: str) -> float | None:
    if name not in trace.scores:
        raise UserError(f"trace {trace.id} has no score {name!r}; {_SCORE_FIRST}")
    return trace.scores[name]


def _combined(trace: Trace) -> float:
    if trace.score is None:
        raise UserError(f"trace {trace.id} has no score; {_SCORE_FIRST}")
    return trace.score


# ---------------------------------------------------------------------------------- duplicates


def _unlike(traces: Sequence[Trace], kept: list[int]) -> list[int]:
    """Keep the first trace of each problem and text, white space aside."""
    first: dict[tuple[str, str], int] = {}
    for index in kept:
        first.setdefault((traces[index].id, " ".join(traces[index].completion.split())), index)
    return list(first.values())


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Return the 5-grams of words, white space and case aside; a shorter text is one shingle."""
    said = words(text)
    return frozenset(tuple(said[at : at + SHINGLE]) for at in range(max(1, len(said) - SHINGLE + 1)))


def jaccard(a: frozenset, b: frozenset) -> float:
    """Return how much two sets share: common elements over all elements."""
    common = len(a & b)
    return common / (len(a) + len(b) - common)


def _without_near(traces: Sequence[Trace], groups: list[str], kept: list[int], threshold: float) -> list[int]:
    """Keep a trace unless a kept earlier one of its problem has a Jaccard similarity of ``threshold`` or more to it.

    Exact, and not quadratic where traces differ: two sets that similar have a common element among the first
    (1 - t) n + 1 of each in any fixed order, rarest first (prefix filtering, Chaudhuri et al. 2006), so only traces
    that share one of those are compared.
    """
    sets = {index: shingles(traces[index].completion) for index in kept}
    counts = Counter((groups[index], shingle) for index in kept for shingle in sets[index])
    holders: dict[Hashable, list[int]] = defaultdict(list)
    stay = []
    for index in kept:
        own = sorted(sets[index], key=lambda shingle: (counts[groups[index], shingle], shingle))
        prefix = own[: len(own) - _ceil(threshold * len(own)) + 1]
        rivals = {rival for shingle in prefix for rival in holders[groups[index], shingle]}
        if any(jaccard(sets[index], sets[rival]) >= threshold for rival in rivals):
            continue
        stay.append(index)
        for shingle in prefix:
            holders[groups[index], shingle].append(index)
    return stay


def _ceil(value: float) -> int:
    """Round up, but not what rounding has put just above a whole number."""
    return max(1, -int(-(value - 1e-9) // 1))


# ---------------------------------------------------------------------------------- evaluation problems


def same_problem(problems: Sequence[Problem], prompt: Prompt) -> Callable[[Problem | Trace], bool]:
    """Return the function that says whether a problem or trace is one of these problems, by its content.

    It is if it has the id of one, or the whole question of one, or its prompt, in its question or a user's turn; case
    and white space aside, and of a question below `SHORT_QUESTION` words only if nothing stands beside it.
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


def overlap(problems: Sequence[Problem], shared: int, traces: Sequence[Trace]) -> Callable[[int], bool]:
    """Return the function that says whether the trace of an index is free of these problems.

    A trace is not if its problem is one of them, by id, or if its question, its last user's turn or its text has
    ``shared`` words in a row of one of their questions, case and punctuation aside: 13, as for GPT-3 (arXiv 2005.14165,
    appendix C) and open-r1. A question shorter than that counts as a whole from 8 words on. 0 words: only ids.
    """
    ids = {problem_id(problem.id) for problem in problems}
    known: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    for problem in problems if shared else ():
        asked = _words(str(problem.columns.get("question", "")))
        size = min(shared, len(asked))
        if size >= min(shared, SHORT_QUESTION):
            known[size].update(_grams(asked, size))

    def free(index: int) -> bool:
        trace = traces[index]
        if problem_id(trace.id) in ids:
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


def _capped(traces: Sequence[Trace], kept: list[int], most: int, config: FilterConfig) -> list[int]:
    """Keep at most so many traces of each problem, by preference.

    ``short``: the shortest, in tokens where all of the problem's are known, else in characters (as Sky-T1-Flash's
    preference for the shortest correct one). ``best``: the highest score. ``diverse``: the highest score (the first,
    without scores), then always the one whose nearest chosen one is farthest by Jaccard distance of 5-grams.
    ``random``: drawn by the seed and the problem's id, whatever other problems there are. Ties go to the first.
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
            stay += sorted(group, key=lambda index: -_combined(traces[index]))[:most]
        else:
            known = all(traces[index].completion_ids is not None for index in group)
            stay += sorted(group, key=lambda i: len(traces[i].completion_ids if known else traces[i].completion))[:most]
    return stay


def _diverse(traces: Sequence[Trace], group: list[int], most: int) -> list[int]:
    """Choose greedily by the largest distance to the nearest chosen one."""
    sets = {index: shingles(traces[index].completion) for index in group}
    chosen = [max(group, key=lambda index: traces[index].score or 0.0)]
    nearest = dict.fromkeys(group, 2.0)
    while len(chosen) < most:
        for index in group:
            nearest[index] = min(nearest[index], 1 - jaccard(sets[index], sets[chosen[-1]]))
        nearest[chosen[-1]] = -1.0
        chosen.append(max(group, key=nearest.__getitem__))
    return chosen


def _balanced(
    traces: Sequence[Trace], verdicts: list[str | None], kept: list[int], most: float, config: FilterConfig
) -> list[int]:
    """Keep at most ``most`` x the median number of traces over the difficulties that have any, at least one each.

    A problem's difficulty is its stratum, or the bin of its pass rate among all traces that were given, before any
    rule; problems that no task can judge are a difficulty of their own. What is kept is drawn by the seed.
    """
    if config.difficulty == "stratum":
        label = {index: _stratum(traces[index]) for index in kept}
    else:
        label = {
            index: "" if rate is None else str(min(int(rate * config.bins), config.bins - 1))
            for index, rate in _pass_rates(traces, verdicts, kept).items()
        }
    bins: dict[str, list[int]] = defaultdict(list)
    for index in kept:
        bins[label[index]].append(index)
    cap = max(1, int(most * median(len(members) for members in bins.values())))
    stay = []
    for name, members in sorted(bins.items()):
        draw = random.Random(f"{config.seed} balance {name}")
        stay += members if len(members) <= cap else draw.sample(members, cap)
    return stay


def _stratum(trace: Trace) -> str:
    where = f"trace {trace.id}"
    return task_of(trace.task, where).parse(trace.columns, where).stratum if trace.task else ""


def _pass_rates(traces: Sequence[Trace], verdicts: list[str | None], kept: list[int]) -> dict[int, float | None]:
    """Return for each kept trace which share of its problem's judged traces is correct, None if none was judged."""
    judged: dict[str, list[bool]] = defaultdict(list)
    for trace, verdict in zip(traces, verdicts, strict=True):
        if verdict is not None:
            judged[trace.id].append(verdict == "correct")
    rates = {identity: sum(outcomes) / len(outcomes) for identity, outcomes in judged.items()}
    return {index: rates.get(traces[index].id) for index in kept}


def filter_file(source: Path, out: Path, config: FilterConfig) -> Report:
    """Write the selected traces of a file to a new one with its manifest; return what each rule removed.

    Raises:
        UserError: if ``out`` exists, before anything is read; as ``select`` does.
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
