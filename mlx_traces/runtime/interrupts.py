"""Ctrl-C: the first asks a run to stop after its current unit of work; the second stops at once."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SAID = "\nCtrl-C: stopping when the current work is done and saved; once more stops at once\n"


class Stopped(KeyboardInterrupt):
    """Ctrl-C stopped a run between two units of work; the message says after which one."""


@contextmanager
def listening(say: bool = True) -> Iterator[Callable[[], bool]]:
    """Yield a function without arguments that returns whether Ctrl-C was pressed since the context began.

    The second Ctrl-C does what the first would do outside of the context. In a thread other than the main one, and in a
    process that ignores Ctrl-C, nothing is changed.

    Args:
        say: acknowledge the first Ctrl-C on stderr.
    """
    before, pressed = signal.getsignal(signal.SIGINT), False

    def first(*_: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)
        if say:
            os.write(sys.__stderr__.fileno(), SAID.encode())  # a stream may be in the middle of a write just now

    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: False
        return
    signal.signal(signal.SIGINT, first)
    try:
        yield lambda: pressed
    finally:
        if signal.getsignal(signal.SIGINT) is first:
            signal.signal(signal.SIGINT, before)
