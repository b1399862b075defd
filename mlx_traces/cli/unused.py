"""Notes on settings that were given but change nothing."""

from collections.abc import Iterator
from typing import Any

from mlx_traces.config import (
    AnswerConfig,
    Config,
    FilterConfig,
    GRPOConfig,
    LoadConfig,
    ReformatConfig,
    RLConfig,
    RoundsConfig,
    ScoreConfig,
    SFTSettings,
)
from mlx_traces.errors import UserError
from mlx_traces.tasks import TASKS, get_task


def _examples(config: Any) -> bool:
    """Whether the prompt has worked examples; True for an unknown task, which is an error elsewhere."""
    if config.task not in TASKS:
        return True
    task = get_task(config.task)
    return (config.prompt or task.default_prompt) in task.few_shot


def _validated(config: SFTSettings) -> bool:
    """Whether SFT has a validation; its settings in `rounds` have no ``valid``."""
    return bool(getattr(config, "valid", None) or config.valid_share or config.evaluate)


_TAGGED = {"gated", "format", "structure", "faithfulness", "equations", "steps"}  # rewards
_SELECTED = ("eval_data", "eval_split", "eval_limit", "eval_seed", "overlap_words")
_JUDGED = ("judge_prompt", "judge_max_tokens", "judge_cache", "judge_failures")
_REWRITTEN = ("model_prompt", "max_tokens", "cache", "rows", "memory_limit")
_NO = (  # classes of settings (empty: all), fields, whether they change nothing, and why
    ((), ("top_p", "top_k", "min_p"), lambda c: c.temperature == 0, "at temperature 0 (greedy)"),
    ((AnswerConfig, RLConfig), ("shots", "shots_data"), lambda c: not _examples(c), "for a prompt without examples"),
    (
        (AnswerConfig,),
        ("stop_in_thoughts",),
        lambda c: not _examples(c) and not (c.prompt or "").endswith((".yaml", ".yml")),
        "for a prompt without stop strings",
    ),
    ((), ("think_more",), lambda c: not c.think_at_least, "without think_at_least"),
    ((), ("think_then",), lambda c: c.think_tokens is None, "without think_tokens"),
    ((), ("block",), lambda c: not c.stop_when_decided, "without stop_when_decided"),
    ((ScoreConfig,), ("thinking",), lambda c: c.model is None, "without model"),
    ((), _SELECTED, lambda c: c.eval_task is None, "without eval_task"),
    ((), ("prefer",), lambda c: c.per_problem is None, "without per_problem"),
    ((), ("difficulty", "bins"), lambda c: c.balance is None, "without balance"),
    ((), _JUDGED, lambda c: c.judge is None, "without judge"),
    ((ReformatConfig,), _REWRITTEN, lambda c: c.model is None, "without model"),
    ((RLConfig,), ("eval_every", "patience"), lambda c: c.evaluate is None, "without evaluate"),
    ((SFTSettings,), ("eval_every", "patience"), lambda c: not _validated(c), "without a validation"),
    ((RLConfig,), ("tags",), lambda c: not _TAGGED & c.rewards.keys(), "without a reward that reads them"),
    ((RLConfig,), ("supervision",), lambda c: not c.step_weight, "without step_weight"),
    ((), ("overlong_tokens",), lambda c: c.overlong != "penalty", "unless overlong is penalty"),
    ((), ("probe_samples",), lambda c: (c.pass_rate_low, c.pass_rate_high) == (0, 1), "without pass_rate_low or _high"),
    ((), ("importance_cap",), lambda c: c.importance == "none", "without importance"),
    ((), ("rank", "scale", "dropout", "targets"), lambda c: c.kind == "full", "where all weights are trained"),
    ((RLConfig,), ("dropout",), lambda c: c.kind != "full", "in grpo and ppo, where dropout is off"),
    ((GRPOConfig,), ("clip_eps", "clip_eps_high"), lambda c: c.loss == "reinforce", "for loss reinforce"),
    (
        (GRPOConfig,),
        ("clip_eps",),
        lambda c: c.loss == "cispo" and c.clip_eps_high is not None,
        "for loss cispo beside clip_eps_high",
    ),
    ((), ("valid_share",), lambda c: getattr(c, "valid", None) is not None, "beside valid"),
    ((), ("eval_seed",), lambda c: c.eval_task is not None and c.eval_limit is None, "without eval_limit"),
    ((), ("bins",), lambda c: c.balance is not None and c.difficulty == "stratum", "where difficulty is the stratum"),
    (
        (FilterConfig,),
        ("seed",),
        lambda c: c.balance is None and (c.per_problem is None or c.prefer != "random"),
        "without balance, or per_problem and prefer random",
    ),
    ((ScoreConfig,), ("rows", "memory_limit"), lambda c: c.judge is None, "without judge"),
    ((ScoreConfig,), tuple(LoadConfig.model_fields), lambda c: (c.model or c.judge) is None, "without model or judge"),
    ((ReformatConfig,), tuple(LoadConfig.model_fields), lambda c: c.model is None, "without model"),
)


def unused(config: Config) -> Iterator[str]:
    """Yield a line for each setting that was given, differs from its default, and changes nothing.

    Raises:
        UserError: for a filter's ``eval_...`` settings without ``eval_task``, as no problem would be left out.
    """
    for kinds, names, idle, why in _NO:
        for name in names if not kinds or isinstance(config, kinds) else ():
            field = type(config).model_fields.get(name)
            given = name in config.model_fields_set and field and getattr(config, name) != field.default
            if given and idle(config):
                line = f"{name} {getattr(config, name)} changes nothing {why}"
                if isinstance(config, FilterConfig) and names is _SELECTED:
                    raise UserError(f"{line}; name its task with --eval-task, or leave {name} out")
                yield line
    inner = (*getattr(config, "evals", ()), getattr(config, "quality", None))
    if isinstance(config, RoundsConfig):
        inner = (config.score, config.filter, config.epoch1, config.epoch2)
    yield from (line for one in inner if one is not None for line in unused(one))
