"""What-if answers against the closed form of the laws that made the records, and refusals in one sentence."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from epochal.cli import app
from epochal.records import Record, Records, Workspace, write_record
from epochal.run import Ensemble, Samples, fingerprint
from epochal.scale import Scale, load_scale
from epochal.tuner import Point
from epochal.what_if import answer_lines, describe, evidence, what_if

SIZES = {"w16": 40_000, "w32": 100_000, "w64": 300_000, "w96": 600_000}
SEEDS, MEMBERS = 3, 5
WIGGLE = (0.001, -0.001, 0.0)  # of the three seeds


def single(N: float, D: float) -> float:
    """Chinchilla's form, in nats."""
    return 2.0 + 30 * N**-0.4 + 20 * D**-0.3


def ensemble(N: float, D: float, K: int) -> float:
    """Members overfit a little, and their excess falls as 1 / K."""
    return single(N, D) - 0.25 + 0.4 / K


@pytest.fixture
def scale() -> Scale:
    return load_scale("micro")


def tuned(scale: Scale, model: str, tokens: int) -> list[Record]:
    """A tuned point with three seeds, and two decays beside it that are worse."""
    found = []
    for wd, worse in ((3.2, 0.0), (1.6, 0.1), (6.4, 0.1)):
        for seed in range(SEEDS if not worse else 1):
            run = scale.run(model, tokens, Point(lr=0.01, epochs=16, wd=wd), seed=seed)
            loss = single(SIZES[model], tokens) + worse + WIGGLE[seed]
            found.append(Record(run, fingerprint(run), "done", {"loss": loss, "parameters": SIZES[model]}))
    return found


def together(scale: Scale, model: str, tokens: int) -> list[Record]:
    """Five members and the losses of their subsets; each member is worth a hair more or less."""
    runs = [scale.run(model, tokens, Point(lr=0.01, epochs=32, wd=1.6), seed=seed) for seed in range(MEMBERS)]
    luck = [0.004 * math.sin(seed) for seed in range(MEMBERS)]
    luck = [value - sum(luck) / MEMBERS for value in luck]
    members = [
        Record(
            run, fingerprint(run), "done", {"loss": ensemble(SIZES[model], tokens, 1) + x, "parameters": SIZES[model]}
        )
        for run, x in zip(runs, luck, strict=True)
    ]
    curve = {
        str(k): [
            ensemble(SIZES[model], tokens, k) + sum(luck[(start + i) % MEMBERS] for i in range(k)) / k
            for start in range(1 if k == MEMBERS else MEMBERS)
        ]
        for k in range(1, MEMBERS + 1)
    }
    job = Ensemble(name=f"{model}-{tokens}-k5", runs=tuple(run.name for run in runs), average="logits")
    results = {"loss": curve["5"][0], "curve": curve, "members": MEMBERS, "parameters": MEMBERS * SIZES[model]}
    return [*members, Record(job, fingerprint(job), "done", results)]


def student(scale: Scale, tokens: int, kept: float) -> list[Record]:
    """A w64 student of the w96 ensemble that keeps a share of its gain."""
    source = f"w96-{tokens}-k5"
    samples = Samples(name="text", source=source, tokens=512, max_length=64)
    run = scale.student("w64", tokens, "text", name="student-ensemble-w64")
    base = single(SIZES["w64"], tokens)
    loss = base - kept * (base - ensemble(SIZES["w96"], tokens, 5))
    return [
        Record(samples, fingerprint(samples), "done", {"tokens": 512}),
        Record(run, fingerprint(run), "done", {"loss": loss, "parameters": SIZES["w64"]}),
    ]


def campaign(scale: Scale, *, budgets: tuple[int, ...] = (), kept: float = 0.8) -> Records:
    budgets = budgets or scale.unique_tokens
    found = [record for d in budgets for model in SIZES for record in tuned(scale, model, d)]
    first = scale.unique_tokens[0]
    found += [record for model in ("w64", "w96") for record in together(scale, model, first)]
    return Records(Workspace(scale.name), found + student(scale, first, kept))


def hours_of(scale: Scale, model: str, tokens: int, epochs: int, count: int = 1) -> float:
    return count * 6 * SIZES[model] * tokens * epochs / scale.hardware.flops / 3600


@pytest.mark.parametrize("hours", [0.002, 0.02, 0.1, 3.0])
def test_the_best_way_is_that_of_the_closed_form(scale: Scale, hours: float) -> None:
    D = scale.unique_tokens[0]
    ways = {(m, 1): single(N, D) for m, N in SIZES.items() if hours_of(scale, m, D, 16) <= hours}
    ways |= {
        (m, K): ensemble(SIZES[m], D, K)
        for m in ("w64", "w96")
        for K in range(2, 4 * MEMBERS + 1)
        if hours_of(scale, m, D, 32, K) <= hours
    }
    answer = what_if(campaign(scale), scale, tokens=D, hours=hours)
    expected = min(ways, key=ways.__getitem__)
    assert (answer.best.model, answer.best.members) == expected
    assert answer.best.loss.value == pytest.approx(ways[expected], abs=0.001)
    epochs = 16 if answer.best.members == 1 else 32
    assert answer.best.point.epochs == epochs and answer.best.point.wd == pytest.approx(3.2 * 16 / epochs)
    assert answer.best.hours == pytest.approx(hours_of(scale, *expected[:1], D, epochs, expected[1]))
    assert answer.best.hours <= hours
    assert ("extrapolated in K" in answer.best.loss.basis) == (answer.best.members > MEMBERS)


