"""Owners are balanced by cost; a layout that does not hold every element once is noticed. No processes are needed."""

import random

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from epochal.distributed import layout
from epochal.distributed.layout import Entry, Span, assign_owners, locate_slices, matrix_cost, uncovered
from epochal.distributed.sharding import Replicated, Sharded, needs_whole
from epochal.optim import Fira, Muon, Spectra


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
    other = optimizer.rebind({named[0][1]: stand_in})
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


def test_a_process_that_holds_nothing_but_padding_has_empty_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five elements in fours of two: the last of four processes has none, and the next parameter comes after its two."""
    import deepspeed.utils

    entries = [
        Entry(name, torch.nn.Parameter(torch.zeros(n)), 0, torch.Size([n]), None) for name, n in (("p", 5), ("q", 8))
    ]
    local = {5: torch.full((2,), torch.nan), 8: torch.tensor([1.0, 2.0])}
    monkeypatch.setattr(deepspeed.utils, "safe_get_local_fp32_param", lambda parameter: local[parameter.numel()])
    shard = torch.tensor([7.0, 7.0, 1.0, 2.0])
    assert locate_slices(shard, list(enumerate(entries)), 3) == ([Span(0, 6, 6, 0), Span(1, 6, 8, 2)], None)


class Placed:
    """A tensor of which this process holds a part."""

    def __init__(self, local: torch.Tensor, *placements: object) -> None:
        self.local, self.placements = local, placements

    def to_local(self) -> torch.Tensor:
        return self.local


def test_rows_are_where_torch_chunks_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "DTensor", Placed)
    wholes = [torch.arange(24.0).view(8, 3), torch.arange(5.0), torch.arange(2.0), torch.arange(42.0).view(7, 2, 3)]
    for world in (1, 2, 3, 4, 5, 9):
        for rank in range(world):
            chunks = [whole.chunk(world) for whole in wholes]
            locals_ = [c[rank] if rank < len(c) else whole[:0] for c, whole in zip(chunks, wholes, strict=True)]
            entries = [
                Entry(f"p{i}", Placed(local, Shard(0)), 0, whole.shape, None)  # type: ignore[arg-type]
                for i, (local, whole) in enumerate(zip(locals_, wholes, strict=True))
            ]
            spans, problem = layout.locate_rows(entries, rank, world)
            assert problem is None
            shard = torch.cat([local.reshape(-1) for local in locals_])
            assert [span.entry for span in spans] == [i for i, local in enumerate(locals_) if local.numel()]
            for entry, start, stop, offset in spans:
                held = shard[offset : offset + stop - start]
                assert torch.equal(held, wholes[entry].reshape(-1)[start:stop]) and len(held) == locals_[entry].numel()


@pytest.mark.parametrize("placements", [(Replicate(),), (Shard(1),), (Replicate(), Shard(0)), ()])
def test_other_placements_than_rows_are_refused(
    monkeypatch: pytest.MonkeyPatch, placements: tuple[object, ...]
) -> None:
    monkeypatch.setattr(layout, "DTensor", Placed)
    entry = Entry("p", Placed(torch.ones(4), *placements), 0, torch.Size([4, 2]), None)  # type: ignore[arg-type]
    spans, problem = layout.locate_rows([entry], 0, 2)
    assert spans == [] and problem is not None and problem.startswith("p is placed as") and "not by rows" in problem
