"""Every setting, defined once: one pydantic model per command, for the command line, YAML files and Python calls."""

import json
import types
from collections.abc import Iterator, Mapping
from datetime import date as Date
from operator import not_
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from mlx_traces.errors import MOST_NAME, UserError, did_you_mean

Loss = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce"]  # each is defined in rl/losses.py
Fraction01 = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]  # of MLX's random numbers
LogitsMB = Annotated[float, Field(gt=0, le=2**19)]
MOST_WHOLE = 10**18  # bound of whole numbers; Python refuses to print one of thousands of digits


def _is_none(value: Any) -> bool:
    return value is None


_MORE = "the default is higher on a large GPU"
SIZES = ("rows", "micro_tokens", "logits_mb")  # settings whose defaults depend on the device


class Config(BaseModel):
    """Base of all settings: unknown fields are refused, values are immutable.

    A setting that a later version added is not stored while it has its default (``exclude_if``), so older runs keep
    their names and can be continued.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True, protected_namespaces=()
    )
    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset()  # settings that may change when a run is continued

    @field_validator("*", mode="before")
    @classmethod
    def _text_of_a_path(cls, value: Any) -> Any:
        """Return a path, which Python's callers may give for a model or a file, as text."""
        return str(value) if isinstance(value, Path) else value

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false, which YAML makes of on and off, where pydantic would read them as 1 and 0."""
        kinds = list(_kinds_in(cls.model_fields[info.field_name].annotation))
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        switch = next((item for item in items if isinstance(item, bool)), None)
        if switch is not None and bool not in kinds and (int in kinds or float in kinds):
            wanted, given = _NUMBER if float in kinds else _WHOLE, "true (yes, on)" if switch else "false (no, off)"
            raise ValueError(f"{wanted}, not {given}{'; null leaves it out' if type(None) in kinds else ''}")
        return value

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide a run's result, as JSON values: all but those in ``MAY_CHANGE``.

        `evaluator.Plan.identity` and `loop.identity_of` add hashes of the run's files.
        """
        return self.model_dump(mode="json", exclude=set(self.MAY_CHANGE))

    def sized(self, sizes: Mapping[str, int]) -> Self:
        """Return the settings with defaults raised to a device's ``sizes``; values that were set are kept.

        The defaults are those of a CPU; ``{}`` keeps them. Nested settings are sized too.
        """
        values = dict(self)
        for name, field in type(self).model_fields.items():
            if isinstance(values[name], Config):
                values[name] = values[name].sized(sizes)
            elif name in SIZES and name not in self.model_fields_set:
                values[name] = max(field.default, sizes.get(name, 0))
        return self.model_construct(self.model_fields_set, **values)


class LoadConfig(Config):
    """How a model is loaded, and the variables of its chat template."""

    weights: Literal["quantized", "dense"] | None = Field(
        None, description="Keep quantized weights, or expand them to dense ones; default: the faster one here."
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Type of dense weights; default: the device's."
    )
    device: Literal["gpu", "cpu"] | None = Field(None, description="Device; default: the GPU, if there is one.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    template_args: dict[str, Any] | None = Field(
        None, exclude_if=_is_none, description="A variable of the chat template, as in reasoning_effort=high."
    )
    date: Date | None = Field(
        None,
        exclude_if=_is_none,
        description="Date that the chat template prints, if it prints one; default: the day of the run.",
    )

    @field_validator("template_args")
    @classmethod
    def _as_json(cls, value: dict[str, Any] | None) -> Any:
        """Return the variables as files store them; a date becomes text."""
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=lambda date: date.isoformat())
            return json.loads(text.encode())
        except (AttributeError, TypeError, ValueError, RecursionError):
            raise ValueError(
                f"{str(value)[:60]} is not JSON; give texts, finite numbers, true, false, null, lists or mappings"
            ) from None

    def load_arguments(self) -> dict[str, Any]:
        """Return these settings as arguments of `loading.load`."""
        return {name: getattr(self, name) for name in LoadConfig.model_fields}


class ThinkingConfig(Config):
    """Bounds on the thought of a completion; see `engine.thinking`."""

    think_tokens: Annotated[int, Field(ge=0)] | None = Field(
        None,
        exclude_if=_is_none,
        description="Budget of a thought, in tokens; then it is closed, and max_tokens bounds the answer alone.",
    )
    think_at_least: Annotated[int, Field(ge=0)] = Field(
        0, exclude_if=not_, description="Minimum length of a thought, in tokens; think_more replaces an earlier end."
    )
    think_more: Annotated[str, Field(min_length=1)] = Field(
        "Wait", exclude_if="Wait".__eq__, description="Text that replaces the end of a thought below think_at_least."
    )
    think_then: str = Field(
        "", exclude_if=not_, description="Text that begins the answer after think_tokens has closed the thought."
    )

    @field_validator("think_at_least")
    @classmethod
    def _within_budget(cls, value: int, info: ValidationInfo) -> int:
        budget = info.data.get("think_tokens")
        if budget is not None and value > budget:
            raise ValueError(f"{value} is above think_tokens ({budget}), where thoughts end; lower it")
        return value

    @property
    def bounded(self) -> bool:
        """Whether tokens may be inserted into a thought, to close it or to keep it open."""
        return self.think_tokens is not None or self.think_at_least > 0

    @property
    def longest(self) -> int:
        """The maximum length of a completion in tokens, thought included."""
        return self.max_tokens + (self.think_tokens or 0)


