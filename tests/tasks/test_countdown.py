"""Countdown: the checker against every expression there is, the generator, the solver and the traces."""

import itertools
import json
import random
import re
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_traces.errors import UserError
from mlx_traces.tasks import thoughts
from mlx_traces.tasks.countdown import (
    MAX_EXPRESSION,
    MAX_STEPS,
    TASK,
    check,
    generate,
    hub_part,
    load,
    parse,
    split_of,
    steps,
)
from mlx_traces.tasks.solver import TRACE_LIMIT, TRACE_LINES, impatience, search_trace, solutions


def every_expression(numbers):
    """Yield (fully parenthesised text, exact value or None) of every tree over ``numbers`` in this order."""
    if len(numbers) == 1:
        yield str(numbers[0]), Fraction(numbers[0])
        return
    for cut in range(1, len(numbers)):
        for left, a in every_expression(numbers[:cut]):
            for right, b in every_expression(numbers[cut:]):
                for sign in "+-*/":
                    if a is None or b is None or (sign == "/" and b == 0):
                        value = None
                    else:
                        value = {"+": a + b, "-": a - b, "*": a * b}[sign] if sign != "/" else a / b
                    yield f"({left} {sign} {right})", value


def brute_force_reaches(nums, target):
    return any(
        value == target for order in set(itertools.permutations(nums)) for _, value in every_expression(list(order))
    )


@pytest.mark.parametrize("nums", [(2, 3, 4), (4, 4, 8), (1, 2, 4, 6), (6, 6, 3, 1)])
def test_the_checker_agrees_with_exhaustive_enumeration(nums):
    verdicts = {"correct": 0, "wrong_value": 0}
    for order in set(itertools.permutations(nums)):
        for text, value in every_expression(list(order)):
            expected = "correct" if value == 24 else "wrong_value"
            assert check(text, list(nums), 24) == expected, text
            verdicts[expected] += 1
    assert all(verdicts.values())  # both verdicts were reached


def test_the_checker_counts_every_number_exactly_once():
    for used in itertools.product((3, 4, 6), repeat=3):
        text = f"{used[0]} + {used[1]} * {used[2]}"
        assert (check(text, [3, 4, 6], 27) == "wrong_numbers") == (sorted(used) != [3, 4, 6]), text
    assert check("3 + 4", [3, 4, 6], 7) == "wrong_numbers"
    assert check("3 + 4 + 6 + 6", [3, 4, 6], 19) == "wrong_numbers"
    assert check("34 + 6", [3, 4, 6], 40) == "wrong_numbers"


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("3 * (4 + 6)", "correct"),
        ("3 × (4 + 6)", "correct"),
        (r"3 \times (4 + 6)", "correct"),
        (r"$3 \cdot \left(4 + 6\right)$", "correct"),
        ("(4+6)*3=30", "correct"),
        ("(4 + 6) * 3 = 30.", "correct"),
        ("(4 + 6) * 3 = 31", "wrong_value"),
        ("(4 + 6) * 3 = 15 * 2", "not_an_expression"),
        ("30 = (4 + 6) * 3", "not_an_expression"),
        ("(4 + 6) * 3 = 30 = 30", "not_an_expression"),
        ("4 + 6 + 3 = 30", "wrong_value"),
        ("3 * -(-4 - 6)", "correct"),
        ("3 +* 4", "not_an_expression"),
        ("3 ** 4 + 6", "not_an_expression"),
        ("6 // 4 + 3", "not_an_expression"),
        ("3 (4 + 6)", "not_an_expression"),
        ("3,4,6", "not_an_expression"),
        ("3.0 * (4 + 6)", "not_an_expression"),
        ("0x3 * (4 + 6)", "not_an_expression"),
        ("3 * (4 + 6) if 1 else 2", "not_an_expression"),
        ("[3 * (4 + 6)][0]", "not_an_expression"),
        ("3_0", "not_an_expression"),
        ("3 / (4 - 4) + 6", "wrong_numbers"),
        ("4 / 0", "wrong_numbers"),
        (r"\boxed{3 * (4 + 6)}", "correct"),
        (r"\text{3 * (4 + 6)}", "correct"),
        (r"**\boxed{3 * (4 + 6) = 30}**.", "correct"),
        ("**3 * (4 + 6)** = **30**", "correct"),
        (r"$3 * (4 + 6) = \boxed{30}$", "correct"),
        (r"3 * (4 + 6) = \boxed{31}", "wrong_value"),
        (r"\boxed{3 * (4 + 6)} = \boxed{30}", "correct"),
        ("３＊（４＋６） ＝ 30", "correct"),
        ("3 • (4 + 6)", "correct"),
        ("3 ⨯ (4 + 6)", "correct"),
        ("3 x (4 + 6)", "correct"),
        ("(4+6)x3", "correct"),
        ("3 X (4 + 6)", "correct"),
        ("\u200b3 *\u200b (4 + 6)\ufeff", "correct"),
        ("3x", "not_an_expression"),
        ("**3** * (4 + 6)", "not_an_expression"),
        ("**3 ** 4 + 6**", "not_an_expression"),
        ("**9**9**9**", "not_an_expression"),
        ("****", "not_an_expression"),
        ("3 ＊＊ 4 + 6", "not_an_expression"),
        ("3² + 4 + 6", "not_an_expression"),
        ("", "not_an_expression"),
        ("=", "not_an_expression"),
    ],
)
def test_what_is_and_is_not_an_expression(text, verdict):
    assert check(text, [3, 4, 6], 30) == verdict


