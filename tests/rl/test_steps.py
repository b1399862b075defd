"""Process supervision: which characters and tokens are steps, their advantages in float64, weight 0, wrong input."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from factories import halves, lora, made, make_model, make_tokenizer, outcome, save_model, wrap
from mlx.utils import tree_flatten

from mlx_traces.config import EvalConfig, GRPOConfig, PPOConfig, build
from mlx_traces.engine import logprobs
from mlx_traces.errors import UserError
from mlx_traces.evaluation import completion
from mlx_traces.evaluation.evaluator import Plan
from mlx_traces.records import Rollout as Sampled
from mlx_traces.records import Stepped
from mlx_traces.rl import grpo, ppo, rewards, rollouts, steps
from mlx_traces.rl.steps import Step
from mlx_traces.tasks import get_task

COUNTDOWN, GSM8K, MATH = get_task("countdown"), get_task("gsm8k"), get_task("math")
PROBLEM = COUNTDOWN.parse({"nums": [49, 25, 22], "target": 46}, "test")
THOUGHT = "49 + 25 = 74, 74 + 22 = 97 no\n49 - 25 = 24, 24 + 22 = 46 yes\n"


def plan_of(task=COUNTDOWN, tokens=200):
    return Plan(build(EvalConfig, {"max_tokens": tokens}), task, task.prompts["thinking"], task.extractors[0], [])


def sampled(text, opened="<think>\n", own_tags=None, stop="<|endoftext|>"):
    """Return a completion of the tiny tokenizer, its stop token included."""
    loaded = wrap(make_tokenizer())
    ids = tuple(loaded.tokenizer.encode(text + stop, add_special_tokens=False))
    numbers = (-1.0,) * len(ids)
    return completion.Completion.sampled("?", opened, Sampled((1, 2), ids, text, "stop", numbers, numbers), own_tags)


def steps_of(one, weights, functions=(), problem=PROBLEM, task=COUNTDOWN, tags="think"):
    """Return (text of the tokens, text of the characters, value) of each step of a completion, by kind."""
    loaded = wrap(make_tokenizer())
    config = GRPOConfig(rewards={"correct": 1.0, **weights}, group_size=2, tags=tags, max_tokens=200)
    ((scored, _),) = rollouts.scored(loaded, plan_of(task), [problem], [[one, one]], dict(functions), config)
    found = {}
    for step in scored.steps:
        written = loaded.tokenizer.decode(list(scored.ids[step.first : step.stop]))
        found.setdefault(step.kind, []).append((written, one.text[step.start : step.end], step.value))
    return found, scored


# ---------------------------------------------------------------------------------- which tokens


@pytest.mark.parametrize(
    ("text", "opened", "own", "tags"),
    [
        (THOUGHT + "</think>\n<answer>1 + 1 = 3</answer>", "<think>\n", None, "think"),  # the template opened it
        ("<think>\n" + THOUGHT + "</think>\n<answer>1 + 1 = 3</answer>", "", None, "think"),
        ("<idea>\n" + THOUGHT + "</idea>\n1 + 1 = 3", "", ("<idea>", "</idea>"), "think"),  # the tokenizer's own tags
        (THOUGHT, "", None, "none"),
    ],
)
def test_the_equations_and_their_tokens(text, opened, own, tags):
    found, scored = steps_of(sampled(text, opened, own), {"equations": 0.0, "steps": 0.0}, tags=tags)
    assert [(span, value) for _, span, value in found["equations"]] == [
        ("49 + 25 = 74", 1),
        ("74 + 22 = 97", 0),
        ("49 - 25 = 24", 1),
        ("24 + 22 = 46", 1),
    ]
    assert [(span, value) for _, span, value in found["claims"]] == [("no", 1), ("yes", 1)]
    assert all(written == span for own in found.values() for written, span, _ in own)  # the tokens are characters here
    assert scored.parts["equations"] == 0.75 and scored.parts["steps"] == 1 and scored.reward == scored.parts["correct"]


def test_merged_tokens_and_what_the_prompt_holds():
    # OP and ST are one token each; the whole turn begins with what the prompt holds.
    def mine(completions):
        text = completions[0]
        assert text == "<think>\naOPbST"
        return [
            Stepped(2, {"mine": [(8, 10, 1), (10, 12, 0.5), (13, 14, -1)], "held": [(0, 8, 1)], "part": [(5, 9, 3)]})
        ] * 2

    found, scored = steps_of(sampled("aOPbST"), {"x:y": 0.5}, {"x:y": mine})
    assert found == {"mine": [("aOP", "aO", 1), ("OPb", "Pb", 0.5), ("ST", "T", -1)], "part": [("a", "a", 3)]}
    assert scored.reward == 1 and scored.parts == {"correct": 0, "x:y": 2}


@pytest.mark.parametrize(
    ("task", "row"),
    [(GSM8K, {"question": "How many?", "answer": "#### 6"}), (MATH, {"problem": "How many?", "answer": "6"})],
    ids=["gsm8k", "math"],
)
def test_no_thought_no_steps_and_another_task(task, row):
    problem = task.parse(row, "")
    text = "2 * 3 = 6 apples, 2 + 2 = 5, x = 3\n</think>\n#### 6"
    found, scored = steps_of(sampled(text), {"equations": 1.0}, problem=problem, task=task)
    assert found["equations"] == [("2 * 3 = 6", "2 * 3 = 6", 1), ("2 + 2 = 5", "2 + 2 = 5", 0)]
    assert scored.parts["equations"] == 0.5
    found, scored = steps_of(sampled("1 + 1 = 2", ""), {"equations": 1.0}, problem=problem, task=task)
    assert found == {} and scored.parts["equations"] is None


# ---------------------------------------------------------------------------------- advantages

LENGTHS = (7, 3, 12, 9, 5, 6, 4, 8)


def some_steps(seed=0):
    """Return 2 groups of 4 completions with steps of two kinds, some completions without any."""
    draw = np.random.default_rng(seed)
    found = []
    for length in LENGTHS:
        own, at = [], 0
        while at < length - 1 and draw.random() < 0.8:
            stop = int(draw.integers(at + 1, min(length, at + 4)))
            own.append(Step("ab"[draw.integers(2)], at, stop, float(draw.normal()), at, stop))
            at = stop - int(draw.random() < 0.3)  # a token may belong to two
        found.append(tuple(own))
    assert () in found or min(map(len, found)) < max(map(len, found))
    return [found[:4], found[4:]]


def in_float64(outcomes, groups, weight, supervision, scale):
    """Return the advantages by the formulas, a token at a time."""
    found = []
    every = [step for group in groups for own in group for step in own]
    for group in groups:
        for own in group:
            row = np.full(LENGTHS[len(found)], outcomes[len(found)], np.float64)
            for t in range(len(row)):
                for step in own:
                    alike = [other.value for one in group for other in one if other.kind == step.kind]
                    credit = step.value - np.mean(alike)
                    if supervision == "local":
                        row[t] += weight * credit * (step.first <= t < step.stop)
                        continue
                    among = [other.value for other in every if other.kind == step.kind] if scale == "batch" else alike
                    spread = np.std(among, ddof=1) if len(among) > 1 else 0.0
                    credit /= 1 if scale in ("none", "rloo", "mean") else spread + 1e-4
                    row[t] += weight * credit * (step.stop - 1 >= t)
            found.append(row)
    return found


@pytest.mark.parametrize("supervision", ["local", "cumulative"])
@pytest.mark.parametrize("scale", ["std", "batch", "none", "rloo", "mean"])
def test_advantages_are_the_definition_in_float64(supervision, scale):
    for seed in range(5):
        groups, outcomes = some_steps(seed), np.random.default_rng(seed).normal(size=8)
        given = {"weight": 0.7, "supervision": supervision, "scale": scale}
        found = steps.token_advantages(outcomes, groups, LENGTHS, **given)
        for row, expected in zip(found, in_float64(outcomes, groups, **given), strict=True):
            np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-5)
    shifted = [[tuple(s._replace(first=s.first + 1, stop=s.stop + 1) for s in own[:-1]) for own in g] for g in groups]
    other = steps.token_advantages(outcomes, shifted, [length + 1 for length in LENGTHS], **given)
    assert any(
        np.abs(a[:-1] - b).max() > 1e-3 for a, b in zip(other, in_float64(outcomes, groups, **given), strict=True)
    )


def test_alike_steps_earn_exactly_nothing():
    group = [tuple(Step("a", i, i + 1, 0.1, i, i + 1) for i in range(3))] * 3
    assert steps.credits_of(group) == [[0.0] * 3] * 3 and not steps.differ(group)
    # In float64 three times 0.1 is not 0.3, so a mean would be off.
    assert sum([0.1] * 9) / 9 != 0.1


def group_of(*places, rewards_=(1.0, 0.0)):
    """Return a group of two completions of 4 tokens with steps of kind a."""
    return [
        replace(
            made(reward, (20, 21, 22, 23 + at)), steps=tuple(Step("a", *own[:2], own[2], *own[:2]) for own in spans)
        )
        for at, (reward, spans) in enumerate(zip(rewards_, places, strict=True))
    ]


def test_weight_0_is_bit_identical_and_a_weight_teaches_where_rewards_do_not():
    loaded = wrap(make_tokenizer(), lora())
    group = group_of([(0, 2, 1.0)], [(0, 2, 0.0), (2, 4, 1.0)])

    def gradient_of(group, **changes):
        config = GRPOConfig(**{"group_size": 2, "max_tokens": 4, **changes})
        rows = grpo.weighed(grpo.rows_of([group], config), config)
        loss, grads, sums = grpo.gradient(loaded.model, logprobs.split(loaded.model), rows, config)
        return [loss, sorted(sums.items()), *(np.array(array).tobytes() for _, array in tree_flatten(grads))]

    bare = [replace(one, steps=()) for one in group]
    for loss in ("dapo", "cispo", "reinforce"):
        assert gradient_of(group, loss=loss) == gradient_of(bare, loss=loss)
        assert gradient_of(group, loss=loss, step_weight=0.0, supervision="cumulative") == gradient_of(bare, loss=loss)
        assert gradient_of(bare, loss=loss, step_weight=2.0) == gradient_of(bare, loss=loss)  # there are no steps
        assert gradient_of(group, loss=loss, step_weight=2.0) != gradient_of(bare, loss=loss)
    config = GRPOConfig(group_size=2, max_tokens=4, step_weight=2.0)
    level = group_of([(0, 2, 1.0)], [(0, 2, 0.0)], rewards_=(1.0, 1.0))
    assert [row.advantage.tolist() for row in grpo.rows_of([level], config)] == [[1, 1, 0, 0], [-1, -1, 0, 0]]
    # A completion without a reward teaches nothing and is compared with none.
    nothing = group_of([(0, 2, 1.0)], [(0, 2, 0.0)], rewards_=(1.0, None))
    assert not any(row.advantage.any() for row in grpo.rows_of([nothing], config))


@pytest.mark.parametrize(("supervision", "whiten"), [("local", True), ("local", False), ("cumulative", False)])
def test_ppo_is_paid_for_steps(supervision, whiten):
    config = PPOConfig(max_tokens=4, step_weight=0.5, supervision=supervision, whiten=whiten, gamma=0.9, gae_lambda=0.8)
    group = group_of([(0, 2, 1.0)], [(0, 2, 0.0), (1, 4, 0.5)])
    draw, rows = np.random.default_rng(2), ppo.rows_of([group], config)
    plain = ppo.rows_of([group], config.model_copy(update={"step_weight": 0.0}))
    for row, other in zip(rows, plain, strict=True):
        for name in ("old", "values"):
            values = draw.normal(size=4).astype(np.float32)
            setattr(row, name, values), setattr(other, name, values)
    ppo.aim(rows, config)
    ppo.aim(plain, config.model_copy(update={"step_weight": 0.0}))
    earned = [[0.5], [-0.5, 0.0]]
    for row, other, one, credits_ in zip(rows, plain, group, earned, strict=True):
        extra = np.zeros(4)
        for step, credit in zip(one.steps, credits_, strict=True):
            if supervision == "local":
                extra[step.first : step.stop] += 0.5 * credit
            else:
                for t in range(step.stop):
                    extra[t] += 0.5 * credit * (0.9 * 0.8) ** (step.stop - 1 - t)
        np.testing.assert_allclose(row.advantage - other.advantage, extra, atol=1e-6)
        expected = np.zeros(4) if supervision == "local" else extra
        np.testing.assert_allclose(row.returns - other.returns, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("supervision", "expected"),
    [("local", [[0, 1, 0], [-3, 1, 1]]), ("cumulative", [[1, 1, 0], [-3, 0, 1]])],
)
def test_what_falls_on_an_inserted_token_counts_in_ppo_at_the_drawn_one_before(supervision, expected):
    config = PPOConfig(max_tokens=5, step_weight=4, supervision=supervision)
    first, second = made(1.0, (20, 21, 22, 23, 24), forced=(0, 3)), made(0.0, (20, 21, 22, 23), forced=(1,))
    group = [
        replace(first, steps=(Step("a", 0, 1, 1.0, 0, 1), Step("a", 2, 4, 1.0, 2, 4))),  # both end at inserted tokens
        replace(second, steps=(Step("a", 0, 2, 0.0, 0, 2), Step("a", 2, 4, 1.0, 2, 4))),
    ]
    assert [row.credit.tolist() for row in ppo.rows_of([group], config)] == expected


# ---------------------------------------------------------------------------------- runs


@pytest.fixture
def settings(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i}+1", "answer": str(i + 1)}) + "\n" for i in range(7)))
    return {
        **{"model": str(save_model(tmp_path / "model")), "task": "qa", "data": str(file), "device": "cpu"},
        **{"num_steps": 2, "prompts_per_step": 3, "group_size": 4, "max_tokens": 6, "rank": 4},
        **{"learning_rate": 0.01, "warmup": 0, "rewards": {"factories:halves": 1.0}},
    }


@pytest.mark.parametrize(("train", "kind"), [(grpo.train, GRPOConfig), (ppo.train, PPOConfig)])
def test_a_run_without_a_weight_is_the_same_run_and_with_one_another(train, kind, settings, tmp_path):
    given = {"absent": {}, "zero": {"step_weight": 0, "supervision": "cumulative"}, "local": {"step_weight": 1}}
    given["cumulative"] = given["local"] | {"supervision": "cumulative"}
    found = {}
    for name, changes in given.items():
        train(kind(**settings, **changes), tmp_path / name)
        found[name] = outcome(tmp_path / name)
    for name, equal in {"zero": True, "local": False, "cumulative": False}.items():
        weights, metrics, samples, _ = found[name]
        alike = all(mx.array_equal(array, found["absent"][0][key]).item() for key, array in weights.items())
        assert alike == equal and (metrics == found["absent"][1]) == equal, name
        assert metrics[0]["steps/capitals_count"] == pytest.approx(2) and 0 <= metrics[0]["steps/capitals_1"] <= 1
        shown = samples[0]["steps"]
        assert [step[0] for step in shown] == ["capitals"] * 2
        assert shown[0][1] == 0 and shown[0][2] == shown[1][1] and shown[1][2] == len(samples[0]["completion"])


def test_groups_of_equal_rewards_are_kept_if_their_steps_differ(settings):
    loaded = wrap(make_tokenizer(), make_model())
    for weight, count in ((1.0, 3), (0.0, 0)):
        config = GRPOConfig(**{**settings, "step_weight": weight, "max_resamples": 1})
        planned, _, _ = rollouts.prepare(config)
        functions = {name: halves for name in config.rewards}
        _, kept, _ = rollouts.collect(loaded, planned, functions, rollouts.Progress(), 1, config, 1)
        assert len(kept) == count


def test_figures_by_position():
    def own(*values):
        return tuple(Step("a", i, i + 1, value, i, i + 1) for i, value in enumerate(values))

    row = steps.figures([own(1, 0, 1, 1, 1, 0, 0, 1), own(1, 1), own()])
    assert row.pop("steps/a") == pytest.approx(0.7) and row.pop("steps/a_count") == pytest.approx(10 / 3)
    assert row.pop("steps/a_later") == pytest.approx(1 / 3)
    assert row == {f"steps/a_{place}": value for place, value in zip(range(1, 6), (1, 0.5, 1, 1, 1), strict=True)}
    assert steps.figures([(), ()]) == {}


# ---------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"a": [(3, 99, 1)]}, r"step \(3, 99\) of 'a' is not within the completion's 14 characters"),
        ({"a": [(-1, 2, 1)]}, r"step \(-1, 2\) of 'a' is not within"),
        ({"a": [(2, 2, 1)]}, r"step \(2, 2\) of 'a' is not within"),
        ({"a": [(1, 3, float("nan"))]}, "returned 'nan', not a finite number"),
        ({"a": [(1, 3, None)]}, r"\(1, 3, None\) of 'a' is not \(start, end, value\)"),
        ({"a": [(5, 9, 1), (1, 6, 1)]}, r"steps \(1, 6\) and \(5, 9\) of 'a' overlap"),
        ({"a": [(1, 3)]}, r"\(1, 3\) of 'a' is not \(start, end, value\)"),
        ({"a": [(1.5, 3, 1)]}, r"\(1.5, 3, 1\) of 'a' is not \(start, end, value\)"),
        ({"a": 3}, "the steps of 'a' are an int, not a list of spans"),
        ({"a b": []}, "'a b' is not the name of a kind of steps"),
        ({3: []}, "'3' is not the name of a kind of steps"),
        ({f"a{i}": [] for i in range(21)}, "its steps have 21 kinds, more than 20; use fewer names"),
        ([(1, 2, 3)], "its steps are a list, not a dict of spans by kind"),
        ({"equations": [(1, 3, 1)]}, "reward equations has steps of the kind 'equations' too; rename one"),
    ],
)
def test_steps_that_go_wrong_are_one_line(given, said):
    with pytest.raises(UserError, match=rf"^reward x:y:? .*{said}"):
        weights = {"equations": 0.0, "x:y": 1.0}
        steps_of(sampled("1+1=2\n"), weights, {"x:y": lambda texts: [Stepped(1.0, given)] * len(texts)})


def test_settings_that_have_no_steps_are_refused():
    for weights, task, said in (
        ({"correct": 1.0}, None, "step_weight: no reward gives values to steps; add equations"),
        ({"correct": 1.0, "steps": 0.0}, GSM8K, "reward steps: the task gsm8k checks no steps of its own"),
    ):
        with pytest.raises(UserError, match=said):
            rewards.load(weights, [], GRPOConfig(step_weight=1.0, rewards=weights), task=task)
    with pytest.raises(UserError, match="gspo has one ratio and one advantage"):
        build(GRPOConfig, {"loss": "gspo", "step_weight": 1.0})
    stored = GRPOConfig().model_dump(mode="json")  # runs of earlier versions keep their identity
    assert not {"step_weight", "supervision"} & set(stored)
