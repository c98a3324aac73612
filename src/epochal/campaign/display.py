"""Progress of a running campaign: a live table on a terminal, one log line per event elsewhere."""

import json
import os
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from epochal.campaign.executor import CampaignStatus
from epochal.records import Workspace


class Display:
    """Shows a CampaignStatus: a context manager, and the `progress` of `run_campaign`."""

    def __init__(self, console: Console, workspace: Workspace, *, done: int, flops_to_do: float) -> None:
        self.console, self.workspace = console, workspace
        self.done_before, self.flops_to_do = done, flops_to_do
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
            self.live.update(self._table(status))

    def _print(self, status: CampaignStatus, event: dict[str, Any]) -> None:
        name = event.get("name", "")
        match event["event"]:
            case "done":
                loss = "" if event["loss"] is None else f"loss {event['loss']:.4f}  "
                diverged = "" if event["status"] == "done" else f"{event['status']}  "
                self._line(
                    f"{self.done_before + status.done:4d} done  {name}  {loss}{diverged}{event['seconds']:.1f} s"
                )
            case "failed":
                self._line(f"     FAILED {name}: {event['message']}")
            case "error" | "note":
                self._line(f"     {event['message']}")

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _table(self, status: CampaignStatus) -> Table:
        seconds = time.monotonic() - self.started
        table = Table.grid(padding=(0, 2))
        remaining = max(0.0, self.flops_to_do - status.flops)
        eta = f", about {remaining / status.flops * seconds / 60:.0f} min left" if status.flops and remaining else ""
        table.add_row(f"[bold]{self.done_before + status.done} done[/], {len(status.running)} running{eta}")
        for name in status.running:
            table.add_row(name, *last_metrics(self.workspace, name))
        return table


def last_metrics(workspace: Workspace, name: str) -> tuple[str, ...]:
    """Return step, loss and speed of a run, formatted; empty if it has no metrics."""
    path = workspace.folder(name) / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            # Only the end of the file: it has a line for every ten steps of the run.
            file.seek(max(0, os.fstat(file.fileno()).st_size - 512))
            lines = file.read().splitlines()
    except OSError:
        return ()
    for line in reversed(lines):
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if "train_loss" in values:
            speed = values["tokens_per_second"]
            return (
                f"step {values['step']}/{values['steps']}",
                f"loss {values['train_loss']:.3f}",
                f"{speed:,.0f} tok/s",
            )
    return ()
