"""A separate process that compares answers by math-verify; `tasks.equality` starts it as a script. No MLX.

A request is one line of standard input: a JSON list of the gold answer and the answer to judge. The reply is one line
of standard output: a verdict. A child does the work; the kernel ends it after `SECONDS` of CPU time, even inside
compiled code. The parent then replies ``too_complex`` and forks the next child, so sympy is imported only once.
"""

import json
import logging
import os
import resource
import signal
import sys
from contextlib import suppress
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

SECONDS = 1.0  # of CPU time for one comparison
DECIMALS = 12  # places to which a decimal must agree
MEMORY = 2 << 30  # bytes of address space


@lru_cache(1024)  # the gold answer of a problem is compared with many
def parsed(text: str) -> list[Any]:
    """Parse a formula by math-verify; return a list of one sympy object, or an empty one if that fails."""
    config = LatexExtractionConfig(boxed_match_priority=-1)
    return parse(f"${text}$", [config], fallback_mode="no_fallback", parsing_timeout=None)


def verdict(gold: str, answer: str) -> str:
    """Compare two formulas: ``correct``, ``wrong_value`` or ``not_an_expression``."""
    if not (found := parsed(answer)):
        return "not_an_expression"
    wanted = parsed(gold)
    equal = verify(wanted, found, float_rounding=DECIMALS, allow_set_relation_comp=True, timeout_seconds=None)
    return "correct" if equal and not apart(wanted[0], found[0]) else "wrong_value"


def apart(one: Any, other: Any) -> bool:
    """Whether two numbers differ by more than 1e-10, relative to the larger; False for all else.

    For verify, which rounds to decimal places, all small numbers are equal.
    """
    if not (getattr(one, "is_number", False) and getattr(other, "is_number", False)):
        return False
    gap = abs(one - other)  # not comparable: without a digit that is surely not zero
    return bool(gap.is_comparable and gap.n() > 1e-10 * max(abs(one.n()), abs(other.n())))


def answer_requests() -> None:
    """Reply to each line until the input ends."""
    with suppress(ValueError, OSError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # SIGPROF ends a process that does not handle it
        try:
            reply = verdict(*json.loads(line))
        except (MemoryError, RecursionError):
            reply = "too_complex"
        except Exception:  # math-verify and sympy raise errors of any type
            reply = "wrong_value"
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(REPLIES, f"{reply}\n".encode())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C; the end of the input ends this process
    logging.disable(logging.CRITICAL)
    REPLIES = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that a library's prints are not replies
    os.write(REPLIES, b"ready\n")
    os.dup2(1, 2)  # nobody reads stderr from here on
    while True:
        if (child := os.fork()) == 0:
            answer_requests()
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
        os.write(REPLIES, b"too_complex\n")