def test_fractions_division_and_its_spellings():
    assert check("8 / (3 - 8 / 3)", [8, 3, 8, 3], 24) == "correct"
    assert check(r"\frac{8}{3 - \frac{8}{3}}", [8, 3, 8, 3], 24) == "correct"
    assert check(r"\dfrac{8}{3 - 8 \div 3} = 24", [8, 3, 8, 3], 24) == "correct"
    assert check(r"\frac8{3 - \frac83}", [8, 3, 8, 3], 24) == "correct"
    assert check(r"\frac42 + 3", [4, 2, 3], 5) == "correct"
    assert check("8 ÷ (3 − 8 ÷ 3)", [8, 3, 8, 3], 24) == "correct"
    assert check("6 / (3 - 3)", [6, 3, 3], 24) == "wrong_value"  # division by zero


HOSTILE = [
    "9**9**9**9",
    "(" * 5000 + "1" + ")" * 5000,
    "(" * 120 + "1" + ")" * 120,
    "-" * 250 + "1",
    "9" * 256,
    "*".join(["9" * 40] * 6),
    r"\frac{" * 10_000,
    r"\frac{1}{2}" * 10_000,
    "1+" * 100_000,
    "=" * 100_000,
    "(" * 20_000,
    "(+-" * 7_000,
    "1+" * 10_000,
    "<" * 20_000,
    "</" * 10_000,
    "<answer>1</answer>" * 1_500,
    r"\boxed{" + "{" * 20_000,
    r"\frac{1}{" * 5_000,
    "İ" * 20_000,
    "＊" * 20_000,
    "**" * 120,
    "__import__('os').system('true')",
    "٣ + ٤",
    "\0",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_expressions_are_refused_at_once(text):
    start = time.process_time()
    assert check(text, [3, 4, 6], 30) in {"not_an_expression", "wrong_numbers"}
    for wrapped in (text, f"<answer>{text}</answer>"):
        TASK.grade(parse({"nums": [3, 4, 6], "target": 30}, "here"), wrapped)
    assert time.process_time() - start < 0.1  # of the processor: 2 ms each


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("head", ["", "<answer>", "\\boxed{"])
def test_any_response_is_graded_quickly(text, head):
    problem = parse({"nums": [3, 4, 6], "target": 30}, "here")
    seconds = []
    for _ in range(5):
        thoughts.after_thought.cache_clear()
        start = time.process_time()
        TASK.grade(problem, head + text)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.03  # of the processor: 2 ms; what grows with the square takes seconds


@settings(max_examples=300)
@given(st.text(st.sampled_from("0123456789+-*/()= .\\frac{}<answer>/\nx"), max_size=400))
def test_any_text_gets_a_verdict(text):
    problem = parse({"nums": [3, 4, 6], "target": 30}, "here")
    for score in TASK.grade(problem, f"<answer>{text}</answer>").values():
        assert score.verdict in {"correct", "no_answer", "not_an_expression", "wrong_numbers", "wrong_value"}
        assert score.extracted is None or len(score.extracted) <= MAX_EXPRESSION


@pytest.mark.parametrize(
    ("response", "answer", "tolerant"),
    [
        ("<think>3+4</think>\n<answer>3 * (4 + 6)</answer>", "correct", "correct"),
        ("<answer>3</answer> or rather <answer>3 * (4 + 6)</answer>", "correct", "correct"),
        ("<answer>3 * (4 + 6)</answer> or rather <answer>3</answer>", "wrong_numbers", "wrong_numbers"),
        ("<answer>3 * (4 + 6)", "no_answer", "correct"),
        ("so \\boxed{3 \\times (4 + 6)}", "no_answer", "correct"),
        ("We get 3 * (4 + 6) = 30.", "no_answer", "correct"),
        ("So 30 = 3 * (4 + 6).", "no_answer", "correct"),
        ("(4 + 6) * 3 = 10 * 3 = 30", "no_answer", "correct"),
        ("3 * (4 + 6) = 31", "no_answer", "wrong_value"),
        (r"thus \(3 \times (4 + 6) = 30\)", "no_answer", "correct"),
        ("**3 x (4 + 6) = 30**", "no_answer", "correct"),
        ("3 + 4, or 3 * (4 + 6)\n- or none", "no_answer", "correct"),
        ("- 3 * (4 + 6) = 30", "no_answer", "correct"),
        ("- **-3 * (-4 - 6) = 30**", "no_answer", "correct"),
        ("-(-4 - 6) * 3", "no_answer", "correct"),
        ("-3 * (4 + 6)", "no_answer", "wrong_value"),
        ("<thinking>3 * (4 + 6)", "no_answer", "no_answer"),
        ("<answer></answer>", "no_answer", "no_answer"),
        ("<think><answer>3 * (4 + 6)</answer></think> 30", "no_answer", "no_answer"),
        ("<|begin_of_thought|><answer>3 * (4 + 6)</answer><|end_of_thought|>?", "no_answer", "no_answer"),
        ("<think>so <answer>3 * (4 + 6)</answer>", "correct", "correct"),
        ("<think>" + 9_000 * "so " + "3 * (4 + 6)", "no_answer", "no_answer"),
        ("3 * (4 + 6)" + 9_000 * " so" + "</think>?", "no_answer", "no_answer"),
        ("<think>" + 9_000 * "so " + "</think>3 * (4 + 6)", "no_answer", "correct"),
        ("no idea", "no_answer", "no_answer"),
        ("", "no_answer", "no_answer"),
    ],
)
def test_where_the_answer_is_looked_for(response, answer, tolerant):
    scores = TASK.grade(parse({"nums": [3, 4, 6], "target": 30}, "here"), response)
    assert (scores["answer"].verdict, scores["tolerant"].verdict) == (answer, tolerant)


def test_generated_problems_are_solvable_different_and_in_one_split_only():
    seen = {}
    for split in ("train", "valid", "test"):
        for seed in (0, 1):
            problems = list(generate(split, 60, seed))
            keys = [(*sorted(nums), target) for nums, target in problems]
            assert len(set(keys)) == len(keys)
            assert {len(nums) for nums, _ in problems} == {3, 4}
            for nums, target in problems:
                assert 10 <= target <= 100 and all(1 <= n <= 50 for n in nums)
                assert seen.setdefault(tuple(sorted(nums)), split) == split == split_of(nums[::-1])
                if len(nums) == 3:
                    assert brute_force_reaches(nums, target)
                assert solutions(nums, target) > 0
    assert list(generate("test", 20, 3)) == list(generate("test", 20, 3)) != list(generate("test", 20, 4))


def test_the_solver_agrees_with_brute_force():
    reached = 0
    for nums, target in [((3, 4, 6), t) for t in range(1, 60)] + [((8, 3, 8, 3), 24), ((1, 1, 1, 1), 24)]:
        assert (solutions(nums, target) > 0) == brute_force_reaches(nums, target), (nums, target)
        reached += solutions(nums, target) > 0
    assert 5 < reached < 59
    assert solutions([2, 3], 6) == 1 and solutions([2, 3], 5) == 1 and solutions([4, 4], 0) == 2


EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def every_step(a, b):
    """Return the steps of two numbers as a trace shows them, by the rules alone."""
    high, low = max(a, b), min(a, b)
    values = {"+": Fraction(high + low), "-": Fraction(high - low), "*": Fraction(high * low)}
    if low:
        values["/"] = Fraction(high, low)
    return [
        (str(high), sign, str(low), str(value))
        for sign, value in values.items()
        if value.denominator == 1 and value <= TRACE_LIMIT
    ]


def test_a_trace_shows_every_attempt_in_order_and_says_only_what_is_true():
    lengths = []
    for nums, target in generate("train", 200, 5, (3, 3)):
        if (trace := search_trace(nums, target)) is None:
            assert len(lengths) > 20
            continue
        thought, expression = trace
        assert check(expression, nums, target) == "correct"
        lines = thought.split("\n")
        lengths.append(len(lines))
        firsts = [
            (i, first) for i in itertools.combinations(range(3), 2) for first in every_step(*(nums[k] for k in i))
        ]
        for number, (line, (pair, first)) in enumerate(zip(lines, firsts, strict=False), 1):
            rest = next(n for k, n in enumerate(nums) if k not in pair)
            shown, seconds = EQUATION.findall(line), every_step(int(first[-1]), rest)
            hit = next((place for place, step in enumerate(seconds) if step[-1] == str(target)), None)
            assert shown == [first, *seconds[: None if hit is None else hit + 1]]
            assert line.endswith(" no" if hit is None else " yes") and (hit is None) == (number < len(lines))
    assert len(lengths) > 190 and 1.5 < sum(lengths) / len(lengths) < 3
    assert search_trace([1, 1, 1], 100) is None


def test_a_longer_search_leads_to_shorter_ones_and_stops_at_its_bound():
    found = [search_trace(nums, target) for nums, target in generate("train", 60, 5, (4, 4))]
    assert 40 < sum(trace is not None for trace in found) < 60
    for thought, _ in filter(None, found):
        assert len(thought.split("\n")) <= TRACE_LINES
        for line in thought.split("\n"):
            opening = re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+) leaves (\d+), (\d+), (\d+)", line)
            assert opening or re.fullmatch(rf"({EQUATION.pattern}, )+{EQUATION.pattern} (no|yes)", line)
            assert opening is None or opening[4] == opening[7]
    assert any(thought.count("leaves") > 1 for thought, _ in filter(None, found))  # a dead end, then another first step
    thought, expression = search_trace([50, 49, 48, 47, 46], 27, lambda target: True)  # its first line has one
    assert thought.endswith("145 - 95 = 50 no\nnear 50") and check(expression, [50, 49, 48, 47, 46], 50) == "correct"


