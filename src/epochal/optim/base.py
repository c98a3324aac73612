"""The base class of every optimizer in this package.

An optimizer is a pure function of batches plus the class below. The function sees tensors with a leading axis B over
parameters of one shape. The class groups the parameters, stacks them, and writes weights and state back:

    for each group: parameters with a gradient -> buckets of equal (shape, dtype, device, `bucket_key`)
    for each bucket: stack -> U, state = update(...) -> W <- (1 - lr wd) W - lr U -> write back

Shapes: the B parameters of a bucket are (...) each, usually (m, n) with rows = outputs, columns = inputs.
Non-finite gradients: a parameter whose gradient contains a NaN or an infinity is skipped, with its state and its step
count; the other parameters of the bucket are not affected.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

# Buckets are split at this many elements, so the peak temporary memory of a step is about ten times that size. Beyond
# it, copying costs more than dispatching: a GPU copies a million elements in the time of three kernel launches, and one
# step is about thirty launches.
STACKED_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}

State = dict[str, Tensor]
Group = dict[str, Any]


# --- helpers for batches of parameters ---------------------------------------------------------------------------


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of state and arithmetic for weights of `dtype`: float32 for half precision, else `dtype`."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def per_item(value: Tensor, like: Tensor) -> Tensor:
    """View a (B,) tensor so that it broadcasts over the batch `like` (B, ...)."""
    return value.view(-1, *(1,) * (like.ndim - 1))


def stack(tensors: list[Tensor]) -> Tensor:
    """Stack B tensors of equal shape into (B, ...); a single tensor becomes a view, not a copy."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """Return a hyperparameter as a 0-d tensor with the device and state dtype of `like`."""
    # A tensor, so that a compiled update is not recompiled when a schedule changes the value.
    dtype = state_dtype(like.dtype)
    if isinstance(value, Tensor):
        return value.to(device=like.device, dtype=dtype)
    return torch.full((), value, device=like.device, dtype=dtype)


def largest_magnitude(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Return the largest magnitude over `dim`; NaN if there is a NaN."""
    # 25 times faster on a CPU than torch.linalg.vector_norm(x, inf), and without a temporary of the size of x.
    return torch.maximum(x.amax(dim), -x.amin(dim))


def known_true(condition: Tensor) -> bool:
    """Return whether all of `condition` holds; False if finding out would sync."""
    return condition.device.type == "cpu" and not torch.compiler.is_compiling() and bool(condition.all())


def round_stochastically(value: Tensor) -> Tensor:
    """Round float32 to bfloat16, up or down at random so that the rounding is unbiased."""
    # bfloat16 is the upper half of a float32: add 16 random low bits, then drop them.
    bits = value.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
    return ((bits + noise) & -65536).view(torch.float32).to(torch.bfloat16)


def new_state(parameter: Tensor, *names: str) -> State:
    """Return `step` = 0 (float32, 0-d), and zeros of the parameter's shape under each name."""
    like = torch.zeros_like(parameter, dtype=state_dtype(parameter.dtype), memory_format=torch.contiguous_format)
    buffers = {name: like.clone() for name in names}
    return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **buffers}


# --- the optimizer -----------------------------------------------------------------------------------------------