class ProblemConfig(Config):
    """Which problems, in which prompt, graded by which extractor."""

    task: str = Field("countdown", description="Task: gsm8k, countdown, math, qa, or your own module:TASK.")
    prompt: str | None = Field(
        None, description="One of the task's prompts, or FILE.yaml with your own; default: the task's."
    )
    system: str | None = Field(None, description="System message; replaces the prompt's.")
    prefill: str | None = Field(None, description="Text that the assistant's turn starts with.")
    shots: Annotated[int, Field(ge=0)] = Field(5, description="Number of worked examples, in a few-shot prompt.")
    shots_data: str | None = Field(None, description="File or hub data set of the worked examples.")
    extractor: str | None = Field(
        None, description="How the answer is found in a completion; default: the task's first extractor."
    )
    data: str | None = Field(None, description="File or hub data set; default: the task's own source.")
    split: str = Field("test", description="Split of the data; 'test[:64]' takes its first 64 problems.")
    limit: Positive | None = Field(
        None, description="Number of problems, drawn at random by --seed; default: all; of generated problems 500."
    )
    seed: int = Field(0, description="Seed of problems, worked examples and sampling.")


class EndpointConfig(Config):
    """A server that runs the model."""

    endpoint: str | None = Field(
        None, description="Address of an OpenAI-compatible server, http://host:port; --model is its model's name."
    )
    concurrency: Annotated[int, Field(ge=1, le=1024)] = Field(8, description="Concurrent requests to the server.")
    retries: Annotated[int, Field(ge=0, le=20)] = Field(
        4, description="Retries of a request after status 429 or 5xx, a lost connection or a broken reply."
    )
    timeout: Annotated[float, Field(gt=0, le=86_400)] = Field(600.0, description="Time limit of a reply, in seconds.")
    api_key_env: str | None = Field(None, description="Name of the environment variable that holds the server's key.")


class AnswerConfig(LoadConfig, ProblemConfig, ThinkingConfig):
    """A model, the problems it answers, and how it samples."""

    # These do not decide what is sampled, up to floating-point ties; every extractor judges every sample.
    MAY_CHANGE = frozenset({"rows", "device", "memory_limit", "extractor", *EndpointConfig.model_fields})

    model: str = Field("nano", description="nano, a folder, or a hub id; MODEL@REVISION and MODEL+ADAPTER work.")
    adapter: str | None = Field(None, description="Folder of a LoRA adapter.")
    samples: Positive = Field(1, description="Completions per problem; above 1 gives pass@k and maj@k.")
    temperature: Annotated[float, Field(ge=0)] = Field(0.0, description="Sampling temperature; 0 is greedy.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Sample from the most probable tokens whose probabilities add up to this (nucleus sampling)."
    )
    top_k: Annotated[int, Field(ge=0)] = Field(0, description="Sample from the k most probable tokens; 0: from all.")
    min_p: Fraction01 = Field(0.0, description="Drop tokens below this fraction of the top token's probability.")
    max_tokens: Positive = Field(512, description="Maximum length of a completion, in tokens.")
    rows: Positive = Field(32, description=f"Batch size of decoding, in completions; {_MORE}.")
    memory_limit: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Memory limit in GB; lowers rows if needed."
    )
    thinking: bool | None = Field(None, description="Set the template's thinking switch, if it has one.")
    data_seed: int | None = Field(
        None,
        exclude_if=_is_none,
        description="Seed of problems and worked examples, so that --seed changes the sampling alone; default: --seed.",
    )
    stop_in_thoughts: bool = Field(
        False, exclude_if=not_, description="Let the prompt's stop strings end a completion within its thought too."
    )
    growing: bool = Field(
        False,
        exclude_if=not_,
        description="Take the problems in a random order (--seed), so that a run can continue with a larger --limit.",
    )

    @property
    def problem_seed(self) -> int:
        """The seed of the problems, their order and the worked examples."""
        return self.seed if self.data_seed is None else self.data_seed


class EvalConfig(AnswerConfig, EndpointConfig):
    """Settings of ``mlx-traces eval``."""


class GenerateConfig(AnswerConfig):
    """Settings of ``mlx-traces generate``: those of an evaluation, with other defaults."""

    split: str = Field("train", description="Split of the data; 'train[:64]' takes its first 64 problems.")
    samples: Positive = Field(4, description="Completions per problem.")
    temperature: Annotated[float, Field(ge=0)] = Field(1.0, description="Sampling temperature; 0 is greedy.")


class AdapterConfig(Config):
    """What is trained: low-rank adapters (LoRA, DoRA) on linear layers, or the layers' weights."""

    kind: Literal["lora", "dora", "full"] = Field(
        "lora", description="What is trained: LoRA, DoRA, or all weights of the layers."
    )
    rank: Annotated[int, Field(ge=1, le=2**16)] = Field(16, description="Rank of the adapter's matrices.")
    scale: Annotated[float, Field(gt=0)] = Field(2.0, description="Factor on the adapter's output (alpha / rank).")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout rate of the adapter's inputs.")
    layers: Annotated[int, Field(ge=-1)] = Field(-1, description="Train only the last N layers; -1: all.")
    targets: list[str] | None = Field(
        None, description="Modules of a layer that get an adapter, as in self_attn.q_proj; default: all linear ones."
    )


