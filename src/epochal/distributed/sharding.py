"""Optimizers over many ranks: every matrix is stepped whole by one rank, its owner.

The optimizer itself runs unchanged. Each rank applies it to plain tensors: the matrices that it owns, whole, and its own
elements of every parameter whose elements are updated independently. So optimizer state lives on one rank only.

    Replicated   One process and DDP: weights and gradients are whole on every rank. The owner steps a matrix and
                 broadcasts it.
    Sharded      ZeRO-1, -2, -3 and FSDP2: a rank holds a flat piece of a parameter and of its averaged, clipped gradient.
                     gather    pieces of a matrix's gradient are sent to its owner
                     update    the owner steps a matrix of zeros, which leaves the bare update
                     scatter   every rank applies its piece: W <- decay_factor W + update

Gather and scatter are one all-to-all each, in float32: 8 N (W - 1) / W^2 bytes sent by each of W ranks on average for N
elements in matrices, against 4 N (W - 1) / W for broadcasts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from epochal.distributed.layout import (
    Entry,
    Located,
    Span,
    assign_owners,
    coverage_problems,
    locate_flat,
    locate_rows,
    locate_slices,
)
from epochal.optim.base import Group, MatrixOptimizer

# Classes of torch that may step a piece of a parameter; any other that is not a `MatrixOptimizer` is refused.
ELEMENTWISE = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


class SavedState(Protocol):
    """Optimizer state in a checkpoint, by parameter name; a name without state gives an empty dict."""

    def whole(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a parameter stepped whole."""

    def piece(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        """Return elements [start, stop) of the state of a parameter stepped in pieces; 0-d tensors as they are."""


class LocalParam(NamedTuple):
    """What this rank steps of a parameter: all of it, or a flat piece of it that begins at element `start`."""

    tensor: Tensor
    start: int
    optimizer: torch.optim.Optimizer

    @property
    def state(self) -> dict[str, Tensor]:
        """The optimizer's state of it; empty before its first step."""
        state: dict[str, Tensor] = self.optimizer.state.get(self.tensor, {})
        return state


class Bucket(NamedTuple):
    """The parameters in one shard, which are stepped together: which elements each rank holds, and their optimizer."""

    spans: list[list[Span]]
    optimizer: torch.optim.Optimizer


# From a span of this rank to its (values, gradient), flat; writing to the values changes the shard.
View = Callable[[Span], tuple[Tensor, Tensor]]

# (values, gradient) of each of this rank's spans of a bucket.
Shards = dict[Span, tuple[Tensor, Tensor]]


def rebind(optimizer: torch.optim.Optimizer, params: Mapping[Tensor, Tensor]) -> torch.optim.Optimizer:
    """Copy an optimizer, without state, onto the tensors that stand for some of its parameters."""
    if isinstance(optimizer, MatrixOptimizer):
        return optimizer.rebind(params)
    groups = [
        {**_hyperparameters(group), "params": [params[p] for p in group["params"] if p in params]}
        for group in optimizer.param_groups
    ]
    rebuilt: Any = type(optimizer)  # torch's own optimizers keep all their hyperparameters in the groups
    copied: torch.optim.Optimizer = rebuilt(groups)
    return copied


def _hyperparameters(group: Group) -> Group:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


class Distributed(torch.optim.Optimizer):
    """What `Replicated` and `Sharded` share: owners, groups, and state by parameter name.

    optimizer: a `MatrixOptimizer` or torch's AdamW, built over whole parameters and not stepped yet.
    names: (name, parameter) pairs of all its parameters. Raises ValueError for an optimizer that cannot be distributed.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: Iterable[tuple[str, Tensor]]) -> None:
        # A single process runs without a process group.
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.rule, self.bytes_sent = optimizer, 0
        self._saved: SavedState | None = None
        self._groups: list[Group] = []
        # The wrapper has its own groups over the same parameters: schedules and DeepSpeed change these, and
        # `_copy_hyperparameters` brings the changes to the inner optimizer.
        groups = [{**_hyperparameters(group), "params": list(group["params"])} for group in optimizer.param_groups]
        super().__init__(groups, {})
        # Numbered in order of groups, which is the same on every rank: an index can stand for a parameter in
        # messages.
        self.entries = self._entries({p: name for name, p in names})
        self.local_params: dict[int, LocalParam] = {}
        # Matrices that this rank has stepped since the set was last cleared.
        self.stepped: set[int] = set()
        _check_grad_clip(optimizer, self.world)

    def add_param_group(self, param_group: Group) -> None:
        """As torch's, and number the group."""
        super().add_param_group(param_group)
        # During a call of `step`, DeepSpeed leaves only some groups in `param_groups`, so their positions change.
        self._groups.append(self.param_groups[-1])
        self._groups[-1]["number"] = len(self._groups) - 1

    def _entries(self, names: dict[Tensor, str]) -> list[Entry]:
        members = [(group, p) for group in self._groups for p in group["params"]]
        if any(hasattr(p, "ds_shape") for _, p in members):
            raise ValueError(
                "the model was built under deepspeed.zero.Init, where every parameter looks one-dimensional; build it "
                "outside, and let Processes.prepare shard it."
            )
        # The assignment depends on shapes and world size only, so every rank computes the same owners.
        whole = [p for group, p in members if needs_whole(self.rule, p, group)]
        owner = dict(zip(whole, assign_owners([p.shape for p in whole], self.world), strict=True))
        return [Entry(names[p], p, group["number"], p.shape, owner.get(p)) for group, p in members]

    @property
    def matrices(self) -> list[Entry]:
        """The parameters that are stepped whole, each by its owner."""
        return [entry for entry in self.entries if entry.owner is not None]

    @property
    def hyperparameters(self) -> list[Group]:
        """The options of each group: learning rate, weight decay and all else a schedule may change."""
        return [_hyperparameters(group) for group in self._groups]

    def _copy_hyperparameters(self, optimizer: torch.optim.Optimizer) -> None:
        for group, current in zip(optimizer.param_groups, self.hyperparameters, strict=True):
            group.update(current)

    # --- state, for checkpoints of any number of ranks ---------------------------------------------------------------

    def named_state(self) -> dict[str, Tensor]:
        """Return this rank's optimizer state by name.

        Keys are `name.key` for a matrix it owns and `name@start.key` for its piece of another parameter. The union over
        ranks is the state of the run; 0-d tensors of pieces are in it several times.
        """
        tensors: dict[str, Tensor] = {}
        for index, local in self.local_params.items():
            entry = self.entries[index]
            # Under DDP all ranks hold the same elementwise state, and one copy is enough.
            if entry.owner is None and not self._saves_pieces:
                continue
            prefix = entry.name if entry.owner is not None else f"{entry.name}@{local.start}"
            for key, value in local.state.items():
                flat = value if entry.owner is not None or value.ndim == 0 else value.reshape(-1)
                tensors[f"{prefix}.{key}"] = flat.detach().contiguous()
        return tensors

    @property
    def _saves_pieces(self) -> bool:
        return True

    def load_named_state(self, saved: SavedState) -> None:
        """Resume from a checkpoint of any number of ranks under any preset."""
        # Kept: a sharded layout is known only at the first step, and its state is loaded then.
        self._saved = saved
        for index in self.local_params:
            self._restore(index)

    def _restore(self, index: int) -> None:
        """Load the state of one local parameter from the checkpoint, if there is one."""
        if self._saved is None:
            return
        entry, local = self.entries[index], self.local_params[index]
        if entry.owner is not None:
            state = self._saved.whole(entry.name)
        else:
            pieces = self._saved.piece(entry.name, local.start, local.start + local.tensor.numel())
            state = {key: value.view(local.tensor.shape) if value.ndim else value for key, value in pieces.items()}
        # Copies, because the optimizer writes to its state in place.
        local.optimizer.state[local.tensor] = {k: v.to(local.tensor.device, copy=True) for k, v in state.items()}

    def state_bytes(self) -> int:
        """Bytes of optimizer state on this rank."""
        states = [local.state for local in self.local_params.values()]
        return sum(value.numel() * value.element_size() for state in states for value in state.values())

    def state_of(self, index: int) -> tuple[int, dict[str, Tensor]]:
        """Return (first element, copy of the state) of this rank's part of a parameter.

        The state is empty if this rank has no part.
        """
        entry, local = self.entries[index], self.local_params.get(index)
        if local is not None:
            return local.start, {key: value.clone() for key, value in local.state.items()}
        if self._saved is None or self.local_params:
            return 0, {}
        # Before the first step after a resume the state is still in the checkpoint, which every rank can read whole.
        if entry.owner is not None:
            return 0, self._saved.whole(entry.name)
        return 0, self._saved.piece(entry.name, 0, entry.shape.numel())


def needs_whole(optimizer: torch.optim.Optimizer, parameter: Tensor, group: Group) -> bool:
    """Whether an optimizer must see a parameter whole; raises ValueError for a class that is not known."""
    if isinstance(optimizer, MatrixOptimizer):
        return optimizer.needs_whole(parameter, group)
    if not isinstance(optimizer, ELEMENTWISE):
        raise ValueError(
            f"{type(optimizer).__name__} may need whole matrices, and does not declare for which parameters; use an "
            "optimizer of epochal.optim, or torch's AdamW."
        )
    return False


def _check_grad_clip(optimizer: torch.optim.Optimizer, world: int) -> None:
    # Every rank would compute the norm of its own matrices only.
    if getattr(optimizer, "grad_clip", None) is not None and world > 1:
        raise ValueError(
            "Spectra's grad_clip needs all gradients in one process; use the clip_norm of the Run, which is the same."
        )


class Replicated(Distributed):
    """For weights and gradients that are whole and equal on every rank: one process, or DDP.

    A matrix has state on its owner only; parameters that are updated element by element are stepped by every rank.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__(optimizer, names)
        local = {i: entry.parameter for i, entry in enumerate(self.entries) if entry.owner in (None, self.rank)}
        self._inner = rebind(optimizer, {p: p for p in local.values()})
        self.local_params = {i: LocalParam(p, 0, self._inner) for i, p in local.items()}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the local parameters, then receive the other matrices from their owners."""
        self._copy_hyperparameters(self._inner)
        loss = self._inner.step(closure)
        for i, local in self.local_params.items():
            # For the check of the first step, which counts the matrices that were stepped whole.
            if self.entries[i].owner is not None and local.tensor.grad is not None:
                self.stepped.add(i)
        if self.world > 1:
            # All ranks enter every broadcast in the same order, or the collectives would not match.
            for owner in range(self.world):
                self._broadcast([entry.parameter.detach() for entry in self.matrices if entry.owner == owner], owner)
        return loss

    def _broadcast(self, matrices: list[Tensor], owner: int) -> None:
        for dtype in dict.fromkeys(matrix.dtype for matrix in matrices):
            same = [matrix for matrix in matrices if matrix.dtype == dtype]
            # One message per owner and dtype: a message for each matrix would be bound by latency.
            flat = torch.cat([matrix.reshape(-1) for matrix in same])
            dist.broadcast(flat, owner)
            if owner == self.rank:
                self.bytes_sent += flat.numel() * flat.element_size() * (self.world - 1)
            else:
                parts = torch.split(flat, [matrix.numel() for matrix in same])
                torch._foreach_copy_(same, [part.view_as(to) for part, to in zip(parts, same, strict=True)])

    @property
    def _saves_pieces(self) -> bool:
        return self.rank == 0  # all ranks hold the same


class Sharded(Distributed):
    """For shards: the one 1-D shard that DeepSpeed puts into a group, or the DTensors of FSDP2.

    backend: "zero1", "zero2", "zero3" or "fsdp2"; it decides how a rank locates the parameters in its shard. Raises
    ValueError, on every rank, at the first step when a layout does not cover each element once or when a shard holds
    other values than the model.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: Iterable[tuple[str, Tensor]], backend: str) -> None:
        super().__init__(optimizer, names)
        compat = getattr(optimizer, "compat", None)
        if compat is not None:
            raise ValueError(
                f"compat={compat!r} starts momentum from whole weights, which no rank holds under {backend}; use ddp, or "
                "leave compat out."
            )
        self.backend = backend
        self._buckets: dict[Tensor | None, Bucket] = {}
        self._located = [0] * len(self._groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the shards that are in `param_groups` now; DeepSpeed calls this once for each of them."""
        assert closure is None, "a closure would run once for every shard"
        # FSDP2 has one bucket: all its local rows are available between backward and the next forward pass.
        if self.backend == "fsdp2":
            device = self.entries[0].parameter.device
            locate = functools.partial(locate_rows, self.entries, self.rank, self.world)
            self._step_bucket(self._bucket(None, locate, self._rows, device), self._rows, device)
            return
        for group in self.param_groups:
            for shard in group["params"]:
                # The gradient may be another tensor at every step, so the view is not kept.
                view = self._flat_view(shard)
                locate = functools.partial(self._locate, shard, group["number"])
                self._step_bucket(self._bucket(shard, locate, view, shard.device), view, shard.device)

    # --- which elements are where ------------------------------------------------------------------------------------

    def _rows(self, span: Span) -> tuple[Tensor, Tensor]:
        parameter = self.entries[span.entry].parameter
        assert isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor)
        return parameter.to_local().detach().view(-1), parameter.grad.to_local().view(-1)

    def _flat_view(self, shard: Tensor) -> View:
        gradient = shard.grad
        # This relies on the layout of DeepSpeed, which is not a public interface: check it instead of assuming it.
        if shard.ndim != 1 or gradient is None or gradient.shape != shard.shape:
            raise ValueError(
                f"{self.backend} gave a shard of shape {tuple(shard.shape)} where one flat shard with its gradient was "
                "expected; use the DeepSpeed version of constraints.txt."
            )

        def view(span: Span) -> tuple[Tensor, Tensor]:
            length = span.stop - span.start
            return shard.detach().narrow(0, span.offset, length), gradient.narrow(0, span.offset, length)

        return view

    def _locate(self, shard: Tensor, number: int) -> Located:
        members = [(index, entry) for index, entry in enumerate(self.entries) if entry.group == number]
        # ZeRO-1 and -2 flatten a whole group and cut it once for every rank.
        if self.backend != "zero3":
            return locate_flat(shard, members, self.rank)
        # ZeRO-3 cuts a group into shards (sub-groups) of consecutive parameters, and steps them in this order.
        spans, problem = locate_slices(shard, members[self._located[number] :], self.rank)
        self._located[number] += len(spans)
        return [span for span in spans if span.start < span.stop], problem

    def _bucket(self, key: Tensor | None, locate: Callable[[], Located], view: View, device: torch.device) -> Bucket:
        """Return the bucket of a shard; at the first step all ranks build it, and check the layout together."""
        if key in self._buckets:
            return self._buckets[key]
        # A problem on one rank must stop all of them, or the others would wait in the next collective.
        gathered: list[Any] = [located := locate()]
        if self.world > 1:
            gathered = [None] * self.world
            dist.all_gather_object(gathered, located)
        spans = [spans for spans, _ in gathered]
        problems = [problem for _, problem in gathered if problem] or coverage_problems(spans, self.entries)
        if problems:
            raise ValueError(
                f"layout mismatch under {self.backend}: {problems[0]}; train with ddp, and report the versions."
            )
        self._buckets[key] = Bucket(spans, self._bind(spans, view, device))
        return self._buckets[key]

    def _bind(self, spans: list[list[Span]], view: View, device: torch.device) -> torch.optim.Optimizer:
        """Build the optimizer over this rank's matrices and pieces, and load their state."""
        tensors: dict[int, tuple[Tensor, int]] = {}
        for index in dict.fromkeys(span.entry for span in chain.from_iterable(spans)):
            if self.entries[index].owner == self.rank:
                tensors[index] = (torch.empty(self.entries[index].shape, device=device), 0)
                # An empty tensor stands for the matrix: only its identity is needed between steps.
                _free(tensors[index][0])
        for span in spans[self.rank]:
            if self.entries[span.entry].owner is None:
                # A view of the shard, so stepping the piece steps the shard.
                tensors[span.entry] = (view(span)[0], span.start)
        optimizer = rebind(self.rule, {self.entries[index].parameter: tensor for index, (tensor, _) in tensors.items()})
        for index, (tensor, start) in tensors.items():
            self.local_params[index] = LocalParam(tensor, start, optimizer)
            self._restore(index)
        return optimizer

    # --- gather, update, scatter -------------------------------------------------------------------------------------

    def _step_bucket(self, bucket: Bucket, view: View, device: torch.device) -> None:
        """Step the parameters of a bucket."""
        # Ranks that own none of its matrices still take part in both exchanges, which are collectives.
        shards = {span: view(span) for span in bucket.spans[self.rank]}
        matrices = {span: shard for span, shard in shards.items() if self.entries[span.entry].owner is not None}
        pieces = {span: shard for span, shard in shards.items() if self.entries[span.entry].owner is None}
        gradients = self._gather(bucket, matrices, device)
        # A whole matrix needs no such agreement: its owner sees all of its gradient.
        self._mark_non_finite(bucket, pieces, device)
        updates = self._update(bucket, gradients, pieces)
        self._scatter(bucket, updates, matrices, device)
        for index in gradients:
            _free(self.local_params[index].tensor)
        self.stepped.update(gradients)

    def _gather(self, bucket: Bucket, matrices: Shards, device: torch.device) -> dict[int, Tensor]:
        """Send the pieces of gradients to the owners; returns the whole gradients of this rank's matrices, flat."""
        ranks = range(self.world)
        send = [[gradient for span, (_, gradient) in matrices.items() if self._owner(span) == rank] for rank in ranks]
        # No sizes are exchanged: every rank has the spans of all ranks, in the same order as the sender.
        expected = [[span for span in spans if self._owner(span) == self.rank] for spans in bucket.spans]
        received = self._all_to_all(send, [[span.stop - span.start for span in spans] for spans in expected], device)
        gradients: dict[int, Tensor] = {}
        for span, piece in zip(chain.from_iterable(expected), received, strict=True):
            if span.entry not in gradients:
                gradients[span.entry] = piece.new_empty(self.entries[span.entry].shape.numel())
            gradients[span.entry][span.start : span.stop] = piece
        return gradients

    def _update(self, bucket: Bucket, gradients: dict[int, Tensor], pieces: Shards) -> dict[int, tuple[Tensor, Tensor]]:
        """Step pieces in-place and matrices from zero; returns (decay factor (1,), flat update) of each matrix."""
        for index, gradient in gradients.items():
            matrix = self.local_params[index].tensor
            # From W = 0 the step W <- (1 - lr wd) W - lr U leaves the bare update -lr U; decay is applied by the
            # ranks that hold W.
            _allocate_zeros(matrix)
            matrix.grad = gradient.view(matrix.shape)
        for span, (values, gradient) in pieces.items():
            piece = self.local_params[span.entry].tensor
            # Optimizer state is keyed by the tensor that was bound at the first step.
            assert piece.data_ptr() == values.data_ptr(), f"{self.backend} moved its shard between two steps"
            piece.grad = gradient
        before = {index: self._step_count(index) for index in gradients}
        self._copy_hyperparameters(bucket.optimizer)
        bucket.optimizer.step()

        updates = {}
        for index in gradients:
            matrix, group = self.local_params[index].tensor, self._groups[self.entries[index].group]
            # The owner's state counts no step for a gradient that is not finite; the weight must then not decay either.
            stepped = self._step_count(index) > before[index]
            # A tensor operation, not an `if`: a branch would wait for the device.
            factor = torch.where(stepped, MatrixOptimizer.decay_factor(matrix, group), 1.0)
            updates[index] = (factor.reshape(1), matrix.reshape(-1))
        for index in (*gradients, *(span.entry for span in pieces)):
            self.local_params[index].tensor.grad = None
        return updates

    def _scatter(
        self, bucket: Bucket, updates: dict[int, tuple[Tensor, Tensor]], matrices: Shards, device: torch.device
    ) -> None:
        """Send every piece of an update, with its decay factor, to its rank.

        Each rank applies what arrives to its shard.
        """
        send: list[list[Tensor]] = [[] for _ in range(self.world)]
        for rank, spans in enumerate(bucket.spans):
            for span in spans:
                if span.entry in updates:
                    factor, update = updates[span.entry]
                    send[rank] += [factor, update[span.start : span.stop]]
        expected = [[span for span in matrices if self._owner(span) == rank] for rank in range(self.world)]
        # One element more than the piece: the decay factor travels in front of it.
        sizes = [[1 + span.stop - span.start for span in spans] for spans in expected]
        received = self._all_to_all(send, sizes, device)
        for span, piece in zip(chain.from_iterable(expected), received, strict=True):
            matrices[span][0].mul_(piece[0]).add_(piece[1:])

    def _owner(self, span: Span) -> int:
        """The rank that owns the whole matrix of a span; -1 for what every rank steps in pieces."""
        owner = self.entries[span.entry].owner
        return -1 if owner is None else owner

    def _step_count(self, index: int) -> Tensor:
        local = self.local_params[index]
        count = local.state.get("step")
        return torch.zeros((), device=local.tensor.device) if count is None else count.clone()

    def _all_to_all(self, send: list[list[Tensor]], sizes: list[list[int]], device: torch.device) -> list[Tensor]:
        """Send a list of flat float32 tensors to every rank; returns those received.

        They come in order of ranks and are cut by `sizes`.
        """
        # float32 in both directions, whatever the dtype of the shard.
        wire = device if self.world == 1 else _wire(device)
        counts = [sum(piece.numel() for piece in pieces) for pieces in send]
        everything = [piece.to(wire, torch.float32) for piece in chain.from_iterable(send)]
        sent = torch.cat(everything) if everything else torch.empty(0, device=wire)
        received = sent
        if self.world > 1:
            received = torch.empty(sum(map(sum, sizes)), device=wire)
            dist.all_to_all_single(received, sent, [sum(size) for size in sizes], counts)
            # What a rank sends to itself does not leave the device.
            self.bytes_sent += 4 * (sum(counts) - counts[self.rank])
        return list(torch.split(received.to(device), [size for per_rank in sizes for size in per_rank]))

    def _mark_non_finite(self, bucket: Bucket, pieces: Shards, device: torch.device) -> None:
        """Make a gradient NaN on all ranks if one rank's piece is not finite."""
        # All ranks must skip the parameter together: its step count is part of the state of every piece.
        if not isinstance(bucket.optimizer, MatrixOptimizer):
            return  # torch's own optimizers skip nothing
        indices = sorted({span.entry for span in chain.from_iterable(bucket.spans) if self._owner(span) is None})
        if not indices:
            return
        flags = torch.ones(len(indices), device=device)
        for span, (_, gradient) in pieces.items():
            # 1 for finite, 0 for not; ranks without a piece of the parameter contribute 1.
            flags[indices.index(span.entry)] = torch.isfinite(gradient).all()
        if self.world > 1:
            flags = flags.to(_wire(device))
            dist.all_reduce(flags, dist.ReduceOp.MIN)
        finite = dict(zip(indices, flags.to(device).unbind(), strict=True))
        for span, (values, gradient) in pieces.items():
            pieces[span] = (values, torch.where(finite[span.entry] > 0, gradient, torch.nan))


def _allocate_zeros(matrix: Tensor) -> None:
    storage = matrix.untyped_storage()
    storage.resize_(matrix.numel() * matrix.element_size())
    matrix.zero_()


def _free(matrix: Tensor) -> None:
    # As FSDP does with gathered parameters: the tensor stays the key of its state, its memory is used during a step only.
    matrix.untyped_storage().resize_(0)


def _wire(device: torch.device) -> torch.device:
    # With offload, shards are on the CPU, and NCCL sends from GPUs only.
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else device
