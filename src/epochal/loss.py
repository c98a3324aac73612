"""Cross-entropy and K-teacher distillation from hidden states and head weights; logits are never stored whole.

Notation: N tokens, d width, V vocabulary, K teachers. Tokens are taken in chunks of C rows. A chunk needs one (C, V)
buffer for logits (teachers take turns in it, the student comes last and is replaced by its gradient) and, with
teachers, one (C, V) mixture: memory does not depend on K. The gradient is formed in the forward pass, because the
logits are then at hand; backward only scales it. So there is no second derivative, and asking for one is an error.

The products run in the dtype of their operands, or in autocast's; sums, the mixture and the head's gradient are
float32 (float64 for float64 input). Source of the chunked form: Liger-Kernel and Apple's cut cross-entropy, each for
one teacher at most; the mixture over K teachers in one buffer is new here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_kernels import backend as kernels
from triton_kernels.softmax_add import softmax_add_
from triton_kernels.softmax_loss import softmax_loss, softmax_loss_reference
from triton_kernels.sparse_loss import sparse_loss, sparse_loss_reference

Teacher = tuple[Tensor, Tensor]
"""(hidden (N, d_k), head (V, d_k)) of one teacher."""

CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}
"""Elements of a chunk's (C, V) buffer: 64 MiB in float32 on a CPU, and enough rows to fill a GPU."""

_CACHE_ELEMENTS = 2**18
"""Elements of the row blocks in which plain torch does the softmax parts, so that they stay in a core's cache."""


def backend(device: torch.device | str = "cpu") -> str:
    """Return the path of the softmax parts on ``device``, ``"triton"`` or ``"torch"``, for the record of a run.

    Triton's interpreter is a test device and never chosen here: on a CPU the answer is always ``"torch"``.
    """
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
    """Return the cross-entropy of ``softmax(hidden @ head.T)`` against ``targets``: a float32 scalar.

    hidden (N, d), head (V, d), targets (N,) int64. The sum over the tokens that count is divided by ``normaliser``; by
    default by their number (at least one, so a wholly ignored batch gives 0). With accumulation or several ranks give
    the tokens of the whole step (divided by the ranks where the gradients are averaged): the parts then add up.
    Raises ValueError for shapes, dtypes or targets that do not fit.
    """
    _check_student(hidden, head, targets, ignore_index)
    total = _call(hidden, head, targets, (), [], "logits", 0.0, 1.0, ignore_index, chunk_tokens)
    return _normalise(total, targets, ignore_index, normaliser)


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
    """Return (1 - weight) CE + weight T² KL(teachers at T || student at T) over the tokens: a float32 scalar.

    hidden (N, d), head (V, d), targets (N,) int64; ``teachers`` is a list of (hidden (N, d_k), head (V, d_k)), which
    receive no gradient. ``average="logits"`` takes softmax(Σ w_k z_k / T), ``"probs"`` takes Σ w_k softmax(z_k / T);
    ``teacher_weights`` are divided by their sum, by default equal. An ignored token has neither part. ``normaliser``
    as in `cross_entropy`. Teachers kept in the dtype of the products save a cast per chunk.
    Raises ValueError for values, shapes, dtypes or targets that do not fit.
    """
    _check_student(hidden, head, targets, ignore_index)
    weights = _check_teachers(hidden, head, teachers, teacher_weights)
    if average not in ("logits", "probs"):
        raise ValueError(f"average={average!r} is not known; use 'logits' or 'probs', which differ.")
    _check_weight(weight)
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature} cannot divide logits; use a positive number.")
    if weight == 0.0:
        teachers, weights = (), []
    total = _call(hidden, head, targets, teachers, weights, average, weight, temperature, ignore_index, chunk_tokens)
    return _normalise(total, targets, ignore_index, normaliser)


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
    """Return (1 - weight) CE + weight KL(teacher || student) from stored teacher probabilities: a float32 scalar.

    hidden (N, d), head (V, d), targets (N,) int64; ids (N, k), any integer type and distinct in a row, name the tokens
    whose teacher probability is stored in probs (N, k), any float type, at temperature 1. What they leave of 1 is the
    teacher's mass on "any other token", compared with the student's mass there, so a student is not taught to put
    nothing outside the stored tokens. With k = V this is `distillation_loss`; k = 0 stores nothing and teaches nothing.
    ``normaliser`` as in `cross_entropy`. The stored targets receive no gradient.
    Raises ValueError for values, shapes, dtypes, targets or ids that do not fit.
    """
    _check_student(hidden, head, targets, ignore_index)
    _check_stored(hidden, head, ids, probs)
    _check_weight(weight)
    need = _needed(hidden, head)
    rows, dtype = _rows(hidden, head, chunk_tokens), _product_dtype(hidden)
    total: Tensor = _linear_sparse_loss(
        hidden, head, targets, ids.detach(), probs.detach(), float(weight), ignore_index, dtype, rows, *need
    )[0]
    return _normalise(total, targets, ignore_index, normaliser)