class OptimizerConfig(Config):
    """AdamW with warm-up and a cosine decay."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-4, description="Peak learning rate.")
    warmup: Fraction01 = Field(0.05, description="Fraction of the steps over which the learning rate rises from 0.")
    final_rate: Fraction01 = Field(0.0, description="Final learning rate, as a fraction of the peak.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Decoupled weight decay.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.98), description="Decay rates of AdamW's two moving averages."
    )
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Gradients are clipped to this norm.")


class ValidationConfig(ProblemConfig, ThinkingConfig):
    """Held-out problems that the model answers greedily at each validation of a training; always the same ones."""

    split: str = Field("valid", description="Split of the data; 'train[:200]' takes its first 200 problems.")
    limit: Positive | None = Field(200, description="Number of problems, drawn at random by --seed.")
    max_tokens: Positive = Field(512, description="Maximum length of a completion, in tokens.")
    rows: Positive = Field(64, description=f"Batch size of decoding, in completions; {_MORE}.")
    thinking: bool | None = Field(
        None, exclude_if=_is_none, description="Set the template's thinking switch; default: as in the training."
    )


class TrackingConfig(Config):
    """A tracking client that also gets a training's metrics."""

    report_to: Literal["trackio", "wandb"] | None = Field(
        None, description="Also send the metrics to this client, which must be installed."
    )


# Settings that do not decide a training's result: where it runs, what it reports, and how a step is split into
# micro-batches, which changes only rounding and the masks of dropout.
_NO_RESULT = {"device", "save_every", "report_to", "micro_tokens", "logits_mb", "checkpoint_layers"}


class SFTSettings(LoadConfig, AdapterConfig, OptimizerConfig, TrackingConfig):
    """Settings of SFT other than model and data."""

    MAY_CHANGE = frozenset({*_NO_RESULT, "data", "valid"})  # the last two by their content

    valid_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05, description="Share of the problems whose traces are kept for the validation loss, if there is no --valid."
    )
    epochs: Positive = Field(1, description="Passes over the data.")
    batch_size: Positive = Field(16, description="Traces per optimizer step.")
    micro_tokens: Positive = Field(512, description=f"Token limit of a forward pass, padding included; {_MORE}.")
    max_length: Positive = Field(2048, description="Maximum length of a sequence, prompt included, in tokens.")
    over_long: Literal["skip", "cut", "refuse"] = Field(
        "skip", description="Longer sequences: leave them out (skip), cut off the end (cut), or stop (refuse)."
    )
    thinking: bool | None = Field(
        None, exclude_if=_is_none, description="Set the template's thinking switch; default: as each trace was made."
    )
    checkpoint_layers: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, slower."
    )
    logits_mb: LogitsMB = Field(128, description=f"Maximum size of logits in memory, in MiB; {_MORE}.")
    eval_every: Annotated[int, Field(ge=0)] = Field(0, description="Steps between validations; 0: once an epoch.")
    evaluate: ValidationConfig | None = Field(None, description="Held-out problems to answer at each validation.")
    patience: Annotated[int, Field(ge=0)] = Field(
        0, description="Stop after this many validations without improvement; 0: never."
    )
    save_every: Positive = Field(50, description="Steps between checkpoints; a new best adapter has one too.")
    seed: Seed = Field(0, description="Seed of the new adapter, the order of the data, and dropout.")


class SFTConfig(SFTSettings):
    """Settings of ``mlx-traces sft``: supervised fine-tuning on traces."""

    model: str = Field("nano", description="nano, a folder, or a hub id; MODEL@REVISION and MODEL+ADAPTER work.")
    adapter: str | None = Field(None, description="Folder of an adapter to train on; default: a new one.")
    data: str = Field(..., description="File of traces, JSON lines; see data/README.md.")
    valid: str | None = Field(None, description="File of traces for the validation loss.")


class JudgeConfig(Config):
    """A model that grades traces by a rubric."""

    judge: str | None = Field(None, description="Model that judges each trace by a rubric.")
    judge_prompt: str | None = Field(None, description="FILE.yaml with your rubric, {question} and {trace} in it.")
    judge_max_tokens: Positive = Field(256, description="Maximum length of the judge's reply, in tokens.")
    judge_cache: str = Field(
        "data/judge.jsonl", description="File that keeps the judge's replies, so that none is requested twice."
    )
    judge_failures: Fraction01 = Field(0.2, description="Stop if more than this share of the replies cannot be read.")


