"""Soft targets: an unbiased sample of the teacher, checked files, resume, and the loss."""

import functools
import json
import math
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from epochal.data.soft_targets import Sequence, TargetStore, write_shard
from epochal.data.store import TokenStore
from epochal.evaluation.ensembles import evaluate_ensemble
from epochal.generation import soft_targets as cache
from epochal.generation.soft_targets import compute_targets, varopt
from epochal.models.llama import next_token
from epochal.models.load import load_model
from epochal.records import Record, Workspace, load_records, write_record
from epochal.run import Ensemble, Run, SoftTargetDistillation, Targets
from epochal.stopping import Stopped
from epochal.training.loop import _batches, train
from epochal.training.teacher import CachedTeacher, OnlineTeacher, load_teacher


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, TokenStore, Run]:
    """A workspace with two members of different size, an ensemble for each average, and a Run of a student."""
    space, store, config = tiny.workspace(tmp_path_factory.mktemp("taught"))
    base = tiny.run(config, data_order="sequences", epochs=2)
    for name, model in (("m0", "w16"), ("m1", "w32")):
        record = train(replace(base, name=name, model=model), space)
        assert record is not None
        write_record(space, record)
    for average in ("logits", "probs"):
        ensemble = Ensemble(name=f"e-{average}", runs=("m0", "m1"), average=average, member_weights=(0.75, 0.25))
        write_record(space, evaluate_ensemble(ensemble, space, load_records(space)))
    return space, store, replace(base, name="student")


def a_job(**changes: Any) -> Targets:
    return Targets(**{"name": "t", "source": "e-probs", "unique_tokens": 2048, "sequence_length": 32, **changes})


def computed(space: Workspace, job: Targets) -> Record:
    record = compute_targets(job, space, load_records(space))
    write_record(space, record)
    return record


@functools.cache
def wide_model(space: Workspace, name: str) -> Any:
    return load_model(space, name).double()


def exact_soft_targets(space: Workspace, average: str, rows: torch.Tensor) -> torch.Tensor:
    """The teacher's distribution in float64 from all logits."""
    with torch.no_grad():
        logits = [wide_model(space, name)(input_ids=rows).logits[:, :-1] for name in ("m0", "m1")]
    if average == "logits":
        return torch.softmax(0.75 * logits[0] + 0.25 * logits[1], -1).flatten(0, 1)
    return (0.75 * torch.softmax(logits[0], -1) + 0.25 * torch.softmax(logits[1], -1)).flatten(0, 1)


# --- VarOpt ---------------------------------------------------------------------------------------------------------------


def test_varopt_weights_are_unbiased() -> None:
    p = torch.distributions.Dirichlet(torch.full((40,), 0.3, dtype=torch.float64)).sample()
    draws = 20_000
    ids, weights = varopt(p.expand(draws, -1), 9, torch.Generator().manual_seed(1))
    assert (ids.diff(dim=1) > 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(draws, dtype=torch.float64), rtol=0, atol=1e-9)
    mean = torch.zeros(draws, 40, dtype=torch.float64).scatter(1, ids, weights).mean(0)
    threshold = weights.min()
    error = (p * (threshold - p).clamp(min=0)).sqrt() / draws**0.5
    assert ((mean - p).abs() < 5 * error + 1e-12).all()
    kept = p > threshold
    assert kept.any() and not kept.all()
    torch.testing.assert_close(mean[kept], p[kept])  # kept with certainty and unchanged


@pytest.mark.parametrize("keep", [1, 5, 8])
def test_varopt_of_sharp_and_flat_distributions(keep: int) -> None:
    sharp = torch.tensor([1.0, 1e-12, 1e-20, 1e-30, 1e-30, 1e-30, 1e-30, 1e-30], dtype=torch.float64)
    p = torch.stack([sharp / sharp.sum(), torch.full((8,), 0.125, dtype=torch.float64)])
    ids, weights = varopt(p, keep, torch.Generator().manual_seed(0))
    assert weights.sum(1).tolist() == pytest.approx([1.0, 1.0])
    assert ids[0, 0] == 0 and weights[0, 0] == pytest.approx(1.0)
    if keep == 8:
        torch.testing.assert_close(weights, p)


