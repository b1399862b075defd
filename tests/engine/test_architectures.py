"""Any model of mlx_lm: tiny random ones of many architectures, sampled and differentiated by ours and plainly.

What they differ in is what ours has to find out by itself: where the head is and whether it is linear (Gemma 2 caps
its logits, Cohere and Granite scale them, Phi's has a bias), how the layers are called, which caches they keep.
"""

import json
from dataclasses import replace
from functools import cache
from importlib import import_module

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from factories import broken, make_config, make_tokenizer, randomized, wrap
from mlx.utils import tree_flatten

from mlx_traces.config import AdapterConfig, GRPOConfig
from mlx_traces.engine import forward, generation
from mlx_traces.engine.batching import Example, pad
from mlx_traces.engine.logprobs import head_logprobs
from mlx_traces.errors import UserError
from mlx_traces.models import adapters
from mlx_traces.rl import grpo
from mlx_traces.train import gradients

HALVED = (
    *("llama", "phi3", "gemma", "qwen3", "qwen3_moe", "olmo2"),
    *("minicpm", "glm4", "starcoder2", "mixtral", "nemotron"),
)
OTHER = ("phi", "gemma2", "cohere", "granite", "internlm2", "gpt2")  # their heads do more, or have other names
WINDOWED = ("mistral3",)  # plain caches, and layers that see a window of them
WHOLE = ("gpt_neox", "gpt_bigcode")  # the trunk of one ends with the logits, that of the other is called otherwise
SPECIAL = ("gemma3_text", "cohere2", "gpt_oss", "exaone4", "lfm2")  # caches of a sliding window, or of a convolution
# Padding disturbs the states of these in mlx_lm, so their prompts are read one at a time; caches that it cannot batch.
UNPADDED, UNBATCHED = ("mamba", "jamba", "rwkv7"), ("llama4", "deepseek_v41", "afm7")
SETTINGS = {
    **{"head_dim": 16, "rope_theta": 10_000.0, "original_max_position_embeddings": 512, "partial_rotary_factor": 0.5},
    **{"layer_norm_eps": 1e-5, "layer_norm_epsilon": 1e-5, "norm_epsilon": 1e-5, "norm_eps": 1e-5},
    **{"attention_bias": False, "mlp_bias": False, "bias": False, "use_qk_norm": False, "hidden_act": "silu"},
    **{"sliding_window": 16, "sliding_window_pattern": 2, "layer_types": ["full_attention"] * 2},
    **{"query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 4.0},
    **{"logit_scale": 0.25, "logits_scaling": 4.0, "attention_multiplier": 0.25, "embedding_multiplier": 2.0},
    **{"residual_multiplier": 0.5, "dim_model_base": 32, "scale_depth": 1.0, "scale_emb": 2.0},
    **{"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    **{"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    **{"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 512, "n_ctx": 512, "rotary_pct": 0.5},
    **{"rotary_emb_base": 10_000, "use_parallel_residual": True},
}


OWN = {
    "gpt_bigcode": {"n_inner": 128, "attn_pdrop": 0, "multi_query": True, "attention_bias": True, "mlp_bias": True},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "mistral3": {
        "text_config": make_config(
            **{"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "rope_theta": 10_000.0}
        )
    },
    "exaone4": {"sliding_window_pattern": "LG", "rope_scaling": None},
    "lfm2": {
        **{"conv_bias": False, "conv_L_cache": 3, "full_attn_idxs": [1], "layer_types": None, "block_dim": 64},
        **{"block_ff_dim": 128, "block_multiple_of": 1, "block_ffn_dim_multiplier": 1.0},
        **{"block_auto_adjust_ff_dim": False},
    },
    "minicpm3": {
        **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16},
        **{"rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}},
    },
    "mamba": {
        **{"state_size": 8, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 8},
    },
    "jamba": {
        **{"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
        **{"mamba_d_conv": 4, "mamba_d_state": 8, "mamba_expand": 2, "num_experts": 2, "num_experts_per_tok": 1},
    },
    "rwkv7": {
        **{"head_dim": 32, "a_low_rank_dim": 16, "v_low_rank_dim": 16, "gate_low_rank_dim": 16},
        **{"decay_low_rank_dim": 16},
    },
    "afm7": {"hidden_dim": 128, "num_layers": 4, "num_kv_reuse_layers": 2, "num_heads": 4, "num_kv_heads": 2},
    "llama4": {
        "text_config": make_config(
            **{"model_type": "llama4_text", "attention_bias": False, "attention_chunk_size": 16, "head_dim": 16},
            **{"interleave_moe_layer_step": 2, "intermediate_size_mlp": 128, "num_experts_per_tok": 1},
            **{"num_local_experts": 2, "rope_scaling": None, "rope_theta": 10_000.0, "use_qk_norm": True},
            num_hidden_layers=4,
        )
    },
    "deepseek_v41": {
        **{"head_dim": 32, "qk_rope_head_dim": 16, "q_lora_rank": 32, "o_groups": 2, "o_lora_rank": 16},
        **{"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
        **{"compress_ratios": [1, 1], "hc_mult": 2, "hc_sinkhorn_iters": 2, "rms_norm_eps": 1e-6},
    },
}


def config_of(architecture):
    """Return the configuration of a tiny model."""
    return make_config(**SETTINGS, model_type=architecture) | OWN.get(architecture, {})


def tiny(architecture):
    """Return a tiny random model of an architecture."""
    config = config_of(architecture)
    if architecture == "phi3":
        del config["head_dim"]
    module = import_module(f"mlx_lm.models.{architecture}")
    return randomized(module.Model(module.ModelArgs.from_dict(config)), 3)


@pytest.fixture(scope="module")
def kept():
    """Return `tiny`, whose models are kept with what was found out of them; for tests that leave the weights alone."""
    return cache(tiny)


def is_greedy(loaded, rollout, count):
    """Whether a forward pass over a rollout finds each token the likeliest one, and it ends where it has to."""
    start, found = len(rollout.prompt_ids), rollout.completion_ids
    logits = loaded.model(mx.array([[*rollout.prompt_ids, *found[:-1]]]))[0, start - 1 :]
    stops = [token in loaded.stop_ids for token in found]
    return (
        mx.argmax(logits, axis=-1).tolist() == [*found] and not any(stops[:-1]) and (stops[-1] or len(found) == count)
    )


@pytest.mark.parametrize("architecture", [*HALVED, *OTHER, *WINDOWED, *WHOLE, *SPECIAL])
def test_sampled_as_one_by_one(architecture, kept):
    loaded = replace(wrap(make_tokenizer(), kept(architecture)), notes=[])
    prompts = [tuple(range(at, at + length)) for at, length in enumerate((5, 21, 3, 12))]
    params = generation.SamplingParams(max_tokens=9)
    requests = [generation.Request(prompt) for prompt in prompts]
    found = dict(generation.generate(loaded, requests, [params] * 4, 3))
    for at, prompt in enumerate(prompts):
        assert found[at].prompt_ids == prompt and is_greedy(loaded, found[at], 9), prompt
    assert any("special cache" in note for note in loaded.notes) == (architecture in SPECIAL)
    alone = "cannot decode rows of different lengths together"  # its positions are numpy's, of one row
    assert any(alone in note for note in loaded.notes) == (architecture == "gpt_bigcode")


@pytest.mark.parametrize("architecture", ["llama", "gemma2", *WINDOWED, *SPECIAL, *UNPADDED, *UNBATCHED])
def test_logprobs_are_those_of_a_full_forward_pass(architecture, kept):
    loaded = replace(wrap(make_tokenizer(), kept(architecture)), notes=[])
    each = [generation.SamplingParams(max_tokens=9, temperature=t) for t in (0.7, 0.0, 1.0)]
    requests = [generation.Request(tuple(range(3, 3 + length)), seed) for seed, length in enumerate((6, 11, 4))]
    found = dict(generation.generate(loaded, requests, each, 2, logprobs=True))
    for at, (request, params) in enumerate(zip(requests, each, strict=True)):
        ids = (*request.prompt_ids, *found[at].completion_ids)
        logits = np.array(loaded.model(mx.array([ids[:-1]]))[0], np.float64)[len(request.prompt_ids) - 1 :]
        for temperature, stored in ((1.0, found[at].model_logprobs), (params.temperature, found[at].logprobs)):
            own = logits / (temperature or 1.0)
            own -= own.max(-1, keepdims=True) + np.log(np.exp(own - own.max(-1, keepdims=True)).sum(-1, keepdims=True))
            expected = own[np.arange(len(own)), found[at].completion_ids] if temperature else np.zeros(len(own))
            np.testing.assert_allclose(stored, expected, atol=1e-4)
    told = {
        "special cache": (*SPECIAL, *UNPADDED, *UNBATCHED),
        "read one at a time": UNPADDED,
        "cannot batch": UNBATCHED,
    }
    for words, those in told.items():
        assert any(words in note for note in loaded.notes) == (architecture in those), words


def test_rows_that_begin_together_keep_to_a_layers_window():
    loaded, prompt = wrap(make_tokenizer(), tiny("mistral3")), tuple(range(20))
    found = dict(generation.generate(loaded, [generation.Request(prompt)], generation.SamplingParams(max_tokens=9)))
    assert is_greedy(loaded, found[0], 9)
    rows = [Example(str(n), prompt + (n, 5, 3, n, 8, 2, n, 6, 1), (False,) * 20 + (True,) * 9) for n in (1, 2, 3)]
    halves = forward.split(loaded.model)
    prompts, everything = forward.Prompts(halves, rows), [0, 1, 2]
    shared, _ = prompts.states(halves, prompts.read(halves, 64, forward.Queue()), everything)
    np.testing.assert_allclose(shared, forward.whole(halves, rows, everything)[0], atol=1e-4)


def ignoring_masks(monkeypatch, module):
    """Let a module's attention ignore the mask of a single query."""
    whole = module.scaled_dot_product_attention

    def attention(queries, *given, mask, **more):
        return whole(queries, *given, mask=None if queries.shape[2] == 1 else mask, **more)

    monkeypatch.setattr(module, "scaled_dot_product_attention", attention)


def test_a_model_that_ignores_the_mask_is_decoded_one_row_at_once(monkeypatch):
    """As mlx_lm's MiniCPM3 did; rows that began apart are compared with themselves alone."""
    params, requests = (
        generation.SamplingParams(max_tokens=8),
        [generation.Request((3, 4, 5, 6)), generation.Request((7,))],
    )

    def sampled():
        loaded = replace(wrap(make_tokenizer(), tiny("minicpm3")), notes=[])
        found = dict(generation.generate(loaded, requests, params, 2))
        assert all(is_greedy(loaded, found[at], 8) for at in range(2))
        return loaded.notes

    assert sampled() == []
    ignoring_masks(monkeypatch, import_module("mlx_lm.models.minicpm3"))
    assert sampled() == ["tiny cannot decode rows of different lengths together: one row at once"]


def test_a_model_that_reads_its_cache_in_its_own_way_is_sampled_by_mlx_lm(monkeypatch):
    module = import_module("mlx_lm.models.phi3")
    whole = module.Model.__call__

    def asks(self, inputs, cache=None, **more):
        assert cache is None or cache[0].empty() in (True, False)  # a question that only mlx_lm's caches answer
        return whole(self, inputs, cache=cache, **more)

    monkeypatch.setattr(module.Model, "__call__", asks)
    loaded = replace(wrap(make_tokenizer(), tiny("phi3")), notes=[])
    requests = [generation.Request((3, 4, 5, 6)), generation.Request((7,))]
    found = dict(generation.generate(loaded, requests, generation.SamplingParams(max_tokens=8), 2))
    assert all(is_greedy(loaded, found[at], 8) for at in range(2))
    assert any("mlx_lm's own batched generation" in note for note in loaded.notes)


def test_what_mlx_lm_cannot_decode_at_all_is_told_in_a_line(monkeypatch):
    module = import_module("mlx_lm.models.llama4")
    monkeypatch.setattr(module.LlamaModel, "__call__", lambda *_, **__: [][0])
    loaded = wrap(make_tokenizer(), tiny("llama4"))
    with pytest.raises(UserError, match="tiny: mlx_lm cannot decode this model even one row at a time"):
        list(generation.generate(loaded, [generation.Request((1, 2))], generation.SamplingParams(max_tokens=2)))


@pytest.mark.parametrize("architecture", ["gemma3_text", "llama4"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_outputs_that_are_no_numbers_are_told_on_mlx_lms_ways_too(architecture, temperature):
    loaded = replace(wrap(make_tokenizer(), broken(tiny(architecture))), notes=[])
    with pytest.raises(UserError, match=r"^tiny: its outputs are not finite numbers"):
        list(generation.generate(loaded, [generation.Request((1, 2))], generation.SamplingParams(3, temperature)))


@pytest.mark.parametrize("architecture", [*HALVED, *OTHER, *WINDOWED, *WHOLE, *SPECIAL])
def test_the_gradient_is_the_plain_one(architecture):
    """Of a weighted sum of log-probabilities, prompts shared where that can be, against cross-entropy of all logits."""
    model, draw = tiny(architecture), np.random.default_rng(0)
    prompt = tuple(draw.integers(0, 90, 14).tolist())
    rows = [
        Example(f"row-{count}", prompt + tuple(draw.integers(0, 90, count).tolist()), (False,) * 14 + (True,) * count)
        for count in (5, 3, 7, 4)
    ]
    ids, positions = pad(rows)
    weights = mx.array(draw.normal(size=len(positions)).astype(np.float32))
    starts = np.cumsum([0, *(row.count for row in rows)]).tolist()
    mx.random.seed(3)
    adapters.start(model, AdapterConfig(rank=4))
    shaken = [(name, array + 0.05 * mx.random.normal(array.shape)) for name, array in arrays(model)]
    model.load_weights(shaken, strict=False)
    model.train()
    halves = forward.split(model)
    assert halves.frozen_head == (halves.trunk is not model) == (architecture not in WHOLE)
    assert halves.trunk(mx.array([[1, 2]])).shape[-1] == (128 if architecture in WHOLE else 64)

    def ours(hidden, targets, indices):
        logprobs, _ = head_logprobs(halves, hidden, targets, logits_mb=0.001)
        own = mx.concatenate([weights[starts[i] : starts[i + 1]] for i in indices])
        return (logprobs * own).sum(), {}

    def plain():
        logits = model(mx.array(ids[:, :-1])).astype(mx.float32)
        targets = mx.array(ids[:, 1:].reshape(-1)[positions])
        losses = nn.losses.cross_entropy(logits.reshape(-1, logits.shape[-1])[mx.array(positions)], targets)
        return -(losses * weights).sum()

    total, found, _ = gradients.accumulate(model, halves, rows, 40, ours)
    wanted, expected = nn.value_and_grad(model, plain)()
    assert total == pytest.approx(wanted.item(), abs=1e-4)
    found = dict(tree_flatten(found))
    compared = 0
    for name, array in tree_flatten(expected):
        if size := float(mx.abs(array).max()):
            compared += 1
            assert float(mx.abs(found[name] - array).max()) < 1e-4 * max(size, 1e-3), name
    assert compared >= 4


def arrays(model):
    return tree_flatten(model.trainable_parameters())


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "lfm2"])
def test_reinforcement_takes_them_too(architecture, tmp_path, monkeypatch):
    """Several updates, so that the sampler's log-probabilities are compared with the trainer's: the same model."""
    folder = tmp_path / "model"
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(tiny(architecture).parameters())))
    (folder / "config.json").write_text(json.dumps(config_of(architecture)))
    make_tokenizer("{% for turn in messages %}{{ turn['content'] }}{% endfor %}").save_pretrained(folder)
    (tmp_path / "uneven.py").write_text("def reward(completions):\n    return list(range(len(completions)))\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"prompt": "direct", "prompts_per_step": 1, "group_size": 3, "max_tokens": 5, "rank": 4, "num_steps": 2}
    settings |= {"temperature": 1.0, "rewards": {"uneven:reward": 1.0}, "updates_per_batch": 2, "kl_coef": 0.1}
    result = grpo.train(GRPOConfig(model=str(folder), task="countdown", **settings), tmp_path / "run")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert result.steps == 2 and all(abs(row["policy/kl_sampler"]) < 1e-4 for row in metrics)
    assert all(row["optim/grad_norm"] > 0 for row in metrics)
