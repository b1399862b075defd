"""Fine-tuning: the gradient of a step, runs that are cut off, input that is wrong."""

import json
import shutil
from contextlib import nullcontext
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from factories import CHATML, ONE, PROMPT, Killed, Moments, lora, make_model, make_tokenizer, wrap
from mlx.utils import tree_flatten
from stress import killing

from mlx_traces.config import AdapterConfig, GenerateConfig, OptimizerConfig, SFTConfig
from mlx_traces.engine import logprobs
from mlx_traces.engine.batching import Example
from mlx_traces.errors import UserError
from mlx_traces.models import adapters, loading
from mlx_traces.records import Problem, Trace
from mlx_traces.report import run_view, terminal
from mlx_traces.runtime import run_folder
from mlx_traces.tasks.prompts import Prompt
from mlx_traces.traces import encoding, generate
from mlx_traces.traces.files import manifest_of
from mlx_traces.train import checkpoints, loop, optimizer, sft
from mlx_traces.train.optimizer import make_optimizer, schedule

# ---------------------------------------------------------------------------------- a step


def rows(count=7, seed=0):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(2, 30, count).tolist()
    return [
        Example(f"r{i}", tuple(draw.integers(0, 98, n).tolist()), (*(draw.random(n - 1) < 0.6).tolist(), True))
        for i, n in enumerate(lengths)
    ]


def test_a_step_is_the_mean_over_its_tokens_however_it_is_split():
    model, batch = lora(), rows()
    halves = logprobs.split(model)
    whole, parts, single = (
        sft.step_gradient(model, halves, batch, SFTConfig(data="x", micro_tokens=n)) for n in (9999, 60, 1)
    )
    for loss, grads in (parts, single):
        assert loss == pytest.approx(whole[0], abs=1e-5)
        for (name, a), (_, b) in zip(tree_flatten(grads), tree_flatten(whole[1]), strict=True):
            assert mx.abs(a - b).max() <= 1e-5 * mx.abs(b).max(), name
    # The loss by a float64 softmax, one row and one token at a time.
    losses = []
    for row in batch:
        logits = np.array(model(mx.array([row.ids]))[0]).astype(np.float64)
        for at in range(1, len(row.ids)):
            if row.trained[at]:
                losses.append(np.log(np.exp(logits[at - 1]).sum()) - logits[at - 1][row.ids[at]])
    assert whole[0] == pytest.approx(np.mean(losses), abs=1e-4)
    assert sft.mean_loss(halves, batch, SFTConfig(data="x", micro_tokens=60)) == pytest.approx(
        np.mean(losses), abs=1e-4
    )


def test_learning_rate():
    config = OptimizerConfig(learning_rate=1.0, warmup=0.2, final_rate=0.1)
    rate = schedule(config, 21)
    rates = [rate(done).item() for done in range(21)]
    np.testing.assert_allclose(rates[:6], [0.2, 0.4, 0.6, 0.8, 1.0, 1.0], atol=1e-6)
    assert rates[-1] == pytest.approx(0.1) and rates[5:] == sorted(rates[5:], reverse=True)
    expected = [0.1 + 0.9 * (1 + np.cos(np.pi * (done - 5) / 15)) / 2 for done in range(5, 21)]
    np.testing.assert_allclose(rates[5:], expected, atol=1e-6)


def test_update_is_adamws():
    config = OptimizerConfig(
        learning_rate=0.1, warmup=0, final_rate=1, weight_decay=0.3, betas=(0.9, 0.98), max_grad_norm=2.0
    )
    made, weights = make_optimizer(config, 5), {"w": mx.array([1.0, -2.0])}
    expected, m, v = np.array([1.0, -2.0]), 0.0, 0.0
    for step, gradient in enumerate(([1.0, 0.5], [-3.0, 0.1], [0.2, 4.0]), 1):
        norm, update = made.propose(weights, {"w": mx.array(gradient)})
        update()
        assert norm == pytest.approx(np.linalg.norm(gradient))
        g = np.array(gradient) * min(1, 2 / np.linalg.norm(gradient))
        m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g**2
        expected = expected * (1 - 0.1 * 0.3)
        expected = expected - 0.1 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.98**step)) + 1e-8)
        np.testing.assert_allclose(np.array(weights["w"]), expected, rtol=1e-5)


