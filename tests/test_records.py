"""Records: the only state of a campaign. Round trip, malformed files, mismatches, and what is left to do."""

import json
import math
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from epochal.campaign.plan import partition_jobs, ready_jobs
from epochal.records import Record, Records, Workspace, input_fingerprints, load_record, load_records, write_record
from epochal.run import AdamW, Ensemble, Job, Run, Samples, SequenceDistillation, fingerprint

WEIGHTS = Path("model/model.safetensors")


def run_named(name: str, **changes: object) -> Run:
    values = {"name": name, "model": "w16", "data": "kjv", "unique_tokens": 256, "epochs": 1, "batch_size": 4}
    return Run(**{**values, "sequence_length": 32, "optimizer": AdamW(lr=0.01), **changes})  # type: ignore[arg-type]


A, B = run_named("a"), run_named("b", init_seed=1)
E = Ensemble(name="e", runs=("a", "b"), average="logits")
S = Samples(name="s", source="e", tokens=64, max_length=32)
STUDENT = run_named("student", distill=SequenceDistillation(samples="s", fraction=0.5))
CHAIN: list[Job] = [STUDENT, S, E, A, B]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace("x", tmp_path / "results", tmp_path / "work")


def record_of(job: Job, **changes: object) -> Record:
    results: dict[str, object] = {"loss": 1.5, "parameters": 3}
    if isinstance(job, Ensemble):
        results |= {"curve": {"1": [1.6, 1.7], "2": [1.5]}, "members": 2}
    if isinstance(job, Samples):
        results = {"tokens": 64}
    return replace(Record(job, fingerprint(job), "done", results), **changes)  # type: ignore[arg-type]


def finish(workspace: Workspace, *jobs: Job) -> None:
    """Leave the record and the output of each job, as a worker does."""
    for job in jobs:
        write_record(workspace, record_of(job))
        output = workspace.output(job)
        if output is not None:
            (output / "x" if isinstance(job, Run) else output).parent.mkdir(parents=True)
            (output / "model.safetensors" if isinstance(job, Run) else output).touch()
            made_from = {"fingerprint": fingerprint(job), "inputs": {}}
            (workspace.folder(job.name) / "meaning.json").write_text(json.dumps(made_from))


def names(jobs: object) -> list[str]:
    return [job.name for job in jobs]  # type: ignore[attr-defined]


# --- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", CHAIN, ids=names(CHAIN))
def test_round_trip(workspace: Workspace, job: Job) -> None:
    record = record_of(job, inputs={"z": "0123"}, provenance={"host": "h", "hours": 0.1})
    path = write_record(workspace, record)
    assert path == workspace.records / f"{job.name}.json"
    found = load_records(workspace)
    assert found.problems == ()
    assert list(found) == [record]
    assert found.get(job) == record
    assert [item.name for item in workspace.records.iterdir()] == [path.name]


def test_a_diverged_run_has_an_infinite_loss(workspace: Workspace) -> None:
    write_record(workspace, record_of(A, status="diverged", results={"loss": None}))
    record = load_records(workspace).get(A)
    assert record is not None
    assert record.loss == math.inf


def test_a_record_is_never_written_with_nan(workspace: Workspace) -> None:
    with pytest.raises(ValueError, match="loss must be a number from 0 to 1e\\+09, got nan"):
        write_record(workspace, record_of(A, results={"loss": math.nan, "parameters": 3}))
    with pytest.raises(ValueError, match="JSON"):
        write_record(workspace, record_of(A, provenance={"note": math.inf}))
    assert not list(workspace.records.glob("*"))


