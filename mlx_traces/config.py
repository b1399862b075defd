"""Every setting, once: a model per recipe. The command line, YAML files and Python calls are all read into these."""

import types
from collections.abc import Iterator
from datetime import date as Date
from operator import not_
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from mlx_traces.errors import MOST_NAME, UserError, did_you_mean
from mlx_traces.readers import read_yaml

Fraction01 = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
MOST_WHOLE = 10**18  # of a setting; Python refuses to write a number of thousands of digits


def _is_none(value: Any) -> bool:
    return value is None


class Config(BaseModel):
    """Base of the recipes' settings: unknown fields are refused, values are immutable.

    A setting that a recipe got later is not written while it changes nothing (``exclude_if``), so that what was begun
    without it keeps its name and is continued.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True, protected_namespaces=()
    )


class LoadConfig(Config):
    """How a model is put on the device."""

    weights: Literal["quantized", "dense"] | None = Field(None, description="Keep quantized weights, or expand them.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="Type of dense weights.")
    device: Literal["gpu", "cpu"] | None = Field(None, description="Device; default: the GPU if there is one.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    template_args: dict[str, Any] | None = Field(
        None, exclude_if=_is_none, description="Other variables of the chat template, as in reasoning_effort=high."
    )
    date: Date | None = Field(
        None, exclude_if=_is_none, description="Day that the chat template prints, if it does; default: the run's."
    )

    def load_arguments(self) -> dict[str, Any]:
        """Return these settings as `models.load` takes them."""
        return {name: getattr(self, name) for name in LoadConfig.model_fields}


class ProblemConfig(Config):
    """Which problems, asked how, judged by what."""

    task: str = Field("countdown", description="Task: gsm8k, countdown or qa.")
    prompt: str | None = Field(None, description="Name of one of the task's prompts, or FILE.yaml with your own.")
    system: str | None = Field(None, description="System message; replaces the prompt's.")
    prefill: str | None = Field(None, description="Text that the assistant's turn starts with.")
    shots: Annotated[int, Field(ge=0)] = Field(5, description="Worked examples of a few-shot prompt.")
    shots_data: str | None = Field(None, description="File or hub data set of the worked examples.")
    extractor: str | None = Field(None, description="How the answer is extracted; default: the task's first extractor.")
    data: str | None = Field(None, description="File or hub data set; default: the task's own source.")
    split: str = Field("test", description="Split of the data; a slice as in 'test[:64]' takes a part.")
    limit: Positive | None = Field(None, description="Number of problems, drawn at random by --seed; default: all.")
    seed: int = Field(0, description="Seed of problems, worked examples and sampling.")


class EndpointConfig(Config):
    """A server that answers in place of a model that is loaded here."""

    endpoint: str | None = Field(
        None, description="Address of an OpenAI-compatible server that answers, http://host:port; --model is its name."
    )
    concurrency: Annotated[int, Field(ge=1, le=1024)] = Field(8, description="Concurrent requests to the server.")
    retries: Annotated[int, Field(ge=0, le=20)] = Field(
        4, description="Retries of a request after 429, 5xx, a lost connection or a broken reply."
    )
    timeout: Annotated[float, Field(gt=0, le=86_400)] = Field(600.0, description="Timeout of one reply, in seconds.")
    api_key_env: str | None = Field(None, description="Environment variable that holds the server's key.")


class AnswerConfig(LoadConfig, ProblemConfig):
    """A model that answers problems, and how its answers are sampled."""

    model: str = Field("nano", description="nano, a folder, or a hub id; MODEL@REVISION and MODEL+ADAPTER work.")
    adapter: str | None = Field(None, description="Folder of a LoRA adapter.")
    samples: Positive = Field(1, description="Completions per problem; above 1 gives pass@k and maj@k.")
    temperature: Annotated[float, Field(ge=0)] = Field(0.0, description="0 is greedy.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Sample from the likeliest tokens whose probabilities add up to this (nucleus sampling)."
    )
    top_k: Annotated[int, Field(ge=0)] = Field(0, description="Sample from the k likeliest tokens; 0: from all.")
    min_p: Fraction01 = Field(0.0, description="Drop tokens less likely than this fraction of the likeliest one.")
    max_tokens: Positive = Field(512, description="Maximum length of a completion, in tokens.")
    rows: Positive = Field(32, description="Batch size of decoding, in completions.")
    memory_limit: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Memory limit in GB; lowers rows if needed."
    )
    thinking: bool | None = Field(None, description="Set the template's thinking switch, if it has one.")


class EvalConfig(AnswerConfig, EndpointConfig):
    """Settings of ``mlx-traces eval``."""


class GenerateConfig(AnswerConfig):
    """Settings of ``mlx-traces generate``: those of an evaluation, sampled, on training problems."""

    split: str = Field("train", description="Split of the data; a slice as in 'train[:64]' takes a part.")
    samples: Positive = Field(4, description="Completions per problem.")
    temperature: Annotated[float, Field(ge=0)] = Field(1.0, description="0 is greedy.")


class AdapterConfig(Config):
    """What is trained: low-rank adapters (LoRA, DoRA) on linear layers, or the weights themselves."""

    kind: Literal["lora", "dora", "full"] = Field("lora", description="LoRA, DoRA, or all weights of the layers.")
    rank: Positive = Field(16, description="Rank of the adapter's matrices.")
    scale: Annotated[float, Field(gt=0)] = Field(2.0, description="Factor on the adapter's output (alpha / rank).")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout rate of the adapter's inputs.")
    layers: Annotated[int, Field(ge=-1)] = Field(-1, description="Train only the last N layers; -1: all.")
    targets: list[str] | None = Field(None, description="Modules, as in self_attn.q_proj; default: every linear one.")


class OptimizerConfig(Config):
    """AdamW with warm-up and a cosine decay."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-4, description="Peak learning rate.")
    warmup: Fraction01 = Field(0.05, description="Fraction of the steps over which the learning rate rises from 0.")
    final_rate: Fraction01 = Field(0.0, description="Final learning rate, as a fraction of the peak.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Decoupled weight decay.")
    betas: tuple[Fraction01, Fraction01] = Field((0.9, 0.98), description="AdamW's decay of its two averages.")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Gradients are clipped to this norm.")