def test_who_gives_up_says_so_and_answers_the_nearest_try():
    gives_up, ends, dead_ends = impatience(0.5, 0, random.Random(1)), 0, 0
    for nums, target in generate("train", 300, 5, (3, 3)):
        thought, expression = search_trace(nums, target, gives_up)
        tried = [int(step[-1]) for line in thought.split("\n") for step in EQUATION.findall(line)[1:]]
        near = re.search(r" no\nnear (\d+)$", thought)
        dead_ends += thought.count(" no\n")
        if near is None:
            assert check(expression, nums, target) == "correct" and thought.endswith(" yes")
            continue
        ends += 1
        nearest = min(tried, key=lambda value: abs(value - target))  # the first of those equally near
        assert int(near[1]) == nearest != target
        assert check(expression, nums, nearest) == "correct"
        checked = steps(parse({"nums": nums, "target": target}, "here"), thought)
        assert len(checked["claims"]) == thought.count("\n") + 1
        assert all(value for kind in checked.values() for *_, value in kind)
    assert 0.4 < ends / dead_ends < 0.6
    assert search_trace([42, 36, 33], 27, lambda target: target == 27)[0].endswith("78 - 33 = 45 no\nnear 45")


def test_a_large_target_daunts_more_than_a_small_one():
    gives_up = impatience(0, 20, random.Random(1))
    for target, share in ((10, 0.2), (20, 0.5), (60, 0.9)):
        assert sum(gives_up(target) for _ in range(2000)) / 2000 == pytest.approx(share, abs=0.03)
    both = impatience(0.5, 20, random.Random(1))
    assert sum(both(20) for _ in range(2000)) / 2000 == pytest.approx(0.75, abs=0.03)
    assert impatience(0, 0, random.Random(1)) is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"nums": "3 4", "target": 7}, "'nums' must be a list"),
        ({"nums": "3\n4", "target": 7}, r"not '3\n4'"),
        ({"nums": [], "target": 7}, "'nums' must be a list"),
        ({"nums": [3, True], "target": 7}, "'nums' must be a list"),
        ({"nums": [3, 10**30], "target": 7}, "'nums' must be a list"),
        ({"nums": [3, -4], "target": 7}, "'nums' must not be negative"),
        ({"nums": [3, 4], "target": "7"}, "'target' must be an integer"),
        ({"nums": [3, 4], "target": 7.5}, "'target' must be an integer"),
    ],
)
def test_malformed_rows_say_where_and_what(row, message):
    with pytest.raises(UserError, match=r"^file:3: ") as raised:
        parse(row, "file:3")
    assert message in str(raised.value)


