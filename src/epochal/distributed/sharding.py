"""Optimizers over many processes: every matrix goes whole to one owner, and its update comes back.

The mathematics knows nothing of it. Each process runs the same optimizer over *stand-ins*: a matrix that it owns, whole,
or its own piece of a parameter whose elements are independent of each other. So state lies on one process only, and
`Optimizer.step` of any `MatrixOptimizer`, or of torch's AdamW, is used as it is.

    Replicated   DDP and one process: weights and gradients are whole everywhere. The owner steps the parameter itself,
                 and broadcasts it.
    Sharded      ZeRO-1, -2, -3 and FSDP2: a process holds a flat piece of a parameter and of its averaged, clipped
                 gradient. Gradients of a matrix travel to its owner, which steps a matrix of zeros: what comes out is
                 the update, and travels back. W <- keep W + update, keep = 1 - lr wd, or 1 where the owner skipped.

Both exchanges are one all-to-all each, in float32: 8 N (W - 1) / W^2 bytes sent by each of W processes on average for N
elements in matrices, against 4 N (W - 1) / W for broadcasts. DeepSpeed calls `step` for one parameter group or part of
one at a time; every process takes part in every exchange, also one that owns nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from epochal.distributed.layout import (
    Entry,
    Found,
    Span,
    assign_owners,
    locate_flat,
    locate_rows,
    locate_slices,
    uncovered,
)
from epochal.optim.base import Group, MatrixOptimizer

ELEMENTWISE = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
"""Classes of torch that may step a piece of a parameter; any other that is not a `MatrixOptimizer` is refused."""


View = Callable[[Span], tuple[Tensor, Tensor]]
"""From a span of this process to its (values, gradient), flat; writing to the values changes the shard."""


class SavedState(Protocol):
    """Where a checkpoint's optimizer state is read from, by parameter name; both raise KeyError for a name not in it."""

    def whole(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a parameter stepped whole."""

    def piece(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        """Return elements [start, stop) of the state of a parameter stepped in pieces; 0-d tensors as they are."""


def over(optimizer: torch.optim.Optimizer, stand_ins: Mapping[Tensor, Tensor]) -> torch.optim.Optimizer:
    """Return an optimizer of the same rule and numbers, without state, over stand-ins for some of its parameters."""
    if isinstance(optimizer, MatrixOptimizer):
        return optimizer.rebind(stand_ins)
    groups = [
        {**_numbers(group), "params": [stand_ins[p] for p in group["params"] if p in stand_ins]}
        for group in optimizer.param_groups
    ]
    rebuilt: Any = type(optimizer)  # torch's own keep all their numbers in the groups
    found: torch.optim.Optimizer = rebuilt(groups)
    return found


def _numbers(group: Group) -> Group:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


class Distributed(torch.optim.Optimizer):
    """What `Replicated` and `Sharded` share: owners, groups, and state by name.

    optimizer: a `MatrixOptimizer` or torch's AdamW, built over whole parameters and not stepped yet.
    names: (name, parameter) pairs of all its parameters. Raises ValueError for an optimizer that cannot be shared out.
    """

    inner: torch.optim.Optimizer | None = None
    """The optimizer over this process's stand-ins, once it is known where they lie."""

    def __init__(self, optimizer: torch.optim.Optimizer, names: Iterable[tuple[str, Tensor]]) -> None:
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.rule, self.bytes_sent = optimizer, 0
        self._saved: SavedState | None = None
        self._groups: list[Group] = []
        super().__init__([{**_numbers(group), "params": list(group["params"])} for group in optimizer.param_groups], {})
        self.entries = self._entries({p: name for name, p in names})
        self.stand_ins: dict[int, Tensor] = {}
        self.stepped: set[int] = set()
        """Matrices that this process has stepped since somebody cleared the set."""

    def add_param_group(self, param_group: Group) -> None:
        """As torch's; a group carries its number, since DeepSpeed shows some groups and not others during a call."""
        super().add_param_group(param_group)
        self._groups.append(self.param_groups[-1])
        self._groups[-1]["number"] = len(self._groups) - 1

    def _entries(self, names: dict[Tensor, str]) -> list[Entry]:
        members = [(group, p) for group in self._groups for p in group["params"]]
        if any(hasattr(p, "ds_shape") for _, p in members):
            raise ValueError(
                "the model was built under deepspeed.zero.Init, where no parameter looks like a matrix; build it outside, "
                "and let Processes.prepare shard it."
            )
        whole = [p for group, p in members if needs_whole(self.rule, p, group)]
        owner = dict(zip(whole, assign_owners([p.shape for p in whole], self.world), strict=True))
        return [Entry(names[p], p, group["number"], p.shape, owner.get(p)) for group, p in members]

    @property
    def matrices(self) -> list[Entry]:
        """The parameters that are stepped whole, each by its owner."""
        return [entry for entry in self.entries if entry.owner is not None]

    # --- state that travels between numbers of processes and profiles ------------------------------------------------

    def named_state(self) -> dict[str, Tensor]:
        """Return this process's state: `name.key` of a matrix it owns, `name@start.key` of its piece of another.

        The union over processes is the state of the run; 0-d tensors of pieces are in it several times.
        """
        found: dict[str, Tensor] = {}
        for index, stand_in in self.stand_ins.items():
            entry, state = self.entries[index], self.inner.state.get(stand_in, {}) if self.inner else {}
            prefix = entry.name if entry.owner is not None else self._piece_name(index)
            for key, value in state.items() if prefix else ():
                flat = value.detach() if entry.owner is not None or value.ndim == 0 else value.detach().reshape(-1)
                found[f"{prefix}.{key}"] = flat.contiguous()
        return found

    def _piece_name(self, index: int) -> str | None:
        raise NotImplementedError

    def load_named_state(self, saved: SavedState) -> None:
        """Go on from a checkpoint of any number of processes and any profile."""
        self._saved = saved
        for index in self.stand_ins:
            self._load(index)

    def _load(self, index: int) -> None:
        """Take the state of one stand-in out of the checkpoint, if there is one."""
        if self._saved is None or self.inner is None:
            return
        entry, stand_in = self.entries[index], self.stand_ins[index]
        if entry.owner is not None:
            state = self._saved.whole(entry.name)
        else:
            start, stop = self._range(index)
            state = self._saved.piece(entry.name, start, stop)
        self.inner.state[stand_in] = {
            key: value.to(stand_in.device, copy=True).reshape(
                value.shape if self._keeps(entry, value) else stand_in.shape
            )
            for key, value in state.items()
        }

    @staticmethod
    def _keeps(entry: Entry, value: Tensor) -> bool:
        return entry.owner is not None or value.ndim == 0

    def _range(self, index: int) -> tuple[int, int]:
        return 0, self.entries[index].shape.numel()

    def state_bytes(self) -> int:
        """Bytes of optimizer state on this process."""
        states = self.inner.state.values() if self.inner else ()
        return sum(value.numel() * value.element_size() for state in states for value in state.values())

    # --- what the proof at the start needs ---------------------------------------------------------------------------

    def state_of(self, index: int) -> tuple[int, dict[str, Tensor]]:
        """Return where this process's part of a parameter begins, flat, and a copy of its state; nothing where it has none.

        Before the first step of a run that goes on, it is the checkpoint's, which each process can read whole.
        """
        entry, stand_in = self.entries[index], self.stand_ins.get(index)
        if stand_in is not None and self.inner is not None:
            state = {key: value.clone() for key, value in self.inner.state.get(stand_in, {}).items()}
            return (0 if entry.owner is not None else self._range(index)[0]), state
        if self._saved is None or self.stand_ins:
            return 0, {}
        saved = self._saved
        return 0, saved.whole(entry.name) if entry.owner is not None else saved.piece(
            entry.name, 0, entry.shape.numel()
        )

    @property
    def numbers(self) -> list[Group]:
        """Today's learning rate, weight decay and all else that a schedule may have moved, group by group."""
        return [_numbers(group) for group in self._groups]

    def _copy_numbers(self, optimizer: torch.optim.Optimizer) -> None:
        """Give another optimizer today's learning rate, weight decay and all else that a schedule may have moved."""
        for theirs, mine in zip(optimizer.param_groups, self._groups, strict=True):
            theirs.update(_numbers(mine))


def needs_whole(optimizer: torch.optim.Optimizer, parameter: Tensor, group: Group) -> bool:
    """Whether an optimizer must see a parameter whole; raises ValueError for one of which it is not known."""
    if isinstance(optimizer, MatrixOptimizer):
        return optimizer.needs_whole(parameter, group)
    if not isinstance(optimizer, ELEMENTWISE):
        raise ValueError(
            f"{type(optimizer).__name__} may need whole matrices, and nothing says of which parameters; use an "
            "optimizer of epochal.optim, or torch's AdamW."
        )
    return False


class Replicated(Distributed):
    """For weights and gradients that are whole and equal on every process: one process, or DDP.

    A matrix has state on its owner only; parameters that are updated element by element are stepped by everybody.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__(optimizer, names)
        _check_global(optimizer)
        mine = {i: entry.parameter for i, entry in enumerate(self.entries) if entry.owner in (None, self.rank)}
        self.stand_ins = mine
        self.inner = over(optimizer, {p: p for p in mine.values()})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step what is owned and what everybody steps, then take the matrices of the others from their owners."""
        assert self.inner is not None
        self._copy_numbers(self.inner)
        loss = self.inner.step(closure)
        self.stepped.update(
            i for i, p in self.stand_ins.items() if self.entries[i].owner is not None and p.grad is not None
        )
        for owner in range(self.world if self.world > 1 else 0):
            theirs = [entry.parameter.detach() for entry in self.matrices if entry.owner == owner]
            for same in _by_dtype(theirs):
                flat = torch.cat([tensor.reshape(-1) for tensor in same])
                dist.broadcast(flat, owner)
                if owner == self.rank:
                    self.bytes_sent += flat.numel() * flat.element_size() * (self.world - 1)
                else:
                    torch._foreach_copy_(
                        same, [part.view_as(t) for part, t in zip(_split(flat, same), same, strict=True)]
                    )
        return loss

    def _piece_name(self, index: int) -> str | None:
        return f"{self.entries[index].name}@0" if self.rank == 0 else None


def _by_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:
    found: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor)
    return list(found.values())


