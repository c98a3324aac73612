"""Owners are balanced by cost, and a layout that does not hold every element once is detected; without processes."""

import random

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from epochal.distributed import layout
from epochal.distributed.layout import (
    Entry,
    Span,
    assign_owners,
    coverage_problems,
    locate_flat,
    locate_slices,
    matrix_cost,
)
from epochal.distributed.sharding import Replicated, Sharded, needs_whole
from epochal.optim import Fira, Muon, Spectra


@pytest.mark.parametrize("world", [1, 2, 4, 7, 64])
def test_the_most_loaded_owner_is_at_most_a_tenth_above_the_mean(world: int) -> None:
    rng = random.Random(world)
    shapes = [(rng.randrange(8, 64), rng.randrange(8, 64)) for _ in range(8 * world)]
    owners = assign_owners(shapes, world)
    load = [sum(matrix_cost(s) for s, owner in zip(shapes, owners, strict=True) if owner == r) for r in range(world)]
    assert max(load) <= (sum(load) / world) * 1.1
    assert owners == assign_owners(shapes, world), "it depends on shapes only"


def test_the_owner_of_one_huge_matrix_gets_no_other() -> None:
    owners = assign_owners([(8, 8), (512, 512), (8, 8), (8, 8)], 2)
    assert owners[1] not in (owners[0], owners[2], owners[3])


def test_the_cost_of_a_matrix_is_that_of_its_gram_matrix() -> None:
    assert matrix_cost((3, 5)) == 3 * 5 * 3
    assert matrix_cost((4, 3, 5)) == 4 * 3 * 5 * 3
    assert matrix_cost((7,)) == 7


ENTRIES = [Entry(name, torch.empty(0), 0, torch.Size(shape), 0) for name, shape in (("a", (2, 3)), ("b", (4,)))]
GOOD = [[Span(0, 0, 4, 0)], [Span(0, 4, 6, 0), Span(1, 0, 4, 2)]]


def test_a_layout_that_holds_every_element_once_has_no_problem() -> None:
    assert coverage_problems(GOOD, ENTRIES) == []
    assert coverage_problems([GOOD[0], GOOD[1][:1]], ENTRIES) == [], "b may lie in another shard"


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        ([[Span(0, 0, 4, 0)], [Span(0, 5, 6, 0)]], "elements of a"),
        ([[Span(0, 0, 4, 0)], [Span(0, 3, 6, 0)]], "elements of a"),
        ([[Span(0, 0, 4, 0)], []], "elements of a"),
        ([[Span(0, 0, 6, 0), Span(1, 0, 4, 5)], []], "overlap"),
    ],
)
def test_gaps_and_overlaps_are_named(layout: list[list[Span]], problem: str) -> None:
    assert problem in coverage_problems(layout, ENTRIES)[0]


def parameters() -> list[tuple[str, torch.nn.Parameter]]:
    return [("matrix", torch.nn.Parameter(torch.ones(4, 3))), ("vector", torch.nn.Parameter(torch.ones(3)))]


def test_each_optimizer_declares_which_parameters_it_needs_whole() -> None:
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
        needs = [needs_whole(optimizer, p, group) for group in optimizer.param_groups for p in group["params"]]
        assert needs == expected, optimizer


def test_an_unknown_optimizer_is_refused() -> None:
    named = parameters()
    with pytest.raises(ValueError, match="Adafactor may need whole matrices"):
        Replicated(torch.optim.Adafactor([p for _, p in named]), named)


def test_momentum_that_starts_from_whole_weights_is_refused_if_weights_are_sharded() -> None:
    named = parameters()
    with pytest.raises(ValueError, match="compat='upstream'"):
        Sharded(Spectra(named, 1e-2, base="signum", compat="upstream"), named, "zero2")


def test_a_model_built_under_zero_init_is_refused() -> None:
    """Every parameter looks one-dimensional to it, so DeepSpeed's own Muon treated none as a matrix."""
    named = parameters()
    named[0][1].ds_shape = torch.Size((4, 3))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"zero\.Init"):
        Sharded(Spectra(named, 1e-2), named, "zero3")


def test_an_optimizer_copied_to_other_tensors_keeps_its_hyperparameters_and_leaves_the_original_alone() -> None:
    named = parameters()
    optimizer = Fira([{"params": [named[0][1]], "rank": 2, "alpha": 0.5}, {"params": [named[1][1]]}], lr=0.3)
    local_param = torch.zeros(4, 3)
    other = optimizer.rebind({named[0][1]: local_param})
    assert other.param_groups[0]["params"] == [local_param] and other.param_groups[1]["params"] == []
    assert other.param_groups[0]["alpha"] == 0.5 and other.param_groups[0]["lr"] == 0.3
    local_param.grad = torch.ones(4, 3)
    other.step()
    assert local_param.abs().min() > 0 and not optimizer.state and torch.equal(named[0][1], torch.ones(4, 3))


def test_a_flat_shard_with_other_values_than_the_model_is_a_mismatch() -> None:
    buffer = torch.arange(10.0)
    entries = [Entry("p", buffer[:6], 0, torch.Size([6]), None), Entry("q", buffer[6:], 0, torch.Size([4]), None)]
    shard = buffer[5:].clone()
    spans = [Span(0, 5, 6, 0), Span(1, 0, 4, 1)]
    assert locate_flat(shard, list(enumerate(entries)), 1) == (spans, None)
    shard[3] = 0.0
    assert locate_flat(shard, list(enumerate(entries)), 1) == (spans, "the shard holds other values than q")


def test_uninitialized_padding_is_not_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rank of ZeRO-3 holds padding, which may be NaN."""
    import deepspeed.utils

    parameter = torch.nn.Parameter(torch.arange(5.0))
    entry = Entry("p", parameter, 0, parameter.shape, None)
    monkeypatch.setattr(deepspeed.utils, "safe_get_local_fp32_param", lambda p: torch.tensor([3.0, 4.0, torch.nan]))
    shard = torch.tensor([3.0, 4.0, 7.0])
    assert locate_slices(shard, [(0, entry)], 1) == ([Span(0, 3, 5, 0)], None)
    shard[1] = 5.0
    assert locate_slices(shard, [(0, entry)], 1)[1] == "the shard holds other values than p"
    assert locate_slices(shard[:2], [(0, entry)], 1)[1] == "the shard holds other values than p"


def test_a_rank_that_holds_only_padding_has_empty_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five elements in slices of two: the last of four ranks has none, and the next parameter follows the padding."""
    import deepspeed.utils

    entries = [
        Entry(name, torch.nn.Parameter(torch.zeros(n)), 0, torch.Size([n]), None) for name, n in (("p", 5), ("q", 8))
    ]
    local = {5: torch.full((2,), torch.nan), 8: torch.tensor([1.0, 2.0])}
    monkeypatch.setattr(deepspeed.utils, "safe_get_local_fp32_param", lambda parameter: local[parameter.numel()])
    shard = torch.tensor([7.0, 7.0, 1.0, 2.0])
    assert locate_slices(shard, list(enumerate(entries)), 3) == ([Span(0, 6, 6, 0), Span(1, 6, 8, 2)], None)


class Placed:
    """A tensor of which this rank holds a part."""

    def __init__(self, local: torch.Tensor, *placements: object) -> None:
        self.local, self.placements = local, placements

    def to_local(self) -> torch.Tensor:
        return self.local


def test_rows_are_located_where_torch_chunks_them(monkeypatch: pytest.MonkeyPatch) -> None:
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