@pytest.mark.parametrize(("vocabulary", "id_type"), [(300, np.uint16), (100_000, np.uint32)])
def test_targets_survive_writing_and_reading(tmp_path: Path, vocabulary: int, id_type: Any) -> None:
    p = torch.distributions.Dirichlet(torch.full((300,), 0.1, dtype=torch.float64)).sample((7,))
    ids, weights = varopt(p, 50, torch.Generator().manual_seed(0))
    negentropy = float(torch.xlogy(p, p).sum())
    ids = ids + vocabulary - 300
    sequences = [
        Sequence(ids.numpy(), weights.numpy(), negentropy, 0.5),
        Sequence(ids.numpy()[::-1], weights.numpy(), 0, 0),
    ]
    write_shard(tmp_path / "shard-00000.json", iter(sequences), vocabulary)
    (tmp_path / "meta.json").write_text('{"sequences_per_shard": 2}')
    store = TargetStore.open(tmp_path)
    assert store.shards[0]["0.ids"].dtype == id_type
    read_ids, read_weights, missing = store.sequence(0)
    assert np.array_equal(read_ids, ids.numpy()) and np.array_equal(store.sequence(1)[0], ids.numpy()[::-1])
    assert np.allclose(read_weights, weights.numpy(), rtol=2**-10, atol=1e-7)
    w = torch.from_numpy(read_weights).double()
    assert missing == pytest.approx(negentropy - float(torch.xlogy(w, w).sum()), abs=1e-9)


# --- the job and its files ------------------------------------------------------------------------------------------------


def test_record_counts_positions_and_size_is_within_the_estimate(taught: Any) -> None:
    space, store, _ = taught
    job = a_job(name="counted", keep=16)
    record = computed(space, job)
    rows = torch.from_numpy(cache.training_sequences(job, store))
    p = exact_soft_targets(space, "probs", rows)
    top = torch.topk(p, 16).values.sum(1).mean().item()
    assert 0.1 < record.results["kept_mass"] < top
    assert record.results["positions"] == 64 * 31 and record.results["members"] == 2
    assert record.inputs.keys() == {"e-probs", "m0", "m1"}
    folder = space.folder("counted") / "targets"
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert record.results["bytes"] == size <= job.bytes(store.vocab_size)


def test_an_interrupted_job_resumes_with_the_same_targets(taught: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    space, _, _ = taught
    monkeypatch.setattr(cache, "SHARD_POSITIONS", 32 * 20)
    monkeypatch.setattr(cache, "CHUNK_ELEMENTS", 1)  # one sequence a pass
    whole = computed(space, a_job(name="whole"))
    calls = [0]

    def stop() -> None:
        calls[0] += 1
        if calls[0] == 50:
            raise Stopped("by the test")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "check_stop", stop)
        with pytest.raises(Stopped):
            computed(space, a_job(name="cut"))
    assert not (space.folder("cut") / "targets").exists()
    monkeypatch.setattr(cache, "CHUNK_ELEMENTS", 2**24)
    drawn: list[int] = []
    draw = cache._draw
    monkeypatch.setattr(cache, "_draw", lambda *a, first, **k: drawn.append(first) or draw(*a, first=first, **k))
    cut = computed(space, a_job(name="cut"))
    assert drawn == [40, 60]  # the first two shards were not recomputed
    assert cut.results["kept_mass"] == pytest.approx(whole.results["kept_mass"], abs=1e-6)
    stores = [TargetStore.open(space.folder(name) / "targets") for name in ("whole", "cut")]
    for number in (0, 19, 20, 41, 63):
        (ids, weights, _), (other_ids, other_weights, _) = (store.sequence(number) for store in stores)
        assert np.array_equal(ids, other_ids) and np.allclose(weights, other_weights, atol=1e-3)


def test_a_damaged_or_missing_shard_raises_and_is_named(taught: Any) -> None:
    space, _, _ = taught
    computed(space, a_job(name="hurt"))
    shard = space.folder("hurt") / "targets" / "shard-00000.npz"
    good = bytearray(shard.read_bytes())
    good[len(good) // 2] ^= 1
    shard.write_bytes(bytes(good))
    with pytest.raises(ValueError, match=rf"{shard} is damaged; delete"):
        TargetStore.open(shard.parent)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard} is missing"):
        TargetStore.open(shard.parent)
    shutil.rmtree(shard.parent)
    with pytest.raises(ValueError, match="has no finished targets"):
        TargetStore.open(shard.parent)


