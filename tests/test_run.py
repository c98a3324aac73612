"""Run, Ensemble and Samples: what they refuse, what they count, and what their fingerprints see."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from epochal.config import from_table, to_table
from epochal.run import (
    AdamW,
    AdEMAMix,
    Anchor,
    Ensemble,
    Fira,
    Job,
    Lion,
    Mars,
    Muon,
    RandomTokens,
    Run,
    Samples,
    SequenceDistillation,
    Signum,
    SoftTargetDistillation,
    Spectra,
    Targets,
    config_hash,
    fingerprint,
    inputs,
)

OPTIMIZERS = [
    AdamW(lr=0.01),
    Signum(lr=0.01),
    AdEMAMix(lr=0.01),
    Mars(lr=0.01),
    Lion(lr=0.01),
    Muon(lr=0.01),
    Fira(lr=0.01),
    Fira(lr=0.01, variant="galore", rank=4, patterns=("q_proj",)),
    Spectra(base=AdamW(lr=0.01)),
    Spectra(base=Signum(lr=0.01)),
    Spectra(base=Mars(lr=0.01), apply_to=("attn", "mlp"), pre_clip=0.1),
]


def a_run(**changes: object) -> Run:
    values = {
        "name": "a",
        "model": "w16",
        "data": "kjv",
        "unique_tokens": 4096,
        "epochs": 4,
        "batch_size": 4,
        "sequence_length": 32,
        "optimizer": AdamW(lr=0.01),
    }
    return Run(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "a b"),
        ("name", "../a"),
        ("name", ".a"),
        ("data_order", "shuffled"),
        ("wd_schedule", "cosine"),
        ("precision", "fp8"),
        ("unique_tokens", 0),
        ("unique_tokens", 4100),
        ("epochs", 0),
        ("batch_size", 0),
        ("sequence_length", 1),
        ("num_evals", 0),
        ("warmup", 1.0),
        ("warmup", -0.1),
        ("warmup", float("nan")),
        ("weight_averaging", "mean"),
        ("averaging_window", 0.0),
        ("averaging_window", 1.5),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("input_mask_prob", 1.0),
        ("residual", "bf16"),
        ("holdout_tokens", 100),
        ("holdout_tokens", 4096),
        ("holdout_tokens", -128),
    ],
)
def test_a_run_refuses_bad_values_in_one_sentence(field: str, value: object) -> None:
    with pytest.raises(ValueError) as caught:
        a_run(**{field: value})
    message = str(caught.value)
    assert field in message
    assert repr(value) in message
    assert message.endswith(".")
    assert "\n" not in message


def test_the_sentence_for_a_budget_that_the_batch_does_not_divide_names_budgets_that_fit() -> None:
    with pytest.raises(ValueError, match=r"use 4096 or 4224"):
        a_run(unique_tokens=4100)
    assert a_run(unique_tokens=4224).steps_per_epoch == 33
    with pytest.raises(ValueError, match=r"use 128 or 256"):
        a_run(unique_tokens=100)


@pytest.mark.parametrize("field", ["lr", "wd"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_adamw_refuses_negative_rates(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        AdamW(**{"lr": 0.1, field: value})


@pytest.mark.parametrize(
    ("kind", "changes", "word"),
    [
        (Signum, {"momentum": 1.0}, "momentum must be a number from 0 to below 1, got 1.0"),
        (AdEMAMix, {"beta3": -0.1}, "beta3 must be a number from 0 to below 1, got -0.1"),
        (AdEMAMix, {"warmup": 1.5}, "warmup must be a number from 0 to 1, got 1.5"),
        (Fira, {"variant": "apollo"}, "variant is 'apollo'"),
        (Fira, {"refresh": "qr"}, "refresh is 'qr'"),
        (Fira, {"rank": 0}, "rank must be an integer from 1 to 1,048,576, got 0"),
        (Fira, {"gap": 0}, "gap must be an integer from 1 to 1,000,000,000, got 0"),
        (Muon, {"wd": -1.0}, "wd must be a number from 0 to 10000, got -1.0"),
    ],
)
def test_an_optimizer_refuses_what_no_step_could_follow(kind: type, changes: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        kind(lr=0.01, **changes)


@pytest.mark.parametrize(
    "changes", [{"clip": 0.0}, {"pre_clip": -1.0}, {"operator": "firm"}, {"clip_decay": "step"}, {"apply_to": "1d"}]
)
def test_spectra_refuses_bad_values(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        Spectra(base=AdamW(lr=0.01), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda item: type(item).__name__)
def test_every_optimizer_survives_the_record_and_has_a_fingerprint_of_its_own(optimizer: AdamW) -> None:
    run = a_run(optimizer=optimizer)
    table = json.loads(json.dumps(to_table(run)))
    assert table["optimizer"]["kind"] == type(optimizer).__name__
    assert from_table(table, Run, where="job") == run
    others = {fingerprint(a_run(optimizer=other)) for other in OPTIMIZERS if other != optimizer}
    assert len(others) == len(OPTIMIZERS) - 1
    assert fingerprint(a_run(optimizer=optimizer)) not in others


def test_spectra_has_the_rates_of_its_base() -> None:
    run = a_run(optimizer=Spectra(base=Signum(lr=0.01, wd=2.0)))
    assert (run.optimizer.lr, run.optimizer.wd) == (0.01, 2.0)
    assert run.tau == a_run(optimizer=AdamW(lr=0.01, wd=2.0)).tau


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01, 2.0])
def test_distill_refuses_a_share_that_leaves_no_sampled_text(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        SequenceDistillation(samples="s", fraction=fraction)


def test_sampled_text_alone_counts_epochs_of_as_many_tokens_as_the_real_ones() -> None:
    plain = a_run()
    alone = a_run(distill=SequenceDistillation(samples="s", fraction=1.0))
    assert alone.steps == plain.steps == plain.steps_per_epoch * plain.epochs


@pytest.mark.parametrize(
    "changes",
    [{"kd_weight": 0.0}, {"kd_weight": 1.1}, {"temperature": 0.0}, {"temperature": float("inf")}, {"mode": "live"}],
)
def test_teach_refuses_bad_values(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        SoftTargetDistillation(**{"source": "e", **changes})  # type: ignore[arg-type]


def test_cached_targets_need_an_order_that_keeps_the_cut() -> None:
    cached = SoftTargetDistillation(source="t", mode="cached")
    with pytest.raises(ValueError, match=r"temperature is 2.0; cached targets have 1"):
        SoftTargetDistillation(source="t", mode="cached", temperature=2.0)
    with pytest.raises(ValueError, match=r'packs the text differently.*use order "sequences" or "fixed"'):
        a_run(teach=cached)
    assert a_run(teach=cached, data_order="fixed").teach == a_run(teach=cached, data_order="sequences").teach
    with pytest.raises(ValueError, match="'s', for which there are no cached targets"):
        a_run(teach=cached, data_order="fixed", distill=SequenceDistillation(samples="s", fraction=0.5))


@pytest.mark.parametrize("changes", [{"keep": 0}, {"sequence_length": 1}, {"unique_tokens": 31}, {"name": "a/b"}])
def test_targets_refuse_bad_values(changes: dict[str, object]) -> None:
    values = {"name": "t", "source": "e", "unique_tokens": 64, "sequence_length": 32, **changes}
    with pytest.raises(ValueError, match=next(iter(changes))):
        Targets(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"runs": ()},
        {"runs": ("a", "a")},
        {"average": "median"},
        {"member_weights": (1.0,)},
        {"member_weights": (0.7, 0.7)},
        {"member_weights": (1.5, -0.5)},
    ],
)
def test_an_ensemble_refuses_bad_values(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        Ensemble(**{"name": "e", "runs": ("a", "b"), "average": "logits", **changes})  # type: ignore[arg-type]


def test_an_ensemble_has_no_default_way_to_average() -> None:
    with pytest.raises(TypeError, match="average"):
        Ensemble(name="e", runs=("a",))  # type: ignore[call-arg]


@pytest.mark.parametrize("changes", [{"tokens": 0}, {"max_length": 1}, {"temperature": 0.0}])
def test_samples_refuse_bad_values(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        Samples(**{"name": "s", "source": "a", "tokens": 10, "max_length": 10, **changes})  # type: ignore[arg-type]


def test_steps_and_window() -> None:
    run = a_run(optimizer=AdamW(lr=0.01, wd=2.0))
    assert (run.batch_tokens, run.steps_per_epoch, run.steps, run.tokens) == (128, 32, 128, 16384)
    assert run.tau == pytest.approx(1 / (0.01 * 2.0 * 32))
    assert a_run(optimizer=AdamW(lr=0.01, wd=0.0)).tau == float("inf")
    student = a_run(distill=SequenceDistillation(samples="s", fraction=0.75))
    assert student.steps == 4 * run.steps
    held = a_run(holdout_tokens=1024)
    assert (held.steps_per_epoch, held.steps, held.tokens) == (24, 96, 96 * 128)


def test_inputs() -> None:
    assert inputs(a_run()) == ()
    assert inputs(a_run(distill=SequenceDistillation(samples="s", fraction=0.5))) == ("s",)
    assert inputs(Ensemble(name="e", runs=("a", "b"), average="probs")) == ("a", "b")
    assert inputs(Samples(name="s", source="e", tokens=5, max_length=5)) == ("e",)
    assert inputs(Targets(name="t", source="e", unique_tokens=64, sequence_length=32)) == ("e",)
    reader = a_run(
        init_from="b", distill=SequenceDistillation(samples="s", fraction=0.5), teach=SoftTargetDistillation(source="e")
    )
    assert inputs(reader) == ("b", "s", "e")


def test_values_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        a_run().epochs = 3  # type: ignore[misc]


# --- fingerprints -------------------------------------------------------------------------------------------------------


def test_the_name_and_written_out_defaults_do_not_matter() -> None:
    plain = fingerprint(a_run())
    assert fingerprint(a_run(name="b")) == plain
    defaults = {
        field.name: field.default for field in dataclasses.fields(Run) if field.default is not dataclasses.MISSING
    }
    assert fingerprint(a_run(**defaults)) == plain
    assert fingerprint(a_run(optimizer=AdamW(lr=0.01, wd=0.1, beta1=0.9))) == plain


def test_every_field_matters() -> None:
    others = {
        "model": "w32",
        "unique_tokens": 8192,
        "epochs": 5,
        "batch_size": 8,
        "sequence_length": 64,
        "optimizer": AdamW(lr=0.02),
        "warmup": 0.02,
        "clip_norm": 2.0,
        "data_order": "fixed",
        "init_seed": 1,
        "order_seed": 1,
        "precision": "fp32",
        "num_evals": 3,
        "distill": SequenceDistillation(samples="s", fraction=0.5),
        "wd_schedule": "antiphase",
        "teach": SoftTargetDistillation(source="e"),
        "init_from": "b",
        "holdout_tokens": 128,
        "weight_averaging": "ema",
        "averaging_window": 0.2,
        "dropout": 0.1,
        "input_mask_prob": 0.5,
        "residual": "bfloat16",
        "regularizer": RandomTokens(),
        "anchor": Anchor(strength=0.01),
        "replay": 0.5,
    }
    start = {"anchor": "b", "replay": "b"}  # they need weights to start from
    assert {*others, "name", "data"} == {field.name for field in dataclasses.fields(Run)}
    marks = {fingerprint(a_run())}
    marks |= {fingerprint(a_run(**{"init_from": start.get(field), field: value})) for field, value in others.items()}
    marks.add(fingerprint(a_run(optimizer=AdamW(lr=0.01, wd=0.2))))
    assert len(marks) == len(others) + 2


def test_kinds_differ() -> None:
    jobs: list[Job] = [a_run(), Ensemble(name="e", runs=("a",), average="logits")]
    jobs += [Ensemble(name="e", runs=("a",), average="probs"), Samples(name="e", source="a", tokens=9, max_length=9)]
    assert len({fingerprint(job) for job in jobs}) == len(jobs)


def test_contents_of_model_and_data_files_matter_but_not_their_layout(tmp_path: Path) -> None:
    model, data = tmp_path / "m.json", tmp_path / "d.toml"
    model.write_text('{"a": 1, "b": 2}')
    data.write_text("a = 1\n")
    run = a_run(model=str(model), data=str(data))
    mark = fingerprint(run)

    model.write_text('{ "b": 2,\n "a": 1 }')
    data.write_text("# a comment\na    = 1\n")
    assert fingerprint(run) == mark

    data.write_text("a = 12345\n")
    changed = fingerprint(run)
    assert changed != mark
    model.write_text(json.dumps({"a": 1, "b": 333}))
    assert fingerprint(run) not in (mark, changed)


def test_an_unknown_model_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'ic-150'.*did you mean 'ic-150m'"):
        fingerprint(a_run(model="ic-150"))


def test_a_new_field_at_its_default_changes_no_fingerprint() -> None:
    """A field that the project adds later must leave old records valid, and count once it is set."""
    later = dataclasses.make_dataclass("Run", [("twist", int, 0)], bases=(Run,), frozen=True, kw_only=True)
    values = {field.name: getattr(a_run(), field.name) for field in dataclasses.fields(Run)}
    assert fingerprint(later(**values)) == fingerprint(a_run())
    assert fingerprint(later(**values, twist=1)) != fingerprint(a_run())


def test_the_reader_of_json_files_is_part_of_a_data_config_and_keeps_the_fingerprints_of_records(
    tmp_path: Path,
) -> None:
    """Records made before the key `reader` existed read .json files as API descriptions."""

    def digest(name: str, source: str) -> str:
        path = tmp_path / f"{name}.toml"
        path.write_text(f"[source]\n{source}\n[[more]]\n{source}\n")
        return config_hash(path)

    files = 'files = ["a/*.json.gz"]'
    table = {"source": {"files": ["a/*.json.gz"]}, "more": [{"files": ["a/*.json.gz"]}]}
    before = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
    assert digest("api", f'{files}\nreader = "api"') == before
    assert digest("none", files) == digest("records", f'{files}\nreader = "records"') != before
    folder = 'files = ["a"]'
    assert digest("folder", folder) == digest("folder-too", f'{folder}\nreader = "records"')
    assert digest("folder", folder) != digest("folder-api", f'{folder}\nreader = "api"')
    lines = 'files = ["a/*.jsonl"]'
    assert digest("lines", lines) == digest("lines-too", f'{lines}\nreader = "records"')