# ---------------------------------------------------------------------------------- runs


def write_traces(path, count=24, per_problem=2, twins=False):
    draw = np.random.default_rng(7)
    lines = []
    for i in range(count):
        text = "".join(chr(c) for c in draw.integers(97, 110, draw.integers(2, 9)))
        name = f"p{i // per_problem}" + (f"#{i % per_problem + 1}" if twins and i % per_problem else "")
        asked = [{"role": "user", "content": f"1+{i // per_problem}"}]
        lines.append({"id": name, "messages": asked, "completion": text, "sample": i % per_problem})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def settings(model_folder, tmp_path):
    return settings_in(tmp_path, model_folder)


@pytest.fixture(scope="module")
def whole(model_folder, tmp_path_factory):
    """The outcome of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    sft.train(SFTConfig(**settings_in(folder, model_folder)), folder / "run")
    return outcome(folder / "run")


def settings_in(folder, model_folder):
    """Settings of a run of 8 steps, with dropout, a validation every 3 and a checkpoint every 2."""
    return {
        "model": str(model_folder),
        "data": write_traces(folder / "traces.jsonl"),
        "valid_share": 0.3,
        "dropout": 0.2,
        "rank": 4,
        "epochs": 2,
        "batch_size": 4,
        "micro_tokens": 100,
        "learning_rate": 0.01,
        "eval_every": 3,
        "save_every": 2,
        "device": "cpu",
    }


def outcome(out):
    """Return what must not depend on interruptions: weights, metrics, the result."""
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timeless = [
        {name: value for name, value in row.items() if name.startswith(("step", "loss", "valid", "optim", "tokens"))}
        for row in metrics
    ]
    for row in timeless:
        row.pop("tokens_per_second", None)
    result = json.loads((out / "result.json").read_text())
    return (
        {name: np.array(array) for name, array in mx.load(str(out / "adapter" / "adapters.safetensors")).items()},
        timeless,
        {name: result[name] for name in ("steps", "best_step", "valid_loss", "padding", "notes")},
    )


def assert_same_outcome(out, expected):
    weights, metrics, result = outcome(out)
    assert metrics == expected[1] and result == expected[2]
    assert weights.keys() == expected[0].keys()
    assert all(np.array_equal(weights[name], expected[0][name]) for name in weights)


def test_a_run_that_is_cut_off_anywhere_ends_the_same(settings, whole, tmp_path, monkeypatch):
    config = SFTConfig(**settings)
    moments = Moments(
        monkeypatch,
        *((sft, "step_gradient"), (adapters, "save"), (checkpoints, "save")),
        *((run_folder.RunFolder, "log"), (run_folder.RunFolder, "conclude")),
    )
    # The last three: before the last checkpoint's adapter, before the end is written, and after it.
    moments.live(partial(sft.train, config, tmp_path / "cut"), 2, 5, 23, 11, 26, 7, 19, 3, 4)
    assert moments.killed[-3:] == ["save", "conclude", "conclude"]
    assert whole[2]["steps"] == len(whole[1]) - 1 >= 8  # and the validation before the first step
    assert_same_outcome(tmp_path / "cut", whole)


KILL = """
import os, sys
import mlx_traces
import mlx.core as mx
from pathlib import Path
from mlx_traces.train import sft
from mlx_traces.config import SFTConfig

name, count = sys.argv[1], int(sys.argv[2])
owner, whole, calls = (mx, mx.save_safetensors, []) if name == "write" else (Path, Path.replace, [])

