"""Policy-gradient training as pure functions of arrays: advantages, losses, their weights, and PPO's targets.

A step is one optimizer update; its gradient may be accumulated over micro-batches. So a loss is a weighted sum over
tokens. ``token_weights`` computes the weights once for the whole step: the sums of the micro-batches then add up to
the loss of the paper.

Arrays: B rows (completions), T tokens, everything computed in float32. A ``mask`` is (B, T), bool or 0 and 1: True for
a token that is trained on. The values at other positions are never used, not even nan and inf. A cut-off completion
that should not be trained on has a row of False. It adds nothing to the loss; whether it counts in the denominator
depends on the loss type (``token_weights``).

"TRL" below is its version 1.16, which ``tests/rl/test_reference_trl.py`` compares with.
"""

from typing import get_args

import mlx.core as mx

from mlx_traces.config import Loss
from mlx_traces.errors import unknown

KINDS = get_args(Loss)
SCALES = ("std", "batch", "none")
LEVELS = ("token", "sequence")

# Log-ratios are clipped to this, so that no exp() and no gradient overflows; e^20 is far outside usual clip bounds.
_LOG_RATIO = 20.0


def group_advantages(
    rewards: mx.array, scale: str = "std", eps: float = 1e-4, every: mx.array | None = None
) -> mx.array:
    """Return each completion's reward minus its group's mean, scaled: GRPO (arXiv 2402.03300, section 4.1.2).

    The standard deviation is the unbiased one (G - 1), as in TRL; the paper does not say. A group of equal rewards
    gets exactly 0.

    Args:
        rewards: (P, G), the G completions of each of P prompts.
        scale: ``std`` divides by the group's standard deviation; ``batch`` by that of all rewards, over their own
            mean (TRL's ``scale_rewards="batch"``; arXiv 2508.08221); ``none`` not at all (Dr. GRPO, arXiv 2503.20783).
        eps: added to the standard deviation; TRL's value.
        every: (N,), all rewards of the batch, if ``rewards`` has only some of them; for ``batch``.

    Returns:
        (P, G).

    Raises:
        ValueError: if ``rewards`` is not 2-D or a group has fewer than two.
        UserError: for an unknown ``scale``.
    """
    rewards = _groups(rewards)
    if scale not in SCALES:
        raise unknown("scale of advantages", scale, SCALES)
    centred = _centred(rewards)
    if scale == "none":
        return centred
    if scale == "batch" and every is not None:
        return centred / (mx.std(every, ddof=1) + eps)
    return centred / (mx.std(rewards, axis=1 if scale == "std" else None, keepdims=True, ddof=1) + eps)


def rloo_advantages(rewards: mx.array) -> mx.array:
    """Return each reward minus the mean of the others in its group (REINFORCE leave-one-out, arXiv 2402.14740).

    The baseline does not depend on the completion, so the gradient is unbiased. A group of equal rewards gets exactly
    0. TRL's RLOO can also whiten these over the batch; here that is ``whiten``.

    Args:
        rewards: (P, G).

    Returns:
        (P, G).

    Raises:
        ValueError: if ``rewards`` is not 2-D or a group has fewer than two.
    """
    rewards = _groups(rewards)
    size = rewards.shape[1]
    return _centred(rewards) * (size / (size - 1))


def reinforce_advantages(rewards: mx.array, baseline: bool = True) -> mx.array:
    """Return the rewards minus their mean over the batch, or as they are (Williams 1992).

    The mean includes a completion's own reward, which shrinks the expected gradient by 1 - 1/N.

    Args:
        rewards: of any shape, N in all.
        baseline: whether to subtract the mean.
    """
    rewards = rewards.astype(mx.float32)
    return _centred(rewards.reshape(1, -1)).reshape(rewards.shape) if baseline else rewards


def _groups(rewards: mx.array) -> mx.array:
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (prompts, at least 2 completions each), not {rewards.shape}")
    return rewards.astype(mx.float32)


def _centred(rewards: mx.array) -> mx.array:
    """Subtract its mean from each row of (P, G); a row of equal values becomes exactly 0, despite rounding."""
    level = mx.max(rewards, axis=1, keepdims=True) == mx.min(rewards, axis=1, keepdims=True)
    return mx.where(level, 0.0, rewards - mx.mean(rewards, axis=1, keepdims=True))


