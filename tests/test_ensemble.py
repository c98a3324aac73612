"""Losses of every K against whole logits in float64."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from epochal import ensemble as module
from epochal.ensemble import ensemble_losses, evaluate_ensemble
from epochal.model import build_model
from epochal.records import Record, Records
from epochal.run import Ensemble, fingerprint

VOCABULARY, T = 48, 16


def models(count: int, vocabulary: int = VOCABULARY) -> list[Any]:
    made = [build_model("w16", vocab_size=vocabulary, max_positions=T, seed=seed).eval() for seed in range(count)]
    for member in made:
        with torch.no_grad():
            member.lm_head.weight.mul_(2.0)  # members that disagree
    return made


def sequences(count: int = 13) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, VOCABULARY, (count, T))


def exact(
    members: list[Any], tokens: np.ndarray[Any, Any], average: str, weights: tuple[float, ...] | None = None
) -> float:
    """The definition: every logit in memory, float64."""
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


@pytest.mark.parametrize("average", ["logits", "probs"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_subset_equals_the_definition(monkeypatch: pytest.MonkeyPatch, average: str, count: int) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", 4 * T)  # several passes, the last one short
    members, tokens = models(count), sequences()
    found = ensemble_losses(members, tokens, average=average)
    assert sorted(found) == list(range(1, count + 1))
    for k, losses in found.items():
        starts = range(1 if k == count else count)
        assert len(losses) == len(starts)
        for start, loss in zip(starts, losses, strict=True):
            subset = [members[(start + offset) % count] for offset in range(k)]
            assert loss == pytest.approx(exact(subset, tokens, average), abs=1e-6)


@pytest.mark.parametrize("average", ["logits", "probs"])
@pytest.mark.parametrize("weights", [(0.2, 0.5, 0.3), (1.0, 0.0, 0.0), (0.0, 0.5, 0.5)])
def test_weights(average: str, weights: tuple[float, ...]) -> None:
    members, tokens = models(3), sequences()
    found = ensemble_losses(members, tokens, average=average, weights=weights)
    assert list(found) == [3] and len(found[3]) == 1
    assert found[3][0] == pytest.approx(exact(members, tokens, average, weights), abs=1e-6)


def test_every_member_counts_equally_in_every_k() -> None:
    for count in range(1, 7):
        for k in range(1, count + 1):
            subsets = module._subsets(count, k)
            seen = [member for subset in subsets for member in subset]
            assert {seen.count(member) for member in range(count)} == {len(seen) // count}
            assert all(len(set(subset)) == k for subset in subsets)
            assert len({frozenset(subset) for subset in subsets}) == len(subsets)
            assert len(subsets) <= len(list(combinations(range(count), k)))


def test_identical_members_are_as_good_as_one() -> None:
    one = models(1)[0]
    tokens = sequences()
    for average in ("logits", "probs"):
        found = ensemble_losses([one, one, one], tokens, average=average)
        for losses in found.values():
            assert losses == pytest.approx([found[1][0]] * len(losses), abs=1e-6)


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

    weighted = Ensemble(name="w", runs=("a", "b", "c"), average=average, weights=(0.5, 0.25, 0.25))
    found = evaluate_ensemble(weighted, space, records).results
    expected = exact(members, store.sequences("validation", 32), average, (0.5, 0.25, 0.25))
    assert found["loss"] == pytest.approx(expected, abs=1e-6) and list(found["curve"]) == ["3"]


def test_members_must_have_read_the_same_way(tmp_path: Path) -> None:
    space, _, config = tiny.workspace(tmp_path)
    runs = [tiny.run(config, name="a"), tiny.run(config, name="b", sequence_length=64)]
    records = Records(space, [Record(run, fingerprint(run), "done", {"loss": 3.0}) for run in runs])
    with pytest.raises(ValueError, match="mixes members of 2 data sets or sequence lengths"):
        evaluate_ensemble(Ensemble(name="e", runs=("a", "b"), average="logits"), space, records)
    with pytest.raises(ValueError, match="'c' has no record"):
        evaluate_ensemble(Ensemble(name="e", runs=("a", "c"), average="logits"), space, records)