def killed(*args, **kwargs):
    calls.append(1)
    if len(calls) == count and name == "replace":
        os.kill(os.getpid(), 9)
    whole(*args, **kwargs)
    if len(calls) == count:
        if name == "write":  # a file that is half there
            os.truncate(args[0], os.path.getsize(args[0]) // 2)
        os.kill(os.getpid(), 9)

setattr(owner, whole.__name__, killed)
sft.train(SFTConfig.model_validate_json(sys.argv[3]), sys.argv[4])
"""


def test_kill_9(settings, whole, tmp_path):
    config = SFTConfig(**settings)
    moments = [("replace", 1), ("write", 3)]  # before run.json is there; in the middle of the second checkpoint
    started = [
        killing.start(name, count, config.model_dump_json(), tmp_path / name, code=KILL) for name, count in moments
    ]
    for (name, _), process in zip(moments, started, strict=True):
        _, said = process.communicate()
        assert process.returncode == -9, said
        out = tmp_path / name
        assert any(path.name.startswith(".") for path in out.rglob("*"))  # what a killed process leaves
        sft.train(config, out, resume=True)
        assert_same_outcome(out, whole)


def test_the_best_is_kept_and_training_stops_early(settings, tmp_path):
    changes = {"learning_rate": 0.2, "warmup": 0, "epochs": 9, "eval_every": 1, "patience": 2, "save_every": 99}
    config = SFTConfig(**{**settings, **changes})
    result = sft.train(config, tmp_path / "run")
    losses = {
        row["step"]: row["valid/loss"]
        for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if "valid/loss" in row
    }
    best = min(losses, key=losses.get)
    assert result.best_step == best and result.valid_loss == losses[best]
    assert max(losses) == result.steps == best + 2 < 9 * 4
    assert result.stopped == json.loads((tmp_path / "run" / "result.json").read_text())["stopped"] == "patience"
    state = terminal.state(run_view.read(tmp_path / "run"))
    assert state.startswith(f"stopped early by patience, step {result.steps} of ")
    # The adapter that was kept has this loss.
    loaded = loading.load(config.model, str(tmp_path / "run" / "adapter"), device="cpu")
    data = sft.prepare(loaded, config)
    assert sft.mean_loss(logprobs.split(loaded.model), data.valid, config) == pytest.approx(losses[best], abs=1e-5)
    before, learned = outcome(tmp_path / "run"), []
    again = sft.train(config, tmp_path / "run", resume=True, show=lambda *row: learned.append(row))
    assert not learned  # finished already: nothing changes
    assert_same_outcome(tmp_path / "run", before)
    assert (again.steps, again.best_step, again.valid_loss) == (result.steps, result.best_step, result.valid_loss)
    assert again.stopped == "patience"


def test_padding_is_that_of_the_steps_that_were_run():
    one, many = (SFTConfig(data="x", batch_size=2, epochs=epochs) for epochs in (1, 10**9))
    lengths = [3, 9, 4, 20]
    assert sft._padding(lengths, many, 2, "cpu") == sft._padding(lengths, one, 99, "cpu") > 0
    assert sft._padding(lengths, many, 3, "cpu") != sft._padding(lengths, one, 99, "cpu")


def test_the_adapter_is_that_of_the_best_step_after_a_cut_though_later_losses_differ(settings, tmp_path, monkeypatch):
    losses, saved, calls = iter((5.0, 4.0, 3.0, 9.0, 9.0)), adapters.save, []

    def cut(*args):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        saved(*args)

    monkeypatch.setattr(sft, "mean_loss", lambda *_: next(losses))
    config = SFTConfig(**{**settings, "eval_every": 1, "epochs": 1, "save_every": 50})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(adapters, "save", cut)
        sft.train(config, tmp_path / "run")
    weights = mx.load(str(tmp_path / "run" / "checkpoint.safetensors"))
    result = sft.train(config, tmp_path / "run", resume=True)
    assert (result.steps, result.best_step, result.valid_loss) == (4, 2, 3.0)
    assert "at step 2, the one that was kept" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    kept = mx.load(str(tmp_path / "run" / "adapter" / "adapters.safetensors"))
    assert all(mx.array_equal(array, weights[checkpoints.WEIGHTS + name]) for name, array in kept.items())


def test_logged_rates_are_those_of_the_steps(settings, tmp_path):
    config = SFTConfig(**{**settings, "warmup": 0.5, "valid_share": 0})
    result = sft.train(config, tmp_path / "run")
    assert result.stopped is None and terminal.state(run_view.read(tmp_path / "run")).startswith("finished, ")
    steps = result.steps
    rate = schedule(config, steps)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [row["optim/lr"] for row in rows if "optim/lr" in row]
    assert logged == pytest.approx([rate(step).item() for step in range(steps)])


def test_training_learns_and_checkpointed_layers_change_nothing(settings, tmp_path):
    losses = []
    for wanted in (False, True):
        config = SFTConfig(**{**settings, "dropout": 0, "checkpoint_layers": wanted, "epochs": 4, "eval_every": 99})
        result = sft.train(config, tmp_path / str(wanted))
        rows = outcome(tmp_path / str(wanted))[1]
        losses.append([row["loss"] for row in rows if "loss" in row])
        assert result.valid_loss < rows[0]["valid/loss"] - 1
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-4)


@pytest.mark.parametrize("layers", [False, True])
def test_problems_are_answered_at_validation(settings, tmp_path, layers):
    evaluate = {"task": "countdown", "limit": 3, "max_tokens": 8}
    config = SFTConfig(**{**settings, "evaluate": evaluate, "epochs": 1, "checkpoint_layers": layers})
    sft.train(config, tmp_path / "run")
    rows = [row for row in outcome(tmp_path / "run")[1] if "valid/loss" in row]
    assert all({"valid/accuracy", "valid/finished", "valid/length"} <= row.keys() for row in rows) and len(rows) > 2
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    ids = [[s["id"] for s in samples if s["step"] == row["step"]] for row in rows]
    assert ids[0] and all(each == ids[0] for each in ids)  # the same problems every time


def test_without_a_task_some_validation_traces_are_continued(settings, tmp_path):
    config = SFTConfig(**{**settings, "epochs": 1, "batch_size": 24})
    sft.train(config, tmp_path / "run")
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    first = [sample for sample in samples if sample["step"] == 0]
    assert first and {"id", "completion", "finish_reason", "trace"} <= first[0].keys()
    told = {(trace.id, trace.completion) for _, trace in sft.read_traces(Path(config.data))}
    assert all((sample["id"], sample["trace"].removesuffix("<|im_end|>")) in told for sample in first)


def test_full_and_dora_runs_are_loaded_again(settings, tmp_path):
    for kind in ("full", "dora"):
        config = SFTConfig(**{**settings, "kind": kind, "epochs": 1, "learning_rate": 0.001, "eval_every": 99})
        result = sft.train(config, tmp_path / kind)
        loaded = loading.load(config.model, result.adapter, device="cpu")
        data = sft.prepare(loaded, config)
        assert sft.mean_loss(logprobs.split(loaded.model), data.valid, config) == pytest.approx(
            result.valid_loss, abs=1e-5
        )


def test_a_loss_that_is_no_number_stops_and_overwrites_nothing(settings, whole, tmp_path, monkeypatch):
    sound, calls = sft.step_gradient, []

    def broken(model, halves, batch, config):
        calls.append(sorted({example.id for example in batch}))
        loss, grads = sound(model, halves, batch, config)
        return (float("nan"), grads) if len(calls) == 4 else (loss, grads)

    monkeypatch.setattr(sft, "step_gradient", broken)
    out = tmp_path / "run"
    with pytest.raises(UserError) as error:
        sft.train(SFTConfig(**settings), out)
    assert str(error.value).startswith("step 4: the loss is nan")
    assert str(error.value).endswith(": " + ", ".join(calls[3]))
    state = json.loads(mx.load(str(out / "checkpoint.safetensors"), return_metadata=True)[1]["state"])
    assert state["step"] == state["best_step"] == 3 and not (out / "result.json").exists()
    monkeypatch.setattr(sft, "step_gradient", sound)
    sft.train(SFTConfig(**settings), out, resume=True)
    assert_same_outcome(out, whole)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_gradients_and_validations_that_are_no_numbers(settings, tmp_path, monkeypatch, value):
    with monkeypatch.context() as patch:
        patch.setattr(optimizer, "clip", lambda grads, norm: (grads, mx.array(value)))
        with pytest.raises(UserError, match=f"step 1: .* gradient's norm {value}; nothing was overwritten"):
            sft.train(SFTConfig(**settings), tmp_path / "a")
    measure, calls = sft.mean_loss, []

    def broken(*args):
        calls.append(1)
        return value if len(calls) == 2 else measure(*args)

    monkeypatch.setattr(sft, "mean_loss", broken)
    with pytest.raises(UserError, match=f"step 3: the validation loss is {value}; nothing was overwritten"):
        sft.train(SFTConfig(**settings), tmp_path / "b")
    kept = mx.load(str(tmp_path / "b" / "adapter" / "adapters.safetensors"))
    assert not any(array.any() for name, array in kept.items() if name.endswith("lora_b"))  # still that of the start


@pytest.mark.parametrize("changes", [{"dtype": "float16", "learning_rate": 1.0}, {"learning_rate": 1e300}])
def test_a_model_that_breaks_is_noticed_before_anything_is_saved(settings, tmp_path, changes):
    changes |= {"warmup": 0, "final_rate": 1, "save_every": 1, "valid_share": 0}
    with pytest.raises(UserError, match=r"step \d: the model's outputs are no longer finite numbers; nothing was over"):
        sft.train(SFTConfig(**{**settings, **changes}), tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()
    if (checkpoint := tmp_path / "run" / "checkpoint.safetensors").exists():  # of the step before
        assert all(mx.isfinite(array).all() for array in mx.load(str(checkpoint)).values())


@pytest.mark.parametrize(
    ("logits", "fine"),
    [([0, -mx.inf], True), ([-mx.inf, -mx.inf], False), ([0, mx.inf], False), ([0, -mx.inf, mx.nan], False)],
)
def test_a_model_is_broken_if_its_outputs_are_no_distribution(logits, fine):
    """Tokens that do not exist have -inf in Phi-3 small."""
    loaded = SimpleNamespace(model=nn.Sequential(lambda ids: mx.array([[[0.0] * len(logits), logits]])))
    with nullcontext() if fine else pytest.raises(UserError, match="^step 3: the model's outputs are no longer finite"):
        loop._refuse_broken(loaded, 3, OptimizerConfig())


# ---------------------------------------------------------------------------------- data and wrong input


def test_the_thinking_switch_is_that_of_the_prompts(settings):
    closed = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    loaded = wrap(make_tokenizer(CHATML.replace("assistant\n{% endif %}", f"assistant\n{closed}{{% endif %}}")))
    for thinking, opened in ((None, ""), (True, ""), (False, "<think>\n\n</think>\n\n")):
        example = encoding.encode(loaded, Trace("t", tuple(ONE), "2"), encoding.turn_end(loaded), thinking)
        assert loaded.tokenizer.decode(example.ids) == f"{PROMPT}{opened}2<|im_end|>" and example.count == 2
        rows = sft.prepare(loaded, SFTConfig(**settings, thinking=thinking)).train
        assert all(opened in loaded.tokenizer.decode(row.ids) for row in rows)
    evaluate = {"task": "countdown", "limit": 3}
    for own, expected in ((None, False), (True, True)):
        config = SFTConfig(**settings, thinking=False, evaluate={**evaluate, "thinking": own})
        assert sft.prepare(loaded, config).held_out.config.thinking is expected


@pytest.mark.parametrize(
    ("made", "validation", "expected"),
    [
        ([False], None, False),
        ([True], None, True),
        ([None], None, None),
        ([False, True], None, None),
        ([False], True, True),
    ],
)
def test_validation_asks_as_the_traces_were_made(settings, made, validation, expected):
    lines = Path(settings["data"]).read_text().splitlines()
    own = [json.loads(line) | {"thinking": made[i % len(made)]} for i, line in enumerate(lines)]
    Path(settings["data"]).write_text("".join(json.dumps(line) + "\n" for line in own))
    loaded = wrap(make_tokenizer(CHATML.replace("assistant\n", "assistant\n{% if enable_thinking %}{% endif %}")))
    config = SFTConfig(**settings, evaluate={"task": "countdown", "limit": 3, "thinking": validation})
    data = sft.prepare(loaded, config)
    assert data.held_out.config.thinking is expected
    assert sft.identity_of(config, loaded, data)["evaluate"].get("thinking") is expected  # a run is continued with it


def test_validation_keeps_a_problems_traces_together(settings, tmp_path):
    loaded = wrap(make_tokenizer(), make_model())
    parts = {}
    for seed in (0, 1):
        data = sft.prepare(loaded, SFTConfig(**{**settings, "seed": seed}))
        train, valid = ({row.id for row in part} for part in (data.train, data.valid))
        assert train and valid and not train & valid and len(train | valid) == 12
        assert len(data.train) + len(data.valid) == 24
        parts[seed] = valid
    assert parts[0] != parts[1]
    assert not sft.prepare(loaded, SFTConfig(**{**settings, "valid_share": 0})).valid
    other = write_traces(tmp_path / "valid.jsonl", 4)
    data = sft.prepare(loaded, SFTConfig(**{**settings, "valid": other}))
    assert {row.id for row in data.valid} == {"p0", "p1"} and len(data.train) == 20
    assert data.notes == [f"4 traces of problems in {other} are left out"]


def test_a_share_that_keeps_nothing_apart_is_told(settings, tmp_path):
    """Ids with a # are of one problem by what stands before it, which ids of another origin may all share."""
    loaded, file = wrap(make_tokenizer(), make_model()), tmp_path / "other.jsonl"
    lines = [{"id": f"book#{i}", "messages": ONE, "completion": "x", "sample": 0} for i in range(9)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = sft.prepare(loaded, SFTConfig(**{**settings, "data": str(file)}))
    assert len(data.train) == 9 and not data.valid
    assert data.notes == ["no validation loss: valid_share 0.3 keeps none of 1 problems apart"]
    assert not sft.prepare(loaded, SFTConfig(**{**settings, "valid_share": 0})).notes


def test_a_problem_is_held_out_with_its_twins(settings, tmp_path, monkeypatch):
    loaded = wrap(make_tokenizer(), make_model())
    plain = sft.prepare(loaded, SFTConfig(**settings))
    twins = write_traces(tmp_path / "twins.jsonl", twins=True)
    config = SFTConfig(**{**settings, "data": twins})
    data = sft.prepare(loaded, config)
    for part, own in ((data.train, plain.train), (data.valid, plain.valid)):
        assert [row.ids for row in part] == [row.ids for row in own]  # parted as if they had one id
    assert any("#2" in row.id for row in data.valid)
    other = write_traces(tmp_path / "valid.jsonl", 4)
    data = sft.prepare(loaded, config.model_copy(update={"valid": other}))
    assert len(data.train) == 20 and data.notes == [f"4 traces of problems in {other} are left out"]
    asked = SimpleNamespace(
        problems=[Problem(name, {"question": name}, "") for name in ("p3", "p5#2")],
        prompt=Prompt("own", "{question}"),
        config=SimpleNamespace(thinking=True),
    )
    monkeypatch.setattr(loop, "held_out_plan", lambda *_: asked)
    data = sft.prepare(loaded, config.model_copy(update={"valid_share": 0.0}))
    assert len(data.train) == 20 and not {row.id for row in data.train} & {"p3", "p3#2", "p5", "p5#2"}


def test_a_run_whose_twins_were_parted_otherwise_is_not_continued(settings, tmp_path):
    short = {"epochs": 1, "batch_size": 24}
    config = SFTConfig(**{**settings, **short, "data": write_traces(tmp_path / "twins.jsonl", twins=True)})
    sft.train(config, tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    begun = json.loads(file.read_text())
    del begun["identity"]["apart"]
    file.write_text(json.dumps(begun))
    with pytest.raises(UserError, match="other settings .apart was None, now by problem"):
        sft.train(config, tmp_path / "run", resume=True)
    sft.train(SFTConfig(**{**settings, **short}), tmp_path / "plain")
    assert "apart" not in json.loads((tmp_path / "plain" / "run.json").read_text())["identity"]


def test_validation_traces_without_room_are_not_continued(settings, tmp_path):
    chat = [*ONE, {"role": "assistant", "content": "2"}, {"role": "user", "content": "z" * 90}]
    traces = [
        {"id": "cut", "messages": chat, "completion": "y"},  # cut in its last question, after a learned turn
        {"id": "long", "messages": [{"role": "user", "content": "z" * 600}], "completion": "y"},  # of a context of 512
        {"id": "fits", "messages": ONE, "completion": "some words"},
    ]
    valid = tmp_path / "valid.jsonl"
    for max_length, names, count in ((120, ("cut", "fits"), 1), (700, ("long", "fits"), 1), (700, ("fits",), 0)):
        valid.write_text("".join(json.dumps(row) + "\n" for row in traces if row["id"] in names))
        changes = {"valid": str(valid), "max_length": max_length, "over_long": "cut", "epochs": 1, "batch_size": 24}
        result = sft.train(SFTConfig(**{**settings, **changes}), tmp_path / f"{count} {names[0]}")
        told = [note for note in result.notes if "no room" in note]
        said = f"{count} validation traces have no room for an answer; their loss counts, but they are not completed"
        assert told == [said] * bool(count)
        samples = (tmp_path / f"{count} {names[0]}" / "samples.jsonl").read_text().splitlines()
        assert samples and {json.loads(line)["id"] for line in samples} == {"fits"}


def test_a_trace_of_a_validation_problem_is_known_by_what_it_was_asked(settings, tmp_path):
    """Traces that were brought in without a task have ids of their own."""
    question = "How many apples are left if three of seven are eaten?"
    (tmp_path / "held.jsonl").write_text(json.dumps({"question": question, "answer": "4"}) + "\n")
    rows = [
        {"id": f"trace-{i}", "messages": [{"role": "user", "content": text}], "completion": "4"}
        for i, text in enumerate((f"{question}\n\nThink first.", "1+3"))
    ]
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"data": str(tmp_path / "traces.jsonl"), "valid_share": 0}
    evaluate = {"task": "qa", "data": str(tmp_path / "held.jsonl"), "limit": 1}
    loaded = wrap(make_tokenizer(), make_model())
    data = sft.prepare(loaded, SFTConfig(**{**settings, **own, "evaluate": evaluate}))
    assert [row.id for row in data.train] == ["trace-1"]
    assert data.notes == ["1 traces of validation problems are left out"]


def test_a_problem_under_several_ids_is_on_one_side_of_the_split(settings, tmp_path):
    """The question under two ids, with other spaces and case; and a chat of it, without its question."""
    loaded = wrap(make_tokenizer(), make_model())
    rows = [
        {"id": f"{kind}-{i}", "messages": [{"role": "user", "content": text}], "completion": "4", "columns": columns}
        for i in range(9)
        for kind, text, columns in (
            ("a", f"What is 1+{i}?", {"question": f"1 + {i}"}),
            ("b", f"Think. 1+{i}", {"question": f" 1 +  {i}"}),
            ("c", f"what is\n1+{i}?", {}),
        )
    ]
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SFTConfig(**{**settings, "data": str(tmp_path / "traces.jsonl")})
    data = sft.prepare(loaded, config)
    sides = [{row.id[2:] for row in part} for part in (data.train, data.valid)]
    assert all(sides) and not sides[0] & sides[1] and len(data.train) + len(data.valid) == 27
    assert sft.identity_of(config, loaded, data)["apart"] == "by content"
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (rows[1], rows[5])))
    valid = str(tmp_path / "valid.jsonl")
    data = sft.prepare(loaded, config.model_copy(update={"valid": valid}))
    assert len(data.valid) == 2 and {row.id[2:] for row in data.train} == set("2345678")
    assert data.notes == [f"6 traces of problems in {valid} are left out"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "a", "messages": [], "completion": "x"}\n{"id": \n', r"bad.jsonl:2: not JSON"),
        ('\n{"id": "a", "completion": "x"}\n', r"bad.jsonl:2: 'messages' is missing; this row has id, completion"),
        ('{"id": "a", "messages": [], "completion": ""}', r"bad.jsonl:1: 'completion' is empty"),
        ('{"id": "a", "messages": "hi", "completion": "x"}', r"bad.jsonl:1: 'messages' must be a list"),
        ("", r"bad.jsonl: no traces to train on$"),
        (json.dumps({"id": "a", "messages": [], "completion": "x" * 3000}), r"no traces to train on \(1 traces have"),
    ],
)
def test_bad_traces(settings, tmp_path, content, message):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(content)
    with pytest.raises(UserError, match=message):
        sft.train(SFTConfig(**{**settings, "data": str(bad)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_runs(settings, tmp_path):
    out = tmp_path / "run"
    config = SFTConfig(**{**settings, "epochs": 1, "batch_size": 24})
    sft.train(config, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="exists; pass --resume"):
        sft.train(config, out)
    with pytest.raises(UserError, match="started with other settings .*learning_rate was 0.01, now 0.1"):
        sft.train(config.model_copy(update={"learning_rate": 0.1}), out, resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (out / "checkpoint.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="checkpoint.safetensors: not a checkpoint"):
        sft.train(config, out, resume=True)
    Path(config.data).write_text(Path(config.data).read_text() + Path(config.data).read_text())
    with pytest.raises(UserError, match="other settings .*data_files"):
        sft.train(config, out, resume=True)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(UserError, match="empty.jsonl: no traces to validate with"):
        sft.train(config.model_copy(update={"valid": str(empty)}), tmp_path / "other")


def test_an_adapter_of_another_model(settings, tmp_path):
    model = make_model(hidden_size=32)
    started = adapters.start(model, AdapterConfig(rank=4))
    adapters.save(model, tmp_path / "adapter", started)
    config = SFTConfig(**{**settings, "adapter": str(tmp_path / "adapter")})
    with pytest.raises(UserError, match="the adapter does not fit this model"):
        sft.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_training_goes_on_from_an_adapter(settings, tmp_path):
    settings["eval_every"] = 99
    first = sft.train(SFTConfig(**{**settings, "dropout": 0.2}), tmp_path / "first")
    further = {name: value for name, value in settings.items() if name not in ("dropout", "rank")}
    second = sft.train(SFTConfig(**{**further, "adapter": first.adapter}), tmp_path / "second")
    start = outcome(tmp_path / "second")[1][0]["valid/loss"]
    assert start == pytest.approx(first.valid_loss, abs=1e-5) and second.valid_loss < start
    config = json.loads((tmp_path / "second" / "adapter" / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {"rank": 4, "scale": 2.0, "dropout": 0.2}


# ---------------------------------------------------------------------------------- the day of a run


def test_a_run_keeps_its_day(settings, model_folder, tmp_path, monkeypatch):
    from mlx_traces.evaluation import run
    from mlx_traces.models import loading

    folder = tmp_path / "dated"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%d.%m.') }}" + CHATML)
    shown, load = [], loading.load

    def today(*names, **arguments):
        loaded = load(*names, **arguments)
        shown.append(loaded.chat.prompt(ONE).text[:6])
        return loaded

    monkeypatch.setattr(loading, "load", today)
    config = SFTConfig(**settings | {"model": str(folder), "epochs": 1, "batch_size": 24, "valid_share": 0})
    sft.train(config.model_copy(update={"date": date(2025, 3, 1)}), tmp_path / "run")
    sft.train(config, tmp_path / "run", resume=True)
    assert shown == ["01.03."] * 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["identity"]["date"] == "2025-03-01"
    with pytest.raises(UserError, match="date was 2025-03-01, now 2025-03-02"):
        sft.train(config.model_copy(update={"date": date(2025, 3, 2)}), tmp_path / "run", resume=True)

    data = tmp_path / "qa.jsonl"
    data.write_text('{"question": "1+1", "answer": "2"}\n')
    asked = {"model": str(folder), "task": "qa", "data": str(data), "max_tokens": 2, "device": "cpu"}
    run.evaluate(out=tmp_path / "eval", date="2025-03-01", **asked)
    run.evaluate(out=tmp_path / "eval", resume=True, **asked)
    assert shown[3:] == ["01.03."] * 2
    assert json.loads((tmp_path / "eval" / "run.json").read_text())["identity"]["date"] == "2025-03-01"
    count = len(shown)
    made = GenerateConfig(**asked | {"split": "train", "samples": 1})
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(generate, "write_traces", lambda *_: 1 / 0)  # cut off before the end
        generate.generate(made.model_copy(update={"date": date(2025, 3, 1)}), tmp_path / "own.jsonl")
    generate.generate(made, tmp_path / "own.jsonl", resume=True)
    generate.generate(made, tmp_path / "own.jsonl", resume=True)  # nothing is left to do
    assert manifest_of(tmp_path / "own.jsonl")["config"]["date"] == "2025-03-01"
    assert len(shown) > count and {*shown[3:]} == {"01.03."}
    plain = run.evaluate(out=tmp_path / "plain", **asked | {"model": str(model_folder)})
    assert plain and "date" not in json.loads((tmp_path / "plain" / "run.json").read_text())["identity"]