def overlong_penalty(lengths: mx.array, max_tokens: int, cache: int) -> mx.array:
    """Return what to add to the reward for a completion's length: DAPO's soft punishment (arXiv 2503.14476, eq. 13).

    0 up to ``max_tokens - cache``, then linear to -1 at ``max_tokens``, and -1 beyond.

    Args:
        lengths: tokens of each completion, of any shape.
        max_tokens: L_max, the limit.
        cache: L_cache, the width of the slope in tokens; 0 makes it a jump after ``max_tokens``.

    Raises:
        ValueError: if ``cache`` is not from 0 to ``max_tokens``.
    """
    if not 0 <= cache <= max_tokens:
        raise ValueError(f"the slope of {cache} tokens does not fit in {max_tokens}")
    over = lengths.astype(mx.float32) - (max_tokens - cache)
    return -mx.clip(over / cache, 0, 1) if cache else -(over > 0).astype(mx.float32)


def kl_k3(logprobs: mx.array, ref_logprobs: mx.array) -> mx.array:
    """Return the per-token estimate of KL(policy || reference) on the policy's own tokens.

    Schulman's k3 (http://joschu.net/blog/kl-approx.html), GRPO's eq. 4: r - 1 - log r with r = reference / policy.
    Never negative, up to rounding; its value is unbiased if the policy drew the tokens. Where both probabilities are
    equal, value and gradient are exactly 0. Beyond log r = 20 it is constant.

    Args:
        logprobs: log-probabilities of the tokens under the policy, of any shape.
        ref_logprobs: the same under the reference.
    """
    log_ratio = mx.minimum(ref_logprobs.astype(mx.float32) - logprobs.astype(mx.float32), _LOG_RATIO)
    return mx.expm1(log_ratio) - log_ratio


def token_weights(mask: mx.array, kind: str, *, max_tokens: int | None = None) -> mx.array:
    """Return per-token weights: a step's loss is the sum of weight times per-token loss.

    ``grpo``, ``gspo``: the mean over rows of each row's mean. ``dr_grpo``: the sum over rows * ``max_tokens``.
    ``reinforce``: the mean over rows of each row's sum, which makes the gradient that of the expected reward.
    ``dapo``, ``cispo``: the mean over all the step's tokens. TRL's ``bnpo`` is the mean over micro-batches of each
    one's token mean, which depends on how the rows are split; it is not offered here.

    A row without tokens, such as a masked cut-off completion, counts in denominators of rows (``grpo``, ``gspo``,
    ``dr_grpo``, ``reinforce``) and not in those of tokens, as with TRL's ``mask_truncated_completions``. Where TRL
    splits one generation into several steps, its ``dapo`` and ``cispo`` divide by the steps' average number of tokens;
    here they divide by this step's number.

    Args:
        mask: (B, T) of the whole step.
        kind: one of ``KINDS``.
        max_tokens: the longest completion allowed; ``dr_grpo`` needs it, the others ignore it.

    Returns:
        (B, T), 0 where the mask is 0.

    Raises:
        ValueError: for ``dr_grpo`` without ``max_tokens``.
        UserError: for an unknown ``kind``.
    """
    if kind not in KINDS:
        raise unknown("loss", kind, KINDS)
    kept = (mask != 0).astype(mx.float32)
    rows = kept.shape[0]
    if kind in ("grpo", "gspo"):
        return kept / (mx.maximum(kept.sum(axis=1, keepdims=True), 1) * rows)
    if kind == "dr_grpo":
        if not max_tokens:
            raise ValueError("dr_grpo divides by max_tokens, which is not given")
        return kept / (rows * max_tokens)
    if kind == "reinforce":
        return kept / rows
    return kept / mx.maximum(kept.sum(), 1)


