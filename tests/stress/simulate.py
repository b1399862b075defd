"""Simulate comparisons, and count how often tests reject and intervals hold: ``python -m tests.stress.simulate``.

Every line names what it simulates, the figure and its bounds; the exit status is 1 if one is outside. Seeds are fixed.
10,000 tables take about ten minutes on one core; ``--tables N`` takes fewer, with bounds as wide as chance makes them.
Names of parts (``stopping``, ``clusters``, ...) simulate those alone. Intervals for trainings cover up to 95.9 %, so
they get four times the tables: chance is then 0.1 points.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product

import numpy as np

from mlx_traces.evaluation import power, stats, variance
from mlx_traces.evaluation.anytime import log_wealth

TABLES = 10_000
MORE = 4  # times the tables
BLOCK = 50
Line = tuple[str, float, float, float]  # what, share, lowest, highest

# (difference, discordant share): of plans, and of tables with and without a difference
PLANS = ((0.03, 0.10), (0.05, 0.15), (0.10, 0.25), (0.20, 0.30))
VALUES = np.array([-1.0, 0.0, 1.0])


def tables(count: int, problems: int, difference: float, discordant: float, seed: int) -> np.ndarray:
    """Return (count, 3) losses, ties and wins."""
    shares = [(discordant - difference) / 2, 1 - discordant, (discordant + difference) / 2]
    return np.random.default_rng(seed).multinomial(problems, shares, size=count)


def powers(count: int) -> Iterator[Line]:
    """Yield the power of each plan's number of problems, which is exact: within 2 points, and the test's size."""
    for seed, (difference, discordant) in enumerate(PLANS):
        problems = power.problems_needed(difference, discordant)
        planned = power.power(problems, difference, discordant)
        for true, what, low, high in ((difference, "power", planned - 0.02, planned + 0.02), (0.0, "size", 0.0, 0.05)):
            found = tables(count, problems, true, discordant, seed)
            share = np.mean([stats.mcnemar(int(wins), int(losses)) <= 0.05 for losses, _, wins in found])
            yield f"McNemar, {problems} problems, {discordant:.0%} discordant: {what}", share, low, high


def looks(count: int) -> Iterator[Line]:
    """Yield how often a look after every block rejects, where nothing differs, and covers, where something does.

    With several rows it is how often any of them is rejected after Holm's adjustment.
    """
    blocks, wall = 40, math.log(2 / 0.05)
    for rows, seed, (difference, discordant) in [*((1, *plan) for plan in enumerate(PLANS)), (4, 0, PLANS[0])]:
        rng, false, missed = np.random.default_rng(100 + seed), 0, 0
        shares = [discordant / 2, 1 - discordant, discordant / 2]
        moved = [(discordant - difference) / 2, 1 - discordant, (discordant + difference) / 2]
        for _ in range(count):
            seen = rng.multinomial(BLOCK, shares, size=(rows, blocks)).cumsum(axis=1)
            # Holm's first step: the largest wealth of all rows against `rows` times the wall.
            false += any(
                max(log_wealth(VALUES, row, 0.0), log_wealth(VALUES, row[::-1], 0.0)) >= wall + math.log(rows)
                for row in seen.reshape(-1, 3)
            )
            if rows == 1:
                seen = rng.multinomial(BLOCK, moved, size=blocks).cumsum(axis=0)
                missed += any(
                    log_wealth(VALUES, row, difference) >= wall or log_wealth(VALUES, row[::-1], -difference) >= wall
                    for row in seen
                )
        name = f"looks after each of {blocks} blocks of {BLOCK}, {discordant:.0%} discordant"
        yield f"{name}{f', {rows} rows and Holm' if rows > 1 else ''}: false decisions", false / count, 0.0, 0.05
        if rows == 1:
            yield f"{name}, {100 * difference:.0f} points: always covered", 1 - missed / count, 0.95, 1.0


def stopping(count: int) -> Iterator[Line]:
    """Yield what stopping when decided costs: problems used, as a share of the fixed plan's; the budget is twice it.

    Looks are after every block, and at the end of the budget. A true difference may be larger than the planned one.
    """
    wall = math.log(2 / 0.05)
    for seed, (difference, discordant) in enumerate(PLANS):
        planned = power.problems_needed(difference, discordant)
        ends = np.array([*range(BLOCK, 2 * planned, BLOCK), 2 * planned])
        for larger, most, least in ((1.0, 1.45, 0.85), (1.4, 0.95, 0.95)):
            true = larger * difference
            shares = [(discordant - true) / 2, 1 - discordant, (discordant + true) / 2]
            rng, used, decided = np.random.default_rng(400 + seed), 0, 0
            for _ in range(count):
                seen = rng.multinomial(np.diff(ends, prepend=0), shares).cumsum(axis=0)
                found = (max(log_wealth(VALUES, row, 0.0), log_wealth(VALUES, row[::-1], 0.0)) >= wall for row in seen)
                stop = next((int(end) for end, over in zip(ends, found, strict=True) if over), None)
                used, decided = used + (stop or 2 * planned), decided + (stop is not None)
            what = f"stopped early, {planned} problems planned, true difference {larger:g} times the planned one"
            yield f"{what}: problems used of those planned", used / count / planned, 0.0, most
            yield f"{what}: decided", decided / count, least, 1.0


def coverages(count: int) -> Iterator[Line]:
    """Yield the coverage of the intervals of accuracies and differences, 94 to 96 %, and the size of tests."""
    rng = np.random.default_rng(200)
    for problems, share in ((200, 0.3), (500, 0.5), (1000, 0.1)):
        correct = rng.binomial(problems, share, size=count)
        ends = {c: stats.wilson(c, problems) for c in set(correct.tolist())}
        held = np.mean([ends[c][0] <= share <= ends[c][1] for c in correct.tolist()])
        yield f"Wilson, {problems} problems, accuracy {share:.0%}", held, 0.94, 0.96
    for difference, discordant in PLANS[:3]:
        held = 0
        for losses, ties, wins in tables(count, 500, difference, discordant, 201):
            x = np.repeat([-1.0, 0.0, 1.0], [losses, ties, wins])
            _, low, high = stats.paired_bootstrap(x, np.zeros(500), resamples=2000, seed=int(rng.integers(1 << 30)))
            held += low <= difference <= high
        yield f"paired bootstrap, 500 problems, {discordant:.0%} discordant", held / count, 0.94, 0.96
    held, apart, ratio, rejected = 0, 0, 0, 0
    for _ in range(count):
        hardness = rng.uniform(-0.35, 0.35, 200)
        one, two = (rng.binomial(4, 0.5 + hardness) for _ in range(2))
        held += covers(stats.wilson_clustered(one, 4), 0.5)
        seed = int(rng.integers(1 << 30))
        apart += covers(stats.paired_bootstrap(one / 4, two / 4, resamples=2000, seed=seed)[1:], 0.0)
        ratio += covers(stats.paired_ratio(one / 4, two / 4, resamples=2000, seed=seed)[1:], 1.0)
        rejected += stats.sign_flip(one - two) <= 0.05
    name = "4 samples of 200 problems"
    yield f"{name}: Wilson at the effective number", held / count, 0.94, 0.96
    yield f"{name}: paired bootstrap of the difference", apart / count, 0.94, 0.96
    yield f"{name}: paired bootstrap of the ratio", ratio / count, 0.94, 0.96
    yield f"{name}: size of the sign-flip test", rejected / count, 0.0, 0.05


def clusters(count: int) -> Iterator[Line]:
    """Yield coverage and size for two models whose accuracies vary from cluster to cluster, equal on average."""
    rng = np.random.default_rng(300)
    for groups in (10, 20, 50, 200):
        alone, apart, rejected = 0, 0, 0
        for _ in range(count):
            place = np.repeat(np.arange(groups), rng.integers(1, 9, groups))
            levels = 0.5 + rng.uniform(-0.3, 0.3, (2, groups))
            one, two = (rng.random(len(place)) < level[place] for level in levels)
            right = np.bincount(place, one)
            own = variance.estimate([one], clusters=place.tolist())
            alone += covers(own.share_interval() if own.error else stats.wilson(right.sum(), groups), 0.5)
            apart += covers(variance.estimate([one], [two], place.tolist()).interval(), 0.0)
            rejected += stats.sign_flip(right - np.bincount(place, two)) <= 0.05
        name = f"{groups} clusters of 1 to 8 problems"
        yield f"{name}: Wilson at the effective number", alone / count, 0.94, 0.96
        yield f"{name}: difference", apart / count, 0.94, 0.96
        yield f"{name}: size of the sign-flip test", rejected / count, 0.0, 0.05


def recipes(count: int) -> Iterator[Line]:
    """Yield coverage and size for recipes of several trainings, which differ by ``spread``, on 300 problems.

    With one degree of freedom between trainings the interval is only bounded: see `variance.Estimate.reach`. Where the
    problems add no variance the test is Student's, of size 5 %: so bounds of sizes have 0.3 points more, for chance.
    """
    rng = np.random.default_rng(200)
    for trainings, others in ((2, 0), (3, 0), (5, 0), (2, 1), (3, 1), (5, 1), (2, 2), (3, 3)):
        most, bound = (1.0, ", at least (one degree of freedom)") if trainings + max(others, 1) == 3 else (0.96, "")
        against = f" against {others}" if others else ""
        for spread in (0.0, 0.02, 0.1):
            found = [trained(rng, trainings, others, spread) for _ in range(MORE * count)]
            held = sum(covers(one.interval() if others else one.share_interval(), true) for one, true in found)
            name = f"{trainings}{against} trainings that differ by {spread:.0%}"
            yield f"{name}: {'difference' if others else 'accuracy'}{bound}", held / len(found), 0.94, most
            if others:
                yield f"{name}: size of the test", sum(rejects(*one) for one in found) / len(found), 0.0, 0.053
    found = [trained(rng, 3, 3, 0.02, 60) for _ in range(MORE * count)]
    held, name = sum(covers(one.interval(), true) for one, true in found), "3 against 3 trainings, 60 clusters"
    yield f"{name}: difference", held / len(found), 0.94, 0.96
    yield f"{name}: size of the test", sum(rejects(*one) for one in found) / len(found), 0.0, 0.053
    for trainings, problems in product((2, 3), (60, 200)):  # few wrong answers, as Wilson's interval of few is wide
        held = 0
        for _ in range(count):
            same, own = rng.random(problems) < 0.98, rng.random((trainings, problems)) < 0.98
            one = variance.estimate(np.where(rng.random(problems) < 0.7, same, own))
            held += covers(one.share_interval() if one.mean < 1 else stats.wilson(problems, problems), 0.98)
        yield f"{trainings} trainings, accuracy 98 %, {problems} problems: at least", held / count, 0.94, 1.0


def covers(interval: tuple[float, float], true: float) -> bool:
    """Whether an interval holds the true value."""
    return interval[0] <= true <= interval[1]


def rejects(found: variance.Estimate, true: float) -> bool:
    """Whether the test rejects the true value at 5 %; only where it is near the interval's ends, as p takes long."""
    off = found.mean - true
    return abs(off) > 0.9 * found.reach(0.95) and replace(found, mean=off).p <= 0.05