class RLConfig(LoadConfig, AdapterConfig, OptimizerConfig, TrackingConfig, JudgeConfig, ProblemConfig, ThinkingConfig):
    """Settings that GRPO and PPO share: a task's training problems, rollouts, rewards, updates."""

    MAY_CHANGE = frozenset({*_NO_RESULT, "rows", "memory_limit", "data", "judge_cache"})  # data by its content

    model: str = Field("nano", description="nano, a folder, or a hub id; MODEL@REVISION and MODEL+ADAPTER work.")
    adapter: str | None = Field(None, description="Folder of an adapter to train on; default: a new one.")
    split: str = Field("train", description="Split of the training problems; 'train[:64]' takes its first 64.")
    limit: Positive | None = Field(
        None, description="Number of training problems, drawn at random by --seed; default: as many as the steps need."
    )
    seed: Seed = Field(0, description="Seed of the new adapter, the order of the problems, and the rollouts.")

    num_steps: Positive = Field(100, description="Steps: each draws problems, samples rollouts, and updates.")
    prompts_per_step: Positive = Field(16, description="Problems per step.")
    group_size: Annotated[int, Field(ge=2)] = Field(8, description="Rollouts per problem.")
    max_tokens: Positive = Field(512, description="Maximum length of a completion, in tokens.")
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Sampling temperature of the rollouts; the update uses the same."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Sample from the most probable tokens whose probabilities add up to this (nucleus sampling)."
    )
    top_k: Annotated[int, Field(ge=0)] = Field(0, description="Sample from the k most probable tokens; 0: from all.")
    min_p: Fraction01 = Field(0.0, description="Drop tokens below this fraction of the top token's probability.")
    thinking: bool | None = Field(None, description="Set the template's thinking switch, if it has one.")
    rows: Positive = Field(256, description=f"Batch size of decoding, in completions; {_MORE}.")
    memory_limit: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Memory limit for sampling, validations included, in GB; lowers rows if needed."
    )

    rewards: dict[str, float] = Field(
        {"correct": 1.0},
        description="Weights of the rewards: correct, gated, equations, judge, ... or your own module:function.",
    )
    step_weight: Annotated[float, Field(ge=0)] = Field(
        0.0,
        exclude_if=not_,
        description="Weight of the values that rewards (equations, steps, your own) give to single steps of a "
        "completion; 0: only whole completions are rewarded.",
    )
    supervision: Literal["local", "cumulative"] = Field(
        "local",
        exclude_if=lambda value: value == "local",
        description="Tokens that a step's value counts for: those of the step (local), or also all earlier ones "
        "(cumulative).",
    )
    tags: Literal["think", "r1", "sky-t1", "none"] = Field(
        "think", description="Form that format and gated require; equations and steps read the thought in its tags."
    )
    overlong: Literal["keep", "mask", "penalty"] = Field(
        "keep",
        description="Completions that were cut off: train on them (keep), leave them out (mask), or train on them, "
        "with a lower reward near the limit (penalty).",
    )
    overlong_tokens: Annotated[int, Field(ge=0)] = Field(
        32,
        description="With overlong penalty: the last tokens before the limit, over which it grows from 0 to 1; "
        "completions that were cut off have all of it.",
    )
    pass_rate_low: Fraction01 = Field(0.0, description="Leave out problems with a lower pass rate.")
    pass_rate_high: Fraction01 = Field(1.0, description="Leave out problems with a higher pass rate.")
    probe_samples: Positive = Field(
        4, description="Completions per problem to measure pass rates, before the first step."
    )

    micro_tokens: Positive = Field(1024, description=f"Token limit of a forward pass, padding included; {_MORE}.")
    checkpoint_layers: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, slower."
    )
    logits_mb: LogitsMB = Field(128, description=f"Maximum size of logits in memory, in MiB; {_MORE}.")
    eval_every: Positive = Field(10, description="Steps between validations.")
    evaluate: ValidationConfig | None = Field(None, description="Held-out problems to answer at each validation.")
    patience: Annotated[int, Field(ge=0)] = Field(
        0, description="Stop after this many validations without improvement; 0: never."
    )
    save_every: Positive = Field(5, description="Steps between checkpoints; a new best adapter has one too.")

    @field_validator("pass_rate_high")
    @classmethod
    def _above_low(cls, value: float, info: ValidationInfo) -> float:
        if value < (low := info.data.get("pass_rate_low", 0)):
            raise ValueError(f"{value:g} is below pass_rate_low ({low:g}), so no problem would be left; raise it")
        return value

    @field_validator("reference", "unbiased_kl", check_fields=False)
    @classmethod
    def _read_by_kl(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("kl_coef") == 0:
            raise ValueError("has no effect without kl_coef; set that too, or leave this out")
        return value


_REFERENCE = "Reference of the KL term: an adapter's folder, or base, the bare model; default: --adapter, else base."


class GRPOConfig(RLConfig):
    """Settings of ``mlx-traces grpo``."""

    advantage: Literal["std", "batch", "none", "rloo", "mean"] = Field(
        "std",
        description="Reward minus its group's mean, divided by the standard deviation of the group (std) or the batch "
        "(batch), or not divided (none); minus the mean of the others (rloo); or minus the mean of all rewards (mean).",
    )
    max_resamples: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Replace groups of equal rewards by new problems, at most this many times a step (DAPO).",
    )
    loss: Loss = Field("dapo", description="Loss type: how ratios are clipped and tokens averaged.")
    clip_eps: Annotated[float, Field(gt=0, le=1)] = Field(0.2, description="Lower clip bound, below a ratio of 1.")
    clip_eps_high: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Upper clip bound, above a ratio of 1; default: clip_eps."
    )
    kl_coef: Annotated[float, Field(ge=0)] = Field(0.0, description="Weight of the KL term to the reference.")
    reference: str | None = Field(None, description=_REFERENCE)
    unbiased_kl: bool = Field(
        False,
        exclude_if=not_,
        description="Multiply the KL term by the ratio, which makes its gradient that of the reverse KL.",
    )
    importance: Literal["none", "token", "sequence"] = Field(
        "none",
        description="Weights per token or sequence that correct for differences between sampler and trainer.",
    )
    importance_cap: Annotated[float, Field(gt=0)] = Field(2.0, description="Upper bound of those weights.")
    updates_per_batch: Positive = Field(1, description="Passes over each batch of rollouts.")
    minibatches: Positive = Field(1, description="Optimizer steps per pass over the rollouts.")

    @field_validator("max_resamples")
    @classmethod
    def _no_resamples_for_mean(cls, value: int, info: ValidationInfo) -> int:
        if value and info.data.get("advantage") == "mean":
            raise ValueError(
                "with advantage mean, groups of equal rewards have a gradient too; leave max_resamples out"
            )
        return value

    @field_validator("loss", mode="before")
    @classmethod
    def _no_bnpo(cls, value: Any) -> Any:
        if value == "bnpo":  # a mean over the tokens of each micro-batch
            raise ValueError("bnpo equals dapo here, since a step's loss is one mean over its tokens; set dapo")
        return value

    @field_validator("loss")
    @classmethod
    def _by_tokens(cls, value: str, info: ValidationInfo) -> str:
        if value == "gspo" and info.data.get("step_weight"):
            raise ValueError("gspo has one ratio and one advantage per completion; for step_weight choose another loss")
        return value