def policy_loss(
    logprobs: mx.array,
    old_logprobs: mx.array,
    advantages: mx.array,
    mask: mx.array,
    weights: mx.array,
    *,
    kind: str = "grpo",
    clip_eps: float = 0.2,
    clip_eps_high: float | None = None,
    ref_logprobs: mx.array | None = None,
    kl_coef: float = 0.0,
    unbiased_kl: bool = False,
    importance: mx.array | None = None,
) -> tuple[mx.array, dict[str, mx.array]]:
    """Return the weighted sum of the per-token losses over some rows of a step, and sums for metrics.

    With r the ratio of the policy to the old one and A the advantage, a token's loss is

    - ``grpo``, ``dr_grpo``, ``dapo``: -min(r A, clip(r, 1 - eps, 1 + eps_high) A), PPO's (arXiv 1707.06347,
      eq. 7). They differ by their weights alone. With (B, T) advantages ``dapo`` is the policy loss of PPO.
    - ``gspo``: the same with the row's ratio, exp of the mean of the row's log-ratios (arXiv 2507.18071, eqs. 5 and 7).
    - ``cispo``: -min(r, 1 + eps_high) A log p, no gradient through the ratio (arXiv 2506.13585, eqs. 4 and 5). There
      is no lower bound, as in the paper's own runs. TRL's ``epsilon_high`` is the bound itself, 1 + eps_high.
    - ``reinforce``: -A log p. ``old_logprobs`` serves the metrics and ``unbiased_kl`` only.

    It is multiplied by ``importance``; ``kl_coef`` times ``kl_k3`` to the reference is added. Log-ratios are clipped to
    20 either way and have no gradient beyond.

    Args:
        logprobs: (B, T) of the tokens under the policy, the only argument that gradients flow to.
        old_logprobs: (B, T) under the policy before the first update on these rows; at that update they equal
            ``logprobs``, and every ratio is 1.
        advantages: (B,), or (B, T) if each token has its own (not for ``gspo``).
        mask: (B, T) of these rows.
        weights: (B, T), these rows of ``token_weights`` for the whole step.
        kind: one of ``KINDS``; the one that the weights are for.
        clip_eps: the lower clip bound is 1 - clip_eps.
        clip_eps_high: the upper one is 1 + clip_eps_high; None for ``clip_eps`` (DAPO and GSPO use another value).
        ref_logprobs: (B, T) under the reference; needed if ``kl_coef`` is not 0, else only measured.
        kl_coef: beta, the weight of the KL term.
        unbiased_kl: multiply the KL term by the ratio, gradient included, which makes its gradient the reverse KL's
            (arXiv 2512.02556; TRL's ``use_bias_correction_kl``, on by default there). GRPO's eq. 3 does not.
        importance: (B, T) of ``sampler_weights``; None for 1.

    Returns:
        The loss, a scalar, and sums over these rows; add up both over micro-batches. The sums ``tokens`` and
        ``ratios`` are counts: one ratio a token, for ``gspo`` one a row with tokens. To be divided by ``ratios``:
        ``ratio``, and ``clip_low``, ``clip_high`` and ``clip``, how many are beyond a bound that binds for the
        advantage's sign (``cispo``: only ``clip_high``, which binds for any sign and is counted for A > 0 as in TRL;
        ``reinforce``: 0). To be divided by ``tokens``: ``kl_old``, KL(old || policy), and with a reference ``kl_ref``,
        the KL term.

    Raises:
        ValueError: for a ``kl_coef`` without ``ref_logprobs``.
        UserError: for an unknown ``kind``.
    """
    if kind not in KINDS:
        raise unknown("loss", kind, KINDS)
    if kl_coef and ref_logprobs is None:
        raise ValueError("kl_coef needs ref_logprobs")
    mask = mask != 0
    logprobs, old = _kept(logprobs, mask), mx.stop_gradient(_kept(old_logprobs, mask))
    advantages = _kept(advantages if advantages.ndim == 2 else advantages[:, None], mask)
    counted = mask
    log_ratio = logprobs - old
    if kind == "gspo":
        log_ratio = log_ratio.sum(axis=1, keepdims=True) / mx.maximum(mask.sum(axis=1, keepdims=True), 1)
        # The (B, 1) ratios are broadcast to (B, T) advantages below; a row counts once, at its first token.
        counted = mask & (mx.cumsum(mask, axis=1) == 1)
    ratio = mx.exp(mx.clip(log_ratio, -_LOG_RATIO, _LOG_RATIO))

    bottom, top = 1 - clip_eps, 1 + (clip_eps if clip_eps_high is None else clip_eps_high)
    low = high = mx.zeros_like(mask)
    if kind == "reinforce":
        losses = -advantages * logprobs
    elif kind == "cispo":
        losses = -mx.stop_gradient(mx.minimum(ratio, top)) * advantages * logprobs
        high = (ratio > top) & (advantages > 0)
    else:
        low, high = (ratio < bottom) & (advantages < 0), (ratio > top) & (advantages > 0)
        # The minimum of the two products; a tie, as at a ratio of 1, keeps its full gradient.
        losses = -mx.where(low | high, mx.clip(ratio, bottom, top), ratio) * advantages
    if importance is not None:
        losses = losses * mx.stop_gradient(_kept(importance, mask))

    sums = {
        "tokens": mask,
        "ratios": counted,
        "ratio": counted * ratio,
        "clip_low": counted & low,
        "clip_high": counted & high,
        "clip": counted & (low | high),
        "kl_old": kl_k3(old, logprobs),
    }
    if ref_logprobs is not None:
        kl = kl_k3(logprobs, mx.stop_gradient(_kept(ref_logprobs, mask)))
        kl = kl * ratio if unbiased_kl else kl
        losses = losses + kl_coef * kl if kl_coef else losses
        sums["kl_ref"] = kl
    metrics = {name: mx.stop_gradient(array.astype(mx.float32).sum()) for name, array in sums.items()}
    return (_kept(weights, mask) * losses).sum(), metrics


