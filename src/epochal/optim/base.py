"""The thin class under every optimizer here: buckets of equal shapes in, one pure update on each, weights written back.

An optimizer is two pure functions and this class. The functions see batches (a leading axis B over parameters of one
shape) and know nothing of groups, devices or ranks; the class knows nothing of the mathematics.

    for each group: parameters with a gradient -> buckets of equal (shape, dtype, device, `bucket_key`)
    for each bucket: stack -> update(...) -> W <- (1 - lr wd) W - lr U -> scatter back

Shapes: B parameters of a bucket, each of shape (...), usually (m, n): rows = outputs, columns = inputs.
Non-finite policy: a parameter whose gradient holds a NaN or an infinity is left as it is, its state too (the step
count included), and the tensor `skipped` counts it; its neighbours in the bucket are not affected.
Memory: beyond weights, gradients and state, a step holds the temporaries of one bucket at a time, and a bucket is cut
where stacking no longer pays (`STACKED_ELEMENTS`): at about ten copies of that, equal shapes are never all in memory.
Rounding: W <- keep W - step, each of the two products rounded by itself, so that a shard that gets `keep` and `step` from
elsewhere moves exactly as a whole matrix does.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from epochal.optim.products import largest_magnitude

# Parameters are stacked up to this many elements; beyond it copying costs more than dispatching. A GPU copies a million of
# them in the time of three launches, and a step is about thirty.
STACKED_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}

State = dict[str, Tensor]
Group = dict[str, Any]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of state and arithmetic for weights of `dtype`: half precisions are widened to float32."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def per_item(value: Tensor, like: Tensor) -> Tensor:
    """View a (B,) tensor so that it broadcasts over the batch `like` (B, ...)."""
    return value.view(-1, *(1,) * (like.ndim - 1))


def stack(tensors: list[Tensor]) -> Tensor:
    """Make (B, ...) of B equal shapes; a single tensor becomes a view, so big embeddings are not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """Put a hyper-parameter into a 0-d tensor beside `like`: a value that moves every step then recompiles nothing."""
    dtype = state_dtype(like.dtype)
    if isinstance(value, Tensor):
        return value.to(device=like.device, dtype=dtype)
    return torch.full((), value, device=like.device, dtype=dtype)


def round_stochastically(value: Tensor) -> Tensor:
    """Round float32 to bfloat16, up or down with the probability that makes the rounding unbiased."""
    # bfloat16 is the upper half of a float32: add 16 random low bits, cut them off.
    bits = value.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
    return ((bits + noise) & -65536).view(torch.float32).to(torch.bfloat16)


def new_state(parameter: Tensor, *names: str) -> State:
    """Return zeros in the state dtype under each name, and `step` = 0 (float32, 0-d, on the parameter's device)."""
    like = torch.zeros_like(parameter, dtype=state_dtype(parameter.dtype), memory_format=torch.contiguous_format)
    buffers = {name: like.clone() for name in names}
    return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **buffers}