class ValidationConfig(ProblemConfig):
    """Held-out problems that a training loop answers, greedily, now and then: always the same ones."""

    split: str = Field("valid", description="Split of the data; a slice as in 'train[:200]' takes a part.")
    limit: Positive | None = Field(200, description="Number of problems, drawn at random by --seed; default: all.")
    max_tokens: Positive = Field(512, description="Maximum length of a completion, in tokens.")
    rows: Positive = Field(64, description="Batch size of decoding, in completions.")
    thinking: bool | None = Field(
        None, exclude_if=_is_none, description="Set the template's thinking switch; default: as in the training."
    )


class TrackingConfig(Config):
    """Where a training's metrics are sent too; no part of what is learned."""

    report_to: Literal["trackio", "wandb"] | None = Field(
        None, description="Send every line of metrics to this client too, which must be installed."
    )


class SFTSettings(LoadConfig, AdapterConfig, OptimizerConfig, TrackingConfig):
    """How a model is fine-tuned, whatever it is fine-tuned on."""

    valid_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05, description="Share of the problems whose traces are kept for the validation loss, without --valid."
    )
    epochs: Positive = Field(1, description="Passes over the data.")
    batch_size: Positive = Field(16, description="Traces per optimizer step.")
    micro_tokens: Positive = Field(512, description="Maximum tokens of a forward pass, padding included.")
    max_length: Positive = Field(2048, description="Longest sequence, prompt included, in tokens.")
    over_long: Literal["skip", "cut", "refuse"] = Field(
        "skip", description="What to do with longer ones: leave out, cut the end (the answer) off, or stop."
    )
    thinking: bool | None = Field(
        None, exclude_if=_is_none, description="Set the template's thinking switch; default: as each trace was made."
    )
    checkpoint_layers: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, slower."
    )
    logits_mb: Annotated[float, Field(gt=0)] = Field(128, description="Maximum size of a buffer of logits, in MiB.")
    eval_every: Annotated[int, Field(ge=0)] = Field(0, description="Steps between validations; 0: once an epoch.")
    evaluate: ValidationConfig | None = Field(None, description="Held-out problems to answer at each validation.")
    patience: Annotated[int, Field(ge=0)] = Field(
        0, description="Stop after this many validations without improvement; 0: never."
    )
    save_every: Positive = Field(50, description="Steps between checkpoints.")
    seed: int = Field(0, description="Seed of the new adapter, the order of the data, and dropout.")


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
    judge_max_tokens: Positive = Field(256, description="Longest reply of the judge, in tokens.")
    judge_cache: str = Field("data/judge.jsonl", description="File of the judge's replies; none is asked for twice.")
    judge_failures: Fraction01 = Field(0.2, description="Most unreadable replies, as a share, before it stops.")


