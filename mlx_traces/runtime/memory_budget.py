"""How much work at once fits in the memory, learned from failed allocations; for sampling and for training."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from mlx_traces.errors import UserError, first_line
from mlx_traces.runtime import device

T = TypeVar("T")

WAIT = 4  # successes after the first halving, before twice as much is tried again


class MemoryBudget:
    """How much is done at once, in rows or in tokens: the wanted size, or less after memory ran out.

    After a failed allocation the same size is tried once more with MLX's cache cleared, and then half of it. After some
    successes twice as much is tried again, up to the wanted size; each halving doubles the number of successes needed.
    The interrupted work is repeated. How work is split changes only rounding (and the masks of dropout), so the result
    of a run stays the same.

    On CUDA a process cannot go on after a failed allocation: the run ends with one line, and what is saved is kept.

    Args:
        setting: the setting that asks for the size, ``rows`` or ``micro_tokens``.
        unit: what it counts, for notes.
        backend: where it runs, as `device.select` names it; default: what that returns when memory runs out.

    Attributes:
        most: the size that fits; None as long as the wanted one does.
        notes: a line for each change.
    """

    def __init__(self, setting: str, unit: str, backend: str | None = None) -> None:
        self.setting, self.unit, self.backend = setting, unit, backend
        self.most: int | None = None
        self.notes: list[str] = []
        self.failed = False  # whether an allocation failed since the last success
        self.told: list[str] = []  # what MLX said, for the next line of metrics
        self.worked, self.wait = 0, WAIT // 2

    def size(self, asked: int) -> int:
        """Return how much to do at once where ``asked`` is wanted; after a failure MLX's cache is cleared first."""
        if self.failed:
            gc.collect()  # frees the arrays that the error held
            device.import_mlx().clear_cache()
        if self.most is not None and self.most < asked and self.worked >= self.wait:
            self.most, self.worked = 2 * self.most, 0
            if self.most >= asked:
                self.most = None
                self.notes.append(f"{asked} {self.unit} are tried again")
        return asked if self.most is None else min(asked, self.most)

    @contextmanager
    def trying(self, size: int, smallest: int = 1, advice: str = "") -> Iterator[None]:
        """Watch an attempt; if memory runs out, the context ends without an error, so that the caller tries again.

        Args:
            size: how much the attempt does at once.
            smallest: a size of at most this cannot be split further.
            advice: end of the error's message if that size does not fit; ``{told}`` in it stands for MLX's message.

        Raises:
            UserError: if memory runs out on CUDA, or twice with no more than ``smallest``.
        """
        try:
            yield
        except RuntimeError as error:
            if not device.out_of_memory(error):
                raise
            told = first_line(error)
            if (self.backend or device.select()) == "cuda":
                raise UserError(
                    f"memory ran out ({told}), after which CUDA cannot go on; what was finished is kept: go on with "
                    f"--resume and a lower {self.setting} (here {size})"
                ) from None
            self.told.append(told)
            first, self.failed, self.worked = not self.failed, True, 0
            if first:
                self.notes.append(f"memory ran out ({told}); once more with {size} {self.unit}, MLX's cache cleared")
            elif size <= smallest:
                raise UserError(f"memory ran out {advice.format(told=told)}") from None
            else:
                self.most, self.wait = max(1, size // 2), 2 * self.wait
                self.notes.append(f"memory ran out again ({told}): at most {self.most} {self.unit} from here on")
        else:
            self.failed, self.worked = False, self.worked + 1

    def fit(self, asked: int, lengths: Sequence[int], work: Callable[[int], T]) -> T:
        """Call ``work`` with the token limit of a forward pass, and again if memory runs out.

        Args:
            asked: the wanted token limit.
            lengths: tokens of each row that the work reads.
            work: is repeated from its beginning after a failure, so it must not depend on what it changed before.

        Raises:
            UserError: if memory runs out even though every row is read alone.
        """
        every = len(lengths) * max(lengths, default=0)
        alone = 2 * sorted(lengths)[1] - 1 if len(lengths) > 1 else every
        advice = (
            f"on one sequence of {max(lengths, default=0)} tokens alone ({{told}}); the last checkpoint is kept: go on "
            "with --resume and a lower logits_mb or checkpoint_layers, or begin anew with shorter sequences, a lower "
            "rank or a smaller model"
        )
        while True:
            tokens = self.size(asked)
            with self.trying(min(tokens, every), alone, advice):
                return work(tokens)

    def metrics(self) -> dict[str, int | str]:
        """Return entries for a line of metrics: the size that fits, if smaller than wanted, and MLX's new messages."""
        row = {} if self.most is None else {f"memory/{self.setting}": self.most}
        told, self.told = self.told, []
        return row | ({"memory/message": "; ".join(told)} if told else {})


def metrics_of(*budgets: MemoryBudget) -> dict[str, int | str]:
    """Return the entries of several budgets for one line of metrics, with the messages of all of them."""
    rows = [budget.metrics() for budget in budgets]
    told = [row.pop("memory/message") for row in rows if "memory/message" in row]
    return {name: value for row in rows for name, value in row.items()} | (
        {"memory/message": "; ".join(told)} if told else {}
    )
