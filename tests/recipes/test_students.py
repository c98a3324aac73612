"""Students: every way to teach costs the student the same, and teachers are priced."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from made_up import MadeUpCampaign, MadeUpRecords, simulate, size_of, with_table

from epochal.campaign.plan import AssumeAllDone, cost_estimate, flops_of
from epochal.models.config import parameter_counts
from epochal.run import Ensemble, Job, Run, Samples, SoftTargetDistillation, Targets, inputs
from epochal.scale import Point, load_scale
from epochal.study import Study
from recipes import _soft_targets, distillation, heavy_weight_decay
from recipes._soft_targets import WAYS

TOKENS = 24576
StudentOf = Callable[[str, int], tuple[Job, ...]]


@pytest.fixture
def student_of(chain: MadeUpCampaign) -> StudentOf:
    settings = chain.study.settings(distillation.Settings)
    assert settings is not None and settings.soft_targets is not None
    soft = settings.soft_targets
    return lambda way, seed: _soft_targets.student(chain.study, settings, soft, way, seed)


def test_every_way_to_teach_costs_the_student_the_same(student_of: StudentOf) -> None:
    runs = {way: [student_of(way, seed)[-1] for seed in (0, 1)] for way in WAYS}
    flat = [run for pair in runs.values() for run in pair if isinstance(run, Run)]
    assert len({run.name for run in flat}) == 2 * len(WAYS) == len(flat)
    assert {(run.model, run.steps, run.unique_tokens) for run in flat} == {("w32", 64 * 48, TOKENS)}
    assert [(run.init_seed, run.order_seed) for run in flat] == [(0, 0), (1, 1)] * len(runs)
    assert len({run.optimizer.lr for run in flat}) == 1


def test_students_learn_from_what_their_way_names(chain: MadeUpCampaign, student_of: StudentOf) -> None:
    settings = chain.study.settings(distillation.Settings)
    assert settings is not None and settings.soft_targets is not None
    ensembles = _soft_targets.teachers(chain.study, settings.soft_targets)
    first, whole = ensembles["probs"].runs[0], ensembles["probs"].name
    read = {way: student_of(way, 0) for way in WAYS}
    sources = {way: inputs(jobs[-1])[0] for way, jobs in read.items()}
    assert (sources["probs"], sources["logits"], sources["self"]) == (whole, ensembles["logits"].name, first)
    (targets, cached) = read["cached"]
    assert isinstance(targets, Targets) and (targets.source, inputs(cached)) == (whole, (targets.name,))
    texts = {way: jobs[0] for way, jobs in read.items() if isinstance(jobs[0], Samples)}
    assert {way: (text.source, text.draw, text.name == sources[way]) for way, text in texts.items()} == {
        "samples": (whole, "members", True),
        "average": (whole, "average", True),
        "self-samples": (first, "members", True),
    }


def test_students_report_shares_of_the_gain_and_sizes(chain: MadeUpCampaign) -> None:
    ways, sizes = chain.report("distillation").tables[1:]
    settings = chain.study.settings(distillation.Settings)
    assert settings is not None and settings.soft_targets is not None
    single = heavy_weight_decay.best(chain.study, "w32", TOKENS).mean
    teacher = _soft_targets.teachers(chain.study, settings.soft_targets)["probs"]
    ensemble = chain.records.get(teacher)
    assert ensemble is not None
    assert {row[0] for row in ways.rows} == set(WAYS.values())
    for _, loss, half, gain, share, seeds in ways.rows:
        assert gain == pytest.approx(single - loss) and seeds == settings.soft_targets.seeds
        assert half is None, "two seeds have no interval"
        assert share == f"{100 * (single - loss) / (single - ensemble.test_loss):.0f}%"
    fractions = {model: size_of(model) / size_of("w32") for model in ("w64", "w32", "w10")}
    assert [(row[0], row[2], row[3]) for row in sizes.rows] == [
        (model, round(share, 3), round(share / len(teacher.runs), 3)) for model, share in fractions.items()
    ]


def test_notes_say_what_is_equal_and_what_was_not_tuned(chain: MadeUpCampaign) -> None:
    notes, table = " ".join(chain.report("distillation").notes), chain.scale.tables["distillation"]
    assert f"the same: {64 * 48 * 512:,} tokens of w32, lr 0.01." in notes
    assert "soft targets: weight 0.9, wd 0.4." in notes
    assert f"a share of {table['fraction']:g} sampled, wd {table['wd']:g}" in notes


def test_notes_say_where_costs_differ(chain: MadeUpCampaign) -> None:
    uneven = with_table(chain.scale, "distillation", fraction=0.7)  # 16 / 0.3 epochs are rounded
    study = Study(AssumeAllDone(chain.records), uneven)
    settings = study.settings(distillation.Settings)
    assert settings is not None and settings.soft_targets is not None
    assert "do NOT cost the student the same" in _soft_targets.notes(study, settings, settings.soft_targets)[0]


def test_the_cache_is_as_good_as_the_models_it_was_computed_from(chain: MadeUpCampaign) -> None:
    claim = chain.claims("distillation")["distillation.way.cached-probs"]
    assert claim.value == "+0.0000 nats" and claim.holds


def test_a_student_of_a_size_without_ensemble_has_no_teacher_of_its_size(chain: MadeUpCampaign) -> None:
    """Members of that size are not planned, so nothing may read them."""
    study = Study(chain.records, with_table(chain.scale, "distillation", model="w16", soft_targets=None))
    assert distillation.student(study, "self", 0.2) == ()
    assert distillation.student(study, "ensemble", 0.2)[-1].model == "w16"  # type: ignore[union-attr]


def test_soft_targets_need_an_ensemble_of_their_size() -> None:
    soft_targets = {"model": "w16", "kd_weight": 0.5, "wd": 0.1}
    scale = with_table(load_scale("demo"), "distillation", soft_targets=soft_targets)
    with pytest.raises(ValueError, match="'w16' has no ensemble"):
        distillation.plan(Study(MadeUpRecords(), scale))


# --- prices -------------------------------------------------------------------------------------------------------------


def test_a_teacher_is_priced_by_its_forward_passes() -> None:
    """6 N a token for the student, twice with masked inputs; 2 N a token for each online teacher."""
    scale, point = load_scale("demo"), Point(lr=0.01, epochs=4, wd=0.1)
    student = replace(scale.run("w16", TOKENS, point), name="student", teach=SoftTargetDistillation(source="both"))
    small, large = scale.run("w32", TOKENS, point), scale.run("w64", TOKENS, point)
    both = Ensemble(name="both", runs=(small.name, large.name), average="probs")
    targets = Targets(name="cache", source="both", unique_tokens=TOKENS, sequence_length=128)
    jobs = {job.name: job for job in (student, small, large, both, targets)}
    size = {model: parameter_counts(model, vocab_size=300).total for model in ("w16", "w32", "w64")}
    tokens = 4 * TOKENS
    teachers = 2 * (size["w32"] + size["w64"])
    assert flops_of(student, 300, jobs) == tokens * (6 * size["w16"] + teachers)
    assert flops_of(replace(student, input_mask_prob=0.5), 300, jobs) == tokens * (12 * size["w16"] + teachers)
    single = replace(student, teach=SoftTargetDistillation(source=large.name))
    assert flops_of(single, 300, jobs) == tokens * (6 * size["w16"] + 2 * size["w64"])
    cached = replace(student, data_order="fixed", teach=SoftTargetDistillation(source="cache", mode="cached"))
    assert flops_of(cached, 300, jobs) == tokens * 6 * size["w16"] == flops_of(single, 300)
    assert [flops_of(job, 300, jobs) for job in (both, targets)] == [0, 0]


def test_a_plan_prices_teachers_that_have_run(chain: MadeUpCampaign) -> None:
    """Without the records of students everything before them has run, and online students cost more than the cached one."""
    students = {run.name for run in chain.runs if run.teach or run.distill}
    variants = {run.name for run in chain.runs if run.teach and "teach" in run.name and run.data_order != "sequences"}
    records = MadeUpRecords(r for r in chain.records if r.job.name not in students - variants)
    jobs = {job.name: job for job in chain.jobs}
    unfinished = [job for job in chain.runs if records.get(job) is None]
    plain = sum(flops_of(job) for job in unfinished)
    teachers = sum(
        2 * parameter_counts(jobs[name].model).total * run.tokens  # type: ignore[union-attr]
        for run in unfinished
        if run.teach is not None and run.teach.mode == "online"
        for name in (inputs(jobs[run.teach.source]) or (run.teach.source,))
    )
    assert teachers > 0
    assert cost_estimate(("distillation",), records, chain.scale).today.flops == pytest.approx(plain + teachers)


# --- tuned students, and the control without real text -------------------------------------------------------------------


def test_a_tuned_student_tries_every_decay_once_and_the_control_takes_the_best() -> None:
    """The made-up loss is lowest where the averaging window is 0.35 epochs."""
    scale = replace(load_scale("demo"), seeds=3)
    scale = with_table(scale, "distillation", tune_wd=[0.1, 1.6, 6.4], synthetic_only=True)
    campaign = simulate(scale, "distillation")
    study, table = campaign.study, scale.tables["distillation"]
    for teacher in distillation.TEACHERS:
        losses = distillation.tries(study, teacher)
        best = distillation.best_decay(study, teacher)
        assert sorted(losses) == [0.1, 1.6, 6.4] and losses[best] == min(losses.values())  # type: ignore[index]
        runs = distillation.students(study, teacher).values()
        assert [(run.init_seed, run.optimizer.wd) for run in runs] == [(seed, best) for seed in range(3)]
    alone = list(distillation.students(study, distillation.SYNTHETIC).values())
    mixed = list(distillation.students(study, "self").values())
    for control, student in zip(alone, mixed, strict=True):
        assert control.distill is not None and student.distill is not None and control.distill.fraction == 1.0
        assert control.steps == student.steps == 4 * table["epochs"] * 48, "equal student cost"
        assert (control.distill.samples, control.optimizer) == (student.distill.samples, student.optimizer)
    claim = campaign.claims("distillation")["distillation.synthetic-only"]
    assert claim.seeds == 3 and "the student is not tuned" not in claim.provisional
    half = campaign.records.having([])
    some = MadeUpRecords(
        record for record in half if record.job.name != alone[0].name and "-wd6.4-text" not in record.job.name
    )
    first = Study(some, scale)
    assert not distillation.tuned(first, "ensemble") and distillation.best_decay(first, "ensemble") is not None
    reasons = {reason for c in distillation.report(first).claims for reason in c.provisional}
    assert "decays of the student that have not run" in reasons


def test_students_of_stretched_documents_stand_next_to_those_of_separate_ones() -> None:
    demo = load_scale("demo")
    more = {"model": "w32", "soft_targets": None, "megadocs": {"prompt_tokens": 16, "continuations": 4}}
    own = {key: value for key, value in (demo.tables["distillation"] | more).items() if value is not None}
    tables = {"ensembling": {"models": ["w32"], "count": 3}, "distillation": own}
    scale = replace(demo, ladder=demo.ladder[1:2], seeds=3, tables=tables)
    campaign = simulate(scale, "distillation")
    texts = [job for job in campaign.jobs if isinstance(job, Samples) and job.prompt_tokens]
    assert {(text.joined, text.continuations) for text in texts} == {(False, 4), (True, 4)}
    assert len({text.source for text in texts}) == 1 and len({text.tokens for text in texts}) == 1
    read = {text.name: 0 for text in texts}
    for run in campaign.runs:
        if run.distill and run.distill.samples in read:
            read[run.distill.samples] += 1
    assert set(read.values()) == {3}, "three seeds of each"
    claim = campaign.claims("distillation")["distillation.megadocs"]
    assert claim.text.startswith("a student of documents stretched by their continuations beats one of separate")
    assert not [job for job in simulate(demo, "distillation").jobs if isinstance(job, Samples) and job.prompt_tokens]
