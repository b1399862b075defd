"""Ctrl-C: the first is a wish, which a run's loop looks at between its units; the second stops at once."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SAID = "\nCtrl-C: stopping as soon as what is under way is done and saved; once more stops at once\n"


class Stopped(KeyboardInterrupt):
    """A run was stopped by Ctrl-C between two of its units; the message says after which."""


@contextmanager
def listening(say: bool = True) -> Iterator[Callable[[], bool]]:
    """Yield a function of nothing that tells whether Ctrl-C was pressed since the context began.

    The second Ctrl-C does what the first would have done outside. Where Python does not handle Ctrl-C, in another than
    the main thread or in a process that ignores it, nothing is changed.

    Args:
        say: tell on stderr that the first was heard.
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
