"""The memory estimate: within a quarter of MLX's own peak, part by part, and lines that name what to lower."""

import gc
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from factories import make_config, make_model, make_tokenizer, wrap

from mlx_traces.cli import main
from mlx_traces.config import GRPOConfig, PPOConfig, SFTConfig, shipped
from mlx_traces.engine import cpu_trunk, forward, generation
from mlx_traces.engine.batching import Example
from mlx_traces.engine.generation import generate, rows_that_fit
from mlx_traces.engine.logprobs import head_logprobs
from mlx_traces.engine.sampling import Request, SamplingParams
from mlx_traces.errors import UserError
from mlx_traces.models import adapters, loading
from mlx_traces.pipelines import estimate
from mlx_traces.rl import grpo, ppo
from mlx_traces.rl.rollouts import Row
from mlx_traces.rl.trainer import Learner
from mlx_traces.runtime import device, distributed, memory_budget
from mlx_traces.runtime.device import Backend
from mlx_traces.tasks import countdown
from mlx_traces.traces import files, solutions
from mlx_traces.train import memory, sft
from mlx_traces.train.optimizer import make_optimizer

TOLERANCE = 0.2
PROMPT = 16


def made(config, dtype=mx.float32, **changes):
    """Return a tiny model that is ready to train and never ends a completion."""
    changes = {"max_position_embeddings": 2048, **changes}
    loaded = wrap(make_tokenizer(), make_model(**changes))
    loaded.model.set_dtype(dtype)
    adapters.start(loaded.model, config)
    mx.eval(loaded.model.parameters())
    return replace(loaded, config=make_config(**changes), context=2048, stop_ids=frozenset())


def peak_of(work):
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    work()
    return mx.get_peak_memory() / 1e9


def close(measured, estimated):
    return abs(estimated / measured - 1) < TOLERANCE


WAYS = ("trunk", "modules", "checkpointed")
WIDE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("rows", "length", "rank", "changes", "way"),
    [
        *((8, 128, 16, {}, way) for way in WAYS),
        *((4, 96, 16, {"dtype": mx.bfloat16}, way) for way in WAYS),
        *((2, 256, 16, {}, way) for way in WAYS),
        *((4, 128, 64, {}, way) for way in WAYS),
        *((4, 128, 4, {"num_hidden_layers": 6, "intermediate_size": 512}, way) for way in WAYS),
        *((8, 96, 16, WIDE, way) for way in WAYS),
        # How the layers are computed changes nothing about the logits.
        *((8, 128, 16, {"vocab_size": 4096}, way) for way in WAYS[1:]),
        (12, 64, 16, {"dtype": mx.bfloat16, "vocab_size": 4096}, "trunk"),
    ],
)
def test_an_update_takes_what_was_estimated(rows, length, rank, changes, way, monkeypatch):
    if way == "modules":
        monkeypatch.setattr(cpu_trunk, "serves", lambda _: False)
    config = GRPOConfig(
        rank=rank,
        micro_tokens=rows * length,
        max_tokens=length - PROMPT,
        checkpoint_layers=way == "checkpointed",
        prompts_per_step=rows,
        group_size=2,
    )
    loaded = made(config, **changes)
    halves, optimizer = forward.split(loaded.model), make_optimizer(config, 10)
    optimizer.init(loaded.model.trainable_parameters())
    mx.eval(optimizer.state)
    draw = np.random.default_rng(0)
    batch = []
    for place in range(2 * rows):
        ids = tuple(draw.integers(0, 128, length).tolist())
        example = Example(str(place), ids, (False,) * PROMPT + (True,) * config.max_tokens)
        batch.append(Row(example, np.zeros(config.max_tokens, np.float32), 1.0 if place % 2 else -1.0))
    gc.collect()
    held = mx.get_active_memory() / 1e9  # by other tests too

    def work():
        grpo.learn(Learner(loaded.model, halves, optimizer, None), batch, 1, config)

    found = memory.of_reinforcement(loaded, config, PROMPT)
    assert found.activations > 5 * found.weights
    assert close(peak_of(work) - held, found.update - found.weights - found.optimizer)