class RLConfig(LoadConfig, AdapterConfig, OptimizerConfig, TrackingConfig, JudgeConfig, ProblemConfig):
    """Settings of reinforcement learning on a task's training problems, by its own grader, whatever the algorithm."""

    model: str = Field("nano", description="nano, a folder, or a hub id; MODEL@REVISION and MODEL+ADAPTER work.")
    adapter: str | None = Field(None, description="Folder of an adapter to train on; default: a new one.")
    split: str = Field("train", description="Split of the training problems; 'train[:64]' takes a part.")
    limit: Positive | None = Field(
        None, description="Take a seeded sample of so many training problems; default: one for each that is drawn."
    )
    seed: int = Field(0, description="Seed of the new adapter, the order of the problems, and the rollouts.")

    num_steps: Positive = Field(100, description="Steps: each draws problems, samples rollouts, and updates.")
    prompts_per_step: Positive = Field(16, description="Problems per step.")
    group_size: Annotated[int, Field(ge=2)] = Field(8, description="Rollouts per problem.")
    max_tokens: Positive = Field(512, description="Maximum length of a completion, in tokens.")
    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="Of the rollouts and of the update.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Sample from the likeliest tokens whose probabilities add up to this (nucleus sampling)."
    )
    top_k: Annotated[int, Field(ge=0)] = Field(0, description="Sample from the k likeliest tokens; 0: from all.")
    min_p: Fraction01 = Field(0.0, description="Drop tokens less likely than this fraction of the likeliest one.")
    thinking: bool | None = Field(None, description="Set the template's thinking switch, if it has one.")
    rows: Positive = Field(256, description="Batch size of decoding, in completions.")
    memory_limit: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Memory limit for sampling, in GB; lowers rows if needed."
    )

    rewards: dict[str, float] = Field(
        {"correct": 1.0},
        description="Weights of the rewards: correct, gated, flash, judge, format, ... or module:function of your own.",
    )
    tags: Literal["think", "r1", "sky-t1", "none"] = Field("think", description="Form that the format reward wants.")
    overlong: Literal["keep", "mask", "penalty"] = Field(
        "keep", description="Cut-off completions: train on them, leave them out, or also lower the reward near the end."
    )
    overlong_tokens: Annotated[int, Field(ge=0)] = Field(32, description="Tokens over which the penalty grows to 1.")
    pass_rate_low: Fraction01 = Field(0.0, description="Leave out problems that the model solves less often.")
    pass_rate_high: Fraction01 = Field(1.0, description="Leave out problems that the model solves more often.")
    probe_samples: Positive = Field(4, description="Completions per problem to find that out, before the first step.")

    micro_tokens: Positive = Field(
        1024, description="Most tokens of a forward pass, padding included; a GPU can be faster with more."
    )
    checkpoint_layers: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, slower."
    )
    logits_mb: Annotated[float, Field(gt=0)] = Field(128, description="Maximum size of a buffer of logits, in MiB.")
    eval_every: Positive = Field(10, description="Steps between validations.")
    evaluate: ValidationConfig | None = Field(None, description="Held-out problems to answer at each validation.")
    patience: Annotated[int, Field(ge=0)] = Field(
        0, description="Stop after this many validations without improvement; 0: never."
    )
    save_every: Positive = Field(5, description="Steps between checkpoints.")

    @field_validator("reference", "unbiased_kl", check_fields=False)
    @classmethod
    def _read_by_kl(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("kl_coef") == 0:
            raise ValueError("has no effect without kl_coef; set that too, or leave this out")
        return value


_REFERENCE = "Adapter that is the reference, or base, the bare model; default: the adapter trained on, else base."


class GRPOConfig(RLConfig):
    """Settings of ``mlx-traces grpo``."""

    advantage: Literal["std", "batch", "none", "rloo", "mean"] = Field(
        "std",
        description="Reward minus its group's mean, over the group's or the batch's deviation, or neither; leave-one-"
        "out; or minus the mean of all.",
    )
    max_resamples: Annotated[int, Field(ge=0)] = Field(
        0, description="Draw up to so many more times for groups with differing rewards (DAPO's dynamic sampling)."
    )
    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce"] = Field(
        "dapo", description="Loss; decides how tokens are weighted."
    )
    clip_eps: Annotated[float, Field(gt=0, le=1)] = Field(0.2, description="Lower clip bound, below a ratio of 1.")
    clip_eps_high: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Upper clip bound, above a ratio of 1; default: clip_eps."
    )
    kl_coef: Annotated[float, Field(ge=0)] = Field(0.0, description="Weight of the KL term to the reference.")
    reference: str | None = Field(None, description=_REFERENCE)
    unbiased_kl: bool = Field(
        False, exclude_if=not_, description="Weigh the KL term by the ratio: its gradient is then the reverse KL's."
    )
    importance: Literal["none", "token", "sequence"] = Field(
        "none", description="Correct for the sampler's probabilities by truncated weights per token or sequence."
    )
    importance_cap: Annotated[float, Field(gt=0)] = Field(2.0, description="Upper bound of those weights.")
    updates_per_batch: Positive = Field(1, description="Passes over each batch of rollouts.")
    minibatches: Positive = Field(1, description="Optimizer steps per pass over the rollouts.")

    @field_validator("loss", mode="before")
    @classmethod
    def _no_bnpo(cls, value: Any) -> Any:
        if value == "bnpo":  # a mean over micro-batches, which change nothing here
            raise ValueError("bnpo is dapo where a step is one mean over its tokens, as here; set dapo")
        return value


