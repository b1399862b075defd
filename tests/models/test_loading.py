"""Models: weights exactly the folder's, adapters on top of them, folders that are no model named in a line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import yaml
from factories import make_config, make_known, make_model, make_tokenizer, wrap
from mlx.utils import tree_flatten
from mlx_lm.models.rope_utils import YarnRoPE

from mlx_traces.errors import UserError
from mlx_traces.models import loading
from mlx_traces.models.adapters import attach
from mlx_traces.models.loading import load, place
from mlx_traces.models.names import check, resolve
from mlx_traces.records import Problem
from mlx_traces.runtime.device import Backend
from mlx_traces.tasks.prompts import Prompt


def test_special_tokens_are_no_text_but_those_of_thoughts():
    from mlx_traces.engine.sampling import text_of

    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|END_RESPONSE|>"], special_tokens=True)
    tokenizer.add_tokens(["<tool>"])
    loaded = wrap(tokenizer)
    ids = loaded.tokenizer.encode("<think>a</think><tool>Paris<|END_RESPONSE|>")
    assert text_of(loaded, ids) == "<think>a</think><tool>Paris"
    assert text_of(loaded, ids, cut=20) == "<think>a</think><too"
    tokenizer.add_tokens(["<|channel|>", "<|end|>"], special_tokens=True)
    text = "<|channel|>a<|end|>b"
    assert text_of(wrap(tokenizer), loaded.tokenizer.encode(text)) == text  # gpt-oss's frames tell its messages apart


def test_stop_ids():
    tokenizer = make_tokenizer()
    known = tokenizer.get_vocab()
    assert loading._stop_ids(wrap(tokenizer).tokenizer) == {known["<|endoftext|>"], known["<|im_end|>"]}
    tokenizer.add_tokens(["<|end|>", "<end_of_turn>"], special_tokens=True)
    known = tokenizer.get_vocab()
    assert {known["<|end|>"], known["<end_of_turn>"]} < loading._stop_ids(wrap(tokenizer).tokenizer)
    tokenizer.add_tokens(["<|channel|>"], special_tokens=True)  # harmony: <|end|> closes a message, not the turn
    assert known["<|end|>"] not in loading._stop_ids(wrap(tokenizer).tokenizer)


def test_dense_weights_are_exactly_the_quantized_ones(tiny_folder):
    weights = mx.load(str(tiny_folder / "model.safetensors"))
    assert weights["model.layers.0.mlp.up_proj.scales"].dtype == mx.float16
    dense = load(str(tiny_folder), device="cpu", weights="dense", dtype="float32")
    parameters = dict(tree_flatten(dense.model.parameters()))
    assert not any(name.endswith("scales") for name in parameters)
    quantized = [name.removesuffix(".scales") for name in weights if name.endswith(".scales")]
    assert len(quantized) == 15  # seven linears in each of two layers, and the embedding
    for name in quantized:
        scales, biases = (weights[f"{name}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
        expected = mx.dequantize(weights[f"{name}.weight"], scales, biases, group_size=32, bits=4)
        assert parameters[f"{name}.weight"].dtype == mx.float32
        assert mx.array_equal(parameters[f"{name}.weight"], expected), name
        rounded = mx.dequantize(
            *(weights[f"{name}.{p}"] for p in ("weight", "scales", "biases")), group_size=32, bits=4
        )
        assert not mx.array_equal(parameters[f"{name}.weight"], rounded)  # the fixture would show a rounding
    kept = load(str(tiny_folder), device="cpu", weights="quantized")
    assert kept.backend.dtype == "float32" and "scales" in kept.model.model.embed_tokens
    ids = mx.array([[5, 6, 7, 8, 9, 10]])
    assert mx.allclose(dense.model(ids), kept.model(ids), rtol=1e-4, atol=1e-4)


def test_bfloat16_is_one_rounding_of_the_exact_weights(tiny_folder):
    exact = load(str(tiny_folder), device="cpu", weights="dense", dtype="float32").model
    rounded = load(str(tiny_folder), device="cpu", weights="dense", dtype="bfloat16").model
    for (name, a), (_, b) in zip(tree_flatten(exact.parameters()), tree_flatten(rounded.parameters()), strict=True):
        assert b.dtype == mx.bfloat16 and mx.array_equal(a.astype(mx.bfloat16), b), name


def test_load(tiny_folder):
    loaded = load(str(tiny_folder))
    vocabulary = make_tokenizer().get_vocab()
    assert loaded.stop_ids == {vocabulary["<|endoftext|>"], vocabulary["<|im_end|>"]}
    assert (loaded.context, loaded.revision, loaded.adapter, loaded.notes) == (512, None, None, [])
    assert loaded.name == str(tiny_folder) and loaded.path == tiny_folder
    text = "<|im_start|>user\nSTOP 12 + 3\n<think> it</think>"
    assert loaded.tokenizer.encode(text) == make_tokenizer().encode(text)
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}}, 131_072),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32_768}}, 131_072),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}}, 32_768),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": None}}, 32_768),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}}, 32_768),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}, "rope_scaling": None}, 32_768),
    ],
)
def test_yarn_may_stretch_the_context(rope, context):
    config, model = {"max_position_embeddings": 32_768, **rope}, nn.Sequential(YarnRoPE(8))
    assert loading._context(config, model) == loading._context({"text_config": config}, model) == context


@pytest.mark.parametrize(("kind", "context"), [("qwen3", 4096), ("qwen2", 512), ("llama", 512)])
def test_yarn_stretches_the_context_of_models_that_mlx_lm_builds_with_it(kind, context):
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}
    changes = {"rope_parameters": yarn, "rope_scaling": None}
    assert loading._context(make_config(**changes), make_known(kind, **changes)) == context


def test_model_without_chat_template_ends_at_the_next_turn(tiny_folder, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").unlink()
    assert load(str(folder)).stop_strings == ("\n\nUser:",)
    assert load(str(tiny_folder)).stop_strings == ()


def adapter(folder: Path, kind: str = "lora", seed: int = 0, hidden: int = 64) -> Path:
    """Write an adapter, all of whose tensors are random, for the tiny model."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = make_model(seed=1, hidden_size=hidden)
    settings = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
    linear_to_lora_layers(model, 2, settings, use_dora=kind == "dora")
    draw = mx.random.split(mx.random.key(seed), 100)
    tensors = {
        name: mx.random.normal(array.shape, scale=0.3, key=draw[at])
        for at, (name, array) in enumerate(tree_flatten(model.parameters()))
        if name.endswith((".lora_a", ".lora_b", ".m"))
    }
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("trained_on", "told"),
    [
        ("mlx-community/Other-0.5B-4bit", "mlx-community/Other-0.5B-4bit"),
        ("runs/a\nfused", "runs/a fused"),
        *((same, None) for same in ("me/Base-4bit@main", "elsewhere/base", "", 3, None)),
    ],
)
def test_an_adapter_of_another_base_is_told(tiny_folder, tmp_path, monkeypatch, trained_on, told):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    folder = adapter(tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "model": trained_on}))
    notes = [f"the adapter {folder} was trained on {told}"] if told else []
    assert load(str(base), str(folder)).notes == notes
    monkeypatch.chdir(base)
    assert load(".", str(folder)).notes == notes