def test_the_needed_disk_space_is_logged_and_checked(
    taught: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    space, _, _ = taught
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage(2e6, 1.9e6, 1e5))
    with pytest.raises(ValueError, match=r"need up to 0\.5 MB at keep 64, and 0\.1 MB are free.*keep fewer tokens"):
        computed(space, a_job(name="big"))
    assert "big needs up to 0.5 MB of disk, 0.1 MB are free." in caplog.text
    assert load_records(space).named("big") is None


# --- the loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["probs", "logits"])
def test_online_and_cached_losses_match_full_distributions(taught: Any, average: str) -> None:
    """At the default `keep` the cached loss over the text is within 1e-3 of the exact one, the online one within 1e-5."""
    space, store, student = taught
    job = a_job(name=f"t-{average}", source=f"e-{average}")
    computed(space, job)
    records, model = load_records(space), load_model(space, "m0")  # a student far from the teacher
    with torch.no_grad():
        model.lm_head.weight.mul_(0.6)
    online, cached = (
        replace(student, teach=SoftTargetDistillation(source=source, mode=mode, kd_weight=0.4))
        for source, mode in ((f"e-{average}", "online"), (job.name, "cached"))
    )
    losses = {"exact": 0.0, "online": 0.0, "cached": 0.0}
    steps = student.steps_per_epoch
    teachers = {}
    for run in (online, cached):
        batches = _batches(run, store, space)
        teachers[run.teach.mode] = load_teacher(run, batches, store, space, records)
    assert isinstance(teachers["online"], OnlineTeacher) and isinstance(teachers["cached"], CachedTeacher)
    for step in range(steps, 2 * steps):  # the second epoch, in another order than the text
        rows = torch.from_numpy(batches(step))
        for mode, teacher in teachers.items():
            with torch.no_grad():
                hidden, targets = next_token(model, rows)
                loss = teacher.loss(hidden, model.lm_head.weight, targets, rows, range(4 * step, 4 * step + 4), 124.0)
            losses[mode] += float(loss) / steps
        p = exact_soft_targets(space, average, rows)
        logits = (hidden @ model.lm_head.weight.T).detach().double()
        hard = torch.nn.functional.cross_entropy(logits, targets)
        soft = (torch.xlogy(p, p) - p * torch.log_softmax(logits, 1)).sum(1).mean()
        losses["exact"] += float(0.6 * hard + 0.4 * soft) / steps
    assert losses["online"] == pytest.approx(losses["exact"], abs=1e-5)
    assert losses["cached"] == pytest.approx(losses["exact"], abs=1e-3)


def test_temperature_applies_to_teacher_and_student_but_not_the_hard_loss(taught: Any) -> None:
    """0.6 CE + 0.4 T^2 KL at T = 2 from whole logits of one teacher, with the hard part at T = 1."""
    space, store, student = taught
    run = replace(student, teach=SoftTargetDistillation(source="m1", kd_weight=0.4, temperature=2.0))
    batches = _batches(run, store, space)
    teacher, model = load_teacher(run, batches, store, space, load_records(space)), load_model(space, "m0")
    assert teacher is not None
    rows = torch.from_numpy(batches(0))
    with torch.no_grad():
        hidden, targets = next_token(model, rows)
        loss = teacher.loss(hidden, model.lm_head.weight, targets, rows, range(4), 124.0)
        logits = (hidden @ model.lm_head.weight.T).double()
        p = torch.softmax(load_model(space, "m1").double()(input_ids=rows).logits[:, :-1].flatten(0, 1) / 2, -1)
    hard = torch.nn.functional.cross_entropy(logits, targets)
    soft = (torch.xlogy(p, p) - p * torch.log_softmax(logits / 2, 1)).sum(1).mean()
    assert float(loss) == pytest.approx(float(0.6 * hard + 0.4 * 4 * soft), abs=1e-5)


