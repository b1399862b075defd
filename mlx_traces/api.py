"""The Python API beside ``mlx_traces.evaluate`` and ``mlx_traces.compare``: one function a step.

Each is an attribute of ``mlx_traces`` itself. Settings are the fields of the command's pydantic model in
``mlx_traces.config``, named as the command's flags. For wrong input every function raises `UserError`, one line that
says where, what, and the way out.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mlx_traces.config import AnswerConfig, GRPOConfig, PPOConfig, SFTConfig, build, given
from mlx_traces.engine.generation import generate as complete
from mlx_traces.engine.sampling import Request, SamplingParams
from mlx_traces.errors import UserError
from mlx_traces.models.adapters import merged
from mlx_traces.models.loading import LoadedModel, load
from mlx_traces.records import Rollout
from mlx_traces.rl import grpo, ppo
from mlx_traces.rl.trainer import Result
from mlx_traces.tasks.prompts import Message
from mlx_traces.train import sft
from mlx_traces.train.sft import SFTResult

__all__ = ["generate", "load", "train_grpo", "train_ppo", "train_sft"]


def generate(
    model: LoadedModel | str | Path,
    prompts: Sequence[str | Sequence[Message]],
    *,
    max_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    stop: Sequence[str] = (),
    stop_in_thoughts: bool = False,
    thinking: bool | None = None,
    think_tokens: int | None = None,
    think_at_least: int = 0,
    think_more: str = "Wait",
    think_then: str = "",
    rows: int | None = None,
    seed: int = 0,
    logprobs: bool = False,
) -> list[Rollout]:
    """Complete prompts in the model's chat template, in batches of ``rows``.

    Args:
        model: a model from `load`, or its name or folder.
        prompts: each a user's text, or a conversation of ``{"role", "content"}`` turns.
        max_tokens: maximum length of a completion, in tokens.
        temperature: 0 is greedy.
        top_p: nucleus sampling.
        top_k: sample from the k most probable tokens; 0: from all.
        min_p: drop tokens below this fraction of the top token's probability.
        stop: texts that end a completion, after its thought.
        stop_in_thoughts: let these texts end a completion within its thought too.
        thinking: the template's thinking switch; ``None`` leaves it at its default.
        think_tokens: budget of a thought, in tokens; then it is closed, and ``max_tokens`` bounds the answer alone.
        think_at_least: minimum length of a thought, in tokens; ``think_more`` replaces an earlier end.
        think_more: text that continues a thought below ``think_at_least``.
        think_then: text that begins the answer after ``think_tokens`` has closed the thought.
        rows: batch size of decoding; default: that of ``mlx-traces eval`` on this device, 32 on a CPU.
        seed: prompt number i is sampled with ``seed + i``, whatever else is in the batch.
        logprobs: also keep each token's float32 log-probability, in nats.

    Returns:
        A rollout for each prompt, in order: ``text``, ``completion_ids``, ``finish_reason``, ``logprobs``.
    """
    for name, value in (("prompts", prompts), ("stop", stop)):
        if isinstance(value, str):
            raise UserError(f"{name}: must be a list of texts, not the text {value[:60]!r}; put it in a list")
        if not isinstance(value, Iterable):
            raise UserError(f"{name}: must be a list of texts, not {str(value)[:60]!r}; give [] for none")
    stop = tuple(stop)
    for text in stop:
        if not isinstance(text, str):
            raise UserError(f"stop: must be a list of texts, and {str(text)[:60]!r} in it is none; write it as a text")
        _check_utf8("stop", text)
    turns = [_turns(index, prompt) for index, prompt in enumerate(prompts)]
    sampling = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "stop_in_thoughts": stop_in_thoughts,
        "think_tokens": think_tokens,
        "think_at_least": think_at_least,
        "think_more": think_more,
        "think_then": think_then,
    }
    own = {"thinking": thinking, "seed": seed} | ({} if rows is None else {"rows": rows})
    config = build(AnswerConfig, sampling | own)
    for name in ("think_more", "think_then"):
        _check_utf8(name, getattr(config, name))
    if config.seed < 0:
        raise UserError(f"seed: must be at least 0, not '{seed}'")
    loaded = model if isinstance(model, LoadedModel) else load(model)
    rendered = [loaded.chat.prompt(messages, thinking=config.thinking) for messages in turns]
    requests = [Request.of(prompt, config.seed + i) for i, prompt in enumerate(rendered)]
    params = SamplingParams(stop=stop, **{name: getattr(config, name) for name in sampling})
    with merged(loaded.model, loaded.backend):
        rows = config.sized(loaded.backend.sizes).rows
        done = dict(complete(loaded, requests, params, rows, logprobs=logprobs))
    return [done[i] for i in range(len(requests))]


def _turns(index: int, prompt: str | Sequence[Message]) -> list[Message]:
    """Return a prompt as the turns of a conversation; UserError for anything else."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        turns = [dict(turn) for turn in turns]
    except (TypeError, ValueError):
        turns = []
    if not turns or not all(isinstance(turn.get(name), str) for turn in turns for name in ("role", "content")):
        example = [{"role": "user", "content": "Hi"}]
        raise UserError(f"prompts: number {index} must be a text, or turns as in {example}, not {str(prompt)[:60]!r}")
    for text in (turn[name] for turn in turns for name in ("role", "content")):
        _check_utf8(f"prompts: number {index}", text)
    return turns


def _check_utf8(where: str, text: str) -> None:
    if text != text.encode(errors="ignore").decode():
        raise UserError(f"{where}: {text[:60]!r} is not UTF-8, as tokenizers need; drop its lone surrogates")


def train_sft(
    *,
    out: str | Path,
    resume: bool = False,
    show: Callable | None = None,
    config: SFTConfig | None = None,
    **settings: Any,
) -> SFTResult:
    """Fine-tune a model on traces; ``mlx-traces sft`` from Python. See `train.sft.train`."""
    return sft.train(given(SFTConfig, config, settings), out, resume, show)


def train_grpo(
    *,
    out: str | Path,
    resume: bool = False,
    show: Callable | None = None,
    config: GRPOConfig | None = None,
    **settings: Any,
) -> Result:
    """Train a model on a task by GRPO; ``mlx-traces grpo`` from Python. See `rl.grpo.train`."""
    return grpo.train(given(GRPOConfig, config, settings), out, resume, show)


def train_ppo(
    *,
    out: str | Path,
    resume: bool = False,
    show: Callable | None = None,
    config: PPOConfig | None = None,
    **settings: Any,
) -> Result:
    """Train a model on a task by PPO; ``mlx-traces ppo`` from Python. See `rl.ppo.train`."""
    return ppo.train(given(PPOConfig, config, settings), out, resume, show)
