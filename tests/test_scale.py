"""Scales: names of their runs, changed fields by name, and settings that could never work."""

from dataclasses import replace
from pathlib import Path

import pytest

from epochal.config import REPOSITORY
from epochal.run import AdamW, Fira, Spectra
from epochal.scale import Point, Rung, Scale, load_scale, with_field

POINT = Point(lr=0.01, epochs=16, wd=3.2)


@pytest.fixture(scope="module")
def demo() -> Scale:
    return load_scale("demo")


def test_a_run_is_named_by_its_point_and_what_differs(demo: Scale) -> None:
    plain = demo.run("w64", 24576, POINT)
    assert plain.name == "w64-24.576k-lr0.01-ep16-wd3.2-s0"
    assert demo.run("w64", 24576, replace(POINT, more=(("beta2", 0.95), ("warmup", demo.warmup)))) == plain
    other = demo.run("w64", 24576, replace(POINT, more=(("beta2", 0.99), ("warmup", 0.1))), seed=2)
    assert other.name == "w64-24.576k-lr0.01-ep16-wd3.2-beta20.99-warmup0.1-s2"
    assert (other.warmup, other.optimizer) == (0.1, AdamW(lr=0.01, wd=3.2, beta2=0.99))


def test_fields_are_changed_by_name_inside_the_optimizer_too(demo: Scale) -> None:
    run = demo.run("w64", 24576, POINT, optimizer=Spectra(base=AdamW()))
    for name in ("clip", "optimizer.clip"):
        assert with_field(run, name, 2.0).optimizer == Spectra(base=AdamW(lr=0.01, wd=3.2), clip=2.0)
    inner = with_field(run, "optimizer.base.beta2", 0.99).optimizer
    assert inner == Spectra(base=AdamW(lr=0.01, wd=3.2, beta2=0.99))
    with pytest.raises(ValueError, match=r"'betta2' is not a field of AdamW \(did you mean 'beta2'\?\)"):
        with_field(demo.run("w64", 24576, POINT), "betta2", 0.9)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ladder": (Rung(model="w16"),)}, "smallest size 'w16' needs lr and epochs"),
        ({"ladder": ()}, "ladder is empty"),
        ({"search_mode": "random"}, "sequential, parallel"),
        ({"standard_wd": 0.3}, r"standard_wd 0.3 is not in grid.wd"),
        ({"unique_tokens": (1000,)}, "unique_tokens 1000"),
        (
            {"ladder": (Rung(model="w16", lr=0.01, epochs=4, unique_tokens=(512,)),)},
            "give it some of the scale's .24576",
        ),
        ({"optimizer": AdamW(lr=0.1)}, r"\[optimizer\] must not set lr or wd"),
        ({"optimizer": Spectra(base=AdamW(wd=0.3))}, r"\[optimizer\] must not set lr or wd"),
    ],
)
def test_a_scale_that_could_never_run_is_refused(demo: Scale, change: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        replace(demo, **change)  # type: ignore[arg-type]


def test_a_size_may_have_fewer_budgets_than_its_scale(demo: Scale) -> None:
    tokens = (24576, 12288)
    small, *others = (replace(rung, unique_tokens=()) for rung in demo.ladder)
    scale = replace(demo, unique_tokens=tokens, ladder=(small, *(replace(r, unique_tokens=tokens[:1]) for r in others)))
    assert [scale.models_at(each) for each in tokens] == [demo.models, demo.models[:1]]
    assert scale.smaller(demo.models[1], tokens[0]) == demo.models[0]
    with pytest.raises(ValueError, match="no size below 'w64' at D = 12,288"):
        replace(scale, ladder=(replace(small, unique_tokens=tokens[:1]), Rung(model="w64"))).smaller("w64", tokens[1])


def test_tables_of_recipes_and_the_optimizer_are_read(tmp_path: Path) -> None:
    text = (REPOSITORY / "configs" / "scales" / "demo.toml").read_text()
    path = tmp_path / "own.toml"
    path.write_text(f'{text}\n[optimizer]\nkind = "Fira"\nrank = 4\n')
    scale = load_scale(str(path))
    assert (scale.name, scale.optimizer) == ("own", Fira(rank=4))
    assert scale.tables["ensembling"] == {"models": ["w64"], "count": 4}
    path.write_text("seedz = 3\n" + text)
    with pytest.raises(ValueError, match=r"unknown key 'seedz' \(did you mean 'seeds'\?\)"):
        load_scale(str(path))
