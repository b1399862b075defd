"""Adapters that are started, trained, saved, left out and merged, and read by mlx_lm."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from factories import make_config, make_model, make_tokenizer
from mlx.utils import tree_flatten

from mlx_traces.config import AdapterConfig
from mlx_traces.errors import UserError
from mlx_traces.models import adapters, loading

IDS = mx.array([[5, 9, 17, 40, 3], [88, 2, 2, 61, 30]])


def quantized(**changes):
    model = make_model(**changes)
    nn.quantize(model, group_size=32, bits=4)
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
        ({"rank": 8}, r"rank 8 is not that of .* \(3\)"),
        ({"scale": 2.0}, r"scale 2.0 is not that of .* \(20.0\)"),
        ({"layers": -1}, r"layers -1 is not that of .* \(1\)"),
        ({"kind": "dora"}, r"kind dora is not that of .* \(lora\)"),
        ({"targets": ["self_attn.q_proj"]}, r"targets .* is not that of .* \(None\)"),
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


def test_merging_leaves_what_would_be_rounded():
    for model in (quantized(), make_model()):
        if "scales" not in model.layers[0].self_attn.q_proj:
            model.set_dtype(mx.float16)
        started(model)
        shake(model)
        logits = model(IDS)
        with adapters.merged(model):
            assert "lora_a" in model.layers[0].self_attn.q_proj
            assert mx.array_equal(model(IDS), logits)


def test_without_an_adapter_nothing_is_swapped():
    model = make_model()
    started(model, kind="full")
    logits = model(IDS)
    for context in (adapters.merged, adapters.switched_off):
        with context(model):
            assert mx.array_equal(model(IDS), logits)


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


def test_targets_among_experts():
    from mlx_lm.models import qwen2_moe

    def model():
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

    moe = model()
    started(moe, targets=["mlp.switch_mlp.up_proj"])
    assert len(tree_flatten(moe.trainable_parameters())) == 4
    with pytest.raises(UserError, match="doesn't support DoRA"):
        started(model(), kind="dora")


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (quantized, {"kind": "full"}, "full fine-tuning cannot train quantized weights; pass --weights dense"),
        (make_model, {"targets": ["self_attn.q"]}, "no module 'self_attn.q'; the layers have mlp.down_proj, "),
        (make_model, {"targets": ["mlp"]}, "no module 'mlp'"),
    ],
)
def test_what_cannot_be_trained(make, settings, message):
    with pytest.raises(UserError, match=message):
        started(make(), **settings)


@pytest.mark.parametrize("layers", [0, 3])
def test_only_as_many_layers_as_there_are(layers):
    with pytest.raises(UserError, match=f"layers: this model has 2, not {layers}; -1 stands for all"):
        adapters.start(make_model(), AdapterConfig(layers=layers))
