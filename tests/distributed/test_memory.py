"""The memory of a run, estimated before it starts, against a measured peak and the paper's models on H100s."""

import csv
import os
from dataclasses import replace
from typing import Any

import pytest

from epochal.campaign.executor import _cores
from epochal.config import REPOSITORY
from epochal.distributed.memory import (
    describe_fitting,
    device_bytes,
    estimate_memory,
    fitting_micro_batches,
    memory_problem,
)
from epochal.distributed.presets import Preset
from epochal.doctor import gpu_advice
from epochal.models.config import parameter_counts, read_config
from epochal.run import AdamW, LookAhead, OrthogonalStep, OwnPredictions, RandomTokens, Run, SecondToken

H100 = device_bytes("NVIDIA H100 80GB HBM3") or 0.0
FSDP2 = Preset("fsdp2")


def run(model: str, sequences: int = 64, length: int = 4096, **changes: Any) -> Run:
    base = Run(
        name=model, model=model, data="dclm", unique_tokens=sequences * length, epochs=1, batch_size=sequences,
        sequence_length=length, optimizer=AdamW(),
    )  # fmt: skip
    return replace(base, **changes)


def test_the_estimate_is_within_a_twentieth_of_the_peak_that_an_h100_reported() -> None:
    with (REPOSITORY / "benchmarks" / "training_gpu.csv").open(newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["optimizer"] == "AdamW" and not row["modes"])
    size, length = int(row["micro_batch"]), int(row["length"])
    estimate = estimate_memory(run(row["model"], 256, length), size, world=1, preset=Preset())
    assert estimate.total / 1e9 == pytest.approx(float(row["peak_gb"]), rel=0.05)


@pytest.mark.parametrize(
    ("model", "states", "eager", "compiled", "recomputed"),
    [
        ("ic-300m", 0.6, 2.3, 1.6, 0.2),
        ("ic-600m", 1.2, 6.0, 3.9, 0.4),
        ("ic-1.4b", 2.9, 8.1, 5.2, 0.5),
        ("ic-3.2b", 6.5, 24.2, 15.7, 1.6),
    ],
)
def test_states_and_activations_of_a_sequence_of_4096_tokens(
    model: str, states: float, eager: float, compiled: float, recomputed: float
) -> None:
    """GB on each of eight processes, counted by hand from saved tensors; recomputation holds one layer on top."""
    for modes, expected in (((), eager), (("compile",), compiled), (("recompute",), recomputed)):
        estimate = estimate_memory(run(model), 1, world=8, preset=replace(FSDP2, modes=frozenset(modes)))
        assert estimate.states / 1e9 == pytest.approx(states, abs=0.05)
        one_layer = eager / read_config(model)["num_hidden_layers"]
        on_top = one_layer if modes == ("recompute",) else 0.0
        assert estimate.activations / 1e9 == pytest.approx(expected + on_top, rel=0.15)


def test_a_run_that_does_not_fit_is_said_with_what_would() -> None:
    large = run("ic-3.2b")
    assert fitting_micro_batches(large, H100, world=8, preset=FSDP2) == [1, 2]
    assert memory_problem(large, 2, H100, world=8, preset=FSDP2) is None
    problem = memory_problem(large, None, H100, world=8, preset=FSDP2)
    assert problem is not None and problem.endswith("with a micro-batch of 8 (fsdp2); use --micro-batch 2.")
    problem = memory_problem(large, 1, H100, world=8, preset=Preset())
    assert problem is not None and "use --mode recompute, more processes, or a preset that shards" in problem
    assert "compile none" not in describe_fitting(large, H100, world=8).split("fsdp2")[1]


def test_the_doctor_names_the_mps_daemon_and_what_fits() -> None:
    lines = gpu_advice(H100, 1, 16, mps=False)
    assert "start it with nvidia-cuda-mps-control -d" in lines[0] and "16 cores" in lines[0]
    assert "--mode deterministic" in lines[1]
    assert lines[-1].startswith("largest micro-batch of ic-3.2b at 4,096 tokens in 86 GB, estimated: one process ")
    assert "MPS daemon: runs" in gpu_advice(H100, 8, 16, mps=True)[0]


@pytest.mark.parametrize("jobs", [1, 2, 3, 8])
def test_workers_of_a_gpu_share_the_cores(monkeypatch: pytest.MonkeyPatch, jobs: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5, 7})
    shares = [_cores(number, jobs) for number in range(jobs)]
    assert {core for share in shares for core in share} == {2, 3, 5, 7}
    assert all(shares) and (jobs > 4 or sum(map(len, shares)) == 4)


def test_what_a_regularizer_keeps_is_counted() -> None:
    """Distributions of float16 for every position dominate; a step along a gradient holds two copies of the weights."""
    plain = run("ic-150m", sequences=8, length=1024, data_order="sequences")

    def total(**changes: Any) -> float:
        return estimate_memory(replace(plain, **changes), 2, world=1, preset=Preset(), vocab_size=1000).total

    table = 8 * 1024 * 1000 * 2
    batch = 3 * 2 * 1024 * 1000 * 4
    assert total(regularizer=OwnPredictions()) - total() == table + batch
    weights = parameter_counts("ic-150m", vocab_size=1000).total
    for copies, regularizer in ((0, RandomTokens()), (1, OrthogonalStep(of="update")), (2, LookAhead())):
        assert total(regularizer=regularizer) - total() == pytest.approx(4 * copies * weights)
    width = read_config("ic-150m")["hidden_size"]
    maps, states, head = 4 * width * width, 4 * 2 * 1024 * width, 1000 * width
    assert total(regularizer=SecondToken()) - total() == pytest.approx(4 * (maps + states + head))
