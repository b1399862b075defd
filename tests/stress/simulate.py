"""Simulate comparisons, and count how often tests reject and intervals hold: ``python -m tests.stress.simulate``.

Every line names what it simulates, the figure and its bounds; the exit status is 1 if one is outside. Seeds are fixed.
10,000 tables take about ten minutes on one core; ``--tables N`` takes fewer, with bounds as wide as chance makes them.
Intervals for trainings cover up to 95.9 %, so they get four times the tables: chance is then 0.1 points.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator

import numpy as np

from mlx_traces.evaluation import power, stats, variance
from mlx_traces.evaluation.anytime import log_wealth

TABLES = 10_000
MORE = 4  # times the tables
BLOCK = 50
Case = tuple[tuple[float, float], float]  # an interval, and the true value
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


def looks(count: int, rows: int = 1) -> Iterator[Line]:
    """Yield how often a look after every block rejects, where nothing differs, and covers, where something does.

    With several rows it is how often any of them is rejected after Holm's adjustment.
    """
    blocks, wall = 40, math.log(2 / 0.05)
    for seed, (difference, discordant) in enumerate(PLANS if rows == 1 else PLANS[:1]):
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


def coverages(count: int) -> Iterator[Line]:
    """Yield the coverage of the intervals of accuracies and differences: 94 to 96 %."""
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
    for groups in (50, 200):
        held = sum(covers(*clustered(rng, groups)) for _ in range(count))
        yield f"clusters, {groups} of 1 to 8 problems", held / count, 0.94, 0.96
    for trainings, others in ((3, 0), (5, 0), (3, 3), (5, 1)):
        for spread in (0.0, 0.02, 0.1):
            held = sum(covers(*trained(rng, trainings, others, spread)) for _ in range(MORE * count))
            kind = f"{trainings} against {others} trainings" if others else f"{trainings} trainings"
            yield f"{kind} that differ by {spread:.0%}, 300 problems", held / count / MORE, 0.94, 0.96

    for problems in (60, 200):  # few wrong answers, as Wilson's interval of few is wide
        held = 0
        for _ in range(count):
            same, own = rng.random(problems) < 0.98, rng.random((3, problems)) < 0.98
            found = variance.estimate(np.where(rng.random(problems) < 0.7, same, own))
            held += covers(found.share_interval() if found.error else stats.wilson(problems, problems), 0.98)
        yield f"3 trainings, accuracy 98 %, {problems} problems: at least", held / count, 0.94, 1.0


def covers(interval: tuple[float, float], true: float) -> bool:
    """Whether an interval holds the true value."""
    return interval[0] <= true <= interval[1]


def clustered(rng: np.random.Generator, groups: int) -> Case:
    """Compare two models whose accuracies vary from cluster to cluster; they are equal on average."""
    place = np.repeat(np.arange(groups), rng.integers(1, 9, groups))
    levels = 0.5 + rng.uniform(-0.3, 0.3, (2, groups))
    one, two = (rng.random((1, len(place))) < level[place] for level in levels)
    return variance.estimate(one, two, place.tolist()).interval(), 0.0


def trained(rng: np.random.Generator, trainings: int, others: int, spread: float) -> Case:
    """Sample trainings of one or two recipes, equal on average, on problems of different difficulty.

    Where the other recipe has one training, the result is about that training, whatever its level.
    """
    hardness = rng.uniform(-0.35, 0.35, 300)

    def answers(count: int) -> tuple[np.ndarray, np.ndarray]:
        levels = rng.normal(0, spread, (count, 1))
        return rng.random((count, 300)) < np.clip(0.5 + levels + hardness, 0, 1), levels

    one, _ = answers(trainings)
    if not others:
        return variance.estimate(one).share_interval(), 0.5
    two, levels = answers(others)
    if others > 1:
        return variance.estimate(one, two).interval(), 0.0
    true = np.clip(0.5 + levels + np.linspace(-0.35, 0.35, 10_001), 0, 1).mean()  # of that training
    return variance.estimate(one, two).interval(), float(0.5 - true)


def lines(count: int, parts: tuple[Callable[[int], Iterator[Line]], ...] = ()) -> Iterator[tuple[str, bool]]:
    """Yield each result as a text, and whether it is within its bounds, which chance widens below `TABLES` tables."""
    for part in parts or (powers, looks, lambda n: looks(n, 4), coverages):
        for what, share, low, high in part(count):
            slack = 3 * math.sqrt(0.25 * 0.2 / count) if count < TABLES else 0.0
            fine = low - slack <= share <= high + slack
            yield f"{'ok  ' if fine else 'OUT '} {100 * share:6.2f} % [{100 * low:.1f}, {100 * high:.1f}]  {what}", fine


def main() -> None:
    """Print every line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=TABLES, help="tables of each simulation")
    failed = False
    for text, fine in lines(parser.parse_args().tables):
        print(text, flush=True)
        failed = failed or not fine
    sys.exit(failed)


if __name__ == "__main__":
    main()