def test_readers_see_the_old_record_until_the_new_one_is_whole(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_record(workspace, record_of(A))
    seen: list[Records] = []
    monkeypatch.setattr("os.fsync", lambda _: seen.append(load_records(workspace)))
    write_record(workspace, record_of(A, results={"loss": 2.5, "parameters": 3}))
    assert [(found.problems, [record.loss for record in found]) for found in seen] == [((), [1.5])]
    assert [record.loss for record in load_records(workspace)] == [2.5]


def test_a_replaced_record_is_read_again_whatever_the_clock_says(workspace: Workspace) -> None:
    """Of the same length and with the same time of change, as after a clock that was set back."""
    path = write_record(workspace, record_of(A))
    assert [record.loss for record in load_records(workspace)] == [1.5]
    before = path.stat()
    assert write_record(workspace, record_of(A, results={"loss": 2.5, "parameters": 3})) == path
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert [record.loss for record in load_records(workspace)] == [2.5]


def test_no_folder_is_no_record(workspace: Workspace) -> None:
    assert len(load_records(workspace)) == 0


def unsealed(path: Path) -> dict[str, Any]:
    """Read a record's table without its checksum, as records were before they had one."""
    table: dict[str, Any] = json.loads(path.read_text())
    del table["checksum"]
    return table


def change(table: dict[str, object], **values: object) -> str:
    return json.dumps({**table, **values})


@pytest.mark.parametrize(
    "damage",
    [
        lambda table: b"",
        lambda table: b"\xff\xfe",
        lambda table: json.dumps(table)[:-5].encode(),
        lambda table: b"[]",
        lambda table: b"3",
        lambda table: change(table, version=99).encode(),
        lambda table: change(table, kind="Walk").encode(),
        lambda table: change(table, kind=[]).encode(),
        lambda table: change(table, status="half").encode(),
        lambda table: change(table, job={}).encode(),
        lambda table: change(table, job=None).encode(),
        lambda table: change(table, job={**table["job"], "spin": 1}).encode(),
        lambda table: change(table, job={**table["job"], "name": "other"}).encode(),
        lambda table: change(table, results=[]).encode(),
        lambda table: change(table, results=None).encode(),
        lambda table: change(table, results={"loss": None}).encode(),
        lambda table: change(table, results={"loss": "low"}).encode(),
        lambda table: change(table, results={"loss": [1.0]}).encode(),
        lambda table: change(table, inputs=["z"]).encode(),
        lambda table: change(table, provenance=0).encode(),
        lambda table: change(table, results={"loss": True}).encode(),
        lambda table: change(table, results={"loss": 1.0, "test_loss": math.nan}).encode(),
        lambda table: change(table, results={"loss": 1.0, "parameters": "many"}).encode(),
        lambda table: change(table, fingerprint=None).encode(),
        lambda table: change(table, fingerprint={"a": 1}).encode(),
        lambda table: change(table, version=[1]).encode(),
        lambda table: change(table, status={}).encode(),
        lambda table: change(table, job=[["name", "a"]]).encode(),
        lambda table: change(table, inputs={"b": 3}).encode(),
        lambda table: change(table, results={"loss": -5, "parameters": 3}).encode(),
        lambda table: change(table, results={"loss": 1e300, "parameters": 3}).encode(),
        lambda table: change(table, results={"loss": 10**400, "parameters": 3}).encode(),
        lambda table: change(table, results={"loss": 1.5, "parameters": -3}).encode(),
        lambda table: change(table, results={"loss": 1.5}).encode(),
        lambda table: change(table, results={**table["results"], "curve": ["1", "2"]}).encode(),
        lambda table: change(table, results={**table["results"], "curve": [[1, 2, 3]]}).encode(),
        lambda table: change(table, results={**table["results"], "curve": {"1": [2.0]}}).encode(),
        lambda table: change(table, results={**table["results"], "spectral_norms": {"a": "large"}}).encode(),
        lambda table: change(table, status="diverged", results={"loss": "inf"}).encode(),
        lambda table: change(table, status="diverged").encode(),
        lambda table: change(table, provenance={"optimizer_share": "half"}).encode(),
        lambda table: change(table, provenance={"like": {"name": 3, "changes": ""}}).encode(),
        lambda table: change(table, provenance={"like": {"name": "b"}}).encode(),
        lambda table: (json.dumps(table)[:-1] + ', "deep": ' + "[" * 100_000 + "]" * 100_000 + "}").encode(),
        lambda table: (json.dumps(table)[:-1] + ', "long": ' + "9" * 5000 + "}").encode(),
        lambda table: json.dumps({k: v for k, v in table.items() if k != "fingerprint"}).encode(),
    ],
)
def test_a_malformed_record_is_named_and_left_out(workspace: Workspace, damage: object) -> None:
    write_record(workspace, record_of(B))
    path = write_record(workspace, record_of(A))
    path.write_bytes(damage(unsealed(path)))  # type: ignore[operator]
    found = load_records(workspace)
    assert names(record.job for record in found) == ["b"]
    assert len(found.problems) == 1
    assert found.problems[0].startswith("a.json: ")


def test_each_malformed_record_is_named_with_its_reason(workspace: Workspace) -> None:
    table, whole = unsealed(write_record(workspace, record_of(A))), unsealed(write_record(workspace, record_of(E)))
    curve = {**whole, "results": {**whole["results"], "curve": {"1": 3}}}
    job = {**whole["job"], "name": "asked", "tasks": ["cloze"]}
    asked = {**whole, "job": job, "results": {**whole["results"], "tasks": {"cloze": {"right": "012"}}}}
    listed = {**asked, "job": {**job, "name": "listed"}, "results": {**whole["results"], "tasks": [1]}}
    alone = {**whole, "job": {**whole["job"], "name": "alone"}, "results": {**whole["results"], "members": 1}}
    bare = {**whole, "job": {**whole["job"], "name": "bare"}, "results": {"loss": 1.5, "parameters": 3}}
    texts = {
        "alone": json.dumps(alone),
        "bare": json.dumps(bare),
        "listed": json.dumps(listed),
        "asked": json.dumps(asked),
        "copy": json.dumps(table),
        "e": json.dumps(curve),
        "gap": json.dumps({key: value for key, value in table.items() if key not in ("inputs", "results")}),
        "nan": json.dumps({**table, "provenance": {"hours": math.nan}}),
        "old": json.dumps({**table, "version": 0}),
        "words": json.dumps({**table, "job": {**table["job"], "epochs": "many"}}),
    }
    for name, text in texts.items():
        (workspace.records / f"{name}.json").write_text(text)
    found = load_records(workspace)
    assert [record.job for record in found] == [A]
    assert found.problems == (
        "alone.json: must have the results of 2 members, with their loss in the curve",
        "asked.json: has no answers, a 1 or a 0 each, to the task 'cloze'",
        "bare.json: misses curve",
        "copy.json: names the job 'a', whose record is a.json",
        "e.json: each of curve must be a list, got 3.",
        "gap.json: misses results and inputs",
        "listed.json: has no answers, a 1 or a 0 each, to the task 'cloze'",
        "nan.json: must hold finite numbers, got NaN",
        "old.json: has version 0, not 1",
        "words.json: job: epochs must be of type int, got 'many'.",
    )


def test_what_stands_in_place_of_a_record_is_named_and_the_others_load(workspace: Workspace) -> None:
    path = write_record(workspace, record_of(A))
    path.with_name("folder.json").mkdir()
    path.with_name("nowhere.json").symlink_to("gone")
    path.with_name("round.json").symlink_to("round.json")
    path.with_name("linked.json").symlink_to(write_record(workspace, record_of(B)).rename(path.with_name("b.txt")))
    found = load_records(workspace)
    assert names(record.job for record in found) == ["a"]
    assert [problem.split(":")[0] for problem in found.problems] == [
        "folder.json",
        "linked.json",
        "nowhere.json",
        "round.json",
    ]
    assert load_record(workspace, "folder") is None and load_record(workspace, "round") is None


def test_a_record_that_vanishes_while_others_load_is_no_problem(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for job in (A, B):
        write_record(workspace, record_of(job))
    listed = sorted(workspace.records.glob("*.json"))
    (workspace.records / "a.json").unlink()
    monkeypatch.setattr(Path, "glob", lambda *_: iter(listed))
    found = load_records(workspace)
    assert names(record.job for record in found) == ["b"] and found.problems == ()


@pytest.mark.parametrize(
    ("old", "new"), [('"loss": 1.5', '"loss": 1.6'), ('"epochs": 1', '"epochs": 2'), ('"lr": 0.01', '"lr": 0.02')]
)
def test_a_flipped_digit_is_found_by_the_checksum(workspace: Workspace, old: str, new: str) -> None:
    path = write_record(workspace, record_of(A))
    text = path.read_text()
    assert old in text
    path.write_bytes(text.replace("\n", "\r\n").encode())  # as a checkout on Windows writes it
    assert load_records(workspace).problems == ()
    path.write_text(text.replace(old, new))
    assert load_records(workspace).problems == (
        "a.json: was changed after it was written, so its checksum differs; delete it to make it again",
    )


def test_what_may_be_below_zero_or_above_one_is_no_problem(workspace: Workspace) -> None:
    """A t interval from two subsets is wide, and estimates and rounded shares leave their ideal range."""
    whole = record_of(E)
    write_record(workspace, replace(whole, results={**whole.results, "interval": {"1": [-2.77, 5.9]}}))
    run = record_of(A, provenance={"optimizer_share": 1.0000001})
    write_record(workspace, replace(run, results={**run.results, "train_loss": -0.02}))
    samples = record_of(S, results={"tokens": 64, "kept_mass": 1.0000001})
    write_record(workspace, samples)
    assert load_records(workspace).problems == ()


def test_runs_that_differ_in_their_seeds_are_grouped(workspace: Workspace) -> None:
    losses = {"s0": (0, 1, 1.0), "s1": (1, 1, 1.2), "s2": (2, 2, math.inf), "other": (1, 2, 7.0)}
    jobs = {
        name: run_named(name, init_seed=seed, order_seed=seed, epochs=2 if name == "other" else 1)
        for name, (seed, _, _) in losses.items()
    }
    records = Records(workspace, [record_of(job, results={"loss": losses[name][2]}) for name, job in jobs.items()])
    assert [names(record.job for record in setting) for setting in records.settings] == [["s0", "s1", "s2"], ["other"]]


# --- meaning ------------------------------------------------------------------------------------------------------------


def test_a_mismatch_names_the_fields_and_the_way_out(workspace: Workspace) -> None:
    path = write_record(workspace, record_of(A))
    other = replace(A, epochs=2, optimizer=AdamW(lr=0.02))
    with pytest.raises(ValueError) as caught:
        load_records(workspace).get(other)
    message = str(caught.value)
    assert "'a'" in message
    assert "epochs and optimizer" in message
    assert "delete" in message
    assert str(path) in message
    assert "\n" not in message
    with pytest.raises(ValueError, match="epochs"):
        partition_jobs([other], load_records(workspace))


def test_a_record_that_fitted_once_is_not_taken_for_another_job(workspace: Workspace) -> None:
    records = Records(workspace, [record_of(A)])
    assert records.get(A) is not None
    with pytest.raises(ValueError, match="epochs"):
        records.get(replace(A, epochs=2))
    assert records.get(replace(A)) is not None


def test_a_mismatch_without_differing_fields_blames_the_files(workspace: Workspace) -> None:
    write_record(workspace, record_of(A, fingerprint="0" * 16))
    with pytest.raises(ValueError, match="a model or data file"):
        load_records(workspace).get(A)


def test_a_record_made_from_another_input_is_refused(workspace: Workspace) -> None:
    finish(workspace, A)
    write_record(workspace, record_of(E, inputs={"a": "another", "b": fingerprint(B)}))
    with pytest.raises(ValueError, match=r"record 'e' was made from another 'a'"):
        load_records(workspace).get(E)


# --- what is left to do -------------------------------------------------------------------------------------------------


def test_the_chain_becomes_ready_step_by_step(workspace: Workspace) -> None:
    for ready in (["a", "b"], ["e"], ["s"], ["student"], []):
        records = load_records(workspace)
        state = partition_jobs(CHAIN, records)
        assert sorted(names(state.ready)) == ready
        assert names(ready_jobs(CHAIN, records)) == names(state.ready)
        assert {*names(state.done), *names(state.ready), *state.waiting} == set(names(CHAIN))
        finish(workspace, *state.ready)
    assert sorted(names(state.done)) == sorted(names(CHAIN))


def test_waiting_jobs_name_what_they_lack(workspace: Workspace) -> None:
    finish(workspace, A)
    waiting = partition_jobs(CHAIN, load_records(workspace)).waiting
    assert waiting["e"] == ("b",)
    assert set(waiting["s"]) == {"e", "b"}
    assert waiting["student"] == ("s",)


def test_finished_work_needs_no_weights(workspace: Workspace) -> None:
    """A clean clone holds committed records and no weights."""
    for job in CHAIN:
        write_record(workspace, record_of(job))
    assert ready_jobs(CHAIN, load_records(workspace)) == []


def test_missing_weights_are_made_again_only_for_unfinished_readers(workspace: Workspace) -> None:
    for job in (A, B, E):
        write_record(workspace, record_of(job))
    state = partition_jobs(CHAIN, load_records(workspace))
    assert sorted(names(state.ready)) == ["a", "b"]
    assert set(state.waiting) == {"s", "student"}
    assert names(state.done) == ["e"]

    finish(workspace, A, B)
    assert names(ready_jobs(CHAIN, load_records(workspace))) == ["s"]


def test_lost_weights_are_made_again_from_the_first_of_a_line_of_runs(workspace: Workspace) -> None:
    """Each starts from the one before; what the last needs is nowhere on this disk."""
    line = [A, *(run_named(name, init_from=before) for before, name in pairwise("acde"))]
    for job in line[:-1]:
        write_record(workspace, record_of(job))
    state = partition_jobs(line, load_records(workspace))
    assert names(state.ready) == ["a"] and state.waiting == {"c": ("a",), "d": ("c",), "e": ("d",)}


def test_marks_are_those_of_all_that_is_read_and_a_diverged_run_leaves_nothing_to_read(workspace: Workspace) -> None:
    marks = {job.name: fingerprint(job) for job in (A, B, E)}
    finished = Records(workspace, [record_of(job) for job in (A, B, E)])
    assert input_fingerprints(replace(S, draw="average"), finished) == marks
    del marks["e"]  # text of its members one by one does not depend on the ensemble
    assert input_fingerprints(S, finished) == marks
    with pytest.raises(ValueError, match=r"'e' reads 'b', which has no record; run it first"):
        input_fingerprints(S, Records(workspace, [record_of(job) for job in (A, E)]))
    gone = record_of(B, status="diverged", results={"loss": None})
    with pytest.raises(ValueError, match=r"'e' reads 'b', which diverged and left no weights"):
        input_fingerprints(E, Records(workspace, [record_of(A), gone]))


def test_a_lost_file_of_samples_is_drawn_again_for_a_student(workspace: Workspace) -> None:
    finish(workspace, A, B, E)
    write_record(workspace, record_of(S))
    assert names(ready_jobs(CHAIN, load_records(workspace))) == ["s"]


def test_an_input_that_nobody_plans_is_refused(workspace: Workspace) -> None:
    with pytest.raises(ValueError, match=r"'e' reads 'a', which no recipe plans"):
        partition_jobs([E, B], load_records(workspace))


def test_records_by_name(workspace: Workspace) -> None:
    records = Records(workspace, [record_of(A)])
    assert records.named("a") is not None
    assert records.named("z") is None
    assert records.get(B) is None
    assert len(records) == 1


def test_a_job_that_reads_a_diverged_run_waits_and_nothing_runs_again(workspace: Workspace) -> None:
    finish(workspace, B)
    write_record(workspace, record_of(A, status="diverged", results={"loss": None}))
    state = partition_jobs(CHAIN, load_records(workspace))
    assert state.ready == ()
    assert state.waiting["e"] == ("a",)
    assert set(names(state.done)) == {"a", "b"}
