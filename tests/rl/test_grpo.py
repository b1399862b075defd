"""Reinforcement: the gradient of a step by plain formulas, what must not change it, runs cut off, wrong input."""

import importlib
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from factories import (
    Killed,
    Moments,
    assert_close,
    assert_same_outcome,
    level,
    lora,
    made,
    make_model,
    make_tokenizer,
    outcome,
    wrap,
)
from mlx.utils import tree_flatten, tree_map
from stress import killing

from mlx_traces.config import AdapterConfig, EvalConfig, GRPOConfig, PPOConfig, build
from mlx_traces.engine import logprobs
from mlx_traces.engine.batching import Example
from mlx_traces.errors import UserError
from mlx_traces.evaluation import evaluator
from mlx_traces.evaluation.completion import Completion
from mlx_traces.models import adapters, loading
from mlx_traces.records import Problem
from mlx_traces.records import Rollout as Sampled
from mlx_traces.rl import grpo, losses, ppo, rewards, rollouts, trainer
from mlx_traces.rl.rollouts import Row
from mlx_traces.rl.steps import Step
from mlx_traces.rl.trainer import Learner
from mlx_traces.runtime import device, run_folder
from mlx_traces.tasks import get_task
from mlx_traces.train import checkpoints, loop, optimizer
from mlx_traces.train.optimizer import make_optimizer

# ---------------------------------------------------------------------------------- a step


def settings_of(**changes):
    return GRPOConfig(**{"group_size": 4, "max_tokens": 12, "temperature": 0.7, **changes})


def some_rows(config, count=8, seed=0, off_policy=False, by_token=False):
    """Return rows of unequal lengths with advantages of either sign and 0, weighed as one step."""
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        n = int(draw.integers(1, 12))
        ids = tuple(draw.integers(0, 98, 5 + i % 3 + n).tolist())
        flags = (False,) * (len(ids) - n) + (True,) * n
        sampler = draw.normal(-4, 0.5, n).astype(np.float32)
        rows.append(Row(Example(f"r{i}", ids, flags), sampler, [1.0, -0.7, 0.0, 0.4][i % 4]))
        if by_token:
            rows[-1].advantage = draw.normal(0, 1, n).astype(np.float32)
    for row, values in grpo.logprobs_of(logprobs.split(lora()), rows, config):
        row.reference = values + draw.normal(0, 0.3, len(values)).astype(np.float32)
        if off_policy:  # near the policy's own, so that ratios are on both sides of the bounds
            row.old = values + draw.normal(0, 0.3, len(values)).astype(np.float32)
    grpo.weighed(rows, config)
    return rows


def plainly(model, rows, config):
    """Return loss and gradient by full logits and the papers' formulas, a row and a token at a time."""
    low, high = 1 - config.clip_eps, 1 + (config.clip_eps_high or config.clip_eps)
    tokens = sum(row.example.count for row in rows)

    def loss_of():
        total = mx.array(0.0)
        for row in rows:
            ids, n = row.example.ids, row.example.count
            logits = model(mx.array([ids]))[0] / config.temperature
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            chosen = [logprobs[at - 1, ids[at]] for at in range(len(ids) - n, len(ids))]
            losses = []
            log_ratios = []
            for j, value in enumerate(chosen):
                old = mx.stop_gradient(value) if row.old is None else row.old[j].item()
                log_ratios.append(value - old)
            for j, value in enumerate(chosen):
                ratio = mx.exp(sum(log_ratios) / n if config.loss == "gspo" else log_ratios[j])
                advantage = np.broadcast_to(row.advantage, n)[j].item()
                gain = mx.minimum(ratio * advantage, mx.clip(ratio, low, high) * advantage)
                if config.loss == "cispo":
                    gain = mx.stop_gradient(mx.minimum(ratio, high)) * advantage * value
                elif config.loss == "reinforce":
                    gain = advantage * value
                elif row.old is None:
                    gain = ratio * advantage
                gap = row.reference[j].item() - value
                weight = ratio if config.unbiased_kl else 1
                losses.append(-gain + config.kl_coef * (mx.exp(gap) - 1 - gap) * weight)
            share = {
                "dapo": 1 / tokens,
                "cispo": 1 / tokens,
                "grpo": 1 / (n * len(rows)),
                "gspo": 1 / (n * len(rows)),
                "dr_grpo": 1 / (len(rows) * config.max_tokens),
                "reinforce": 1 / len(rows),
            }[config.loss]
            total = total + share * sum(losses)
        return total

    loss, grads = nn.value_and_grad(model, loss_of)()
    return loss.item(), grads


@pytest.mark.parametrize(
    ("kind", "off_policy", "kl_coef", "unbiased"),
    [
        ("dapo", False, 0.0, False),
        ("dapo", True, 0.3, False),
        ("dapo", False, 0.3, True),
        ("dapo", True, 0.3, True),
        ("gspo", True, 0.3, True),
        *((kind, True, 0.0, False) for kind in losses.KINDS if kind != "dapo"),
    ],
)
@pytest.mark.parametrize("by_token", [False, True])
def test_gradient_is_that_of_the_formulas_on_full_logits(kind, off_policy, kl_coef, unbiased, by_token):
    if by_token and kind == "gspo":
        kind = "dapo"  # gspo has one advantage a row
    config = settings_of(loss=kind, kl_coef=kl_coef, unbiased_kl=unbiased, clip_eps_high=0.28, micro_tokens=40)
    rows = some_rows(config, count=6, off_policy=off_policy, by_token=by_token)
    model = lora()
    loss, grads, sums = grpo.gradient(model, logprobs.split(model), rows, config)
    expected, expected_grads = plainly(model, rows, config)
    assert loss == pytest.approx(expected, abs=2e-5)
    assert_close(grads, expected_grads, 2e-4)
    assert sums["tokens"] == sum(row.example.count for row in rows)
    if off_policy and kind in ("grpo", "dapo"):
        assert sums["clip_low"] > 0 and sums["clip_high"] > 0


@pytest.mark.parametrize("by_token", [False, True])
def test_split_order_and_padding_change_nothing(by_token):
    model = lora()
    halves = logprobs.split(model)
    results = []
    for micro, order in ((9999, 1), (40, 1), (1, 1), (9999, -1), (60, -1)):
        config = settings_of(micro_tokens=micro, kl_coef=0.1)
        rows = some_rows(config, off_policy=True, by_token=by_token)[::order]
        results.append(grpo.gradient(model, halves, rows, config))
    for loss, grads, sums in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-5)
        assert_close(grads, results[0][1], 1e-5)
        assert all(value == pytest.approx(results[0][2][name], rel=1e-4, abs=1e-5) for name, value in sums.items())