class MatrixOptimizer(torch.optim.Optimizer):
    """Base class; a subclass implements `init_state` and `update`.

    Every group needs the keys `lr` and `weight_decay`; `stochastic_rounding` (bfloat16 weights only) is optional.

    Attributes:
        skipped: 0-d int64 tensor, the number of (parameter, step) pairs skipped because of a non-finite gradient.
    """

    skipped: Tensor

    def __init__(self, params: Any, defaults: Group) -> None:
        super().__init__(params, defaults)
        # The counter stays on the device of the parameters: counting must not sync.
        first = next((p for group in self.param_groups for p in group["params"]), None)
        self.skipped = torch.zeros((), dtype=torch.int64, device=None if first is None else first.device)

    # --- for subclasses to implement or override ---

    def init_state(self, parameter: Tensor, group: Group) -> State:
        """Return the state of one parameter before its first step: plain tensors, one of them `step` (0-d)."""
        raise NotImplementedError

    def update(self, parameters: Tensor, gradients: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
        """Return (U, new state) of a bucket; everything is (B, ...). Must not write to its arguments."""
        raise NotImplementedError

    def apply_update(self, weights: Tensor, update: Tensor, step: Tensor, group: Group) -> Tensor:
        """Return the new weights of a bucket, (1 - lr wd) W - lr U; step (B,) counts the steps before this one."""
        # Not addcmul, which rounds product and sum together. Rounding the two products separately gives a shard, which
        # receives lr U from the matrix's owner, exactly the bits of an unsharded step.
        return (weights * self.decay_factor(weights, group)).sub_(update * scalar(group["lr"], weights))

    @staticmethod
    def decay_factor(like: Tensor, group: Group) -> Tensor:
        """Return 1 - lr wd as a 0-d tensor."""
        # Computed in double precision and rounded once, so that every rank has the same bits.
        return scalar(1 - group["lr"] * float(group["weight_decay"]), like)

    def bucket_key(self, parameter: Tensor, group: Group) -> Hashable:
        """Return what parameters updated together must share besides shape, dtype and device."""
        return None

    def needs_whole(self, parameter: Tensor, group: Group) -> bool:
        """Return whether a shard of this parameter cannot be updated without the rest of it."""
        return parameter.ndim >= 2

    def rebind(self, params: Mapping[Tensor, Tensor]) -> Self:
        """Return the same optimizer, without state, over other tensors.

        Args:
            params: replacement of each parameter; parameters that it does not contain are left out, empty groups stay.
        """
        # Shallow: options are shared, while groups, state and the counter are replaced below.
        other = copy.copy(self)
        other.param_groups = [
            {**group, "params": [params[p] for p in group["params"] if p in params]} for group in self.param_groups
        ]
        other.state = defaultdict(dict)
        first = next(iter(params.values()), self.skipped)
        other.skipped = torch.zeros_like(self.skipped, device=first.device)
        return other

    # --- the step ---

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step over all groups; return the loss of `closure` if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for bucket in self.buckets(group):
                self.step_bucket(bucket, group)
        return loss

    def buckets(self, group: Group) -> list[list[Tensor]]:
        """Return the parameters with a gradient as lists that can be stacked; initializes missing state.

        Raises:
            ValueError: for a sparse gradient.
        """
        buckets: dict[Hashable, list[Tensor]] = {}
        for p in group["params"]:
            # An empty parameter has no largest entry, which the check for non-finite gradients takes.
            if p.grad is None or p.numel() == 0:
                continue
            if p.grad.is_sparse:
                raise ValueError(
                    f"{type(self).__name__} cannot use the sparse gradient of a parameter of shape {tuple(p.shape)}; "
                    "build the embedding with sparse=False."
                )
            # Lazily, as in torch: parameters that never get a gradient have no state.
            if not self.state[p]:
                self.state[p] = self.init_state(p, group)
            buckets.setdefault((p.shape, p.dtype, p.device, self.bucket_key(p, group)), []).append(p)
        return [part for bucket in buckets.values() for part in _split(bucket)]

    def step_bucket(self, parameters: list[Tensor], group: Group) -> None:
        """Update one bucket in place: stack, `update`, `apply_update`, write back."""
        dtype = state_dtype(parameters[0].dtype)
        weights = stack([p.detach() for p in parameters])
        gradients = stack([p.grad for p in parameters if p.grad is not None]).to(dtype)
        states = [self.state[p] for p in parameters]
        old = {name: stack([state[name] for state in states]) for name in states[0]}

        # The largest magnitude is NaN or infinite exactly if one of the entries is; this needs no mask of that size.
        finite = torch.isfinite(largest_magnitude(gradients.reshape(len(parameters), -1), 1))
        self.skipped += (~finite).sum().to(self.skipped.device)
        # The masks below cost memory traffic. On a CPU they are made only if needed; a GPU would have to sync to know.
        clean = known_true(finite)
        if not clean:
            # Zeros instead of NaN, so that products over the whole bucket stay finite.
            gradients = torch.where(per_item(finite, gradients), gradients, 0.0)

        update, new = self.update(weights, gradients, old, group)
        wide = weights.to(dtype)
        moved = self.apply_update(wide, update.to(dtype), old["step"], group)
        if not clean:
            # The gradient was replaced by zeros, so decay and momentum would still move the weights: restore them.
            moved = torch.where(per_item(finite, moved), moved, wide)
            new = {name: torch.where(per_item(finite, value), value, old[name]) for name, value in new.items()}
        if group.get("stochastic_rounding") and weights.dtype == torch.bfloat16:
            moved = round_stochastically(moved)
        torch._foreach_copy_(parameters, list(moved.unbind(0)))
        for name, value in new.items():
            torch._foreach_copy_([state[name] for state in states], list(value.unbind(0)))

    # --- saving and copying ---

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; unlike torch's, state keeps the dtype in which it was saved."""
        super().load_state_dict(state_dict)
        # torch has just cast the state to the dtype of the weights: copy it again, uncast.
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, parameters, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                self.state[p][name] = value.detach().to(device=p.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        # torch pickles three fields only, so copy.deepcopy and pickle would lose this one.
        state: dict[str, Any] = super().__getstate__()
        return {**state, "skipped": self.skipped}


def _split(bucket: list[Tensor]) -> list[list[Tensor]]:
    elements = STACKED_ELEMENTS.get(bucket[0].device.type, STACKED_ELEMENTS["cuda"])
    size = max(1, elements // bucket[0].numel())
    return [bucket[i : i + size] for i in range(0, len(bucket), size)]


# --- optimizers with one rule for all parameters -------------------------------------------------------------------


class Rule(NamedTuple):
    """An optimizer as two functions, which `Spectra` can wrap.

    Attributes:
        init: parameter -> its state before the first step.
        update: (gradients, state, **hyper-parameters) -> (U, new state), on a batch (B, ...). U is the direction without
            learning rate and without decoupled weight decay.
        defaults: the hyper-parameters of `update` and their default values.
        elementwise: whether every element is updated from its own gradient alone.
    """

    init: Callable[[Tensor], State]
    update: Callable[..., tuple[Tensor, State]]
    defaults: Group
    elementwise: bool = True

    def apply(self, gradients: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
        """Call `update` with the hyperparameters of this rule; the group may have others too."""
        return self.update(gradients, state, **{name: group[name] for name in self.defaults})


class RuleOptimizer(MatrixOptimizer):
    """An optimizer that applies one `Rule` to all its parameters."""

    rule: ClassVar[Rule]

    def needs_whole(self, parameter: Tensor, group: Group) -> bool:
        """Return whether the rule needs all of a matrix."""
        return not self.rule.elementwise and parameter.ndim >= 2

    def init_state(self, parameter: Tensor, group: Group) -> State:
        """Return the rule's state of one parameter."""
        return self.rule.init(parameter)

    def update(self, parameters: Tensor, gradients: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
        """Return the rule's (U, new state) of a bucket."""
        return self.rule.apply(gradients, state, group)
