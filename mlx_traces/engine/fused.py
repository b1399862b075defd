"""A decode step of Llama's, Qwen2's and Qwen3's layers in fewer operations than by mlx_lm's own modules.

One product makes q, k and v, and one makes gate and up: their weights, packed ones too, are joined along the outputs,
so every output is the same sum as before. An unmerged adapter is joined likewise. One rotary embedding serves q and k,
and dense products add the residual themselves. The number of operations sets the time: at 32 to 128 rows a GPU waits
for the host to issue them, and on a CPU a small model's products are as short as the overhead of issuing them.

On a CPU MLX's sigmoid and exponential are slow, so the step has its own there. Large weights are not joined there:
joining takes seconds and gains little.

The joined weights take no memory of their own, as the modules' weights become slices of them. They are kept with the
modules, and joined again after a weight was replaced. The step is used only if all modules of a model are of the kinds
known here, without other parts, and if its logits on a probe are those of the modules; otherwise the modules are used.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, chain

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama, qwen2, qwen3
from mlx_lm.models.activations import swiglu
from mlx_lm.models.rope_utils import Llama3RoPE, YarnRoPE

from mlx_traces.engine.attention import SLICES, Reading
from mlx_traces.engine.kv_cache import SlotCache, decodes_right
from mlx_traces.engine.logprobs import probe
from mlx_traces.models.adapters import LowRank

KEPT = "_joined"  # the attribute of the first of several joined modules that keeps the joined one
PROVED = "_fused_on_"  # with a backend's name: the attribute of a model that keeps what the probe found
SMALL = 2**21  # weights in a layer's gate and up; below, joining gains 10 to 25 % on a CPU; above, 3 %
LINEAR, ROPES = (nn.Linear, nn.QuantizedLinear), (nn.RoPE, Llama3RoPE, YarnRoPE)
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION, NORMS = {"q_proj", "k_proj", "v_proj", "o_proj", "rope"}, {"q_norm", "k_norm"}
MLP = {"gate_proj", "up_proj", "down_proj"}
# tanh(x) is about x * TOP(x * x) / BOTTOM(x * x), as in Eigen's ptanh_float. The highest powers come first.
TOP = (-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
       1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03)  # fmt: skip
BOTTOM = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)


class Step:
    """A model's decode step with joined weights."""

    def __init__(self, model: nn.Module, backend: str):
        self.model, self.backend, self.gate = model, backend, _swiglu if backend == "cpu" else swiglu
        join = _call_each if backend == "cpu" and _largest(model) > SMALL else _join
        self.joined = [tuple(join(modules) for modules in _to_join(layer)) for layer in model.layers]

    def __call__(self, tokens: mx.array, caches: Sequence[SlotCache]) -> mx.array:
        """Return the (R, V) logits after one token of each row, (R,), and add its keys and values to the caches."""
        model, window, rows = self.model, caches[0].window, len(tokens)
        attention = model.layers[0].self_attn
        heads, groups, size = attention.n_heads, attention.n_kv_heads, attention.rope.dims
        mask, turn = window.mask(), self._turning(attention.rope, window.offset)
        h = model.model.embed_tokens(tokens)
        if self.backend == "cpu":
            mask = mx.zeros(1, h.dtype) if mask is None else mx.where(mask, 0, mx.finfo(h.dtype).min).astype(h.dtype)
        for layer, cache, (qkv, gate_up) in zip(model.layers, caches, self.joined, strict=True):
            attention = layer.self_attn
            x = qkv(layer.input_layernorm(h)).reshape(rows, heads + 2 * groups, 1, size)
            qk = x  # the values are rotated too, without use: input that is not contiguous would first be copied
            if "q_norm" in attention:
                scales = [attention.q_norm.weight] * heads + [attention.k_norm.weight] * 2 * groups
                qk = mx.fast.rms_norm(qk, None, attention.q_norm.eps) * mx.stack(scales)[:, None]
            qk = turn(qk)
            keys, values = cache.update_and_fetch(qk[:, heads : heads + groups], x[:, heads + groups :])
            h = _add(h, attention.o_proj, self._attend(qk[:, :heads], keys, values, attention.scale, mask))
            gate, up = mx.split(gate_up(layer.post_attention_layernorm(h)), 2, axis=-1)
            h = _add(h, layer.mlp.down_proj, self.gate(gate, up))
        h = model.model.norm(h)
        return model.lm_head(h) if "lm_head" in model else model.model.embed_tokens.as_linear(h)

    def _turning(self, rope: nn.Module, offset: mx.array) -> Callable[[mx.array], mx.array]:
        """Return the function that applies the rotary embedding at the rows' positions, (R,), to (R, heads, 1, size).

        MLX has no kernel for it on a CPU, and would compute the cosines and sines in every layer. Here they are
        computed once: they are the rope's output for a first half of ones and a second half of zeros.
        """
        if self.backend != "cpu":
            return lambda x: rope(x, offset=offset)
        unit = (mx.arange(rope.dims) < rope.dims // 2).astype(mx.float32)
        unit = mx.broadcast_to(unit, (len(offset), 1, 1, rope.dims))
        cos, sin = mx.split(rope(unit, offset=offset), 2, axis=-1)
        sin = mx.concatenate([-sin, sin], axis=2)  # of the first half and of the second

        def turn(x: mx.array) -> mx.array:
            halves = x.reshape(*x.shape[:2], 2, -1)
            return (halves * cos + halves[:, :, ::-1] * sin).reshape(x.shape).astype(x.dtype)

        return turn

    def _attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | None
    ) -> mx.array:
        """Return (R, heads x size) from (R, heads, 1, size) queries and (R, groups, K, size) keys and values.

        Where MLX has no kernel, on a CPU and for a mask on CUDA, the queries of a group are one product. On a CPU
        the mask is a number for each position, which the product adds.
        """
        rows, groups, _, size = keys.shape
        if self.backend == "metal" or (self.backend == "cuda" and mask is None):
            out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
        else:
            grouped, keys = (rows, groups, -1, size), keys.swapaxes(-1, -2)
            if self.backend == "cpu":
                scores = mx.addmm(mask, queries.reshape(grouped), keys, alpha=scale)
                weights = exp(scores - scores.max(axis=-1, keepdims=True))
                out = (weights @ values / weights.sum(axis=-1, keepdims=True)).astype(values.dtype)
            else:
                scores = mx.where(mask, (queries * scale).reshape(grouped) @ keys, mx.finfo(queries.dtype).min)
                out = mx.softmax(scores, axis=-1, precise=True) @ values
        return out.reshape(rows, -1)


