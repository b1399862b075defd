"""Factories that several tests share: tiny models and tokenizers, traces, runs, trainings; comparisons of outcomes."""

import io
import json
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten
from mlx_lm.models import qwen2
from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_traces.cli import main
from mlx_traces.config import AdapterConfig
from mlx_traces.engine import cpu_trunk
from mlx_traces.evaluation import completion
from mlx_traces.evaluation.comparison import Run
from mlx_traces.models import adapters
from mlx_traces.models.loading import LoadedModel
from mlx_traces.records import Problem, Stepped
from mlx_traces.records import Rollout as Sampled
from mlx_traces.rl import rollouts
from mlx_traces.runtime.device import Backend

# --------------------------------------------------------------------------------------------------------- models

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}"
    "{% elif m['role'] == 'system' %}{{ m['content'] }}"
    "{% else %}<|Assistant|>{{ m['content'].split('</think>')[-1] }}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
KNOWN = {  # architectures that `engine.fused` knows
    "qwen2": {},
    "qwen2-untied": {"tie_word_embeddings": False, "num_key_value_heads": 1},
    "llama": {"rope_scaling": _LLAMA3, "rope_theta": 10_000.0},
    "qwen3": {"head_dim": 32, "rope_theta": 10_000.0},  # heads wider than the hidden size is, norms of q and k
}


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
    return randomized(qwen2.Model(qwen2.ModelArgs.from_dict(make_config(**changes))), seed)


def save_model(folder: Path) -> Path:
    """Write the tiny random model and its tokenizer as a model folder; return it."""
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(make_model().parameters())))
    (folder / "config.json").write_text(json.dumps(make_config()))
    make_tokenizer().save_pretrained(folder)
    return folder


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


# ---------------------------------------------------------------------------------------------------------- traces

ONE = [{"role": "user", "content": "1+1"}]
PROMPT = "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
NATALIA = {
    "question": "Natalia sold clips to 48 friends in April, and half as many in May. How many altogether?",
    "answer": "In May 48/2 = <<48/2=24>>24 clips.\nAltogether 48+24 = <<48+24=72>>72 clips.\n#### 72",
}
SKY = {
    "system": "Structure your response into two main sections: Thought and Solution.",
    "conversations": [
        {"from": "user", "value": "Return your final response within \\boxed{}. What is $2+2$?"},
        {
            "from": "assistant",
            "value": "<|begin_of_thought|>\n\nTwo and two.\n\nWait, count: 3, 4.\n\n<|end_of_thought|>\n\n"
            "<|begin_of_solution|>\n\nThe sum is \\(\\boxed{4}\\).\n\n<|end_of_solution|>",
        },
    ],
}
SKY_NORMAL = "<think>\nTwo and two.\n\nWait, count: 3, 4.\n</think>\nThe sum is \\(\\boxed{4}\\)."
MANIFEST = {"source": "hand", "config": {"b": 1, "a": None}, "counts": {"skipped": Counter()}, "seed": 3}


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ------------------------------------------------------------------------------------------------ runs and tables


def make_run(name: str, correct: list, *, strata: tuple[str, ...] = ("",), extracted: str = "1", **result) -> Run:
    """Make a run from the outcomes of problems p0, p1, ...: 0 or 1, or a list of them for several samples."""
    rows = []
    for i, outcome in enumerate(correct):
        samples = outcome if isinstance(outcome, list) else [outcome]
        for k, right in enumerate(samples):
            rows.append(
                {
                    "id": f"p{i}",
                    "sample": k,
                    "question": f"question {i}",
                    "prompt": f"<user>question {i}",
                    "completion": "so ...",
                    "tokens": 10 + i,
                    "finish_reason": "length" if i == 0 else "stop",
                    "extracted": "42" if right else extracted,
                    "extractions": {"tolerant": "42", "strict": None},
                    "verdicts": {"tolerant": "correct" if right else "wrong_value", "strict": "no_answer"},
                    "gold": "42",
                    "correct": bool(right),
                    "verdict": "correct" if right else "wrong_value",
                    "stratum": strata[i % len(strata)],
                }
            )
    defaults = {
        "model": "org/nano",
        "adapter": None,
        "task": "gsm8k",
        "prompt": "plain",
        "extractor": "tolerant",
        "split": "test",
        "max_tokens": 400,
        "temperature": 0.0,
        "samples_per_problem": len(samples),
        "tokens_per_second": 123.4,
        "timestamp": "2025-01-01T00:00:00+00:00",
        "pass_at_k": {},
        "maj_at_k": {},
    }
    return Run(name, {**defaults, **result}, rows)


