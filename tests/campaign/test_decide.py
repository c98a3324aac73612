"""How many more seeds would settle which of two recorded runs is better."""

from pathlib import Path

import pytest

from epochal.campaign.decide import Decision, decide
from epochal.records import Record, Records, Workspace
from epochal.run import fingerprint
from epochal.scale import Point, load_scale


def decision(tmp_path: Path, first: tuple[float, ...], second: tuple[float, ...]) -> Decision:
    scale, space = load_scale("demo"), Workspace("demo", tmp_path / "results", tmp_path / "work")
    records = []
    for wd, losses in ((0.8, first), (1.6, second)):
        for seed, loss in enumerate(losses):
            job = scale.run("w64", 24576, Point(lr=0.01, epochs=16, wd=wd), seed=seed)
            records.append(Record(job, fingerprint(job), "done", {"loss": loss, "parameters": 5}))
    names = (records[0].job.name, records[len(first)].job.name)
    (found,) = decide(*names, Records(space, records), scale, vocab_size=1024)
    return found


def test_more_seeds_are_priced_and_likelier_to_settle(tmp_path: Path) -> None:
    found = decision(tmp_path, (4.20, 4.23, 4.21), (4.22, 4.22, 4.24))
    assert found.now.endswith(": open.") and "is +0.0133 nats better than" in found.now
    assert [option.cost.jobs for option in found.options] == [2, 4, 8, 16, 32, 64]
    chances = [option.probability for option in found.options]
    assert chances[0] < chances[-1] and found.options[-1].cost.flops == 32 * found.options[0].cost.flops > 0
    assert found.cheapest is None or found.cheapest.probability >= 0.8


def test_a_settled_pair_needs_nothing_more(tmp_path: Path) -> None:
    found = decision(tmp_path, (4.20, 4.21, 4.205), (4.40, 4.41, 4.405))
    assert found.now.endswith(": settled.") and found.options == () and found.cheapest is None


def test_a_single_seed_and_an_unknown_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run a second seed of both first"):
        decision(tmp_path, (4.2,), (4.3, 4.4))
    scale, space = load_scale("demo"), Workspace("demo", tmp_path / "results", tmp_path / "work")
    with pytest.raises(ValueError, match=r"'tunde' is neither .did you mean 'tuned'"):
        decide("tunde", "standard", Records(space), scale)
    with pytest.raises(ValueError, match="too few sizes for laws with intervals"):
        decide("tuned", "standard", Records(space), scale)