def _split(flat: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = torch.split(flat, [tensor.numel() for tensor in like])
    return parts


class Sharded(Distributed):
    """For shards: the one 1-D shard that DeepSpeed puts into a group, or the DTensors of FSDP2.

    backend: "zero1", "zero2", "zero3" or "fsdp2"; says how a process finds what its shard holds. Raises ValueError, on
    every process, at the first step when a layout does not cover each element once or holds other values than the model.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: Iterable[tuple[str, Tensor]], backend: str) -> None:
        super().__init__(optimizer, names)
        _check_global(optimizer)
        if getattr(optimizer, "compat", None) is not None:
            raise ValueError(
                f"compat={optimizer.compat!r} starts momentum from whole weights, which no process holds under "  # type: ignore[attr-defined]
                f"{backend}; use ddp, or leave compat out."
            )
        self.backend = backend
        self._layouts: dict[int, list[list[Span]]] = {}
        self._ranges: dict[int, tuple[int, int]] = {}
        self._located = [0] * len(self._groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the shards that are in `param_groups` now; DeepSpeed calls this once for each of them."""
        assert closure is None, "a closure would run once for every shard"
        if self.backend == "fsdp2":
            layout = self._layout(0, lambda: locate_rows(self.entries, self.rank, self.world))
            self._step_pieces(layout, self._rows, self.entries[0].parameter.device)
        else:
            for group in self.param_groups:
                for shard in group["params"]:
                    self._step_pieces(*self._flat(group, shard), shard.device)

    # --- where the elements lie --------------------------------------------------------------------------------------

    def _flat(self, group: Group, shard: Tensor) -> tuple[list[list[Span]], View]:
        """Return the layout of one of DeepSpeed's shards and a function from spans to (values, gradient)."""
        if shard.ndim != 1 or shard.grad is None or shard.grad.shape != shard.shape:
            raise ValueError(
                f"{self.backend} gave a shard of shape {tuple(shard.shape)} where one flat shard with its gradient was "
                "expected; use the DeepSpeed version of constraints.txt."
            )
        locate = self._next_slices if self.backend == "zero3" else self._flat_parts
        layout = self._layout(id(shard), lambda: locate(shard, group["number"]))
        gradient = shard.grad

        def view(span: Span) -> tuple[Tensor, Tensor]:
            length = span.stop - span.start
            return shard.detach().narrow(0, span.offset, length), gradient.narrow(0, span.offset, length)

        return layout, view

    def _members(self, number: int) -> list[tuple[int, Entry]]:
        return [(index, entry) for index, entry in enumerate(self.entries) if entry.group == number]

    def _flat_parts(self, shard: Tensor, number: int) -> Found:
        return locate_flat(shard, self._members(number), self.rank)

    def _next_slices(self, shard: Tensor, number: int) -> Found:
        # DeepSpeed cuts a group into shards (sub-groups) of consecutive parameters, and steps them in this order.
        spans, problem = locate_slices(shard, self._members(number)[self._located[number] :], self.rank)
        self._located[number] += len(spans)
        return [span for span in spans if span.start < span.stop], problem

    def _rows(self, span: Span) -> tuple[Tensor, Tensor]:
        parameter = self.entries[span.entry].parameter
        assert isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor)
        return parameter.to_local().detach().view(-1), parameter.grad.to_local().view(-1)

    def _layout(self, key: int, locate: Callable[[], Found]) -> list[list[Span]]:
        """Return the spans of every process for a shard; on first sight they are gathered and checked by everybody."""
        if key not in self._layouts:
            spans, problem = locate()
            gathered: list[Any] = [(spans, problem)]
            if self.world > 1:
                gathered = [None] * self.world
                dist.all_gather_object(gathered, (spans, problem))
            layout = [spans for spans, _ in gathered]
            problems = [problem for _, problem in gathered if problem] or uncovered(layout, self.entries)
            if problems:
                raise ValueError(
                    f"layout mismatch under {self.backend}: {problems[0]}; train with ddp, and report the versions."
                )
            self._layouts[key] = layout
        return self._layouts[key]

    # --- one exchange ------------------------------------------------------------------------------------------------

    def _step_pieces(self, layout: list[list[Span]], view: View, device: torch.device) -> None:
        """Step all parameters of a layout: gradients to owners, their step, updates back."""
        views = {span: view(span) for span in layout[self.rank]}
        self._build_inner(device)
        whole = [span for span in layout[self.rank] if self.entries[span.entry].owner is not None]
        owned = self._gather_gradients(layout, {span: views[span][1] for span in whole}, device)
        pieces = {span: views[span] for span in layout[self.rank] if self.entries[span.entry].owner is None}
        finite = self._all_finite(layout, pieces, device)

        for index, gradient in owned.items():
            shape = self.entries[index].shape
            self._ready(index, gradient.new_zeros(shape), gradient.view(shape))
        for span, (values, gradient) in pieces.items():
            self._ranges[span.entry] = (span.start, span.stop)
            if finite is not None:
                gradient = torch.where(finite[span.entry], gradient, torch.nan)
            self._ready(span.entry, values, gradient)
        assert self.inner is not None
        before = {index: self._count(index) for index in owned}
        self._copy_numbers(self.inner)
        self.inner.step()
        updates = {index: (self._keep(index, before[index]), self.stand_ins[index].reshape(-1)) for index in owned}
        self._scatter_updates(layout, updates, {span: views[span][0] for span in whole}, device)
        for index in (*owned, *(span.entry for span in pieces)):
            self.stand_ins[index].grad = None
            # Of a stand-in only the shape is needed between two steps.
            self.stand_ins[index].data = self.stand_ins[index].data.new_zeros(()).expand(self.stand_ins[index].shape)
        self.stepped.update(owned)

    def _build_inner(self, device: torch.device) -> None:
        if self.inner is None:
            chosen = [i for i, entry in enumerate(self.entries) if entry.owner in (None, self.rank)]
            stand_ins = {i: torch.zeros((), device=device).expand(self.entries[i].shape).detach() for i in chosen}
            self.inner = over(self.rule, {self.entries[i].parameter: tensor for i, tensor in stand_ins.items()})
            self._unused = stand_ins

    def _ready(self, index: int, values: Tensor, gradient: Tensor) -> None:
        """Put today's values and gradient into a stand-in; at first sight, its state out of a checkpoint too."""
        first = index not in self.stand_ins
        stand_in = self.stand_ins.setdefault(index, self._unused[index])
        stand_in.data = values
        stand_in.grad = gradient
        if first:
            self._load(index)

    def _count(self, index: int) -> Tensor:
        assert self.inner is not None
        stand_in = self.stand_ins[index]
        count = self.inner.state.get(stand_in, {}).get("step")
        return torch.zeros((), device=stand_in.device) if count is None else count.clone()

    def _keep(self, index: int, before: Tensor) -> Tensor:
        """Return the share of the old weight that stays, (1,): 1 - lr wd, or 1 if the owner skipped the matrix."""
        kept = MatrixOptimizer.decay_factor(self.stand_ins[index], self._groups[self.entries[index].group])
        return torch.where(self._count(index) > before, kept, 1.0).reshape(1)

    def _gather_gradients(
        self, layout: list[list[Span]], mine: dict[Span, Tensor], device: torch.device
    ) -> dict[int, Tensor]:
        """Send pieces of gradients to their owners; returns the whole gradients of owned matrices, flat."""
        send = [[g for span, g in mine.items() if self.entries[span.entry].owner == r] for r in range(self.world)]
        coming = [[span for span in spans if self.entries[span.entry].owner == self.rank] for spans in layout]
        got = self._all_to_all(send, [[span.stop - span.start for span in spans] for spans in coming], device)
        whole: dict[int, Tensor] = {}
        for span, piece in zip(chain.from_iterable(coming), chain.from_iterable(got), strict=True):
            if span.entry not in whole:
                whole[span.entry] = piece.new_empty(self.entries[span.entry].shape.numel())
            whole[span.entry][span.start : span.stop] = piece
        return whole

    def _scatter_updates(
        self,
        layout: list[list[Span]],
        updates: dict[int, tuple[Tensor, Tensor]],
        mine: dict[Span, Tensor],
        device: torch.device,
    ) -> None:
        """Send (keep, piece of the update) to where the elements lie, and apply what comes to the shard in place."""
        send = [
            [
                part
                for span in spans
                if span.entry in updates
                for part in (updates[span.entry][0], updates[span.entry][1][span.start : span.stop])
            ]
            for spans in layout
        ]
        coming = [[span for span in mine if self.entries[span.entry].owner == rank] for rank in range(self.world)]
        got = self._all_to_all(send, [[1 + span.stop - span.start for span in spans] for spans in coming], device)
        for span, piece in zip(chain.from_iterable(coming), chain.from_iterable(got), strict=True):
            mine[span].mul_(piece[0]).add_(piece[1:])

    def _all_to_all(self, send: list[list[Tensor]], sizes: list[list[int]], device: torch.device) -> list[list[Tensor]]:
        """Send a list of flat float32 tensors to every process; return those that came, cut by `sizes`."""
        wire = device if self.world == 1 else _wire(device)
        counts = [sum(piece.numel() for piece in pieces) for pieces in send]
        everything = [piece.to(wire, torch.float32) for piece in chain.from_iterable(send)]
        sent = torch.cat(everything) if everything else torch.empty(0, device=wire)
        if self.world == 1:
            came = sent
        else:
            came = torch.empty(sum(map(sum, sizes)), device=wire)
            dist.all_to_all_single(came, sent, [sum(size) for size in sizes], counts)
            self.bytes_sent += 4 * (sum(counts) - counts[self.rank])
        parts = torch.split(came.to(device), [size for per_rank in sizes for size in per_rank])
        found = iter(parts)
        return [[next(found) for _ in per_rank] for per_rank in sizes]

    def _all_finite(
        self, layout: list[list[Span]], pieces: dict[Span, tuple[Tensor, Tensor]], device: torch.device
    ) -> dict[int, Tensor] | None:
        """Return whether the whole gradient of each parameter stepped in pieces is finite, the same everywhere.

        None for torch's own optimizers, which have no rule for it.
        """
        if not isinstance(self.inner, MatrixOptimizer):
            return None
        indices = sorted({s.entry for spans in layout for s in spans if self.entries[s.entry].owner is None})
        if not indices:
            return {}
        place = {index: k for k, index in enumerate(indices)}
        flags = torch.ones(len(indices), device=device)
        for span, (_, gradient) in pieces.items():
            flags[place[span.entry]] = torch.isfinite(gradient).all()
        if self.world > 1:
            flags = flags.to(_wire(device))
            dist.all_reduce(flags, dist.ReduceOp.MIN)
        return {index: flags[k].to(device) > 0 for index, k in place.items()}

    def _piece_name(self, index: int) -> str | None:
        return f"{self.entries[index].name}@{self._ranges[index][0]}"

    def _range(self, index: int) -> tuple[int, int]:
        return self._ranges[index]


def _wire(device: torch.device) -> torch.device:
    """Return the device from which the process group sends: with offload, shards lie on the CPU and NCCL takes no CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else device


def _check_global(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a rule that looks at all gradients at once."""
    if getattr(optimizer, "grad_clip", None) is not None and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            "Spectra's grad_clip needs all gradients in one process; use the clip_norm of the Run, which is the same."
        )
