"""One-off runs: other fields and seeds of an existing run, and what reports show of them."""

from dataclasses import replace

import pytest
from made_up import TEST_ABOVE, MadeUpRecords, both_losses, made_up_record

from epochal.campaign.one_off import described, runs_like
from epochal.run import AdamW, Muon, Run, Spectra
from epochal.scale import Point, load_scale
from epochal.study import Study
from recipes import one_off_runs

SCALE = load_scale("demo")
LIKE = SCALE.run("w16", 24576, Point(lr=0.01, epochs=1, wd=0.1), optimizer=Spectra(base=AdamW(), clip=2.0))


def test_fields_and_seeds_change_and_nothing_else() -> None:
    runs = runs_like(LIKE, ["optimizer.clip=5"], 3, SCALE)
    assert [(run.init_seed, run.order_seed) for run in runs] == [(0, 0), (1, 1), (2, 2)]
    for run in runs:
        assert isinstance(run.optimizer, Spectra) and run.optimizer.clip == 5.0
        same = replace(run, name=LIKE.name, optimizer=LIKE.optimizer, init_seed=0, order_seed=0)
        assert same == LIKE
    assert len({run.name for run in (LIKE, *runs)}) == 4
    assert described(runs[2], LIKE) == "optimizer.clip 5.0 (was 2.0)"


def test_another_kind_of_optimizer_keeps_the_rates() -> None:
    (run,) = runs_like(LIKE, ["optimizer.kind=Muon"], 1, SCALE)
    assert run.optimizer == Muon(lr=0.01, wd=0.1)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimizer.clipp=5", "did you mean 'clip'"),
        ("dropout=much", "must be of type float"),
        ("epochs=0", "epochs must be an integer from 1 to 100,000, got 0"),
        ("epochs=1", "nothing differs"),
        ("foo.bar=2", "'foo', which has no fields"),
        ("clip", "not an assignment"),
    ],
)
def test_impossible_changes_are_one_sentence(assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runs_like(LIKE, [assignment], 1, SCALE)


def test_a_report_compares_one_off_runs_with_their_origin_by_seed() -> None:
    def record(run: Run, loss: float) -> object:
        made = made_up_record(run, MadeUpRecords())
        return replace(made, results={**made.results, **both_losses(loss)})

    (changed,) = runs_like(LIKE, ["optimizer.clip=5"], 1, SCALE)
    note = {"like": {"name": LIKE.name, "changes": described(changed, LIKE)}}
    records = [record(LIKE, 4.5), replace(record(changed, 4.2), provenance=note)]  # type: ignore[type-var]
    assert one_off_runs.report(Study(MadeUpRecords(records[:1]), SCALE)) is None  # type: ignore[arg-type]
    section = one_off_runs.report(Study(MadeUpRecords(records), SCALE))  # type: ignore[arg-type]
    assert section is not None
    unchanged, row = section.tables[0].rows
    assert unchanged[0] == "unchanged" and row[0] == "optimizer.clip 5.0 (was 2.0)"
    assert row[1] == 4.2 + TEST_ABOVE and row[2] == pytest.approx(0.3)