class PPOConfig(RLConfig):
    """Settings of ``mlx-traces ppo``."""

    group_size: Positive = Field(4, description="Rollouts per problem.")
    gamma: Fraction01 = Field(1.0, description="Discount of a token.")
    gae_lambda: Fraction01 = Field(
        0.95, description="Lambda of the advantages: 0 trusts the next token's value, 1 uses the actual rewards."
    )
    whiten: bool = Field(True, description="Scale the advantages to mean 0 and variance 1 over the batch's tokens.")
    epochs: Positive = Field(2, description="Passes over each batch of rollouts.")
    minibatches: Positive = Field(2, description="Optimizer steps per pass over the rollouts.")
    clip_eps: Annotated[float, Field(gt=0, le=1)] = Field(
        0.2, description="Clip bound of the ratio, on either side of 1."
    )
    value_clip: Annotated[float, Field(gt=0)] | None = Field(
        0.2, description="Clip bound of a value, on either side of the old one; null in a YAML file: none."
    )
    value_learning_rate: Annotated[float, Field(gt=0)] = Field(
        1e-3, description="Peak learning rate of the value head, on the adapter's schedule."
    )
    value_warmup_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="Number of first steps that train only the value head."
    )
    entropy_coef: Annotated[float, Field(ge=0)] = Field(0.0, description="Weight of an entropy bonus.")
    kl_coef: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Weight of the KL penalty in the reward, per nat of a token's log p - log p_ref."
    )
    reference: str | None = Field(None, description=_REFERENCE)


class TracesConfig(Config):
    """Settings that every command on a file of traces has."""

    task: str | None = Field(
        None,
        exclude_if=_is_none,
        description="Task of the traces; needed only for a plug-in, whose code runs if you name it here.",
    )


class ScoreConfig(TracesConfig, LoadConfig, JudgeConfig):
    """Settings of ``mlx-traces score``. A component that ``mix`` does not name has weight 0 in the combined score."""

    tags: Literal["think", "r1", "sky-t1", "none"] = Field(
        "think",
        description="Form: <think>, then <answer> (think) or text (r1); Sky-T1's tags (sky-t1); or any (none).",
    )
    length_limit: Positive = Field(
        2048, description="Length at which the length score is 0, in tokens (in words if tokens are unknown)."
    )
    mix: dict[
        Literal["format", "structure", "faithfulness", "length", "repetition", "perplexity", "judge"],
        Annotated[float, Field(ge=0)],
    ] = Field(
        {"format": 1, "structure": 0.5, "faithfulness": 1, "length": 0.5, "repetition": 1, "judge": 1},
        description="Weights of the components in the combined score.",
    )
    model: str | None = Field(None, description="Model that computes the perplexity score.")
    thinking: bool | None = Field(
        None, description="Set the thinking switch of its template; default: as each trace was made."
    )
    rows: Positive = Field(16, description=f"Traces that the judge reads at once; {_MORE}.")
    memory_limit: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Memory limit in GB; lowers rows if needed."
    )


class ReformatConfig(TracesConfig, LoadConfig):
    """Settings of ``mlx-traces reformat``."""

    to: Literal["sky-t1", "think"] = Field(
        "sky-t1", description="Form to write: Sky-T1's thought and solution, or <think> and what follows it."
    )
    model: str | None = Field(
        None, description="Model that rewrites the traces; default: none, and only the tags are changed, by rules."
    )
    model_prompt: str | None = Field(
        None, description="FILE.yaml with your instruction for the model, {question} and {trace} in it."
    )
    max_tokens: Positive = Field(2048, description="Maximum length of the model's reply, in tokens.")
    cache: str = Field(
        "data/reformat.jsonl", description="File that keeps the model's replies, so that none is requested twice."
    )
    rows: Positive = Field(16, description=f"Traces that the model rewrites at once; {_MORE}.")
    memory_limit: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Memory limit in GB; lowers rows if needed."
    )


