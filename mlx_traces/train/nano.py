"""``nano``, the embedded model: made from scratch by ``mlx-traces nano build``.

A Qwen2 model of under a million parameters that knows one game, Countdown with three numbers, in two prompt styles. It
stands in for a language model, so that every loop of this package runs anywhere, offline. It learns in two stages, each
on a schedule that ends. In the first it learns arithmetic: searches in which every equation is true. In the second it
learns to give up too early, so that those loops can improve it. Two things make it learn fast: numbers are single
tokens whose embeddings start as cos and sin of 2 pi n / p, so addition is a rotation from the first step; and the
traces search in a fixed order and leave nothing out.
"""

import json
import math
import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_traces.config import NanoConfig
from mlx_traces.errors import UserError, first_line
from mlx_traces.runtime.files import put_in_place, scratch_folder
from mlx_traces.tasks.countdown import PROMPTS, generate
from mlx_traces.tasks.solver import TRACE_LIMIT, impatience, solved
from mlx_traces.train import checkpoints
from mlx_traces.train.optimizer import make_optimizer

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTEXT = 1024  # tokens
CHUNK = 1024  # sequences that are made and sorted by length together
SAVE_EVERY = 16  # chunks between two checkpoints
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FRAGMENTS = (
    *("user\n", "assistant\n", "system\n", "<think>\n", "\n</think>\n", "<answer>", "</answer>", ", "),
    *(" + ", " - ", " * ", " / ", " = ", " no\n", " yes", "near "),
)
PERIODS = (2, 3, 4, 5, 7, 9, 10, 11, 13, 17, 20, 23, 29, 37, 50, 73, 100, 201)


def build_tokenizer():
    """Make the tokenizer: 256 bytes, the numbers 0 to 200, and the fixed parts of prompts and traces, one token each.

    All other text is spelled in bytes, so any text can be encoded. The fixed parts are added tokens: those are matched
    before the pre-tokenizer, which transformers replaces by Qwen's own for this architecture.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True) for text in (END, START, STOP)])
    plain = partial(AddedToken, special=False, normalized=False)
    core.add_tokens([plain(str(n), single_word=True) for n in range(TRACE_LIMIT + 1)])
    core.add_tokens([plain(text) for text in dict.fromkeys((*FRAGMENTS, *_prompt_fragments()))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=STOP,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _prompt_fragments() -> Iterator[str]:
    """Yield the text around the placeholders of nano's two prompts."""
    for prompt in (PROMPTS["direct"], PROMPTS["thinking"]):
        rest = prompt.user.replace("{nums}", "[\0]").replace("{target}", "\0")
        yield from (part for part in rest.split("\0") if part)


def build_model(config: NanoConfig, tokenizer) -> tuple[nn.Module, dict[str, Any]]:
    """Make the untrained model and its ``config.json``."""
    from mlx_lm.models import qwen2

    settings = dict(
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        hidden_act="silu",
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        torch_dtype="float16",
    )
    mx.random.seed(config.seed)
    model = qwen2.Model(qwen2.ModelArgs.from_dict(settings))
    embedding = 0.02 * mx.random.normal(model.model.embed_tokens.weight.shape)
    ids = mx.array([tokenizer.convert_tokens_to_ids(str(n)) for n in range(TRACE_LIMIT + 1)])
    embedding[ids] += number_features(TRACE_LIMIT + 1, config.hidden_size)
    model.model.embed_tokens.weight = embedding
    mx.eval(model.parameters())
    return model, settings


def number_features(count: int, size: int) -> mx.array:
    """Return (count, size) float32: row n has 0.1 cos and 0.1 sin of 2 pi n / p for each period p, then zeros."""
    angles = 2 * math.pi * np.arange(count)[:, None] / np.array(PERIODS)[None, :]
    waves = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)[:, :size]
    return mx.array(0.1 * np.pad(waves, ((0, 0), (0, size - waves.shape[1]))).astype(np.float32))