@pytest.mark.parametrize(
    ("completions", "rows", "prompt", "most", "changes", "draw"),
    [
        (32, 32, 64, 20, {"num_hidden_layers": 8}, {}),
        (32, 32, 64, 40, {"num_hidden_layers": 4}, {}),
        (64, 64, 64, 30, {}, {}),
        (32, 32, 200, 8, {}, {}),
        (64, 32, 240, 20, {"num_hidden_layers": 4}, {}),
        (32, 32, 64, 10, {"vocab_size": 20_000}, {}),
        (32, 32, 64, 3, {"vocab_size": 20_000}, {"temperature": 0.7}),
        (32, 32, 64, 3, {"vocab_size": 20_000}, {"temperature": 0.7, "top_p": 0.9}),
        (32, 32, 64, 3, {"vocab_size": 20_000}, {"top_p": 0.9}),
    ],
)
def test_sampling_takes_what_was_estimated(completions, rows, prompt, most, changes, draw):
    config = GRPOConfig(prompts_per_step=completions // 8, group_size=8, max_tokens=most, rows=rows, **draw)
    loaded = made(config, **changes)
    prompts = np.random.default_rng(0).integers(0, 100, (completions // 8, prompt)).tolist()
    prompts = [tuple(ids) for ids in prompts]
    requests = [Request(prompts[place // 8]) for place in range(completions)]
    held = mx.get_active_memory() / 1e9

    def work():
        with adapters.merged(loaded.model):
            params = SamplingParams(most, config.temperature, config.top_p)
            for _ in generate(loaded, requests, params, rows, logprobs=True):
                pass

    found = memory.of_reinforcement(loaded, config, prompt)
    assert found.cache + found.draw > found.weights
    measured, estimated = peak_of(work) - held, found.sampling - found.weights - found.optimizer
    assert close(measured, estimated), (measured, estimated)


def test_the_estimate_adds_up():
    config = GRPOConfig(prompts_per_step=4, group_size=4, max_tokens=32, rows=8, micro_tokens=256)
    loaded = made(config)
    found = memory.of_reinforcement(loaded, config, PROMPT)
    shape = memory.shape_of(loaded)
    assert (shape.layers, shape.hidden, shape.intermediate, shape.heads, shape.kv_heads) == (2, 64, 128, 4, 2)
    assert shape.merged == 4 * 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # every linear layer's weights
    assert found.cache == 8 * 2 * 2 * 2 * 16 * 4 * 256 / 1e9
    assert found.micro_rows == 256 // 48 and found.peak == max(found.sampling, found.update)
    assert found.optimizer == found.gradients == 2 * shape.trained / 1e9
    fine = memory.of_sft(loaded, SFTConfig(data="", micro_tokens=256), 48)
    assert fine.cache == fine.draw == fine.merged == 0
    alike = memory.estimate(shape, **memory.sizes_of_reinforcement(loaded, config, PROMPT) | {"own_trunk": False})
    assert fine.activations == alike.activations > found.activations  # sft calls the modules


def test_more_of_anything_takes_more():
    sizes = {"length": 512, "learned": 400, "micro_tokens": 4096, "sequences": 64, "logits_mb": 128}
    sampled = {"rows": 32, "completions": 64, "prompt": 112}
    shape = memory.Shape(24, 896, 4864, 14, 2, 64, 151_936, 4, 2 * 10**9, 10**7, 10**9, 512)
    before = memory.estimate(shape, **sizes, **sampled)
    for name in ("micro_tokens", "logits_mb"):
        assert memory.estimate(shape, **{**sizes, name: 2 * sizes[name]}, **sampled).update > before.update
    assert memory.estimate(shape, **sizes, **{**sampled, "rows": 64}).sampling > before.sampling
    assert memory.estimate(shape, **sizes, **sampled, checkpoint_layers=True).update < before.update / 2
    assert memory.estimate(shape, **{**sizes, "sequences": 10_000}, **sampled).update == before.update


def test_what_does_not_fit_names_the_setting_to_lower():
    parts = dict.fromkeys(
        ("weights", "optimizer", "gradients", "merged", "cache", "reading", "draw", "activations", "logits"), 0.0
    )
    found = memory.Estimate(
        **{**parts, "weights": 1.0}, rows=64, micro_tokens=4096, micro_rows=8, checkpoint_layers=False
    )
    backend = Backend("cuda", "dense", "bfloat16", 8.0, "test")
    assert memory.fits(found, backend) is None
    for changes, message in (
        ({"cache": 9.0}, r"about 10\.0 GB and the device has 8: lower rows \(64\)"),
        ({"activations": 9.0}, r"lower micro_tokens \(4096\) or set checkpoint_layers"),
        ({"activations": 9.0, "checkpoint_layers": True}, r"lower micro_tokens \(4096\)$"),
        ({"activations": 9.0, "micro_rows": 1}, "set checkpoint_layers"),
        ({"activations": 9.0, "micro_rows": 1, "checkpoint_layers": True}, "shorten the sequences"),
        ({"logits": 9.0}, "lower logits_mb"),
        ({"weights": 9.0}, "smaller model"),
    ):
        assert re.search(message, memory.fits(replace(found, **changes), backend))


STEPS = {"num_steps": 2, "prompts_per_step": 2, "group_size": 4, "max_tokens": 8, "warmup": 0}
SHORT = {"task": "countdown", "prompt": "direct", **STEPS, "rank": 4, "rewards": {f"{__name__}:uneven": 1.0}}


def uneven(completions):
    return [i % 4 for i in range(len(completions))]


@pytest.mark.parametrize("kind", ["sft", "grpo", "ppo"])
def test_a_training_goes_on_in_smaller_micro_batches_where_memory_runs_out(kind, tmp_path, monkeypatch):
    made = solutions.countdown_traces(8, "train", 3, prompts=[countdown.TASK.prompt("direct")])
    files.write_traces(tmp_path / "data.jsonl", made, {"source": "solver", "config": {}, "counts": {}, "seed": 3})
    settings = {
        "sft": SFTConfig(data=str(tmp_path / "data.jsonl"), batch_size=4, rank=4, valid_share=0.3, warmup=0),
        "grpo": GRPOConfig(**SHORT, kl_coef=0.01),
        "ppo": PPOConfig(**SHORT, epochs=1),
    }[kind]
    recipe, whole = {"sft": sft, "grpo": grpo, "ppo": ppo}[kind], head_logprobs
    results = {}
    for name, fits in (("whole", 10**9), ("halved", 16)):

        def logprobs(halves, states, *given, most=fits, **named):
            if len(states) > most:
                raise RuntimeError(f"[metal::malloc] Attempting to allocate {len(states)} bytes")
            return whole(halves, states, *given, **named)

        for module in (sft, grpo, ppo):
            monkeypatch.setattr(module, "head_logprobs", logprobs)
        results[name] = recipe.train(settings, tmp_path / name)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        results[name] = results[name], [row for row in rows if "loss" in row]
    (one, rows), (other, halved) = results["whole"], results["halved"]
    assert not any("memory ran out" in note for note in one.notes) and "memory/micro_tokens" not in rows[-1]
    assert any("tokens in a micro-batch from here on" in note for note in other.notes)
    assert halved[-1]["memory/micro_tokens"] < settings.micro_tokens and len(rows) == len(halved) == 2
    for before, after in zip(rows, halved, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-4, abs=1e-6)
        assert after["optim/grad_norm"] == pytest.approx(before["optim/grad_norm"], rel=1e-4)
    if kind != "ppo":
        less = settings.model_copy(update={"micro_tokens": 64, "logits_mb": 8.0, "checkpoint_layers": True})
        assert recipe.train(less, tmp_path / "halved", resume=True).steps == 2  # a run may go on with less
    one, other = (mx.load(f"{result.adapter}/adapters.safetensors") for result in (one, other))
    assert all(mx.allclose(array, other[name], rtol=0, atol=2e-5).item() for name, array in one.items())
    assert max(mx.abs(array).max().item() for name, array in one.items() if name.endswith("lora_b")) > 5e-5


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The adapter of a run that is not cut off."""
    return grpo.train(GRPOConfig(**SHORT, save_every=1), tmp_path_factory.mktemp("whole") / "run").adapter


@pytest.mark.parametrize(("kind", "call"), [("rows", 12), ("micro_tokens", 2)])  # both are in the second step
def test_a_run_that_cuda_cannot_go_on_with_is_resumed_with_less(kind, call, whole, tmp_path, monkeypatch):
    config = GRPOConfig(**SHORT, save_every=1)
    cuda = SimpleNamespace(out_of_memory=device.out_of_memory, select=lambda: "cuda")
    monkeypatch.setattr(memory_budget, "device", cuda)  # which has no cache to clear
    real, calls = loading.load, []

    def on_cuda(*given, **named):
        loaded = real(*given, **named)
        loaded.row_budget.backend = "cuda"
        return loaded

    monkeypatch.setattr(loading, "load", on_cuda)
    where, name = (grpo, "head_logprobs") if kind == "micro_tokens" else (generation._Engine, "_begin_step")
    working = getattr(where, name)

    def failing(*given, **named):
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return working(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, failing)
        with pytest.raises(UserError, match=rf"CUDA cannot go on; .* --resume and a lower {kind} \(here \d+\)"):
            grpo.train(config, tmp_path / "run")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1  # the first step is there
    grpo.train(config.model_copy(update={"micro_tokens": 32, "rows": 2}), tmp_path / "run", resume=True)
    one, other = (mx.load(f"{folder}/adapters.safetensors") for folder in (whole, tmp_path / "run" / "adapter"))
    assert all(mx.allclose(array, other[name], rtol=0, atol=2e-5).item() for name, array in one.items())


def test_micro_batches_that_a_device_takes_are_lowered_until_they_fit():
    loaded = made(GRPOConfig(rank=4))
    backend = Backend("cuda", "dense", "float32", 80.0, "test")
    config = GRPOConfig(rank=4, max_tokens=112, prompts_per_step=256, group_size=2).sized(backend.sizes)
    shape = replace(memory.shape_of(loaded), at_once=memory.AT_ONCE)

    def estimate_of(one):
        sizes = memory.sizes_of_reinforcement(loaded, one, PROMPT)
        return memory.estimate(shape, **sizes)

    assert config.micro_tokens == 16_384 and memory.fitted(config, backend, estimate_of) == config
    tight = replace(backend, memory_gb=estimate_of(config.sized({"micro_tokens": 4096})).update / 0.8)
    lowered = memory.fitted(config, tight, estimate_of)
    assert (
        lowered.micro_tokens == 4096 and lowered.rows == config.rows and "micro_tokens" not in lowered.model_fields_set
    )
    assert memory.fitted(config, replace(backend, memory_gb=1e-6), estimate_of).micro_tokens == 1024  # a CPU's
    own = GRPOConfig(micro_tokens=8192)
    assert memory.fitted(own, replace(backend, memory_gb=1e-6), estimate_of) == own


def test_two_micro_batches_are_under_way_on_a_gpu():
    sizes = {"length": 96, "learned": 64, "micro_tokens": 192, "logits_mb": 128}
    shape = memory.Shape(4, 64, 128, 4, 2, 16, 128, 4, 10**6, 10**5, 10**5, 64)
    one = memory.estimate(shape, sequences=12, **sizes)
    two = memory.estimate(replace(shape, at_once=2), sequences=12, **sizes)
    assert two.activations == 2 * one.activations and two.logits == 2 * one.logits and two.gradients == one.gradients
    alone = memory.estimate(replace(shape, at_once=2), sequences=2, **sizes)
    assert alone.activations == one.activations  # there is but one


def test_rows_that_fit_are_the_same_before_and_while_the_adapter_is_merged():
    loaded = made(GRPOConfig(rank=4))
    loaded = replace(loaded, backend=replace(loaded.backend, memory_gb=0.01))
    asked, params = [Request((1,) * 32)] * 64, [SamplingParams(64)] * 64
    before = rows_that_fit(loaded, asked, params)
    with adapters.merged(loaded.model, loaded.backend):
        assert 1 < rows_that_fit(loaded, asked, params) <= before < 64
        assert before - rows_that_fit(loaded, asked, params) <= 1  # a layer's weights are joined


SIZES = {"length": 96, "learned": 64, "micro_tokens": 700, "sequences": 12, "logits_mb": 1.0}


@pytest.mark.parametrize("sampled", [{}, {"rows": 5, "completions": 12, "prompt": 32}], ids=["sft", "grpo"])
@pytest.mark.parametrize("limit", [0.001, 0.004, 0.006, 0.008, 0.012, 0.02, 0.05, 1.0])
def test_the_largest_that_fits_is_that_of_trying_all(limit, sampled):
    shape = memory.Shape(4, 64, 128, 4, 2, 16, 128, 4, 10**6, 10**5, 10**5, 64)
    sizes, context = SIZES | sampled, 2000
    prompt = sizes.get("prompt", 0)

    def tried(values, change):
        fitting = [v for v in values if memory.estimate(shape, **(sizes | change(v))).peak <= limit]
        return max(fitting, default=None)

    found = memory.largest(shape, sizes, limit, context)
    expected = {"micro_tokens": tried(range(1, 12 * 96 + 1), lambda v: {"micro_tokens": v})}
    name = "max_tokens" if sampled else "max_length"
    expected[name] = tried(range(1, context - prompt + 1), lambda v: {"length": prompt + v, "learned": v})
    if sampled:
        expected["rows"] = tried(range(1, 13), lambda v: {"rows": v})
    assert {name: most.value for name, most in found.items()} == expected
    assert found["micro_tokens"].top == 12 * 96 and found[name].top == context - prompt


GRPO = "task: countdown\nprompt: direct\nnum_steps: 2\nprompts_per_step: 4\ngroup_size: 4\nmax_tokens: 32\nrank: 4\n"


def write(path, text):
    path.write_text(text)
    return path


def test_a_plan_is_the_estimate_of_the_training_itself(tmp_path, monkeypatch):
    file = write(tmp_path / "grpo.yaml", f"# mlx-traces ppo of old\nmodel: nano\nloss: dapo\n{GRPO}")
    made = estimate.plan(file)
    loaded = loading.load("nano")
    config = GRPOConfig(rank=4, prompts_per_step=4, group_size=4, max_tokens=32)
    adapters.start(loaded.model, config)
    prompt = int(re.search(r"prompts of (\d+) tokens", made.told)[1])
    assert made.estimate == memory.of_reinforcement(loaded, config, prompt) and made.fault is None
    assert made.most["rows"] == memory.Most(16, 16)
    printed = CliRunner().invoke(main, ["plan", str(file)]).output
    assert printed.splitlines() == made.lines() and "largest rows: 16 (all of a step)" in printed
    file = write(tmp_path / "either.yaml", f"model: nano\n{GRPO}")
    assert CliRunner().invoke(main, ["plan", str(file), "--kind", "ppo"]).output.startswith("ppo of nano on ")
    file = write(tmp_path / "grpo.yaml", f"model: nano\nloss: dapo\n{GRPO}")
    small = made.estimate.weights + made.estimate.optimizer
    real = loading.load

    def cramped(*given, **named):
        found = real(*given, **named)
        return replace(found, backend=replace(found.backend, memory_gb=small))

    monkeypatch.setattr(loading, "load", cramped)
    made = estimate.plan(file)
    assert made.fault and made.lines()[-3:] == [
        "  largest rows: none fits",
        "  largest micro_tokens: none fits",
        "  largest max_tokens: none fits",
    ]


def test_a_plan_of_sft_takes_the_traces_or_max_length(tmp_path):
    text = f"model: nano\ndata: {tmp_path}/traces.jsonl\nmax_length: 300\n"
    file = write(tmp_path / "sft.yaml", text)
    assert "sequences of 300 tokens (max_length, as " in estimate.plan(file).told
    row = '{"id": "a", "messages": [{"role": "user", "content": "1 + 2"}], "completion": "3"}\n'
    write(tmp_path / "traces.jsonl", row * 3)
    made = estimate.plan(file)
    assert "(the longest of 3)" in made.told and set(made.most) == {"micro_tokens", "max_length"}
    assert "key-value cache" not in "".join(made.lines())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# mlx-traces grpo x.yaml\nmodel: nano\n", "its fields fit grpo and ppo alike; pass --kind"),
        ("model: nano\nname: try\n", "'name' is no setting of sft, grpo or ppo"),
        ("model: nano\nmax_length: 300\n", "its fields fit none of sft, grpo or ppo; --kind"),
        ("loss: dapo\ngae_lambda: 1\n", "its fields fit none of sft, grpo or ppo; --kind"),
        ("loss: dapo\nmodel: nobody/nothing\n", "nobody/nothing is not on this machine"),
        ("loss: dapo\nmodel: ./none\n", "none: no such folder"),
        ("loss: dapo\nnum_steps: 0\n", "x.yaml: num_steps: must be at least 1"),
        ("row: 3\n", "'row' is no setting of sft, grpo or ppo; did you mean 'rows'"),
    ],
)
def test_a_plan_refuses_in_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        estimate.plan(write(tmp_path / "x.yaml", text))
    with pytest.raises(UserError, match="no such configuration file"):
        estimate.plan(tmp_path / "missing.yaml")


def test_the_fields_of_shipped_files_tell_their_recipe():
    kinds = {path: path.name.partition("_")[0] for path in shipped("configs").glob("*.yaml")}
    trainings = {path: kind for path, kind in kinds.items() if kind in estimate.KINDS}
    assert len(trainings) > 4
    for path, kind in trainings.items():
        found = estimate.kinds_of(path)
        assert kind in found and ("sft" in found) == (kind == "sft")


def cache_limit():
    """Return MLX's limit, which only setting it tells."""
    limit = mx.set_cache_limit(0)
    mx.set_cache_limit(limit)
    return limit


@pytest.fixture
def roomy():
    """Let MLX keep as much as a GPU's memory; on a CPU it would keep little."""
    before = mx.set_cache_limit(10**12)
    yield 10**12
    mx.set_cache_limit(before)


def test_limits_are_set_once_and_put_back(roomy, monkeypatch):
    wired = []
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: wired.append(limit) or 77)
    with device.limits():
        assert cache_limit() == device.memory_bytes() // 4 < roomy
        with device.limits():
            mx.set_cache_limit(10**9)
        assert cache_limit() == 10**9  # inner contexts change nothing
    assert cache_limit() == roomy and not wired
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    told = {"max_recommended_working_set_size": 8.0 * 10**8, "memory_size": 10**9}
    monkeypatch.setattr(mx, "device_info", lambda: told)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    with pytest.raises(KeyError), device.limits():
        assert cache_limit() == 2 * 10**8  # a quarter of what Metal recommends to use
        raise KeyError
    assert cache_limit() == roomy and wired == [8 * 10**8, 77]
    mx.set_cache_limit(10**8)
    with device.limits():
        assert cache_limit() == 10**8  # never more than MLX's own


def test_the_cache_is_cleared_between_sampling_and_training_where_it_has_grown(monkeypatch):
    loaded, cleared = made(GRPOConfig(rank=4)), []
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(1))
    monkeypatch.setattr(device, "memory_bytes", lambda: 10**9)
    for cached, count in ((10**8, 0), (2 * 10**8, 2)):
        monkeypatch.setattr(mx, "get_cache_memory", lambda cached=cached: cached)
        with adapters.merged(loaded.model):
            assert len(cleared) == count / 2
        assert len(cleared) == count
    with pytest.raises(RuntimeError), adapters.merged(loaded.model):
        raise RuntimeError
    assert len(cleared) == 3  # after an error nothing is asked of the device
    assert "lora_a" in loaded.model.layers[0].self_attn.q_proj


def test_runs_and_samples_are_made_within_the_limits(roomy, tiny, tmp_path):
    for _ in generate(tiny, [Request((1, 2, 3))], SamplingParams(2)):
        assert cache_limit() < roomy
    assert cache_limit() == roomy
    with distributed.at_work(tmp_path / "run", False):
        assert cache_limit() < roomy
    assert cache_limit() == roomy


def test_memory_that_ran_out_anywhere_in_a_run_is_told_in_a_line(tmp_path):
    told = r"memory ran out \(.malloc. Unable to allocate 3 bytes.\); .* --resume"
    with pytest.raises(UserError, match=told), distributed.at_work(tmp_path / "run", False):
        raise RuntimeError("[malloc] Unable to allocate 3 bytes.")
    with pytest.raises(RuntimeError, match="another"), distributed.at_work(tmp_path / "run", False):
        raise RuntimeError("another")


def test_adding_the_adapter_in_leaves_no_graph_behind(tmp_path):
    loaded = made(GRPOConfig(rank=4))

    def operations():
        """Return how many operations wait until somebody asks for MLX's random state."""
        mx.export_to_dot(str(tmp_path / "graph"), *mx.random.state)
        return (tmp_path / "graph").read_text().count("label")

    mx.random.normal((2,))
    waiting = operations()
    mx.eval(list(mx.random.state))
    nothing = operations()
    assert waiting > nothing
    for _ in range(3):
        with adapters.merged(loaded.model):
            assert operations() == nothing
