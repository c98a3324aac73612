"""Ensemble losses for every subset size against all logits in float64."""

import copy
import json
import weakref
from dataclasses import asdict, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from epochal.data.prepare import prepare
from epochal.evaluation import losses as averages
from epochal.evaluation import on_disk_logits
from epochal.evaluation.downstream import Accuracy
from epochal.evaluation.ensembles import (
    _can_learn_weights,
    _splits,
    ensemble_losses,
    evaluate_ensemble,
    member_log_probs,
    refuse_equal_members,
)
from epochal.evaluation.subsets import curve_of, cyclic_subsets, jackknife_half_width
from epochal.models.llama import build_model
from epochal.records import Record, Records
from epochal.run import Ensemble, fingerprint

VOCABULARY, T = 48, 16


def models(count: int, vocabulary: int = VOCABULARY) -> list[Any]:
    members = [build_model("w16", vocab_size=vocabulary, max_positions=T, seed=seed).eval() for seed in range(count)]
    for member in members:
        with torch.no_grad():
            member.lm_head.weight.mul_(2.0)  # members that disagree
    return members


def sequences(count: int = 13) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, VOCABULARY, (count, T))


def exact(
    members: list[Any], tokens: np.ndarray[Any, Any], average: str, weights: tuple[float, ...] | None = None
) -> float:
    """The definition, with all logits in memory, in float64."""
    rows = torch.from_numpy(tokens)
    with torch.no_grad():
        logits = torch.stack([member.double()(input_ids=rows).logits[:, :-1].flatten(0, 1) for member in members])
    for member in members:
        member.float()
    shares = torch.tensor(weights or [1 / len(members)] * len(members), dtype=torch.float64)[:, None, None]
    if average == "logits":
        log_probs = torch.log_softmax((shares * logits).sum(0), -1)
    else:
        log_probs = (shares * torch.softmax(logits, -1)).sum(0).log()
    return torch.nn.functional.nll_loss(log_probs, rows[:, 1:].flatten()).item()


