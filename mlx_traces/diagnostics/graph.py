"""Count the cost of a computation on a GPU, on any machine: its graph is built and read, and never computed.

MLX is lazy. A function builds the graph of its result from arrays that exist already. When it calls MLX to evaluate the
graph, `traced` reads the graph and returns zeros, which take no memory. So only the shapes of weights are needed.

Without a GPU, MLX splits its fused operations at once. `traced` replaces those that the backend fuses by a sum along an
axis: one kernel, and one in the backward pass. Compiled functions run as plain ones. The operations that MLX would fuse
into one kernel are found by its own rule (``compile_fuse`` in MLX's compile.cpp; a test compares the two).

A kernel reads its inputs and writes its outputs once. Views cost nothing; writing into a buffer costs what is written.
Equal operations on equal inputs count once.
"""

import gc
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_traces.engine import attention, logprobs
from mlx_traces.runtime import device

BACKENDS = ("metal", "cuda")
VIEWS = {
    "AsStrided", "Broadcast", "Contiguous", "Copy", "Depends", "ExpandDims", "Flatten", "NumberOfElements", "Reshape",
    "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
IN_ORDER = {"Contiguous", "Flatten", "Reshape"}  # views of arrays whose numbers stand in order; else copies
SORTS = {"ArgPartition", "ArgSort", "Partition", "Sort"}  # a GPU sorts whole rows for all of them
# Operations that touch a part of their first input: which inputs they read, and how they move a part.
PARTS = {
    "DynamicSlice": "out", "DynamicSliceUpdate": "in", "Gather": "out", "GatherAxis": "out", "Scatter": "in",
    "ScatterAxis": "in", "SliceUpdate": "in",
}  # fmt: skip
# What MLX fuses in a compiled function: all of these, element by element.
FUSED = {
    "Abs", "Add", "ArcCos", "ArcCosh", "ArcSin", "ArcSinh", "ArcTan", "ArcTan2", "ArcTanh", "AsType", "BitwiseBinary",
    "BitwiseInvert", "Broadcast", "Ceil", "Conjugate", "Cos", "Cosh", "Divide", "Equal", "Erf", "ErfInv", "Exp",
    "Expm1", "Floor", "Greater", "GreaterEqual", "Imag", "Less", "LessEqual", "Log", "Log1p", "LogAddExp",
    "LogicalAnd", "LogicalNot", "LogicalOr", "Maximum", "Minimum", "Multiply", "Negative", "NotEqual", "Power",
    "Real", "Remainder", "Round", "Select", "Sigmoid", "Sign", "Sin", "Sinh", "Sqrt", "Square", "Subtract", "Tan",
    "Tanh",
}  # fmt: skip
MOST_DEPTH, MOST_INPUTS = 11, 24  # of what MLX fuses
SORTED_AT_ONCE = 2048  # numbers that a kernel sorts; longer rows are merged in rounds of two kernels
WIDE = 1.05  # two axes that hold at most this many times the vocabulary are its blocks


@dataclass(frozen=True)
class Count:
    """The cost of a computation: operations of the graph (without broadcasts), kernels, bytes that kernels move.

    ``wide_bytes`` are the bytes of arrays as wide as the vocabulary.
    """

    primitives: int = 0
    kernels: int = 0
    bytes: int = 0
    wide_bytes: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Stored:
    """An array of a graph: its shape, the bytes to read it, whether it existed before, whether it is not contiguous."""

    shape: tuple[int, ...]
    nbytes: int
    constant: bool = False
    strided: bool = False

    def wide(self, vocabulary: int) -> bool:
        """Whether the graph makes it, and its last axis, or the last two of three, are as wide as the vocabulary."""
        *most, blocks, last = (1, 1, *self.shape)
        two = len(most) > 2 and vocabulary <= blocks * last <= WIDE * vocabulary
        return not self.constant and (last == vocabulary or two)


Node = dict[str, Any]  # an operation, as MLX exports it: its name, arguments, inputs and outputs
Call = tuple[list[mx.array], list[mx.array]]  # inputs and outputs of a call of a compiled function


@contextmanager
def uncomputed(take: Callable[[str, list[mx.array]], Any] = lambda name, arrays: None) -> Iterator[None]:
    """Let ``mx.eval`` and ``mx.async_eval`` put zeros, which take no memory, in place of their results.

    Probes that compare a model's numbers always pass.

    Args:
        take: called first, with the function's name and its arrays; may return more arrays to put zeros in.
    """
    own = {name: getattr(mx, name) for name in ("eval", "async_eval")}

    def evaluate(name: str, *trees: Any) -> None:
        arrays = [array for _, array in tree_flatten(list(trees)) if isinstance(array, mx.array)]
        for array in [*arrays, *(take(name, arrays) or ())]:
            empty = mx.broadcast_to(mx.zeros((), array.dtype), array.shape)
            own["eval"](empty)
            array[...] = empty

    key = mx.array(np.array(mx.random.state[0]))
    own["eval"](key)
    try:
        with (
            patched(mx, allclose=lambda *_, **__: mx.array(True), **{name: partial(evaluate, name) for name in own}),
            patched(logprobs, alike=lambda *_: True),
            patched(attention, misread=lambda _: ()),
        ):
            yield
    finally:
        mx.random.state[0][...] = key


@contextmanager
def traced(backend: str, take: Callable[[Count], None], vocabulary: int = 0, by: str | None = None) -> Iterator[None]:
    """Count the evaluations within the context as on a GPU; nothing is computed.

    Args:
        backend: ``"metal"`` or ``"cuda"``.
        take: called with the count of each evaluation; other arrays made since, such as caches, then exist too.
        vocabulary: its size; 0 for none.
        by: ``"eval"`` or ``"async_eval"`` to count only the calls of that function.
    """
    calls: list[Call] = []
    slopes = [0]  # contexts of a gradient that are open

    def taken(name: str, arrays: list[mx.array]) -> list[mx.array]:
        counted = by in (None, name)
        if counted:
            take(read(arrays, calls, vocabulary))
        calls.clear()
        return [each for each in gc.get_objects() if type(each) is mx.array] if counted else []

    def attend(q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, **given: Any) -> mx.array:
        if fuses_attention(backend, q, k, mask, training=bool(slopes[0])):
            return one_kernel(q, k, v, mask)
        return decomposed(q, k, v, mask=mask, **given)

    def dequantize(
        packed: mx.array, scales: mx.array, biases: mx.array | None = None, size: int = 64, bits: int = 4, **_: Any
    ) -> mx.array:
        numbers = mx.full((*packed.shape[:-1], packed.shape[-1] * 32 // bits), 0, scales.dtype)
        return mx.depends([numbers], [packed, scales] if biases is None else [packed, scales, biases])[0]

    def with_slopes(transform: Callable) -> Callable:
        """Note that a function is differentiated: MLX then compiles nothing, and Metal does not fuse attention."""

        def transformed(function: Callable, *given: Any, **named: Any) -> Any:
            def inner(*arguments: Any, **more: Any) -> Any:
                slopes[0] += 1
                try:
                    return function(*arguments, **more)
                finally:
                    slopes[0] -= 1

            return transform(inner, *given, **named)

        return transformed

    decomposed = mx.fast.scaled_dot_product_attention
    norms = dict.fromkeys(("rms_norm", "layer_norm"), lambda x, *weights, **_: one_kernel(x, *weights))
    rope = {"rope": lambda x, dims, *, offset, freqs=None, **_: one_kernel(x, offset, freqs)}
    transforms = {name: with_slopes(getattr(mx, name)) for name in ("grad", "value_and_grad", "vjp")}
    with (
        uncomputed(taken),
        patched(mx, default_device=lambda: mx.Device(mx.gpu), dequantize=dequantize, **transforms),
        patched(device, select=lambda *_: backend),
        patched(mx.fast, **norms, **rope, scaled_dot_product_attention=attend),
        frozen(),
        compiled_calls(lambda call: None if slopes[0] else calls.append(call)),
    ):
        yield


@contextmanager
def frozen() -> Iterator[None]:
    """Let ``gc.get_objects`` return only the objects that are made from here on, which takes no time.

    Afterwards objects are frozen if some were before.
    """
    before = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if before:
            gc.freeze()


@contextmanager
def patched(owner: Any, **functions: Any) -> Iterator[None]:
    """Replace functions of a module while the context lasts."""
    own = {name: getattr(owner, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(owner, name, function)
        yield
    finally:
        for name, function in own.items():
            setattr(owner, name, function)


def one_kernel(x: mx.array, *more: Any) -> mx.array:
    """Return an array like ``x`` that one kernel makes from all these arrays; x's gradient takes one kernel too."""
    return mx.depends([mx.cumsum(x, axis=-1)], [array for array in more if isinstance(array, mx.array)])[0]


def fuses_attention(backend: str, q: mx.array, k: mx.array, mask: Any, training: bool) -> bool:
    """Whether a backend has a kernel for this attention; see its scaled_dot_product_attention.cpp in MLX 0.32.4."""
    queries, size, group = q.shape[2], q.shape[3], q.shape[1] // k.shape[1]
    if backend == "metal":
        few = queries <= 8 and queries * group <= 32
        return not training and (size in (64, 96, 128, 256) if few else queries > 8 and size in (64, 80, 96, 128))
    wide_enough = queries % 128 == 0 if queries > 1 else not isinstance(mask, mx.array)
    return q.dtype != mx.float32 and size % 8 == 0 and size <= 128 and wide_enough


@contextmanager
def compiled_calls(take: Callable[[Call], None]) -> Iterator[None]:
    """Run compiled functions as plain ones within this context and `frozen`; ``take`` gets the outermost calls."""
    kind, compile_ = type(mx.compile(lambda: None)), mx.compile
    gc.unfreeze()  # the compiled functions are among the frozen objects
    compiled = [each for each in gc.get_objects() if type(each) is kind]
    gc.freeze()
    codes = {code_of(part) for each in compiled for part in gc.get_referents(each)} - {None}
    running: list[tuple[Any, list[mx.array]]] = []

    def arrays(tree: Any) -> list[mx.array]:
        return [array for _, array in tree_flatten(tree) if isinstance(array, mx.array)]

    def see(frame: Any, event: str, result: Any) -> None:
        if frame.f_code in codes and event == "call":
            running.append((frame, arrays(list(frame.f_locals.values()))))
        elif running and event == "return" and running[-1][0] is frame:
            _, given = running.pop()
            if not running and result is not None:
                take((given, arrays(result)))

    def noted(function: Any = None, **given: Any) -> Any:
        if function is None:
            return partial(noted, **given)
        codes.add(code_of(function))
        return compile_(function, **given)

    before = sys.getprofile()
    mx.disable_compile()
    sys.setprofile(see)
    try:
        with patched(mx, compile=noted):
            yield
    finally:
        sys.setprofile(before)
        mx.enable_compile()


def code_of(function: Any) -> CodeType | None:
    """Return the code object of a function or a partial; None for other objects."""
    return getattr(getattr(function, "func", function), "__code__", None)


def read(arrays: Sequence[mx.array], calls: Sequence[Call] = (), vocabulary: int = 0) -> Count:
    """Count the cost of computing arrays from those that exist already.

    Args:
        arrays: not yet computed.
        calls: outermost calls of compiled functions within the graph.
        vocabulary: its size; 0 for none.
    """
    tape: list[Node] = []
    parts: dict[str, Any] = {}

    def keep(part: dict[str, Any]) -> None:
        if part["type"] == "primitive":
            tape.append(part)
        elif part["type"] in ("outputs", "constants"):
            parts[part["type"]] = part[part["type"]]

    mx.export_function(keep, lambda: [*arrays, *(array for call in calls for side in call for array in side)])
    names = iter([name for name, *_ in parts["outputs"]])
    wanted = {next(names) for _ in arrays}
    bounds = [tuple({next(names) for _ in side} for side in call) for call in calls]
    maker = {name: place for place, node in enumerate(tape) for name, *_ in node["outputs"]}
    needed = _between(tape, maker, wanted)
    uses: dict[str, set[int]] = defaultdict(set)
    for place in needed:
        for name, *_ in tape[place]["inputs"]:
            uses[name].add(place)

    kernels: dict[int, set[int]] = {}  # of several operations, by the last of them
    for starts, ends in bounds:
        inside = needed & _between(tape, maker, ends, starts).difference(*kernels.values())
        kernels |= _fused(tape, maker, uses, inside, ends)
    stored = {name: Stored(array.shape, array.nbytes, constant=True) for name, array in parts["constants"]}
    fused, total = set().union(*kernels.values()), Count()
    for place in sorted(needed):
        node = tape[place]
        own = _outputs(node, stored)
        stored |= own
        if place in kernels:
            made = {name for one in kernels[place] for name, *_ in tape[one]["outputs"]}
            inputs = {name for one in kernels[place] for name, *_ in tape[one]["inputs"]} - made
            kept = {name for name in made if name in wanted or uses[name] - kernels[place]}
            moved, count = [stored[name] for name in inputs | kept], 1
        elif place in fused:
            continue
        else:
            moved, count = _cost(node, [stored[name] for name, *_ in node["inputs"]], [*own.values()])
        total += Count(
            primitives=int(node["name"] not in ("Broadcast", "Depends")),
            kernels=count,
            bytes=sum(array.nbytes for array in moved),
            wide_bytes=sum(array.nbytes for array in moved if vocabulary and array.wide(vocabulary)),
        )
    return total


def _between(tape: list[Node], maker: dict[str, int], ends: set[str], starts: set[str] = frozenset()) -> set[int]:
    """Return the places of the operations that compute ``ends`` from ``starts``."""
    found: set[int] = set()
    names = [*ends]
    while names:
        name = names.pop()
        if name in maker and name not in starts and maker[name] not in found:
            found.add(maker[name])
            names += [name for name, *_ in tape[maker[name]]["inputs"]]
    return found


def _fused(
    tape: list[Node], maker: dict[str, int], uses: dict[str, set[int]], inside: set[int], ends: set[str]
) -> dict[int, set[int]]:
    """Return the operations that MLX fuses in a compiled function: a set for each kernel, by its last operation."""
    kernels: dict[int, set[int]] = {}
    left = set(inside)
    for top in sorted(inside, reverse=True):
        if top not in left or tape[top]["name"] == "Broadcast":
            continue
        kernel: set[int] = set()
        inputs: set[str] = set()
        stack = [(tape[top]["outputs"][0][0], 0)]
        while stack:
            name, depth = stack.pop()
            place = maker.get(name)
            if place in kernel:
                continue
            fits = depth < MOST_DEPTH and place in left and tape[place]["name"] in FUSED
            fits = fits and not (name in ends and tape[place]["outputs"][0][1] != tape[top]["outputs"][0][1])
            if not fits or not (place == top or uses[name] & inside <= kernel):
                inputs.add(name)
                continue
            (inputs.add if name in ends else inputs.discard)(name)
            if len(inputs) < MOST_INPUTS:
                kernel.add(place)
                stack += [(one, depth + 1) for one, *_ in reversed(tape[place]["inputs"])]
        if len(kernel) > 1:
            kernels[top] = kernel
            left -= kernel
    return kernels


def _outputs(node: Node, stored: dict[str, Stored]) -> dict[str, Stored]:
    """Return an operation's outputs: new arrays, or views of its first input."""
    first = stored[node["inputs"][0][0]] if node["inputs"] else None
    copies = node["name"] in IN_ORDER and first is not None and first.strided
    found = {}
    for name, shape, dtype in node["outputs"]:
        size = math.prod(shape)
        if first is None or copies or node["name"] not in VIEWS:
            found[name] = Stored(shape, size * dtype.size)
            continue
        before, strided = node["inputs"][0][1], first.strided
        match node["name"]:
            case "Transpose":
                order = [axis for axis in node["arguments"][0] if before[axis] > 1]
                strided |= order != sorted(order)
            case "Slice" | "Split":
                cut = next((axis for axis, (a, b) in enumerate(zip(before, shape, strict=True)) if a != b), 0)
                strided |= math.prod(before[:cut]) > 1
            case "Broadcast":
                strided |= size != math.prod(before)
        found[name] = Stored(shape, min(size * dtype.size, first.nbytes), first.constant, strided)
    return found


def _cost(node: Node, inputs: list[Stored], outputs: list[Stored]) -> tuple[list[Stored], int]:
    """Return the arrays that an operation reads and writes, and its kernels."""
    name = node["name"]
    if name == "Depends":
        return inputs[len(outputs) :], 0  # read by the kernel before it, see `one_kernel`
    if name in VIEWS and not (name in IN_ORDER and inputs[0].strided):
        return [], 0
    part = PARTS.get(name)
    if part:
        array, *more = inputs
        return ([*more, *outputs, *outputs] if part == "out" else [*more, more[-1] if more else array]), 1
    if name in SORTS:
        rounds = math.ceil(math.log2(max(1, node["outputs"][0][1][-1] / SORTED_AT_ONCE)))
        return (inputs + 2 * outputs) * (1 + rounds), 1 + 2 * rounds
    count = {"Concatenate": len(inputs), "Pad": 2}.get(name, 1)
    if name == "Scan" and inputs[0].strided:  # a norm or rope, which copies what is not in order
        return inputs + 3 * outputs, 2
    return inputs + outputs, count
