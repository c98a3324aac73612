"""Names of jobs: two jobs that mean different things never share one, and every name is a valid file name."""

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from epochal.names import named_ensemble, named_run, named_samples, named_targets, short_count
from epochal.optimizer_config import AdamW, AdEMAMix, Fira, Lion, Mars, Muon, Optimizer, Signum, Spectra
from epochal.run import (
    Anchor,
    GradientNorm,
    OrthogonalStep,
    RandomTokens,
    Run,
    SequenceDistillation,
    SoftTargetDistillation,
)
from epochal.scale import Point, load_scale

LONGEST = 200
DEMO = load_scale("demo")
KINDS: tuple[Optimizer, ...] = (
    *(AdamW(), Signum(), AdEMAMix(), Mars(), Lion(), Muon(), Fira(), Fira(variant="galore")),
    *(Spectra(base=AdamW()), Spectra(base=Signum()), Spectra(base=AdamW(beta2=0.99)), Spectra(base=AdamW(), clip=2.0)),
    *(Spectra(base=AdamW(), apply_to=("a", "b.c")), Spectra(base=AdamW(), apply_to="all"), Muon(nesterov=False)),
    *(Fira(patterns=("attn",)), Fira(rank=4), Fira(gamma=None), Mars(vector_lr_scale=0.5)),
)
JOB = st.sampled_from(["a-s0", "a-s1", "b-s0-3-logits", "text-a"])
CHOICES: dict[str, st.SearchStrategy[Any]] = {
    "name": st.just("unnamed"),
    "model": st.sampled_from(["w16", "w32", "folder/own.json"]),
    "data": st.sampled_from(["kjv", "docs-kjv", "docs_kjv"]),
    "unique_tokens": st.sampled_from([24576, 2**20 * 1000, 512 * 10**9]),
    "epochs": st.integers(1, 99),
    "batch_size": st.sampled_from([1, 4]),
    "sequence_length": st.sampled_from([64, 128]),
    "optimizer": st.sampled_from(KINDS),
    "warmup": st.sampled_from([0.0, 0.05, 0.1]),
    "clip_norm": st.sampled_from([1.0, 0.5]),
    "data_order": st.sampled_from(["documents", "sequences"]),
    "init_seed": st.integers(0, 12),
    "order_seed": st.integers(0, 12),
    "precision": st.sampled_from(["fp32", "bf16"]),
    "num_evals": st.sampled_from([4, 20]),
    "distill": st.none() | st.builds(SequenceDistillation, samples=JOB, fraction=st.sampled_from([0.5, 0.75])),
    "wd_schedule": st.sampled_from(["constant", "antiphase"]),
    "teach": st.none()
    | st.builds(
        SoftTargetDistillation,
        source=JOB,
        kd_weight=st.sampled_from([0.5, 0.9]),
        temperature=st.sampled_from([1.0, 2.0]),
    ),
    "init_from": st.none() | JOB | st.just("some/folder"),
    "holdout_tokens": st.sampled_from([0, 512, 2048]),
    "weight_averaging": st.sampled_from(["last", "ema", "swa"]),
    "averaging_window": st.sampled_from([0.1, 0.2]),
    "dropout": st.sampled_from([0.0, 0.1]),
    "input_mask_prob": st.sampled_from([0.0, 0.1, 0.5]),
    "residual": st.sampled_from(["float32", "bfloat16"]),
    "regularizer": st.sampled_from([None, RandomTokens(), RandomTokens(share=0.3), OrthogonalStep(), GradientNorm()]),
    "anchor": st.sampled_from([None, Anchor(strength=0.3), Anchor(strength=1.0), Anchor(strength=0.3, fisher=True)]),
    "replay": st.sampled_from([0.0, 0.1, 0.25]),
}


def valid(**fields: Any) -> Run:
    """A run whose residual stream is not narrower than its precision, and that has an old text if it needs one."""
    if fields["init_from"] in (None, "some/folder"):
        fields |= {"anchor": None, "replay": 0.0}
    if fields["distill"]:
        fields |= {"replay": 0.0}
    return Run(**fields if fields["residual"] == "float32" else fields | {"precision": "bf16"})


RUNS = st.builds(valid, **CHOICES)


