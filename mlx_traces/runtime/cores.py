"""Keep MLX's thread on its caller's core while other work competes for the cores. Linux only.

On a CPU, MLX computes in a thread of its own, and that thread and Python's wait for each other every few operations.
Where other processes keep the cores busy, each of the two gets its core for about 4 ms at a time, mostly not when the
other does, so both wait: nano with 32 rows keeps about half of its idle speed beside two busy loops on two cores. On
one core they take turns as they have to, and the system moves the other processes away: about three quarters. On an
idle machine two cores are as fast or faster. So `look`, which long computations call now and then, measures how long
the two threads wait for a core, acts only if that is long, and measures again two seconds later.
"""

import os
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from time import perf_counter

LOOK = 0.1  # seconds over which waiting is measured, at least
WAITING = 0.2  # seconds of waiting a second, of both threads: 0.01 on an idle machine, 0.5 beside one busy loop
HOLD, FOLLOW = 2.0, 0.25  # seconds until waiting is measured again, and between two looks at the caller's core
TASKS = Path("/proc/self/task")

_own = threading.local()
_before: dict[int, set[int]] = {}  # the cores that each moved thread had


@dataclass
class Watch:
    """What is known of a calling thread: its open computations, times of a moment, and the thread moved to it."""

    caller: int
    open: list["Computation"] = field(default_factory=list)
    times: dict[int, tuple[int, int]] = field(default_factory=dict)
    at: float = 0.0  # when the times were read
    next: float = 0.0  # when to look again
    held: int | None = None  # MLX's thread, until `until`
    until: float = 0.0
    core: set[int] | None = None  # where it was moved

    def look(self) -> None:
        """Measure, or follow the caller; a system that refuses is left alone."""
        now = perf_counter()
        try:
            if self.held is not None and now >= self.until:
                self.release()
                self.held, self.times = None, {}
            if self.held is None:
                self.held = self.waiting(now)
                self.until = now + HOLD
            if self.held is not None:
                self.follow(self.held)
            self.next = now + (LOOK if self.held is None else FOLLOW)
        except (OSError, IndexError, ValueError):
            self.release()
            self.held, self.next = None, inf

    def waiting(self, now: float) -> int | None:
        """Return the thread that ran most since the last look, if it and the caller waited long; MLX's is that one."""
        times, earlier = times_of(self.caller), self.times
        seconds, self.times, self.at = now - self.at, times, now
        ran = {thread: times[thread][0] - earlier[thread][0] for thread in times.keys() & earlier.keys()}
        caller = ran.pop(self.caller, None)
        if caller is None or not ran:
            return None
        busiest = max(ran, key=ran.__getitem__)
        waited = sum(times[thread][1] - earlier[thread][1] for thread in (self.caller, busiest))
        return busiest if waited / 1e9 >= WAITING * seconds else None

    def follow(self, thread: int) -> None:
        """Move a thread to the caller's core."""
        core = {core_of(self.caller)}
        _before.setdefault(thread, os.sched_getaffinity(thread))
        os.sched_setaffinity(thread, core)
        self.core = core

    def release(self) -> None:
        """Give the moved thread its cores back, unless somebody else has moved it since."""
        core, self.core = self.core, None
        try:
            if core and os.sched_getaffinity(self.held) == core:
                os.sched_setaffinity(self.held, _before.pop(self.held))
        except OSError:  # it has ended
            _before.pop(self.held, None)


@dataclass(eq=False)
class Computation:
    """A computation of a thread, for which MLX's thread ``may_move``."""

    watch: Watch
    may_move: bool

    def end(self) -> None:
        """Put MLX's thread back unless an outer computation may have moved it; any thread may call this."""
        self.watch.open.remove(self)
        if not (self.watch.open and self.watch.open[-1].may_move):
            self.watch.release()


def begin(may_move: bool) -> Computation:
    """Begin a computation of the calling thread; while several are open, the newest counts."""
    if not hasattr(_own, "watch"):
        _own.watch = Watch(threading.get_native_id())
    watch = _own.watch
    watch.open.append(computation := Computation(watch, may_move and _can_move()))
    if perf_counter() - watch.at > LOOK:
        watch.times = {}
    watch.next = 0.0
    if not computation.may_move:
        watch.release()
    return computation


def look() -> None:
    """Measure and act, if it is time; takes less than a microsecond otherwise."""
    watch = getattr(_own, "watch", None)
    if watch is not None and watch.open and watch.open[-1].may_move and perf_counter() >= watch.next:
        watch.look()


def _can_move() -> bool:
    with suppress(OSError):
        return sys.platform.startswith("linux") and len(os.sched_getaffinity(0)) > 1
    return False


def times_of(caller: int) -> dict[int, tuple[int, int]]:
    """Return how long the caller and each thread that Python did not start have run and waited for a core, in ns."""
    others = {thread.native_id for thread in threading.enumerate()} - {caller}
    found = {}
    for task in TASKS.iterdir():
        if int(task.name) not in others:
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                ran, waited, _ = (task / "schedstat").read_text().split()
                found[int(task.name)] = int(ran), int(waited)
    return found


def core_of(thread: int) -> int:
    """Return the core that a thread runs on, or ran on last; field 39 of ``stat``, see proc(5)."""
    return int((TASKS / str(thread) / "stat").read_text().rpartition(")")[2].split()[36])
