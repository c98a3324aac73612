"""Which rank owns which matrix, and which elements of which parameter a rank holds.

A layout is a list of spans per rank. Under ZeRO and FSDP2 it is derived without DeepSpeed's private attributes: from
storage offsets for ZeRO-1 and -2, from the public `safe_get_local_fp32_param` for ZeRO-3, from placements for FSDP2. It
is checked twice: by value (the shard equals the model's elements) and by coverage (each element is held exactly once).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


class Entry(NamedTuple):
    """One parameter; without an `owner`, each rank steps its piece of it."""

    name: str
    parameter: Tensor
    group: int
    shape: torch.Size  # the true one, also where the backend keeps a flat shard
    owner: int | None  # the rank that steps it whole


class Span(NamedTuple):
    """Elements [start, stop) of parameter number `entry`, at `offset` in a rank's shard."""

    entry: int
    start: int
    stop: int
    offset: int


def assign_owners(shapes: Sequence[Sequence[int]], world: int) -> list[int]:
    """Return the owner of each matrix (..., m, n): the costliest first, each to the least loaded rank.

    The cost of a matrix is m n min(m, n), as for a product with its Gram matrix.
    """
    load = [0] * world
    owner = [0] * len(shapes)
    # Ties are broken by index and rank, so that every rank computes the same owners.
    for index in sorted(range(len(shapes)), key=lambda i: (-matrix_cost(shapes[i]), i)):
        owner[index] = min(range(world), key=lambda rank: (load[rank], rank))
        load[owner[index]] += matrix_cost(shapes[index])
    return owner


def matrix_cost(shape: Sequence[int]) -> int:
    """Return m n min(m, n) of (..., m, n), times the number of matrices; n for a vector."""
    if len(shape) < 2:
        return int(torch.Size(shape).numel())
    # numel counts the leading axes too: several matrices in one tensor.
    return int(torch.Size(shape).numel()) * min(shape[-2:])


# The spans of this rank, and what is wrong with them (None: nothing).
Located = tuple[list[Span], str | None]


def locate_flat(shard: Tensor, members: list[tuple[int, Entry]], rank: int) -> Located:
    """ZeRO-1 and -2: the model's parameters are views of one buffer, of which rank r holds the r-th equal part."""
    first, spans, problem = rank * shard.numel(), list[Span](), None
    for index, entry in members:
        begin = int(entry.parameter.storage_offset())
        start = max(0, first - begin)
        stop = min(entry.shape.numel(), first + shard.numel() - begin)
        if start < stop:
            spans.append(Span(index, start, stop, begin + start - first))
            live = entry.parameter.detach().reshape(-1)[start:stop]
            held = shard.detach().narrow(0, spans[-1].offset, stop - start)
            if not torch.equal(held.to(live), live):
                problem = f"the shard holds other values than {entry.name}"
    return spans, problem


def locate_slices(shard: Tensor, members: list[tuple[int, Entry]], rank: int) -> Located:
    """ZeRO-3: rank r holds the r-th equal slice of every parameter, one after the other; the end is padding.

    `members`: the parameters of the group from the first of this shard on.
    """
    from deepspeed.utils import safe_get_local_fp32_param

    spans, offset = list[Span](), 0
    for index, entry in members:
        if offset >= shard.numel():
            break
        local = safe_get_local_fp32_param(entry.parameter).reshape(-1)
        start = rank * local.numel()
        # A rank may hold padding alone; its empty span still records that the parameter is in this shard.
        stop = max(start, min(start + local.numel(), entry.shape.numel()))
        # Padding is uninitialized memory: it may be NaN, so it is not compared.
        held, live = shard.detach()[offset : offset + stop - start], local[: stop - start]
        if offset + local.numel() > shard.numel() or not torch.equal(held, live.to(held)):
            return spans, f"the shard holds other values than {entry.name}"
        spans.append(Span(index, start, stop, offset))
        offset += local.numel()
    return spans, None


def locate_rows(entries: Sequence[Entry], rank: int, world: int) -> Located:
    """FSDP2: Shard(0) gives rank r the r-th of torch.chunk's parts of the rows."""
    spans, offset = list[Span](), 0
    for index, entry in enumerate(entries):
        parameter = entry.parameter
        if not isinstance(parameter, DTensor) or tuple(parameter.placements) != (Shard(0),):
            return [], f"{entry.name} is placed as {getattr(parameter, 'placements', 'a plain tensor')}, not by rows"
        length, row = parameter.to_local().numel(), entry.shape[1:].numel()
        # torch.chunk rounds the rows of a part up, so the last ranks may have fewer rows or none.
        start = rank * -(-entry.shape[0] // world) * row
        if length:
            spans.append(Span(index, start, start + length, offset))
        offset += length
    return spans, None


def coverage_problems(layout: list[list[Span]], entries: Sequence[Entry]) -> list[str]:
    """Return one sentence for each parameter whose elements are not each held once."""
    spans_of: dict[int, list[Span]] = {}
    for spans in layout:
        for span in spans:
            spans_of.setdefault(span.entry, []).append(span)
        # Two parameters must not share elements of a shard.
        ordered = sorted(spans, key=lambda span: span.offset)
        for one, other in pairwise(ordered):
            if one.offset + one.stop - one.start > other.offset:
                return [f"{entries[one.entry].name} and {entries[other.entry].name} overlap in a shard"]
    problems = []
    for index, spans in spans_of.items():
        end = 0
        # Over all ranks the spans of a parameter must join without gap or overlap.
        for span in sorted(spans, key=lambda span: span.start):
            if span.start != end:
                break
            end = span.stop
        if end != entries[index].shape.numel():
            problems.append(f"the elements of {entries[index].name} are not each held once")
    return problems