def test_rows_without_advantage_can_be_left_out():
    for kind in losses.KINDS:
        config = settings_of(loss=kind)
        model, rows = lora(), some_rows(config, off_policy=True)
        useful = grpo.weighed(rows, config)
        assert len(useful) == 6 and len(rows) == 8
        (a, grads, _), (b, more, _) = (grpo.gradient(model, logprobs.split(model), r, config) for r in (useful, rows))
        assert a == pytest.approx(b, abs=1e-6)
        assert_close(grads, more)
    assert len(grpo.weighed(rows, settings_of(kl_coef=0.1))) == 8  # the KL term teaches them too


def test_swapped_rewards_flip_the_update_and_equal_ones_give_none():
    loaded = wrap(make_tokenizer(), lora())

    def gradient_of(values, **changes):
        config = settings_of(group_size=2, **changes)
        group = [made(reward, (20 + i, 30, 40)) for i, reward in enumerate(values)]
        rows = grpo.weighed(grpo.rows_of([group], config), config)
        return grpo.gradient(loaded.model, logprobs.split(loaded.model), rows, config)[1] if rows else None

    assert gradient_of((0.3, 0.3)) is None
    for advantage in ("std", "batch", "none", "rloo", "mean"):
        one, other = gradient_of((1, 0), advantage=advantage), gradient_of((0, 1), advantage=advantage)
        assert any(array.any() for _, array in tree_flatten(one))
        assert_close(one, tree_map(lambda array: -array, other))


@pytest.mark.parametrize("advantage", ["std", "batch", "none", "rloo", "mean"])
def test_a_completion_without_a_reward_teaches_nothing_and_is_compared_with_none(advantage):
    given = ((1.0, None, 0.0, 0.5), (None, 2.0, None, None), (None,) * 4, (1.0, 1.0, 3.0, 0.0), (0.5, 2.0, 1.0, None))
    groups = [[made(reward, (20 + i, 30)) for i, reward in enumerate(group)] for group in given]
    config = settings_of(advantage=advantage)
    every = [reward for group in given for reward in group if reward is not None]
    for group, found in zip(given, grpo.advantages(groups, config).reshape(5, 4), strict=True):
        own = [reward for reward in group if reward is not None]
        for reward, value in zip(group, found.tolist(), strict=True):
            if reward is None or (len(own) == 1 and advantage != "mean"):
                assert value == 0
                continue
            rest = np.mean(own) if advantage != "mean" else np.mean(every)
            if advantage == "rloo":
                rest = (sum(own) - reward) / (len(own) - 1)
            spread = {"std": own, "batch": every}.get(advantage)
            expected = (reward - rest) / (1 if spread is None else np.std(spread, ddof=1) + 1e-4)
            assert value == pytest.approx(expected, abs=1e-5)
    rows = grpo.rows_of(groups, config)
    assert not {id(rows[i]) for i in (1, 4, 8, 19)} & {id(row) for row in grpo.weighed(rows, config)}
    assert not grpo.advantages(groups[2:3], config).any()


def test_what_is_told_of_completions_without_a_reward():
    groups = [[made(reward, (20, 30)) for reward in group] for group in ((1.0, None, 0.0), (None, 0.5, 0.5))]
    assert [rollouts.informative(group) for group in groups] == [True, False]
    row = rollouts.figures(groups)
    assert "rollout/forced" not in row and rollouts.figures(groups, bounded=True)["rollout/forced"] == 0
    assert row["reward/mean"] == row["reward/correct"] == 0.5 and row["rollout/zero_std_groups"] == 0.5
    task = evaluator.get_task("qa")
    groups = [[replace(one, problem=Problem("p", {"question": "q"}, "1")) for one in group] for group in groups]
    shown = {row["kind"]: row["reward"] for row in rollouts.shown_of(groups, task, 1, 0)}
    assert (shown["best"], shown["worst"]) == (1, 0)
    nothing = [[one for one in groups[1] if one.reward is None] * 2]
    assert rollouts.figures(nothing)["reward/mean"] is None and not rollouts.informative(nothing[0])
    assert {row["reward"] for row in rollouts.shown_of(nothing, task, 1, 0)} == {None}
    assert len(ppo.rows_of(groups, PPOConfig())) == 4  # there is nothing that values could learn to foresee


def unsure(completions):
    return [None if i % 2 else float(len(text)) for i, text in enumerate(completions)]


def test_a_run_with_rewards_that_do_not_apply(settings, tmp_path):
    for train, config in ((grpo.train, GRPOConfig), (ppo.train, PPOConfig)):
        own = config(**{**settings, "rewards": {f"{__name__}:unsure": 1}, "overlong": "penalty", "num_steps": 2})
        train(own, tmp_path / config.__name__)
        rows = [row for row in outcome(tmp_path / config.__name__)[1] if "loss" in row]
        assert len(rows) == 2 and all(np.isfinite(row["loss"]) and row["reward/mean"] > 0 for row in rows)


@pytest.mark.parametrize("step_weight", [0.0, 1.5])
def test_tokens_that_were_put_there_have_no_gradient(step_weight):
    """The gradient is that of the drawn tokens alone, each predicted from all that stands before it."""
    config = settings_of(step_weight=step_weight, temperature=1.0, micro_tokens=30)
    group = [
        made(1.0, (5, 6, 7, 8, 9, 10), forced=(0, 1, 3)),
        made(0.0, (6, 7, 8, 20), forced=(3,)),
        made(0.5, (9, 8, 7)),
        made(0.2, (4, 5), forced=(0, 1)),
    ]
    steps = [(Step("equation", 0, 1, value, 1, 3),) for value in (1.0, 0.0, 1.0)]
    group[:3] = [replace(one, steps=own) for one, own in zip(group, steps, strict=False)]
    rows = grpo.weighed(grpo.rows_of([group], config), config)
    assert [row.example.count for row in rows] == [3, 3, 3] and all(np.isfinite(row.sampler).all() for row in rows)
    model = lora()
    loss, grads, sums = grpo.gradient(model, logprobs.split(model), rows, config)
    whole = grpo.rows_of([[replace(one, completion=drawn_all(one)) for one in group]], config)

    def loss_of():
        total = mx.array(0.0)
        for one, row in zip(group[:3], whole, strict=False):
            ids = mx.array([(1, 2, 3, *one.ids)])
            logits = model(ids)[0, 2:-1]
            logs = mx.take_along_axis(logits - mx.logsumexp(logits, axis=-1, keepdims=True), ids[0, 3:, None], -1)[:, 0]
            weights = mx.array(np.broadcast_to(row.advantage, len(one.ids)) * one.drawn)
            total = total - (weights * mx.exp(logs - mx.stop_gradient(logs))).sum()
        return total / 9

    expected, expected_grads = nn.value_and_grad(model, loss_of)()
    assert loss == pytest.approx(expected.item(), abs=2e-5) and sums["tokens"] == 9
    assert_close(grads, expected_grads, 2e-4)


