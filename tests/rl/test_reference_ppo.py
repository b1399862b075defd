"""PPO's targets and losses against TRL's PPOTrainer, which is run on the CPU and watched at each of its losses.

TRL 1.16 has no PPO any more; 1.0.0 has one (``trl.experimental.ppo``). Where it is not there, this is skipped:
``pip install --no-deps --target trl-1.0 trl==1.0.0``, then
``PYTHONPATH=trl-1.0 pytest tests/rl/test_reference_ppo.py``.

TRL gives the reward at the cell behind a completion's stop token, where there is one, and learns a value there too; its
``padding_mask_p1`` has those cells. Completions of full length have none, and are as here.
"""

import os
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from factories import make_config, make_tokenizer

from mlx_traces.rl import losses

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
torch = pytest.importorskip("torch", reason="the reference needs torch")
ppo_trainer = pytest.importorskip("trl.experimental.ppo.ppo_trainer", reason="the reference needs a TRL that has PPO")
pytestmark = pytest.mark.reference

ROWS, LIMIT, GAMMA, LAM, CLIP, VALUE_CLIP, BETA = 8, 7, 0.97, 0.9, 0.1, 0.05, 0.3
TOLERANCE = 1e-5


def to_mlx(array):
    return mx.array(array.detach().float().numpy())


def watched(tmp_path, monkeypatch, stop):
    """Train a tiny model for one step; return what TRL's loop held at each of its policy losses."""
    from datasets import Dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<|im_start|>"
    torch.manual_seed(0)
    config = Qwen2Config(**make_config(initializer_range=0.3, num_labels=1, pad_token_id=tokenizer.pad_token_id))
    model, reference = Qwen2ForCausalLM(config), Qwen2ForCausalLM(config)
    value, reward = Qwen2ForSequenceClassification(config), Qwen2ForSequenceClassification(config)
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(tmp_path),
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=ROWS // 2,
            gradient_accumulation_steps=1,
            num_mini_batches=2,
            num_ppo_epochs=2,
            total_episodes=ROWS,
            response_length=LIMIT,
            stop_token_id=stop,
            temperature=0.7,
            learning_rate=3e-3,
            kl_coef=BETA,
            gamma=GAMMA,
            lam=LAM,
            cliprange=CLIP,
            cliprange_value=VALUE_CLIP,
            num_sample_generations=0,
            save_strategy="no",
        ),
        processing_class=tokenizer,
        model=model,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": [[5 + i, 6, 7] for i in range(ROWS)]}),
        eval_dataset=Dataset.from_dict({"input_ids": [[5, 6, 7]] * ROWS}),
    )
    moments, whole = [], ppo_trainer.masked_mean

    def masked_mean(values, mask, axis=None):
        frame = sys._getframe(1)
        if frame.f_code.co_name == "train" and values is frame.f_locals.get("pg_loss_max"):
            held = {name: x.detach().clone() if torch.is_tensor(x) else x for name, x in frame.f_locals.items()}
            moments.append(SimpleNamespace(**held, pg_loss=whole(values, mask, axis).detach()))
        return whole(values, mask, axis)

    monkeypatch.setattr(ppo_trainer, "masked_mean", masked_mean)
    trainer.train()
    return moments


@pytest.mark.parametrize("stop", [None, 40])
def test_targets_and_losses_are_trls(tmp_path, monkeypatch, stop):
    moments = watched(tmp_path, monkeypatch, stop)
    moments = [at for at in moments if at.update == 1]
    assert len(moments) == 4
    first = moments[0]
    states, tokens = ~first.padding_mask_p1, ~first.padding_mask
    rewards, values = to_mlx(first.rewards), to_mlx(first.values)
    if stop is None:  # then TRL's rewards are ours: less beta a nat, and the score with the last token
        ours = -BETA * (first.logprobs - first.ref_logprobs)
        ours[:, -1] += first.scores
        np.testing.assert_allclose(ours.numpy(), first.rewards.numpy(), atol=TOLERANCE)
    advantages, returns = losses.gae(rewards, values, to_mlx(states), gamma=GAMMA, lam=LAM)
    np.testing.assert_allclose(returns, (first.returns * states).numpy(), atol=TOLERANCE)
    whitened = losses.whiten(advantages, to_mlx(tokens))
    np.testing.assert_allclose(whitened, first.advantages.numpy(), atol=TOLERANCE)
    clipped = value_clipped = 0
    for at in moments:
        rows = at.micro_batch_inds
        mask, seen = to_mlx(tokens[rows]), to_mlx(states[rows])
        loss, sums = losses.policy_loss(
            to_mlx(at.new_logprobs),
            to_mlx(at.mb_logprobs),
            whitened[mx.array(rows)],
            mask,
            losses.token_weights(mask, "dapo"),
            kind="dapo",
            clip_eps=CLIP,
        )
        assert abs(loss.item() - at.pg_loss.item()) < TOLERANCE
        value_loss, more = losses.value_loss(
            to_mlx(at.vpred),
            to_mlx(at.mb_values),
            to_mlx(at.mb_return),
            seen,
            losses.token_weights(seen, "dapo"),
            clip_eps=VALUE_CLIP,
        )
        assert abs(value_loss.item() / at.vf_loss.item() - 1) < TOLERANCE
        assert more["value_clip"].item() / seen.sum().item() == pytest.approx(at.vf_clipfrac.item(), abs=1e-6)
        clipped, value_clipped = clipped + sums["clip"].item(), value_clipped + more["value_clip"].item()
    assert clipped > 0 and value_clipped > 0
    assert (stop is None) == bool(tokens.all())
