"""`epochal train` under the launchers that people have, by the lines of docs/cluster.md."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from campaigns import Campaign, make_campaign

from epochal.config import REPOSITORY
from epochal.distributed.presets import read_preset
from epochal.distributed.started_by import launcher, local_processes, use_preset

RUN = "w16-2.048k-lr0.01-ep1-wd0.1-s0"
RANK = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
TORCHRUN = {**RANK, "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4"}
DEEPSPEED = {**RANK, "CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "2"}
ACCELERATE = {**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no"}


def documented(program: str) -> list[str]:
    """The lines of docs/cluster.md that start a run with a launcher."""
    text = (REPOSITORY / "docs" / "cluster.md").read_text(encoding="utf-8")
    return [line.split("  #")[0] for line in text.splitlines() if line.startswith(program) and line.count(" RUN")]


def small(line: str, port: int) -> list[str]:
    """The same line for one process per node on this machine; two under accelerate's --multi_gpu, which refuses one."""
    for old, new in ((r"processes 8", "processes 2"), (r"per-node 8", "per-node 1"), (r"gpus 8", "gpus 1")):
        line = re.sub(old, new, line)
    words = shlex.split(line.replace("HOST:29500", f"localhost:{port}").replace(" RUN", f" {RUN}"))
    return [str(Path(sys.executable).parent / words[0]), *words[1:]]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Campaign:
    return make_campaign(tmp_path_factory.mktemp("launched"), prepared)


@pytest.mark.parametrize(
    ("program", "nodes", "world", "sharding"),
    [
        ("accelerate launch --multi_gpu --num_processes 8", 1, 2, "replicated"),
        ("torchrun --nnodes 2", 2, 2, "replicated"),
        ("deepspeed --num_gpus", 1, 1, "zero2"),
    ],
    ids=["accelerate", "torchrun-two-nodes", "deepspeed"],
)
def test_the_documented_lines_train(
    campaign: Campaign, tmp_path: Path, program: str, nodes: int, world: int, sharding: str
) -> None:
    (line,) = documented(program)
    command = small(line, free_port())
    if program.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
        command[1:1] = ["--master_port", str(free_port())]
    options = [*campaign.options, "--results", str(tmp_path), "--work", str(campaign.folder / "work")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [*command, *options],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(nodes)
    ]
    try:
        output = "\n".join(process.communicate(timeout=240)[0] for process in started)
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * nodes, output
    assert re.search(r"step 16/16  loss [\d.]+  [\d,]+ tok/s", output), output
    record = json.loads((tmp_path / "tiny-scale" / "records" / f"{RUN}.json").read_text())
    assert record["provenance"]["preset"].split(",")[0] == " ".join(
        program.split()[: 2 if "accelerate" in program else 1]
    )
    assert (record["provenance"]["sharding"], record["provenance"]["world_size"]) == (sharding, world)


@pytest.mark.parametrize("environment", [TORCHRUN, DEEPSPEED, ACCELERATE], ids=["torchrun", "deepspeed", "accelerate"])
def test_variables_of_a_launcher_are_not_taken_for_those_of_a_shell(environment: dict[str, str]) -> None:
    assert launcher(environment) is not None
    for missing in RANK:
        assert launcher({name: value for name, value in environment.items() if name != missing}) is None


def test_without_a_preset_torchrun_is_ddp_and_deepspeed_is_zero_2() -> None:
    for environment, record, backend in [
        ({}, "here", "replicated"),
        (TORCHRUN, "torchrun", "replicated"),
        (ACCELERATE, "accelerate launch", "replicated"),
        (DEEPSPEED, "deepspeed, zero2", "zero2"),
    ]:
        found = dict(environment)
        assert use_preset(None, found) == record
        assert read_preset(found).backend == backend
    assert (launcher(RANK), local_processes(TORCHRUN), local_processes(DEEPSPEED)) == (
        None,
        4,
        2,
    )


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem
)
def test_torchrun_takes_every_committed_preset_by_name(path: Path) -> None:
    found = dict(TORCHRUN)
    assert use_preset(path.stem, found) == f"torchrun, {path.stem}"
    expected = path.stem.split("-")[0]
    assert read_preset(found).backend == (expected if expected.startswith(("zero", "fsdp")) else "replicated")


@pytest.mark.parametrize(
    ("environment", "preset", "message"),
    [
        ({}, "zero2", "needs a launcher that starts its processes"),
        (ACCELERATE, "zero2", "accelerate launch has set the preset already"),
        (DEEPSPEED, "fsdp2", "does not use DeepSpeed"),
        (TORCHRUN, "zero9", "did you mean"),
    ],
)
def test_a_preset_that_the_launcher_contradicts_is_refused(
    environment: dict[str, str], preset: str, message: str
) -> None:
    found = dict(environment)
    with pytest.raises(ValueError, match=message) as raised:
        use_preset(preset, found)
    assert found == environment and "\n" not in str(raised.value)
