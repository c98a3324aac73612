"""Cross-entropy and distillation loss of a block of logits; the gradient overwrites the logits.

    p   = teacher                       probabilities, rows sum to one
    q_T = softmax(z / T),  q = softmax(z)
    loss_i = (1 - w) (-log q_i[y_i])          + w T^2 sum_v p_iv (log p_iv - log q_T,iv)
    grad_i = (1 - w) (q_i - onehot(y_i))      + w T   (q_T,i - p_i)          (d loss_i / d z_i)

Without a teacher w = 0. Rows with ``y = ignore_index`` have loss 0 and gradient 0.

Shapes: N rows (tokens), V vocabulary. z (N, V) float16, bfloat16, float32 (float64 in torch only); y (N,) int64;
p (N, V) float32. Sums are float32 whatever z is.

Bytes moved: with a teacher z and p are read twice and z is written once; without one a row of up to ROW logits stays in
registers and is read once. torch makes about eight passes over (N, V).
"""

# Kernel arguments are Triton pointers and scalars, which have no Python type.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels.backend import jit, tl, triton, use_kernel
from triton_kernels.online import online, online_end

# Longest row that one program holds in its registers: 64 values in each of 1,024 threads.
ROW = 65536


def softmax_loss_reference(
    logits: Tensor,
    targets: Tensor,
    teacher: Tensor | None = None,
    *,
    weight: float = 0.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Definition: (loss (N,), gradient (N, V)) in float32, or float64 for float64 logits."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    kept = (targets != ignore_index).unsqueeze(1)
    hot = targets.unsqueeze(1).where(kept, 0)
    log_q = z.log_softmax(1)
    loss = log_q.gather(1, hot).squeeze(1).mul_(weight - 1.0)
    if teacher is None or temperature != 1.0:
        gradient = log_q.exp().mul_(1.0 - weight)
        if teacher is not None:
            log_q = (z / temperature).log_softmax(1)
            gradient.add_(log_q.exp(), alpha=weight * temperature)
    else:  # at T = 1 both terms contain the same softmax
        gradient = log_q.exp()
    gradient.scatter_add_(1, hot, torch.full_like(hot, weight - 1.0, dtype=z.dtype))
    if teacher is not None:
        divergence = torch.xlogy(teacher, teacher).sub_(log_q.mul_(teacher)).sum(1)
        loss.add_(divergence, alpha=weight * temperature**2)
        gradient.sub_(teacher, alpha=weight * temperature)
    return loss.masked_fill_(~kept.squeeze(1), 0.0), gradient.masked_fill_(~kept, 0.0)


@jit
def _cross_entropy_kernel(
    z_nv, y_n, loss_n, z_stride, V, ignore_index, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # N * V exceeds 2^31 in ordinary use
    columns = tl.arange(0, BLOCK)
    cells = z_nv + row * z_stride + columns
    inside = columns < V
    y = tl.load(y_n + row)
    if y == ignore_index:
        tl.store(loss_n + row, 0.0)
        if GRADIENT:
            tl.store(cells, tl.zeros([BLOCK], tl.float32), mask=inside)
    else:
        # An index outside the vocabulary gives NaN, which is noticed without a host sync.
        z_y = tl.load(z_nv + row * z_stride + y, mask=(y >= 0) & (y < V), other=float("nan")).to(tl.float32)
        z = tl.load(cells, mask=inside, other=float("-inf")).to(tl.float32)
        top = tl.max(z, 0)
        top = tl.where(top == float("-inf"), 0.0, top)
        e = tl.exp(z - top)
        total = tl.sum(e, 0)
        tl.store(loss_n + row, top - z_y + tl.log(total))
        if GRADIENT:
            tl.store(cells, e / total - tl.where(columns == y, 1.0, 0.0), mask=inside)


# Two passes, for rows that do not fit or have a teacher. Written portably (plain loads, BLOCK <= 4096) so that Triton's
# interpreter can test it on a CPU. It measured 1.73 of 3.35 TB/s on an H100 at 4096 x 50304 (benchmarks/kernels_gpu.csv).
@jit
def _softmax_loss_kernel(
    z_nv, y_n, p_nv, loss_n, z_stride, p_stride, V, weight, temperature, ignore_index,
    HAS_TEACHER: tl.constexpr, SAME: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # N * V exceeds 2^31 in ordinary use
    z_row = z_nv + row * z_stride
    p_row = p_nv + row * p_stride
    columns = tl.arange(0, BLOCK)
    y = tl.load(y_n + row)
    if y == ignore_index:
        tl.store(loss_n + row, 0.0)
        if GRADIENT:
            for start in range(0, V, BLOCK):
                inside = start + columns < V
                tl.store(z_row + start + columns, tl.zeros([BLOCK], tl.float32), mask=inside)
    else:
        inverse = 1.0 / temperature
        # An index outside the vocabulary gives NaN, which is noticed without a host sync.
        z_y = tl.load(z_row + y, mask=(y >= 0) & (y < V), other=float("nan")).to(tl.float32)
        base = tl.where(z_y == float("-inf"), 0.0, z_y)  # differences of large numbers would lose digits
        # First pass: the normalizers at T = 1 and at T, and the cross-entropy against the teacher. Each lane has
        # one maximum and sum, see `online`.
        m_1 = tl.full([BLOCK], float("-inf"), tl.float32)
        m_t = tl.full([BLOCK], float("-inf"), tl.float32)
        s_1 = tl.zeros([BLOCK], tl.float32)
        s_t = tl.zeros([BLOCK], tl.float32)
        cross = tl.zeros([BLOCK], tl.float32)
        mass = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            inside = start + columns < V
            z = tl.load(z_row + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            m_1, s_1 = online(m_1, s_1, z)
            if HAS_TEACHER:
                if not SAME:  # at T = 1 both terms contain the same softmax
                    m_t, s_t = online(m_t, s_t, z * inverse)
                p = tl.load(p_row + start + columns, mask=inside, other=0.0)
                log_p = tl.log(tl.where(p == 0.0, 1.0, p))
                cross += p * (log_p - (tl.where(inside, z, base) - base) * inverse)
                mass += p
        top_1, total_1 = online_end(m_1, s_1)
        log_1 = tl.log(total_1)
        top_t, log_t = top_1, log_1
        loss = (1.0 - weight) * (top_1 - z_y + log_1)
        if HAS_TEACHER:
            if not SAME:
                top_t, total_t = online_end(m_t, s_t)
                log_t = tl.log(total_t)
            # KL = sum p log p - sum p z / T + (sum p) log-normalizer; `cross` holds the first two terms.
            divergence = tl.sum(cross, 0) + tl.sum(mass, 0) * (top_t - base * inverse + log_t)
            loss += weight * temperature * temperature * divergence
        tl.store(loss_n + row, loss)
        if GRADIENT:
            for start in range(0, V, BLOCK):
                inside = start + columns < V
                z = tl.load(z_row + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
                hot = tl.where(start + columns == y, 1.0, 0.0)
                # Second pass: the gradient replaces the logits, which are not needed any more.
                gradient = (1.0 - weight) * (tl.exp(z - top_1 - log_1) - hot)
                if HAS_TEACHER:
                    p = tl.load(p_row + start + columns, mask=inside, other=0.0)
                    gradient += weight * temperature * (tl.exp(z * inverse - top_t - log_t) - p)
                tl.store(z_row + start + columns, gradient, mask=inside)


def _check(logits: Tensor, targets: Tensor, teacher: Tensor | None) -> None:
    if logits.ndim != 2 or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError(
            f"softmax_loss: logits of shape {tuple(logits.shape)} and strides {logits.stride()} are written in place "
            "row by row; pass an (N, V) tensor whose rows are contiguous."
        )
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"softmax_loss: targets {tuple(targets.shape)} {targets.dtype} do not match logits "
            f"{tuple(logits.shape)}; pass int64 indices of shape ({logits.shape[0]},)."
        )
    if teacher is not None and (teacher.shape != logits.shape or (logits.shape[1] > 1 and teacher.stride(1) != 1)):
        raise ValueError(
            f"softmax_loss: teacher {tuple(teacher.shape)} with strides {teacher.stride()} does not match logits "
            f"{tuple(logits.shape)}; pass contiguous probabilities of the same shape."
        )


@torch.library.custom_op("epochal_kernels::softmax_loss", mutates_args=("logits",))
def softmax_loss(
    logits: Tensor,
    targets: Tensor,
    teacher: Tensor | None = None,
    weight: float = 0.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    gradient: bool = True,
) -> Tensor:
    """Return the loss of each row, (N,), and overwrite ``logits`` (N, V) with the gradient.

    Arguments as in the file's docstring; ``gradient=False`` does not touch the logits. Raises ValueError for mismatched
    shapes, index types or strides. On the kernel path a target outside the vocabulary makes its loss NaN.
    """
    _check(logits, targets, teacher)
    rows, vocabulary = logits.shape
    if not use_kernel(logits.device) or logits.dtype == torch.float64:
        loss, computed = softmax_loss_reference(
            logits, targets, teacher, weight=weight, temperature=temperature, ignore_index=ignore_index
        )
        if gradient:
            logits.copy_(computed)
        return loss
    loss = logits.new_zeros(rows, dtype=torch.float32)
    if rows and vocabulary and teacher is None and not weight and vocabulary <= ROW:
        block = triton.next_power_of_2(vocabulary)
        _cross_entropy_kernel[(rows,)](
            logits, targets.contiguous(), loss, logits.stride(0), vocabulary, ignore_index,
            GRADIENT=gradient, BLOCK=block, num_warps=min(32, max(4, block // 2048)),
        )  # fmt: skip
    elif rows and vocabulary:
        block = min(triton.next_power_of_2(vocabulary), 4096)
        p = logits if teacher is None else teacher
        _softmax_loss_kernel[(rows,)](
            logits, targets.contiguous(), p, loss, logits.stride(0), p.stride(0), vocabulary,
            float(weight), float(temperature), ignore_index,
            HAS_TEACHER=teacher is not None, SAME=temperature == 1.0, GRADIENT=gradient, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return loss


@softmax_loss.register_fake
def _(logits, targets, teacher=None, weight=0.0, temperature=1.0, ignore_index=-100, gradient=True):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(logits.shape[0], dtype=dtype)