def step_of(model: nn.Module, backend: str, reading: Reading = SLICES) -> Step | None:
    """Return the fused step of a model on a backend (``"cpu"``, ``"metal"``, ``"cuda"``), None to call the modules."""
    way = f"{PROVED}{backend}_low_rank" if any(type(part) is LowRank for part in model.modules()) else PROVED + backend
    proved = getattr(model, way, None)
    if proved is False or not known(model):
        return None
    step = Step(model, backend)
    if proved is None:
        proved = _right(model, step, reading)
        if proved or mx.isfinite(model(mx.array([[0]]))).all().item():  # broken weights say nothing of the model
            setattr(model, way, proved)
    return step if proved else None


def extra_bytes(model: nn.Module) -> int:
    """Return the bytes that the step takes beside the model's weights: one layer's weights, while they are joined."""
    if not known(model):
        return 0
    return max(
        sum(array.nbytes for modules in _to_join(layer) for module in modules for array in _base(module).values())
        for layer in model.layers
    )


def known(model: nn.Module, adapters: tuple[type, ...] = (LowRank,)) -> bool:
    """Whether `Step` computes every module of a model, and every part of those.

    ``adapters`` are the classes that may stand around linear modules.
    """
    kind = next((kind for kind in (llama, qwen2, qwen3) if type(model) is kind.Model), None)
    if kind is None or getattr(model.model, "pipeline_size", 1) != 1 or type(model.model.norm) is not nn.RMSNorm:
        return False
    norms = NORMS if kind is qwen3 else set()
    shapes = set()
    for layer in model.layers:
        if type(layer) is not kind.TransformerBlock or set(layer) != LAYER or getattr(layer, "use_sliding", False):
            return False
        attention, mlp = layer.self_attn, layer.mlp
        if type(attention) is not kind.Attention or type(mlp) is not kind.MLP:
            return False
        if set(attention) != ATTENTION | norms or set(mlp) != MLP:
            return False
        every_norm = [layer.input_layernorm, layer.post_attention_layernorm, *(attention[name] for name in norms)]
        if any(type(norm) is not nn.RMSNorm for norm in every_norm) or type(attention.rope) not in ROPES:
            return False
        every = [attention.o_proj, mlp.down_proj, *chain(*_to_join(layer))]
        ends, joined = [_base(module) for module in every[:2]], [[_base(m) for m in ms] for ms in _to_join(layer)]
        if any(type(module) not in LINEAR for module in (*ends, *chain(*joined))) or any("bias" in end for end in ends):
            return False
        if any(type(module) not in (*LINEAR, *adapters) or "gain" in module for module in every):  # DoRA's gain
            return False
        if any(len({_form(module) for module in modules}) > 1 for modules in joined) or "bias" in joined[1][0]:
            return False
        heads, groups, size = attention.n_heads, attention.n_kv_heads, attention.rope.dims
        outputs = [len(module.weight) for module in joined[0]]
        if outputs != [heads * size, groups * size, groups * size] or heads % groups or attention.rope.traditional:
            return False
        if norms and attention.q_norm.eps != attention.k_norm.eps:
            return False
        shapes.add((heads, groups, size))
    return len(shapes) == 1