def drawn_all(one):
    rollout = replace(one.completion.rollout, forced=(), logprobs=(-1.0,) * len(one.ids))
    return replace(one.completion, rollout=rollout)


@pytest.mark.parametrize("recipe", [(grpo, GRPOConfig), (ppo, PPOConfig)], ids=["grpo", "ppo"])
def test_a_run_with_bounded_thoughts(settings, tmp_path, recipe):
    module, kind = recipe
    bounds = {"prefill": "<think>\n", "think_tokens": 3, "think_at_least": 2}
    config = kind(**{**settings, "num_steps": 2, **bounds})
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        rows_of = module.rows_of
        patch.setattr(module, "rows_of", lambda *given: seen.append(rows_of(*given)) or seen[-1])
        module.train(config, tmp_path / "out")
    tokens = wrap(make_tokenizer()).tokenizer.encode("\n</think>\n\n", add_special_tokens=False)
    closed = 0
    for row in seen[0]:
        ids, trained, count = list(row.example.ids), row.example.trained, len(tokens)
        assert row.example.count == sum(trained) == len(row.sampler) and np.isfinite(row.sampler).all()
        places = [place for place in range(len(ids)) if ids[place : place + count] == tokens]
        assert not any(any(trained[place : place + count]) for place in places)
        closed += len(places)
    assert closed
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert any(row.get("rollout/forced", 0) > 0 for row in metrics)
    shown = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert any("forced" in row for row in shown)
    identity = json.loads((tmp_path / "out" / "run.json").read_text())["identity"]
    assert identity["think_tokens"] == 3 and identity["evaluate"]["think_tokens"] == 3
    with pytest.raises(UserError, match="think_tokens"):
        module.train(config.model_copy(update={"think_tokens": 4}), tmp_path / "out", resume=True)
    lower = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"think_tokens": 1})})
    with pytest.raises(UserError, match=r"^evaluate: think_at_least: 2 is above think_tokens \(1\)"):
        module.train(lower, tmp_path / "other")


def test_the_stop_token_is_learned():
    loaded = wrap(make_tokenizer(), lora())
    stop = min(loaded.stop_ids)
    config = settings_of(group_size=2, temperature=1.0)
    rows = grpo.rows_of([[made(1.0, (20, stop)), made(0.0, (20, 21))]], config)
    assert rows[0].example.ids[-1] == stop and rows[0].example.count == 2

    def logprob():
        logits = loaded.model(mx.array([[1, 2, 3, 20]]))[0, -1]
        return (logits[stop] - mx.logsumexp(logits)).item()

    before = logprob()
    optimizer = make_optimizer(config.model_copy(update={"learning_rate": 0.01, "warmup": 0}), 2)
    halves = logprobs.split(loaded.model)
    learner = Learner(loaded.model, halves, optimizer, adapters.reference(loaded.model, None))
    row = grpo.learn(learner, rows, 1, config)
    assert logprob() > before + 0.01 and row["optim/updates"] == 1
    # A cut-off completion that is masked is not learned from, though its reward counts in the group.
    masked = config.model_copy(update={"overlong": "mask"})
    rows = grpo.rows_of([[made(1.0, (20, stop)), made(0.0, (20, 21), "length")]], masked)
    useful = grpo.weighed(rows, masked)
    assert useful == rows[:1] and useful[0].advantage > 0 and useful[0].weights.sum() == pytest.approx(1)
    rows = grpo.rows_of([[made(1.0, (20, 22), "length"), made(0.0, (20, 21), "length")]], masked)
    assert grpo.learn(learner, rows, 1, masked) == {"optim/updates": 0}


def test_kl_and_its_gradient_are_0_at_the_reference(tmp_path):
    config = settings_of(kl_coef=0.5, rank=4)
    model = make_model()
    mx.random.seed(0)
    settings = adapters.start(model, config)  # changes nothing yet: the model is its reference
    halves = logprobs.split(model)

    def measured(reference):
        rows = some_rows(config)
        for row in rows:
            row.advantage = 0.0
        with reference():
            for row, values in grpo.logprobs_of(halves, rows, config):
                row.reference = values
        return grpo.gradient(model, halves, rows, config)

    loss, grads, sums = measured(adapters.reference(model, config.reference))
    assert abs(loss) < 1e-10 and abs(sums["kl_ref"]) < 1e-9
    assert all(mx.abs(array).max() < 1e-6 for _, array in tree_flatten(grads))
    # An adapter elsewhere: measured against itself 0, against the bare model not.
    arrays = [(k, 0.1 * mx.random.normal(v.shape)) for k, v in tree_flatten(model.trainable_parameters())]
    model.load_weights(arrays, strict=False)
    adapters.save(model, tmp_path / "adapter", settings)
    here = config.model_copy(update={"reference": str(tmp_path / "adapter")})
    assert abs(measured(adapters.reference(model, here.reference))[2]["kl_ref"]) < 1e-6
    assert measured(adapters.reference(model, config.reference))[2]["kl_ref"] > 0.1
    model.load_weights([(name, 2 * array) for name, array in arrays], strict=False)
    assert measured(adapters.reference(model, here.reference))[2]["kl_ref"] > 0.1
    now = dict(tree_flatten(model.trainable_parameters()))
    assert all(mx.array_equal(now[name], 2 * array) for name, array in arrays)  # it is itself again
    other = make_model()
    adapters.start(other, AdapterConfig(rank=8))
    with pytest.raises(UserError, match="the reference is not of the kind, layers, targets and rank that are trained"):
        adapters.reference(other, here.reference)
    full = make_model()
    adapters.start(full, AdapterConfig(kind="full"))
    with pytest.raises(UserError, match="kl_coef: fully trained layers have no adapter to leave out"):
        adapters.reference(full, config.reference)