@torch.no_grad()
def token_log_probs(
    hidden: Tensor, head: Tensor, targets: Tensor, *, ignore_index: int = -100, chunk_tokens: int | None = None
) -> Tensor:
    """Return log softmax(hidden @ head.T) at each target, (N,) float32, without gradient; 0 where ignored.

    Shapes, dtypes and errors as in `cross_entropy`.
    """
    _check_student(hidden, head, targets, ignore_index)
    dtype = _product_dtype(hidden)
    rows = _rows(hidden, head, chunk_tokens)
    parts = []
    with torch.autocast(hidden.device.type, enabled=False):
        weight = head.to(dtype)
        for x, y in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            parts.append(-_softmax_loss(x.to(dtype) @ weight.t(), y, None, 0.0, 1.0, ignore_index, False))
    return torch.cat(parts)


# ---------------------------------------------------------------- the operation


@torch.library.custom_op("epochal::linear_loss", mutates_args=())
def _linear_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    teacher_hidden: list[Tensor],
    teacher_heads: list[Tensor],
    teacher_weights: list[float],
    average: str,
    weight: float,
    temperature: float,
    ignore_index: int,
    dtype: torch.dtype,
    chunk_tokens: int,
    hidden_gradient: bool,
    head_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sum of losses, its gradient for hidden (N, d), for head (V, d)); a gradient not asked for is empty."""
    wide = torch.promote_types(dtype, torch.float32)
    rows, vocabulary = min(chunk_tokens, max(hidden.shape[0], 1)), head.shape[0]
    mixture = hidden.new_empty(rows if teacher_heads else 0, vocabulary, dtype=wide)
    need = hidden_gradient or head_gradient

    def teach(part: slice, scratch: Tensor) -> None:
        soft = mixture[: len(scratch)]
        for k, (x, w) in enumerate(zip(teacher_hidden, teacher_heads, strict=True)):
            _add_teacher(soft, scratch, x[part], w, teacher_weights[k], average, temperature, first=k == 0)
        if teacher_heads and average == "logits":
            _softmax_add(soft, soft, 1.0, temperature, accumulate=False)

    def losses(part: slice, z: Tensor) -> Tensor:
        soft = mixture[: len(z)] if teacher_heads else None
        return _softmax_loss(z, targets[part], soft, weight, temperature, ignore_index, need)

    return _over_chunks(hidden, head, dtype, rows, (hidden_gradient, head_gradient), teach, losses)


@torch.library.custom_op("epochal::linear_sparse_loss", mutates_args=())
def _linear_sparse_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    ids: Tensor,
    probs: Tensor,
    weight: float,
    ignore_index: int,
    dtype: torch.dtype,
    chunk_tokens: int,
    hidden_gradient: bool,
    head_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_linear_loss`, against stored targets ids (N, k) and probs (N, k)."""
    rows = min(chunk_tokens, max(hidden.shape[0], 1))

    def losses(part: slice, z: Tensor) -> Tensor:
        return _sparse_loss(z, targets[part], ids[part].long(), probs[part], weight, ignore_index)

    return _over_chunks(hidden, head, dtype, rows, (hidden_gradient, head_gradient), lambda part, scratch: None, losses)