def test_loading_from_a_file_takes_a_seeded_sample_and_a_slice(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps({"nums": n, "target": t}) + "\n" for n, t in generate("train", 30, 0)))
    everything = load("test", str(file), None, 0)
    assert len(everything) == 30 and everything[0].stratum == "3 operands"
    sample = load("test", str(file), 10, 1)
    assert sample == load("test", str(file), 10, 1) != load("test", str(file), 10, 2)
    assert load("test[5:8]", str(file), None, 0) == everything[5:8]
    with pytest.raises(UserError, match="--limit 31 is more than .* has: 30 problems"):
        load("test", str(file), 31, 0)


def test_slices_of_generated_problems():
    everything = load("test", None, 64, 3)
    assert load("test[:64]", None, None, 3) == everything
    assert load("test[10:20]", None, None, 3) == everything[10:20]
    assert load("test[60:]", None, 4, 3) == everything[60:]
    sample = load("test[:64]", None, 8, 3)
    assert len(sample) == 8 and all(problem in everything for problem in sample)
    with pytest.raises(UserError, match=r"^--limit 9 is more than test\[:8\] has: 8 problems$"):
        load("test[:8]", None, 9, 3)


def test_generated_problems_have_a_name_that_says_how_many_numbers():
    assert load("test", "3-4-numbers", 20, 3) == load("test", None, 20, 3)
    three = load("test", "3-numbers", 20, 3)
    assert {problem.stratum for problem in three} == {"3 operands"} and len(three) == 20
    assert load("test[5:8]", "3-numbers", None, 3) == three[5:8]
    with pytest.raises(UserError, match="operands 1-1 is not a range"):
        load("test", "1-numbers", 20, 3)


