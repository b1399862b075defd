"""Adapters that are started, trained, saved, left out and merged, and read by mlx_lm."""

import gc
import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from factories import call, make_config, make_model, make_tokenizer, randomized
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import afm7, qwen2_moe
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

from mlx_traces.config import AdapterConfig, shipped
from mlx_traces.engine import generation
from mlx_traces.errors import UserError
from mlx_traces.models import adapters, loading
from mlx_traces.runtime.device import Backend
from mlx_traces.tasks.countdown import TASK
from mlx_traces.traces import perplexity
from mlx_traces.traces.files import write_traces
from mlx_traces.traces.solutions import countdown_traces

IDS = mx.array([[5, 9, 17, 40, 3], [88, 2, 2, 61, 30]])


def quantized(bits=4, **changes):
    model = make_model(**changes)
    nn.quantize(model, group_size=32, bits=bits)
    return model


def started(model, folder=None, **settings):
    mx.random.seed(1)
    return adapters.start(model, AdapterConfig(**{"rank": 4, **settings}), folder)


def shake(model, size=0.05):
    """Give what is trained random values, as training would."""
    arrays = tree_flatten(model.trainable_parameters())
    moved = [(name, array + size * mx.random.normal(array.shape).astype(array.dtype)) for name, array in arrays]
    model.load_weights(moved, strict=False)
    mx.eval(model.parameters())


def write_model(folder, model, **config):
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(make_config(**config)))
    make_tokenizer().save_pretrained(folder)
    return folder


