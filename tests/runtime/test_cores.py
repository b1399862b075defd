"""MLX's thread goes to its caller's core while other work competes for the cores, and comes back."""

import gc
import os
import subprocess
import sys
import threading
import time

import mlx.core as mx
import pytest
from factories import make_model

from mlx_traces.engine import generation
from mlx_traces.engine.sampling import Request, SamplingParams
from mlx_traces.models import loading
from mlx_traces.runtime import blas, cores, device

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two cores"
)


@pytest.fixture(autouse=True)
def watch(monkeypatch):
    """The watch of this thread, new; all threads have their cores back when the test ends."""
    mx.eval(mx.ones(3, stream=mx.cpu) + 1)
    allowed, threads = os.sched_getaffinity(0), list(cores.TASKS.iterdir())
    watch = cores.Watch(threading.get_native_id())
    monkeypatch.setattr(cores._own, "watch", watch, raising=False)
    yield watch
    assert not watch.open and not cores._before
    assert all(os.sched_getaffinity(int(task.name)) == allowed for task in threads if task.exists())


@pytest.fixture
def system(monkeypatch, watch):
    """A system whose clock stands, with two more threads, the second the busier: steps of time, and that thread."""
    ended = threading.Event()
    threads = [threading.Thread(target=ended.wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    one, two = (thread.native_id for thread in threads)
    times = {watch.caller: (0, 0), one: (0, 0), two: (0, 0)}

    def later(seconds, waited):
        clock[0] += seconds
        share = int(waited * seconds * 1e9)
        for thread, ran in ((watch.caller, 5), (one, 1), (two, 3)):
            times[thread] = times[thread][0] + ran, times[thread][1] + (share // 2 if thread != one else 10**12)
        cores.look()

    clock = [1000.0]
    monkeypatch.setattr(cores, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(cores, "times_of", lambda caller: dict(times))
    monkeypatch.setattr(cores, "core_of", lambda caller: min(os.sched_getaffinity(caller)))
    yield later, two
    ended.set()
    for thread in threads:
        thread.join()


def moved():
    """The threads of this process that may not run on every core."""
    allowed = os.sched_getaffinity(0)
    return {int(task.name) for task in cores.TASKS.iterdir() if os.sched_getaffinity(int(task.name)) != allowed}


def test_the_busiest_thread_moves_if_it_and_the_caller_wait(system):
    later, busiest = system
    computation = cores.begin(True)
    for waited in (0, 0.9 * cores.WAITING, 0.01):  # the first look has nothing to compare with
        later(cores.LOOK, waited)
        assert not moved()
    later(cores.LOOK / 2, 5)  # too early
    assert not moved()
    later(cores.LOOK, 1.1 * cores.WAITING)
    assert moved() == {busiest} and os.sched_getaffinity(busiest) == {min(os.sched_getaffinity(0))}
    for _ in range(7):
        later(cores.FOLLOW, 0)
        assert moved() == {busiest}
    later(cores.FOLLOW, 0)  # the hold ends, and waiting is measured anew
    assert not moved()
    later(cores.LOOK, 0)
    assert not moved()
    later(cores.LOOK, 1)
    assert moved() == {busiest}
    computation.end()
    assert not moved()


def test_it_follows_the_caller(system, monkeypatch):
    later, busiest = system
    computation, core = cores.begin(True), max(os.sched_getaffinity(0))
    later(cores.LOOK, 0)
    later(cores.LOOK, 1)
    monkeypatch.setattr(cores, "core_of", lambda caller: core)
    later(cores.FOLLOW, 0)
    assert os.sched_getaffinity(busiest) == {core}
    computation.end()


def test_a_hold_goes_on_in_the_next_computation_and_the_newest_decides(system):
    later, busiest = system
    for step in range(3):
        with_it = cores.begin(True)
        later(cores.LOOK, step)
        assert moved() == (set() if step == 0 else {busiest})
        without = cores.begin(False)
        assert not moved()
        later(cores.LOOK, 1)
        assert not moved()
        without.end()
        later(cores.FOLLOW, 1)
        with_it.end()
        assert not moved()


def test_what_somebody_else_moved_stays(system):
    later, busiest = system
    computation, allowed = cores.begin(True), os.sched_getaffinity(0)
    later(cores.LOOK, 0)
    later(cores.LOOK, 1)
    os.sched_setaffinity(busiest, other := allowed - os.sched_getaffinity(busiest))
    computation.end()
    assert os.sched_getaffinity(busiest) == other
    os.sched_setaffinity(busiest, cores._before.pop(busiest))


@pytest.mark.parametrize("fault", [PermissionError, FileNotFoundError, ValueError])
def test_a_system_that_refuses_is_left_alone(system, monkeypatch, fault):
    def refuse(*_):
        raise fault

    later, _ = system
    computation = cores.begin(True)
    later(cores.LOOK, 0)
    with monkeypatch.context() as patch:
        patch.setattr(cores, "core_of", refuse)
        later(cores.LOOK, 1)
        later(10, 1)
    assert not moved()
    computation.end()
    monkeypatch.setattr(os, "sched_getaffinity", refuse)
    if fault is PermissionError:
        (computation := cores.begin(True)).end()
        assert not computation.may_move
    monkeypatch.undo()


def test_the_callers_core_is_where_it_runs():
    allowed = os.sched_getaffinity(0)
    try:
        for core in allowed:
            os.sched_setaffinity(0, {core})
            assert cores.core_of(threading.get_native_id()) == core
    finally:
        os.sched_setaffinity(0, allowed)


def test_waiting_grows_where_two_share_a_core():
    if (caller := threading.get_native_id()) not in cores.times_of(caller):
        pytest.skip("this system does not say how long threads wait")
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})  # the process below inherits it
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
            until, before = time.perf_counter() + 0.4, cores.times_of(caller)[caller]
            while time.perf_counter() < until:
                pass
            busy.kill()
    finally:
        os.sched_setaffinity(0, allowed)
    ran, waited = (after - earlier for after, earlier in zip(cores.times_of(caller)[caller], before, strict=True))
    assert ran > 5e7 and waited > 5e7


def test_pythons_threads_are_not_counted(watch):
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    assert watch.caller in (times := cores.times_of(watch.caller)) and thread.native_id not in times and len(times) > 1
    ended.set()
    thread.join()


def test_a_stream_of_completions_moves_mlxs_thread_and_puts_it_back_wherever_it_is_closed(watch, monkeypatch):
    monkeypatch.setattr(cores, "WAITING", 0.0)
    monkeypatch.setattr(cores, "LOOK", 0.0)
    loaded = loading.load("nano", device="cpu")
    ids = tuple(loaded.tokenizer.encode("Using the numbers 3 and 7"))
    stream = generation.generate(loaded, [Request(ids)] * 6, SamplingParams(12), rows=2)
    next(stream)
    assert moved() == {watch.held}
    other = threading.Thread(target=stream.close)
    other.start()
    other.join()
    assert not moved() and not watch.open
    stream = generation.generate(loaded, [Request(ids)] * 6, SamplingParams(12), rows=2)
    next(stream)
    del stream
    gc.collect()
    assert not moved()


@pytest.mark.parametrize(
    ("threads", "backend", "may_move"), [("1", "cpu", True), ("2", "cpu", False), ("1", "cuda", False)]
)
def test_mlxs_thread_may_move_with_one_thread_on_a_cpu(watch, monkeypatch, threads, backend, may_move):
    class Library:
        openblas_get_num_threads = staticmethod(lambda: int(threads))
        openblas_set_num_threads = staticmethod(lambda threads: None)

    monkeypatch.setenv("OPENBLAS_NUM_THREADS", threads)
    monkeypatch.setattr(blas, "loaded", blas.Blas("/x/libopenblas.so.0", library=Library()))
    monkeypatch.setattr(device, "select", lambda: backend)
    with blas.threads_for(make_model(), 1), blas.threads_for(make_model(), 1):
        assert [one.may_move for one in watch.open] == [may_move] * 2
