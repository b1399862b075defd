"""MLX's thread goes to the caller's core while other processes compete for the cores, and comes back."""

import os
import sys
import threading
import time

import mlx.core as mx
import pytest
from factories import make_model

from mlx_traces.runtime import blas, cores, device

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two cores"
)


@pytest.fixture
def others():
    """Where the threads that Python did not start may run; MLX's is one of them."""
    mx.eval(mx.ones(3, stream=mx.cpu) + 1)
    own = {thread.native_id for thread in threading.enumerate()}
    threads = {int(task.name) for task in cores.TASKS.iterdir()} - own
    assert threads
    allowed = os.sched_getaffinity(0)

    def places():
        return {frozenset(os.sched_getaffinity(thread)) for thread in threads}

    yield places
    assert cores._watcher is None and places() == {frozenset(allowed)} and os.sched_getaffinity(0) == allowed


def wait_for(condition):
    until = time.time() + 20
    while not condition() and time.time() < until:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def waiting(monkeypatch):
    """Set the seconds of waiting a second that the system reports."""
    began, share = time.perf_counter(), [0.0]
    monkeypatch.setattr(cores, "waited", lambda: share[0] * (time.perf_counter() - began))
    return share


def test_threads_that_wait_go_to_the_callers_core_and_come_back(others, waiting):
    everywhere = others()
    cores.watch(True)
    time.sleep(3 * cores.LOOK)
    assert others() == everywhere
    waiting[0] = 2 * cores.WAITING
    assert wait_for(lambda: {len(place) for place in others()} == {1})
    assert os.sched_getaffinity(0) == next(iter(everywhere))  # so what this thread starts runs anywhere
    cores.watch(False)
    assert others() == everywhere


def test_waiting_is_measured_again_and_again(others, waiting, monkeypatch):
    monkeypatch.setattr(cores, "HOLD", cores.FOLLOW)
    everywhere, waiting[0] = others(), 1.0
    cores.watch(True)
    assert wait_for(lambda: others() != everywhere)
    waiting[0] = 0.0
    assert wait_for(lambda: others() == everywhere)
    cores.watch(False)


def test_the_callers_core_is_where_it_runs():
    allowed = os.sched_getaffinity(0)
    try:
        for core in allowed:
            os.sched_setaffinity(0, {core})
            assert cores._core_of(threading.get_native_id()) == core
    finally:
        os.sched_setaffinity(0, allowed)


def test_waiting_grows_where_two_threads_share_a_core(others):
    if cores.waited() is None:
        pytest.skip("this system does not say how long threads wait")
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})  # the process below inherits it
        before, busy = cores.waited(), os.posix_spawn(sys.executable, [sys.executable, "-c", "while True: pass"], {})
        until = time.perf_counter() + 0.3
        while time.perf_counter() < until:
            pass
        os.kill(busy, 9)
        os.waitpid(busy, 0)
    finally:
        os.sched_setaffinity(0, allowed)
    assert cores.waited() - before > 0.05


@pytest.mark.parametrize(
    ("threads", "backend", "watched"), [("1", "cpu", True), ("2", "cpu", False), ("1", "cuda", False)]
)
def test_one_thread_on_a_cpu_is_watched(others, monkeypatch, threads, backend, watched):
    class Library:
        openblas_get_num_threads = staticmethod(lambda: int(threads))
        openblas_set_num_threads = staticmethod(lambda threads: None)

    monkeypatch.setenv("OPENBLAS_NUM_THREADS", threads)
    monkeypatch.setattr(blas, "loaded", blas.Blas("/x/libopenblas.so.0", library=Library()))
    monkeypatch.setattr(device, "select", lambda: backend)
    with blas.threads_for(make_model(), 1):
        with blas.threads_for(make_model(), 1):
            assert (cores._watcher is not None) == watched
        assert (cores._watcher is not None) == watched


def test_nothing_is_watched_where_the_system_does_not_say(others, monkeypatch):
    monkeypatch.setattr(cores, "waited", lambda: None)
    cores.watch(True)
    assert cores._watcher is None
