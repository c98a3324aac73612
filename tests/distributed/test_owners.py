"""Owners are balanced by cost; a layout that does not hold every element once is noticed. No processes are needed."""

import random

import pytest
import torch

from epochal.optim import Fira, Muon, Spectra
from epochal.optim.layout import Entry, Span, assign_owners, locate_slices, matrix_cost, uncovered
from epochal.optim.sharding import Replicated, Sharded, needs_whole


@pytest.mark.parametrize("world", [1, 2, 4, 7, 64])
def test_the_busiest_owner_has_little_more_than_its_share(world: int) -> None:
    rng = random.Random(world)
    shapes = [(rng.randrange(8, 64), rng.randrange(8, 64)) for _ in range(8 * world)]
    owners = assign_owners(shapes, world)
    load = [sum(matrix_cost(s) for s, owner in zip(shapes, owners, strict=True) if owner == r) for r in range(world)]
    assert max(load) <= (sum(load) / world) * 1.1
    assert owners == assign_owners(shapes, world), "a function of shapes alone"


def test_one_huge_matrix_has_an_owner_for_itself() -> None:
    owners = assign_owners([(8, 8), (512, 512), (8, 8), (8, 8)], 2)
    assert owners[1] not in (owners[0], owners[2], owners[3])


def test_the_cost_of_a_matrix() -> None:
    assert matrix_cost((3, 5)) == 3 * 5 * 3
    assert matrix_cost((4, 3, 5)) == 4 * 3 * 5 * 3
    assert matrix_cost((7,)) == 7


ENTRIES = [Entry(name, torch.empty(0), 0, torch.Size(shape), 0) for name, shape in (("a", (2, 3)), ("b", (4,)))]
GOOD = [[Span(0, 0, 4, 0)], [Span(0, 4, 6, 0), Span(1, 0, 4, 2)]]


def test_a_layout_that_holds_every_element_once_is_sound() -> None:
    assert uncovered(GOOD, ENTRIES) == []
    assert uncovered([GOOD[0], GOOD[1][:1]], ENTRIES) == [], "b may lie in another shard"


@pytest.mark.parametrize(
    ("layout", "word"),
    [
        ([[Span(0, 0, 4, 0)], [Span(0, 5, 6, 0)]], "elements of a"),
        ([[Span(0, 0, 4, 0)], [Span(0, 3, 6, 0)]], "elements of a"),
        ([[Span(0, 0, 4, 0)], []], "elements of a"),
        ([[Span(0, 0, 6, 0), Span(1, 0, 4, 5)], []], "overlap"),
    ],
)
def test_gaps_and_overlaps_are_named(layout: list[list[Span]], word: str) -> None:
    assert word in uncovered(layout, ENTRIES)[0]


def parameters() -> list[tuple[str, torch.nn.Parameter]]:
    return [("matrix", torch.nn.Parameter(torch.ones(4, 3))), ("vector", torch.nn.Parameter(torch.ones(3)))]


def test_who_needs_whole_matrices() -> None:
    named = parameters()
    tensors = [p for _, p in named]
    groups = [{"params": tensors[:1], "rank": 2}, {"params": tensors[1:]}]
    for optimizer, expected in (
        (Spectra(named, 1e-2), [True, False]),
        (Spectra(named, 1e-2, apply_to="all"), [True, True]),
        (Spectra(named, 1e-2, apply_to=["vector"], base="mars"), [True, True]),
        (Spectra(named, 1e-2, apply_to=["vector"]), [False, True]),
        (Spectra(named, 1e-2, apply_to=["vector"], pre_clip=1.0), [True, True]),
        (Muon(tensors), [True, False]),
        (Fira(groups), [True, False]),
        (torch.optim.AdamW(tensors), [False, False]),
    ):
        found = [needs_whole(optimizer, p, group) for group in optimizer.param_groups for p in group["params"]]
        assert found == expected, optimizer


def test_optimizers_of_which_nothing_is_known_are_refused() -> None:
    named = parameters()
    with pytest.raises(ValueError, match="Adafactor may need whole matrices"):
        Replicated(torch.optim.Adafactor([p for _, p in named]), named)


def test_momentum_that_starts_from_whole_weights_is_refused_where_there_are_none() -> None:
    named = parameters()
    with pytest.raises(ValueError, match="compat='upstream'"):
        Sharded(Spectra(named, 1e-2, base="signum", compat="upstream"), named, "zero2")


def test_a_model_built_under_zero_init_is_refused() -> None:
    """There every parameter looks one-dimensional, so that DeepSpeed's own Muon treated none as a matrix."""
    named = parameters()
    named[0][1].ds_shape = torch.Size((4, 3))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"zero\.Init"):
        Sharded(Spectra(named, 1e-2), named, "zero3")


def test_stand_ins_keep_numbers_and_leave_the_original_alone() -> None:
    named = parameters()
    optimizer = Fira([{"params": [named[0][1]], "rank": 2, "alpha": 0.5}, {"params": [named[1][1]]}], lr=0.3)
    stand_in = torch.zeros(4, 3)
    other = optimizer.over({named[0][1]: stand_in})
    assert other.param_groups[0]["params"] == [stand_in] and other.param_groups[1]["params"] == []
    assert other.param_groups[0]["alpha"] == 0.5 and other.param_groups[0]["lr"] == 0.3
    stand_in.grad = torch.ones(4, 3)
    other.step()
    assert stand_in.abs().min() > 0 and not optimizer.state and torch.equal(named[0][1], torch.ones(4, 3))


def test_padding_that_nobody_has_written_is_no_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last process of ZeRO-3 holds padding, and its copies of it need not be equal: it may be NaN."""
    import deepspeed.utils

    parameter = torch.nn.Parameter(torch.arange(5.0))
    entry = Entry("p", parameter, 0, parameter.shape, None)
    monkeypatch.setattr(deepspeed.utils, "safe_get_local_fp32_param", lambda p: torch.tensor([3.0, 4.0, torch.nan]))
    shard = torch.tensor([3.0, 4.0, 7.0])
    assert locate_slices(shard, [(0, entry)], 1) == ([Span(0, 3, 5, 0)], None)
    shard[1] = 5.0
    assert locate_slices(shard, [(0, entry)], 1)[1] == "the shard holds other values than p"
    assert locate_slices(shard[:2], [(0, entry)], 1)[1] == "the shard holds other values than p"