def _to_join(layer: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]


def _base(module: nn.Module) -> nn.Module:
    """Return a linear module without the adapter that is kept apart."""
    return module.get("linear", module)


def _form(module: nn.Module) -> tuple:
    """Return what must be equal in linear modules that are joined: their kind, arrays, types and quantization."""
    arrays = tuple((name, array.dtype, array.shape[1:]) for name, array in sorted(module.items()))
    return type(module), arrays, *(getattr(module, name, None) for name in ("bits", "group_size", "mode"))


class _Joined:
    """A linear module with the outputs of several, whose arrays become slices of its arrays."""

    def __init__(self, modules: Sequence[nn.Module]):
        self.whole = copy.copy(modules[0])
        ends = list(accumulate(len(module.weight) for module in modules))
        for name in modules[0]:
            self.whole[name] = mx.concatenate([module[name] for module in modules])
            for module, part in zip(modules, mx.split(self.whole[name], ends[:-1]), strict=True):
                module[name] = part
        self.parts = [array for module in modules for array in module.values()]
        mx.eval(self.whole.parameters(), self.parts)

    def __deepcopy__(self, memo: dict) -> "_Joined":
        return self  # `is_of` says whether the copied modules still have these arrays

    def is_of(self, modules: Sequence[nn.Module]) -> bool:
        """Whether the modules' arrays are still those that were joined."""
        arrays = [array for module in modules for array in module.values()]
        return len(arrays) == len(self.parts) and all(a is b for a, b in zip(arrays, self.parts, strict=True))