class PPOConfig(RLConfig):
    """Settings of ``mlx-traces ppo``."""

    group_size: Positive = Field(4, description="Rollouts per problem.")
    gamma: Fraction01 = Field(1.0, description="Discount of a token.")
    gae_lambda: Fraction01 = Field(
        0.95, description="Of the advantages: 0 trusts the values alone, 1 the rewards that were got."
    )
    whiten: bool = Field(True, description="Give the advantages mean 0 and variance 1 over the batch's tokens.")
    epochs: Positive = Field(2, description="Passes over each batch of rollouts.")
    minibatches: Positive = Field(2, description="Optimizer steps per pass over the rollouts.")
    clip_eps: Annotated[float, Field(gt=0, le=1)] = Field(0.2, description="Bound of the ratio, either side of 1.")
    value_clip: Annotated[float, Field(gt=0)] | None = Field(
        0.2, description="Bound of a value, either side of the old one; null for none."
    )
    value_learning_rate: Annotated[float, Field(gt=0)] = Field(
        1e-3, description="Peak learning rate of the value head; its course is that of the adapter's."
    )
    value_warmup_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="First steps in which only the value head learns."
    )
    entropy_coef: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Weight of the policy's entropy, to be kept up."
    )
    kl_coef: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Taken off the reward for each nat that a token is likelier than by the reference."
    )
    reference: str | None = Field(None, description=_REFERENCE)


