"""Loss and gradients of a step against transformers, which runs the same weights in PyTorch."""

import json

import mlx.core as mx
import numpy as np
import pytest
from factories import make_config
from mlx.utils import tree_flatten

from mlx_traces.config import SFTConfig
from mlx_traces.engine import batching
from mlx_traces.engine.batching import Example
from mlx_traces.engine.logprobs import split, token_logprobs
from mlx_traces.models import adapters
from mlx_traces.train import sft
from mlx_traces.train.gradients import checkpointed

torch = pytest.importorskip("torch", reason="the reference needs torch")
pytestmark = pytest.mark.reference

RANK, SCALE, TOLERANCE = 4, 2.0, 1e-4


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def models(request, tmp_path_factory):
    """Return a random Qwen2 in PyTorch and the same one in MLX, an adapter with random weights in training."""
    from mlx_lm.utils import load_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("reference") / "tiny"
    theirs = Qwen2ForCausalLM(Qwen2Config(**make_config(initializer_range=0.1, tie_word_embeddings=request.param)))
    theirs.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    # transformers 5 writes it where mlx_lm's qwen2 does not look, and would take its own default.
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": config["rope_parameters"]["rope_theta"]}))
    ours, _ = load_model(folder)
    adapters.start(ours, SFTConfig(data="x", rank=RANK, scale=SCALE))
    draw = np.random.default_rng(0)
    arrays = tree_flatten(ours.trainable_parameters())
    ours.load_weights([(k, mx.array(draw.normal(0, 0.1, v.shape).astype(np.float32))) for k, v in arrays], strict=False)
    return theirs.float().eval(), ours


def rows():
    draw = np.random.default_rng(1)
    return [
        Example(f"r{i}", tuple(draw.integers(0, 128, n).tolist()), (*(draw.random(n - 1) < 0.6).tolist(), True))
        for i, n in enumerate((12, 3, 25, 7, 18))
    ]


def adapted(theirs, ours):
    """Hang our low-rank matrices into the PyTorch model by hand; return them by name."""
    leaves = {}
    for name, array in tree_flatten(ours.trainable_parameters()):
        leaves[name] = torch.tensor(np.array(array), requires_grad=True)
    for name, module in theirs.named_modules():
        if f"{name}.lora_a" in leaves:
            a, b = leaves[f"{name}.lora_a"], leaves[f"{name}.lora_b"]
            yield module.register_forward_hook(lambda _, inputs, output, a=a, b=b: output + SCALE * (inputs[0] @ a @ b))
    yield leaves


def their_gradient(theirs, ours, examples):
    """Return transformers' loss over the learned labels of a padded batch, with its mask, and its gradients."""
    *hooks, leaves = adapted(theirs, ours)
    width = max(len(example.ids) for example in examples)
    ids, labels, mask = (torch.zeros(len(examples), width, dtype=torch.long) for _ in range(3))
    labels -= 100
    for row, example in enumerate(examples):
        count = len(example.ids)
        ids[row, :count], mask[row, :count] = torch.tensor(example.ids), 1
        learned = [token if flag else -100 for token, flag in zip(example.ids, example.trained, strict=True)]
        labels[row, :count] = torch.tensor(learned)
    loss = theirs(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    for hook in hooks:
        hook.remove()
    return loss.item(), {name: leaf.grad.numpy() for name, leaf in leaves.items()}


@pytest.mark.parametrize("changes", [{}, {"micro_tokens": 40}, {"logits_mb": 5 * 4 * 128 / 2**20}])
@pytest.mark.parametrize("layers", [False, True])
def test_a_step_is_that_of_transformers(models, changes, layers):
    theirs, ours = models
    loss, gradients = their_gradient(theirs, ours, rows())
    config = SFTConfig(data="x", rank=RANK, scale=SCALE, **changes)
    with checkpointed(ours.layers, layers):
        value, grads = sft.step_gradient(ours, split(ours), rows(), config)
        mx.eval(grads)
    found = dict(tree_flatten(grads))
    assert value == pytest.approx(loss, abs=TOLERANCE)
    assert found.keys() == gradients.keys() and len(found) == 2 * 7 * 2
    for name, expected in gradients.items():
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(
            np.array(found[name]), expected, rtol=TOLERANCE, atol=TOLERANCE * np.abs(expected).max()
        )


def test_logprobs_are_those_of_transformers(models):
    theirs, ours = models
    *hooks, _ = adapted(theirs, ours)
    ids, positions = batching.pad(rows())
    found, entropies = token_logprobs(split(ours), mx.array(ids), positions, temperature=0.7)
    logprobs, spread = [], []
    for example in rows():
        with torch.no_grad():
            logits = theirs(torch.tensor([example.ids])).logits[0].double() / 0.7
        distribution = torch.distributions.Categorical(logits=logits)
        for at in range(1, len(example.ids)):
            if example.trained[at]:
                logprobs.append(torch.log_softmax(logits[at - 1], -1)[example.ids[at]].item())
                spread.append(distribution.entropy()[at - 1].item())
    for hook in hooks:
        hook.remove()
    np.testing.assert_allclose(np.array(found), logprobs, atol=TOLERANCE)
    np.testing.assert_allclose(np.array(entropies), spread, atol=TOLERANCE)