BASE = [1, 1, 0, 0, 0, 0, 0, 0]
BETTER = [1, 0, 1, 1, 1, 1, 1, 0]


def rendered(renderable, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def write_evaluation(path, correct, completion="<think>\nhm\n</think>\n5", finished=True, samples=1, **settings):
    """Write an evaluation of problems p0, p1, ...; every second one is of another difficulty."""
    path.mkdir(parents=True)
    identity = {"model": "nano", "adapter": None, "task": "countdown", "split": "test", "max_tokens": 64}
    identity |= {"temperature": 0.0, "limit": len(correct), "samples": samples, "prompt": {"name": "thinking"}}
    identity |= settings
    rows = []
    for i, right in enumerate(correct):
        verdict = "correct" if right else "wrong_value"
        rows.append(
            {"id": f"p{i // samples}", "sample": i % samples, "question": f"question {i}", "prompt": "?"}
            | {"completion": completion[i] if isinstance(completion, list) else completion, "tokens": 10 + i}
            | {"finish_reason": "stop", "extracted": "5", "extractions": {"answer": "5", "tolerant": "5"}}
            | {"verdicts": {"answer": verdict, "tolerant": "correct"}, "gold": "5", "correct": bool(right)}
            | {"verdict": verdict, "stratum": f"{3 + i // samples % 2} operands", "elapsed": float(i)}
        )
    (path / "run.json").write_text(json.dumps({"identity": identity, "command": "mlx-traces eval"}))
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        result = {key: identity[key] for key in ("model", "adapter", "task", "split", "max_tokens", "temperature")}
        result |= {"prompt": identity["prompt"]["name"], "extractor": "answer", "samples_per_problem": samples}
        (path / "result.json").write_text(json.dumps(result | {"tokens_per_second": 100.0, "notes": []}))
    return path


def write_training(path, steps=6, num_steps=10, finished=False, **identity):
    """Write a reinforcement run: reward step / 10, a validation at steps 0 and 4."""
    path.mkdir(parents=True)
    identity = {"model": "nano", "adapter": None, "num_steps": num_steps, "group_size": 8, **identity}
    (path / "run.json").write_text(json.dumps({"identity": identity, "notes": []}))
    rows = [{"step": 0, "valid/accuracy": 0.25}]
    for step in range(1, steps + 1):
        row = {"step": step, "reward/mean": step / 10, "reward/correct": step / 10, "loss": 1 / step, "tokens": 300}
        row |= {"policy/entropy": 0.5, "policy/new_thing": -step, "time/sample": 2.0, "time/update": 1.0}
        row |= {"time/total": 4.0 * step, "memory/peak_gb": 1.5}
        rows.append(row | ({"valid/accuracy": 0.5} if step == 4 else {}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = [
        {"step": 1, "kind": "best", "id": "p1", "question": "q", "completion": "<think>\nt\n</think>\n5"}
        | {
            "finish_reason": "stop",
            "tokens": 9,
            "reward": 1.2,
            "rewards": {"correct": 1.0, "format": 0.2},
            "gold": "5",
        },
        {"step": 4, "kind": "held out", "id": "p2", "question": "q", "completion": "6", "finish_reason": "length"}
        | {"verdict": "wrong_value", "correct": False, "gold": "7"},
    ]
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    if finished:
        result = {"steps": steps, "best_step": 4, "tokens_per_second": 100.0, "notes": ["a \x1b[31mred note"]}
        (path / "result.json").write_text(json.dumps(result))
    return path


# -------------------------------------------------------------------------------------------------- reinforcement


def capitals(completions):
    return [sum(c.isupper() for c in text) / max(len(text), 1) for text in completions]


def halves(completions):
    """Give both halves of a text the share of capital letters in them, as steps of one kind."""
    found = []
    for text in completions:
        spans, middle = [], len(text) // 2
        for start, end in ((0, middle), (middle, len(text))):
            if start < end:
                spans.append((start, end, sum(c.isupper() for c in text[start:end]) / (end - start)))
        found.append(Stepped(0.5 if text else None, {"capitals": spans}))
    return found


def level(completions):
    return [0.5] * len(completions)


def no_number(completions):
    return [float("nan")] * len(completions)


def make_known(kind, bits=None, dtype=mx.float32, **changes):
    """Make a tiny random model; its norms are not all ones."""
    architecture = kind.partition("-")[0]
    module = import_module(f"mlx_lm.models.{architecture}")
    config = make_config(model_type=architecture) | KNOWN[kind] | changes
    model = randomized(module.Model(module.ModelArgs.from_dict(config)), 4)
    random = np.random.default_rng(1)
    norms = [
        (n, mx.array(random.uniform(0.5, 1.5, a.shape))) for n, a in tree_flatten(model.parameters()) if "norm" in n
    ]
    model.load_weights([(name, array.astype(mx.float32)) for name, array in norms], strict=False)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def by_modules(monkeypatch):
    """Train by mlx_lm's modules on a CPU too, as on a GPU: the sums have the same order, to the last bit."""
    monkeypatch.setattr(cpu_trunk, "serves", lambda _: False)


def lora(seed=0, scale=0.1):
    model = make_model()
    mx.random.seed(seed)
    adapters.start(model, AdapterConfig(rank=4))
    arrays = [(k, scale * mx.random.normal(v.shape)) for k, v in tree_flatten(model.trainable_parameters())]
    model.load_weights(arrays, strict=False)
    return model


def made(reward, ids, finish="stop", prompt=(1, 2, 3), forced=()):
    logprobs = tuple(None if place in forced else -1.0 for place in range(len(ids)))
    sampled = Sampled(prompt, tuple(ids), "text", finish, logprobs, logprobs, forced=tuple(forced))
    return rollouts.ScoredCompletion(
        Problem("p", {}, "1"), completion.Completion.sampled("", "", sampled), {"correct": reward}, reward
    )


def assert_close(a, b, tolerance=1e-5):
    for (name, x), (_, y) in zip(tree_flatten(a), tree_flatten(b), strict=True):
        assert mx.abs(x - y).max().item() <= tolerance * max(mx.abs(y).max().item(), 1e-3), name


def outcome(out):
    """Return what must not depend on interruptions: weights, metrics, samples, the result."""
    lines = {
        name: [json.loads(line) for line in (out / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "samples.jsonl")
    }
    timeless = [
        {name: value for name, value in row.items() if not name.startswith(("time", "memory"))}
        for row in lines["metrics.jsonl"]
    ]
    result = json.loads((out / "result.json").read_text())
    arrays = {}
    for file in ("adapter/adapters.safetensors", "checkpoint.safetensors"):
        arrays |= {f"{file} {name}": np.array(array) for name, array in mx.load(str(out / file)).items()}
    return arrays, timeless, lines["samples.jsonl"], {k: result[k] for k in ("steps", "best_step", "accuracy", "notes")}


def assert_same_outcome(out, expected):
    arrays, *rest = outcome(out)
    assert rest == list(expected[1:])
    assert arrays.keys() == expected[0].keys()
    assert all(np.array_equal(arrays[name], expected[0][name]) for name in arrays)


class Killed(BaseException):
    """Stands for kill -9 within a test's own process."""


class Moments:
    """Counts the moments right before and after each call of some functions; a run can be killed at any of them.

    ``killed`` has the name of the function for each kill.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *functions: tuple[Any, str]):
        self.count, self.last, self.killed = 0, None, []
        for owner, name in functions:
            patch.setattr(owner, name, self._watched(getattr(owner, name), name))

    def _watched(self, whole: Callable, name: str) -> Callable:
        def watched(*args, **kwargs):
            self._pass(name)
            result = whole(*args, **kwargs)
            self._pass(name)
            return result

        return watched

    def _pass(self, name: str) -> None:
        self.count += 1
        if self.count == self.last:
            self.killed.append(name)
            raise Killed

    def live(self, train: Callable, *lives: int) -> None:
        """Begin a run, kill it after each number of moments and go on with it, and let it come to its end."""
        for life, self.last in enumerate((*lives, None)):
            self.count = 0
            with pytest.raises(Killed) if self.last else nullcontext():
                train(resume=life > 0)


# ---------------------------------------------------------------------------------- commands


def call(*arguments):
    """Call a command of mlx-traces in this process."""
    return CliRunner().invoke(main, list(map(str, arguments)), prog_name="mlx-traces")