class MatrixOptimizer(torch.optim.Optimizer):
    """Base class: a subclass gives `init_state` and `update`, and `bucket_key` where equal shapes must be kept apart.

    Every group needs the keys `lr` and `weight_decay`; `stochastic_rounding` (bfloat16 weights only) is optional.
    `skipped` is a 0-d int64 tensor: how many (parameter, step) pairs were left out for a non-finite gradient.
    """

    skipped: Tensor

    def __init__(self, params: Any, defaults: Group) -> None:
        super().__init__(params, defaults)
        first = next((p for group in self.param_groups for p in group["params"]), None)
        self.skipped = torch.zeros((), dtype=torch.int64, device=None if first is None else first.device)

    # --- what a subclass gives ---------------------------------------------------------------------------------------

    def init_state(self, parameter: Tensor, group: Group) -> State:
        """Return the state of one parameter before its first step: plain tensors, `step` (0-d) among them."""
        raise NotImplementedError

    def update(self, parameters: Tensor, gradients: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
        """Return (U, new state) of a bucket; everything is (B, ...), and the arguments must not be written to."""
        raise NotImplementedError

    def move(self, weights: Tensor, update: Tensor, step: Tensor, group: Group) -> Tensor:
        """Return the new weights of a bucket, (1 - lr wd) W - lr U; step (B,) counts the steps before this one."""
        # Not addcmul, which rounds product and sum at once: a shard cannot.
        return (weights * self.kept(weights, group)).sub_(update * scalar(group["lr"], weights))

    @staticmethod
    def kept(like: Tensor, group: Group) -> Tensor:
        """Return the share of a weight that decay leaves in one step, 1 - lr wd, 0-d: rounded alike wherever weights lie."""
        return scalar(1 - group["lr"] * float(group["weight_decay"]), like)

    def bucket_key(self, parameter: Tensor, group: Group) -> Hashable:
        """Return what, beside shape, dtype and device, parameters updated together must share."""
        return None

    def needs_whole(self, parameter: Tensor, group: Group) -> bool:
        """Whether the update of one element depends on others, so that a shard of this parameter is not enough."""
        return parameter.ndim >= 2

    def over(self, stand_ins: Mapping[Tensor, Tensor]) -> Self:
        """Return an optimizer of the same rule and numbers, without state, over tensors in place of parameters.

        Parameters that `stand_ins` does not name are left out; empty groups stay.
        """
        other = copy.copy(self)
        other.param_groups = [
            {**group, "params": [stand_ins[p] for p in group["params"] if p in stand_ins]}
            for group in self.param_groups
        ]
        other.state = defaultdict(dict)
        first = next(iter(stand_ins.values()), self.skipped)
        other.skipped = torch.zeros_like(self.skipped, device=first.device)
        return other

    # --- the step ----------------------------------------------------------------------------------------------------

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
        """List the parameters with a gradient in lists that can be stacked; new ones get their state."""
        found: dict[Hashable, list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is None or p.numel() == 0:
                continue
            if p.grad.is_sparse:
                raise ValueError(
                    f"{type(self).__name__} got a sparse gradient of shape {tuple(p.shape)}, which has no dense matrix "
                    "to work on; build the embedding with sparse=False."
                )
            if not self.state[p]:
                self.state[p] = self.init_state(p, group)
            found.setdefault((p.shape, p.dtype, p.device, self.bucket_key(p, group)), []).append(p)
        return [part for bucket in found.values() for part in _split(bucket)]

    def step_bucket(self, parameters: list[Tensor], group: Group) -> None:
        """Update one bucket in place: stack, pure update, decoupled decay, scatter."""
        dtype = state_dtype(parameters[0].dtype)
        weights = stack([p.detach() for p in parameters])
        gradients = stack([p.grad for p in parameters if p.grad is not None]).to(dtype)
        states = [self.state[p] for p in parameters]
        old = {name: stack([state[name] for state in states]) for name in states[0]}

        # The largest magnitude is NaN or infinite exactly when an entry is; one pass, no mask in memory.
        finite = torch.isfinite(largest_magnitude(gradients.reshape(len(parameters), -1), 1))
        self.skipped += (~finite).sum().to(self.skipped.device)
        # On a CPU looking costs nothing, and the masks below are then hardly ever made; elsewhere it would be a sync.
        clean = finite.device.type == "cpu" and not torch.compiler.is_compiling() and bool(finite.all())
        if not clean:
            gradients = torch.where(per_item(finite, gradients), gradients, 0.0)

        update, new = self.update(weights, gradients, old, group)
        wide = weights.to(dtype)
        moved = self.move(wide, update.to(dtype), old["step"], group)
        if not clean:
            moved = torch.where(per_item(finite, moved), moved, wide)
            new = {name: torch.where(per_item(finite, value), value, old[name]) for name, value in new.items()}
        if group.get("stochastic_rounding") and weights.dtype == torch.bfloat16:
            moved = round_stochastically(moved)
        torch._foreach_copy_(parameters, list(moved.unbind(0)))
        for name, value in new.items():
            torch._foreach_copy_([state[name] for state in states], list(value.unbind(0)))

    # --- state that travels ------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps the dtype it was saved in (torch would cast it to the weight's)."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        mine = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, mine, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                self.state[p][name] = value.detach().to(device=p.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps only its own three fields, so copy.deepcopy and pickle would lose the rest.
        state: dict[str, Any] = super().__getstate__()
        return {**state, "skipped": self.skipped}


def _split(bucket: list[Tensor]) -> list[list[Tensor]]:
    elements = STACKED_ELEMENTS.get(bucket[0].device.type, STACKED_ELEMENTS["cuda"])
    size = max(1, elements // bucket[0].numel())
    return [bucket[i : i + size] for i in range(0, len(bucket), size)]


class Rule(NamedTuple):
    """A base optimizer as data: `update(gradients, state, **hyper)` -> (U, new state), on a batch (B, ...).

    U is the direction without learning rate and without decoupled weight decay; `defaults` names the hyper-parameters.
    An `elementwise` rule updates every element from its own gradient alone.
    """

    init: Callable[[Tensor], State]
    update: Callable[..., tuple[Tensor, State]]
    defaults: Group
    elementwise: bool = True

    def apply(self, gradients: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
        """Call `update` with this rule's hyper-parameters out of a group that may hold others too."""
        return self.update(gradients, state, **{name: group[name] for name in self.defaults})


class RuleOptimizer(MatrixOptimizer):
    """An optimizer that is one `Rule` for all its parameters."""

    rule: ClassVar[Rule]

    def needs_whole(self, parameter: Tensor, group: Group) -> bool:
        """Whether the rule looks at a matrix as a whole."""
        return not self.rule.elementwise and parameter.ndim >= 2

    def init_state(self, parameter: Tensor, group: Group) -> State:
        """Return what the rule keeps for one parameter."""
        return self.rule.init(parameter)

    def update(self, parameters: Tensor, gradients: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
        """Return the rule's (U, new state) of a bucket."""
        return self.rule.apply(gradients, state, group)