@dataclass(frozen=True)
class Stage:
    """A stage of training: its number of sequences, how often the teacher gives up (`impatience`), its peak rate."""

    name: str
    sequences: int
    give_up: float
    daunting: float
    learning_rate: float


def stages(config: NanoConfig) -> tuple[Stage, Stage]:
    """Return the stages of a build, in order."""
    return (
        Stage("arithmetic", config.sequences, config.give_up, 0, config.learning_rate),
        Stage("policy", config.policy_sequences, 0, config.policy_daunting, config.policy_learning_rate),
    )


def problems(config: NanoConfig) -> list[tuple[list[int], int]]:
    """Return the training problems (nums, target) of both stages.

    Raises:
        UserError: with their number, if there are fewer than ``config.problems``.
    """
    found = []
    try:
        for problem in generate("train", config.problems, config.seed, config.operands):
            found.append(problem)
    except UserError:
        if not found:
            raise  # there are none for another reason
        low, high = config.operands
        raise UserError(
            f"problems: only {len(found):,} of {low} to {high} numbers were found, not {config.problems:,}; "
            "lower problems, or allow more numbers (operands)"
        ) from None
    return found


def examples(
    config: NanoConfig, stage: Stage, pool: list[tuple[list[int], int]], start: int, tokenizer
) -> list[tuple[list[int], int]]:
    """Return (token ids, prompt length) of a chunk: sequences ``start`` to ``start + CHUNK`` of a stage.

    A stage makes several passes over the problems; in each the solver gives up at other places, and other problems have
    the prompt ``direct``. A chunk depends only on the arguments. A problem without a short trace gives no example.
    """
    draw = random.Random(f"{config.seed} {stage.name} {start}")
    gives_up = impatience(stage.give_up, stage.daunting, draw)
    made = []
    for number in range(start, min(start + CHUNK, stage.sequences)):
        nums, target = pool[number % len(pool)]
        style = PROMPTS["direct" if draw.random() < config.direct_share else "thinking"]
        patient = style.name == "direct" and not stage.daunting  # the first stage's direct answers are all right
        if (example := solved(style, nums, target, None if patient else gives_up)) is not None:
            prompt = tokenizer.apply_chat_template(example[0], add_generation_prompt=True, tokenize=False)
            prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
            made.append((prompt_ids + tokenizer.encode(example[1] + STOP, add_special_tokens=False), len(prompt_ids)))
    return made


def batches(
    config: NanoConfig, stage: Stage, pool: list[tuple[list[int], int]], start: int, tokenizer
) -> Iterator[tuple[mx.array, mx.array]]:
    """Yield a chunk as batches of ids, (B, T) int32, and masks, (B, T - 1): 1 if the completion has the next token.

    A batch has examples of similar length.
    """
    chunk = sorted(examples(config, stage, pool, start, tokenizer), key=lambda example: len(example[0]))
    groups = [chunk[i : i + config.batch_size] for i in range(0, len(chunk), config.batch_size)]
    random.Random(f"{config.seed} {stage.name} batches {start}").shuffle(groups)
    for group in groups:
        width = max(len(ids) for ids, _ in group)
        ids, mask = np.zeros((len(group), width), np.int32), np.zeros((len(group), width - 1), np.float32)
        for row, (tokens, begin) in enumerate(group):
            ids[row, : len(tokens)] = tokens
            mask[row, begin - 1 : len(tokens) - 1] = 1
        yield mx.array(ids), mx.array(mask)


def loss_of(model: nn.Module, ids: mx.array, mask: mx.array) -> mx.array:
    """Return the mean cross-entropy of the completions' tokens, in nats."""
    losses = nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:])
    return (losses * mask).sum() / mask.sum()


