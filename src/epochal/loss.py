"""Cross-entropy and K-teacher distillation from hidden states and head weights, in chunks of tokens.

Notation: N tokens, d width, V vocabulary, K teachers, C rows of a chunk. A chunk needs one (C, V) buffer for logits and,
with teachers, one (C, V) buffer for their mixture, so memory does not depend on N or K. Second derivatives raise
RuntimeError.

Matrix products run in the dtype of their operands, or in autocast's; sums, the mixture and the gradient of the head are
float32 (float64 for float64 input). The chunked form follows Liger-Kernel and Apple's cut cross-entropy, which support
at most one teacher; the mixture of K teachers in one buffer is new.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from triton_kernels import backend as kernels
from triton_kernels.softmax_add import softmax_add_
from triton_kernels.softmax_loss import softmax_loss, softmax_loss_reference
from triton_kernels.sparse_loss import sparse_loss, sparse_loss_reference

# (hidden (N, d_k), head (V, d_k)) of one teacher.
Teacher = tuple[Tensor, Tensor]

# Elements of a chunk's (C, V) buffer: 64 MiB in float32 on a CPU, enough rows to fill a GPU.
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}

# Elements per block of rows in the plain torch path, so that a block stays in a core's cache.
_CACHE_ELEMENTS = 2**18


def backend(device: torch.device | str = "cpu") -> str:
    """Return which implementation computes the softmax on ``device``: ``"triton"`` or ``"torch"``."""
    # Triton's interpreter is only for tests, so a CPU always takes the torch path.
    return "triton" if kernels.backend(device) == "triton" else "torch"


def cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    normaliser: float | Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the mean cross-entropy of ``softmax(hidden @ head.T)`` against ``targets``, a float32 scalar.

    hidden (N, d), head (V, d), targets (N,) int64. The sum over tokens other than ``ignore_index`` is divided by
    ``normaliser``, by default their number (at least 1, so a batch without any gives 0). With gradient accumulation or
    several ranks, pass the number of tokens of the whole step (divided by the number of ranks if gradients are averaged
    over ranks), so that the parts add up to the mean of the step.
    Raises ValueError for shapes, dtypes or targets that do not fit.
    """
    _check_student(hidden, head, targets, ignore_index)
    options = _options(hidden, head, 0.0, ignore_index, chunk_tokens)
    total = _linear_loss(
        hidden, head, targets, [], [], teacher_weights=[1.0], average="logits", temperature=1.0, **vars(options)
    )[0]
    return _normalize(total, targets, ignore_index, normaliser)


def distillation_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    teachers: Sequence[Teacher],
    *,
    average: str,
    weight: float,
    temperature: float = 1.0,
    teacher_weights: Sequence[float] | None = None,
    ignore_index: int = -100,
    normaliser: float | Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the distillation loss against K teachers, a float32 scalar.

    It is (1 - weight) CE + weight T² KL(teachers at T || student at T).

    hidden (N, d), head (V, d), targets (N,) int64. ``teachers`` is a list of (hidden (N, d_k), head (V, d_k)), which
    receive no gradient; give them in the dtype of the products to save a cast per chunk. ``average="logits"`` teaches
    softmax(Σ w_k z_k / T), ``"probs"`` teaches Σ w_k softmax(z_k / T); ``teacher_weights`` are divided by their sum and
    equal by default. Ignored tokens count in neither term. ``normaliser`` as in `cross_entropy`.
    Raises ValueError for values, shapes, dtypes or targets that do not fit.
    """
    _check_student(hidden, head, targets, ignore_index)
    weights = _check_teachers(hidden, head, teachers, teacher_weights)
    if average not in ("logits", "probs"):
        raise ValueError(f"average must be 'logits' or 'probs', got {average!r}.")
    _check_weight(weight)
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be a positive number, got {temperature}.")
    if weight == 0.0:
        teachers, weights = (), [1.0]  # torch.library does not accept an empty list of floats
    options = _options(hidden, head, weight, ignore_index, chunk_tokens)
    total = _linear_loss(
        hidden,
        head,
        targets,
        [x.detach() for x, _ in teachers],
        [w.detach() for _, w in teachers],
        teacher_weights=weights,
        average=average,
        temperature=float(temperature),
        **vars(options),
    )[0]
    return _normalize(total, targets, ignore_index, normaliser)


def cached_distillation_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    ids: Tensor,
    probs: Tensor,
    *,
    weight: float,
    ignore_index: int = -100,
    normaliser: float | Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the distillation loss against stored teacher probabilities, a float32 scalar.

    It is (1 - weight) CE + weight KL(teacher || student).

    hidden (N, d), head (V, d), targets (N,) int64. ids (N, k), any integer type, distinct within a row, are the tokens
    whose teacher probabilities at temperature 1 are stored in probs (N, k), any float type. The probability mass that a
    row of probs lacks to 1 is compared with the student's mass outside of ids, so the student is not taught that other
    tokens are impossible. With k = V this equals `distillation_loss`; with k = 0 the divergence is 0. ids and probs
    receive no gradient. ``normaliser`` as in `cross_entropy`.
    Raises ValueError for values, shapes, dtypes, targets or ids that do not fit.
    """
    _check_student(hidden, head, targets, ignore_index)
    _check_stored(hidden, head, ids, probs)
    _check_weight(weight)
    options = _options(hidden, head, weight, ignore_index, chunk_tokens)
    # The temperature is 1: probabilities were stored at 1, and another T needs the logits.
    total = _linear_sparse_loss(hidden, head, targets, ids.detach(), probs.detach(), **vars(options))[0]
    return _normalize(total, targets, ignore_index, normaliser)