def _over_chunks(
    hidden: Tensor,
    head: Tensor,
    dtype: torch.dtype,
    rows: int,
    need: tuple[bool, bool],
    teach: Callable[[slice, Tensor], None],
    losses: Callable[[slice, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum `losses(part, z)`, which writes the gradient over the student's logits z (C, V), over chunks of ``rows``.

    `teach(part, scratch)` comes before each and may use the logits' buffer. Nothing is divided by the number of tokens
    here: in float16 the gradient of a mean would underflow.
    """
    wide = torch.promote_types(dtype, torch.float32)
    total = hidden.new_zeros((), dtype=wide)
    d_hidden = hidden.new_empty(hidden.shape if need[0] else (0,))
    d_head = torch.zeros_like(head, dtype=wide) if need[1] else head.new_empty((0,), dtype=wide)
    logits = hidden.new_empty(rows, head.shape[0], dtype=dtype)
    with torch.autocast(hidden.device.type, enabled=False):  # the casts below are the ones wanted
        student_head = head.to(dtype)
        for start in range(0, len(hidden), rows):
            part = slice(start, min(start + rows, len(hidden)))
            z = logits[: part.stop - start]
            teach(part, z)
            x = hidden[part].to(dtype)
            torch.mm(x, student_head.t(), out=z)
            total += losses(part, z).sum()
            if need[0]:
                d_hidden[part] = z @ student_head
            if need[1]:
                _add_product(d_head, z.t(), x)
    return total, d_hidden, d_head.to(head.dtype)


def _add_teacher(
    soft: Tensor, z: Tensor, x: Tensor, head: Tensor, share: float, average: str, temperature: float, *, first: bool
) -> None:
    """Add one teacher's logits or probabilities to ``soft`` (C, V), using ``z`` (C, V) as its scratch."""
    x, head = x.to(z.dtype), head.to(z.dtype)
    if average == "probs":
        torch.mm(x, head.t(), out=z)
        _softmax_add(soft, z, share, temperature, accumulate=not first)
    elif first:
        soft.zero_()
        _add_product(soft, x, head.t(), scale=share, scratch=z)
    else:
        _add_product(soft, x, head.t(), scale=share, scratch=z)


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, scale: float = 1.0, scratch: Tensor | None = None) -> None:
    """Add scale a @ b to ``total``; a product in 16 bits is summed in ``total``'s wider type."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=scale)
    else:
        total.add_(torch.mm(a, b, out=scratch), alpha=scale)


def _softmax_loss(
    z: Tensor, y: Tensor, soft: Tensor | None, weight: float, temperature: float, ignore_index: int, gradient: bool
) -> Tensor:
    """Return the losses of a chunk and write their gradient over its logits: kernel, or torch in row blocks."""
    if backend(z.device) == "triton":
        losses: Tensor = softmax_loss(z, y, soft, weight, temperature, ignore_index, gradient)
        return losses
    parts = []
    for part in _row_blocks(z):
        p = None if soft is None else soft[part]
        loss, d_z = softmax_loss_reference(
            z[part], y[part], p, weight=weight, temperature=temperature, ignore_index=ignore_index
        )
        parts.append(loss)
        if gradient:
            z[part] = d_z
    return torch.cat(parts)


def _sparse_loss(z: Tensor, y: Tensor, ids: Tensor, p: Tensor, weight: float, ignore_index: int) -> Tensor:
    """Return the losses of a chunk against stored targets and write their gradient over its logits."""
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
    """Put or add share softmax(z / temperature) into ``soft``: kernel, or torch in row blocks."""
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
def _(hidden: Tensor, head: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype, hidden_gradient, head_gradient = rest[-4], rest[-2], rest[-1]
    total = hidden.new_empty((), dtype=torch.promote_types(dtype, torch.float32))
    d_hidden = hidden.new_empty(hidden.shape if hidden_gradient else (0,))
    return total, d_hidden, torch.empty_like(head) if head_gradient else head.new_empty((0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1], output[2])
    # What a gradient must look like: a list of tensors wants a list, anything else None.
    ctx.nothing = [[None] * len(value) if _holds_tensors(value) else None for value in inputs[2:]]
    ctx.mark_non_differentiable(output[1], output[2])


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Tensor) for item in value)


def _backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Any, ...]:
    hidden, head, d_hidden, d_head = ctx.saved_tensors
    need_hidden, need_head = ctx.needs_input_grad[:2]
    return (
        _scale(d_hidden, gradient, hidden, head) if need_hidden else None,
        _scale(d_head, gradient, hidden, head) if need_head else None,
        *ctx.nothing,
    )


_linear_loss.register_autograd(_backward, setup_context=_save)
_linear_sparse_loss.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("epochal::scale_loss_gradient", mutates_args=())
def _scale(gradient: Tensor, factor: Tensor, hidden: Tensor, head: Tensor) -> Tensor:
    """Return gradient * factor; hidden and head are there so that a second derivative is refused, not taken as 0."""
    return (gradient * factor.to(torch.promote_types(gradient.dtype, torch.float32))).to(gradient.dtype)


@_scale.register_fake
def _(gradient: Tensor, factor: Tensor, hidden: Tensor, head: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _refuse(ctx: Any, gradient: Tensor) -> None:
    raise RuntimeError(
        "epochal.loss has no second derivative, because its gradient is formed in the forward pass; use a materialised "
        "loss such as torch.nn.functional.cross_entropy where a gradient is differentiated again."
    )


_scale.register_autograd(_refuse)


# ---------------------------------------------------------------- arguments


def _call(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    teachers: Sequence[Teacher],
    teacher_weights: list[float],
    average: str,
    weight: float,
    temperature: float,
    ignore_index: int,
    chunk_tokens: int | None,
) -> Tensor:
    total: Tensor = _linear_loss(
        hidden,
        head,
        targets,
        [x.detach() for x, _ in teachers],
        [w.detach() for _, w in teachers],
        teacher_weights or [1.0],  # torch.library takes an empty list for a list of tensors
        average,
        float(weight),
        float(temperature),
        ignore_index,
        _product_dtype(hidden),
        _rows(hidden, head, chunk_tokens),
        *_needed(hidden, head),
    )[0]
    return total


def _needed(hidden: Tensor, head: Tensor) -> tuple[bool, bool]:
    """Say for which of the two a gradient is wanted."""
    grad = torch.is_grad_enabled()
    return grad and hidden.requires_grad, grad and head.requires_grad


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _rows(hidden: Tensor, head: Tensor, chunk_tokens: int | None) -> int:
    """Return the rows of a chunk: as asked for, or what the device likes."""
    if chunk_tokens is None:
        fitting = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cuda"]) // max(head.shape[0], 1)
        return max(64, fitting // 64 * 64)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} is no number of rows; use a positive one or leave it out.")
    return chunk_tokens


def _normalise(total: Tensor, targets: Tensor, ignore_index: int, normaliser: float | Tensor | None) -> Tensor:
    if normaliser is None:
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
    if not torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != head.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} but head is {head.dtype}; cast one of them or run under torch.autocast."
        )
    wrong = _outside(targets, head, ignore_index)
    if wrong is not None:
        raise ValueError(
            f"target {wrong} is outside the vocabulary of {head.shape[0]} rows of the head; "
            f"use indices below it, or {ignore_index} for positions that do not count."
        )


def _outside(indices: Tensor, head: Tensor, ignore_index: int | None = None) -> int | None:
    """Return the first index that is no row of the head, on a CPU.

    A look at the values would make a GPU wait, so there the kernel answers a wrong index with NaN instead.
    """
    if indices.device.type != "cpu" or not indices.numel() or torch.compiler.is_compiling():
        return None
    wrong = (indices < 0) | (indices >= head.shape[0])
    found = indices[wrong if ignore_index is None else wrong & (indices != ignore_index)]
    return int(found[0]) if found.numel() else None


def _check_weight(weight: float) -> None:
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"weight={weight} is no mix of hard and soft targets; use a number from 0 to 1.")


def _check_stored(hidden: Tensor, head: Tensor, ids: Tensor, probs: Tensor) -> None:
    if ids.ndim != 2 or len(ids) != len(hidden) or ids.shape[1] > len(head) or probs.shape != ids.shape:
        raise ValueError(
            f"ids {tuple(ids.shape)} and probs {tuple(probs.shape)} do not fit {len(hidden)} tokens and a vocabulary of "
            f"{len(head)}; pass two tensors of shape ({len(hidden)}, k), k at most the vocabulary."
        )
    if ids.is_floating_point() or not probs.is_floating_point():
        raise ValueError(f"ids are {ids.dtype} and probs {probs.dtype}; pass integers and floating-point numbers.")
    wrong = _outside(ids, head)
    if wrong is not None:
        raise ValueError(
            f"stored id {wrong} is outside the vocabulary of {len(head)} rows of the head; the targets belong to "
            "another tokenizer or their file is damaged."
        )


def _check_teachers(
    hidden: Tensor, head: Tensor, teachers: Sequence[Teacher], teacher_weights: Sequence[float] | None
) -> list[float]:
    """Return the teachers' shares, which sum to one."""
    if not teachers:
        raise ValueError("teachers is empty, so there is nothing to distil from; pass one, or use cross_entropy.")
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
            f"teacher_weights={shares} cannot weight {len(teachers)} teachers; give each one a number that is not "
            "negative, with a positive sum."
        )
    return [share / total for share in shares]
