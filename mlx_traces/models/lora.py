"""The forward pass of LoRA and DoRA layers while they train: in the activations' 16-bit type, A, B and m in float32.

mlx_lm promotes 16-bit activations to A's float32, which takes the products off a GPU's fast path. Here the low-rank
products are in the activations' type, and the second one is added to the base's output. A, B, m and their gradients are
float32. With float32 activations the layers are mlx_lm's.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner import dora, lora


class LoRALinear(lora.LoRALinear):
    """mlx_lm's layer with products in the activations' type."""

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) if x.dtype == mx.float32 else _added(self, self.linear(x), x)


class DoRALinear(dora.DoRALinear):
    """mlx_lm's layer with products in the activations' type; the norms of the adapted weights stay in float32.

    In 16 bits, a small adapter would be lost in the rounding of the weights. No gradient passes through the norms
    (arXiv 2402.09353, section 4.3).
    """

    def __call__(self, x: mx.array) -> mx.array:
        if x.dtype == mx.float32:
            return super().__call__(x)
        weight = self._dequantized_weight()
        adapted = mx.addmm(weight.astype(mx.float32), self.lora_b.T, self.lora_a.T, alpha=self.scale)
        gain = self.m / mx.stop_gradient(mx.linalg.norm(adapted, axis=1))
        y = gain.astype(x.dtype) * _added(self, x @ weight.T, x)
        return y + self.linear.bias if "bias" in self.linear else y


def _added(layer: nn.Module, y: mx.array, x: mx.array) -> mx.array:
    """Return (..., out) ``y`` and the adapter's output for (..., in) ``x``, in their type."""
    low = layer.dropout(x) @ layer.lora_a.astype(x.dtype)  # (..., rank)
    return mx.addmm(y, low, (layer.scale * layer.lora_b).astype(x.dtype))


OWN = {lora.LoRALinear: LoRALinear, dora.DoRALinear: DoRALinear}


def in_activations_type(model: nn.Module) -> None:
    """Give a model's LoRA and DoRA layers these forward passes; only these objects change, not mlx_lm's classes."""
    for module in model.modules():
        if type(module) in OWN:
            module.__class__ = OWN[type(module)]
