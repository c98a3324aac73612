"""Cluster files, the sbatch files written from them, and what is refused: all without a scheduler."""

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from campaigns import DATA, Campaign

from epochal.campaign.cluster import Cluster, check_locks, cluster_campaign, load_cluster, load_cluster_campaign
from epochal.campaign.executor import _gpus
from epochal.campaign.worker import WorkerConfig, launch_command
from epochal.cli import main
from epochal.config import REPOSITORY
from launch import slurm

CONFIG = WorkerConfig(session="s", scale="demo", recipes=("epoching",), results="results", work="work", threads=1)


def options_of(script: str) -> dict[str, str]:
    """The options of an sbatch file."""
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


@pytest.mark.parametrize("name", [path.stem for path in (REPOSITORY / "configs" / "cluster").glob("*.toml")])
def test_every_cluster_file_becomes_sbatch_files(name: str) -> None:
    campaign = cluster_campaign(CONFIG, load_cluster(name))
    texts = [slurm.planner_script(campaign), slurm.array_script(campaign, Path("b.json"), 3, nodes=2)]
    for text in texts:
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_an_array_asks_for_what_the_file_says() -> None:
    cluster = replace(load_cluster("example"), parallel=7)
    text = slurm.array_script(cluster_campaign(CONFIG, cluster), Path("/x/abc.json"), 40, nodes=2)
    options = options_of(text)
    assert options["array"] == "0-39%7" and options["nodes"] == "2" and options["ntasks-per-node"] == "1"
    assert options["time"] == "720" and options["signal"] == "B:USR1@300" and options["requeue"] == "", "a flag"
    assert (options["partition"], options["gpus-per-node"], options["mem"]) == ("gpu", "8", "400GB")
    assert options["comment"] == "abc"
    assert text.index("module load cuda") < text.index("exec ")
    assert "srun" not in text, "the batch script itself is the worker"


def test_the_planner_takes_little_but_pays_from_the_same_account() -> None:
    options = options_of(slurm.planner_script(cluster_campaign(CONFIG, load_cluster("example"))))
    assert (options["account"], options["partition"], options["qos"]) == ("project", "cpu", "normal")
    assert (options["nodes"], options["ntasks-per-node"]) == ("1", "1")
    assert not {"gpus-per-node", "cpus-per-task", "mem", "array"} & options.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pack": 0}, "pack must be an integer from 1 to 1,000, got 0"),
        ({"nodes": 2, "pack": 2, "preset": "ddp8"}, "packed on one node"),
        ({"nodes": 2}, "without a preset"),
        ({"grace": "4h"}, "must be shorter than time_limit"),
        ({"time_limit": "soon"}, "got 'soon'"),
        ({"retries": -1}, "retries must be an integer from 0 to 1,000, got -1"),
    ],
)
def test_impossible_settings_are_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cluster(**changes)


def test_an_unknown_sbatch_option_is_refused_with_the_nearest() -> None:
    campaign = cluster_campaign(CONFIG, Cluster(name="c", slurm={"partitoin": "gpu"}))
    with pytest.raises(ValueError, match=r"'partitoin' is unknown to submitit \(did you mean 'partition'"):
        slurm.planner_script(campaign)
    campaign = cluster_campaign(CONFIG, Cluster(name="c", slurm={"additional_parameters": {"reservation": "mine"}}))
    assert options_of(slurm.planner_script(campaign))["reservation"] == "mine"


def test_a_campaign_file_is_read_back(tmp_path: Path) -> None:
    campaign = cluster_campaign(replace(CONFIG, work=str(tmp_path)), load_cluster("example"))
    campaign.save()
    assert load_cluster_campaign(campaign.path) == campaign
    campaign.path.unlink()
    assert load_cluster_campaign(campaign.path) is None
    other = cluster_campaign(replace(campaign.config, recipes=("distillation",)), campaign.cluster)
    assert other.path != campaign.path and other.planner_name != campaign.planner_name
    assert other.runs_name == campaign.runs_name, "planners of one folder must see each other's tasks"


def test_options_of_the_command_line_override_the_cluster_file(tmp_path: Path) -> None:
    cluster = Cluster(name="c", preset="ddp2", micro_batch=4, retries=5, grace="90s")
    config = cluster_campaign(CONFIG, cluster).config
    assert config.preset == str(REPOSITORY / "configs" / "accelerate" / "ddp2.yaml")
    assert (config.micro_batch, config.retries, config.grace_seconds) == (4, 5, 90.0)
    preset = str(tmp_path / "mine.yaml")
    config = cluster_campaign(replace(CONFIG, preset=preset, micro_batch=1), cluster).config
    assert (config.preset, config.micro_batch) == (preset, 1)
    assert cluster_campaign(CONFIG, Cluster()).config.preset is None


def test_campaigns_in_different_folders_have_different_job_names() -> None:
    changes: list[dict[str, Any]] = [{}, {"work": "elsewhere"}, {"results": "elsewhere"}, {"scale": "micro"}]
    assert len({cluster_campaign(replace(CONFIG, **change), Cluster()).runs_name for change in changes}) == 4