def test_hub_sets_are_parted_as_in_tinyzero(monkeypatch):
    assert hub_part("train", 490_364) == range(327_680)
    assert hub_part("test", 490_364) == range(327_680, 328_704)
    for size in (0, 1, 2, 3, 1_500, 5_000, 327_680, 328_000, 328_704, 400_000):
        train, test = hub_part("train", size), hub_part("test", size)
        assert train.stop == test.start and len(train) >= len(test) - 1 and test.stop <= size
        assert len(test) == min(1_024, size - len(train))
    asked = []

    def hub_rows(dataset, config, split, instead, part):
        asked.append((dataset, split))
        return ((f"{dataset}[{i}]", {"nums": [i, 1], "target": i + 1}) for i in part(330_000))

    monkeypatch.setattr("mlx_traces.tasks.countdown.hub_rows", hub_rows)
    for name in ("Jiayi-Pan/Countdown-Tasks-3to4", "Jiayi-Pan/Countdown-Tasks-3to4-Unique@main"):
        assert [p.columns["nums"][0] for p in load("test", name, None, 0)] == list(range(327_680, 328_704))
        assert [p.columns["nums"][0] for p in load("train[:3]", name, None, 0)] == [0, 1, 2]
        assert [p.columns["nums"][0] for p in load("test[1:3]", name, None, 0)] == [327_681, 327_682]
        with pytest.raises(UserError, match="unknown split 'valid': choose train or test"):
            load("valid", name, None, 0)
    assert load("other[5:6]", "someone/numbers", None, 0)[0].columns["nums"] == [5, 1]
    assert {split for _, split in asked} == {"train", "other"}


def test_a_missing_file_is_not_looked_up_on_the_hub():
    for name in ("foo.txt", "folder/foo.csv", "./foo"):
        with pytest.raises(UserError, match=r"cannot be read \(No such file"):
            load("test", name, None, 0)


def test_bad_requests_for_problems():
    with pytest.raises(UserError, match="unknown split 'tset'.*did you mean 'test'"):
        load("tset", None, 5, 0)
    with pytest.raises(UserError, match="operands 4-3 is not a range"):
        list(generate("test", 5, 0, operands=(4, 3)))
    with pytest.raises(UserError, match="different problems"):
        list(generate("test", 5000, 0, operands=(3, 3), numbers=(1, 5)))