@pytest.mark.parametrize("field", [field.name for field in fields(Run) if field.name != "name"])
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_runs_that_differ_in_one_field_have_different_names(field: str, data: st.DataObject) -> None:
    one = data.draw(RUNS)
    if field in ("anchor", "replay"):
        one = replace(one, init_from="a-s0", distill=None)
    if field in ("init_from", "distill"):
        one = replace(one, anchor=None, replay=0.0)
    changed = {field: data.draw(CHOICES[field].filter(lambda value: value != getattr(one, field)))}
    assume(field != "precision" or one.residual == "float32")
    assume(field != "residual" or one.precision == "bf16")
    other = replace(one, **changed)
    base = DEMO.base
    assert named_run(one, base).name != named_run(other, base).name


@given(one=RUNS, other=RUNS, base=RUNS)
@settings(max_examples=100, deadline=None)
def test_names_of_runs_tell_them_apart_whatever_the_base(one: Run, other: Run, base: Run) -> None:
    first, second = named_run(one, base), named_run(other, base)
    assert (first.name == second.name) == (one == other)
    assert len(first.name) < LONGEST, "short enough for a file name"
    assert replace(first, name="unnamed") == one, "only the name is set"


@pytest.mark.parametrize("base", KINDS, ids=str)
def test_optimizers_are_told_apart_whatever_that_of_the_scale(base: Optimizer) -> None:
    scale, point = replace(DEMO, optimizer=base), Point(lr=0.01, epochs=1, wd=0.1)
    assert len({scale.run("w16", 24576, point, optimizer=kind).name for kind in KINDS}) == len(KINDS)
    assert scale.run("w16", 24576, point).name == "w16-24.576k-lr0.01-ep1-wd0.1-s0"


def test_editing_the_clip_of_an_arm_changes_the_name() -> None:
    point = Point(lr=0.01, epochs=1, wd=0.1)
    names = [
        DEMO.run("w16", 24576, point, optimizer=Spectra(base=AdamW(), clip=clip)).name for clip in (2.0, 3.0, 10.0)
    ]
    assert len(set(names)) == 3
    assert names[0] == "w16-24.576k-lr0.01-ep1-wd0.1-spectra-adamw-clip2-s0"


MEMBERS = st.lists(
    st.builds("{}-s{}".format, st.sampled_from(["a", "b"]), st.integers(0, 5)), min_size=1, max_size=4, unique=True
).map(tuple)
ENSEMBLES = st.builds(
    lambda runs, average, data, tasks, weights: named_ensemble(
        runs, average, data=data, tasks=tasks, member_weights=(1.0, *[0.0] * (len(runs) - 1)) if weights else None
    ),
    MEMBERS,
    st.sampled_from(["logits", "probs", "parameters"]),
    st.none() | st.sampled_from(["kjv", "docs-kjv"]),
    st.sampled_from([(), ("cloze",), ("cloze", "next_passage")]),
    st.booleans(),
)
SAMPLES = st.builds(
    named_samples,
    JOB,
    st.integers(1, 10**9),
    st.integers(2, 99),
    draw=st.sampled_from(["members", "average"]),
    seed=st.integers(0, 2),
    temperature=st.sampled_from([1.0, 0.5]),
)
TARGETS = st.builds(named_targets, JOB, st.integers(128, 10**9), st.sampled_from([64, 128]), st.integers(1, 99))


@given(jobs=st.lists(ENSEMBLES, max_size=8) | st.lists(SAMPLES, max_size=8) | st.lists(TARGETS, max_size=8))
@settings(max_examples=100, deadline=None)
def test_ensembles_samples_and_targets_of_one_name_are_equal(jobs: list[Any]) -> None:
    assert len({job.name for job in jobs}) == len(set(jobs))
    assert all(len(job.name) < LONGEST for job in jobs)


def test_members_with_consecutive_seeds_are_named_by_their_range() -> None:
    assert named_ensemble(("a-s0", "a-s1", "a-s2"), "logits").name == "a-s0-2-logits"
    assert named_ensemble(("a-s4",), "probs", data="docs-kjv").name == "a-s4-probs-on-docs-kjv"


@given(tokens=st.integers(1, 10**15 - 1))
def test_token_counts_are_shortened_without_loss(tokens: int) -> None:
    text = short_count(tokens)
    size = {"k": 3, "m": 6, "b": 9}.get(text[-1], 0)
    whole, _, part = text.rstrip("kmb").partition(".")
    assert int(whole + part.ljust(size, "0")) == tokens
    assert len(text) <= len(str(tokens)) + 2