KINDS = {
    "lora": {},
    "dora": {"kind": "dora"},
    "full": {"kind": "full", "layers": 1},
    "last layer": {"layers": 1, "targets": ["self_attn.q_proj", "mlp.down_proj"]},
    "head": {"targets": ["lm_head", "self_attn.v_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [None, 4])
def test_mlx_lm_reads_what_was_saved(tmp_path, kind, bits):
    from mlx_lm import load

    if bits and kind == "full":
        return
    changes = {"tie_word_embeddings": False}
    if bits:
        base = write_model(
            tmp_path / "base",
            quantized(**changes),
            quantization={"group_size": 32, "bits": 4, "mode": "affine"},
            **changes,
        )
        model = quantized(**changes)
    else:
        base, model = write_model(tmp_path / "base", make_model(**changes), **changes), make_model(**changes)
    plain = model(IDS)
    settings = started(model, **KINDS[kind])
    model.eval()
    assert mx.allclose(model(IDS), plain, atol=1e-4)  # a new adapter changes nothing
    shake(model)
    logits = model(IDS)
    assert mx.abs(logits - plain).max() > 0.1
    adapters.save(model, tmp_path / "adapter", settings, {"model": "base"})
    theirs, _ = load(str(base), adapter_path=str(tmp_path / "adapter"))
    assert mx.array_equal(theirs(IDS), logits)
    again = quantized(**changes) if bits else make_model(**changes)
    assert mx.array_equal(adapters.attach(again, tmp_path / "adapter")(IDS), logits)
    # It goes on where it was: the same is trained, with the settings of the folder.
    config = {"kind": KINDS[kind].get("kind", "lora")}
    further = adapters.start(again, AdapterConfig(**config), tmp_path / "adapter")
    assert further == settings
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert [name for name, _ in tree_flatten(again.trainable_parameters())] == names


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_dora_on_weights_of_which_a_word_holds_no_whole_number(tmp_path, bits):
    """mlx_lm computes the number of inputs as if it did."""
    model = quantized(bits)
    plain = model(IDS)
    settings = started(model, kind="dora")
    model.eval()
    assert mx.allclose(model(IDS), plain, atol=1e-4)
    assert float(mx.abs(model.layers[0].mlp.down_proj.lora_a).max()) <= 128**-0.5
    shake(model)
    adapters.save(model, tmp_path / "adapter", settings)
    again = adapters.attach(quantized(bits), tmp_path / "adapter")
    assert mx.array_equal(again(IDS), model(IDS)) and mx.abs(again(IDS) - plain).max() > 0.1
    with adapters.merged(again):
        assert mx.allclose(again(IDS), model(IDS), atol=1e-3)


def fused_projections():
    sizes = {"num_layers": 2, "num_kv_reuse_layers": 1, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 64}
    return randomized(afm7.Model(afm7.ModelArgs("afm7", vocab_size=128, **sizes, hidden_dim_scale_factor=2)), 3)


def test_layers_with_lists_of_low_rank_pairs(tmp_path):
    model, half = fused_projections(), fused_projections()
    half.set_dtype(mx.bfloat16)
    started(half, targets=["self_attn.qkv_proj"])
    assert adapters.activation_bytes(half) == 2
    settings = started(model, targets=["self_attn.qkv_proj"])
    shake(model)
    assert not mx.allclose(model(IDS), fused_projections()(IDS), atol=0.1)
    adapters.save(model, tmp_path, settings)
    assert mx.array_equal(adapters.attach(fused_projections(), tmp_path)(IDS), model(IDS))
    with adapters.reference(model, "base")():
        assert mx.array_equal(model(IDS), fused_projections()(IDS))


def test_an_adapter_of_mlx_lm_is_trained_on(tmp_path):
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = make_model()
    parameters = {"rank": 3, "scale": 20.0, "dropout": 0.0}
    linear_to_lora_layers(model, 1, parameters)
    names = [name for name, _ in tree_flatten(model.parameters()) if "lora_" in name]
    arrays = {name: mx.random.normal(dict(tree_flatten(model.parameters()))[name].shape) for name in names}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), arrays)
    config = {"num_layers": 1, "lora_parameters": parameters, "model": "x", "train": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    again = adapters.attach(make_model(), tmp_path)
    settings = adapters.start(again, AdapterConfig(), tmp_path)
    assert settings == {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    assert {name for name, _ in tree_flatten(again.trainable_parameters())} == set(names)
    for changed, message in (
        ({"rank": 8}, r"rank 8 differs from that of .* \(3\)"),
        ({"scale": 2.0}, r"scale 2.0 differs from that of .* \(20.0\)"),
        ({"layers": -1}, r"layers -1 differs from that of .* \(1\)"),
        ({"kind": "dora"}, r"kind dora differs from that of .* \(lora\)"),
        ({"targets": ["self_attn.q_proj"]}, r"targets .* differs from that of .* \(None\)"),
    ):
        with pytest.raises(UserError, match=message):
            adapters.start(again, AdapterConfig(**changed), tmp_path)
    adapters.start(again, AdapterConfig(rank=3, scale=20, layers=1), tmp_path)  # the same, said again


def test_full_adapter_without_its_number_of_layers(tmp_path):
    model = make_model()
    started(model, kind="full")
    adapters.save(model, tmp_path, {"fine_tune_type": "full"})
    again = adapters.attach(make_model(), tmp_path)
    adapters.start(again, AdapterConfig(kind="full"), tmp_path)
    assert len(tree_flatten(again.trainable_parameters())) == len(tree_flatten(model.trainable_parameters()))


def test_a_full_adapter_needs_dense_weights(tmp_path, tiny_folder):
    loaded = loading.load(str(tiny_folder), weights="dense")
    settings = adapters.start(loaded.model, AdapterConfig(kind="full"))
    adapters.save(loaded.model, tmp_path, settings)
    loading.load(str(tiny_folder), str(tmp_path), weights="dense")
    with pytest.raises(UserError, match="does not fit this model .*: pass --weights dense"):
        loading.load(str(tiny_folder), str(tmp_path), weights="quantized")


@pytest.mark.parametrize("kind", ["lora", "dora", "last layer", "head"])
def test_left_out_and_merged(kind):
    model = make_model(tie_word_embeddings=False)
    plain = model(IDS)
    started(model, **KINDS[kind], dropout=0.3)
    shake(model)
    model.eval()
    logits = model(IDS)
    with adapters.switched_off(model):
        assert mx.array_equal(model(IDS), plain)
        assert not [name for name, _ in tree_flatten(model.parameters()) if "lora_" in name]
    assert mx.array_equal(model(IDS), logits)
    with adapters.merged(model):
        assert not [name for name, _ in tree_flatten(model.parameters()) if "lora_" in name]
        np.testing.assert_allclose(np.array(model(IDS)), np.array(logits), atol=2e-4)
    assert mx.array_equal(model(IDS), logits)
    with pytest.raises(KeyError), adapters.switched_off(model):
        raise KeyError
    assert mx.array_equal(model(IDS), logits)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_reference_has_its_own_scale(tmp_path, kind):
    model = make_model()
    settings = started(model, kind=kind, scale=10.0)
    shake(model)
    model.eval()
    adapters.save(model, tmp_path, settings)
    other = make_model()
    started(other, kind=kind, scale=2.0)
    other.load_weights(tree_flatten(model.trainable_parameters()), strict=False)
    other.eval()
    own = other(IDS)
    assert mx.abs(own - model(IDS)).max() > 0.1  # the same weights at another scale
    with adapters.reference(other, tmp_path)():
        assert mx.array_equal(other(IDS), model(IDS))
    assert mx.array_equal(other(IDS), own)


def test_a_reference_is_of_the_kind_and_layers_that_are_trained(tmp_path):
    for name, kind in KINDS.items():
        model = make_model(tie_word_embeddings=False)
        adapters.save(model, tmp_path / name, started(model, **kind))
    for name, kind in KINDS.items():
        model = make_model(tie_word_embeddings=False)
        started(model, **kind)
        own = kind.get("kind", "lora")
        for folder in KINDS:
            if folder == name:
                adapters.reference(model, tmp_path / folder)
                continue
            with pytest.raises(UserError, match=rf"{folder}: the reference is not of the kind, .* here \({own}\)"):
                adapters.reference(model, tmp_path / folder)
    model = make_model(tie_word_embeddings=False)
    started(model)
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora"', '"dora"'))
    with pytest.raises(UserError, match="the reference is not of the kind"):
        adapters.reference(model, tmp_path / "lora")
    (tmp_path / "dora" / "adapters.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="adapters.safetensors: not a safetensors file"):
        adapters.reference(model, tmp_path / "dora")


CUDA = Backend("cuda", "quantized", "bfloat16", 80.0, "test")
METAL = Backend("metal", "quantized", None, 16.0, "test")


def modules_of(model):
    """Return what a training would go on with: the modules, and which of their parameters are trained."""
    return {name: (id(module), *sorted(module.trainable_parameters())) for name, module in model.named_modules()}


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("kind", ["lora", "dora", "head"])
def test_sixteen_bits_are_merged_in_float32_and_rounded_once(kind, dtype):
    model = make_model(tie_word_embeddings=False)
    model.set_dtype(dtype)
    started(model, **KINDS[kind])
    shake(model)
    before = modules_of(model)
    layer = dict(model.named_modules())["lm_head" if kind == "head" else "model.layers.1.mlp.up_proj"]
    wide = np.array(layer.linear.weight.astype(mx.float32), np.float64)
    wide += layer.scale * np.array(layer.lora_b, np.float64).T @ np.array(layer.lora_a, np.float64).T
    if kind == "dora":
        wide *= (np.array(layer.m, np.float64) / np.linalg.norm(wide, axis=1))[:, None]
    with adapters.merged(model, CUDA):
        made = dict(model.named_modules())["lm_head" if kind == "head" else "model.layers.1.mlp.up_proj"]
        assert type(made) is nn.Linear and made.weight.dtype == dtype and not made.trainable_parameters()
        rounded = mx.array(wide.astype(np.float32)).astype(dtype)
        assert (made.weight == rounded).mean().item() > 0.999  # but where float32 is at the edge between two numbers
    assert modules_of(model) == before


@pytest.mark.parametrize("kind", ["lora", "dora", "last layer", "head"])
def test_quantized_layers_are_made_dense_on_cuda(kind):
    model = quantized(tie_word_embeddings=False)
    started(model, **KINDS[kind])
    shake(model)
    logits, before = model(IDS), modules_of(model)
    with adapters.merged(model, CUDA):
        kinds = {type(module) for _, module in model.named_modules()}
        assert nn.QuantizedLinear not in kinds and nn.QuantizedEmbedding not in kinds and nn.Linear in kinds
        np.testing.assert_allclose(np.array(model(IDS)), np.array(logits), atol=5e-4)
        inside = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
        with adapters.merged(model, CUDA):  # there is nothing left to change
            assert sum(array.nbytes for _, array in tree_flatten(model.parameters())) == inside
    assert modules_of(model) == before and mx.array_equal(model(IDS), logits)


@pytest.mark.parametrize(("mode", "group_size", "bits"), [("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)])
@pytest.mark.parametrize("backend", [METAL, CUDA], ids=["metal", "cuda"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_weights_whose_scales_are_integers_are_merged_in_the_activations_type(kind, backend, mode, group_size, bits):
    model = make_model()
    nn.quantize(model, group_size, bits, mode=mode)
    started(model, kind=kind)
    shake(model)
    logits = model(IDS)
    with adapters.merged(model, backend):
        np.testing.assert_allclose(np.array(model(IDS)), np.array(logits), atol=2e-3)


@pytest.mark.parametrize("backend", [METAL, replace(CUDA, memory_gb=1e-4), None], ids=["metal", "small cuda", "none"])
@pytest.mark.parametrize("kind", ["lora", "dora", "last layer", "head"])
def test_quantized_layers_keep_their_weights_where_dense_ones_do_not_pay_or_fit(kind, backend):
    model = quantized(tie_word_embeddings=False)
    bias = mx.random.normal((64,), key=mx.random.key(3))
    model.load_weights([("model.layers.1.self_attn.q_proj.bias", bias)], strict=False)
    started(model, **KINDS[kind])
    shake(model)
    logits, before = model(IDS), modules_of(model)
    name = "lm_head" if kind == "head" else "model.layers.1.mlp.down_proj"
    base = dict(model.named_modules())[name].linear
    with adapters.merged(model, backend):
        made = dict(model.named_modules())[name]
        assert type(made) is adapters.LowRank and made.linear is base
        assert made.a.dtype == made.b.dtype == made.linear.scales.dtype
        np.testing.assert_allclose(np.array(model(IDS)), np.array(logits), atol=2e-4)
    assert modules_of(model) == before and mx.array_equal(model(IDS), logits)


@pytest.mark.parametrize(
    ("kind", "quantize"),
    [("lora", False), ("lora", True), ("dora", False)],  # mlx_lm has no DoRA on quantized embeddings
)
def test_embeddings_and_experts_are_merged_too(kind, quantize):
    model = make_model()
    if quantize:
        nn.quantize(model, group_size=32, bits=4)
    started(model, kind=kind)
    embedding = DoRAEmbedding if kind == "dora" else LoRAEmbedding
    model.model.embed_tokens = embedding.from_base(model.model.embed_tokens, r=4, scale=2.0)
    model.model.embed_tokens.lora_b = 0.05 * mx.random.normal((4, 64), key=mx.random.key(1))
    logits = model(IDS)
    with adapters.merged(model, CUDA):
        assert type(model.model.embed_tokens) is nn.Embedding
        np.testing.assert_allclose(np.array(model(IDS)), np.array(logits), atol=5e-4)
    if kind == "lora":
        moe = experts()
        if quantize:
            nn.quantize(moe, group_size=32, bits=4)
        started(moe, targets=["mlp.switch_mlp.up_proj"])
        shake(moe)
        logits = moe(IDS)
        with adapters.merged(moe, CUDA):
            assert not [name for name, _ in tree_flatten(moe.parameters()) if "lora_" in name or "scales" in name]
            np.testing.assert_allclose(np.array(moe(IDS)), np.array(logits), atol=5e-4)


def test_the_bytes_of_what_is_copied_are_known_before(exact_memory):
    for model, backend in (
        (make_model(), None),
        (quantized(), CUDA),
        (quantized(), METAL),
        (quantized(tie_word_embeddings=False), replace(CUDA, memory_gb=1e-4)),
    ):
        if backend:
            model.set_dtype(mx.bfloat16)
        started(model)
        told = adapters.copied_bytes(model, backend)
        weighed = adapters.sampling_bytes(model, backend)
        own = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
        mx.eval(model.parameters())
        gc.collect()
        mx.synchronize()  # MLX's thread has let go of what it computed with
        active = mx.get_active_memory()
        with adapters.merged(model, backend):
            assert weighed == own + told == adapters.sampling_bytes(model, backend)
            mx.synchronize()
            assert told > 0 and abs(mx.get_active_memory() - active - told) < 0.01 * told + 4096
        assert abs(mx.get_active_memory() - active) < 4096


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merging_is_one_compiled_call_that_holds_little_besides_what_it_makes(kind, monkeypatch, exact_memory):
    model = make_model(hidden_size=128, intermediate_size=256, num_hidden_layers=24)
    model.set_dtype(mx.bfloat16)
    started(model, kind=kind)
    mx.eval(model.parameters())
    traced, called, compiled, summed = [], [], adapters._compiled, adapters._summed
    monkeypatch.setattr(adapters, "_compiled", lambda layers: called.append(len(layers)) or compiled(layers))
    monkeypatch.setattr(adapters, "_summed", lambda parts: traced.append(1) or summed(parts))
    told, active = adapters.copied_bytes(model, CUDA), mx.get_active_memory()
    for _ in range(2):
        mx.reset_peak_memory()
        with adapters.merged(model, CUDA):
            assert mx.get_peak_memory() - active < 1.25 * told  # some layers' sums in float32 besides, not all of them
    assert called == [7 * 24] * 2 and len(traced) == 7 * 24  # the second call has been traced by the first
    with adapters.merged(model, replace(CUDA, name="cpu")):
        assert len(called) == 2  # no compiler is needed there


def nano_with(adapter, dtype, kind, bits):
    """Return nano with an adapter, which computes in ``dtype``."""
    loaded = loading.load("nano")
    if bits:
        nn.quantize(loaded.model, group_size=64, bits=bits)
    loaded.model.set_dtype(dtype)
    adapters.attach(loaded.model, adapter)  # A and B stay float32
    if kind == "dora":
        magnitudes(loaded.model)
    return loaded


def logprobs_of(loaded, texts):
    """Return the log-probabilities of the tokens of some texts."""
    ids = [loaded.tokenizer.encode(text)[:48] for text in texts]
    logits = loaded.model(mx.array([[*own, *[0] * (48 - len(own))] for own in ids])).astype(mx.float32)
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    return np.concatenate([row[np.arange(len(own) - 1), own[1:]] for row, own in zip(logprobs, ids, strict=True)])


def magnitudes(model):
    """Make DoRA layers of a model's LoRA layers, their magnitudes those of the adapted weights times 0.9 to 1.1."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoRALinear)]
    for at, (name, layer) in enumerate(layers):
        made = DoRALinear.from_base(layer.linear, layer.lora_a.shape[1], scale=layer.scale)
        made.lora_a, made.lora_b = layer.lora_a, layer.lora_b
        norms = mx.linalg.norm(made._dequantized_weight() + layer.scale * (layer.lora_a @ layer.lora_b).T, axis=1)
        made.m = (norms * mx.random.uniform(0.9, 1.1, norms.shape, key=mx.random.key(at))).astype(mx.float32)
        layers[at] = name, made
    model.update_modules(tree_unflatten(layers))


@pytest.mark.parametrize(
    ("kind", "bits", "backends"),
    [
        ("lora", None, [METAL]),
        ("lora", 4, [METAL]),
        ("dora", None, [METAL, replace(METAL, memory_gb=1e-4)]),  # nothing fits: one more product, as on 4 bits
    ],
)
def test_merged_log_probabilities_are_as_near_to_float32_as_those_of_an_adapter_apart(kind, bits, backends):
    traces = list(countdown_traces(1 if bits else 5, "train", 3, prompts=[TASK.prompt("thinking")]))  # bits are slow
    texts = [f"{trace.messages[-1]['content']}{trace.completion}" for trace in traces]
    apart, own = [], [[] for _ in backends]
    for name in ("nano-grpo",) if bits else ("nano-epoch2", "nano-grpo"):
        exact = logprobs_of(nano_with(shipped("adapters") / name, mx.float32, kind, bits), texts)
        loaded = nano_with(shipped("adapters") / name, mx.bfloat16, kind, bits)
        apart.append(np.abs(logprobs_of(loaded, texts) - exact).mean())
        for found, backend in zip(own, backends, strict=True):
            with adapters.merged(loaded.model, backend):
                found.append(np.abs(logprobs_of(loaded, texts) - exact).mean())
    assert all(1e-3 < sum(found) < 1.1 * sum(apart) for found in own), (own, apart)


def test_without_an_adapter_nothing_is_swapped():
    model = make_model()
    started(model, kind="full")
    logits = model(IDS)
    for context in (adapters.merged, adapters.switched_off):
        with context(model):
            assert mx.array_equal(model(IDS), logits)


SPEC = f"nano+{shipped('adapters') / 'nano-epoch1'}"
SHORT = ("--task", "countdown", "--max-tokens", 8)
JUDGED = ("--judge-failures", 1, "--judge-max-tokens", 8)
COMMANDS = {
    "eval": ("--model", SPEC, *SHORT, "--limit", 3, "--out", "run"),
    "generate": ("--model", SPEC, *SHORT, "--limit", 2, "--out", "own.jsonl"),
    "score": ("traces.jsonl", "--out", "scored.jsonl", "--model", SPEC, "--judge", SPEC, *JUDGED),
    "reformat": ("traces.jsonl", "--out", "sky.jsonl", "--to", "sky-t1", "--model", SPEC, "--max-tokens", 8),
    "sft": ("--data", "traces.jsonl", "--out", "run", "--batch-size", 2, "--rank", 2, "--valid-share", 0.5),
    "grpo": (*SHORT, "--num-steps", 1, "--prompts-per-step", 2, "--group-size", 2, "--rank", 2, "--out", "run"),
    "ppo": (*SHORT, "--num-steps", 1, "--prompts-per-step", 2, "--group-size", 2, "--rank", 2, "--out", "run"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_samples_with_the_adapter_apart(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = countdown_traces(4, "train", 3, prompts=[TASK.prompt("direct")])
    write_traces(tmp_path / "traces.jsonl", made, {"source": "solver", "config": {}, "counts": {}, "seed": 3})
    seen, begin, read = [], generation._Engine.__init__, perplexity.token_logprobs

    def look(model):
        """Note of which kind the layers are, which have names of their own where an adapter is apart."""
        seen.append({type(layer).__name__ for name, layer in model.named_modules() if name.endswith("q_proj")})

    def sampled(engine, loaded, *given, **named):
        look(loaded.model)
        begin(engine, loaded, *given, **named)

    def scored(halves, *given, **named):
        look(halves.trunk)
        return read(halves, *given, **named)

    monkeypatch.setattr(generation._Engine, "__init__", sampled)
    monkeypatch.setattr(perplexity, "token_logprobs", scored)
    result = call(command, *COMMANDS[command])
    assert result.exit_code == (command == "reformat"), result.output  # nano rewrites nothing well
    assert len(seen) >= (2 if command == "score" else 1) and seen == [{"Linear"}] * len(seen)


def test_what_is_trained():
    model = make_model()
    started(model, layers=1, targets=["self_attn.q_proj"], scale=7.0, dropout=0.25)
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert names == {f"model.layers.1.self_attn.q_proj.lora_{which}" for which in "ab"}
    layer = model.layers[1].self_attn.q_proj
    assert layer.lora_a.shape == (64, 4) and layer.scale == 7.0 and layer.dropout._p_1 == 0.75
    assert not layer.lora_b.any() and layer.lora_a.any()
    dora = make_model()
    started(dora, kind="dora", targets=["self_attn.q_proj"])
    assert "model.layers.0.self_attn.q_proj.m" in dict(tree_flatten(dora.trainable_parameters()))
    full = make_model()
    started(full, kind="full", layers=1)
    assert {name.split(".")[2] for name, _ in tree_flatten(full.trainable_parameters())} == {"1"}
    same, other = make_model(), make_model()
    started(same, layers=1)
    mx.random.seed(2)
    adapters.start(other, AdapterConfig(rank=4, layers=1))
    a = [model.layers[1].mlp.up_proj.lora_a for model in (same, other)]
    assert not mx.array_equal(*a)


def experts():
    return qwen2_moe.Model(
        qwen2_moe.ModelArgs.from_dict(
            make_config(
                model_type="qwen2_moe",
                num_experts_per_tok=2,
                num_experts=4,
                moe_intermediate_size=32,
                shared_expert_intermediate_size=32,
                tie_word_embeddings=False,
            )
        )
    )


def test_targets_among_experts():
    moe = experts()
    started(moe, targets=["mlp.switch_mlp.up_proj"])
    assert len(tree_flatten(moe.trainable_parameters())) == 4
    with pytest.raises(UserError, match="doesn't support DoRA"):
        started(experts(), kind="dora")


def incomplete():
    """Return a model as mlx_lm's RecurrentGemma, whose constructor is not its base class's."""
    model = make_model()
    del model._no_grad
    return model


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (quantized, {"kind": "full"}, "full fine-tuning cannot train quantized weights; pass --weights dense"),
        (make_model, {"targets": ["self_attn.q"]}, "no module 'self_attn.q'; the layers have mlp.down_proj, "),
        (make_model, {"targets": ["mlp"]}, "no module 'mlp'"),
        (
            quantized,
            {"kind": "dora", "targets": ["model.embed_tokens"]},
            "^targets: 'model.embed_tokens' is quantized and takes no DoRA; pass --weights dense, or --kind lora$",
        ),
        (
            fused_projections,
            {"kind": "dora"},
            "^mlx_lm's class of this model does not run with the adapter .*; set other targets, or --kind full$",
        ),
        (incomplete, {}, "^mlx_lm's class of this model cannot be trained .*'_no_grad'.; take another model$"),
    ],
)
def test_what_cannot_be_trained(make, settings, message):
    with pytest.raises(UserError, match=message):
        started(make(), **settings)


@pytest.mark.parametrize("layers", [0, 3])
def test_only_as_many_layers_as_there_are(layers):
    with pytest.raises(UserError, match=f"layers: this model has 2, not {layers}; -1 stands for all"):
        adapters.start(make_model(), AdapterConfig(layers=layers))
