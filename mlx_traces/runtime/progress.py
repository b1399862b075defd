"""Progress of a long command on stderr: a live line in a terminal, a plain line every 30 seconds elsewhere. No MLX."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Event, Thread
from time import perf_counter

from rich.console import Console
from rich.live import Live
from rich.text import Text

from mlx_traces.text import duration

EVERY = 30.0  # seconds between two plain lines
MOST_NAME = 16  # characters that are shown of a command's or a run's name
BAR, ROOMY = 10, 80  # characters of the bar, and of a terminal that has room for one


class Progress:
    """A count of work done out of a total, and ``figures``, further texts with the most important first."""

    def __init__(self, name: str, console: Console) -> None:
        self.name, self.console = name[:MOST_NAME], console
        self.done, self.total, self.figures = 0, 0, ()
        self.began, self.first = perf_counter(), None
        self.live = None
        self.terminal = console.is_terminal and not console.is_dumb_terminal

    def update(self, done: int, total: int, figures: Sequence[str] = ()) -> None:
        """Set how much is done. The first call says how much was done before; the rate counts from there.

        If less is done than before, another stage has begun, and the rate counts from this call.
        """
        if self.first is None or done < self.done:
            self.first = (done, perf_counter())
        self.done, self.total, self.figures = done, total, tuple(figures)
        if self.terminal and self.live is None:  # not before, so that an error has no empty line above it
            self.live = Live(self, console=self.console, refresh_per_second=4)
            self.live.start()

    def say(self, line: str) -> None:
        """Print a separate line at once."""
        if self.terminal:
            self.console.print(line, highlight=False, markup=False)
        else:
            _log(line)

    def parts(self) -> list[str]:
        """Return the parts of a line: how much is done, the rate, the time left, the figures."""
        now = perf_counter()
        if self.first is None:
            return [f"{duration(now - self.began)} so far"]
        before, since = self.first
        rate = (self.done - before) / (now - since) if now > since else 0.0
        timing = []
        if rate:
            timing = [f"{rate:.{0 if rate >= 100 else 1}f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"]
            timing += [f"{duration((self.total - self.done) / rate)} left"]
        return [f"{self.done:,}/{self.total:,}", *timing, *self.figures]

    def line(self, width: int) -> str:
        """Return the live line: as many parts as fit."""
        full = round(BAR * self.done / max(1, self.total))
        mark, rest = ("━", "─") if self.console.encoding.startswith("utf") else ("#", "-")
        text = self.name + (f" {mark * full}{rest * (BAR - full)}" if width >= ROOMY else "")
        for part in self.parts():
            if len(text) + 2 + len(part) <= width:
                text += f"  {part}"
        return text[:width]

    def __rich__(self) -> Text:
        """Return the live line for rich."""
        return Text(self.line(self.console.width), no_wrap=True)


@contextmanager
def progress(name: str) -> Iterator[Progress]:
    """Yield a `Progress` that is shown on stderr while the context lasts."""
    shown, over, lines = Progress(name, Console(stderr=True)), Event(), []

    def log() -> None:
        lines.append(f"{shown.name}: {', '.join(shown.parts())}")
        _log(lines[-1])

    def tell() -> None:
        while not over.wait(EVERY):
            log()

    teller = Thread(target=tell, daemon=True)
    if not shown.terminal:
        teller.start()
    try:
        yield shown
    finally:
        over.set()
        if not shown.terminal:
            teller.join()
            if lines:  # the last one says how it ended
                log()
        if shown.live is not None:
            shown.live.stop()


def _log(line: str) -> None:
    with suppress(OSError, ValueError):  # stderr is closed
        print(line, file=sys.stderr, flush=True)