class ScoreConfig(LoadConfig, JudgeConfig):
    """Settings of ``mlx-traces score``; ``mix`` weighs the components of the combined score, one left out weighs 0."""

    tags: Literal["think", "r1", "sky-t1", "none"] = Field(
        "think",
        description="Form of a trace: <think> then <answer>, <think> then text, Sky-T1's thought and solution, or any.",
    )
    length_limit: Positive = Field(2048, description="Tokens (words, if unknown) at which the length score is 0.")
    mix: dict[
        Literal["format", "structure", "faithfulness", "length", "repetition", "perplexity", "judge"],
        Annotated[float, Field(ge=0)],
    ] = Field(
        {"format": 1, "structure": 0.5, "faithfulness": 1, "length": 0.5, "repetition": 1, "judge": 1},
        description="Weights of the components in the combined score.",
    )
    model: str | None = Field(None, description="Model whose perplexity of the traces is a score.")
    thinking: bool | None = Field(
        None, description="Set the thinking switch of its template; default: as each trace was made."
    )
    rows: Positive = Field(16, description="Traces that the judge reads at once.")
    memory_limit: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Memory limit in GB; lowers rows if needed."
    )


class ReformatConfig(LoadConfig):
    """Settings of ``mlx-traces reformat``."""

    to: Literal["sky-t1", "think"] = Field(
        "sky-t1", description="Form to write: Sky-T1's thought and solution, or <think> and what follows it."
    )
    model: str | None = Field(None, description="Model that rewrites; default: by rule, only tags change.")
    model_prompt: str | None = Field(None, description="FILE.yaml with what it is told, {question} and {trace} in it.")
    max_tokens: Positive = Field(2048, description="Longest reply of the model, in tokens.")
    cache: str = Field("data/reformat.jsonl", description="File of the model's replies; none is asked for twice.")
    rows: Positive = Field(16, description="Traces that the model rewrites at once.")
    memory_limit: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Memory limit in GB; lowers rows if needed."
    )


class FilterConfig(Config):
    """Settings of ``mlx-traces filter``: its rules, in the order in which they are applied."""

    correct_only: bool = Field(True, description="Drop wrong traces; those that no task can judge stay.")
    well_formed: bool = Field(False, description="Drop traces whose format score is below 1.")
    finished: bool = Field(True, description="Drop traces that were cut off.")
    min_faithfulness: Fraction01 | None = Field(None, description="Least share of true equations, where there are any.")
    min_score: Fraction01 | None = Field(None, description="Least combined score.")
    duplicates: bool = Field(True, description="Drop a problem's second trace of the same text.")
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Drop a problem's trace that shares so much of its 5-grams with an earlier one (Jaccard)."
    )
    eval_task: str | None = Field(None, description="Task whose problems will be evaluated on and must not be trained.")
    eval_data: str | None = Field(None, description="File or hub data set of them; default: the task's own source.")
    eval_split: str = Field("test", description="Their split.")
    eval_limit: Positive | None = Field(None, description="Size of the seeded sample that is evaluated; default: all.")
    eval_seed: int = Field(0, description="Seed of that sample.")
    overlap_words: Annotated[int, Field(ge=0)] = Field(
        13, description="Drop a trace with so many words in a row of an evaluation question; 0: only the same problem."
    )
    per_problem: Positive | None = Field(None, description="Most traces of one problem.")
    prefer: Literal["short", "best", "diverse", "random"] = Field("short", description="Which of them are kept.")
    balance: Annotated[float, Field(gt=0)] | None = Field(
        None, description="No difficulty keeps more than so many times the median one's traces."
    )
    difficulty: Literal["pass_rate", "stratum"] = Field(
        "pass_rate", description="What difficulty is: the share correct of the problem's traces, or the task's stratum."
    )
    bins: Positive = Field(4, description="Bins of the pass rate.")
    seed: int = Field(0, description="Seed of random choices.")


class RawConfig(Config):
    """Raw traces that the first round starts from: solved problems of a task, or a file."""

    file: str | None = Field(None, description="File of traces, as `mlx-traces data` writes it; the rest is for none.")
    count: Positive | None = Field(None, description="Problems: generated ones, or a seeded sample of a data set.")
    prompts: list[str] | None = Field(None, description="Prompt styles; default: the rounds' own.")
    split: str = Field("train", description="Split of the data.")
    data: str | None = Field(None, description="File or hub data set of the problems; default: the task's own.")
    style: Literal["think", "plain", "boxed"] = Field("think", description="Where GSM8K's answers stand.")
    seed: int = Field(1, description="Seed of the problems.")