class FilterConfig(TracesConfig):
    """Settings of ``mlx-traces filter``: its rules, in the order of application."""

    correct_only: bool = Field(True, description="Drop wrong traces; those that no task can judge stay.")
    well_formed: bool = Field(False, description="Drop traces whose format score is below 1.")
    finished: bool = Field(True, description="Drop traces that were cut off.")
    min_faithfulness: Fraction01 | None = Field(
        None, description="Drop traces with a smaller share of true equations, if they have equations."
    )
    min_score: Fraction01 | None = Field(None, description="Drop traces with a lower combined score.")
    duplicates: bool = Field(True, description="Drop a problem's second trace of the same text.")
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Drop a trace whose 5-grams overlap this much (Jaccard) with an earlier trace of its problem."
    )
    eval_task: str | None = Field(None, description="Task of the evaluation; drop traces of its problems.")
    eval_data: str | None = Field(
        None, description="File or hub data set of the evaluation problems; default: the task's own source."
    )
    eval_split: str = Field("test", description="Split of the evaluation problems.")
    eval_limit: Positive | None = Field(
        None,
        description="Number of evaluation problems, drawn at random by --eval-seed; default: all. Of generated "
        "Countdown problems the whole split counts, whatever their number.",
    )
    eval_seed: int = Field(0, description="Seed of that draw.")
    overlap_words: Annotated[int, Field(ge=0)] = Field(
        13,
        description="Drop a trace that shares so many consecutive words with an evaluation question; 0: only by id.",
    )
    per_problem: Positive | None = Field(None, description="Maximum number of traces per problem.")
    prefer: Literal["short", "best", "diverse", "random"] = Field(
        "short",
        description="Which of a problem's traces are kept: shortest, best by score, most diverse, or random ones.",
    )
    balance: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Keep at most this many times the median number of traces of each difficulty."
    )
    difficulty: Literal["pass_rate", "stratum"] = Field(
        "pass_rate", description="Difficulty: the share of a problem's traces that are correct, or the task's stratum."
    )
    bins: Positive = Field(4, description="Number of bins of the pass rate.")
    seed: int = Field(0, description="Seed of random choices.")


class RawConfig(Config):
    """Raw traces that the first round learns from: solved problems of a task, or a file."""

    file: str | None = Field(
        None, description="File of traces, as `mlx-traces data` writes it; the other settings are then not used."
    )
    count: Positive | None = Field(
        None, description="Number of problems: generated ones, or a seeded sample of a data set."
    )
    prompts: list[str] | None = Field(None, description="Prompt styles; default: the prompt of the rounds.")
    split: str = Field("train", description="Split of the data.")
    data: str | None = Field(None, description="File or hub data set of the problems; default: the task's own.")
    give_up: Fraction01 = Field(
        0.0, exclude_if=not_, description="Probability that the solver of Countdown gives up after a no."
    )
    daunting: Annotated[float, Field(ge=0)] = Field(
        0.0,
        exclude_if=not_,
        description="Target at which the solver of Countdown gives up after a no with probability 0.5, more often "
        "at larger ones; 0: the target does not matter.",
    )
    style: Literal["think", "plain", "boxed"] = Field(
        "think", description="Where the answers of worked solutions stand: after the thought, after ####, or in a box."
    )
    seed: int = Field(1, description="Seed of the problems.")


class Round3Config(Config):
    """The third round: GRPO or PPO, whichever has settings; with both, each starts from the second round's adapter."""

    grpo: GRPOConfig | None = Field(None, description="Settings of `mlx-traces grpo`.")
    ppo: PPOConfig | None = Field(None, description="Settings of `mlx-traces ppo`.")


class RoundsConfig(TrackingConfig):
    """Settings of ``mlx-traces rounds``, by stage; model, adapter, task and files of the stages are filled in."""

    name: str = Field(
        ...,
        pattern=r"^\w[\w .+-]{0,79}$",
        description="Prefix of the names of all files and folders, so it has no /.",
    )
    model: str = Field("nano", description="nano, a folder, or a hub id.")
    task: str = Field("countdown", description="Task: gsm8k, countdown, math, or your own module:TASK with raw.file.")
    prompt: str = Field("thinking", description="Prompt style of generation and comparison.")
    raw: RawConfig = RawConfig()
    epoch1: SFTSettings | None = Field(
        SFTSettings(), description="SFT on the raw traces; null: none, start with the model's own traces."
    )
    generate: GenerateConfig = GenerateConfig()
    score: ScoreConfig = Field(
        ScoreConfig(), description="How the model's own traces, and the answers in the comparison, are scored."
    )
    filter: FilterConfig = FilterConfig()
    epoch2: SFTSettings | None = Field(SFTSettings(), description="SFT on the model's own traces; null: none.")
    round3: Round3Config | None = Field(
        None,
        description="GRPO, PPO or both after that; the KL reference of each is the adapter that it starts from, unless "
        "its settings name one.",
    )
    compare: EvalConfig = EvalConfig()
    data_dir: str = Field("data", description="Where raw/, generated/ and processed/ are.")
    runs_dir: str = Field("runs", description="Where run folders are kept.")


class StudyTask(EvalConfig):
    """One set of problems and its prompt styles; model, adapter and prompt are filled in."""

    prompts: Annotated[list[str], Field(min_length=1)] = Field(
        ["direct", "thinking"], description="Prompt styles, each used with every model."
    )


class StudyModel(Config):
    """One model, with or without an adapter; if ``bits`` is set, converted first."""

    model: str = Field(..., description="nano, a folder, or a hub id; MODEL@REVISION and MODEL+ADAPTER work.")
    adapter: str | None = Field(None, description="Folder of a LoRA adapter.")
    adapters: Annotated[list[str], Field(min_length=2)] | None = Field(
        None, description="Folders of adapters: several trainings of one recipe, shown as one row under the label."
    )
    label: str | None = Field(None, description="Name in the tables; default: the model's and the adapter's.")
    bits: Literal[16, 8, 6, 5, 4, 3, 2] | None = Field(
        None, description="Bits per weight to convert the model to; default: no conversion."
    )
    group_size: Literal[32, 64, 128] = Field(64, description="Number of weights that share a scale, below 16 bits.")
    prompts: list[str] | None = Field(None, description="Prompt styles for this model; default: the task's.")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="Other settings of its evaluations: max_tokens, thinking, weights, ..."
    )
    optional: bool = Field(False, description="Leave the model out if the folder of its adapter does not exist.")