def test_the_next_doubling_is_that_of_the_closed_form(scale: Scale) -> None:
    D, hours = scale.unique_tokens[0], 0.1
    answer = what_if(campaign(scale), scale, tokens=D, hours=hours)
    N, K = SIZES[answer.best.model], answer.best.members
    assert K > 1
    changes = dict(answer.doublings)
    doubled = changes[f"twice the members (K = {2 * K} of {answer.best.model})"]
    assert doubled.value == pytest.approx(ensemble(N, D, 2 * K) - ensemble(N, D, K), abs=0.001)
    more = changes["twice the tokens, the same hours"]
    affordable = [(m, k) for m in ("w64", "w96") for k in range(2, 21) if hours_of(scale, m, 2 * D, 32, k) <= hours]
    assert more.value == pytest.approx(
        min(ensemble(SIZES[m], 2 * D, k) for m, k in affordable) - ensemble(N, D, K), abs=0.005
    )
    assert "gain of the ensemble" in more.basis
    assert more.reach is not None and more.reach > 0
    assert changes["twice the hours, the same tokens"].value < 0


def test_between_budgets_and_beyond_them_the_law_answers_and_says_so(scale: Scale) -> None:
    records = campaign(scale)
    between = what_if(records, scale, tokens=36_000, hours=0.02).single
    assert between.loss.value == pytest.approx(single(between.parameters, 36_000), abs=0.002)
    assert between.loss.basis == "law in N and D"
    assert between.point.wd == pytest.approx(3.2 * 49152 / 36_000)  # the window 1 / (lr wd steps) of the nearest budget
    far = what_if(records, scale, tokens=10**6, hours=1.0).single
    assert far.loss.basis == "law in N and D, extrapolated"
    assert abs(far.loss.value - single(far.parameters, 10**6)) < 0.02
    assert far.loss.reach > between.loss.reach > 0


def test_students_keep_the_measured_share_and_the_smallest_that_pays_is_named(scale: Scale) -> None:
    D = scale.unique_tokens[0]
    answer = what_if(campaign(scale, kept=0.8), scale, tokens=D, hours=1.0)
    assert [s.model for s in answer.students] == sorted(SIZES, key=SIZES.__getitem__)
    for found in answer.students:
        base, teacher = single(SIZES[found.model], D), found.teacher.loss.value
        assert found.loss.value == pytest.approx(base - 0.8 * (base - teacher), abs=0.002)
        own = hours_of(scale, found.model, D, scale.students.epochs) / (1 - scale.students.fraction)
        assert found.hours == pytest.approx(found.teacher.hours + own) and found.hours <= 1.0
    paying = [s for s in answer.students if s.loss.value < answer.single.loss.value]
    assert answer.student == paying[0] and "distil" in "\n".join(describe(answer))
    assert what_if(campaign(scale, kept=-0.5), scale, tokens=D, hours=1.0).student is None


def test_one_seed_has_no_interval_and_the_standard_recipe_alone_is_no_evidence(scale: Scale) -> None:
    D = scale.unique_tokens[0]
    one = Records(Workspace(scale.name), [r for r in campaign(scale) if "-s0" in r.job.name])
    assert what_if(one, scale, tokens=D, hours=0.02).single.loss.reach is None
    standard = [r for r in one if r.job.optimizer.wd == 3.2]
    assert not evidence(Records(Workspace(scale.name), standard)).tuned


def test_refusals_are_one_sentence(scale: Scale) -> None:
    D = scale.unique_tokens[0]
    empty = Records(Workspace(scale.name))
    cases = [
        (empty, D, 1.0, "no records of tuned single models"),
        (campaign(scale, budgets=(D,)), 2 * D, 1.0, "say nothing about D"),
        (campaign(scale), D, 1e-6, "do not pay for any tuned run"),
        (campaign(scale), D, math.nan, "no budget"),
    ]
    for records, tokens, hours, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            what_if(records, scale, tokens=tokens, hours=hours)
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    with pytest.raises(ValueError, match="--gpu-hours"):
        answer_lines(empty, scale, tokens=D, hours=None)


def test_command_line(scale: Scale, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = replace(Workspace(scale.name), results=tmp_path / "results", work=tmp_path / "work")
    for record in campaign(scale):
        write_record(workspace, record)
    options = ["--scale", "micro", "--results", str(workspace.results), "--work", str(workspace.work)]
    app(
        ["plan", *options, "--what-if", "--tokens", str(scale.unique_tokens[0]), "--gpu-hours", "0.1"],
        standalone_mode=False,
    )
    said = capsys.readouterr().out
    assert "members of w64" in said and "the next doubling" in said and "assumed" in said
    with pytest.raises(ValueError, match="belong to --what-if"):
        app(["plan", *options, "--gpu-hours", "0.1"], standalone_mode=False)
