"""Check that this machine computes correctly: a short generation and a training step of nano, against a reference.

The reference, ``assets/selftest.json``, is nano in float32 on a CPU, computed by plain forward passes (`reference`).
The test takes the path of every command: `loading.load` with this machine's own weights and dtype, the chat template,
the sampling engine, an SFT step with its adapter, clipping and AdamW.

It compares log-probabilities, not tokens. Where the two likeliest tokens are closer than twice the tolerance, a machine
may take either; that completion is compared up to there. Devices may differ only by rounding, so `TOLERANCES` depend on
the dtype of the computation. They are at least four times `DEVIATIONS`, which were measured on a CPU with the weights
that commands load: dense in float32 and bfloat16, 4 bits in float16. A GPU may multiply float32 at lower precision
(TF32), so float32 there has the tolerance of float16.

To see what the test finds, each of nano's 29 dense matrices was scaled up in turn on a CPU. It finds an excess of 10 %
in all 29 in float32 and in 9 in float16, and of 50 % in 25 in float16 and in 10 in bfloat16.
"""

import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_traces.config import SFTConfig
from mlx_traces.engine import logprobs
from mlx_traces.engine.generation import generate
from mlx_traces.engine.sampling import NotFinite, Request, SamplingParams
from mlx_traces.errors import UserError
from mlx_traces.models import adapters, loading
from mlx_traces.models.convert import weight_name
from mlx_traces.models.loading import LoadedModel
from mlx_traces.models.names import NANO
from mlx_traces.readers import read_json
from mlx_traces.runtime.files import to_json, write_atomic
from mlx_traces.runtime.provenance import provenance
from mlx_traces.tasks import countdown
from mlx_traces.traces import encoding
from mlx_traces.traces.solutions import countdown_traces
from mlx_traces.train import sft
from mlx_traces.train.optimizer import make_optimizer

PROBLEMS = (("thinking", (3, 7, 12), 33), ("thinking", (5, 9, 14, 21), 49), ("direct", (4, 8, 15), 27))
MAX_TOKENS = 24
RANK, SCALE, RATE = 8, 2.0, 1e-3
# Of log-probabilities in nats, and of loss and gradient norm relative to the stored values.
DEVIATIONS = {"float32": (2e-6, 4e-8), "float16": (0.012, 0.0046), "bfloat16": (0.022, 0.0099)}
TOLERANCES = {"float32": (0.001, 0.001), "float16": (0.105, 0.019), "bfloat16": (0.45, 0.07)}


@dataclass(frozen=True)
class Outcome:
    """The result of a self-test: ``wrong`` names what is out of tolerance, and is empty if all is well.

    ``nats`` is the largest deviation of a log-probability, ``share`` the largest relative one of loss and gradient
    norm; ``tolerance`` has the largest allowed deviation of each.
    """

    wrong: list[str]
    nats: float
    share: float
    tolerance: tuple[float, float]
    dtype: str
    seconds: float


def load_reference() -> dict[str, Any]:
    """Return the stored numbers; UserError if they are missing or damaged."""
    return read_json(Path(str(resources.files("mlx_traces") / "assets" / "selftest.json")))


def run(loaded: LoadedModel | None = None, stored: dict[str, Any] | None = None) -> Outcome:
    """Generate and train one step with nano, as it is loaded here, and compare with the stored numbers.

    Args:
        loaded: nano; it is trained, so do not use it afterwards. Default: as every command loads it.
        stored: the reference; default: the package's.

    Raises:
        UserError: if nano or the reference cannot be read, or do not belong together.
    """
    start = perf_counter()
    stored = load_reference() if stored is None else stored
    loaded = loading.load(NANO) if loaded is None else loaded
    try:
        if stored["nano"] != loaded.fingerprints["model"]:
            raise UserError("nano's files are not those that the self-test's numbers were made with")
        dtype = weight_name(loaded.model.model.norm.weight.dtype)
        allowed = TOLERANCES["float16" if dtype == "float32" and loaded.backend.name != "cpu" else dtype]
        wrong, nats = _generation(loaded, stored["completions"], allowed[0])
        # A model whose outputs are not finite numbers is not trained.
        lines, share = _training(loaded, stored["training"], allowed[1]) if math.isfinite(nats) else ([], math.inf)
    except (KeyError, TypeError) as error:
        raise UserError(f"the self-test's numbers are damaged ({error!r})") from None
    return Outcome(wrong + lines, nats, share, allowed, dtype, perf_counter() - start)


