"""Keep MLX's thread on the caller's core while other processes compete for the cores. Linux only.

On a CPU, MLX computes in a thread of its own. That thread and the caller's wait for each other every few operations.
Beside busy processes each gets its core for about 4 ms at a time, mostly not when the other does, so both wait: nano
with 32 rows keeps about half of its idle speed beside two busy loops on two cores. On one core they take turns as they
have to, and the system moves the other processes away: about 90 %. On an idle machine two cores are as fast or faster,
so a thread watches how long this process's threads wait for a core, and acts only if that is long.
"""

import os
import sys
import threading
from pathlib import Path
from time import perf_counter

LOOK = 0.1  # seconds over which waiting is measured
WAITING = 0.2  # seconds of waiting a second, summed over the threads: 0.01 on an idle machine, 0.5 beside one loop
HOLD, FOLLOW = 2.0, 0.25  # seconds until waiting is measured again, and between two looks at the caller's core
TASKS = Path("/proc/self/task")

_watcher: tuple[threading.Thread, threading.Event] | None = None


def watch(wanted: bool) -> None:
    """Begin to watch the calling thread's waiting, or stop; do nothing where there is nothing to choose."""
    global _watcher
    if wanted == (_watcher is not None):
        return
    if _watcher is not None:
        (thread, ended), _watcher = _watcher, None
        ended.set()
        thread.join()
    elif sys.platform.startswith("linux") and len(os.sched_getaffinity(0)) > 1 and waited() is not None:
        ended = threading.Event()
        arguments = (threading.get_native_id(), ended)
        thread = threading.Thread(target=_watch, args=arguments, name="mlx-traces-cores", daemon=True)
        thread.start()
        _watcher = thread, ended


def waited() -> float | None:
    """Return how long this process's threads have waited for a core, in seconds; None if the system does not say."""
    try:
        return sum(int((task / "schedstat").read_text().split()[1]) for task in TASKS.iterdir()) / 1e9
    except (OSError, IndexError, ValueError):  # also if a thread ends meanwhile
        return None


def _watch(caller: int, ended: threading.Event) -> None:
    while not ended.is_set():
        began, before = perf_counter(), waited()
        if ended.wait(LOOK):
            return
        after = waited()
        if before is None or after is None or after - before < WAITING * (perf_counter() - began):
            continue
        try:
            allowed = os.sched_getaffinity(caller)
            for _ in range(round(HOLD / FOLLOW)):
                _place({_core_of(caller)})
                if ended.wait(FOLLOW):
                    break
            _place(allowed)
        except OSError:  # the caller has ended
            return


def _core_of(thread: int) -> int:
    """Return the core that a thread runs on, or ran on last; see proc(5), field 39 of ``stat``."""
    return int((TASKS / str(thread) / "stat").read_text().rpartition(")")[2].split()[36])


def _place(cores: set[int]) -> None:
    """Allow some cores to the threads that Python did not start. What Python's threads start inherits theirs."""
    own = {thread.native_id for thread in threading.enumerate()}
    for thread in {int(task.name) for task in TASKS.iterdir()} - own:
        try:
            os.sched_setaffinity(thread, cores)
        except OSError:  # it has ended
            continue
