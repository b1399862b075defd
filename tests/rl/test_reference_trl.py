"""Advantages, losses, gradients, metrics and updates against TRL's GRPOTrainer, run on the CPU with the same weights.

TRL does all of its own part: it scores the completions, masks the truncated ones, computes advantages, importance
weights and the reference's log-probabilities, and then the loss of each micro-batch. Ours start from a plain forward.
"""

import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from factories import make_config, make_tokenizer
from mlx.utils import tree_flatten, tree_map

from mlx_traces.config import GRPOConfig
from mlx_traces.rl import grpo, losses

torch = pytest.importorskip("torch", reason="the reference needs torch")
trl = pytest.importorskip("trl", reason="the reference needs trl")
pytestmark = pytest.mark.reference

PROMPTS, SIZE, MICRO, LIMIT, RATE = 3, 4, 4, 9, 0.02
PROMPT_LENGTHS = (3, 6, 4)
LENGTHS = (9, 2, 5, 7, 1, 9, 4, 6, 3, 8, 5, 2)
CUT = (0, 5)  # of the limit's length, without a stop token
REWARDS = (1.0, 0.0, 0.5, 2.0, 0.1, 0.1, 0.1, 0.1, 0.0, 1.0, 1.0, -0.5)  # the second group has no variance
LOW, HIGH, BETA = 0.2, 0.28, 0.3
TOLERANCE = 1e-4