def _generation(loaded: LoadedModel, stored: list[dict[str, Any]], allowed: float) -> tuple[list[str], float]:
    """Complete the prompts by the engine; return what is wrong, and the largest deviation in nats."""
    prompts = prompts_of(loaded)
    for number, (ids, known) in enumerate(zip(prompts, stored, strict=True), 1):
        if list(ids) != known["prompt"]:
            return [f"prompt {number} is encoded to wrong tokens"], math.inf
    wrong, worst = [], 0.0
    rollouts = generate(loaded, [Request(ids) for ids in prompts], SamplingParams(MAX_TOKENS), logprobs=True)
    try:
        done = sorted(rollouts, key=lambda pair: pair[0])
    except NotFinite:
        return ["the model's outputs are not finite numbers"], math.inf
    for index, rollout in done:
        known, found = stored[index], rollout.model_logprobs or ()
        for place, token in enumerate(known["tokens"]):
            if place >= len(rollout.completion_ids):
                wrong.append(f"completion {index + 1} ends after {place} tokens, not {len(known['tokens'])}")
                break
            if rollout.completion_ids[place] != token:
                if not known["gaps"][place] < 2 * allowed:
                    wrong.append(f"completion {index + 1}: token {place + 1} is wrong")
                break
            off = abs(found[place] - known["logprobs"][place])
            worst = max(worst, off)
            if not off <= allowed:
                where = f"completion {index + 1}, token {place + 1}"
                wrong.append(f"{where}: log-probability {found[place]:.4f}, not {known['logprobs'][place]:.4f}")
                break
    return wrong, worst


def _training(loaded: LoadedModel, stored: dict[str, float], allowed: float) -> tuple[list[str], float]:
    """Train one step; return what is wrong, and the largest relative deviation."""
    found = step_of(loaded)
    shares = {name: abs(found[name] - stored[name]) / abs(stored[name]) for name in stored}
    shares = {name: share if math.isfinite(share) else math.inf for name, share in shares.items()}
    wrong = [
        f"training step: {name} {found[name]:.5f}, not {stored[name]:.5f}"
        for name, share in shares.items()
        if not share <= allowed
    ]
    return wrong, max(shares.values())


def prompts_of(loaded: LoadedModel) -> list[tuple[int, ...]]:
    """Return the token ids of the self-test's prompts."""
    asked = [
        (countdown.PROMPTS[style], countdown.parse({"nums": list(nums), "target": target}, "self-test"))
        for style, nums, target in PROBLEMS
    ]
    return [loaded.render(prompt, problem).ids for prompt, problem in asked]


def step_of(loaded: LoadedModel) -> dict[str, float]:
    """Train a LoRA adapter one step on the solver's traces; return loss before and after, and the gradient's norm.

    The adapter's weights start as sines, the same on every device and in every version. None is 0, so that every matrix
    has a gradient.
    """
    config = SFTConfig(data="", rank=RANK, scale=SCALE, learning_rate=RATE, warmup=0.0)
    adapters.start(loaded.model, config)
    waves = [
        (name, mx.array(0.05 * np.sin(1 + 0.7 * np.arange(array.size) + at), array.dtype).reshape(array.shape))
        for at, (name, array) in enumerate(sorted(tree_flatten(loaded.model.trainable_parameters())))
    ]
    loaded.model.load_weights(waves, strict=False)
    loaded.model.train()
    traces, end = countdown_traces(4, "train", seed=0), encoding.turn_end(loaded)
    batch = [encoding.encode(loaded, trace, end) for trace in traces]
    halves, optimizer = logprobs.split(loaded.model), make_optimizer(config, 10)
    loss, grads = sft.step_gradient(loaded.model, halves, batch, config)
    norm, update = optimizer.propose(loaded.model, grads)
    update()
    loaded.model.eval()
    after = sft.mean_loss(halves, batch, config)
    return {"loss": float(loss), "gradient norm": norm, "loss after the step": after}


# -------------------------------------------------------------------------------------------------- the reference


def write_reference(path: Path) -> dict[str, Any]:
    """Write the numbers of nano in float32 on this CPU, by plain forward passes; ``mlx-traces nano reference``."""
    content = reference()
    try:
        write_atomic(path, to_json(content))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None
    return content


def reference() -> dict[str, Any]:
    """Compute the reference: greedy tokens, their log-probabilities and leads over the next likeliest (nats), a step.

    No cache, no batch, no engine: each token is the likeliest of a forward pass over all tokens before it.
    """
    loaded = loading.load(NANO, device="cpu", weights="dense", dtype="float32")
    completions = []
    for prompt in prompts_of(loaded):
        ids, chosen, gaps = list(prompt), [], []
        while len(chosen) < MAX_TOKENS and ids[-1] not in (loaded.stop_ids if chosen else ()):
            logits = np.array(loaded.model(mx.array([ids]))[0, -1], np.float64)
            values = logits - np.logaddexp.reduce(logits)
            second, first = np.sort(values)[-2:]
            ids.append(int(values.argmax()))
            chosen.append(round(float(first), 6))
            gaps.append(round(float(first - second), 6))
        tokens = ids[len(prompt) :]
        completions.append({"prompt": list(prompt), "tokens": tokens, "logprobs": chosen, "gaps": gaps})
    made = provenance()
    return {
        "made_by": "mlx-traces nano reference",
        "versions": made["versions"],
        "nano": loaded.fingerprints["model"],
        "training": {name: round(value, 7) for name, value in step_of(loaded).items()},
        "completions": completions,
    }