def loaders(members: list[Any]) -> list[Any]:
    return [lambda member=member: member for member in members]


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several passes, blocks of rows and vocabulary, and groups of subsets, each with a shorter last one."""
    for module in (averages, on_disk_logits):
        monkeypatch.setattr(module, "FORWARD_TOKENS", 4 * T)
    monkeypatch.setattr(averages, "PASS_TOKENS", 6 * T)
    monkeypatch.setattr(averages, "BLOCK_BYTES", 0)
    monkeypatch.setattr(averages, "LOGITS", 600)


@pytest.mark.parametrize("average", ["logits", "probs"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_cyclic_subsets_have_the_defined_loss(monkeypatch: pytest.MonkeyPatch, average: str, count: int) -> None:
    small_blocks(monkeypatch)
    members, tokens = models(count), sequences()
    curve = ensemble_losses(loaders(members), tokens, average=average)
    assert sorted(curve.losses) == list(range(1, count + 1))
    for k, losses in curve.losses.items():
        starts = range(1 if k == count else count)
        assert len(losses) == len(starts)
        for start, loss in zip(starts, losses, strict=True):
            subset = [members[(start + offset) % count] for offset in range(k)]
            assert loss == pytest.approx(exact(subset, tokens, average), abs=1e-6)


@pytest.mark.parametrize("average", ["logits", "probs"])
def test_all_subsets_of_four_members_have_the_defined_loss(monkeypatch: pytest.MonkeyPatch, average: str) -> None:
    small_blocks(monkeypatch)
    members, tokens = models(4), sequences()
    subsets = [subset for k in range(1, 5) for subset in combinations(range(4), k)]
    shares = torch.tensor([[(member in subset) / len(subset) for member in range(4)] for subset in subsets])
    if average == "logits":
        losses = averages.logit_losses(loaders(members), tokens, shares)
    else:
        losses = averages.probability_losses(averages.target_log_probs(loaders(members), tokens), shares)
    for subset, loss in zip(subsets, losses.tolist(), strict=True):
        assert loss == pytest.approx(exact([members[member] for member in subset], tokens, average), abs=1e-6)


@pytest.mark.parametrize("average", ["logits", "probs"])
@pytest.mark.parametrize("weights", [(0.2, 0.5, 0.3), (1.0, 0.0, 0.0), (0.0, 0.5, 0.5)])
def test_member_weights_are_renormalized_within_subsets(average: str, weights: tuple[float, ...]) -> None:
    members, tokens = models(3), sequences()
    losses_by_k = ensemble_losses(loaders(members), tokens, average=average, weights=weights).losses
    assert losses_by_k[3] == [pytest.approx(exact(members, tokens, average, weights), abs=1e-6)]
    pairs = [(0, 1), (1, 2), (2, 0)]
    weighing = [pair for pair in pairs if sum(weights[member] for member in pair)]
    for pair, loss in zip(weighing, losses_by_k[2], strict=True):
        total = sum(weights[member] for member in pair)
        inside = tuple(weights[member] / total for member in pair)
        assert loss == pytest.approx(exact([members[member] for member in pair], tokens, average, inside), abs=1e-6)


@pytest.mark.parametrize("weights", [None, (0.7, 0.0, 0.3)])
def test_averaged_parameters_have_the_loss_of_the_mean_model(weights: tuple[float, ...] | None) -> None:
    members, tokens = models(3), sequences()
    before = copy.deepcopy(members)
    shares = weights or (1 / 3,) * 3
    soup = copy.deepcopy(members[0]).double()
    for name, weight in soup.named_parameters():
        parts = [share * member.get_parameter(name).double() for share, member in zip(shares, members, strict=True)]
        weight.data.copy_(sum(parts))
    curve = ensemble_losses(loaders(members), tokens, average="parameters", weights=weights)
    assert curve.losses[3][0] == pytest.approx(exact([soup], tokens, "logits"), abs=1e-5)
    assert curve.losses[1][1 if weights is None else 0] == pytest.approx(
        exact([members[1 if weights is None else 0]], tokens, "logits"), abs=1e-5
    )
    for member, untouched in zip(members, before, strict=True):
        for one, other in zip(member.parameters(), untouched.parameters(), strict=True):
            assert torch.equal(one, other)
    wide = build_model("w32", vocab_size=VOCABULARY, max_positions=T, seed=0).eval()
    with pytest.raises(ValueError, match="of different shapes cannot be averaged"):
        ensemble_losses(loaders([*members, wide]), tokens, average="parameters")


def test_an_ensemble_can_be_evaluated_on_another_text(tmp_path: Path) -> None:
    space, store, config = tiny.workspace(tmp_path)
    other = tiny.write_text(tmp_path / "b", tiny.documents(200, seed=1), tokenizer='store = "tiny"')
    other = other.rename(other.with_name("other.toml"))
    foreign = tiny.write_text(tmp_path / "c", tiny.documents(200, seed=2), tokenizer="train = 299")
    foreign = foreign.rename(foreign.with_name("foreign.toml"))
    second = prepare(str(other), space.data)
    prepare(str(foreign), space.data)
    run = tiny.run(config, name="a")
    (member,) = models(1, store.vocab_size)
    member.save_pretrained(space.folder("a") / "model")
    records = Records(space, [Record(run, fingerprint(run), "done", {"loss": 3.0, "parameters": 7})])
    job = Ensemble(name="there", runs=("a",), average="logits", data=str(other))
    loss = evaluate_ensemble(job, space, records).loss
    assert loss == pytest.approx(exact([member], second.sequences("validation", 32), "logits"), abs=1e-6)
    assert fingerprint(job) != fingerprint(Ensemble(name="here", runs=("a",), average="logits"))
    with pytest.raises(ValueError, match="which has another tokenizer than"):
        evaluate_ensemble(Ensemble(name="no", runs=("a",), average="logits", data=str(foreign)), space, records)


def test_members_of_different_widths_can_be_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    members = [*models(1), build_model("w32", vocab_size=VOCABULARY, max_positions=T, seed=7).eval()]
    tokens = sequences()
    losses_by_k = ensemble_losses(loaders(members), tokens, average="logits").losses
    assert losses_by_k[2][0] == pytest.approx(exact(members, tokens, "logits"), abs=1e-6)


def test_one_member_is_in_memory_at_a_time() -> None:
    members, alive = models(3), []

    def load(index: int) -> Any:
        assert all(reference() is None for reference in alive), "the previous member is still in memory"
        member = copy.deepcopy(members[index])
        alive.append(weakref.ref(member))
        return member

    for average in ("logits", "probs"):
        alive.clear()
        ensemble_losses([partial(load, index) for index in range(3)], sequences(), average=average)
        assert len(alive) == 3, "each member is loaded once"


def test_every_member_counts_equally_in_every_k() -> None:
    for count in range(1, 7):
        for k in range(1, count + 1):
            subsets = cyclic_subsets(range(count), k)
            seen = [member for subset in subsets for member in subset]
            assert {seen.count(member) for member in range(count)} == {len(seen) // count}
            assert all(len(set(subset)) == k for subset in subsets)
            assert len({frozenset(subset) for subset in subsets}) == len(subsets)
            assert len(subsets) <= len(list(combinations(range(count), k)))


def test_identical_members_have_the_loss_of_one() -> None:
    one = models(1)[0]
    tokens = sequences()
    for average in ("logits", "probs"):
        curve = ensemble_losses(loaders([one, one, one]), tokens, average=average)
        for losses in curve.losses.values():
            assert losses == pytest.approx([curve.losses[1][0]] * len(losses), abs=1e-6)
        assert all(high - low < 1e-5 for low, high in curve.intervals().values())


def test_leave_one_out_means_are_those_of_the_other_members() -> None:
    values = {
        subset: float(np.random.default_rng(list(subset)).random())
        for k in range(1, 7)
        for subset in combinations(range(6), k)
    }
    curve = curve_of(6, lambda subsets: {subset: values[subset] for subset in subsets})
    for removed in range(6):
        others = [member for member in range(6) if member != removed]
        for k in range(1, 6):
            windows = {tuple(sorted(others[(s + i) % 5] for i in range(k))) for s in range(5)}
            expected = np.mean([values[window] for window in windows])
            assert curve.leave_one_out[k][removed] == pytest.approx(expected)


def test_intervals_cover_the_mean_over_new_members() -> None:
    """Synthetic losses: the mean of member effects plus pair effects."""
    rng, count = np.random.default_rng(0), 6
    truth, covered, independent = 3.0, dict.fromkeys(range(1, count + 1), 0), 0
    draws = 1500
    for _ in range(draws):
        strength, pair_effect = 0.1 * rng.standard_normal(count), 0.1 * rng.standard_normal((count, count))

        def loss(subset: tuple[int, ...], strength: Any = strength, pair_effect: Any = pair_effect) -> float:
            pairs = [pair_effect[a, b] for a, b in combinations(subset, 2)]
            return float(truth + strength[list(subset)].mean() + (np.sum(pairs) / len(subset) ** 2))

        curve = curve_of(count, lambda subsets, loss=loss: {subset: loss(subset) for subset in subsets})
        for k, (low, high) in curve.intervals().items():
            covered[k] += low <= truth <= high
        spread = np.std(curve.losses[3], ddof=1) / count**0.5 * 2.015
        independent += abs(np.mean(curve.losses[3]) - truth) <= spread
    assert all(0.86 <= hits / draws <= 0.98 for hits in covered.values()), covered
    assert independent / draws < 0.75, "treating subsets as independent gives intervals that are too narrow"


def test_jackknife_of_a_mean_is_the_student_interval() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).standard_normal(7)
    without = [np.delete(values, i).mean() for i in range(7)]
    low, high = stats.t.interval(0.9, 6, values.mean(), stats.sem(values))
    assert jackknife_half_width(without) == pytest.approx((high - low) / 2)


@pytest.mark.parametrize("average", ["logits", "probs"])
def test_the_record_of_an_ensemble(tmp_path: Path, average: str) -> None:
    space, store, config = tiny.workspace(tmp_path)
    runs = [tiny.run(config, name=name) for name in "abc"]
    members = models(3, store.vocab_size)
    for run, member in zip(runs, members, strict=True):
        member.save_pretrained(space.folder(run.name) / "model")
    records = Records(space, [Record(run, fingerprint(run), "done", {"loss": 3.0, "parameters": 7}) for run in runs])
    job = Ensemble(name="all", runs=("a", "b", "c"), average=average)
    record = evaluate_ensemble(job, space, records)
    assert record.status == "done" and record.fingerprint == fingerprint(job)
    assert record.results["members"] == 3 and record.results["parameters"] == 21
    assert record.inputs == {run.name: fingerprint(run) for run in runs}
    for split, prefix in (("validation", ""), ("test", "test_")):
        tokens = store.sequences(split, 32)
        assert record.results[f"{prefix}loss"] == pytest.approx(exact(members, tokens, average), abs=1e-6)
        curve = record.results[f"{prefix}curve"]
        assert [len(curve[k]) for k in ("1", "2", "3")] == [3, 3, 1]
        assert curve["1"][1] == pytest.approx(exact(members[1:2], tokens, average), abs=1e-6)
        without = record.results[f"{prefix}without"]
        assert without["2"][0] == pytest.approx(exact(members[1:], tokens, average), abs=1e-6)
        low, high = record.results[f"{prefix}interval"]["1"]
        assert low < sum(curve["1"]) / 3 < high
    json.dumps(record.results, allow_nan=False)
    assert not any(space.folder("all").iterdir()), "temporary files are removed"
    table = member_log_probs(["a", "b", "c"], space, store.sequences("validation", 32))
    assert table.dtype == torch.float32 and table.shape == (3, len(store.sequences("validation", 32)) * 31)
    assert (-table.double().mean(1)).tolist() == pytest.approx(record.results["curve"]["1"], abs=1e-6)

    weighted = Ensemble(name="w", runs=("a", "b", "c"), average=average, member_weights=(0.5, 0.25, 0.25))
    results = evaluate_ensemble(weighted, space, records).results
    expected = exact(members, store.sequences("validation", 32), average, (0.5, 0.25, 0.25))
    assert results["loss"] == pytest.approx(expected, abs=1e-6)
    assert list(results["curve"]) == ["1", "2", "3"]


def test_members_with_other_sequence_lengths_or_without_records_raise(tmp_path: Path) -> None:
    space, _, config = tiny.workspace(tmp_path)
    runs = [tiny.run(config, name="a"), tiny.run(config, name="b", sequence_length=64)]
    records = Records(space, [Record(run, fingerprint(run), "done", {"loss": 3.0}) for run in runs])
    with pytest.raises(ValueError, match="mixes 2 data sets or sequence lengths"):
        evaluate_ensemble(Ensemble(name="e", runs=("a", "b"), average="logits"), space, records)
    with pytest.raises(ValueError, match="'c' has no record"):
        evaluate_ensemble(Ensemble(name="e", runs=("a", "c"), average="logits"), space, records)


def test_members_that_are_one_model_are_refused() -> None:
    """Two seeds that draw the same order of two documents train the same model."""
    jobs = [replace(tiny.run(Path("c.toml")), name=name) for name in ("a", "b", "c")]
    losses = ((4.1, 2.5), (4.2, 2.5), (4.1, 2.5))
    members = [
        Record(job, "", "done", {"loss": loss, "train_loss": train})
        for job, (loss, train) in zip(jobs, losses, strict=True)
    ]
    ensemble = Ensemble(name="e", runs=("a", "b", "c"), average="logits")
    with pytest.raises(ValueError, match=r"members 'a' and 'c' ended with equal losses .* they are one model"):
        refuse_equal_members(ensemble, members)
    refuse_equal_members(ensemble, members[:2])


def test_tasks_are_recorded_in_the_order_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space, store, config = tiny.workspace(tmp_path)
    run = tiny.run(config, name="a")
    models(1, store.vocab_size)[0].save_pretrained(space.folder("a") / "model")
    records = Records(space, [Record(run, fingerprint(run), "done", {"loss": 3.0, "parameters": 7})])
    expected = {"next_passage": Accuracy(0.5, 0.1, 2, "10"), "cloze": Accuracy(1.0, 0.0, 1, "1")}
    monkeypatch.setattr(
        "epochal.evaluation.downstream.score", lambda _, __, tasks, **___: {task: expected[task] for task in tasks}
    )
    job = Ensemble(name="e", runs=("a",), average="logits", tasks=("next_passage", "cloze"))
    accuracies = evaluate_ensemble(job, space, records).results["tasks"]
    assert list(accuracies) == ["next_passage", "cloze"]
    assert accuracies == {task: asdict(value) for task, value in expected.items()}


def test_weights_are_learned_only_from_a_slice_that_all_held_out(tmp_path: Path) -> None:
    _, _, config = tiny.workspace(tmp_path)

    def learns(*changes: dict[str, int], **settings: Any) -> bool:
        runs = [tiny.run(config, name=f"m{k}", **change) for k, change in enumerate(changes)]
        job = Ensemble(
            name="e", runs=tuple(run.name for run in runs), average=settings.pop("average", "logits"), **settings
        )
        return _can_learn_weights(job, [Record(run, fingerprint(run), "done", {"loss": 3.0}) for run in runs])

    held = {"holdout_tokens": 512}
    assert learns(held, held) and learns(held, held, average="probs")
    assert not learns(held) and not learns({}, {})
    assert not learns(held, {"holdout_tokens": 256}) and not learns(held, {}) and not learns({}, held)
    assert not learns(held, {**held, "unique_tokens": 1024}), (
        "the held-out end of a shorter text may be training text of another member"
    )
    assert not learns(held, held, member_weights=(0.5, 0.5)) and not learns(held, held, average="parameters")


def test_a_test_split_shorter_than_a_sequence_is_not_evaluated() -> None:
    for tokens, splits in ((0, ["validation"]), (31, ["validation"]), (32, ["validation", "test"])):
        store: Any = SimpleNamespace(meta={"tokens": {"test": tokens}})
        assert _splits(store, 32) == splits