@pytest.mark.parametrize("weights", ["dense", "quantized"])
def test_adapter_is_applied_unfused(tiny_folder, tmp_path, weights):
    folder = adapter(tmp_path / "a")
    tensors = mx.load(str(folder / "adapters.safetensors"))
    plain = load(str(tiny_folder), weights=weights).model
    adapted = load(str(tiny_folder), str(folder), weights=weights)
    assert adapted.adapter == str(folder)
    base = dict(tree_flatten(plain.parameters()))
    kept = {name.replace(".linear.", "."): array for name, array in tree_flatten(adapted.model.parameters())}
    assert all(mx.array_equal(array, kept[name]) for name, array in base.items())
    # One projection against the formula.
    layer, x = adapted.model.model.layers[1].self_attn.q_proj, mx.random.normal((3, 64), key=mx.random.key(1))
    name = "model.layers.1.self_attn.q_proj"
    expected = plain.model.layers[1].self_attn.q_proj(x) + 2.0 * (
        x @ tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]
    )
    assert mx.allclose(layer(x), expected, rtol=1e-4, atol=1e-4)
    ids = mx.array([[5, 6, 7]])
    assert not mx.allclose(plain(ids), adapted.model(ids), atol=0.1)
    assert yaml.safe_load("a: 1e-5") == {"a": "1e-5"}  # what importing mlx_lm.lora would have changed


