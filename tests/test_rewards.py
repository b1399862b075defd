"""Rewards: the built-in ones by hand, functions of one's own and how they can go wrong."""

import sys

import pytest

from mlx_traces import rewards
from mlx_traces.config import EvalConfig
from mlx_traces.errors import UserError
from mlx_traces.evaluation import Completion, Plan
from mlx_traces.records import Rollout
from mlx_traces.tasks import get_task

COUNTDOWN = get_task("countdown")
PLAN = Plan(EvalConfig(max_tokens=40), COUNTDOWN, COUNTDOWN.prompts["thinking"], "answer", [])
PROBLEM = COUNTDOWN.parse({"nums": [49, 25, 22], "target": 46, "level": "easy"}, "test")
GOOD = "49 - 25 = 24, 24 + 22 = 46 yes\n</think>\n<answer>(49 - 25) + 22</answer>"


def completion(text, tokens=10, finish="stop", opened="<think>\n"):
    return Completion("the prompt", opened, Rollout((1,), tuple(range(tokens)), text, finish))


def scored(weights, *completions, functions=None):
    samples = [(PROBLEM, one) for one in completions]
    return rewards.score(PLAN, samples, functions or rewards.load(weights, list(PROBLEM.columns)), weights, "think")


def test_the_built_in_rewards():
    weights = dict.fromkeys(rewards.BUILT_IN, 1.0)
    bad = completion("24 + 22 = 47", 40, "length")
    good, cut = scored(weights, completion(GOOD), bad)
    assert 0 < good.pop("structure") < 1
    assert good == {"correct": 1, "format": 1, "faithfulness": 1, "length": 0.75, "repetition": 1}
    assert (cut["correct"], cut["format"], cut["length"]) == (0, 0, 0)
    assert list(cut) == list(weights)
    # What the template opened belongs to the response.
    assert scored({"format": 1.0}, completion(GOOD, opened=""))[0]["format"] == 0


def test_the_weighted_sum_is_of_those_that_apply():
    weights = {"correct": 1.0, "length": -0.5, "my:own": 2.0}
    assert rewards.total({"correct": 1.0, "length": 0.5, "my:own": None}, weights) == 0.75
    assert rewards.total({"correct": 0.0, "length": 1.0, "my:own": 0.25}, weights) == 0


def test_a_function_gets_the_columns_that_it_asks_for():
    seen = {}

    def some(completions, target, finish_reasons, prompts=None, other=7):
        seen.update(completions=completions, target=target, ends=finish_reasons, prompts=prompts, other=other)
        return (None, 2)

    def everything(texts, **columns):
        return [len(columns)] * len(texts)

    functions = {"a:some": some, "a:all": everything}
    parts = scored(
        dict.fromkeys(functions, 1.0), completion("x"), completion("y", finish="length"), functions=functions
    )
    assert parts == [{"a:some": None, "a:all": 6.0}, {"a:some": 2.0, "a:all": 6.0}]
    assert seen == {
        "completions": ["<think>\nx", "<think>\ny"],
        "target": [46, 46],
        "ends": ["stop", "length"],
        "prompts": ["the prompt"] * 2,
        "other": 7,
    }


MODULE = """
import numpy as np

number = 3
def fine(completions, level): return np.array([0.5] * len(completions))
def few(completions): return [1.0]
def none(completions): pass
def nan(completions): return [1.0, float("nan")]
def text(completions): return ["1", "2"]
def raises(completions): return [{}[text] for text in completions]
def asks(completions, colour): return [1.0, 1.0]
def nothing(): return [1.0]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("import nothing_like_this\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("own_rewards", None)


def test_a_module_of_the_working_folder(own):
    assert scored({"own_rewards:fine": 1.0}, completion("x"))[0] == {"own_rewards:fine": 0.5}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_rewards:few", "returned 1 values for 2 completions"),
        ("own_rewards:none", "returned a NoneType, not a list of numbers"),
        ("own_rewards:nan", "returned 'nan', not a finite number or None"),
        ("own_rewards:text", "returned '1', not a finite number or None"),
        ("own_rewards:raises", r"failed \(KeyError: '<think>.*x'\)"),
        ("own_rewards:asks", ": there is no column 'colour'; there are nums, target, level, prompts"),
        ("own_rewards:nothing", ": takes no argument"),
        ("own_rewards:number", ": own_rewards has no function 'number'"),
        ("own_rewards:fin", ": own_rewards has no function 'fin'"),
        ("no_such_module:x", r": no_such_module cannot be imported \(ModuleNotFoundError"),
        ("broken_rewards:x", r": broken_rewards cannot be imported \(.*nothing_like_this"),
    ],
)
def test_functions_that_go_wrong_are_named(own, name, message):
    with pytest.raises(UserError, match=f"^reward {name} ?{message}"):
        scored({name: 1.0}, completion("x"), completion("y"))


def test_names_that_are_no_reward():
    with pytest.raises(UserError, match="unknown reward 'formt': choose correct, .* or module:function; .* 'format'"):
        rewards.load({"formt": 1.0}, [])
    for weights in ({}, {"correct": 0.0}):
        with pytest.raises(UserError, match="rewards: none has a weight"):
            rewards.load(weights, [])
