"""Power of the exact McNemar test against enumeration and SciPy, and the plans made of it."""

import subprocess
import sys
from math import comb

import numpy as np
import pytest
from click.testing import CliRunner
from factories import make_run
from scipy.stats import binom
from stress import simulate

import mlx_traces
from mlx_traces.cli import main
from mlx_traces.errors import UserError
from mlx_traces.evaluation import comparison, power, stats


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 3, 0.5])
def test_the_critical_counts_are_those_of_the_exact_test(alpha):
    found = power.critical(300, alpha)
    for m in range(301):
        rejected = [c for c in range(m // 2 + 1) if stats.mcnemar(c, m - c) <= alpha]
        assert found[m] == max(rejected, default=-1), m


@pytest.mark.parametrize("share", [0.5, 0.62, 1.0])
def test_power_at_each_number_of_discordant_problems_is_scipys(share):
    limit, m = power.critical(1500, 0.05), np.arange(1501)
    expected = binom.cdf(limit, m, share) + binom.sf(m - limit - 1, m, share)
    assert power.conditional(1500, share, 0.05) == pytest.approx(expected, abs=1e-12)


def test_power_is_the_sum_over_all_tables():
    def enumerated(n, difference, discordant):
        win, loss = (discordant + difference) / 2, (discordant - difference) / 2
        return sum(
            comb(n, w) * comb(n - w, k) * win**w * loss**k * (1 - discordant) ** (n - w - k)
            for w in range(n + 1)
            for k in range(n - w + 1)
            if stats.mcnemar(w, k) <= 0.05
        )

    for case in ((30, 0.2, 0.3), (25, 0.0, 0.4), (20, 0.4, 0.4), (12, 1.0, 1.0)):
        assert power.power(*case) == pytest.approx(enumerated(*case), abs=1e-12)
    assert power.power(30, -0.2, 0.3) == power.power(30, 0.2, 0.3)


@pytest.mark.parametrize(("difference", "discordant"), [(0.3, 1.0), (0.25, 0.4), (0.1, 0.25)])
def test_no_larger_number_of_problems_falls_below_the_power_wanted(difference, discordant):
    found = power.problems_needed(difference, discordant)
    reached = [power.power(n, difference, discordant) >= 0.8 for n in range(1, 2 * found)]
    assert all(reached[found - 1 :]) and not reached[found - 2]
    if discordant == 1.0:  # the saw-tooth: fewer reach it, and one more falls below it again
        assert any(reached[: found - 2])


def test_large_plans_are_walked_in_blocks():
    for difference, discordant in ((0.003, 0.1), (0.001, 0.1), (0.02, 0.02)):
        found = power.problems_needed(difference, discordant)
        reached = [power.power(found + more, difference, discordant) >= 0.8 for more in (-1, 0, 1, 513, 1500)]
        assert reached == [False, True, True, True, True]


def test_plans_of_three_points_are_a_little_above_the_normal_approximation():
    for discordant, rough in ((0.10, 870), (0.15, 1306), (0.25, 2178)):
        assert rough < power.problems_needed(0.03, discordant) < 1.06 * rough


def test_the_smallest_detectable_difference_has_the_power_wanted():
    for problems, discordant, target in ((200, 0.3, 0.5), (1319, 0.15, 0.8), (200_000, 0.1, 0.8)):
        found = power.detectable(problems, discordant, target)
        assert power.power(problems, found, discordant) >= target > power.power(problems, found - 2e-5, discordant)
    never = power.detectable(200, 0.0, 0.5)  # two models that agree everywhere: all discordant ones would be wins
    assert power.power(200, never, never) == pytest.approx(0.5, abs=1e-3)
    assert power.detectable(5, 0.2) is None  # not even five wins of five are significant


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--difference 0", "a difference of 0 cannot be found by any number of problems; name one above 0"),
        ("--difference 120", "a difference of 120 points is not between 0 and 100"),
        ("--difference 3 --discordant 2", "2 % discordant pairs cannot give a difference of 3 points, which needs"),
        ("--difference 3 --discordant 0", "0 % discordant pairs is not above 0 and at most 100"),
        ("--difference 3 --power 100", "a power of 100 % is not between 0 and 100"),
        ("--problems 200 --power 150", "a power of 150 % is not between 0 and 100"),
        ("--problems 200 --power nan", "a power of nan % is not between 0 and 100"),
        ("--problems 200 --discordant -5", "-5 % discordant pairs is not between 0 and 100"),
        ("--difference 0.000001 --discordant 0.000001", "more than can be planned for; name a larger difference"),
        ("--difference 1e-300 --discordant 1e-300", "more than can be planned for; name a larger difference"),
        ("--difference 3 --alpha 0", "a level of 0 % is not between 1e-13 and 100"),
        ("--difference 3 --holm 999999999999999999", "a level of 5e-18 % is not between 1e-13 and 100"),
        ("--difference 3 --holm 0", "--holm 0: must be 1 or more"),
        ("--difference 0.01 --discordant 50", "more than can be planned for; name a larger difference"),
        ("--problems 0", "0 problems: power needs one or more"),
        ("--problems 9999999999 --discordant 50", "9,999,999,999 problems are too many"),
        ("", "pass --difference to plan the number of problems, or --problems to plan the difference"),
        ("--difference -3", "a difference of -3 points is not between 0 and 100"),
        ("--difference nan", "a difference of nan points is not between 0 and 100"),
        ("--difference 3 --from nowhere", "nowhere: no such run folder"),
    ],
)
def test_a_plan_that_cannot_be_ends_in_one_line(flags, said):
    done = CliRunner().invoke(main, ["plan", "eval", *flags.split()])
    assert done.exit_code == 1 and done.output.startswith("Error: ") and said in done.output
    assert done.output.count("\n") == 1