def test_dora_and_spec(tiny_folder, tmp_path):
    folder = adapter(tmp_path / "a", kind="dora")
    loaded = load(f"{tiny_folder}+{folder}")
    assert (loaded.name, loaded.adapter) == (str(tiny_folder), str(folder))
    tensors = mx.load(str(folder / "adapters.safetensors"))
    assert mx.array_equal(loaded.model.model.layers[0].mlp.down_proj.m, tensors["model.layers.0.mlp.down_proj.m"])


def change(folder: Path, edit) -> None:
    """Edit an adapter's tensors in place."""
    tensors = dict(mx.load(str(folder / "adapters.safetensors")))
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "adapters.safetensors"), edit(tensors))


def test_adapter_that_does_not_fit(tmp_path):
    folder = adapter(tmp_path / "narrow", hidden=32)
    with pytest.raises(
        UserError, match=r"narrow: .*6 tensors of another shape, e\.g\. model\..*\(4, 32\) for \(4, 64\)"
    ):
        attach(make_model(), folder)
    folder = adapter(tmp_path / "missing")
    change(folder, lambda tensors: {n: t for n, t in tensors.items() if "layers.1.mlp" not in n})
    with pytest.raises(UserError, match=r"missing: .*2 tensors missing from the file, e\.g\. model\.layers\.1\.mlp"):
        attach(make_model(), folder)
    folder = adapter(tmp_path / "extra")
    change(folder, lambda tensors: {**tensors, "model.layers.9.q_proj.lora_a": mx.zeros((2, 2))})
    with pytest.raises(UserError, match=r"extra: .*1 tensors not in the model, e\.g\. model\.layers\.9"):
        attach(make_model(), folder)
    folder = adapter(tmp_path / "other")
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["lora_parameters"]["keys"] = ["attention.wqkv"]
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no layer of this model takes the adapter"):
        attach(make_model(), folder)


