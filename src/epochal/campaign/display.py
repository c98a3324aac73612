"""Progress of a campaign or a run: a live view on a terminal, lines of text elsewhere."""

import itertools
import json
import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from epochal.campaign.executor import CampaignStatus
from epochal.campaign.plan import flops_of
from epochal.provenance import utilisation
from epochal.records import Workspace
from epochal.run import Run
from epochal.stopping import stop_reason

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 24

# Seconds between two looks at the metrics of a run, and between its lines off a terminal.
LOOK_SECONDS, LINE_SECONDS = 0.5, 15.0


class Metrics:
    """The metrics.jsonl of a run, read as it is written: training losses, the last line, the best validation loss."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin()

    def _begin(self) -> None:
        self.losses: list[float] = []
        self.last: dict[str, Any] = {}
        self.best: float | None = None
        self._file, self._offset = 0, 0

    def read(self) -> "Metrics":
        """Read the lines that are new since the last call; a missing file has none."""
        try:
            now = self.path.stat()
            # A run that starts or resumes replaces the file by one with the lines up to its checkpoint. The size is
            # compared too, because a file system may give the new file the same number.
            if now.st_ino != self._file or now.st_size < self._offset:
                self._begin()
                self._file = now.st_ino
            with self.path.open("rb") as file:
                file.seek(self._offset)
                whole = file.read().rpartition(b"\n")[0]
        except OSError:
            return self
        self._offset += len(whole) + 1 if whole else 0
        for line in whole.splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                continue
            if "train_loss" in values:
                self.last = values
                self.losses.append(values["train_loss"])
            loss = values.get("validation_loss")
            if loss is not None and (self.best is None or loss < self.best):
                self.best = loss
        return self

    def cells(self) -> tuple[str, ...]:
        """Return step, loss and speed as text; empty before the first line."""
        if not self.last:
            return ()
        return (
            f"step {self.last['step']}/{self.last['steps']}",
            f"loss {self.last['train_loss']:.3f}",
            f"{self.last['tokens_per_second']:,.0f} tok/s",
        )


def last_metrics(workspace: Workspace, name: str) -> tuple[str, ...]:
    """Return step, loss and speed of a run, formatted; empty if it has no metrics."""
    return Metrics(workspace.folder(name) / "metrics.jsonl").read().cells()


def curve(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """Draw numbers as at most `width` blocks. Each is the mean of an equal share of them."""
    count = min(width, len(values))
    bounds = [len(values) * k // count for k in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    if not all(map(math.isfinite, means)):
        return ""
    low = min(means, default=0.0)
    spread = max(means, default=low) - low or 1.0
    return "".join(BLOCKS[round((mean - low) / spread * (len(BLOCKS) - 1))] for mean in means)


class Display:
    """Shows a CampaignStatus: a context manager, and the `progress` of `run_campaign`.

    done: jobs that were done before. total: jobs of the campaign as far as known, None to leave it out. best: the lowest loss
    before.
    """

    def __init__(
        self,
        console: Console,
        workspace: Workspace,
        *,
        done: int,
        flops_to_do: float,
        total: int | None = None,
        best: float | None = None,
    ) -> None:
        self.console, self.workspace = console, workspace
        self.done_before, self.flops_to_do, self.total, self.best = done, flops_to_do, total, best
        self.metrics: dict[str, Metrics] = {}
        self.started = time.monotonic()
        self.live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> "Display":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, status: CampaignStatus, event: dict[str, Any] | None) -> None:
        """Print an event and redraw the table of running jobs."""
        if event is not None:
            self._print(status, event)
        if self.live is not None:
            self.live.update(self._view(status))

    def _print(self, status: CampaignStatus, event: dict[str, Any]) -> None:
        name = event.get("name", "")
        match event["event"]:
            case "done":
                self._see(event["loss"])
                loss = "" if event["loss"] is None else f"loss {event['loss']:.4f}  "
                diverged = "" if event["status"] == "done" else f"{event['status']}  "
                self._line(f"{self._count(status):>4} done  {name}  {loss}{diverged}{event['seconds']:.1f} s")
            case "failed":
                self._line(f"     FAILED {name}: {event['message']}")
            case "error" | "note":
                self._line(f"     {event['message']}")

    def _count(self, status: CampaignStatus) -> str:
        done = self.done_before + status.done
        # A search may add jobs to those known at the start.
        return f"{done}" if self.total is None else f"{done} of about {max(self.total, done + len(status.running))}"

    def _see(self, loss: float | None) -> None:
        if loss is not None and (self.best is None or loss < self.best):
            self.best = loss

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _view(self, status: CampaignStatus) -> Group:
        seconds = time.monotonic() - self.started
        rows = []
        for name in status.running:
            path = self.workspace.folder(name) / "metrics.jsonl"
            metrics = self.metrics.setdefault(name, Metrics(path)).read()
            self._see(metrics.best)
            rows.append((name, curve(metrics.losses), *metrics.cells()))
        remaining = max(0.0, self.flops_to_do - status.flops)
        eta = f", about {remaining / status.flops * seconds / 60:.0f} min left" if status.flops and remaining else ""
        best = "" if self.best is None else f", best loss so far {self.best:.4f}"
        table = Table.grid(padding=(0, 2))
        for row in rows:
            table.add_row(*row)
        header = f"{self._count(status)} done, {len(status.running)} running{best}{eta}"
        return Group(Text(header, style="bold"), table)


class RunDisplay:
    """Shows the Run that trains in this process, from its metrics: step, loss, tokens/s, MFU, time left.

    vocab_size: of its tokenizer, for the FLOPs of a token. processes: all that train it. A context manager.
    """

    def __init__(
        self, console: Console, workspace: Workspace, run: Run, *, vocab_size: int | None, processes: int
    ) -> None:
        self.console, self.run, self.processes = console, run, processes
        self.metrics = Metrics(workspace.folder(run.name) / "metrics.jsonl")
        self.flops_per_token = flops_of(run, vocab_size) / run.tokens
        self._old = self.metrics.read().last  # of an earlier attempt
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)
        self._stopping = False

    def __enter__(self) -> "RunDisplay":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def line(self) -> str:
        """Return the progress as one line; empty before the first metrics."""
        metrics = self.metrics.read()
        if metrics.last in ({}, self._old):
            return ""
        speed, left = metrics.last["tokens_per_second"], metrics.last["steps"] - metrics.last["step"]
        used = utilisation(self.flops_per_token * speed, devices=self.processes)
        parts = [*metrics.cells(), *([] if used is None else [f"MFU {used:.1%}"])]
        parts += [] if metrics.best is None else [f"best validation loss {metrics.best:.4f}"]
        parts += [f"{_duration(left * self.run.batch_tokens / speed)} left"] if speed and left else []
        return "  ".join([*parts, curve(metrics.losses)])

    def _show(self) -> None:
        live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        before, due = "", 0.0
        if live is not None:
            live.start()
        while not self._ended.wait(LOOK_SECONDS):
            if stop_reason() is not None and not self._stopping:
                self._stopping = True
                self.console.print(f"stopping ({stop_reason()}): saving ...")
            line = self.line()
            if live is not None:
                live.update(line, refresh=True)
            elif line != before and time.monotonic() >= due:
                self.console.print(line, markup=False, highlight=False, soft_wrap=True)
                before, due = line, time.monotonic() + LINE_SECONDS
        if live is not None:
            live.stop()
        if line := self.line():
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    """Format seconds for people: 45 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