def sampler_weights(
    trainer: mx.array,
    sampler: mx.array,
    mask: mx.array,
    *,
    cap: float = 2.0,
    level: str = "token",
    drop: bool = False,
) -> mx.array:
    """Return importance weights that correct for a sampler whose probabilities are not quite the trainer's.

    Truncated importance sampling: min(trainer / sampler, ``cap``) (Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training"). With ``drop`` a weight above the cap is 0 instead. These are the four
    modes of TRL's ``vllm_importance_sampling_mode``: its default is ``sequence_mask`` (``level`` sequence, ``drop``,
    ``cap`` 3), here it is ``token_truncate``.

    Args:
        trainer: (B, T) log-probabilities of the tokens under the old policy, computed as in training.
        sampler: (B, T) log-probabilities of the tokens under the sampler.
        mask: (B, T).
        cap: C, the greatest weight.
        level: ``token`` for a token's own ratio, ``sequence`` for the product over its row.
        drop: whether weights above the cap become 0.

    Returns:
        (B, T) without gradient, 0 where the mask is 0.

    Raises:
        UserError: for an unknown ``level``.
    """
    if level not in LEVELS:
        raise unknown("level of importance weights", level, LEVELS)
    mask = mask != 0
    log_ratio = _kept(trainer, mask) - _kept(sampler, mask)
    if level == "sequence":
        log_ratio = log_ratio.sum(axis=1, keepdims=True)
    ratio = mx.exp(mx.clip(log_ratio, -_LOG_RATIO, _LOG_RATIO))
    ratio = mx.where(ratio > cap, 0, ratio) if drop else mx.minimum(ratio, cap)
    return mx.stop_gradient(mx.where(mask, ratio, 0))


def kl_sampler(trainer: mx.array, sampler: mx.array, mask: mx.array) -> mx.array:
    """Return the sum over tokens of KL(sampler || trainer), by ``kl_k3``; arguments as in ``sampler_weights``."""
    mask = mask != 0
    return kl_k3(_kept(sampler, mask), _kept(trainer, mask)).sum()


