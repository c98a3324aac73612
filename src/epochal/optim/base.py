"""The base class of every optimizer in this package.

An optimizer is pure functions of batches plus the class below. A function sees tensors with a leading axis B over
parameters of one shape. The class groups the parameters, stacks them, and writes weights and state back:

    for each group: parameters with a gradient -> buckets of equal (shape, dtype, device, `bucket_key`)
    for each bucket: stack -> U, state = direction(...) -> U = transform(U) -> W <- (1 - lr wd) W - lr U -> write back

On a GPU with Triton a direction is compiled: one kernel, with the masks for non-finite gradients and, where no matrix is
needed whole, with the step of the weights. State is stacked once: the state of a parameter is a view of its bucket's.

Shapes: the B parameters of a bucket are (...) each, usually (m, n) with rows = outputs, columns = inputs.
Non-finite gradients: a parameter whose gradient contains a NaN or an infinity is skipped, with its state and its step
count; the other parameters of the bucket are not affected.
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, NamedTuple, ParamSpec, Self, TypeVar

import torch
from torch import Tensor

from triton_kernels.backend import backend

# Buckets are split at this many elements, so the peak temporary memory of a step is about ten times that size. On a CPU
# copying more costs more than dispatching; on a GPU a bucket is a batch of matrix products.
STACKED_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 26}
# On a GPU, where one compiled kernel steps a bucket of elements: copying a million takes as long as launching it.
ELEMENTWISE_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 20}

State = dict[str, Tensor]
Group = dict[str, Any]
Update = Callable[..., tuple[Tensor, State]]
P = ParamSpec("P")
R = TypeVar("R")


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


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function on a GPU with Triton: its element-wise operations become one kernel.

    Its first argument is a tensor, which decides.
    """
    compiled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or backend(args[0].device) != "triton":  # type: ignore[attr-defined]
            return function(*args, **kwargs)
        if not compiled:
            # A process that trains models of several sizes needs more variants of a function than the default of 8.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            compiled.append(torch.compile(function, fullgraph=True, dynamic=True))
        return compiled[0](*args, **kwargs)

    return call


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a DTensor; any other tensor as it is."""
    held: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return held


def _like(parameter: Tensor, state: State) -> State:
    """Return a state as DTensors if the parameter is one."""
    if not hasattr(parameter, "to_local"):
        return state
    wrapped: Any = type(parameter.data)  # tools that save sharded training look for it
    where = (parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    shape = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
    return {name: wrapped.from_local(value, *where, **shape) if value.ndim else value for name, value in state.items()}


def _is_flat(parameter: Tensor) -> bool:
    return bool(getattr(parameter, "_is_flat_param", False))  # the flat parameters of FSDP1


def joined(states: list[State], name: str) -> Tensor:
    """Return a state of B parameters as one tensor (B, ...).

    The parameters' own become views of it.
    """
    tensors = [local(state[name]) for state in states]
    first, size = tensors[0], tensors[0].numel()
    storage, start = first.untyped_storage().data_ptr(), first.storage_offset()
    if all(
        x.untyped_storage().data_ptr() == storage and x.storage_offset() == start + i * size and x.is_contiguous()
        for i, x in enumerate(tensors)
    ):
        return first.as_strided((len(tensors), *first.shape), (size, *first.stride()))
    stacked = torch.stack(tensors)
    for state, view in zip(states, stacked.unbind(0), strict=True):
        state[name] = view
    return stacked


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
    """Base class; a subclass implements `init_state`, `direction` and, for matrices, `transform`.

    Every group needs the keys `lr` and `weight_decay`; `stochastic_rounding` (bfloat16 weights only) is optional.

    Attributes:
        skipped: 0-d int64 tensor, the number of (parameter, step) pairs skipped because of a non-finite gradient.
    """

    skipped: Tensor

    def __init__(self, params: Any, defaults: Group) -> None:
        # Whether each parameter must be seen whole, settled here: a wrapper may put pieces in its place later.
        self._whole: dict[Tensor, bool] = {}
        super().__init__(params, defaults)
        # The counter stays on the device of the parameters: counting must not sync.
        first = next((p for group in self.param_groups for p in group["params"]), None)
        self.skipped = torch.zeros((), dtype=torch.int64, device=None if first is None else first.device)

    def add_param_group(self, param_group: Group) -> None:
        """As torch's; also settles which parameters of the group must be seen whole.

        Raises:
            ValueError: for a matrix of which this process has a piece only.
        """
        super().add_param_group(param_group)
        try:
            self.settle(self.param_groups[-1])
        except ValueError:
            # torch has appended the group already.
            self.param_groups.pop()
            raise

    def settle(self, group: Group) -> None:
        """Check a group and note what is a matrix in it."""
        for p in group["params"]:
            whole = self.needs_whole(p, group)
            # FSDP1 and deepspeed.zero.Init make a vector of any parameter. A DTensor still has the shape of the whole, and
            # `Sharded` of epochal.distributed steps it; without that it is refused at the first step.
            if self.matrices and (_is_flat(p) or hasattr(p, "ds_shape")):
                raise ValueError(self._in_pieces(p, "is a piece made by FSDP or deepspeed.zero.Init"))
            self._whole[p] = whole

    def _in_pieces(self, parameter: Tensor, why: str) -> str:
        return (
            f"{type(self).__name__} updates whole matrices, but the parameter of shape {tuple(parameter.shape)} {why}; train "
            "with DDP or `epochal run --preset`, which keep them whole, or take an element-wise optimizer (AdamW, Lion, "
            "Signum, AdEMAMix)."
        )

    # --- for subclasses to implement or override ---

    # Whether the class updates some parameters as matrices.
    matrices: ClassVar[bool] = True

    def init_state(self, parameter: Tensor, group: Group) -> State:
        """Return the state of one parameter before its first step: plain tensors, one of them `step` (0-d)."""
        raise NotImplementedError

    def direction(self, parameter: Tensor, group: Group) -> tuple[Update, Group]:
        """Return the function that steps a bucket like `parameter`, and its options.

        The function is (gradients, state, **options) -> (U, new state). Everything is (B, ...); it must not write to its
        arguments, and is compiled on a GPU.
        """
        raise NotImplementedError

    def transform(self, update: Tensor, weights: Tensor, step: Tensor, group: Group) -> Tensor:
        """Return what the weights of a bucket move by per learning rate; step (B,) counts the steps before this one."""
        return update

    def step_scale(self, parameter: Tensor, group: Group) -> float:
        """Return the factor on the learning rate of a parameter that must be seen whole."""
        return 1.0

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

    def rounding(self, device: torch.device) -> float:
        """Return the relative rounding of the products in which matrices are updated on a device."""
        return torch.finfo(torch.float32).eps

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
        other._whole = {params[p]: whole for p, whole in self._whole.items() if p in params}
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
        self._numbers: dict[Hashable, tuple[Tensor, Tensor]] = {}
        finite = [self.step_bucket(bucket, group) for group in self.param_groups for bucket in self.buckets(group)]
        if finite:
            good = torch.cat([part.to(self.skipped.device) for part in finite])
            self.skipped += len(good) - good.sum()
        return loss

    def buckets(self, group: Group) -> list[list[Tensor]]:
        """Return the parameters with a gradient as lists that can be stacked; initializes missing state.

        Raises:
            ValueError: for a sparse gradient, and for a parameter in place of one that must be seen whole.
        """
        buckets: dict[Hashable, list[Tensor]] = {}
        strict = any(self._whole.values())
        for p in group["params"]:
            # An empty parameter has no largest entry, which the check for non-finite gradients takes.
            if p.grad is None or p.numel() == 0:
                continue
            if p.grad.is_sparse:
                raise ValueError(
                    f"{type(self).__name__} cannot use the sparse gradient of a parameter of shape {tuple(p.shape)}; "
                    "build the embedding with sparse=False."
                )
            if strict and self._whole.get(p) and local(p) is not p:
                raise ValueError(self._in_pieces(p, "is sharded over processes"))
            if strict and p not in self._whole:
                why = (
                    "was not there when it was built: DeepSpeed, FSDP and the like put pieces in the place of matrices"
                )
                raise ValueError(self._in_pieces(p, why))
            # Lazily, as in torch: parameters that never get a gradient have no state.
            if not self.state[p]:
                self.state[p] = _like(p, self.init_state(local(p), group))
            # A DTensor is stepped where its state is, not stacked.
            alone = p if local(p) is not p else None
            if local(p).numel() > 0:
                buckets.setdefault((p.shape, p.dtype, p.device, alone, self.bucket_key(p, group)), []).append(p)
        return [
            part for bucket in buckets.values() for part in _split(bucket, whole=self.needs_whole(bucket[0], group))
        ]

    def step_bucket(self, parameters: list[Tensor], group: Group) -> Tensor:
        """Update one bucket in place; returns (B,) booleans, False for a parameter that was skipped."""
        dtype = state_dtype(parameters[0].dtype)
        weights = stack([local(p.detach()) for p in parameters])
        gradients = stack([local(p.grad) for p in parameters if p.grad is not None])
        states = [self.state[p] for p in parameters]
        state = {name: joined(states, name) for name in states[0]}
        # Tensors on the device, made once a step: a kernel launch each.
        whole = self.needs_whole(parameters[0], group)
        scale = self.step_scale(parameters[0], group) if whole else 1.0
        key = (weights.device, dtype, group["lr"], group["weight_decay"], scale)
        if key not in self._numbers:
            self._numbers[key] = scalar(group["lr"] * scale, weights), self.decay_factor(weights, group)
        lr, decay = self._numbers[key]
        rule, options = self.direction(parameters[0], group)
        wide = weights.to(dtype)
        if whole:
            step = state["step"].clone()  # the direction counts in place
            update, finite = _direct_(gradients, state, dtype, rule, options)
            _apply_(wide, self.transform(update, wide, step, group), finite, lr, decay)
        else:
            finite = _step_(wide, gradients, state, lr, decay, rule, options)
        # A view of a single parameter is updated already.
        if len(parameters) > 1 or wide is not weights:
            if group.get("stochastic_rounding") and weights.dtype == torch.bfloat16:
                wide = round_stochastically(wide)
            torch._foreach_copy_([local(p) for p in parameters], list(wide.unbind(0)))
        return finite

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
        # torch pickles three fields only, so copy.deepcopy and pickle would lose these.
        state: dict[str, Any] = super().__getstate__()
        return {**state, "skipped": self.skipped, "_whole": self._whole}


@fused
def _direct_(
    gradients: Tensor, state: State, dtype: torch.dtype, rule: Update, options: Group
) -> tuple[Tensor, Tensor]:
    """Return (U, finite) of a bucket and update its state; of a parameter whose gradient is not finite U is zero."""
    gradients = gradients.to(dtype)
    # The largest magnitude is NaN or infinite exactly if one of the entries is; this needs no mask of that size.
    finite = torch.isfinite(largest_magnitude(gradients.reshape(len(gradients), -1), 1))
    # The masks below cost memory traffic. On a CPU they are made only if needed; a GPU would have to sync to know.
    clean = known_true(finite)
    if not clean:
        # Zeros instead of NaN, so that products over the whole bucket stay finite.
        gradients = torch.where(per_item(finite, gradients), gradients, 0.0)
    update, new = rule(gradients, state, **options)
    if not clean:
        # The gradient was replaced by zeros, so momentum would still move weights and state.
        update = torch.where(per_item(finite, update), update, 0.0)
        new = {name: torch.where(per_item(finite, value), value, state[name]) for name, value in new.items()}
    for name, value in new.items():
        state[name].copy_(value)
    return update, finite


def _apply_(weights: Tensor, update: Tensor, finite: Tensor, lr: Tensor, decay: Tensor) -> None:
    """W <- (1 - lr wd) W - lr U in place; a skipped parameter, whose U is zero, does not decay either."""
    factor = decay
    if not known_true(finite):
        factor = per_item(torch.where(finite, decay, 1.0), weights)
        if update.ndim == 2:  # vectors, whose zero a transform may have moved: MARS's published decay
            update = torch.where(per_item(finite, update), update, 0.0)
    # Not addcmul, and not compiled: rounding the two products separately gives a shard, which receives lr U from the
    # matrix's owner, exactly the bits of an unsharded step.
    weights.mul_(factor).sub_(update.to(weights.dtype) * lr)


@fused
def _step_(
    weights: Tensor, gradients: Tensor, state: State, lr: Tensor, decay: Tensor, rule: Update, options: Group
) -> Tensor:
    """Step a bucket whose elements are independent, in place; return which of its parameters were finite."""
    update, finite = _direct_(gradients, state, weights.dtype, rule, options)
    _apply_(weights, update, finite, lr, decay)
    return finite


def _split(bucket: list[Tensor], *, whole: bool) -> list[list[Tensor]]:
    limits = STACKED_ELEMENTS if whole else ELEMENTWISE_ELEMENTS
    size = max(1, limits.get(bucket[0].device.type, limits["cuda"]) // bucket[0].numel())
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
    update: Update
    defaults: Group
    elementwise: bool = True

    def of(self, group: Group) -> tuple[Update, Group]:
        """Return `update` and its hyper-parameters out of a group, which may have others too."""
        return self.update, {name: group[name] for name in self.defaults}


class RuleOptimizer(MatrixOptimizer):
    """An optimizer that applies one `Rule` to all its parameters."""

    rule: ClassVar[Rule]

    def __init_subclass__(cls) -> None:
        cls.matrices = not cls.rule.elementwise

    def needs_whole(self, parameter: Tensor, group: Group) -> bool:
        """Return whether the rule needs all of a matrix."""
        return not self.rule.elementwise and parameter.ndim >= 2

    def init_state(self, parameter: Tensor, group: Group) -> State:
        """Return the rule's state of one parameter."""
        return self.rule.init(parameter)

    def direction(self, parameter: Tensor, group: Group) -> tuple[Update, Group]:
        """Return the rule."""
        return self.rule.of(group)