def test_online_and_cached_students_reach_the_same_loss(taught: Any) -> None:
    space, _, student = taught
    computed(space, a_job(name="all", keep=300))
    losses = [
        train(replace(student, name=name, teach=SoftTargetDistillation(source=source, mode=mode)), space)
        for name, source, mode in (("on", "e-probs", "online"), ("off", "all", "cached"))
    ]
    assert losses[0] is not None and losses[1] is not None
    assert losses[0].loss == pytest.approx(losses[1].loss, abs=2e-3)
    assert losses[1].inputs.keys() == {"all"} and losses[0].inputs.keys() == {"e-probs", "m0", "m1"}
    assert losses[0].results["train_loss"] == pytest.approx(losses[1].results["train_loss"], abs=2e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 64, "batch_size": 2}, "sequence_length 64, its targets 't-wrong' have 32"),
        ({"unique_tokens": 4096}, "trains on 4096 tokens, its targets 't-wrong' cover 2048"),
        (
            {"teach": SoftTargetDistillation(source="m0", mode="cached")},
            "has teacher 'm0' with mode \"cached\", which must be a Targets job",
        ),
        ({"teach": SoftTargetDistillation(source="soup")}, "'soup' averages weights; teach with an ensemble"),
        ({"teach": SoftTargetDistillation(source="missing")}, "'missing', which has no record; run it first"),
        ({"teach": SoftTargetDistillation(source="t-wrong")}, "'t-wrong' is Targets, not a model"),
    ],
)
def test_an_unsuitable_teacher_raises(taught: Any, changes: dict[str, Any], message: str) -> None:
    space, _, student = taught
    if load_records(space).named("t-wrong") is None:
        computed(space, a_job(name="t-wrong"))
        soup = Ensemble(name="soup", runs=("m0",), average="parameters")
        write_record(
            space, Record(soup, "", "done", {"loss": 1.0, "parameters": 1, "members": 1, "curve": {"1": [1.0]}})
        )
    run = replace(
        student, name="wrong", **{"teach": SoftTargetDistillation(source="t-wrong", mode="cached"), **changes}
    )
    with pytest.raises(ValueError, match=message):
        train(run, space)


def test_a_teacher_with_another_tokenizer_raises(taught: Any, tmp_path: Path) -> None:
    space, store, student = taught
    taught_by = replace(student, name="wrong", teach=SoftTargetDistillation(source="m0"))
    file = space.folder("m0") / "model" / "tokenizer.json"
    text = file.read_text()
    try:
        table = json.loads(text)
        file.write_text(json.dumps(table))  # the same tokenizer in another layout
        load_teacher(taught_by, _batches(taught_by, store, space), store, space, load_records(space))
        vocabulary = table["model"]["vocab"]
        vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
        file.write_text(json.dumps(table))
        with pytest.raises(ValueError, match=r"'wrong' cannot learn from 'm0'.*use a teacher with the same tokenizer"):
            train(taught_by, space)
    finally:
        file.write_text(text)
    assert math.isfinite(load_records(space).named("m0").loss)  # type: ignore[union-attr]


def test_targets_of_another_text_or_vocabulary_of_the_same_size_raise(taught: Any, tmp_path: Path) -> None:
    space, store, student = taught
    computed(space, a_job(name="bound"))
    run = replace(student, name="wrong", teach=SoftTargetDistillation(source="bound", mode="cached"))
    meta = space.folder("bound") / "targets" / "meta.json"
    good = json.loads(meta.read_text())
    for key, message in (("training_tokens", "training tokens"), ("vocabulary", "vocabulary")):
        meta.write_text(json.dumps({**good, key: "0" * 64}))
        with pytest.raises(ValueError, match=f"has {message} [0-9a-f]{{64}}, its targets 'bound' have 0000"):
            CachedTeacher(run, a_job(name="bound"), _batches(run, store, space), store, space)
    meta.write_text(json.dumps({**good, "shards": 7}))
    with pytest.raises(ValueError, match="holds 1 shards of 7"):
        TargetStore.open(meta.parent)
    for content in ("[]", "3", "{}"):
        meta.write_text(content)
        with pytest.raises(ValueError, match="has no finished targets"):
            TargetStore.open(meta.parent)
    meta.write_text(json.dumps(good))
    (meta.parent / "shard-00000.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"shard-00000\.npz is damaged"):
        TargetStore.open(meta.parent)
