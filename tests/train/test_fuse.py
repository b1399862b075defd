"""Fused models: the same logits up to rounding, loadable by mlx_lm, whole or not there."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten, tree_map

from mlx_traces.cli import main
from mlx_traces.config import AdapterConfig
from mlx_traces.errors import UserError
from mlx_traces.models import adapters, loading
from mlx_traces.train import fuse

IDS = mx.array([[5, 9, 30, 61, 12, 77, 20, 8]])


def make_adapter(base: Path, folder: Path, kind: str, targets: list[str] | None = None) -> Path:
    """Write an adapter of random weights that changes the model much."""
    loaded = loading.load(str(base), weights="dense", dtype="float32")
    mx.random.seed(3)
    settings = adapters.start(loaded.model, AdapterConfig(kind=kind, rank=4, targets=targets))
    random = np.random.default_rng(3)
    moved = tree_map(
        lambda array: array + mx.array(random.normal(0, 0.05, array.shape).astype(np.float32)),
        loaded.model.trainable_parameters(),
    )
    loaded.model.update(moved)
    adapters.save(loaded.model, folder, settings)
    return folder


def write_traces(path: Path) -> Path:
    rows = [
        {"id": str(i), "messages": [{"role": "user", "content": f"{i}+{i}?"}], "completion": f"{i}+{i}={2 * i}"}
        for i in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_the_fused_model_is_the_adapted_one_up_to_rounding(tiny_folder, tmp_path, kind):
    adapter = make_adapter(tiny_folder, tmp_path / "adapter", kind)
    unfused = loading.load(str(tiny_folder), str(adapter), weights="dense", dtype="float32").model(IDS)
    base = loading.load(str(tiny_folder), weights="dense", dtype="float32").model(IDS)
    result = fuse.fuse(str(tiny_folder), str(adapter), tmp_path / "fused")
    assert (result.bits, result.dtype, result.loss_fused) == (16, "float16", None)
    ours = loading.load(str(tmp_path / "fused"))
    away, change = mx.abs(ours.model(IDS) - unfused).max().item(), mx.abs(base - unfused).max().item()
    assert away < 0.02 * change, (away, change)  # 1 % is float16's rounding; each weight is checked below
    model, tokenizer = mlx_lm.load(str(tmp_path / "fused"))
    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {mx.float16}
    assert mx.abs(model(IDS).astype(mx.float32) - unfused).max().item() < 0.05 * change
    assert tokenizer.chat_template and ours.stop_ids == loading.load(str(tiny_folder)).stop_ids
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert "quantization" not in config and "quantization_config" not in config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "fused"]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_every_weight_is_rounded_once(tiny_folder, tmp_path, kind):
    adapter = make_adapter(tiny_folder, tmp_path / "adapter", kind, ["self_attn.q_proj"])
    fuse.fuse(f"{tiny_folder}+{adapter}", None, tmp_path / "fused")
    model = loading.load(str(tiny_folder), str(adapter), weights="dense", dtype="float32").model
    exact = {name: module.fuse() for name, module in model.named_modules() if "lora_a" in module}
    stored = mx.load(str(tmp_path / "fused" / "model.safetensors"))
    assert len(exact) == 2
    for name, layer in exact.items():
        assert mx.array_equal(stored[f"{name}.weight"], layer.weight.astype(mx.float16))


@pytest.mark.parametrize("bits", [8, 4])
def test_fewer_bits_keep_the_bases_layout_and_tell_the_change(tiny_folder, tmp_path, bits):
    adapter = make_adapter(tiny_folder, tmp_path / "adapter", "lora")
    data, out = write_traces(tmp_path / "traces.jsonl"), tmp_path / "fused"
    arguments = ["fuse", "--model", tiny_folder, "--adapter", adapter, "--out", out, "--bits", bits, "--data", data]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert f"warning: {bits} bits round weights" in result.stderr and "loss on" in result.stdout
    config = json.loads((out / "config.json").read_text())
    assert config["quantization"]["bits"] == bits and config["quantization"]["group_size"] == 32
    told = json.loads((out / "fused.json").read_text())
    model, _ = mlx_lm.load(str(out))
    assert "scales" in model.layers[0].self_attn.q_proj and model.layers[0].self_attn.q_proj.bits == bits
    change = told["loss_fused"] - told["loss_unfused"]
    assert told["tokens"] == 24 and f"{change:+.4f}" in result.stderr
    assert abs(change) < {8: 0.1, 4: 10}[bits] and told["loss_base"] != told["loss_unfused"]


def test_a_dense_base_is_quantized_by_groups_of_64(tmp_path, tiny_folder):
    dense = tmp_path / "dense"
    fuse.fuse(str(tiny_folder), str(make_adapter(tiny_folder, tmp_path / "a", "lora")), dense)
    adapter = make_adapter(dense, tmp_path / "b", "lora")
    result = fuse.fuse(str(dense), str(adapter), tmp_path / "c", 4, write_traces(tmp_path / "t.jsonl"))
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"} and result.loss_fused > 0
    assert fuse.warning(result).startswith("4 bits round")


def test_what_is_refused(tiny_folder, tmp_path):
    adapter = make_adapter(tiny_folder, tmp_path / "adapter", "lora")
    (tmp_path / "there").mkdir()
    for arguments, message in (
        ((adapter, tmp_path / "there"), "there exists"),
        ((adapter, tmp_path / "new", 7), "bits: 7"),
        ((adapter, tmp_path / "new", 4), "pass --data FILE"),
        ((None, tmp_path / "new"), "no adapter to fuse"),
        ((tmp_path / "nowhere", tmp_path / "new"), "no such adapter folder"),
        ((adapter, tmp_path / "adapter" / "adapters.safetensors" / "x"), "cannot be written"),
    ):
        adapter_folder, *rest = arguments
        with pytest.raises(UserError, match=message):
            fuse.fuse(str(tiny_folder), adapter_folder and str(adapter_folder), *rest)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "there"]


def test_an_adapter_that_overflows_leaves_no_folder(tiny_folder, tmp_path):
    adapter = make_adapter(tiny_folder, tmp_path / "adapter", "lora")
    weights = mx.load(str(adapter / "adapters.safetensors"))
    mx.eval(weights)  # before its file is replaced
    mx.save_safetensors(str(adapter / "adapters.safetensors"), {name: 1e4 * array for name, array in weights.items()})
    with pytest.raises(UserError, match="does not fit float16"):
        fuse.fuse(str(tiny_folder), str(adapter), tmp_path / "fused")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_layers_without_an_adapter_keep_their_quantized_weights(tiny_folder, tmp_path):
    adapter = make_adapter(tiny_folder, tmp_path / "adapter", "lora", ["self_attn.q_proj"])
    fuse.fuse(str(tiny_folder), str(adapter), tmp_path / "fused", 4, write_traces(tmp_path / "traces.jsonl"))
    before = mx.load(str(tiny_folder / "model.safetensors"))
    after = mx.load(str(tmp_path / "fused" / "model.safetensors"))
    assert {name for name in after if after[name].dtype == mx.float32} == set()
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed and all("q_proj" in name for name in changed)


@pytest.mark.parametrize(("kind", "targets"), [("full", None), ("dora", ["model.embed_tokens"])])
@pytest.mark.parametrize("bits", [16, 4])
def test_adapters_of_dense_weights_fit_a_quantized_base(tiny_folder, tmp_path, monkeypatch, kind, targets, bits):
    """Also where weights stay quantized unless told otherwise, as on Metal; the base's layout stays."""
    base, choose = tmp_path / "base", loading.choose
    monkeypatch.setattr(loading, "choose", lambda a, weights, *rest: choose(a, weights or "quantized", *rest))
    shutil.copytree(tiny_folder, base)
    model, _ = mlx_lm.utils.load_model(base)
    model.layers[1].mlp.down_proj = nn.Linear(128, 64, bias=False)  # dense in the base
    mlx_lm.utils.save_model(base, model)
    adapter = make_adapter(base, tmp_path / "adapter", kind, targets)
    with pytest.raises(UserError, match="pass --weights dense"):
        loading.load(str(base), str(adapter))
    unfused = loading.load(str(base), str(adapter), weights="dense", dtype="float32").model(IDS)
    result = fuse.fuse(str(base), str(adapter), tmp_path / "fused", bits, write_traces(tmp_path / "traces.jsonl"))
    assert result.loss_fused == pytest.approx(result.loss_unfused, abs=0.02 if bits == 16 else 3)
    assert (result.loss_base is None) == (kind == "full")
    stored = {name for name in mx.load(str(tmp_path / "fused" / "model.safetensors")) if name.endswith(".scales")}
    scales = {name for name in mx.load(str(base / "model.safetensors")) if name.endswith(".scales")}
    assert stored == (scales if bits == 4 else set()) and scales
    if bits == 16:
        assert mx.abs(loading.load(str(tmp_path / "fused")).model(IDS) - unfused).max().item() < 0.1