class Round3Config(Config):
    """The third round: reinforcement by the one algorithm whose settings are given."""

    grpo: GRPOConfig | None = Field(None, description="Settings of `mlx-traces grpo`.")
    ppo: PPOConfig | None = Field(None, description="Settings of `mlx-traces ppo`.")


class RoundsConfig(TrackingConfig):
    """Settings of ``mlx-traces rounds``: each station's own; model, adapter, task and files are filled in."""

    name: str = Field(
        ..., pattern=r"^\w[\w .+-]{0,79}$", description="Begins the names of all files and folders: no / in it."
    )
    model: str = Field("nano", description="nano, a folder, or a hub id.")
    task: str = Field("countdown", description="Task: gsm8k or countdown.")
    prompt: str = Field("thinking", description="Prompt style of generation and comparison.")
    raw: RawConfig = RawConfig()
    epoch1: SFTSettings | None = Field(SFTSettings(), description="null: start from the model's own traces at once.")
    generate: GenerateConfig = GenerateConfig()
    score: ScoreConfig = ScoreConfig()
    filter: FilterConfig = FilterConfig()
    epoch2: SFTSettings | None = Field(SFTSettings(), description="null: no round on the model's own traces.")
    round3: Round3Config | None = Field(
        None, description="Reinforcement on top, by grpo or ppo; its reference is what it starts from, unless named."
    )
    compare: EvalConfig = EvalConfig()
    data_dir: str = Field("data", description="Where raw/, generated/ and processed/ are.")
    runs_dir: str = Field("runs", description="Where run folders are kept.")


class StudyTask(EvalConfig):
    """One set of problems, asked in each of its prompts; model, adapter and prompt are filled in."""

    prompts: Annotated[list[str], Field(min_length=1)] = Field(
        ["direct", "thinking"], description="Prompt styles that each model is asked in."
    )


class StudyModel(Config):
    """One model: as it is, or made 16-bit or quantized anew first; with an adapter or without."""

    model: str = Field(..., description="nano, a folder, or a hub id; MODEL@REVISION and MODEL+ADAPTER work.")
    adapter: str | None = Field(None, description="Folder of a LoRA adapter.")
    label: str | None = Field(None, description="Name in the tables; default: the model's and the adapter's.")
    bits: Literal[16, 8, 6, 5, 4, 3, 2] | None = Field(None, description="Convert to these; default: as it is.")
    group_size: Literal[32, 64, 128] = Field(64, description="Weights that share a scale, below 16 bits.")
    prompts: list[str] | None = Field(None, description="Prompt styles for this model; default: the task's.")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="Other settings of its evaluations: max_tokens, thinking, weights, ..."
    )
    optional: bool = Field(False, description="Leave it out as long as the folder of its adapter is not there.")


class ComparedConfig(Config):
    """Every model on every task in every prompt, evaluated unless that is there already; compared with one of them."""

    tasks: list[StudyTask] = Field(default_factory=list, description="Problems, and how to ask them.")
    models: list[StudyModel] = Field(default_factory=list, description="Models, in the tables' order.")
    baseline: str | None = Field(
        None, description="Label or run of the row that others are compared with; default: the first."
    )
    runs_dir: str = Field("runs", description="Where run folders and converted models are kept.")
    out: str | None = Field(None, description="Folder of the tables; default of a study: tables/ and its file's name.")


class CompareConfig(ComparedConfig):
    """Settings of ``mlx-traces compare``: also finished runs, and evaluations each written out in full."""

    runs: list[str] = Field(default_factory=list, description="Run folders.")
    evals: list[EvalConfig] = Field(default_factory=list, description="Evaluations to make unless already there.")
    extractor: str | None = Field(None, description="Judge all runs by this extractor.")


