"""Shared fixtures: a tiny random model with its own tokenizer, and the real model's folder."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # tests run side by side, one thread each

import json
from dataclasses import replace
from pathlib import Path

import mlx_traces  # before mlx: it loads the fast BLAS

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import settings
from mlx.utils import tree_flatten
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_traces.models.loading import LoadedModel
from mlx_traces.runtime.device import Backend

assert mlx_traces
settings.register_profile("suite", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("suite")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


def make_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer of printable ASCII, two pairs of letters and the special tokens."""
    characters = [*(chr(code) for code in range(33, 127)), "Ġ", "Ċ"]  # as GPT-2 writes space and line feed
    merges = [("S", "T"), ("O", "P")]
    vocabulary = [*characters, *("".join(pair) for pair in merges)]
    bpe = Tokenizer(models.BPE({token: at for at, token in enumerate(vocabulary)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    tokenizer.chat_template = chat_template
    return tokenizer


def make_config(**changes) -> dict:
    """Return the configuration of a Qwen2 of two layers, hidden size 64."""
    return {
        "model_type": "qwen2",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": 128,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        **changes,
    }


def make_model(seed: int = 6, **changes) -> nn.Module:
    """Make a random float32 model whose greedy text wanders instead of repeating one token."""
    from mlx_lm.models import qwen2

    return randomized(qwen2.Model(qwen2.ModelArgs.from_dict(make_config(**changes))), seed)


def save_model(folder: Path) -> Path:
    """Write the tiny random model and its tokenizer as a model folder; return it."""
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(make_model().parameters())))
    (folder / "config.json").write_text(json.dumps(make_config()))
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


def randomized(model: nn.Module, seed: int) -> nn.Module:
    """Give a model large random weights, so that its greedy text wanders."""
    random = np.random.default_rng(seed)
    weights = [
        (name, array if "norm" in name else mx.array(random.normal(0, 0.3, array.shape).astype(np.float32)))
        for name, array in tree_flatten(model.parameters())
    ]
    model.load_weights(weights)
    model.eval()
    mx.eval(model.parameters())
    return model


def broken(model: nn.Module) -> nn.Module:
    """Put a NaN into the last weights that every token passes."""
    name, array = next(pair for pair in reversed(tree_flatten(model.parameters())) if "norm" in pair[0])
    model.load_weights([(name, array * mx.nan)], strict=False)
    return model


def wrap(tokenizer: PreTrainedTokenizerFast, model: nn.Module | None = None) -> LoadedModel:
    """Make a LoadedModel by hand."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    wrapped = TokenizerWrapper(tokenizer)
    vocabulary = tokenizer.get_vocab()
    return LoadedModel(
        model=model,
        tokenizer=wrapped,
        name="tiny",
        adapter=None,
        path=Path(),
        revision=None,
        config=make_config(),
        backend=Backend("cpu", "dense", "float32", 8.0, "test"),
        stop_ids=frozenset(vocabulary[token] for token in ("<|endoftext|>", "<|im_end|>") if token in vocabulary),
        context=512,
    )


@pytest.fixture(scope="session")
def _tiny() -> LoadedModel:
    return wrap(make_tokenizer(), make_model())


@pytest.fixture
def tiny(_tiny: LoadedModel) -> LoadedModel:
    """A tiny random model, float32, with a ChatML tokenizer."""
    return replace(_tiny, notes=[])


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model with 4-bit weights and float16 scales."""
    folder = tmp_path_factory.mktemp("models") / "tiny-4bit"
    folder.mkdir()
    model = make_model(seed=1)
    model.set_dtype(mx.float16)
    nn.quantize(model, group_size=32, bits=4)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    quantization = {"group_size": 32, "bits": 4, "mode": "affine"}
    (folder / "config.json").write_text(json.dumps(make_config(quantization=quantization)))
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def real_model() -> Path:
    """The folder named by MLX_TRACES_TEST_MODEL."""
    folder = os.environ.get("MLX_TRACES_TEST_MODEL")
    if not folder:
        pytest.skip("MLX_TRACES_TEST_MODEL names no model folder")
    return Path(folder)


@pytest.fixture
def real_templates() -> Path:
    """The folder named by MLX_TRACES_TEMPLATES."""
    folder = os.environ.get("MLX_TRACES_TEMPLATES")
    if not folder:
        pytest.skip("MLX_TRACES_TEMPLATES names no folder of chat templates")
    return Path(folder)
