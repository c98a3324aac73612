"""Claims, environments, leftovers and ends: nothing runs twice, and nothing is left behind or lost without a sentence."""

import errno
import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from campaigns import Campaign

from epochal import cli
from epochal.campaign import executor, worker
from epochal.campaign.cluster import check_locks
from epochal.campaign.environment import clean_environment
from epochal.campaign.integrity import check_inputs_unchanged
from epochal.campaign.plan import campaign_jobs
from epochal.campaign.sweep import sweep
from epochal.config import replaced
from epochal.distributed import launcher
from epochal.distributed.heartbeat import Heartbeat
from epochal.meaning import take_folder
from epochal.records import Record, Workspace, load_records, write_record
from epochal.run import Ensemble, Run, fingerprint


def one_run(campaign: Campaign) -> Run:
    job = campaign_jobs(["epoching"], campaign.records, campaign.scale)[0]
    assert isinstance(job, Run)
    return job


def record_of(job: Run) -> Record:
    return Record(job, fingerprint(job), "done", {"loss": 1.0, "parameters": 1})


# --- two campaigns on one folder ----------------------------------------------------------------------------------------


def test_two_scales_of_one_name_on_one_work_folder_never_mix_their_weights(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second sets the first one's weights aside; the first notices and makes its own again."""
    members = [replace(one_run(campaign), name=f"m{seed}", epochs=1, init_seed=seed) for seed in range(2)]
    ensemble = Ensemble(name="both", runs=("m0", "m1"), average="logits")
    first, notes = campaign.worker_config("ensembling"), list[str]()
    other = replace(first, results=str(campaign.folder / "other"))

    def losses(config: worker.WorkerConfig, **changes: Any) -> dict[str, float]:
        jobs = [*(replace(run, **changes) for run in members), ensemble]
        monkeypatch.setattr(worker, "campaign_jobs", lambda *_: jobs)
        assert (
            worker.work(config, lambda event: notes.extend([event["message"]] if event["event"] == "note" else [])) == 0
        )
        return {record.job.name: record.loss for record in load_records(config.workspace)}

    before = losses(first)
    theirs = losses(other, warmup=0.5)
    assert len(notes) == 2 and all("warmup 0.05 instead of 0.5" in note for note in notes)
    assert theirs["both"] != before["both"]
    (campaign.workspace.records / "both.json").unlink()
    assert losses(replace(first, session="second")) == before, "made from the other campaign's weights"


def test_weights_of_another_campaign_are_no_output_and_an_empty_folder_is_none(campaign: Campaign) -> None:
    job, workspace = one_run(campaign), campaign.workspace
    write_record(workspace, record_of(job))
    model = workspace.folder(job.name) / "model"
    model.mkdir(parents=True)
    take_folder(job, workspace, campaign.records)
    model.mkdir(parents=True)
    assert not campaign.records.has_output(job), "an empty model folder"
    (model / "model.safetensors").touch()
    assert campaign.records.has_output(job)
    take_folder(replace(job, warmup=0.3), workspace, campaign.records)
    model.mkdir()
    (model / "model.safetensors").touch()
    assert not campaign.records.has_output(job), "weights of a job of the same name and another meaning"


def test_an_input_replaced_while_a_job_reads_it_leaves_no_record(campaign: Campaign) -> None:
    job, workspace = one_run(campaign), campaign.workspace
    write_record(workspace, record_of(job))
    take_folder(job, workspace, campaign.records)
    before, reader = campaign.records, replace(job, name="reader", init_from=job.name)
    check_inputs_unchanged(reader, before)
    take_folder(replace(job, warmup=0.3), workspace, campaign.records)
    with pytest.raises(ValueError, match=f"{job.name!r} was replaced while 'reader' read it"):
        check_inputs_unchanged(reader, before)


def test_a_start_says_what_differs_from_the_last_one_on_its_folder(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = campaign.worker_config("epoching")
    assert executor.notes_on_the_start(config) == [] == executor.notes_on_the_start(config)
    campaign.rewrite("batch_size = 4", "batch_size = 8")
    (note,) = executor.notes_on_the_start(config)
    assert "batch_size 4 -> 8" in note
    rung = campaign.scale.ladder[-1]
    campaign.rewrite(f'model = "{rung.model}"\nlr = {rung.lr:g}', f'model = "{rung.model}"\nlr = 0.03')
    (note,) = executor.notes_on_the_start(config)
    last = len(campaign.scale.ladder) - 1
    assert f"(ladder.{last}.lr {rung.lr:g} -> 0.03)" in note
    monkeypatch.setattr(executor, "code_hash", lambda: "other")
    notes = executor.notes_on_the_start(replace(config, results=str(campaign.folder / "elsewhere")))
    assert len(notes) == 2 and "elsewhere" in notes[0] and "another version of epochal" in notes[1]


def test_a_scale_edited_while_its_campaign_runs_is_noticed(campaign: Campaign) -> None:
    notes: list[str] = []

    def edit(event: dict[str, Any]) -> None:
        if event["event"] == "done":
            campaign.rewrite("warmup = 0.05", "warmup = 0.3")
        if event["event"] == "note":
            notes.append(event["message"])

    job = one_run(campaign)
    assert worker.work(campaign.worker_config("epoching", only=(job.name,)), edit) == 0
    assert notes == [
        f"scale {campaign.scale_path} was edited while its campaign runs (warmup 0.05 -> 0.3); this start does not use it, the "
        "next one will."
    ]


# --- environments -------------------------------------------------------------------------------------------------------

SHELL = {
    "WORLD_SIZE": "4",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "OMPI_COMM_WORLD_SIZE": "2",
    "PMI_SIZE": "2",
    "MV2_COMM_WORLD_SIZE": "2",
    "ACCELERATE_MIXED_PRECISION": "fp16",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "FSDP_VERSION": "1",
    "PET_NNODES": "2",
}


def test_no_variable_of_a_launcher_reaches_a_worker(campaign: Campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def popen(command: list[str], env: dict[str, str], **_: Any) -> Any:
        seen.update(env)
        raise InterruptedError

    for name, value in {**SHELL, "SLURM_JOB_ID": "7", "ACCELERATE_LOG_LEVEL": "INFO"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(executor.subprocess, "Popen", popen)
    with pytest.raises(InterruptedError):
        executor.run_campaign(campaign.worker_config("epoching"), jobs=1, progress=lambda *_: None)
    assert not set(SHELL) & set(seen)
    assert seen["SLURM_JOB_ID"] == "7" and seen["ACCELERATE_LOG_LEVEL"] == "INFO", "srun needs its variables"
    (log,) = (campaign.workspace.work / "tiny-scale" / "logs").iterdir()
    assert log.name.endswith("-first-worker-0.log") and log.name[:8].isdigit(), "a log for each start"


@pytest.mark.parametrize("elastic", [False, True])
def test_the_command_line_ignores_a_launcher_that_does_not_run_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elastic: bool
) -> None:
    environment = {**SHELL, **({"TORCHELASTIC_RUN_ID": "none"} if elastic else {})}
    monkeypatch.setattr(cli.os, "environ", environment)
    cli._drop_launcher_variables()
    assert ("WORLD_SIZE" in environment) is elastic
    assert ("WORLD_SIZE in the environment are ignored" in capsys.readouterr().err) is not elastic


@pytest.mark.parametrize("name", ["signal", "select", "numpy"])
def test_a_module_of_the_working_folder_does_not_replace_a_package(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    code = f"import runpy, {name}; runpy.run_module('epochal.stopping')"
    command = [sys.executable, "-c", code]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode, (
        "the test tests nothing"
    )
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment(environment), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- claims -------------------------------------------------------------------------------------------------------------


def test_ranks_keep_a_job_claimed_when_worker_and_launcher_are_gone(campaign: Campaign) -> None:
    job, workspace = one_run(campaign), campaign.workspace
    rank = functools.partial(worker.claim_of_rank, workspace, job.name)
    with rank(), rank(), worker.claim(workspace, job) as claimed:
        assert not claimed, "a second start would train next to the ranks of the first"
    with worker.claim(workspace, job) as claimed:
        assert claimed


def test_train_takes_a_claim(campaign: Campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    job, config = one_run(campaign), campaign.worker_config("epoching")
    with worker.claim(campaign.workspace, job):
        refused = pytest.raises(ValueError, match=f"{job.name!r} is being trained by another process; wait for it")
        with refused, cli._claimed(job, config, launched=False):
            pass
        monkeypatch.setenv("RANK", "1")  # under a launcher rank 0 holds the claim
        with cli._claimed(job, config, launched=False):
            pass
    monkeypatch.delenv("RANK")
    with cli._claimed(job, config, launched=False), worker.claim(campaign.workspace, job) as claimed:
        assert not claimed


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_named_with_the_way_out(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(file: Any, kind: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(
        ValueError, match=r"has no file locks \(.*choose a --work on a local disk, or mount it with locks"
    ):
        worker.work(campaign.worker_config("epoching"), lambda event: None)


@pytest.mark.parametrize(
    ("mount", "refused"),
    [
        ("host:/x {} nfs4 rw 0 0", False),
        ("host:/x {} nfs rw,nolock 0 0", True),
        ("//host/x {} cifs rw,nobrl 0 0", True),
        ("//host/x {} cifs rw 0 0", False),
        ("me@host:/x {} fuse.sshfs rw 0 0", True),
        ("s3fs {} fuse.s3fs rw 0 0", True),
        ("share {} 9p rw,trans=virtio 0 0", True),
    ],
)
def test_mounts_without_shared_locks_are_refused_with_blanks_in_their_path(
    tmp_path: Path, mount: str, refused: bool
) -> None:
    folder = tmp_path / "shared disk" / "work"
    mounts = "disk / ext4 rw 0 0\n" + mount.format(str(folder.parent).replace(" ", "\\040"))
    if refused:
        with pytest.raises(ValueError, match="locks hold on one machine only"):
            check_locks(folder, mounts)
    else:
        check_locks(folder, mounts)


def test_the_launcher_stops_its_ranks_when_its_worker_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    parents = iter([7, 7, 1])

    def kill(*arguments: int) -> None:
        sent.append(arguments)  # type: ignore[arg-type]
        if len(sent) == 3:
            raise InterruptedError  # the launcher has ended

    monkeypatch.setattr(launcher, "WATCH_SECONDS", 0.0)
    monkeypatch.setattr(launcher.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(launcher.os, "kill", kill)
    with pytest.raises(InterruptedError):
        launcher._watch_parent(7)
    assert sent == [(os.getpid(), signal.SIGTERM)] * 3, "a rank that starts after the first request must stop too"


def test_a_process_whose_parent_ended_before_it_looked_has_its_id() -> None:
    assert launcher.parent_of({launcher.PARENT_VARIABLE: "7"}) == 7
    assert launcher.parent_of({}) == os.getppid()


def test_a_launcher_without_ranks_ends_when_it_is_asked_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(children=lambda recursive: []))
    with pytest.raises(SystemExit, match="75"):
        launcher._forward(signal.SIGTERM, None)


@pytest.mark.parametrize("comes_to_the_end_of_a_step", [True, False])
def test_a_rank_that_was_asked_to_stop_and_waits_for_a_dead_one_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, comes_to_the_end_of_a_step: bool
) -> None:
    """Its launcher may be dead too, and the rendezvous waits for half an hour."""
    ended, now, done = [], [0.0], threading.Event()

    def wait(seconds: float) -> bool:
        now[0] += seconds
        return comes_to_the_end_of_a_step and now[0] > 5

    monkeypatch.setattr(worker, "stop_reason", lambda: "parent process has exited" if now[0] > 3 else None)
    monkeypatch.setattr(worker.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(worker.os, "_exit", lambda code: ended.append((code, now[0] > 3 + 8)))
    monkeypatch.setattr(done, "wait", wait)
    worker._end_when_stuck(tmp_path, 8.0, done)
    assert ended == ([] if comes_to_the_end_of_a_step else [(75, True)])


def test_the_launcher_names_the_rank_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "error.txt"
    path.write_text("Connection reset by peer")
    monkeypatch.setenv(launcher.ERROR_FILE_VARIABLE, str(path))
    failures = {0: SimpleNamespace(exitcode=1), 1: SimpleNamespace(exitcode=-15), 2: SimpleNamespace(exitcode=-9)}
    launcher._name_killed_rank({0: failures[0], 1: failures[1]})
    assert path.read_text() == "Connection reset by peer", "torch itself ends ranks by SIGTERM"
    launcher._name_killed_rank(failures)
    assert path.read_text() == "rank 2 was killed by SIGKILL; the others ended with: Connection reset by peer"


class Shared(dict[str, bytes]):
    """A store of a process group."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def test_a_rank_that_stops_answering_is_named_after_the_time_that_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("epochal.distributed.heartbeat.time.monotonic", lambda: now)
    store = Shared()
    ranks = [Heartbeat(store, rank, 4, 30.0) for rank in range(4)]
    for now in range(0, 100, 5):
        for rank in ranks:
            if rank.rank != 2 or now < 40:
                rank.beat()
        silent = [rank.silent() for rank in ranks]
        assert silent == ([2, 2, None, 2] if now > 35 + 30 else [None] * 4), now
    said: list[str] = []
    monkeypatch.setattr(ranks[0]._stopped, "wait", lambda seconds: False)
    ranks[0].run(said.append)
    assert said == ["rank 2 has not answered for 30 s (stopped, hung, or its machine is gone)"]


# --- ends and leftovers -------------------------------------------------------------------------------------------------


def test_checkpoints_are_deleted_only_when_the_record_is_written(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, workspace = one_run(campaign), campaign.workspace
    checkpoint = workspace.folder(job.name) / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(worker, "write_record", full)
        worker.finish(record_of(job), workspace, campaign.records)
    assert checkpoint.is_dir(), "a full results folder costs the whole run"
    worker.finish(record_of(job), workspace, campaign.records)
    assert not checkpoint.parent.exists()


def test_what_killed_processes_left_is_deleted_at_the_next_start(campaign: Campaign) -> None:
    job, workspace = one_run(campaign), campaign.workspace
    other = replace(job, name="other")
    kept = [
        workspace.folder("other") / ".attempt.json.node-7-ab.tmp",  # another process holds the claim
        workspace.folder("samples") / ".targets.tmp" / "shard-00000.json",  # resumed
        workspace.folder("again") / "checkpoints" / "step-00000004" / "state.json",  # no model: made again
        workspace.folder("unfinished") / "failure.json",
    ]
    write_record(workspace, record_of(job))
    write_record(workspace, replace(record_of(job), job=replace(job, name="again")))
    left = [
        workspace.folder(job.name) / ".attempt.json.node-7-ab.tmp",
        workspace.folder(job.name) / ".model.tmp" / "model.safetensors",
        workspace.folder(job.name) / ".hidden-x1" / "0.head",
        workspace.folder(job.name) / "checkpoints" / ".step-00000008.tmp" / "model.safetensors",
        workspace.folder(job.name) / "checkpoints" / "step-00000004" / "state.json",  # killed after its record
        workspace.records / f".{job.name}.json.node-7-ab.tmp",
        workspace.folder(job.name) / "attempt.json",  # of a worker that was killed when a rank had written the record
        workspace.folder(job.name) / "failure.json",  # and of a launcher
        workspace.folder(job.name) / "stop",
        workspace.work / workspace.scale / ".last_start.json.node-7-ab.tmp",
    ]
    model = workspace.folder(job.name) / "model" / "model.safetensors"
    for path in (*kept, *left, model):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with worker.claim(workspace, other):
        sweep(workspace)
    assert [path for path in left if path.exists()] == []
    assert [path for path in (*kept, model) if not path.exists()] == []
    assert load_records(workspace).problems == ()


def test_temporary_files_of_one_process_id_do_not_collide(tmp_path: Path) -> None:
    """Containers that share a folder may have equal names and process ids."""
    with replaced(tmp_path / "a") as one, replaced(tmp_path / "a") as two:
        assert one != two
        one.write_text("1")
        two.write_text("2")
    assert (tmp_path / "a").read_text() in ("1", "2") and [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(("missing", "code"), [(0, 0), (3, 1)])
def test_a_killed_worker_is_named_and_the_exit_code_says_whether_all_is_done(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch, missing: int, code: int
) -> None:
    class Worker:
        reader = SimpleNamespace(join=lambda seconds: None)

        def __init__(self, returncode: int) -> None:
            self.returncode = returncode

        def poll(self) -> int:
            return self.returncode

    def start(config: Any, number: int, *_: Any) -> Worker:
        return Worker(-9 if number == 1 else 0)

    monkeypatch.setattr(executor, "_start", start)
    monkeypatch.setattr(executor, "_missing", lambda config: missing)
    said: list[str] = []

    def progress(status: Any, event: dict[str, Any] | None) -> None:
        said.extend([event["message"]] if event else [])

    assert executor.run_campaign(campaign.worker_config("epoching"), jobs=2, progress=progress) == code
    assert said == [
        "worker 1 ended with SIGKILL; " + ("3 jobs are missing: run again." if missing else "the others did its work.")
    ]


def test_a_record_deleted_while_others_are_read_is_left_out(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, workspace = one_run(campaign), campaign.workspace
    path, glob = write_record(workspace, record_of(job)), Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [*glob(self, pattern), path.with_name("gone.json")])
    records = load_records(workspace)
    assert [record.job.name for record in records] == [job.name] and records.problems == ()


@pytest.mark.parametrize("text", ["x\ntouch PWN\n#", "a\rb", "a\x1b[31m", "a\u2028b", "a\x85b"])
def test_a_line_break_in_a_name_or_path_is_refused(text: str) -> None:
    for places in ((text, "r", "w"), ("s", text, "w"), ("s", "r", text)):
        with pytest.raises(ValueError, match="line break or control character; rename it"):
            Workspace(places[0], Path(places[1]), Path(places[2]))


@pytest.mark.parametrize("scale", ["a,b", "a|b", ""])
def test_a_scale_whose_name_slurm_would_split_is_refused(scale: str) -> None:
    with pytest.raises(ValueError, match=r"must have no ',', '\|' or '/'"):
        Workspace(scale)


def test_what_a_worker_writes_about_a_job_is_no_state_of_it(campaign: Campaign) -> None:
    """A first attempt has files in its folder before it has a meaning."""
    job, workspace = one_run(campaign), campaign.workspace
    folder = workspace.folder(job.name)
    folder.mkdir(parents=True)
    for name in ("attempt.json", "failure.json", "run.json", "stop", "error.txt", ".attempt.json.node-7-ab.tmp"):
        (folder / name).touch()
    meaning, message = take_folder(job, workspace, campaign.records)
    assert message is None and meaning["fingerprint"] == fingerprint(job)
    assert json.loads((folder / "meaning.json").read_text()) == meaning and not (folder / "aside").exists()
