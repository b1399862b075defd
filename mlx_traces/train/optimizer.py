"""AdamW with warm-up and cosine decay, clipping, and gradients that add up over micro-batches."""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_traces.config import OptimizerConfig
from mlx_traces.runtime import device

MOST_COMPILED = 2**30  # bytes of trained parameters; a compiled update holds them and both averages twice, old and new


def schedule(config: OptimizerConfig, steps: int) -> Callable[[Any], mx.array]:
    """Return the learning rate as a function of the number of steps done, from 0.

    Step 1 of w warm-up steps uses peak / w, step w the peak; then half a cosine to ``final_rate`` x peak at the last
    step.
    """
    warm = math.ceil(config.warmup * steps)
    peak, floor = config.learning_rate, config.final_rate * config.learning_rate

    def rate(done: Any) -> mx.array:
        done = mx.array(done, mx.float32)
        progress = mx.clip((done - warm) / max(steps - 1 - warm, 1), 0, 1)
        cosine = floor + (peak - floor) * 0.5 * (1 + mx.cos(math.pi * progress))
        return mx.where(done < warm, peak * (done + 1) / max(warm, 1), cosine)

    return rate


class ClippedAdamW(optim.AdamW):
    """AdamW (arXiv 1711.05101) with bias correction, on a schedule, with gradients clipped to a global norm.

    On a GPU clipping and update rule are one compiled function, up to `MOST_COMPILED`. For a rank-16 adapter on all
    linear layers of a 24-layer model its graph has 1,044 operations instead of 9,428 (counted).

    Args:
        config: the settings.
        steps: of the schedule.
    """

    def __init__(self, config: OptimizerConfig, steps: int) -> None:
        rate, settings = schedule(config, steps), {"betas": list(config.betas), "weight_decay": config.weight_decay}
        super().__init__(rate, **settings, bias_correction=True)

        def rule(parameters: Any, state: Any, grads: Any) -> tuple[Any, Any, mx.array]:
            """Return the new parameters and state, and the norm before clipping; the arguments stay unchanged."""
            plain = optim.AdamW(rate, **settings, bias_correction=True)
            plain.state = tree_map(lambda array: array, state)  # the rule writes into the containers
            grads, norm = clip(grads, config.max_grad_norm)
            return plain.apply_gradients(grads, parameters), plain.state, norm

        self.rule, self.compiled = rule, mx.compile(rule)

    def propose(self, module: nn.Module, grads: Any) -> tuple[float, Callable[[], None]]:
        """Return the gradients' norm before clipping, and a function that updates ``module`` and the state.

        Nothing changes before that call, so a norm that is not finite can be refused.

        Args:
            module: holds the parameters.
            grads: a tree of gradients, of some or all parameters.
        """
        parameters = tree_map(lambda _, array: array, grads, module)
        self.init(parameters)  # where the state lacks them
        size = sum(array.nbytes for _, array in tree_flatten(parameters))
        if device.select() == "cpu" or size > MOST_COMPILED:
            new, state, norm = self.rule(parameters, self.state, grads)
        else:
            new, state, norm = self.compiled(parameters, self.state, grads)
            mx.eval(new, state, norm)

        def update() -> None:
            module.update(new)
            self.state = state
            mx.eval(new, state)

        return norm.item(), update


def make_optimizer(config: OptimizerConfig, steps: int) -> ClippedAdamW:
    """Return the optimizer of all trainings, on the schedule of ``steps`` steps."""
    return ClippedAdamW(config, steps)


def of_parts(parts: dict[str, optim.Optimizer]) -> optim.MultiOptimizer:
    """Combine the optimizers of a module's parts, by their names in the module, into one for a checkpoint.

    Parts that do not learn at the same time are updated by their own optimizers (``.optimizers``, in the order given):
    MLX's combined update would count a step for every part.
    """
    filters = [lambda path, _, name=name: path.startswith(f"{name}.") for name in parts]
    return optim.MultiOptimizer(list(parts.values()), filters[:-1])


def add(total: Any | None, grads: Any) -> Any:
    """Add a micro-batch's gradients to those so far."""
    return grads if total is None else tree_map(lambda a, b: a + b, total, grads)


def clip(grads: Any, max_norm: float) -> tuple[Any, mx.array]:
    """Scale gradients down to a global norm of ``max_norm``; return them and the norm before."""
    return optim.clip_grad_norm(grads, max_norm)


def state_of(optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """Return the optimizer's state as named arrays."""
    return dict(tree_flatten(optimizer.state))


def restore(optimizer: optim.Optimizer, parameters: Any, arrays: dict[str, mx.array]) -> None:
    """Give an optimizer the state that `state_of` returned."""
    optimizer.init(parameters)
    optimizer.state = tree_unflatten(list(arrays.items()))
