"""What fits in the memory, learned from a stand-in whose allocations fail where the test says so."""

import mlx.core as mx
import pytest

from mlx_traces.errors import UserError
from mlx_traces.runtime.memory_budget import WAIT, MemoryBudget, metrics_of

TOLD = "[malloc] Unable to allocate 9 bytes."
LENGTHS = [10, 8, 8, 4]


class Device:
    """Allocates up to ``holds`` tokens at once, except for the calls in ``failing``."""

    def __init__(self, holds=10**9, failing=()):
        self.holds, self.failing, self.asked = holds, failing, []

    def work(self, tokens):
        self.asked.append(tokens)
        if tokens > self.holds or len(self.asked) in self.failing:
            raise RuntimeError(TOLD)
        return tokens


def made(**named):
    return MemoryBudget("micro_tokens", "tokens", **{"backend": "metal", **named})


def test_what_fits_is_asked_for_and_nothing_is_told():
    budget, device = made(), Device()
    assert [budget.fit(64, LENGTHS, device.work) for _ in range(3)] == [64, 64, 64]
    assert budget.metrics() == {} and not budget.notes


def test_a_line_of_metrics_keeps_the_messages_of_both_budgets():
    budgets = made(), MemoryBudget("rows", "rows at once", backend="metal")
    for budget in budgets:
        budget.fit(64, LENGTHS, Device(failing=(1,)).work)
    assert metrics_of(*budgets) == {"memory/message": f"{TOLD}; {TOLD}"} and metrics_of(*budgets) == {}
    budgets[1].most = 3
    assert metrics_of(*budgets) == {"memory/rows": 3}


def test_the_same_size_is_tried_once_more_with_the_cache_cleared(monkeypatch):
    cleared = []
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(1))
    budget, device = made(), Device(failing=(2, 4))
    assert [budget.fit(32, LENGTHS, device.work) for _ in range(3)] == [32, 32, 32]
    assert device.asked == [32] * 5 and cleared == [1, 1] and budget.most is None
    assert budget.metrics() == {"memory/message": f"{TOLD}; {TOLD}"} and budget.metrics() == {}
    assert budget.notes == [f"memory ran out ({TOLD}); once more with 32 tokens, MLX's cache cleared"] * 2


def test_then_half_and_later_back_up_with_longer_and_longer_waits():
    budget, device = made(), Device(holds=20)
    for _ in range(2 * WAIT + 2):
        budget.fit(32, LENGTHS, device.work)
    first = [32, 32, *[16] * WAIT]
    assert device.asked[: len(first)] == first
    assert device.asked[len(first) :] == [32, 32, *[16] * (WAIT + 2)]
    assert budget.metrics()["memory/micro_tokens"] == 16
    device.holds = 10**9  # whatever took the memory is gone
    before = len(device.asked)
    for _ in range(2 * WAIT):
        budget.fit(32, LENGTHS, device.work)
    assert device.asked[before:] == [16] * (WAIT - 2) + [32] * (WAIT + 2)
    assert budget.most is None and budget.notes[-1] == "32 tokens are tried again"
    assert "memory/micro_tokens" not in budget.metrics()


def test_less_work_in_between_forgets_nothing():
    """Validation has fewer rows than training."""
    budget, device = made(), Device(holds=20)
    budget.fit(64, LENGTHS, device.work)
    for _ in range(3 * WAIT):
        assert budget.fit(8, LENGTHS, device.work) == 8
    assert budget.most == 20 and len(budget.notes) == 2


def test_more_than_there_is_to_do_is_not_halved_in_vain():
    budget, device = made(), Device(holds=20)
    assert budget.fit(10**6, LENGTHS, device.work) == sum([10] * 4) // 2
    assert device.asked == [10**6, 10**6, 20]


def test_rows_that_do_not_fit_alone_end_it_in_a_line():
    budget, device = made(), Device(holds=0)
    with pytest.raises(UserError, match=r"memory ran out on one sequence of 10 tokens alone \(.malloc.* --resume"):
        budget.fit(64, LENGTHS, device.work)
    assert device.asked == [64, 64, 20, 10]  # of at most 10 tokens every batch is one row
    with pytest.raises(ZeroDivisionError):  # any other fault stays one
        made().fit(64, LENGTHS, lambda tokens: 1 / 0)


@pytest.mark.parametrize(
    "told", [TOLD, "cudaMallocAsync failed: out of memory", "CUDA error: an illegal memory access was encountered"]
)
def test_cuda_cannot_go_on_so_the_run_ends_in_a_line_that_names_the_setting(monkeypatch, told):
    monkeypatch.setattr(mx, "clear_cache", lambda: pytest.fail("this can end the process"))
    asked = []

    def work(tokens):
        asked.append(tokens)
        raise RuntimeError(told)

    line = r"memory ran out \(.*\), after which CUDA cannot go on; .* --resume and a lower micro_tokens \(here 24\)"
    with pytest.raises(UserError, match=line):
        made(backend="cuda").fit(24, LENGTHS, work)
    assert asked == [24]
    with pytest.raises(UserError, match=r"a lower rows \(here 4\)"), MemoryBudget("rows", "rows", "cuda").trying(4):
        raise RuntimeError(told)