def trained(
    rng: np.random.Generator, trainings: int, others: int, spread: float, groups: int = 300
) -> tuple[variance.Estimate, float]:
    """Sample trainings of one or two recipes, equal on average, on 300 problems of different difficulty.

    Returns the estimate and the true value. Where the other recipe has one training, it is about that training,
    whatever its level. Fewer ``groups`` are clusters: of equal difficulty, and each training is good at some of them.
    """
    place = np.arange(300) % groups
    hardness = rng.uniform(-0.35, 0.35, groups)[place]

    def answers(count: int) -> tuple[np.ndarray, np.ndarray]:
        levels = rng.normal(0, spread, (count, 1))
        own = rng.uniform(-0.15, 0.15, (count, groups))[:, place] if groups < 300 else 0
        return rng.random((count, 300)) < np.clip(0.5 + levels + hardness + own, 0, 1), levels

    names = place.tolist() if groups < 300 else None
    one, _ = answers(trainings)
    if not others:
        return variance.estimate(one, clusters=names), 0.5
    two, levels = answers(others)
    if others > 1:
        return variance.estimate(one, two, names), 0.0
    true = np.clip(0.5 + levels + np.linspace(-0.35, 0.35, 10_001), 0, 1).mean()  # of that training
    return variance.estimate(one, two, names), float(0.5 - true)