class StudyConfig(ComparedConfig):
    """Settings of ``mlx-traces study``: also what may be said of every pair."""

    name: str = Field(..., description="Title of the study.")
    tasks: Annotated[list[StudyTask], Field(min_length=1)] = Field(..., description="Problems, and how to ask them.")
    models: Annotated[list[StudyModel], Field(min_length=1)] = Field(..., description="Models, in the tables' order.")
    pairs: Literal["all", "baseline"] = Field("all", description="Test every pair, or each row with the baseline.")
    apart: bool = Field(False, description="Evaluate each in a process of its own, so that its peak memory is its own.")


class NanoConfig(Config):
    """Settings of ``mlx-traces nano build``, the embedded model."""

    hidden_size: Positive = 128
    layers: Positive = 4
    heads: Positive = 2
    kv_heads: Positive = 1
    intermediate_size: Positive = 384
    problems: Positive = Field(26_000, description="Training problems, each seen once.")
    operands: tuple[int, int] = Field((3, 4), description="Fewest and most numbers of a problem.")
    direct_share: Fraction01 = Field(0.12, description="Share of problems asked with the direct prompt.")
    batch_size: Positive = 16
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-3, description="Peak of warm-up and cosine decay.")
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    bits: Literal[2, 3, 4, 6, 8] = 4
    quant_group_size: Literal[32, 64, 128] = 64
    seed: int = 0
    out: str = Field("runs/nano", description="Folder of the finished model.")


def shipped(folder: Literal["adapters", "configs"]) -> Path:
    """Return where the adapters or the configurations that come with the package are: installed, or in its checkout."""
    installed = Path(__file__).parent / {"adapters": "shipped", "configs": "configs"}[folder]
    return installed if installed.is_dir() else Path(__file__).parent.parent / folder


def find_config(name: str | Path) -> Path:
    """Find a configuration by its path or name, ``.yaml`` or not: here, in ``configs/``, or one of those shipped.

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
            return path  # a folder or a pipe: reading it says what is wrong
    except (OSError, ValueError):
        pass
    known = [file.stem for file in shipped("configs").glob("*.yaml")]
    hint = did_you_mean(path.name.removesuffix(".yaml"), known) or "; `mlx-traces configs` lists those shipped"
    raise UserError(f"{str(name)[:200]}: no such configuration file{hint}")


def read_config(kind: type[Config], path: str | Path | None, overrides: dict[str, Any]) -> Config:
    """Read a YAML file into a recipe's settings; ``overrides`` (already typed, or strings) win.

    Raises:
        UserError: naming the file, the field and what is wrong with it.
    """
    content: dict[str, Any] = {}
    if path is not None:
        content = read_yaml(Path(path))
    return build(kind, {**content, **overrides}, str(path) if path else "")


_WHOLE, _NUMBER, _SWITCH, _TEXT, _LIST, _MAPPING = (
    f"must be {what}"
    for what in ("a whole number", "a number", "true or false", "a text", "a list", "a mapping, 'name: value' lines")
)
_SAID = {  # pydantic's kinds of faults in our words; its own change from version to version
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
    """Validate settings; the UserError names ``where``, the field, what is wrong, and a likely spelling."""
    place = f"{where}: " if where else ""
    if giant := next(_giants(values), ""):
        raise UserError(f"{place}{giant}: a whole number of more than 18 digits")
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
        if first["type"] == "value_error":  # raised by a validator of ours, which says it all
            raise UserError(f"{place}{field}: {first['ctx']['error']}") from None
        said = _SAID.get(first["type"], first["msg"].lower()).format_map(first.get("ctx", {}))
        raise UserError(f"{place}{field}: {said}, not {str(first['input'])[:60]!r}") from None


def _missing(kind: type[Config], location: tuple[str | int, ...], where: str) -> str:
    """Say that a field is missing, what it is, and where to give it."""
    *outer, name = location
    lacking = f"{'.'.join(map(str, location))} is missing"
    if isinstance(name, int):
        return f"{lacking}: give as many values as it takes"
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
    """Return the settings that ``location`` leads to."""
    for part in location:
        if part in kind.model_fields:
            kind = next((k for k in _models_in(kind.model_fields[part].annotation)), kind)
    return kind


def _models_in(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    if get_origin(annotation) in (list, tuple, Union, types.UnionType):
        return [kind for inner in get_args(annotation) for kind in _models_in(inner)]
    return []