@torch.no_grad()
def token_log_probs(
    hidden: Tensor, head: Tensor, targets: Tensor, *, ignore_index: int = -100, chunk_tokens: int | None = None
) -> Tensor:
    """Return log softmax(hidden @ head.T) at each target, (N,) float32; 0 where ignored.

    No gradient is computed. Shapes, dtypes and errors as in `cross_entropy`.
    """
    _check_student(hidden, head, targets, ignore_index)
    dtype = _product_dtype(hidden)
    rows = _rows(hidden, head, chunk_tokens)
    parts = []
    with torch.autocast(hidden.device.type, enabled=False):
        weight = head.to(dtype)
        for x, y in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            # The cross-entropy of a target is -log p, so the kernel of the loss serves.
            parts.append(-_softmax_loss(x.to(dtype) @ weight.t(), y, None, 0.0, 1.0, ignore_index, False))
    return torch.cat(parts)


# --- the operations -------------------------------------------------------------------------------------------------------
# Custom ops rather than autograd Functions, so that torch.compile does not break the graph. Tensors are positional, the
# options keyword-only: autograd sees the tensors alone, and every function below reads the options by name. The gradient
# is formed in the forward pass, while the logits exist; backward only scales it.


@dataclass(frozen=True)
class _Options:
    """Options that both operations share; `vars` of it are their keyword arguments."""

    weight: float
    ignore_index: int
    # Of the matrix products.
    dtype: torch.dtype
    chunk_tokens: int
    hidden_gradient: bool
    head_gradient: bool


def _options(hidden: Tensor, head: Tensor, weight: float, ignore_index: int, chunk_tokens: int | None) -> _Options:
    grad = torch.is_grad_enabled()
    return _Options(
        weight=float(weight),
        ignore_index=ignore_index,
        dtype=_product_dtype(hidden),
        chunk_tokens=_rows(hidden, head, chunk_tokens),
        hidden_gradient=grad and hidden.requires_grad,
        head_gradient=grad and head.requires_grad,
    )


@torch.library.custom_op("epochal::linear_loss", mutates_args=())
def _linear_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    teacher_hidden: list[Tensor],
    teacher_heads: list[Tensor],
    *,
    teacher_weights: list[float],
    average: str,
    temperature: float,
    weight: float,
    ignore_index: int,
    dtype: torch.dtype,
    chunk_tokens: int,
    hidden_gradient: bool,
    head_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss and its gradients for hidden (N, d) and head (V, d).

    A gradient that is not requested is an empty tensor.
    """
    options = _Options(weight, ignore_index, dtype, chunk_tokens, hidden_gradient, head_gradient)
    wide = torch.promote_types(dtype, torch.float32)
    rows = min(chunk_tokens, max(hidden.shape[0], 1)) if teacher_heads else 0
    mixture = hidden.new_empty(rows, head.shape[0], dtype=wide)

    def mix_teachers(part: slice, scratch: Tensor) -> None:
        soft = mixture[: len(scratch)]
        for k, (x, w) in enumerate(zip(teacher_hidden, teacher_heads, strict=True)):
            _add_teacher(soft, scratch, x[part], w, teacher_weights[k], average, temperature, first=k == 0)
        # Averaged logits become probabilities once all teachers are in.
        if teacher_heads and average == "logits":
            _softmax_add(soft, soft, 1.0, temperature, accumulate=False)

    def losses(part: slice, z: Tensor) -> Tensor:
        soft = mixture[: len(z)] if teacher_heads else None
        gradient = hidden_gradient or head_gradient
        return _softmax_loss(z, targets[part], soft, weight, temperature, ignore_index, gradient)

    return _over_chunks(hidden, head, options, losses, mix_teachers)


@torch.library.custom_op("epochal::linear_sparse_loss", mutates_args=())
def _linear_sparse_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    ids: Tensor,
    probs: Tensor,
    *,
    weight: float,
    ignore_index: int,
    dtype: torch.dtype,
    chunk_tokens: int,
    hidden_gradient: bool,
    head_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_linear_loss`, against stored targets ids (N, k) and probs (N, k)."""
    options = _Options(weight, ignore_index, dtype, chunk_tokens, hidden_gradient, head_gradient)

    def losses(part: slice, z: Tensor) -> Tensor:
        return _sparse_loss(z, targets[part], ids[part].long(), probs[part], weight, ignore_index)

    return _over_chunks(hidden, head, options, losses)