PARTS = (powers, looks, stopping, coverages, clusters, recipes)


def lines(count: int, parts: Iterable[Callable[[int], Iterator[Line]]] = PARTS) -> Iterator[tuple[str, bool]]:
    """Yield each result as a text, and whether it is within its bounds, which chance widens below `TABLES` tables."""
    for part in parts:
        for what, share, low, high in part(count):
            slack = 3 * math.sqrt(0.25 * 0.2 / count) if count < TABLES else 0.0
            fine = low - slack <= share <= high + slack
            yield f"{'ok  ' if fine else 'OUT '} {100 * share:6.2f} % [{100 * low:.1f}, {100 * high:.1f}]  {what}", fine


def main() -> None:
    """Print every line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = {part.__name__: part for part in PARTS}
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(named)}; default: all")
    parser.add_argument("--tables", type=int, default=TABLES, help="tables of each simulation")
    given = parser.parse_args()
    if unknown := set(given.parts) - named.keys():
        parser.error(f"there is no part {', '.join(sorted(unknown))}; name some of {', '.join(named)}")
    failed = False
    for text, fine in lines(given.tables, [named[name] for name in given.parts or named]):
        print(text, flush=True)
        failed = failed or not fine
    sys.exit(failed)


if __name__ == "__main__":
    main()