def check_sizes(config: NanoConfig) -> None:
    """Raise UserError, naming the setting, for sizes that do not fit together or cannot be quantized."""
    group, heads, kv_heads = config.quant_group_size, config.heads, config.kv_heads
    groups = f"quant_group_size ({group})"
    for name, size, part, what in (
        ("heads", heads, kv_heads, f"kv_heads ({kv_heads})"),
        ("hidden_size", config.hidden_size, math.lcm(2 * heads, group), f"twice heads ({heads}) and of {groups}"),
        ("intermediate_size", config.intermediate_size, group, groups),
    ):
        if size % part:
            raise UserError(f"{name}: {size} is not a multiple of {what}; {-(-size // part) * part} is")


def build(config: NanoConfig, resume: bool = False, progress=lambda stage, step, steps, loss: None) -> Path:
    """Train nano and write it, quantized, to ``config.out`` as a folder that ``mlx_lm.load`` reads.

    That folder appears when it is complete. An interrupted build leaves a checkpoint in a folder beside it, whose name
    ends in ``.unfinished``; the same settings with ``resume`` continue from there and end with the same model.

    Raises:
        UserError: before training, if sizes do not fit together, the folder exists or cannot be written, there are
            fewer problems, or an unfinished build exists and is not to be resumed or has other settings.
    """
    check_sizes(config)
    out = Path(config.out)
    scratch = scratch_folder(out)
    unfinished = out.with_name(f"{out.name}.unfinished")
    try:
        if unfinished.exists() and not resume:
            raise UserError(f"{unfinished} exists; pass --resume to continue it, or remove it")
        pool = problems(config)
        unfinished.mkdir(exist_ok=True)
        _train(config, pool, unfinished, scratch, progress)
        put_in_place(scratch, out)
        shutil.rmtree(unfinished)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}); choose another --out") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):
            unfinished.rmdir()  # nothing was saved yet
    return out


def _train(config: NanoConfig, pool: list, unfinished: Path, folder: Path, progress) -> None:
    """Train the model stage by stage, quantize it and write it to an existing folder."""
    from mlx_lm.utils import save_model

    tokenizer = build_tokenizer()
    model, settings = build_model(config, tokenizer)
    value_and_grad = nn.value_and_grad(model, loss_of)
    model.train()
    for stage in stages(config):
        checkpoint = unfinished / f"{stage.name}.safetensors"
        starts = range(0, stage.sequences, CHUNK)
        steps = sum(math.ceil(min(CHUNK, stage.sequences - start) / config.batch_size) for start in starts)
        optimizer = make_optimizer(config.model_copy(update={"learning_rate": stage.learning_rate}), steps)
        state = {"settings": config.model_dump(mode="json", exclude={"out"}), "chunks": 0, "step": 0}
        if checkpoint.exists():
            state = _continued(checkpoint, checkpoints.load(checkpoint, model, optimizer), state["settings"])
        for start in starts[state["chunks"] :]:
            for ids, mask in batches(config, stage, pool, start, tokenizer):
                loss, grads = value_and_grad(model, ids, mask)
                _, update = optimizer.propose(model, grads)
                update()
                state["step"] += 1
                progress(stage.name, state["step"], steps, loss.item())
            state["chunks"] += 1
            if state["chunks"] % SAVE_EVERY == 0 or state["chunks"] == len(starts):
                checkpoints.save(checkpoint, model, optimizer, state)
    model.eval()
    model.set_dtype(mx.float16)
    nn.quantize(model, config.quant_group_size, config.bits)
    settings["quantization"] = {"group_size": config.quant_group_size, "bits": config.bits, "mode": "affine"}
    try:
        save_model(folder, model)
    except RuntimeError as error:  # MLX raises this if the disk is full
        raise OSError(first_line(error)) from None
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    tokenizer.save_pretrained(folder)


def _continued(checkpoint: Path, state: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's state; UserError if it was made with other settings."""
    for name, value in settings.items():
        if (before := state["settings"].get(name)) != value:
            raise UserError(
                f"{checkpoint.parent}: {name} was {before} when it began, now it is {value}; "
                "remove the folder, or choose another --out"
            )
    return state