def test_the_reference_is_the_adapter_that_training_starts_from_unless_it_is_named():
    def reference_of(begun=None, **changes):
        return trainer.with_reference(GRPOConfig(**{"kl_coef": 0.1, **changes}), begun or {}).reference

    assert reference_of() is reference_of(reference="base") is None  # without an adapter
    assert reference_of(reference="other") == reference_of(adapter="start", reference="other") == "other"
    assert reference_of(adapter="start") == "start" and reference_of(adapter="start", reference="base") == "base"
    assert reference_of(adapter="start", kl_coef=0) is None
    # Of old the bare model was the default there: what began so goes on so.
    old = {"reference": None}
    assert reference_of(old, adapter="start") is reference_of(old, adapter="start", reference="base") is None
    assert reference_of(old, adapter="start", reference="other") == "other"


def test_the_start_adapter_is_the_reference_and_an_old_run_keeps_the_base(settings, tmp_path, monkeypatch):
    model = lora(scale=0.3)
    adapters.save(model, tmp_path / "start", adapters.start(make_model(), AdapterConfig(rank=4)))
    own = {name: value for name, value in settings.items() if name != "rank"}
    own |= {"adapter": str(tmp_path / "start"), "kl_coef": 0.1, "num_steps": 2, "save_every": 1, "evaluate": None}

    def first_kl(out):
        return next(row["policy/kl_ref"] for row in outcome(out)[1] if "policy/kl_ref" in row)

    grpo.train(GRPOConfig(**own), tmp_path / "run")
    assert abs(first_kl(tmp_path / "run")) < 1e-6
    grpo.train(GRPOConfig(**own, reference="base"), tmp_path / "whole")
    assert first_kl(tmp_path / "whole") > 0.1
    with pytest.raises(UserError, match="other settings .reference was base, now "):
        grpo.train(GRPOConfig(**own), tmp_path / "whole", resume=True)
    # A run of before there was a choice, cut off after a step.
    learn = grpo.learn

    def once(*args):
        if args[2] == 2:
            raise Killed
        return learn(*args)

    monkeypatch.setattr(grpo, "learn", once)
    with pytest.raises(Killed):
        grpo.train(GRPOConfig(**own, reference="base"), tmp_path / "old")
    monkeypatch.setattr(grpo, "learn", learn)
    file = tmp_path / "old" / "run.json"
    begun = json.loads(file.read_text())
    begun["identity"]["reference"] = None
    file.write_text(json.dumps(begun))
    grpo.train(GRPOConfig(**own), tmp_path / "old", resume=True)
    assert_same_outcome(tmp_path / "old", outcome(tmp_path / "whole"))


def test_a_run_is_not_resumed_with_another_content_of_its_reference(settings, tmp_path):
    made = adapters.start(make_model(), AdapterConfig(rank=4))
    adapters.save(lora(scale=0.3), tmp_path / "other", made)
    config = GRPOConfig(**settings | {"kl_coef": 0.1, "reference": str(tmp_path / "other"), "num_steps": 1})
    grpo.train(config, tmp_path / "run")
    grpo.train(config, tmp_path / "run", resume=True)
    made["lora_parameters"]["scale"] *= 5
    adapters.save(lora(scale=0.3), tmp_path / "other", made)
    with pytest.raises(UserError, match="started with other settings .reference_files was "):
        grpo.train(config, tmp_path / "run", resume=True)
    file = tmp_path / "run" / "run.json"  # of a version that did not note it
    begun = json.loads(file.read_text())
    del begun["identity"]["reference_files"]
    file.write_text(json.dumps(begun))
    grpo.train(config, tmp_path / "run", resume=True)


def test_importance_weights_are_of_the_sampler():
    model = lora()
    config = settings_of()
    rows = some_rows(config)
    truth = {id(row): values for row, values in grpo.logprobs_of(logprobs.split(model), rows, config)}
    for row in rows:
        row.sampler = truth[id(row)] - np.float32(np.log(1.5))
    plain = grpo.gradient(model, logprobs.split(model), rows, config)
    assert plain[2]["kl_sampler"] / plain[2]["tokens"] == pytest.approx(0.5 - np.log(1.5), abs=1e-4)
    for cap, factor in ((2.0, 1.5), (1.2, 1.2)):
        changed = config.model_copy(update={"importance": "token", "importance_cap": cap})
        grads = grpo.gradient(model, logprobs.split(model), rows, changed)[1]
        for (_, a), (_, b) in zip(tree_flatten(grads), tree_flatten(plain[1]), strict=True):
            assert mx.abs(a - factor * b).max() <= 1e-4 * mx.abs(b).max()


def test_problems_are_drawn_over_and_over():
    pool = [Problem(str(i), {}, "1") for i in range(5)]
    stream = rollouts.drawn(pool, 3, 0)
    ids = [next(stream).id for _ in range(15)]
    assert all(sorted(ids[at : at + 5]) == list("01234") for at in (0, 5, 10))
    assert len({tuple(ids[at : at + 5]) for at in (0, 5, 10)}) > 1
    for start in (3, 5, 7, 11):
        later = rollouts.drawn(pool, 3, start)
        assert [next(later).id for _ in range(15 - start)] == ids[start:]


# ---------------------------------------------------------------------------------- runs


@pytest.fixture
def settings(model_folder, tmp_path):
    return settings_in(tmp_path, model_folder)