def test_full_adapter(tmp_path):
    folder = adapter(tmp_path / "full")
    (folder / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full"}))
    change(folder, lambda _: {"model.norm.weight": mx.full((64,), 2.0)})
    assert mx.array_equal(attach(make_model(), folder).model.norm.weight, mx.full((64,), 2.0))
    change(folder, lambda _: {"model.nrom.weight": mx.zeros((64,))})
    with pytest.raises(UserError, match=r"1 tensors not in the model, e\.g\. model\.nrom"):
        attach(make_model(), folder)


def test_adapter_folders_that_are_none(tiny_folder, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such adapter folder"):
        load(str(tiny_folder), str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"not an adapter folder, adapter_config\.json is missing"):
        load(str(tiny_folder), str(tmp_path))
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(UserError, match="a PEFT adapter"):
        load(str(tiny_folder), str(tmp_path))
    with pytest.raises(UserError, match="two adapters"):
        load(f"{tiny_folder}+{tmp_path}", str(tmp_path))


def test_adapter_in_the_home_folder(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = adapter(tmp_path / "ad")
    assert load(str(tiny_folder), "~/ad").adapter == load(f"{tiny_folder}+~/ad").adapter == str(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": "a"}, r"'scale' must be a number, not \"a\""),
        ({"dropout": 10**400}, r"'dropout' must be a number, 0 to 1, not 1000"),
        ({"scale": None}, "'scale' must be a number, it is missing"),
        ({"scale": None, "alpha": 16}, "'scale' is missing; mlx_lm does not read 'alpha'"),
        ({"rank": "4"}, r"'rank' must be a whole number above 0, not \"4\""),
        ({"rank": True}, "'rank' must be a whole number above 0, not true"),
        ({"dropout": 1}, "'dropout' must be a number, 0 to 1, not 1"),
        ({"keys": "q_proj"}, "'keys' must be a list of layer names"),
        ({"num_layers": "all"}, r"'num_layers' must be a whole number, not \"all\""),
        ({"lora_parameters": [1]}, "'lora_parameters' must be an object"),
        ({"fine_tune_type": "lokr"}, r"'fine_tune_type' is lora, dora or full, not \"lokr\""),
    ],
)
def test_adapter_settings_of_the_wrong_kind(tiny_folder, tmp_path, changes, message):
    folder = adapter(tmp_path / "a")
    settings = json.loads((folder / "adapter_config.json").read_text())
    for name, value in changes.items():
        (settings if name in (*settings, "num_layers") else settings["lora_parameters"])[name] = value
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    for refuse in (check, load):
        with pytest.raises(UserError, match=message) as caught:
            refuse(str(tiny_folder), str(folder))
        assert "\n" not in str(caught.value)


def test_adapter_weights_that_are_none(tiny_folder, tmp_path):
    folder = adapter(tmp_path / "a")
    whole = (folder / "adapters.safetensors").read_bytes()
    for content in (b"garbage", whole[:-100]):
        (folder / "adapters.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="a/adapters.safetensors: ") as caught:
            load(str(tiny_folder), str(folder))
        assert "\n" not in str(caught.value)


def test_check_reads_no_weights_and_asks_no_hub(tiny_folder, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    folder = adapter(tmp_path / "a")
    check("nano")
    check(str(tiny_folder), str(folder))
    check(f"org/model@v1+{folder}", None)
    for name, adapter_name, message in (
        ("nanno", None, "unknown model 'nanno'"),
        ("nano", str(tmp_path / "nowhere"), "nowhere: no such adapter folder"),
        ("nano+", None, "'': no such adapter folder"),
        ("org/model", str(tmp_path), r"adapter_config\.json is missing"),
        (f"nano+{folder}", str(folder), "two adapters"),
        (str(folder), None, "it is an adapter, pass it with --adapter"),
    ):
        with pytest.raises(UserError, match=message):
            check(name, adapter_name)
    (folder / "adapters.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapters\.safetensors is missing"):
        check("nano", str(folder))


def test_quantized_weights_on_cuda_are_told_of():
    model = make_model()
    assert place(model, Backend("cuda", "quantized", None, 80.0, "test")) == []  # there are none
    nn.quantize(model, group_size=32, bits=4)
    assert place(model, Backend("metal", "quantized", None, 80.0, "test")) == []
    (note,) = place(model, Backend("cuda", "quantized", None, 80.0, "test"))
    assert "stay quantized, which on CUDA is several times as slow" in note and "--weights dense" in note


def test_check_does_without_mlx(tmp_path):
    folder = adapter(tmp_path / "a")
    program = "import sys; from mlx_traces.models.names import check; check('nano', sys.argv[1])"
    program += "; print('mlx.core' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_hub_model_at_a_revision(monkeypatch, tiny_folder, tmp_path):
    import huggingface_hub

    asked = []
    snapshot = tmp_path / "snapshots" / "0123abc"
    shutil.copytree(tiny_folder, snapshot)

    def download(name, revision, **_):
        asked.append((name, revision))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("org/model@v1") == (snapshot, "0123abc")
    assert resolve("org/model") == (snapshot, "0123abc")
    assert asked == [("org/model", "v1"), ("org/model", None)]
    assert load("org/model@v1").name == "org/model@v1"


def test_folders_that_are_no_model(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    for name, message in (
        ("config.json", r"model: not a model folder, config\.json is missing"),
        ("model.safetensors", r"model\*\.safetensors is missing"),
        ("tokenizer.json", r"a tokenizer \(tokenizer\.json\) is missing"),
    ):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_folder, folder)
        (folder / name).unlink()
        with pytest.raises(UserError, match=message):
            load(str(folder))
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    shutil.rmtree(folder)
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model: not a model folder, model-00002-of-00002\.safetensors is missing"):
        load(str(folder))
    for other in ("[]", "{", '{"weight_map": {"a": {}}}', '{"weight_map": {"a": "/etc/passwd.safetensors"}}'):
        (folder / "model.safetensors.index.json").write_text(other)
        assert resolve(str(folder)) == (folder, None)
    with pytest.raises(UserError, match="it is an adapter, pass it with --adapter"):
        load(str(adapter(tmp_path / "adapter")))
    with pytest.raises(UserError, match="a file; a model is a folder"):
        load(str(tiny_folder / "config.json"))
    with pytest.raises(UserError, match="a folder has no revisions"):
        load(f"{tiny_folder}@main")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", r"config\.json is not JSON"),
        ("config.json", "{}", "no 'model_type'"),
        ("config.json", '{"model_type": "nosuch"}', r"cannot be loaded \(.*nosuch"),
        ("config.json", '{"model_type": ["qwen2"]}', "no 'model_type'"),
        ("config.json", '{"model_type": "qwen2"}', r"cannot be loaded \(.+\); copy or download it anew"),
        ("config.json", '{"model_type": "qwen2", "hidden_size": "a"}', "cannot be loaded"),
        ("model.safetensors", "garbage", "cannot be loaded"),
        ("tokenizer.json", "{", "its tokenizer cannot be loaded"),
        ("tokenizer.json", "{}", r"its tokenizer cannot be loaded \(.*\); copy or download it anew"),
        ("tokenizer_config.json", "[]", "its tokenizer cannot be loaded"),
    ],
)
def test_broken_model_folders(tiny_folder, tmp_path, file, content, message):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


def test_weights_that_were_cut_off(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


def test_code_that_comes_with_a_model(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "config.json").write_text(json.dumps(make_config(model_file="own.py")))
    (folder / "own.py").write_text("raise NotImplementedError('first\\nsecond')")
    with pytest.raises(UserError, match="pass --trust-remote-code if you trust it"):
        load(str(folder))
    with pytest.raises(UserError, match=r"cannot be loaded \(first\)"):
        load(str(folder), trust_remote_code=True)


def test_bad_values_are_refused_before_the_model_is_read():
    for arguments in ({"weights": "4bit"}, {"dtype": "int8"}, {"device": "tpu"}):
        with pytest.raises(UserError, match="unknown"):
            load("nowhere/at-all", **arguments)


@pytest.mark.real_model
def test_real_model_dense_equals_quantized(real_model):
    prompt = Prompt("plain", "{question}", system="Be brief.")
    dense = load(str(real_model), device="cpu", weights="dense", dtype="float32")
    rendered = dense.render(prompt, Problem("1", {"question": "2 + 2?"}, "4"))
    assert rendered.text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    kept = load(str(real_model), device="cpu", weights="quantized", dtype="float32")
    ids = mx.array([rendered.ids])
    ours, theirs = (np.array(m.model(ids)[0, -1]) for m in (dense, kept))
    assert np.abs(ours - theirs).max() < 1e-3 and ours.std() > 1
    assert dense.stop_ids == kept.stop_ids and dense.tokenizer.eos_token_id in dense.stop_ids