class ComparedConfig(Config):
    """Every model on every task in every prompt; each row is compared with the baseline."""

    tasks: list[StudyTask] = Field(default_factory=list, description="Sets of problems, with their prompts.")
    models: list[StudyModel] = Field(default_factory=list, description="Models, in the order of the tables.")
    baseline: str | None = Field(
        None, description="Label or run of the row that others are compared with; default: the first."
    )
    cluster: str | None = Field(
        None,
        description="Column of the data; problems with an equal value in it form one cluster in the statistics.",
    )
    runs_dir: str = Field("runs", description="Where run folders and converted models are kept.")
    out: str | None = Field(None, description="Folder of the tables; default of a study: tables/ and its file's name.")
    stop_when_decided: bool = Field(
        False,
        description="Evaluate all rows together, block by block, until every tested difference is decided or all "
        "problems (limit) are answered.",
    )
    block: Positive = Field(50, description="Problems per block of stop_when_decided.")


class CompareConfig(ComparedConfig):
    """Settings of ``mlx-traces compare``: also finished runs, and single evaluations."""

    runs: list[str] = Field(default_factory=list, description="Run folders.")
    recipes: dict[str, list[str]] = Field(
        default_factory=dict, description="Run folders of several trainings of one recipe, by the name of their row."
    )
    evals: list[EvalConfig] = Field(default_factory=list, description="Single evaluations; missing ones are made.")
    extractor: str | None = Field(None, description="Compare all runs by this extractor.")
    quality: ScoreConfig | None = Field(
        None,
        exclude_if=_is_none,
        description="Compare the quality of the answers too, scored by these settings; {}: the defaults of score.",
    )
    rewards: str | None = Field(
        None,
        exclude_if=_is_none,
        description="Configuration of grpo or ppo: compare the mean of its reward too, as a part of the quality.",
    )


class StudyConfig(ComparedConfig):
    """Settings of ``mlx-traces study``: also budgets of thought, and a test of every pair."""

    name: str = Field(..., description="Title of the study.")
    tasks: Annotated[list[StudyTask], Field(min_length=1)] = Field(
        ..., description="Sets of problems, with their prompts."
    )
    models: Annotated[list[StudyModel], Field(min_length=1)] = Field(
        ..., description="Models, in the order of the tables."
    )
    budgets: list[Annotated[int, Field(ge=0)] | None] = Field(
        default_factory=list,
        description="Values of think_tokens, each used with every model and prompt; null: no budget, and max_tokens "
        "bounds thought and answer together.",
    )
    pairs: Literal["all", "baseline"] = Field(
        "all", description="Test every pair of rows, or each row against the baseline."
    )
    apart: bool = Field(False, description="Evaluate each model in its own process, to measure its own peak memory.")


class NanoConfig(OptimizerConfig):
    """Settings of ``mlx-traces nano build``, the embedded model."""

    hidden_size: Positive = Field(128, description="Size of the hidden states.")
    layers: Positive = Field(4, description="Transformer layers.")
    heads: Positive = Field(2, description="Attention heads of a layer.")
    kv_heads: Positive = Field(1, description="Key-value heads of a layer; must divide the heads.")
    intermediate_size: Positive = Field(384, description="Size of the feed-forward layers.")
    operands: tuple[int, int] = Field((3, 3), description="Fewest and most numbers of a problem.")
    problems: Positive = Field(85_000, description="Different training problems; each is seen several times.")
    direct_share: Fraction01 = Field(0.035, description="Share of the sequences in the direct prompt.")
    sequences: Positive = Field(230_000, description="Sequences of the first stage, which teaches arithmetic.")
    give_up: Fraction01 = Field(0.12, description="Probability that the teacher gives up after a no.")
    policy_sequences: Positive = Field(14_000, description="Sequences of the second stage, which teaches giving up.")
    policy_daunting: Annotated[float, Field(ge=0)] = Field(
        30.0,
        description="Target at which the teacher gives up after a no with probability 0.5, more often at larger ones.",
    )
    policy_learning_rate: Annotated[float, Field(gt=0)] = Field(1.5e-3, description="Peak rate of the second stage.")
    batch_size: Positive = Field(16, description="Sequences of an optimizer step.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-3, description="Peak rate of the first stage.")
    warmup: Fraction01 = Field(0.02, description="Fraction of a stage's steps over which its rate rises from 0.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="AdamW's decoupled weight decay.")
    bits: Literal[2, 3, 4, 6, 8] = Field(4, description="Bits of a quantized weight.")
    quant_group_size: Literal[32, 64, 128] = Field(64, description="Weights that share a scale.")
    seed: Seed = Field(0, description="Seed of the weights, the problems and their order.")
    out: str = Field("runs/nano", description="Folder of the finished model.")


def shipped(folder: Literal["adapters", "configs"]) -> Path:
    """Return the folder of the adapters or configurations that come with the package, installed or in a checkout."""
    installed = Path(__file__).parent / {"adapters": "shipped", "configs": "configs"}[folder]
    return installed if installed.is_dir() else Path(__file__).parent.parent / folder


def find_config(name: str | Path) -> Path:
    """Find a configuration by its path or name, with or without ``.yaml``: here, in ``configs/``, or a shipped one.

    Raises:
        UserError: if there is none.
    """
    path = Path(name).expanduser()
    files = [path, path.with_name(f"{path.name}.yaml")] if path.name else []
    plain = path.parent in (Path(), Path("configs"))
    homes = (Path(), Path("configs"), shipped("configs")) if plain else ()
    files += [home / file.name for home in homes for file in files[:2]]
    try:
        if found := next((file for file in files if file.is_file()), None):
            return found
        if path.exists():
            return path  # a folder or a pipe: the error comes when it is read
    except (OSError, ValueError):
        pass
    known = [file.stem for file in shipped("configs").glob("*.yaml")]
    hint = did_you_mean(path.name.removesuffix(".yaml"), known) or "; `mlx-traces configs` lists those shipped"
    raise UserError(f"{str(name)[:200]}: no such configuration file{hint}")


def given(kind: type[Config], config: Config | None, settings: dict[str, Any]) -> Any:
    """Return ``config``, or settings built from keyword arguments; UserError if both are given."""
    if config is not None and settings:
        raise UserError(f"give config or {', '.join(settings)}, not both")
    return config or build(kind, settings)


def read_config(kind: type[Config], path: str | Path | None, overrides: dict[str, Any]) -> Config:
    """Read a command's settings from a YAML file; ``overrides`` (typed, or strings) win over it.

    Raises:
        UserError: if a setting is wrong; the message names the file, the field and the fault.
    """
    content: dict[str, Any] = {}
    if path is not None:
        from mlx_traces.yaml_files import read_yaml  # --help does not need PyYAML

        content = read_yaml(Path(path))
    return build(kind, {**content, **overrides}, str(path) if path else "")


_WHOLE, _NUMBER, _SWITCH, _TEXT, _LIST, _MAPPING = (
    f"must be {what}"
    for what in ("a whole number", "a number", "true or false", "a text", "a list", "a mapping, 'name: value' lines")
)
_MESSAGES = {  # our messages for pydantic's errors; pydantic's own differ between versions
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "literal_error": "must be {expected}",
    "too_short": "needs {min_length} or more",
    "too_long": "takes {max_length} or fewer",
    "string_pattern_mismatch": "must match {pattern}",
    "invalid_key": "the names of fields must be texts",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), _WHOLE),
    **dict.fromkeys(("float_type", "float_parsing", "finite_number"), _NUMBER),
    **dict.fromkeys(("bool_type", "bool_parsing"), _SWITCH),
    **dict.fromkeys(("string_type", "string_sub_type"), _TEXT),
    **dict.fromkeys(("list_type", "tuple_type"), _LIST),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), _MAPPING),
}