def _over_chunks(
    hidden: Tensor,
    head: Tensor,
    options: _Options,
    losses: Callable[[slice, Tensor], Tensor],
    mix_teachers: Callable[[slice, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum `losses(part, z)` over chunks of tokens.

    `losses` overwrites the student's logits z (C, V) with their gradient. `mix_teachers(part, scratch)` runs before it and
    may use the logits' buffer.
    """
    dtype, wide = options.dtype, torch.promote_types(options.dtype, torch.float32)
    # Chunks of equal size: a short last one would run its products at a fraction of the speed.
    chunks = max(1, -(-len(hidden) // options.chunk_tokens))
    rows = max(1, -(-len(hidden) // chunks))
    # Sums, not means: in float16 the gradient of a mean would underflow. The caller divides the result.
    total = hidden.new_zeros((), dtype=wide)
    d_hidden = hidden.new_empty(hidden.shape if options.hidden_gradient else (0,))
    d_head = torch.zeros_like(head, dtype=wide) if options.head_gradient else head.new_empty((0,), dtype=wide)
    logits = hidden.new_empty(rows, head.shape[0], dtype=dtype)
    with torch.autocast(hidden.device.type, enabled=False):  # products run in `dtype`, cast explicitly below
        student_head = head.to(dtype)
        for start in range(0, len(hidden), rows):
            part = slice(start, min(start + rows, len(hidden)))
            z = logits[: part.stop - start]
            # Before the student: the teachers use the buffer that the student's logits need next.
            if mix_teachers is not None:
                mix_teachers(part, z)
            x = hidden[part].to(dtype)
            torch.mm(x, student_head.t(), out=z)
            total += losses(part, z).sum()
            if options.hidden_gradient:
                # z now holds d loss / d logits (C, V), so dX = dZ W and dW = dZ^T X.
                d_hidden[part] = z @ student_head
            if options.head_gradient:
                _add_product(d_head, z.t(), x)
    return total, d_hidden, d_head.to(head.dtype)


def _add_teacher(
    soft: Tensor, z: Tensor, x: Tensor, head: Tensor, share: float, average: str, temperature: float, *, first: bool
) -> None:
    """Add one teacher's logits or probabilities to ``soft`` (C, V); ``z`` (C, V) is scratch."""
    x, head = x.to(z.dtype), head.to(z.dtype)
    # A softmax per teacher cannot be accumulated by the product itself; a mean of logits can.
    if average == "probs":
        torch.mm(x, head.t(), out=z)
        _softmax_add(soft, z, share, temperature, accumulate=not first)
        return
    if first:
        soft.zero_()
    _add_product(soft, x, head.t(), scale=share, scratch=z)


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, scale: float = 1.0, scratch: Tensor | None = None) -> None:
    """Add scale a @ b to ``total``; 16-bit products are summed in ``total``'s wider dtype.

    Without ``scratch``, of the product's shape in a's dtype, they are not rounded to 16 bits before, on a GPU.
    """
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=scale)
    elif a.device.type == "cuda" and scratch is None:
        total.add_(torch.mm(a, b, out_dtype=torch.float32), alpha=scale)
    else:
        total.add_(torch.mm(a, b, out=scratch), alpha=scale)


def _softmax_loss(
    z: Tensor, y: Tensor, soft: Tensor | None, weight: float, temperature: float, ignore_index: int, gradient: bool
) -> Tensor:
    """Return the losses of a chunk and overwrite its logits with their gradient."""
    if backend(z.device) == "triton":
        losses: Tensor = softmax_loss(z, y, soft, weight, temperature, ignore_index, gradient)
        return losses
    parts = []
    for part in _row_blocks(z):
        if soft is None:
            loss, d_z = _block_cross_entropy(z[part], y[part], ignore_index)
        else:
            loss, d_z = softmax_loss_reference(
                z[part], y[part], soft[part], weight=weight, temperature=temperature, ignore_index=ignore_index
            )
        parts.append(loss)
        if gradient:
            z[part] = d_z
    return torch.cat(parts)


def _block_cross_entropy(z: Tensor, y: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return the losses of a block of logits and their gradient.

    Both are float32, or float64 for float64 logits.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    ignored = y == ignore_index
    hot = y.masked_fill(ignored, 0).unsqueeze(1)
    # One exponential: the largest probability is 1 / sum exp(z - max z), at least 1 / V, so its logarithm is exact enough.
    p = z.softmax(1)
    loss = z.amax(1) - z.gather(1, hot).squeeze(1) - p.amax(1).log()
    p.scatter_add_(1, hot, torch.full_like(hot, -1, dtype=p.dtype))
    if ignored.any():
        p[ignored] = 0.0
    return loss.masked_fill_(ignored, 0.0), p


def _sparse_loss(z: Tensor, y: Tensor, ids: Tensor, p: Tensor, weight: float, ignore_index: int) -> Tensor:
    """As `_softmax_loss`, against stored targets; the gradient is always written."""
    if backend(z.device) == "triton":
        losses: Tensor = sparse_loss(z, y, ids, p, weight, ignore_index)
        return losses
    parts = []
    for part in _row_blocks(z):
        loss, d_z = sparse_loss_reference(
            z[part], y[part], ids[part], p[part], weight=weight, ignore_index=ignore_index
        )
        parts.append(loss)
        z[part] = d_z
    return torch.cat(parts)


def _softmax_add(soft: Tensor, z: Tensor, share: float, temperature: float, *, accumulate: bool) -> None:
    """Set ``soft`` to share softmax(z / temperature), or add that to it."""
    if backend(z.device) == "triton":
        softmax_add_(soft, z, share, temperature, accumulate)
        return
    for part in _row_blocks(z):
        p = z[part].to(soft.dtype)
        p = torch.softmax(p if temperature == 1.0 else p / temperature, 1)
        if accumulate:
            soft[part].add_(p, alpha=share)
        else:
            torch.mul(p, share, out=soft[part])


def _row_blocks(z: Tensor) -> list[slice]:
    rows = max(1, _CACHE_ELEMENTS // max(z.shape[1], 1)) if z.device.type == "cpu" else max(z.shape[0], 1)
    return [slice(start, start + rows) for start in range(0, z.shape[0], rows)]


@_linear_loss.register_fake
@_linear_sparse_loss.register_fake
def _(hidden: Tensor, head: Tensor, *tensors: Any, **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
    # Shapes and dtypes only, for torch.compile; must agree with `_over_chunks`.
    total = hidden.new_empty((), dtype=torch.promote_types(keywords["dtype"], torch.float32))
    d_hidden = hidden.new_empty(hidden.shape if keywords["hidden_gradient"] else (0,))
    return total, d_hidden, torch.empty_like(head) if keywords["head_gradient"] else head.new_empty((0,))


def _save(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    hidden, head, *constants = inputs
    _, d_hidden, d_head = output
    ctx.save_for_backward(hidden, head, d_hidden, d_head)
    ctx.mark_non_differentiable(d_hidden, d_head)
    # Targets and teachers have no gradient; for a list of tensors autograd expects a list of None.
    ctx.no_gradients = [[None] * len(value) if isinstance(value, list) else None for value in constants]


def _backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Any, ...]:
    hidden, head, d_hidden, d_head = ctx.saved_tensors
    need_hidden, need_head = ctx.needs_input_grad[:2]
    return (
        _scale(d_hidden, gradient, hidden, head) if need_hidden else None,
        _scale(d_head, gradient, hidden, head) if need_head else None,
        *ctx.no_gradients,
    )


_linear_loss.register_autograd(_backward, setup_context=_save)
_linear_sparse_loss.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("epochal::scale_loss_gradient", mutates_args=())
def _scale(gradient: Tensor, factor: Tensor, hidden: Tensor, head: Tensor) -> Tensor:
    """Return gradient * factor.

    hidden and head are arguments only so that autograd reaches `_refuse` on a second derivative instead of taking 0.
    """
    return (gradient * factor.to(torch.promote_types(gradient.dtype, torch.float32))).to(gradient.dtype)


@_scale.register_fake
def _(gradient: Tensor, factor: Tensor, hidden: Tensor, head: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _refuse(ctx: Any, gradient: Tensor) -> None:
    raise RuntimeError(
        "epochal.loss has no second derivative because its gradient is formed in the forward pass; use a materialized "
        "loss such as torch.nn.functional.cross_entropy to differentiate a gradient."
    )


_scale.register_autograd(_refuse)


# --- arguments ------------------------------------------------------------------------------------------------------------


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _rows(hidden: Tensor, head: Tensor, chunk_tokens: int | None) -> int:
    if chunk_tokens is None:
        fitting = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cuda"]) // max(head.shape[0], 1)
        # Multiples of 64 rows, the tile of a matrix product.
        return max(64, fitting // 64 * 64)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be a positive integer, got {chunk_tokens}.")
    return chunk_tokens


def _normalize(total: Tensor, targets: Tensor, ignore_index: int, normaliser: float | Tensor | None) -> Tensor:
    # At least 1, so that a batch without any target gives 0 instead of NaN.
    if normaliser is None:
        # A tensor, so that a GPU need not be read.
        normaliser = (targets != ignore_index).sum().clamp(min=1)
    return total / normaliser


def _check_student(hidden: Tensor, head: Tensor, targets: Tensor, ignore_index: int) -> None:
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and head {tuple(head.shape)} do not multiply; pass (tokens, d) and (V, d)."
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets {tuple(targets.shape)} {targets.dtype} do not match hidden {tuple(hidden.shape)}; "
            f"pass int64 indices of shape ({hidden.shape[0]},)."
        )
    # Under autocast both are cast to one dtype.
    if not torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != head.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} but head is {head.dtype}; cast one of them or run under torch.autocast."
        )
    # Last, because it is the only check that reads values.
    wrong = _outside(targets, head, ignore_index)
    if wrong is not None:
        raise ValueError(
            f"target {wrong} is outside the vocabulary of {head.shape[0]} rows of the head; "
            f"use indices below it, or {ignore_index} for ignored positions."
        )


def _outside(indices: Tensor, head: Tensor, ignore_index: int | None = None) -> int | None:
    """Return the first index outside of the head's rows; only checked on a CPU."""
    # On a GPU the check would cost a synchronization; the kernels give NaN for an index out of range.
    if indices.device.type != "cpu" or not indices.numel() or torch.compiler.is_compiling():
        return None
    wrong = (indices < 0) | (indices >= head.shape[0])
    outside = indices[wrong if ignore_index is None else wrong & (indices != ignore_index)]
    return int(outside[0]) if outside.numel() else None


def _check_weight(weight: float) -> None:
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"weight must be between 0 and 1, got {weight}.")


def _check_stored(hidden: Tensor, head: Tensor, ids: Tensor, probs: Tensor) -> None:
    if ids.ndim != 2 or len(ids) != len(hidden) or ids.shape[1] > len(head) or probs.shape != ids.shape:
        raise ValueError(
            f"ids {tuple(ids.shape)} and probs {tuple(probs.shape)} do not fit {len(hidden)} tokens and a vocabulary of "
            f"{len(head)}; pass two tensors of shape ({len(hidden)}, k), k at most the vocabulary."
        )
    if ids.is_floating_point() or not probs.is_floating_point():
        raise ValueError(f"ids must be integers and probs floating-point, got {ids.dtype} and {probs.dtype}.")
    wrong = _outside(ids, head)
    if wrong is not None:
        raise ValueError(
            f"stored id {wrong} is outside the vocabulary of {len(head)} rows of the head; the targets belong to "
            "another tokenizer or their file is damaged."
        )


def _check_teachers(
    hidden: Tensor, head: Tensor, teachers: Sequence[Teacher], teacher_weights: Sequence[float] | None
) -> list[float]:
    """Return the teachers' weights, scaled to sum to one."""
    if not teachers:
        raise ValueError("teachers is empty; pass at least one, or use cross_entropy.")
    for k, (x, w) in enumerate(teachers):
        if x.ndim != 2 or w.ndim != 2 or x.shape != (hidden.shape[0], w.shape[1]) or w.shape[0] != head.shape[0]:
            raise ValueError(
                f"teacher {k} with hidden {tuple(x.shape)} and head {tuple(w.shape)} does not fit {hidden.shape[0]} "
                f"tokens and a vocabulary of {head.shape[0]}; pass (tokens, d_k) and (V, d_k) of the same tokenizer."
            )
    shares = [1.0] * len(teachers) if teacher_weights is None else [float(share) for share in teacher_weights]
    total = math.fsum(shares)
    if len(shares) != len(teachers) or min(shares) < 0.0 or not (0.0 < total < math.inf):
        raise ValueError(
            f"teacher_weights={shares} do not fit {len(teachers)} teachers; pass one non-negative number for each, with a "
            "positive sum."
        )
    return [share / total for share in shares]