def _join(modules: Sequence[nn.Module]) -> nn.Module:
    """Return a linear module with the concatenated outputs of several.

    The first module keeps the joined weights, so they are freed with it; where an adapter is merged, when sampling
    ends. The A matrices of unmerged adapters are concatenated to (in, ranks). Their B matrices stand in (ranks, out),
    each at its own outputs, with zeros elsewhere.
    """
    bases = [_base(module) for module in modules]
    kept = getattr(bases[0], KEPT, None)
    if kept is None or not kept.is_of(bases):
        kept = None
        vars(bases[0]).pop(KEPT, None)  # or the copy of the module in `_Joined` would keep the old weights
        kept = _Joined(bases)
        setattr(bases[0], KEPT, kept)
    adapted = [module for module in modules if type(module) is LowRank]
    if not adapted:
        return kept.whole
    joined, ends = copy.copy(adapted[0]), list(accumulate(len(base.weight) for base in bases))
    joined.linear, joined.a = kept.whole, mx.concatenate([module.a for module in adapted], axis=1)
    places = [
        (module.b, end - module.b.shape[1], ends[-1] - end)
        for module, end in zip(modules, ends, strict=True)
        if type(module) is LowRank
    ]
    joined.b = mx.concatenate([mx.pad(b, [(0, 0), (before, after)]) for b, before, after in places])
    mx.eval(joined.a, joined.b)
    return joined


def _call_each(modules: Sequence[nn.Module]) -> Callable[[mx.array], mx.array]:
    """Return a function with the output of `_join`'s module that calls each module instead of joining weights."""
    return lambda x: mx.concatenate([module(x) for module in modules], axis=-1)


def _largest(model: nn.Module) -> int:
    """Return the number of stored weights in the gate and up of the largest layer."""
    return max(sum(_base(module).weight.size for module in _to_join(layer)[1]) for layer in model.layers)


def _right(model: nn.Module, step: Step, reading: Reading) -> bool:
    """Whether the step gives the modules' logits, for rows that began at different places and for a single row."""
    training, rows = model.training, [probe(model, 24), probe(model, 3)] * 3
    model.eval()
    try:
        return all(decodes_right(model, 4, those, reading, step) for those in (rows, rows[:1]))
    finally:
        model.train(training)


@partial(mx.compile, shapeless=True)
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return ``silu(gate) * up`` on a CPU.

    MLX's own takes 16 ns a number on x86; this takes 7 for 32 rows of nano and 4 for 128.
    """
    return (gate * sigmoid(gate) * up).astype(up.dtype)


def sigmoid(x: mx.array) -> mx.array:
    """Return the float32 sigmoid, within 3e-7 of the exact one, by Eigen's rational approximation of tanh.

    It takes many operations: call it in a compiled function.
    """
    x = mx.clip(x.astype(mx.float32) / 2, -9, 9)  # float32's tanh of 9 is 1
    square, top, bottom = x * x, TOP[0], BOTTOM[0]
    for number in TOP[1:]:
        top = top * square + number
    for number in BOTTOM[1:]:
        bottom = bottom * square + number
    return x * top / bottom / 2 + 0.5


@partial(mx.compile, shapeless=True)
def exp(x: mx.array) -> mx.array:
    """Return the float32 exponential of numbers that are 0 or below, within 2e-7; exactly 0 below -64.

    MLX's own takes 20 ns a number on x86, this 3. Taylor's fifth-degree polynomial gives p, the exponential of a 32nd
    less 1. Four times p becomes p (p + 2), which doubles the exponent and keeps the 1 apart. Then 1 + p is squared.
    """
    x, p = mx.maximum(x.astype(mx.float32), -64), 0
    for degree in range(5, 0, -1):
        p = (p + 1 / (math.factorial(degree) * 32**degree)) * x
    for _ in range(4):
        p = p * p + (p + p)
    return (p + 1) * (p + 1)


def _add(h: mx.array, linear: nn.Module, x: mx.array) -> mx.array:
    """Return ``h + linear(x)``, in one operation where the weight is dense."""
    return mx.addmm(h, x, linear.weight.T) if type(linear) is nn.Linear else h + linear(x)