def test_spellings_of_an_expression_are_one_vote():
    found = ["(3 + 2) × 4 = 20", r"\boxed{(3+2) \times 4 = 20}", "4 * (3 + 2)", None]
    assert TASK.votes(found, "20", "tolerant") == ["(3+2)*4=20", "(3+2)*4=20", "4*(3+2)", None]


# ---------------------------------------------------------------------------------- steps of a thought

STEPPED = parse({"nums": [49, 25, 22], "target": 46}, "test")


@pytest.mark.parametrize(
    ("thought", "numbers", "claims"),
    [
        (
            "49 + 25 = 74, 74 + 22 = 96, 74 - 22 = 52 no\n49 - 25 = 24, 24 + 22 = 46 yes",
            [("49 + 25", 1), ("74 + 22", 1), ("74 - 22", 1), ("49 - 25", 1), ("24 + 22", 1)],
            [("no", 1), ("yes", 1)],
        ),
        ("49 + 25 = 74, 74 + 49 = 123 no", [("49 + 25", 1), ("74 + 49", 0)], [("no", 1)]),  # used twice
        ("49 - 24 = 25, 25 + 21 = 46 yes", [("49 - 24", 0), ("25 + 21", 0)], [("yes", 0)]),  # not given
        ("49 - 25 = 24, 24 + 22 = 46 no", [("49 - 25", 1), ("24 + 22", 1)], [("no", 0)]),  # it is a hit
        ("49 - 25 = 24, 24 + 22 = 47 yes", [("49 - 25", 1), ("24 + 22", 1)], [("yes", 0)]),  # false, and another value
        ("24 + 22 = 46 yes", [("24 + 22", 0)], [("yes", 0)]),  # nothing made 24
        ("22 + 24 = 46, 49 - 25 = 24", [("22 + 24", 0), ("49 - 25", 1)], []),  # not yet
        ("49 - 3 = 46 yes", [("49 - 3", 0)], [("yes", 0)]),
        # the nearest of what was made of all numbers, whichever came first
        (
            "49 + 25 = 74, 74 + 22 = 96, 74 - 22 = 52 no\nnear 52",
            [("49 + 25", 1), ("74 + 22", 1), ("74 - 22", 1)],
            [("no", 1), ("near 52", 1)],
        ),
        ("49 + 25 = 74, 74 + 22 = 96 no\nnear 74", [("49 + 25", 1), ("74 + 22", 1)], [("no", 1), ("near 74", 0)]),
        ("near 46", [], [("near 46", 0)]),
        # expressions of more numbers, over several lines, in other words
        ("So (49 - 25) + 22 = 46, yes", [("(49 - 25) + 22", 1)], [("yes", 1)]),
        ("First\n- 49 - 25 = 24.\n- 24 + 22 = 46", [("49 - 25", 1), ("24 + 22", 1)], []),
        ("49 - 25 + 22 = 24 + 22 = 46, x + 25 - 3 = 1, 2.5 * 2 = 5, 2 ** 3 = 8, 49 = 49 yes", [], []),  # not checked
    ],
)
def test_steps_of_a_thought(thought, numbers, claims):
    found = steps(STEPPED, thought)
    assert {kind: [(thought[a:b], value) for a, b, value in own] for kind, own in found.items()} == {
        "numbers": numbers,
        "claims": claims,
    }


def test_a_given_number_that_is_there_twice_may_be_used_twice():
    problem = parse({"nums": [5, 5, 7], "target": 17}, "test")
    assert [value for *_, value in steps(problem, "5 + 5 = 10, 10 + 7 = 17 yes")["numbers"]] == [1, 1]
    assert [value for *_, value in steps(problem, "7 + 7 = 14")["numbers"]] == [0]


def test_steps_of_hostile_thoughts_take_no_time():
    many = parse({"nums": list(range(1, 17)), "target": 46}, "test")
    began = time.process_time()
    for text in ("1+" * 10_000, "(" * 10_000, "-1 + " * 10_000, "1 + 2 - " * 3_000 + "=", "9" * 10_000 + " + 1 = 2"):
        steps(many, text)
    found = steps(many, f"{' + '.join(map(str, range(1, 13)))} = 3, " * 600)
    assert len(found["numbers"]) == MAX_STEPS and time.process_time() - began < 5
