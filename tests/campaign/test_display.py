"""What a campaign and a run show while they run."""

import io
import json
from pathlib import Path

import pytest
import tiny
from rich.console import Console

from epochal.campaign.display import BLOCKS, Display, Metrics, RunDisplay, _duration, curve
from epochal.campaign.executor import CampaignStatus
from epochal.config import write_atomic
from epochal.records import Workspace
from epochal.stopping import Stopped, check_stop, listen


def line(step: int, **values: float) -> str:
    return json.dumps({"step": step, "steps": 40, **values}) + "\n"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace("tiny", tmp_path / "results", tmp_path / "work")


def write(workspace: Workspace, name: str, text: str) -> Path:
    path = workspace.folder(name) / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_curve_has_the_means_of_equal_shares() -> None:
    assert curve([]) == "" and curve([3.0]) == BLOCKS[0]
    assert curve([4.0, 3.0, 2.0, 1.0]) == "█▆▃▁"
    assert curve([9.0, 7.0, 1.0, 1.0], width=2) == "█▁"
    assert len(curve([float(value) for value in range(1000)])) == 24
    assert curve([1.0, float("nan")]) == curve([1.0, float("inf")]) == "", "a run that diverged has no curve"


def test_metrics_are_read_as_they_are_written(workspace: Workspace) -> None:
    first = line(10, train_loss=3.0, tokens_per_second=100.0)
    path = write(workspace, "a", first + '{"step": 20, "train')
    metrics = Metrics(path)
    assert metrics.read().losses == [3.0] and metrics.cells() == ("step 10/40", "loss 3.000", "100 tok/s")
    path.write_text(first + line(20, train_loss=2.0, tokens_per_second=100.0) + line(20, validation_loss=2.5))
    assert metrics.read().losses == [3.0, 2.0] and metrics.best == 2.5
    path.write_text(first)  # a resume from step 10
    assert metrics.read().losses == [3.0] and metrics.best is None
    # Another attempt, which was as far as the last one before anybody looked.
    write_atomic(path, line(10, train_loss=4.0, tokens_per_second=100.0))
    assert metrics.read().losses == [4.0] and metrics.best is None
    assert Metrics(path.with_name("missing")).read().cells() == ()


def test_a_campaign_shows_its_count_best_loss_and_curve(workspace: Workspace) -> None:
    losses = "".join(line(step, train_loss=5.0 - step / 10, tokens_per_second=100.0) for step in (10, 20, 30))
    write(workspace, "b", losses + line(30, validation_loss=2.25))
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Display(console, workspace, done=11, flops_to_do=0.0, total=33, best=4.5) as display:
        event = {"event": "done", "name": "a", "loss": 3.5, "status": "done", "seconds": 1.0, "flops": 1.0}
        display(CampaignStatus(done=1, running=["b"]), event)
        with console.capture() as captured:
            console.print(display._view(CampaignStatus(done=1, running=["b"])))
    text = captured.get()
    assert "12 of about 33 done" in text and "best loss so far 2.2500" in text and "█▅▁" in text
    assert "12 of about 33 done  a  loss 3.5000" in console.file.getvalue()  # type: ignore[attr-defined]
    assert display._count(CampaignStatus(done=25)) == "36 of about 36", "searches add jobs"


def test_a_run_shows_its_speed_and_time_left(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny.run(Path("tiny.toml"), name="a", model="w16")
    monkeypatch.setattr("epochal.provenance.device_name", lambda: "NVIDIA H100")
    write(workspace, "a", line(10, train_loss=9.0, tokens_per_second=1.0))
    shown = RunDisplay(Console(), workspace, run, vocab_size=300, processes=2)
    assert shown.line() == "", "these are the lines of an earlier attempt"
    write(
        workspace,
        "a",
        line(10, train_loss=9.0, tokens_per_second=1.0) + line(20, train_loss=3.0, tokens_per_second=1e9),
    )
    mfu = shown.flops_per_token * 1e9 / (2 * 989e12)
    assert shown.line() == f"step 20/40  loss 3.000  1,000,000,000 tok/s  MFU {mfu:.1%}  0 s left  █▁"
    assert [_duration(value) for value in (45, 700, 9000)] == ["45 s", "12 min", "2.5 h"]


def test_a_request_to_stop_is_answered_while_the_run_saves(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("epochal.campaign.display.LOOK_SECONDS", 0.01)
    console = Console(file=io.StringIO())
    (tmp_path / "stop").touch()
    listen(stop_file=tmp_path / "stop")
    try:
        with RunDisplay(console, workspace, tiny.run(Path("x.toml"), name="a"), vocab_size=300, processes=1) as shown:
            with pytest.raises(Stopped):
                check_stop()
            while not shown._stopping:
                pass
    finally:
        listen()
    assert console.file.getvalue().startswith("stopping (stop requested by the worker): saving ...")  # type: ignore[attr-defined]
