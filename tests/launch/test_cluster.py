"""Cluster files, the sbatch files made from them, the exports, and what is refused: all without a scheduler."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from campaigns import Campaign

from epochal.campaign.cluster import Cloud, Cluster, check_locks, load_cluster, load_submitted, submission
from epochal.campaign.executor import _gpus
from epochal.campaign.worker import Orders, launch_command
from epochal.config import REPOSITORY
from launch import exports, slurm

ORDERS = Orders(session="s", scale="demo", recipes=("epoching",), results="results", work="work", threads=1)
CLOUD = Cloud(image="registry.example.org/epochal:1", volume="shared", gpu="H100:2", cpus=16, memory=64)


def options_of(script: str) -> dict[str, str]:
    """The options of an sbatch file."""
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


@pytest.mark.parametrize("name", [path.stem for path in (REPOSITORY / "configs" / "cluster").glob("*.toml")])
def test_every_cluster_file_becomes_sbatch_files(name: str) -> None:
    campaign = submission(ORDERS, load_cluster(name))
    texts = [slurm.planner_script(campaign), slurm.array_script(campaign, Path("b.json"), 3, nodes=2)]
    for text in texts:
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_an_array_asks_for_what_the_file_says() -> None:
    cluster = replace(load_cluster("example"), parallel=7)
    text = slurm.array_script(submission(ORDERS, cluster), Path("/x/abc.json"), 40, nodes=2)
    found = options_of(text)
    assert found["array"] == "0-39%7" and found["nodes"] == "2" and found["ntasks-per-node"] == "1"
    assert found["time"] == "720" and found["signal"] == "B:USR1@300" and found["requeue"] == "", "a flag"
    assert (found["partition"], found["gpus-per-node"], found["mem"]) == ("gpu", "8", "400GB")
    assert found["comment"] == "abc"
    assert text.index("module load cuda") < text.index("exec ")
    assert "srun" not in text, "the batch script itself is the worker"


def test_the_planner_takes_little_but_pays_from_the_same_account() -> None:
    found = options_of(slurm.planner_script(submission(ORDERS, load_cluster("example"))))
    assert (found["account"], found["partition"], found["qos"]) == ("project", "cpu", "normal")
    assert (found["nodes"], found["ntasks-per-node"]) == ("1", "1")
    assert not {"gpus-per-node", "cpus-per-task", "mem", "array"} & found.keys()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pack": 0}, "pack is 0"),
        ({"nodes": 2, "pack": 2, "profile": "ddp8"}, "packed on one node"),
        ({"nodes": 2}, "without a profile"),
        ({"grace": "4h"}, "no shorter than time_limit"),
        ({"time_limit": "soon"}, "got 'soon'"),
        ({"retries": -1}, "retries is -1"),
    ],
)
def test_impossible_settings_are_one_sentence(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Cluster(**changes)


def test_an_unknown_sbatch_option_is_refused_with_the_nearest() -> None:
    campaign = submission(ORDERS, Cluster(name="c", slurm={"partitoin": "gpu"}))
    with pytest.raises(ValueError, match=r"'partitoin' is unknown to submitit \(did you mean 'partition'"):
        slurm.planner_script(campaign)
    campaign = submission(ORDERS, Cluster(name="c", slurm={"additional_parameters": {"reservation": "mine"}}))
    assert options_of(slurm.planner_script(campaign))["reservation"] == "mine"


def test_a_submitted_campaign_is_read_back(tmp_path: Path) -> None:
    campaign = submission(replace(ORDERS, work=str(tmp_path)), replace(load_cluster("example"), cloud=CLOUD))
    campaign.save()
    assert load_submitted(campaign.path) == campaign
    campaign.path.unlink()
    assert load_submitted(campaign.path) is None
    other = submission(replace(campaign.orders, recipes=("distillation",)), campaign.cluster)
    assert other.path != campaign.path and other.planner_name != campaign.planner_name
    assert other.runs_name == campaign.runs_name, "what works in one folder must be seen by all who plan for it"


def test_orders_come_before_the_cluster_file_and_a_folder_has_its_own_names(tmp_path: Path) -> None:
    cluster = Cluster(name="c", profile="ddp2", micro_batch=4, retries=5, grace="90s")
    there = submission(ORDERS, cluster)
    assert there.orders.profile == str(REPOSITORY / "configs" / "accelerate" / "ddp2.yaml")
    assert (there.orders.micro_batch, there.orders.retries, there.orders.grace_seconds) == (4, 5, 90.0)
    profile = str(tmp_path / "mine.yaml")
    told = submission(replace(ORDERS, profile=profile, micro_batch=1), cluster).orders
    assert (told.profile, told.micro_batch) == (profile, 1)
    assert submission(ORDERS, Cluster()).orders.profile is None
    names = {there.runs_name}
    for place in ({"work": "elsewhere"}, {"results": "elsewhere"}, {"scale": "micro"}):
        names.add(submission(replace(ORDERS, **place), cluster).runs_name)  # type: ignore[arg-type]
    assert len(names) == 4, "what works in one folder must not be taken for what works in another"


@pytest.mark.parametrize(
    ("mount", "shared"),
    [
        ("server:/x {} nfs4 rw,vers=4.2,local_lock=none 0 0", True),
        ("server:/x {} nfs4 rw,nolock 0 0", True),  # version 4 does not read it
        ("server:/x {} nfs rw,vers=3,local_lock=all 0 0", False),
        ("server:/x {} nfs rw,vers=3,nolock 0 0", False),
        ("mds:/x {} lustre rw,flock 0 0", True),
        ("mds:/x {} lustre rw,localflock 0 0", False),
    ],
)
def test_locks_that_hold_on_one_machine_only_are_refused(tmp_path: Path, mount: str, shared: bool) -> None:
    text = f"/dev/a / ext4 rw 0 0\n{mount.format(tmp_path)}\n"
    if shared:
        check_locks(tmp_path / "work", text)
    else:
        with pytest.raises(ValueError, match="locks hold on one machine only"):
            check_locks(tmp_path / "work", text)


def test_each_node_reads_its_own_rank_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank must be expanded on each node, not where srun is called: run the command with a srun that plays two."""
    profile = tmp_path / "p.yaml"
    profile.write_text("num_processes: 4\n")
    fake = tmp_path / "srun"
    fake.write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nfor i in 0 1; do SLURM_NODEID=$i "$@"; done\n')
    fake.chmod(0o755)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    command = launch_command(replace(ORDERS, profile=str(profile), nodes=2))
    assert "--cpus-per-task=3" in command
    command[command.index(sys.executable)] = "echo"
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([*command, "-m", "epochal.cli"], env=path, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert "--machine_rank 0 " in first and "--machine_rank 1 " in second
    assert "--num_machines 2 --num_processes 8 " in first and first.endswith("-m epochal.cli")


@pytest.mark.parametrize(
    ("jobs", "launches", "shares"),
    [
        (8, False, ["0", "1", "2", "3", "0", "1", "2", "3"]),  # packed: two jobs on each of four GPUs
        (1, True, ["0,1,2,3"]),  # a profile of several processes sees all
        (2, True, ["0,2", "1,3"]),
        (1, False, ["0"]),
    ],
)
def test_workers_share_the_gpus(jobs: int, launches: bool, shares: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    found = [_gpus(number, jobs, launches=launches)["CUDA_VISIBLE_DEVICES"] for number in range(jobs)]
    assert found == shares


def cli(*arguments: str, path: str | None = None) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, **({} if path is None else {"PATH": path})}
    return subprocess.run(
        [sys.executable, "-m", "epochal.cli", *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_a_dry_run_prints_and_changes_nothing(campaign: Campaign) -> None:
    arguments = ["run", "epoching", *campaign.options, "--tracker", "none", "--cluster", "local-test", "--dry-run"]
    before = sorted(campaign.folder.rglob("*"))
    done = cli(*arguments, path="/nowhere")  # needs no Slurm
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#!/bin/bash") == 2 and "# 2 jobs, 2 to a task: w16-" in done.stdout
    assert sorted(campaign.folder.rglob("*")) == before


def test_without_slurm_it_is_one_sentence(campaign: Campaign) -> None:
    done = cli("run", "epoching", *campaign.options, "--tracker", "none", "--cluster", "local-test", path="/nowhere")
    assert done.returncode == 2 and "squeue is not installed here" in done.stderr, done.stderr
    assert not list(campaign.folder.rglob("campaign-*.json"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dry-run"], "need --cluster"),
        (["--cluster", "exmaple"], "did you mean 'example'"),
        (["--cluster", "local-test", "--jobs", "2"], "set pack, parallel and time_limit"),
        (["--cluster", "local-test", "--export", "nomad"], "export 'nomad' is unknown"),
        (["--cluster", "local-test", "--export", "skypilot"], "no .cloud."),
    ],
)
def test_wrong_use_is_one_sentence_and_exit_code_2(campaign: Campaign, options: list[str], words: str) -> None:
    done = cli("run", "epoching", *campaign.options, "--tracker", "none", *options)
    assert done.returncode == 2 and re.search(words, done.stderr), done.stderr
    assert done.stderr.startswith("epochal: ") and done.stderr.count("\n") == 1


# --- exports ---------------------------------------------------------------------------------------------------------


def exported(kind: str, **changes: Any) -> Any:
    cluster = replace(load_cluster("local-test"), cloud=CLOUD, setup=("export A=b",))
    orders = replace(ORDERS, recipes=("epoching", "ensembling"), **changes)
    return yaml.safe_load(exports.export(submission(orders, cluster), kind))


def skypilot_schema() -> dict[str, Any]:
    """The JSON schema in the installed SkyPilot, read without its hundred dependencies."""
    root = Path(str(importlib.metadata.distribution("skypilot").locate_file("sky")))

    stubs = {name: types.ModuleType(name) for name in ("sky", "sky.skylet", "sky.utils", "sky.skylet.autostop_lib")}
    for name, stub in stubs.items():
        stub.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
    stubs["sky"].__dict__.update(__version__=importlib.metadata.version("skypilot"), __commit__="")
    stubs["sky.skylet.autostop_lib"].__dict__.update(AutostopWaitFor=mock.MagicMock())
    with mock.patch.dict(sys.modules, stubs):
        spec = importlib.util.spec_from_file_location("sky.utils.schemas", root / "utils" / "schemas.py")
        assert spec is not None and spec.loader is not None
        schemas = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(schemas)
        with mock.patch.object(schemas, "_task_config_schema", dict):  # settings of a server, of which we write none
            task: dict[str, Any] = schemas.get_task_schema()
            resources: dict[str, Any] = schemas.get_resources_schema()
    task["properties"]["resources"] = resources
    return task


def test_the_skypilot_task_fits_skypilots_own_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    pytest.importorskip("kubernetes_validate")
    schema = skypilot_schema()
    task = exported("skypilot")
    jsonschema.validate(task, schema)
    assert task["num_nodes"] == 4 and task["resources"]["accelerators"] == "H100:2"
    assert "--jobs 4 " in task["run"] and task["run"].index("export A=b") < task["run"].index(
        "exec epochal run epoching"
    )
    assert "--scale /epochal/configs/scales/demo.toml" in task["run"]
    for wrong in ({**task, "nodes": 2}, {**task, "num_nodes": "4"}, {**task, "resources": {"gpu": 1}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_the_kubernetes_job_fits_the_schema_of_kubernetes() -> None:
    validator = pytest.importorskip("kubernetes_validate")
    job = exported("kubernetes", profile=str(REPOSITORY / "configs" / "accelerate" / "ddp2.yaml"))
    validator.validate(job, "1.33", strict=True)
    spec = job["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (4, 4, "Indexed")
    container = spec["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert (
        "--jobs 2 " in container["command"][-1]
        and "--profile /epochal/configs/accelerate/ddp2.yaml" in container["command"][-1]
    )
    ignored = [rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"][1:]]
    assert ignored == [[75], [2]]
    wrong = json.loads(json.dumps(job))
    wrong["spec"]["completion"] = wrong["spec"].pop("completions")
    with pytest.raises(validator.ValidationError):
        validator.validate(wrong, "1.33", strict=True)


def test_exports_refuse_what_a_container_cannot_see(campaign: Campaign) -> None:
    with pytest.raises(ValueError, match="is not in the image"):
        exported("kubernetes", scale=str(campaign.scale_path))
    wide = submission(ORDERS, replace(load_cluster("example"), cloud=CLOUD))
    with pytest.raises(ValueError, match="one-node workers"):
        exports.export(wide, "skypilot")