TRL_OF = {
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1 + HIGH},
}
VARIANTS = {
    "plain": {},
    "kl": {"beta": BETA, "use_bias_correction_kl": False},
    "unbiased_kl": {"beta": BETA, "use_bias_correction_kl": True},
}
CLIP_NAMES = {
    "clip_ratio/low_mean": "clip_low",
    "clip_ratio/high_mean": "clip_high",
    "clip_ratio/region_mean": "clip",
}
SAMPLERS = {
    "token_truncate": {},
    "token_mask": {"drop": True},
    "sequence_truncate": {"level": "sequence"},
    "sequence_mask": {"level": "sequence", "drop": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a tiny random Qwen2."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("reference") / "tiny"
    Qwen2ForCausalLM(Qwen2Config(**make_config(initializer_range=0.1))).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    # transformers 5 writes it where mlx_lm's qwen2 does not look, and would take its own default.
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": config["rope_parameters"]["rope_theta"]}))
    return folder


def completions(stop):
    """Return (prompts, completions) as token ids; all but the truncated end in the stop token."""
    random = np.random.default_rng(1)
    prompts = [random.integers(0, 90, PROMPT_LENGTHS[row // SIZE]).tolist() for row in range(PROMPTS * SIZE)]
    texts = [random.integers(0, 90, length).tolist() for length in LENGTHS]
    return prompts, [ids if row in CUT else [*ids[:-1], stop] for row, ids in enumerate(texts)]


def make_trainer(folder, tmp_path, sampler=None, rewards=REWARDS, **options):
    """Return a GRPOTrainer over the tiny model, moved a little away from its reference, with its scored rollouts."""
    from datasets import Dataset
    from transformers import Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<|im_start|>"
    rows = PROMPTS * SIZE
    settings = {
        "epsilon": LOW,
        "epsilon_high": HIGH,
        "scale_rewards": "group",
        "mask_truncated_completions": True,
        "max_completion_length": LIMIT,
        **options,
    }
    trainer = GRPOTrainer(
        model=Qwen2ForCausalLM.from_pretrained(folder),
        reward_funcs=lambda prompts, **_: list(rewards),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=rows // MICRO,
            num_generations=SIZE,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["x"] * PROMPTS}),
        processing_class=tokenizer,
    )
    prompts, texts = completions(tokenizer.eos_token_id)
    trainer.current_gradient_accumulation_steps = rows // MICRO
    trainer.use_vllm = sampler is not None  # what remains of vLLM here is the correction for its log-probabilities
    drawn = None if sampler is None else [row[: len(ids)].tolist() for row, ids in zip(sampler, texts, strict=True)]
    trainer._generate = lambda _: (prompts, texts, None, ["x"] * rows, drawn, {}, None, None)
    trainer.model.train()
    with torch.no_grad():
        noise = torch.Generator().manual_seed(2)
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
    inputs = trainer._generate_and_score_completions([{"prompt": "x"}] * rows)
    return trainer, inputs


def to_mlx(array):
    return mx.array(array.detach().numpy().astype(np.float32))


class Ours:
    """The same model in MLX, with the same rollouts."""

    def __init__(self, trainer, folder):
        from mlx_lm.utils import load_model

        self.model, self.reference = load_model(folder)[0], load_model(folder)[0]
        mine = dict(tree_flatten(self.model.parameters()))
        theirs = {name: to_mlx(array) for name, array in trainer.model.named_parameters() if name in mine}
        assert theirs.keys() == mine.keys()
        self.model.load_weights(list(theirs.items()))
        self.prompts, self.texts = completions(trainer.processing_class.eos_token_id)
        self.mask = np.arange(LIMIT) < np.array(LENGTHS)[:, None]
        self.mask[list(CUT)] = False

    def logprobs(self, model, rows):
        """Return (len(rows), LIMIT) log-probabilities of completion tokens; what padding holds is arbitrary."""
        width = max(PROMPT_LENGTHS) + LIMIT + 1
        tokens = [self.prompts[row] + self.texts[row] for row in rows]
        tokens = mx.array([ids + [0] * (width - len(ids)) for ids in tokens])
        logits = model(tokens).astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        at = mx.array([[len(self.prompts[row]) + t for t in range(LIMIT)] for row in rows])
        picked = mx.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
        return mx.take_along_axis(picked, at - 1, axis=1)

    def gradient(self, kind, micro_batches, old, advantages, weights, **options):
        """Return (loss, metrics, gradients) of a step, added up over the micro-batches."""
        import mlx.nn as nn

        total, sums, gradients = 0.0, [], None
        for rows in micro_batches:
            part = mx.array(rows)

            def loss(model, rows=rows, part=part):
                extra = {name: array[part] if isinstance(array, mx.array) else array for name, array in options.items()}
                mask = mx.array(self.mask[rows])
                arrays = (self.logprobs(model, rows), old[part], advantages[part], mask, weights[part])
                return losses.policy_loss(*arrays, kind=kind, clip_eps=LOW, clip_eps_high=HIGH, **extra)

            (value, metrics), mine = nn.value_and_grad(self.model, loss)(self.model)
            total, sums = total + float(value), [*sums, {name: float(s) for name, s in metrics.items()}]
            gradients = mine if gradients is None else tree_map(mx.add, gradients, mine)
        return total, sums, gradients


def distance(theirs, mine):
    """Return the largest difference between the arrays of the same names."""
    mine = dict(tree_flatten(mine))
    return max(float(np.abs(array.detach().numpy() - np.array(mine[name])).max()) for name, array in theirs.items())


def compare(trainer, inputs, folder, kind, updates=3, sampler=None):
    """Make the same updates on both sides; return the largest differences seen and the sums of the metrics."""
    from trl.trainer.utils import split_tensor_dict

    ours, args = Ours(trainer, folder), trainer.args
    rows = len(LENGTHS)
    micro_batches = [list(range(start, start + MICRO)) for start in range(0, rows, MICRO)]
    weights = losses.token_weights(mx.array(ours.mask), kind, max_tokens=LIMIT)
    advantages = losses.group_advantages(mx.array(REWARDS).reshape(PROMPTS, SIZE)).reshape(-1)
    worst = {"advantages": float(np.abs(inputs["advantages"].numpy() - np.array(advantages)).max())}
    assert inputs["completion_mask"].numpy().tolist() == ours.mask.astype(int).tolist()

    # An old policy some way off: per token, and per row with the advantage so that gspo too is cut at both ends.
    random = np.random.default_rng(4)
    shift = random.normal(0, 0.3, (rows, LIMIT)) + 0.2 * np.sign(inputs["advantages"].numpy())[:, None]
    shift[random.permutation(rows)[:4]] *= -1
    new = np.array(ours.logprobs(ours.model, range(rows)))
    old = np.where(np.arange(LIMIT) < np.array(LENGTHS)[:, None], new - shift, 0).astype(np.float32)
    inputs["old_per_token_logps"] = torch.tensor(old)
    options = {}
    if args.beta:
        reference = ours.logprobs(ours.reference, range(rows))
        theirs = inputs["ref_per_token_logps"].numpy()
        worst["ref_logprobs"] = float(np.abs(theirs - np.array(reference))[ours.mask].max())
        unbiased = args.use_bias_correction_kl
        options = {"ref_logprobs": reference, "kl_coef": args.beta, "unbiased_kl": unbiased}
    if sampler is not None:
        drawn, mode = sampler
        options["importance"] = losses.sampler_weights(
            mx.array(new), mx.array(drawn), mx.array(ours.mask), cap=1.2, **SAMPLERS[mode]
        )
        theirs = np.broadcast_to(inputs["importance_sampling_ratio"].numpy(), ours.mask.shape)
        worst["importance"] = float(np.abs(theirs - np.array(options["importance"]))[ours.mask].max())

    totals = {}
    parameters = dict(trainer.model.named_parameters())
    before = tree_map(mx.array, ours.model.parameters())
    for _ in range(updates):
        trainer.model.zero_grad()
        trainer._metrics["train"].clear()
        expected = 0.0
        for part in split_tensor_dict(inputs, rows // MICRO):
            loss = trainer._compute_loss(trainer.model, part)
            loss.backward()
            expected += loss.item()
        loss, sums, gradients = ours.gradient(kind, micro_batches, mx.array(old), advantages, weights, **options)
        grads = {name: parameter.grad for name, parameter in parameters.items()}
        assert max(float(grad.abs().max()) for grad in grads.values()) > 0.01
        now = {"loss": abs(loss - expected), "gradient": distance(grads, gradients)}
        names = {"kl": "kl_ref"} if args.beta else {}
        names |= {"cispo_clip_ratio": "clip_high"} if kind == "cispo" else CLIP_NAMES
        for theirs, mine in names.items():
            for at, part in enumerate(sums):
                # TRL counts a masked row's ratio of 1 among the rows, here it is none.
                count = part["tokens"] if kind != "gspo" or theirs == "kl" else MICRO
                gap = abs(trainer._metrics["train"][theirs][at] - part[mine] / count)
                now[theirs] = max(now.get(theirs, 0), gap)
        for part in sums:
            totals = {name: totals.get(name, 0) + value for name, value in part.items()}
        with torch.no_grad():
            for parameter in parameters.values():
                parameter -= RATE * parameter.grad
        ours.model.update(tree_map(lambda p, g: p - RATE * g, ours.model.trainable_parameters(), gradients))
        now["weights"] = distance(parameters, ours.model.parameters())
        worst = worst | {name: max(worst.get(name, 0), value) for name, value in now.items()}
    assert distance(parameters, before) > 10 * TOLERANCE
    return worst, SimpleNamespace(**totals)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", TRL_OF)
def test_three_updates_are_trls(folder, tmp_path, kind, variant, record_property):
    trainer, inputs = make_trainer(folder, tmp_path, **TRL_OF[kind], **VARIANTS[variant])
    worst, totals = compare(trainer, inputs, folder, kind)
    record_property("differences", worst)
    assert totals.clip_high > 0 and (totals.clip_low > 0 or kind == "cispo")
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("mode", SAMPLERS)
def test_importance_weights_are_trls(folder, tmp_path, mode, record_property):
    probe, _ = make_trainer(folder, tmp_path)
    ours = Ours(probe, folder)
    new = np.array(ours.logprobs(ours.model, range(len(LENGTHS))))
    drawn = (new - np.random.default_rng(5).normal(0.1, 0.2, new.shape)).astype(np.float32)
    options = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.2}
    trainer, inputs = make_trainer(folder, tmp_path, sampler=drawn, loss_type="dapo", **options)
    weights = inputs["importance_sampling_ratio"]
    assert (weights == (0 if mode.endswith("mask") else 1.2)).any() and (weights < 1).any()
    worst, _ = compare(trainer, inputs, folder, "dapo", updates=2, sampler=(drawn, mode))
    record_property("differences", worst)
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize(("scale", "theirs"), [("std", "group"), ("batch", "batch"), ("none", "none")])
def test_advantages_are_trls(folder, tmp_path, scale, theirs):
    _, inputs = make_trainer(folder, tmp_path, scale_rewards=theirs)
    advantages = losses.group_advantages(mx.array(REWARDS).reshape(PROMPTS, SIZE), scale)
    np.testing.assert_allclose(np.array(advantages).reshape(-1), inputs["advantages"].numpy(), atol=1e-5)


@pytest.mark.parametrize(("scale", "theirs"), [("std", "group"), ("batch", "batch"), ("none", "none")])
def test_advantages_beside_completions_without_a_reward_are_trls(folder, tmp_path, scale, theirs):
    given = [None if at in (1, 4, 5, 6, 10) else reward for at, reward in enumerate(REWARDS)]
    _, inputs = make_trainer(folder, tmp_path, rewards=given, scale_rewards=theirs)
    rollouts = [SimpleNamespace(reward=reward) for reward in given]
    groups = [rollouts[at : at + SIZE] for at in range(0, len(given), SIZE)]
    advantages = grpo.advantages(groups, GRPOConfig(advantage=scale))
    assert advantages.any()
    np.testing.assert_allclose(advantages, inputs["advantages"].numpy(), atol=1e-5)


def test_the_overlong_penalty_is_trls():
    from trl.rewards import get_soft_overlong_punishment

    lengths = list(range(40))
    for cache in (0, 1, 10, 30):
        expected = get_soft_overlong_punishment(30, cache)(completion_ids=[[0] * length for length in lengths])
        np.testing.assert_allclose(losses.overlong_penalty(mx.array(lengths), 30, cache), expected, atol=1e-6)