def test_a_plan_from_two_runs(monkeypatch):
    a = [1] * 40 + [0] * 60
    b = [0] * 4 + [1] * 52 + [0] * 44  # won 16, lost 4
    speed = {"wall_seconds": 50.0, "mean_tokens": 30.0}
    stored = {"a": make_run("a", a, **speed), "b": make_run("b", b, **speed), "two": make_run("two", [[1, 0]] * 5)}
    monkeypatch.setattr(comparison, "read_run", stored.__getitem__)
    runs = ["a", "b"]
    plan = mlx_traces.plan_eval(difference=5, runs=runs)
    assert plan.seen == (16, 4, 100) and [size.discordant for size in plan.sizes] == [20.0]
    needed = power.problems_needed(0.05, 0.2)
    assert plan.sizes[0].needed == needed and plan.span[0] < needed < plan.span[1]
    assert (plan.seconds, plan.tokens) == (needed, 60 * needed)  # half a second and 30 tokens a problem, two runs
    assert plan.sizes[0].even == pytest.approx(100 * power.detectable(100, 0.2, 0.5))
    shown = CliRunner().invoke(main, ["plan", "eval", "--difference", "5", "--from", *runs])
    assert shown.output.splitlines() == plan.lines() and "with 100 problems, 16 won and 4 lost:" in shown.output
    alone = mlx_traces.plan_eval(runs=["a"]).lines()  # what this run could have seen
    assert alone[0] == "with 100 problems (exact McNemar test, 5 % level):" and len(alone) == 4
    more = mlx_traces.plan_eval(problems=500, runs=runs).lines()  # the runs' wins and losses are of 100 problems
    assert more[0] == "with 500 problems (exact McNemar test, 5 % level):" and "20 % discordant pairs" in more[1]
    three = mlx_traces.plan_eval(difference=5, runs=runs, holm=3)
    assert three.sizes[0].needed == power.problems_needed(0.05, 0.2, alpha=0.05 / 3) > needed
    with pytest.raises(UserError, match="the runs agree on all 100 problems; pass --discordant"):
        mlx_traces.plan_eval(difference=5, runs=[runs[0], runs[0]])
    with pytest.raises(UserError, match="two has 2 completions a problem; McNemar's test takes one"):
        mlx_traces.plan_eval(difference=5, runs=["two"])
    with pytest.raises(UserError, match="takes one or two runs, not 3"):
        mlx_traces.plan_eval(difference=5, runs=[*runs, runs[0]])


def test_a_plan_without_runs_tries_several_shares():
    lines = mlx_traces.plan_eval(difference=12, problems=200).lines()
    assert [line.split()[-4] for line in lines[1:3]] == ["15", "25"]  # 10 % could not make 12 points
    small = mlx_traces.plan_eval(difference=0.2)  # at 25 % there would be too many discordant pairs
    assert [size.discordant for size in small.sizes] == [10, 15]
    assert "with 200 problems (exact McNemar test, 5 % level):" in lines


def test_planning_loads_no_mlx():
    code = (
        "import sys; from mlx_traces.cli import main\n"
        "main(['plan', 'eval', '--difference', '3'], standalone_mode=False)\n"
        "assert not [name for name in sys.modules if name.startswith(('mlx.', 'mlx_lm', 'pandas', 'transformers'))]"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "1,362 problems at 15 % discordant pairs" in done.stdout


def test_simulated_tables_agree_with_the_plans_and_the_intervals():
    found = [*simulate.lines(1000, (simulate.powers,)), *simulate.lines(30, simulate.PARTS[1:])]
    assert len(found) == 100 and [text for text, fine in found if not fine] == []