def build(kind: type[Config], values: dict[str, Any], where: str = "") -> Config:
    """Validate settings; a UserError names ``where``, the field, the fault, and the likely spelling of a name."""
    place = f"{where}: " if where else ""
    if giant := next(_giants(values), ""):
        raise UserError(f"{place}{giant}: a whole number of more than 18 digits; give a smaller one")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part)[:MOST_NAME] for part in first["loc"])
        if first["type"] == "extra_forbidden":
            names = list(_model_at(kind, first["loc"][:-1]).model_fields)
            hint = did_you_mean(str(first["loc"][-1]), names) or f"; there are {', '.join(names)}"
            raise UserError(f"{place}unknown field {field!r}{hint}") from None
        if first["type"] == "missing":
            raise UserError(f"{place}{_missing(kind, first['loc'], where)}") from None
        if first["type"] == "value_error":  # raised by our own validators, with a complete message
            raise UserError(f"{place}{field}: {first['ctx']['error']}") from None
        message = _MESSAGES.get(first["type"], first["msg"].lower()).format_map(first.get("ctx", {}))
        raise UserError(f"{place}{field}: {message}, not {str(first['input'])[:60]!r}") from None


def _missing(kind: type[Config], location: tuple[str | int, ...], where: str) -> str:
    """Say that a field is missing, what it means, and where to set it."""
    *outer, name = location
    lacking = f"{'.'.join(map(str, location))} is missing"
    if isinstance(name, int):
        return f"{lacking}: the list is too short"
    field = _model_at(kind, tuple(outer)).model_fields.get(name)
    what = f" ({field.description.rstrip('.')})" if field is not None and field.description else ""
    if where or outer:
        return f"{lacking}{what}: add '{name}: ...' there"
    return f"{lacking}{what}: pass --{name.replace('_', '-')}, or a configuration that has it"


def _giants(value: Any, name: str = "") -> Iterator[str]:
    """Yield the names of whole numbers beyond `MOST_WHOLE` in a setting."""
    if isinstance(value, int) and abs(value) > MOST_WHOLE:
        yield name or "it"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in items:
        key = "a key" if isinstance(key, int) and abs(key) > MOST_WHOLE else str(key)[:MOST_NAME]
        yield from [key] if key == "a key" else _giants(inner, f"{name}.{key}".lstrip("."))


def _model_at(kind: type[Config], location: tuple[str | int, ...]) -> type[Config]:
    """Return the class of the settings at ``location``."""
    for part in location:
        if part in kind.model_fields:
            kind = next((k for k in _models_in(kind.model_fields[part].annotation)), kind)
    return kind


def _kinds_in(annotation: Any) -> Iterator[Any]:
    """Yield the plain types that an annotation is made of."""
    parts = get_args(annotation)
    yield from (kind for part in parts for kind in _kinds_in(part)) if parts else (annotation,)


def _models_in(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    if get_origin(annotation) in (list, tuple, Union, types.UnionType):
        return [kind for inner in get_args(annotation) for kind in _models_in(inner)]
    return []
