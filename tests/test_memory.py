"""The memory estimate: within a quarter of MLX's own peak, part by part, and lines that name what to lower."""

import gc
import re
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import make_config, make_model, make_tokenizer, wrap

from mlx_traces import adapters, forward, grpo, memory, models, optim, planning
from mlx_traces.batching import Example
from mlx_traces.cli import main
from mlx_traces.config import GRPOConfig, SFTConfig
from mlx_traces.device import Backend
from mlx_traces.drawing import Request, SamplingParams
from mlx_traces.errors import UserError
from mlx_traces.sampling import generate

TOLERANCE = 0.25
PROMPT = 16


def made(config, **changes):
    """Return a tiny model that is ready to train and never ends a completion."""
    changes = {"max_position_embeddings": 2048, **changes}
    loaded = wrap(make_tokenizer(), make_model(**changes))
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


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(
    ("rows", "length", "rank", "changes"),
    [
        (32, 128, 16, {}),
        (8, 256, 16, {}),
        (16, 128, 64, {}),
        (8, 128, 4, {"num_hidden_layers": 8, "intermediate_size": 512}),
        (16, 96, 16, {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 4}),
        (16, 128, 16, {"vocab_size": 4096}),
    ],
)
def test_an_update_takes_what_was_estimated(rows, length, rank, changes, checkpoint):
    config = GRPOConfig(
        rank=rank,
        micro_tokens=rows * length,
        max_tokens=length - PROMPT,
        checkpoint_layers=checkpoint,
        prompts_per_step=rows,
        group_size=2,
    )
    loaded = made(config, **changes)
    halves, optimizer = forward.split(loaded.model), optim.make_optimizer(config, 10)
    optimizer.init(loaded.model.trainable_parameters())
    mx.eval(optimizer.state)
    draw = np.random.default_rng(0)
    batch = []
    for place in range(2 * rows):
        ids = tuple(draw.integers(0, 128, length).tolist())
        example = Example(str(place), ids, (False,) * PROMPT + (True,) * config.max_tokens)
        batch.append(grpo.Row(example, 1.0 if place % 2 else -1.0, np.zeros(config.max_tokens, np.float32)))
    held = mx.get_active_memory() / 1e9  # by other tests too

    def work():
        with forward.checkpointed(loaded.model.layers, checkpoint):
            grpo.learn(loaded.model, halves, batch, optimizer, lambda: None, 1, config)

    found = memory.of_reinforcement(loaded, config, PROMPT)
    assert found.activations > 5 * found.weights
    assert close(peak_of(work) - held, found.update - found.weights - found.optimizer)


@pytest.mark.parametrize(
    ("completions", "rows", "prompt", "most", "changes"),
    [
        (32, 32, 64, 64, {"num_hidden_layers": 8}),
        (32, 32, 64, 400, {"num_hidden_layers": 4}),
        (64, 64, 64, 100, {}),
        (32, 32, 200, 20, {}),
        (64, 32, 200, 200, {"num_hidden_layers": 4}),
        (32, 32, 64, 100, {"vocab_size": 20_000}),
    ],
)
def test_sampling_takes_what_was_estimated(completions, rows, prompt, most, changes):
    config = GRPOConfig(prompts_per_step=completions // 8, group_size=8, max_tokens=most, rows=rows)
    loaded = made(config, **changes)
    draw = np.random.default_rng(0)
    prompts = [tuple(draw.integers(0, 100, prompt).tolist()) for _ in range(completions // 8)]
    requests = [Request(prompts[place // 8]) for place in range(completions)]
    held = mx.get_active_memory() / 1e9

    def work():
        with adapters.merged(loaded.model):
            for _ in generate(loaded, requests, SamplingParams(most, 1.0), rows, logprobs=True):
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
    assert fine.activations == found.activations and fine.cache == fine.draw == fine.merged == 0


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
    file = write(tmp_path / "grpo.yaml", f"# mlx-traces grpo {tmp_path}/grpo.yaml\nmodel: nano\n{GRPO}")
    made = planning.plan(file)
    loaded = models.load("nano")
    config = GRPOConfig(rank=4, prompts_per_step=4, group_size=4, max_tokens=32)
    adapters.start(loaded.model, config)
    prompt = int(re.search(r"prompts of (\d+) tokens", made.told)[1])
    assert made.estimate == memory.of_reinforcement(loaded, config, prompt) and made.fault is None
    assert made.most["rows"] == memory.Most(16, 16)
    printed = CliRunner().invoke(main, ["plan", str(file)]).output
    assert printed.splitlines() == made.lines() and "largest rows: 16 (all of a step)" in printed
    assert CliRunner().invoke(main, ["plan", str(file), "--kind", "ppo"]).output.startswith("ppo of nano on ")
    small = made.estimate.weights + made.estimate.optimizer
    real = models.load

    def cramped(*given, **named):
        found = real(*given, **named)
        return replace(found, backend=replace(found.backend, memory_gb=small))

    monkeypatch.setattr(models, "load", cramped)
    made = planning.plan(file)
    assert made.fault and made.lines()[-3:] == [
        "  largest rows: none fits",
        "  largest micro_tokens: none fits",
        "  largest max_tokens: none fits",
    ]


def test_a_plan_of_sft_takes_the_traces_or_max_length(tmp_path):
    text = f"# mlx-traces sft {tmp_path}/sft.yaml\nmodel: nano\ndata: {tmp_path}/traces.jsonl\nmax_length: 300\n"
    file = write(tmp_path / "sft.yaml", text)
    assert "sequences of 300 tokens (max_length, as " in planning.plan(file).told
    row = '{"id": "a", "messages": [{"role": "user", "content": "1 + 2"}], "completion": "3"}\n'
    write(tmp_path / "traces.jsonl", row * 3)
    made = planning.plan(file)
    assert "(the longest of 3)" in made.told and set(made.most) == {"micro_tokens", "max_length"}
    assert "key-value cache" not in "".join(made.lines())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: nano\n", "its first line names no command; plan knows sft, grpo and ppo: pass --kind"),
        ("# mlx-traces rounds x.yaml\n", "its first line names 'rounds'"),
        ("# mlx-traces grpo x.yaml\nmodel: nobody/nothing\n", "nobody/nothing is not on this machine"),
        ("# mlx-traces grpo x.yaml\nmodel: ./none\n", "none"),
        ("# mlx-traces grpo x.yaml\nrow: 3\n", "unknown field 'row'; did you mean 'rows'"),
    ],
)
def test_a_plan_refuses_in_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        planning.plan(write(tmp_path / "x.yaml", text))
    with pytest.raises(UserError, match="cannot be read"):
        planning.plan(tmp_path / "missing.yaml")
