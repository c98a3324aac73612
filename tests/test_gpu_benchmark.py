"""benchmarks/gpu.py walks its whole path on a CPU, and drops or stops what exceeds its time."""

import csv
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from epochal.config import REPOSITORY
from epochal.models import layers
from epochal.training import cuda_graph

sys.path.append(str(REPOSITORY / "benchmarks"))
import gpu

# torch's own, while it traces a tensor that another layer computed.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu.Bench:
    """A rehearsal without compilers and GPUs."""
    monkeypatch.setattr(layers, "COMPILER", "eager")
    monkeypatch.setattr(cuda_graph, "capture", lambda function: function)
    return gpu.Bench("cpu", tmp_path)


def test_every_part_leaves_rows_with_the_committed_columns(bench: gpu.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a busy machine a rehearsal may take longer than a GPU.
    patient = {name: (part, 10 * limit) for name, (part, limit) in gpu.PARTS.items()}
    monkeypatch.setattr(gpu, "PARTS", patient)
    try:
        assert gpu.run_parts(bench, list(gpu.PARTS), 10_000) == []
    finally:
        torch._dynamo.reset()
    with (bench.folder / "gpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["part"].replace(" ", "_") for row in rows} == gpu.PARTS.keys() - {
        "training",
        "small",
        "optimizers",
        "long",
    }
    assert {row["value"] for row in rows if row["quantity"] == "two runs"} == {"equal to the last bit"}
    with (bench.folder / "training_gpu.csv").open(newline="") as file:
        trained = csv.DictReader(file)
        modes = {row["modes"] for row in trained}
    assert modes == {"", "compile", "compile fused", "compile fused bf16-residual", "cuda-graph", "compile cuda-graph"}
    with (REPOSITORY / "benchmarks" / "training_gpu.csv").open(newline="") as file:
        assert csv.DictReader(file).fieldnames == trained.fieldnames


def test_parts_that_exceed_their_time_cost_the_others_nothing(
    bench: gpu.Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []

    def slow(_: Any) -> None:
        while True:
            time.monotonic()

    def broken(_: Any) -> None:
        raise RuntimeError("of this part alone")

    parts = {"slow": (slow, 0.05), "broken": (broken, 1), "good": (done.append, 1), "late": (done.append, 1000)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    problems = gpu.run_parts(bench, list(parts), 30)
    assert [problem.split(":")[0] for problem in problems] == ["slow", "broken", "late"]
    assert "stopped after" in problems[0] and "failed" in problems[1] and "dropped" in problems[2]
    assert done == [bench] and "of this part alone" in capsys.readouterr().err


def dies(*_: Any) -> None:
    raise SystemExit(3)


def test_a_member_that_dies_ends_its_part(bench: gpu.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "member", dies)
    monkeypatch.setattr(gpu, "PARTS", {"jobs": (gpu.jobs, 200)})
    (problem,) = gpu.run_parts(bench, ["jobs"], 1000)
    assert problem.startswith("jobs: failed")


def test_all_parts_fit_into_one_call() -> None:
    assert sum(limit for _, limit in gpu.PARTS.values()) / 2 <= 530, "half of the limits, below which a part is dropped"
