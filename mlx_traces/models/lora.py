"""The forward pass of LoRA layers while they train: in the activations' 16-bit type, A and B kept in float32."""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner import lora


class LoRALinear(lora.LoRALinear):
    """mlx_lm's layer with the low-rank products in the activations' type, the second one added to the base's output.

    mlx_lm promotes 16-bit activations to A's float32, which takes the products off a GPU's fast path. Gradients of A
    and B are float32, as they are. With float32 activations the layer is mlx_lm's.
    """

    def __call__(self, x: mx.array) -> mx.array:
        if x.dtype == mx.float32:
            return super().__call__(x)
        low = self.dropout(x) @ self.lora_a.astype(x.dtype)  # (..., rank)
        return mx.addmm(self.linear(x), low, (self.scale * self.lora_b).astype(x.dtype))


def in_activations_type(model: nn.Module) -> None:
    """Give a model's LoRA layers this forward pass; only these objects change, not mlx_lm's class."""
    for module in model.modules():
        if type(module) is lora.LoRALinear:
            module.__class__ = LoRALinear