@pytest.mark.parametrize(
    ("mount", "shared"),
    [
        ("server:/x {} nfs4 rw,vers=4.2,local_lock=none 0 0", True),
        ("server:/x {} nfs4 rw,nolock 0 0", True),  # version 4 does not read it
        ("server:/x {} nfs rw,vers=3,local_lock=all 0 0", False),
        ("server:/x {} nfs rw,vers=3,nolock 0 0", False),
        ("mds:/x {} lustre rw,flock 0 0", True),
        ("mds:/x {} lustre rw,localflock 0 0", False),
        ("//host/x {} cifs rw,vers=3.0 0 0", True),
        ("//host/x {} cifs rw,vers=3.0,nobrl 0 0", False),
        ("me@host:/x {} fuse.sshfs rw,user_id=0 0 0", False),
        ("s3fs {} fuse.s3fs rw 0 0", False),
        ("share {} 9p rw,trans=virtio 0 0", False),
        ("share {} virtiofs rw 0 0", False),
        ("beegfs {} beegfs rw 0 0", True),
    ],
)
def test_locks_that_hold_on_one_machine_only_are_refused(tmp_path: Path, mount: str, shared: bool) -> None:
    text = f"/dev/a / ext4 rw 0 0\n{mount.format(tmp_path)}\n"
    if shared:
        check_locks(tmp_path / "work", text)
    else:
        with pytest.raises(ValueError, match="locks hold on one machine only"):
            check_locks(tmp_path / "work", text)


@pytest.mark.parametrize("name", ["my disk", "tab\there", "back\\slash"])
def test_a_mount_with_blanks_in_its_path_is_recognized(tmp_path: Path, name: str) -> None:
    """The kernel writes blanks, tabs and backslashes as octal numbers (proc(5), fstab(5))."""
    place = str(tmp_path / name).translate({ord(letter): f"\\{ord(letter):03o}" for letter in " \t\n\\"})
    text = f"/dev/a / ext4 rw 0 0\nserver:/x {place} nfs rw,nolock 0 0\n"
    with pytest.raises(ValueError, match="with nolock: locks hold on one machine only"):
        check_locks(tmp_path / name / "work", text)
    check_locks(tmp_path / "other", text)


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    check_locks(tmp_path / "work")
    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(ValueError, match=r"without locks \(No locks available\), so a job could run twice"):
        check_locks(tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


def test_each_node_reads_its_own_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank must be expanded on each node, not where srun is called; a fake srun runs the command on two nodes."""
    preset = tmp_path / "p.yaml"
    preset.write_text("num_processes: 4\n")
    fake = tmp_path / "srun"
    fake.write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nfor i in 0 1; do SLURM_NODEID=$i "$@"; done\n')
    fake.chmod(0o755)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    command = launch_command(replace(CONFIG, preset=str(preset), nodes=2))
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
        (1, True, ["0,1,2,3"]),  # a preset of several processes sees all
        (2, True, ["0,2", "1,3"]),
        (1, False, ["0"]),
    ],
)
def test_workers_share_the_gpus(jobs: int, launches: bool, shares: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    devices = [_gpus(number, jobs, launches=launches)["CUDA_VISIBLE_DEVICES"] for number in range(jobs)]
    assert devices == shares


@pytest.fixture
def run_command(campaign: Campaign, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `epochal run epoching` with options, where no Slurm is installed; returns exit code, output and errors."""
    monkeypatch.setenv("PATH", "/nowhere")

    def run(*options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(
            sys, "argv", ["epochal", "run", "epoching", *campaign.options, "--tracker", "none", *options]
        )
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), *capsys.readouterr()

    return run


def test_a_dry_run_prints_and_changes_nothing(campaign: Campaign, run_command: Any) -> None:
    before = sorted(campaign.folder.rglob("*"))
    code, out, err = run_command("--cluster", "local-test", "--dry-run")
    assert code == 0, err
    assert out.count("#!/bin/bash") == 2 and "# 2 jobs, 2 to a task: w16-" in out
    assert sorted(campaign.folder.rglob("*")) == before


def test_batch_files_and_a_stop_need_no_text(campaign: Campaign, run_command: Any) -> None:
    config = campaign.folder / "far.toml"
    config.write_text(DATA.replace('files = ["{corpus}"]\nseparator = "--"', 'package = "none_such"\nfile = "a.jsonl"'))
    campaign.rewrite(campaign.scale.data, str(config))
    before = sorted(campaign.folder.rglob("*"))
    code, out, err = run_command("--cluster", "local-test", "--dry-run")
    assert (code, out.count("#!/bin/bash")) == (0, 2), err
    code, _, err = run_command("--cluster", "local-test", "--stop")
    assert code == 2 and "squeue is not installed" in err, err
    assert sorted(campaign.folder.rglob("*")) == before
    code, _, err = run_command("--cluster", "local-test")
    assert code == 2 and "none_such" in err, err


def test_without_slurm_nothing_is_written(campaign: Campaign, run_command: Any) -> None:
    code, _, err = run_command("--cluster", "local-test")
    assert code == 2 and "squeue is not installed" in err, err
    assert not list(campaign.folder.rglob("campaign-*.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dry-run"], "need --cluster"),
        (["--cluster", "exmaple"], "did you mean 'example'"),
        (["--cluster", "example"], "which 16 processes (2 nodes of 8) cannot share"),
        (["--cluster", "example", "--dry-run"], "which 16 processes (2 nodes of 8) cannot share"),
        (["--cluster", "example", "--stop"], "squeue is not installed"),
        (["--cluster", "local-test", "--jobs", "2"], "set pack, parallel and time_limit"),
    ],
)
def test_wrong_use_is_one_sentence_and_exit_code_2(run_command: Any, options: list[str], message: str) -> None:
    code, out, err = run_command(*options)
    assert (code, out) == (2, "") and message in err
    assert err.startswith("epochal: ") and err.count("\n") == 1
