"""Send a training's metrics to a tracking client, trackio or wandb, as they are logged.

The client is imported only if one is set. It gets each row of the run's ``metrics.jsonl`` once, with its names and
step. ``tracked.json`` in the run folder keeps the tracked run's id and the last step that each client got. So a resumed
run continues the same tracked run, and rows logged before a client was set are sent too. After a client's first failure
nothing more is sent; the training continues.
"""

import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_traces.config import TrackingConfig
from mlx_traces.errors import UserError, choices, first_line
from mlx_traces.readers import read_json
from mlx_traces.runtime import distributed
from mlx_traces.runtime.files import to_json, write_atomic
from mlx_traces.runtime.run_folder import RunFolder
from mlx_traces.text import clean

PROJECT = "mlx-traces"  # unless the client's own environment variable names another
STATE = "tracked.json"

Row = dict[str, Any]
Show = Callable[[Row, int], Any]


def client(name: str) -> ModuleType:
    """Import a tracking client; UserError if it is not installed, or its import fails."""
    if name not in CLIENTS:
        raise UserError(f"report_to: {name!r} is not known; choose {choices(CLIENTS)}")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise UserError(f"report_to: {name} is not installed; pip install {name}, or leave report_to out") from None
        raise UserError(f"report_to: {name} needs {error.name}; pip install --upgrade {name}") from None
    except Exception as error:  # a client's import runs whatever code it likes
        raise UserError(f"report_to: {name} cannot be imported ({first_line(error)}); leave report_to out") from None


@contextmanager
def reported(config: TrackingConfig, folder: RunFolder, show: Show | None) -> Iterator[Show | None]:
    """Yield a ``show`` that also sends each row to the client ``report_to``; without a client ``show`` itself.

    Of several ranks only the first sends. The tracked run begins with the first row, when the settings are checked.

    Args:
        config: the training's settings; the client gets them, with the content of ``run.json``, as configuration.
        folder: the run folder.
        show: takes each line of metrics, which is in ``metrics.jsonl`` by then, and the number of steps; or None.

    Raises:
        UserError: if the client is not installed.
    """
    if config.report_to is None or not distributed.first():
        yield show
        return
    tracker = Tracker(client(config.report_to), config, folder)

    def sent(row: Row, steps: int) -> None:
        tracker.send(row)
        if show:
            show(row, steps)

    failed = True
    try:
        yield sent
        failed = False
    finally:
        tracker.finish(failed)


class Tracker:
    """One run at a client, from its first row to its end; after the client's first failure it sends nothing."""

    def __init__(self, module: ModuleType, config: TrackingConfig, folder: RunFolder) -> None:
        self.module, self.config, self.folder = module, config, folder
        self.state, self.run, self.off = folder.path / STATE, None, False

    def send(self, row: Row) -> None:
        """Send a row; the first time, all rows of ``metrics.jsonl`` that the tracked run does not have yet."""
        if self.off:
            return
        with self._leaving():
            rows = [row]
            if self.run is None:
                about = self.folder.about
                self.id, self.sent = run_id(self.folder.path), {}
                if self.state.exists() and (state := read_json(self.state)).get("id") == self.id:
                    self.sent = dict(state["sent"])
                self.last = self.sent.get(self.module.__name__, -1)
                made = {name: about.get(name) for name in ("versions", "git_revision", "platform", "backend", "ranks")}
                settings = {**self.config.model_dump(mode="json"), **about["identity"], **made}
                self.run = CLIENTS[self.module.__name__][0](self.module, self.id, self.folder.path.name, settings)
                rows = self.folder.metrics
            for one in rows:
                if one["step"] > self.last:
                    self.run.log({name: value for name, value in one.items() if name != "step"}, step=one["step"])
                    self.last = one["step"]
            self.sent[self.module.__name__] = self.last
            write_atomic(self.state, to_json({"id": self.id, "sent": self.sent}))

    def finish(self, failed: bool) -> None:
        """End the tracked run; it can be continued."""
        if self.run is not None and not self.off:
            with self._leaving():
                CLIENTS[self.module.__name__][1](self.module, failed)

    @contextmanager
    def _leaving(self) -> Iterator[None]:
        """Redirect the client's output to stderr; after an error print one line and send nothing more."""
        try:
            with redirect_stdout(sys.stderr):
                yield
        except Exception as error:  # what a client, its server or the network does must not end a training
            self.off = True
            name = self.module.__name__
            print(f"warning: {name} failed ({clean(first_line(error))}); nothing is sent any more", file=sys.stderr)


def run_id(folder: Path) -> str:
    """Return the id of a run folder's tracked run: 12 hexadecimal digits.

    They follow from ``run.json``, which is written once, with its time. So a moved folder keeps them, and a new run in
    the place of a removed one gets others.
    """
    return hashlib.sha256((folder / "run.json").read_bytes()).hexdigest()[:12]


def _begin_trackio(trackio: Any, identity: str, name: str, settings: dict[str, Any]) -> Any:
    """Begin or continue a run; trackio identifies it by its name."""
    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    return trackio.init(project=project, name=f"{name}-{identity}", config=settings, resume="allow", embed=False)


def _begin_wandb(wandb: Any, identity: str, name: str, settings: dict[str, Any]) -> Any:
    """Begin or continue a run; printed lines are not recorded."""
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    return wandb.init(
        project=project, id=identity, name=name, config=settings, resume="allow", settings={"console": "off"}
    )


CLIENTS: dict[str, tuple[Callable[[Any, str, str, dict[str, Any]], Any], Callable[[Any, bool], None]]] = {
    "trackio": (_begin_trackio, lambda trackio, failed: trackio.finish()),
    "wandb": (_begin_wandb, lambda wandb, failed: wandb.finish(exit_code=int(failed))),
}