def gae(
    rewards: mx.array, values: mx.array, mask: mx.array, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[mx.array, mx.array]:
    """Return generalized advantage estimates and the value targets (arXiv 1506.02438, eq. 16).

    Only tokens where the mask is 1 are states; the others are skipped, and their values are never used. After the last
    state the value is 0, also for a completion that was cut off.

    Args:
        rewards: (B, T), the reward received after each token.
        values: (B, T), the value of the state before each token; no gradient flows to it.
        mask: (B, T).
        gamma: discount of a token.
        lam: lambda; 0 gives the one-step temporal difference, 1 the return minus the value.

    Returns:
        Advantages and returns (advantage plus value), both (B, T), 0 where the mask is 0.
    """
    mask = mask != 0
    rewards, values = _kept(rewards, mask), mx.stop_gradient(_kept(values, mask))
    following = advantage = mx.zeros((mask.shape[0],))
    columns = []
    for t in reversed(range(mask.shape[1])):
        error = rewards[:, t] + gamma * following - values[:, t]
        advantage = mx.where(mask[:, t], error + gamma * lam * advantage, advantage)
        following = mx.where(mask[:, t], values[:, t], following)
        columns.append(advantage)
    advantages = mx.where(mask, mx.stack(columns[::-1], axis=1), 0)
    return advantages, mx.where(mask, advantages + values, 0)


def whiten(x: mx.array, mask: mx.array, *, shift: bool = True, eps: float = 1e-8) -> mx.array:
    """Return ``x`` with mean 0 and variance 1 (unbiased: n - 1) over the elements where the mask is 1.

    Args:
        x: of any shape.
        mask: of the same shape.
        shift: False adds the mean back after scaling.
        eps: added to the variance, so that equal elements, or a single one, give 0, up to rounding.

    Returns:
        Of the same shape, 0 where the mask is 0.
    """
    mask = mask != 0
    x = _kept(x, mask)
    count = mask.sum()
    mean = x.sum() / mx.maximum(count, 1)
    centred = mx.where(mask, x - mean, 0)
    variance = mx.square(centred).sum() / mx.maximum(count - 1, 1)
    scaled = centred * mx.rsqrt(variance + eps)
    return scaled if shift else mx.where(mask, scaled + mean, 0)


def value_loss(
    values: mx.array,
    old_values: mx.array,
    returns: mx.array,
    mask: mx.array,
    weights: mx.array,
    *,
    clip_eps: float = 0.2,
) -> tuple[mx.array, dict[str, mx.array]]:
    """Return the weighted sum of PPO's clipped value loss over some rows of a step, and sums for metrics.

    A token's loss is half the larger of two squared errors: that of the value, and that of the value clipped to the old
    one +- ``clip_eps`` (the PPO authors' code; arXiv 1707.06347 has no equation for it).

    Args:
        values: (B, T), the only argument that gradients flow to.
        old_values: (B, T) at the start of the step.
        returns: (B, T), the targets, of ``gae``.
        mask: (B, T) of these rows.
        weights: (B, T), these rows of ``token_weights`` for the whole step; ``dapo`` gives the token mean.
        clip_eps: clip bound, in the unit of a value.

    Returns:
        The loss, and the sums ``tokens``, ``value_clip`` (tokens whose clipped error is the greater) and
        ``value_error`` (squared errors of the unclipped values).
    """
    mask = mask != 0
    values = _kept(values, mask)
    old, returns = (mx.stop_gradient(_kept(array, mask)) for array in (old_values, returns))
    plain = mx.square(values - returns)
    held = mx.square(mx.clip(values, old - clip_eps, old + clip_eps) - returns)
    sums = {"tokens": mask, "value_clip": held > plain, "value_error": plain}
    metrics = {name: mx.stop_gradient(array.astype(mx.float32).sum()) for name, array in sums.items()}
    return (0.5 * _kept(weights, mask) * mx.maximum(plain, held)).sum(), metrics


def explained_variance(values: mx.array, returns: mx.array, mask: mx.array) -> mx.array:
    """Return 1 - Var(returns - values) / Var(returns) where the mask is 1: 1 if perfect, 0 for a constant prediction.

    A scalar; not finite if the returns do not vary.
    """
    mask = mask != 0
    returns = _kept(returns, mask)
    return 1 - _variance(returns - _kept(values, mask), mask) / _variance(returns, mask)


def _variance(x: mx.array, mask: mx.array) -> mx.array:
    count = mask.sum()
    return mx.where(mask, mx.square(x - mx.where(mask, x, 0).sum() / count), 0).sum() / count


def _kept(array: mx.array, mask: mx.array) -> mx.array:
    """Return the array as float32, with 0 where the mask is False, so that no nan or inf of padding is used."""
    return mx.where(mask, array.astype(mx.float32), 0.0)
