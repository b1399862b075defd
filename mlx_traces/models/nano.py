"""``nano``, the embedded model: made from scratch by ``mlx-traces nano build``, in minutes, on any machine.

A Qwen2 model of under a million parameters that knows one game, Countdown, in two prompt styles. It stands in for a
language model, so that every loop of this package runs anywhere, offline. It is left part-trained, so that those loops
can improve it. Two things make it learn in minutes: numbers are single tokens whose embeddings start as cos and sin of
2 pi n / p, so addition is a rotation from the first step; and the traces search in a fixed order.
"""

import json
import math
import random
import shutil
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_traces.config import NanoConfig
from mlx_traces.errors import UserError, first_line
from mlx_traces.runtime.files import put_in_place, scratch_folder
from mlx_traces.tasks.countdown import PROMPTS, generate
from mlx_traces.tasks.prompts import Message
from mlx_traces.tasks.solver import TRACE_LIMIT, solved

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTEXT = 2048  # tokens
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FRAGMENTS = (
    *("user\n", "assistant\n", "system\n", "<think>\n", "\n</think>\n", "<answer>", "</answer>", ", "),
    *(" + ", " - ", " * ", " / ", " = ", " no\n", " yes", " leaves "),
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
    """Yield the text between the placeholders of the two prompts that nano is taught."""
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
    """Return (count, size) float32: n as a point on one circle per period, scaled as embeddings are (0.1 each)."""
    angles = 2 * math.pi * np.arange(count)[:, None] / np.array(PERIODS)[None, :]
    waves = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)[:, :size]
    return mx.array(0.1 * np.pad(waves, ((0, 0), (0, size - waves.shape[1]))).astype(np.float32))


def conversations(config: NanoConfig) -> Iterator[tuple[list[Message], str]]:
    """Yield (messages, completion) of training problems, each once; UserError when there are no more."""
    draw = random.Random(f"{config.seed} nano styles")
    for nums, target in generate("train", 10**9, config.seed, config.operands):
        style = "direct" if draw.random() < config.direct_share else "thinking"
        if (example := solved(PROMPTS[style], nums, target)) is not None:
            yield example


def examples(config: NanoConfig, tokenizer) -> Iterator[tuple[list[int], int]]:
    """Yield (token ids, prompt length) of training examples, the stop token included, each problem once."""
    for messages, completion in conversations(config):
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        completion_ids = tokenizer.encode(completion + STOP, add_special_tokens=False)
        yield prompt_ids + completion_ids, len(prompt_ids)


def batches(config: NanoConfig, tokenizer) -> Iterator[tuple[mx.array, mx.array]]:
    """Yield (ids (B, T) int32, mask (B, T - 1): 1 where the next token is the completion's), lengths kept together."""
    stream = islice(examples(config, tokenizer), config.problems)
    draw = random.Random(f"{config.seed} nano batches")
    while chunk := list(islice(stream, 64 * config.batch_size)):
        chunk.sort(key=lambda example: len(example[0]))
        groups = [chunk[i : i + config.batch_size] for i in range(0, len(chunk), config.batch_size)]
        draw.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            ids, mask = np.zeros((len(group), width), np.int32), np.zeros((len(group), width - 1), np.float32)
            for row, (tokens, start) in enumerate(group):
                ids[row, : len(tokens)] = tokens
                mask[row, start - 1 : len(tokens) - 1] = 1
            yield mx.array(ids), mx.array(mask)


def loss_of(model: nn.Module, ids: mx.array, mask: mx.array) -> mx.array:
    """Return the mean cross-entropy of the completions' tokens, in nats."""
    losses = nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:])
    return (losses * mask).sum() / mask.sum()


def check_sizes(config: NanoConfig) -> None:
    """Raise UserError, naming the setting, for sizes that no model has or that cannot be quantized."""
    group, heads, kv_heads = config.quant_group_size, config.heads, config.kv_heads
    groups = f"quant_group_size ({group})"
    for name, size, part, what in (
        ("heads", heads, kv_heads, f"kv_heads ({kv_heads})"),
        ("hidden_size", config.hidden_size, math.lcm(2 * heads, group), f"twice heads ({heads}) and of {groups}"),
        ("intermediate_size", config.intermediate_size, group, groups),
    ):
        if size % part:
            raise UserError(f"{name}: {size} is not a multiple of {what}; {-(-size // part) * part} is")


def check_problems(config: NanoConfig) -> None:
    """Raise UserError, with the number of problems, if more are asked for than exist."""
    found = 0
    try:
        for _ in islice(conversations(config), config.problems):
            found += 1
    except UserError:
        if not found:
            raise  # there are none for another reason
        low, high = config.operands
        raise UserError(
            f"problems: only {found:,} of {low} to {high} numbers were found, not {config.problems:,}; "
            "ask for no more, or for problems of more numbers (operands)"
        ) from None


def build(config: NanoConfig, progress=lambda step, steps, loss: None) -> Path:
    """Train nano and write it, quantized, to ``config.out`` as a folder that ``mlx_lm.load`` reads.

    The folder appears when it is complete; a build that is cut off leaves none.

    Raises:
        UserError: before training, if sizes do not fit together, the folder exists or cannot be written, or there are
            fewer problems.
    """
    check_sizes(config)
    out = Path(config.out)
    scratch = scratch_folder(out)
    try:
        check_problems(config)
        _train(config, scratch, progress)
        put_in_place(scratch, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}); choose another --out") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def _train(config: NanoConfig, folder: Path, progress) -> None:
    """Train the model, quantize it and write it to an existing folder."""
    from mlx_lm.utils import save_model

    tokenizer = build_tokenizer()
    model, settings = build_model(config, tokenizer)
    steps = math.ceil(config.problems / config.batch_size)
    warm = optim.linear_schedule(0.0, config.learning_rate, max(config.warmup_steps, 1))
    cosine = optim.cosine_decay(config.learning_rate, max(steps - config.warmup_steps, 1))
    optimizer = optim.AdamW(
        optim.join_schedules([warm, cosine], [config.warmup_steps]),
        betas=[0.9, 0.98],
        weight_decay=config.weight_decay,
    )
    value_and_grad = nn.value_and_grad(model, loss_of)
    model.train()
    for step, (ids, mask) in enumerate(batches(config, tokenizer), 1):
        loss, grads = value_and_grad(model, ids, mask)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state, loss)
        progress(step, steps, loss.item())
    model.eval()
    model.set_dtype(mx.float16)
    nn.quantize(model, config.quant_group_size, config.bits)
    settings["quantization"] = {"group_size": config.quant_group_size, "bits": config.bits, "mode": "affine"}
    try:
        save_model(folder, model)
    except RuntimeError as error:  # MLX's word for a disk that is full
        raise OSError(first_line(error)) from None
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    tokenizer.save_pretrained(folder)