@pytest.fixture(scope="module")
def whole(model_folder, tmp_path_factory):
    """The outcome of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    grpo.train(GRPOConfig(**settings_in(folder, model_folder)), folder / "run")
    return outcome(folder / "run")


def settings_in(folder, model_folder):
    """Settings of a run of 4 steps of 3 problems out of 7, with a validation and a checkpoint every 2."""
    file, valid = folder / "problems.jsonl", folder / "valid.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i}+1", "answer": str(i + 1)}) + "\n" for i in range(7)))
    valid.write_text(json.dumps({"question": "20+1", "answer": "21"}) + "\n")
    return {
        "model": str(model_folder),
        "task": "qa",
        "data": str(file),
        "limit": 7,
        "rewards": {"factories:capitals": 1.0},
        "num_steps": 4,
        "prompts_per_step": 3,
        "group_size": 4,
        "max_tokens": 6,
        "rank": 4,
        "learning_rate": 0.01,
        "warmup": 0,
        "eval_every": 2,
        "save_every": 2,
        "evaluate": {"task": "qa", "data": str(valid), "limit": 1, "max_tokens": 4},
        "device": "cpu",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"minibatches": 2, "updates_per_batch": 2, "max_resamples": 2, "kl_coef": 0.1},
        {"rewards": {"factories:capitals": 1.0, "factories:halves": 0.0}, "step_weight": 1.0},
    ],
)
def test_a_run_that_is_cut_off_anywhere_ends_the_same(settings, tmp_path, monkeypatch, changes):
    config = GRPOConfig(**{**settings, **changes})
    moments = Moments(
        monkeypatch,
        *((grpo, "learn"), (adapters, "save"), (checkpoints, "save")),
        *((run_folder.RunFolder, "log"), (run_folder.RunFolder, "conclude")),
    )
    grpo.train(config, tmp_path / "whole")
    expected = outcome(tmp_path / "whole")
    assert expected[3]["steps"] == 4 and len(expected[1]) == 5
    # The last three: before the last checkpoint, before the end is written, and after it.
    moments.live(partial(grpo.train, config, tmp_path / "cut"), 1, 6, 23, 9, 15, 17, 2)
    assert moments.killed[-3:] == ["save", "conclude", "conclude"]
    assert_same_outcome(tmp_path / "cut", expected)


def command_of(settings, folder, rewards):
    """Write settings and a reward as files; return the words of the command."""
    (folder / "own_reward.py").write_text(rewards)
    own = {**settings, "num_steps": 6, "save_every": 1, "rewards": {"own_reward:digits": 1.0}}
    (folder / "grpo.yaml").write_text(json.dumps(own))  # JSON is YAML
    return "grpo", folder / "grpo.yaml"


DIGITS = "def digits(completions): return [sum(c.isdigit() for c in text) / 6 for text in completions]\n"


def test_kill_9_at_random_moments(settings, tmp_path):
    command = command_of(settings, tmp_path, DIGITS)
    whole = killing.watched(command, tmp_path / "whole", cwd=tmp_path)
    expected = outcome(tmp_path / "whole")
    assert expected[3]["steps"] == 6 and len({row["reward/mean"] for row in expected[1] if "reward/mean" in row}) > 1
    runs, lines = killing.kill_again_and_again(command, tmp_path / "run", whole, seed=0, cwd=tmp_path)
    assert len(lines) == killing.KILLS
    for out in runs:
        assert_same_outcome(out, expected)
        for file in ("adapter/adapters.safetensors", "samples.jsonl"):
            assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    print(f"{len(lines)} kills in {len(runs)} runs, after these lines of metrics: {lines}")


def test_a_run_is_not_resumed_with_another_reward(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    own = {**settings, "num_steps": 1, "evaluate": None, "rewards": {"own_reward:digits": 1.0}}
    config = GRPOConfig(**own)
    for content, fault in ((DIGITS, None), (DIGITS.replace("6", "5"), "reward own_reward:digits was "), (DIGITS, None)):
        (tmp_path / "own_reward.py").write_text(content)
        monkeypatch.delitem(sys.modules, "own_reward", raising=False)
        importlib.invalidate_caches()
        with pytest.raises(UserError, match=fault) if fault else nullcontext():
            grpo.train(config, tmp_path / "run", resume=True)
    identity = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert identity["reward own_reward:digits"].startswith("own_reward.py ")


def test_equal_rewards_leave_every_weight_as_it_was(settings, tmp_path):
    config = GRPOConfig(**{**settings, "rewards": {"factories:level": 1.0}, "max_resamples": 1, "num_steps": 2})
    grpo.train(config, tmp_path / "run")
    model = loading.load(config.model, device="cpu").model
    mx.random.seed(config.seed)
    adapters.start(model, config)
    trained = mx.load(str(tmp_path / "run" / "checkpoint.safetensors"))
    for name, array in tree_flatten(model.trainable_parameters()):
        assert mx.array_equal(array, trained[checkpoints.WEIGHTS + name]), name
    rows = outcome(tmp_path / "run")[1]
    assert [row["optim/updates"] for row in rows[1:]] == [0, 0]
    assert all(row["rollout/zero_std_groups"] == 1 and row["rollout/groups"] == 6 for row in rows[1:])


def test_it_learns_and_says_what_it_did(settings, tmp_path):
    changes = {"num_steps": 12, "prompts_per_step": 4, "group_size": 8, "learning_rate": 0.03, "eval_every": 100}
    config = GRPOConfig(**{**settings, **changes})
    result = grpo.train(config, tmp_path / "run")
    _, metrics, samples, _ = outcome(tmp_path / "run")
    rewards_ = [row["reward/mean"] for row in metrics if "reward/mean" in row]
    assert np.mean(rewards_[-5:]) > np.mean(rewards_[:5]) + 0.2
    names = {
        *("reward/mean", "reward/factories:capitals", "rollout/length", "rollout/finished", "rollout/zero_std_groups"),
        *("policy/kl_sampler", "policy/entropy", "policy/clip_fraction", "optim/grad_norm", "optim/lr"),
    }
    assert all(names <= row.keys() for row in metrics if "reward/mean" in row)
    assert all(abs(row["policy/kl_sampler"]) < 1e-6 for row in metrics if "reward/mean" in row)
    for step in (1, 12):
        shown = {
            row["kind"]: row for row in samples if row["step"] == step and "kind" in row and row["kind"] != "held out"
        }
        assert shown.keys() == {"best", "worst", "random"}
        assert shown["best"]["reward"] >= shown["random"]["reward"] >= shown["worst"]["reward"]
        assert shown["best"]["rewards"] == {"factories:capitals": shown["best"]["reward"]}
    assert result.steps == 12 and result.sample_seconds > 0 and result.update_seconds > 0
    written = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert written["trained_by"] == "mlx-traces grpo" and written["lora_parameters"]["rank"] == 4


def test_the_best_adapter_is_kept_and_training_stops_early(settings, tmp_path, monkeypatch):
    values = iter((0.2, 0.5, 0.5, 0.4, 0.9))
    saved = []
    monkeypatch.setattr(loop, "answer", lambda *_: ({"valid/accuracy": next(values)}, []))
    monkeypatch.setattr(loop, "keep", lambda *_: saved.append(1))
    config = GRPOConfig(**{**settings, "num_steps": 20, "patience": 2})
    result = grpo.train(config, tmp_path / "run")
    assert (result.best_step, result.accuracy, result.accuracy_before, result.steps) == (2, 0.5, 0.2, 6)
    assert result.stopped == "patience"
    assert len(saved) == 2


@pytest.mark.parametrize(
    ("recipe", "cut_off_in"),
    [((grpo, GRPOConfig), "keeping it"), ((ppo, PPOConfig), "the next step")],
    ids=["grpo", "ppo"],
)
def test_a_best_adapter_that_is_found_between_checkpoints_outlives_a_cut(
    settings, tmp_path, monkeypatch, recipe, cut_off_in
):
    """What comes after a resume may be worse than what the discarded steps found, if a reward is not exact."""
    (module, kind), out = recipe, tmp_path / "run"
    config, calls = kind(**{**settings, "eval_every": 1}), []
    values = iter((0.1, 0.2, 0.3, 0.9, 0.0, 0.0))
    monkeypatch.setattr(loop, "answer", lambda *_: ({"valid/accuracy": next(values)}, []))
    owner, name = (module, "learn") if cut_off_in == "the next step" else (loop, "keep")
    whole = getattr(owner, name)

    def cut(*args):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return whole(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, cut)
        module.train(config, out)
    weights = {
        name.removeprefix(checkpoints.WEIGHTS).removeprefix("policy."): array
        for name, array in mx.load(str(out / "checkpoint.safetensors")).items()
    }
    result = module.train(config, out, resume=True)
    assert (result.steps, result.best_step, result.accuracy) == (4, 3, 0.9)
    assert "at step 3, the one that was kept" in (out / "adapter" / "README.md").read_text()
    kept = mx.load(str(out / "adapter" / "adapters.safetensors"))
    assert all(mx.array_equal(array, weights[name]) for name, array in kept.items())


@pytest.mark.parametrize(("prompt", "strict"), [("boxed", 0.25), ("plain", None)])
def test_a_validation_tells_of_the_form_beside_the_accuracy(tiny, monkeypatch, prompt, strict):
    texts = [r"So \boxed{4}.", "It isboxed{4}.", "4", r"\boxed{5}"]
    problems = [Problem(f"p{i}", {"question": "2+2", "answer": "4"}, "4") for i in range(4)]
    task = get_task("gsm8k")
    planned = evaluator.Plan(EvalConfig(), task, task.prompts[prompt], "tolerant", problems)

    def measured(_, planned):
        said = [Completion.sampled("", "", Sampled((1,), (2, 3), text, "stop")) for text in texts]
        return [evaluator.grade_sample(planned, *pair, one) for *pair, one in zip(problems, [0] * 4, said, strict=True)]

    monkeypatch.setattr(loop.local, "measure", measured)
    row, _ = loop.answer(tiny, planned)
    assert row["valid/accuracy"] == 0.75 and row.get("valid/accuracy_strict") == strict


def test_resampling_looks_for_groups_that_differ(settings, tmp_path):
    config = GRPOConfig(**{**settings, "max_resamples": 3})
    planned, _, _ = rollouts.prepare(config)
    loaded = wrap(make_tokenizer(), make_model())
    asked = []

    def seldom(completions, question):
        asked.append(len(completions))
        return [float(i % 4 == 0 and text.startswith("0")) for i, text in enumerate(question)]

    weights = {"x:y": 1.0}
    config = config.model_copy(update={"rewards": weights})
    progress = rollouts.Progress()
    groups, kept, _ = rollouts.collect(loaded, planned, {"x:y": seldom}, progress, 1, config, config.max_resamples)
    assert progress.drawn == len(groups) == sum(asked) // 4 > 3 and asked[0] == 12
    assert len(kept) <= 3 and all(rollouts.informative(group) for group in kept)
    assert [rollouts.informative(group) for group in groups].count(True) == len(kept)
    # One problem over and over: other random numbers for every rollout of the step.
    alone = replace(
        planned, problems=planned.problems[:1], config=planned.config.model_copy(update={"temperature": 9.0})
    )
    groups, _, _ = rollouts.collect(loaded, alone, {"x:y": level}, progress, 2, config, config.max_resamples)
    assert len({rollout.ids for group in groups for rollout in group}) == 4 * 3 * 4


def test_difficulty_is_measured_once(settings, tmp_path, monkeypatch):
    def easy_first(planned, pairs, *_):  # the first problem is always solved, the others half of the time
        return [{"correct": float(problem.id == pairs[0][0].id or i % 2)} for i, (problem, _) in enumerate(pairs)]

    monkeypatch.setattr(rewards, "score", easy_first)
    config = GRPOConfig(**{**settings, "pass_rate_high": 0.8})
    planned, _, _ = rollouts.prepare(config)
    loaded = wrap(make_tokenizer(), make_model())
    kept, notes = rollouts.by_difficulty(loaded, planned, config, tmp_path / "rates.json")
    assert [p.id for p in kept.problems] == [p.id for p in planned.problems[1:]]
    assert notes == ["1 of 7 problems are too easy or too hard"]
    monkeypatch.setattr(rollouts, "sample", None)
    assert rollouts.by_difficulty(loaded, planned, config, tmp_path / "rates.json")[0] == kept
    narrow = config.model_copy(update={"pass_rate_low": 0.6, "pass_rate_high": 0.7})
    with pytest.raises(UserError, match="no problem has a pass rate from 0.6 to 0.7"):
        rollouts.by_difficulty(loaded, planned, narrow, tmp_path / "rates.json")


@pytest.mark.parametrize(
    ("changes", "finished"), [({"overlong_tokens": 2}, -1), ({"overlong_tokens": 0}, 0), ({"think_tokens": 200}, 0)]
)
def test_a_completion_that_was_cut_off_has_the_whole_penalty(changes, finished):
    config = settings_of(overlong="penalty", rewards={"correct": 1.0}, **changes)
    ended = [made(1.0, range(12), finish).completion for finish in ("length", "stop")]
    assert rollouts.totals_of([{"correct": 1.0}, {"correct": 1.0}], ended, config) == [0, 1 + finished]


def test_overlong_completions_cost():
    config = settings_of(overlong="penalty", overlong_tokens=4, max_tokens=12, group_size=2, rewards={"correct": 1.0})
    task = evaluator.get_task("countdown")
    planned = evaluator.Plan(build(EvalConfig, {"max_tokens": 12}), task, task.prompts["thinking"], "answer", [])
    problem = task.parse({"nums": [1, 2], "target": 3}, "")
    group = [made(0, range(n)).completion for n in (8, 10)]
    ((short, long),) = rollouts.scored(wrap(make_tokenizer()), planned, [problem], [group], {}, config)
    assert (short.reward, long.reward) == (0, -0.5) and long.parts["overlong"] == -0.5


# ---------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rewards": {"factories:no_number": 1}},
            "reward factories:no_number returned 'nan', not a finite number or None",
        ),
        ({"rewards": {"corect": 1}}, "unknown reward 'corect': .*did you mean 'correct'"),
        ({"rewards": {}}, "rewards: none has a weight"),
        ({"max_tokens": 600}, r"problem qa-\w+: its prompt has \d+ tokens; 600 more exceed the model's context of 512"),
        ({"data": None}, "task qa has no questions of its own"),
        ({"task": "countdown", "data": None, "split": "training"}, "unknown split 'training'"),
        ({"limit": 8}, "--limit 8 is more than .* has: 7 problems"),
    ],
)
def test_wrong_input(settings, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        grpo.train(GRPOConfig(**{**settings, **changes}), tmp_path / "run")


def test_a_group_needs_two():
    with pytest.raises(UserError, match="group_size: must be at least 2, not '1'"):
        build(GRPOConfig, {"group_size": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "bnpo"}, "loss: bnpo equals dapo .*; set dapo$"),
        ({"advantage": "mean", "max_resamples": 2}, "max_resamples: with advantage mean, .*; leave max_resamples out"),
        ({"reference": "base"}, "reference: has no effect without kl_coef; set that too, or leave this out$"),
        ({"reference": "x", "kl_coef": 0}, "reference: has no effect without kl_coef"),
        ({"unbiased_kl": True}, "unbiased_kl: has no effect without kl_coef"),
        (
            {"pass_rate_low": 0.9, "pass_rate_high": 0.1},
            r"pass_rate_high: 0.1 is below pass_rate_low \(0.9\), so no problem would be left; raise it$",
        ),
    ],
)
def test_settings_without_effect_are_refused(changes, message):
    with pytest.raises(UserError, match=f"^my.yaml: {message}"):
        build(GRPOConfig, changes, "my.yaml")
    if "reference" in changes:
        with pytest.raises(UserError, match=f"^{message}"):
            build(PPOConfig, changes)
    build(GRPOConfig, {"kl_coef": 0.1, "reference": "base", "unbiased_kl": True})


def test_validation_asks_as_the_training_does(settings, tmp_path, monkeypatch):
    seen, render = set(), loading.LoadedModel.render

    def rendered(self, prompt, problem, thinking=None):
        seen.add((problem.gold == "21", thinking))
        return render(self, prompt, problem, thinking)

    monkeypatch.setattr(loading.LoadedModel, "render", rendered)
    own = {**settings, "num_steps": 1}
    for training_, validation, expected in (
        (None, None, {(False, None), (True, None)}),
        (False, None, {(False, False), (True, False)}),
        (False, True, {(False, False), (True, True)}),
    ):
        seen.clear()
        evaluate = {**settings["evaluate"], "thinking": validation}
        config = GRPOConfig(**{**own, "thinking": training_, "evaluate": evaluate})
        grpo.train(config, tmp_path / f"{training_} {validation}")
        assert seen == expected
    # What began without the setting is continued; what was validated otherwise is not.
    identity = json.loads((tmp_path / "None None" / "run.json").read_text())["identity"]
    assert "thinking" not in identity["evaluate"]
    file = tmp_path / "False None" / "run.json"
    begun = json.loads(file.read_text())
    del begun["identity"]["evaluate"]["thinking"]
    file.write_text(json.dumps(begun))
    with pytest.raises(UserError, match=r"other settings \(evaluate.thinking was None, now False\)"):
        grpo.train(GRPOConfig(**{**own, "thinking": False}), tmp_path / "False None", resume=True)


def test_the_memory_limit_holds_in_validations_too(settings):
    for kind in (GRPOConfig, PPOConfig):
        planned, held_out, _ = rollouts.prepare(kind(**settings, memory_limit=0.5))
        assert planned.config.memory_limit == held_out.config.memory_limit == 0.5
    assert rollouts.prepare(GRPOConfig(**settings))[1].config.memory_limit is None


def test_a_validation_problem_is_left_out_by_its_twin_too(settings, monkeypatch):
    config = GRPOConfig(**settings)
    planned, held_out, _ = rollouts.prepare(config)
    twin = replace(held_out, problems=[replace(planned.problems[0], id=planned.problems[0].id + "#2")])
    monkeypatch.setattr(loop, "held_out_plan", lambda *_: twin)
    assert {p.id for p in rollouts.prepare(config)[0].problems} == {p.id for p in planned.problems[1:]}


def test_the_same_question_in_other_words_of_space_and_case_is_a_validation_problem(settings, tmp_path):
    question = "How many apples are left if THREE of seven are eaten?"
    other, file = tmp_path / "other.jsonl", tmp_path / "problems.jsonl"
    other.write_text(json.dumps({"question": question, "answer": "4"}) + "\n")
    again = f" {question.lower()}\n"
    file.write_text("".join(json.dumps({"question": text, "answer": "4"}) + "\n" for text in (again, "1+3")))
    evaluate = {**settings["evaluate"], "data": str(other), "split": "valid", "limit": 1}
    planned, _, notes = rollouts.prepare(GRPOConfig(**{**settings, "limit": 2, "evaluate": evaluate}))
    assert [problem.columns["question"] for problem in planned.problems] == ["1+3"]
    assert notes == [
        f"{other} has no splits: 'valid' is all of it; a part is 'valid[:100]'",
        "1 training problems are validation problems and are left out",
    ]
    assert evaluator.split_notes(GRPOConfig(data=str(other))) == []  # not asked for by name
    assert evaluator.split_notes(GRPOConfig(data=str(other), split="train[:1]")) == []
    assert evaluator.split_notes(GRPOConfig(data="owner/name", split="train")) == []


def test_validation_problems_are_not_trained_on(settings, tmp_path):
    evaluate = {**settings["evaluate"], "data": settings["data"], "limit": 2}
    planned, held_out, notes = rollouts.prepare(GRPOConfig(**{**settings, "evaluate": evaluate}))
    assert len(planned.problems) == 5 and notes == ["2 training problems are validation problems and are left out"]
    assert not {p.id for p in planned.problems} & {p.id for p in held_out.problems}
    with pytest.raises(UserError, match="all its problems are validation problems"):
        rollouts.prepare(GRPOConfig(**{**settings, "evaluate": {**evaluate, "limit": 7}}))


def test_fewer_problems_than_draws(settings):
    planned, _, _ = rollouts.prepare(GRPOConfig(**{**settings, "limit": None, "num_steps": 50}))
    assert len(planned.problems) == 7
    countdown = {"task": "countdown", "data": None, "limit": None, "num_steps": 50, "evaluate": None}
    for kind, changes, count in ((GRPOConfig, {}, 150), (GRPOConfig, {"max_resamples": 2}, 450), (PPOConfig, {}, 150)):
        planned, _, _ = rollouts.prepare(kind(**{**settings, **countdown, **changes}))
        assert len({p.id for p in planned.problems}) == count  # no problem is drawn twice


def test_an_adapter_of_another_model(settings, tmp_path):
    model = make_model(hidden_size=32)
    adapters.save(model, tmp_path / "adapter", adapters.start(model, AdapterConfig(rank=4)))
    with pytest.raises(UserError, match="the adapter does not fit this model"):
        grpo.train(GRPOConfig(**{**settings, "adapter": str(tmp_path / "adapter")}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["loss", "norm"])
def test_numbers_that_are_none_stop_and_overwrite_nothing(settings, whole, tmp_path, monkeypatch, where):
    sound, clip, calls = grpo.gradient, optimizer.clip, []

    def gradient(*args):
        calls.append(1)
        loss, grads, sums = sound(*args)
        return float("inf") if where == "loss" and len(calls) == 3 else loss, grads, sums

    def clipped(grads, most):
        grads, norm = clip(grads, most)
        return grads, norm * float("nan") if where == "norm" and len(calls) == 3 else norm

    monkeypatch.setattr(grpo, "gradient", gradient)
    monkeypatch.setattr(optimizer, "clip", clipped)
    config = GRPOConfig(**settings)
    with pytest.raises(UserError, match=r"step 3: the loss is .*Lower learning_rate \(0.01\) or max_grad_norm"):
        grpo.train(config, tmp_path / "run")
    state = json.loads(mx.load(str(tmp_path / "run" / "checkpoint.safetensors"), return_metadata=True)[1]["state"])
    assert state["step"] == 2 and state["drawn"] == 6
    monkeypatch.undo()
    grpo.train(config, tmp_path / "run", resume=True)
    assert_same_outcome(tmp_path / "run", whole)


def test_a_run_is_continued_by_its_own_settings_only(settings, tmp_path):
    config = GRPOConfig(**{**settings, "num_steps": 1, "evaluate": None})
    grpo.train(config, tmp_path / "run")
    with pytest.raises(UserError, match="exists; pass --resume"):
        grpo.train(config, tmp_path / "run")
    with pytest.raises(UserError, match="started with other settings .*group_size was 4, now 3"):
        grpo.train(config.model_copy(update={"group_size": 3}), tmp_path / "run", resume=True)
    # The last adapter is kept where nothing is validated.
    assert (tmp_path / "run" / "adapter" / "adapters.safetensors").exists()


def generated(completions):
    for text in completions:
        yield float(text)


def endless(completions):
    return [10**400] * len(completions)


def leaving(completions):
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("name", "said"), [("generated", "failed"), ("endless", "not a finite number"), ("leaving", "failed")]
)
def test_rewards_that_go_wrong_are_one_line(settings, tmp_path, name, said):
    with pytest.raises(UserError, match=f"reward {__name__}:{name} .*{said}"):
        grpo.train(GRPOConfig(**{**settings, "rewards": {f"{__name__}:{name}": 1}}), tmp_path / "run")


def test_a_policy_that_breaks_is_noticed_before_anything_is_saved(settings, tmp_path):
    config = GRPOConfig(**{**settings, "learning_rate": 1e30, "warmup": 0, "rewards": {"factories:capitals": 1}})
    with pytest.raises(UserError, match=r"step 1: the model's outputs are no longer finite numbers.*learning_rate"):
        grpo.train(config, tmp_path / "run")
    assert not (tmp_path / "run/checkpoint.safetensors").exists()


def test_nothing_to_learn_from_is_said(settings, tmp_path):
    config = GRPOConfig(**{**settings, "rewards": {"factories:level": 1}, "evaluate": None})
    assert any(
        "nothing" in note or "no step had anything" in note for note in grpo.train(config, tmp_path / "run").notes
    )


def test_two_adapters_are_refused(settings, tmp_path):
    config = GRPOConfig(**{**settings, "model": settings["model"] + "+some", "adapter": "other"})
    with pytest.raises(UserError, match="two adapters, some and other: give one"):
        grpo.train(config, tmp_path / "run")


def test_problems_come_in_place_of_those_that_are_held_out(settings):
    asked = {"task": "countdown", "data": None, "limit": None, "num_steps": 2, "prompts_per_step": 2, "prompt": None}
    held_out = {"task": "countdown", "split": "train", "limit": 5}
    planned, plan, notes = rollouts.prepare(GRPOConfig(**{**settings, **asked, "evaluate": held_out}))
    assert len(planned.problems) == 4 and notes
    assert not {problem.id for problem in planned.problems} & {problem.id for problem in plan.problems}


def test_the_device_s_sizes_are_in_the_run_and_not_in_its_identity(tmp_path, monkeypatch):
    held_out = {"task": "countdown", "prompt": "direct", "limit": 2, "max_tokens": 4}
    settings = {"task": "countdown", "prompt": "direct", "num_steps": 1, "prompts_per_step": 2, "group_size": 2}
    settings |= {"max_tokens": 4, "rank": 2, "micro_tokens": 64, "save_every": 1, "evaluate": held_out}
    config = GRPOConfig(**settings)
    grpo.train(config, tmp_path / "small")
    monkeypatch.setattr(device, "sizes", lambda name, memory_gb: {"rows": 300, "micro_tokens": 2048, "logits_mb": 512})
    grpo.train(config, tmp_path / "large")
    small, large = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("small", "large"))
    assert small["identity"] == large["identity"] and large["identity"]["evaluate"]["rows"] == 64
    for about, rows, answered, logits in ((small, 256, 64, 128), (large, 300, 300, 512)):
        used = about["config"]
        assert (used["rows"], used["evaluate"]["rows"], used["logits_mb"]) == (rows, answered, logits)
        assert used["micro_tokens"] == 64  # as it was set
    grpo.train(config, tmp_path / "small", resume=True)  # and a run may go on elsewhere
    adapter = json.loads((tmp_path / "large" / "adapter" / "adapter_config.json").read_text())
    assert "rows" not in adapter["training"]
