"""Loss against K stored probabilities per token, one bucket for the rest, and the label.

    soft_i = sum_k p_ik (log p_ik - log q_i[id_ik]) + t_i (log t_i - log q_i[rest]),    q = softmax(z)
    t_i    = max(1 - sum_k p_ik, 0), and 0 if the rest is empty;  q_i[rest] = sum of q_i over the tokens not stored
    loss_i = (1 - w) (-log q_i[y_i]) + w soft_i

    dsoft/dz_v = q_v M - p_iv  on the stored ids,   q_v M - t_i q_v / q_i[rest]  elsewhere,   M = sum_k p_ik + t_i

soft is the KL divergence between distributions over K + 1 outcomes: the stored tokens, or any other. Importance-sampled
targets (arXiv 2503.16870) use the same formula: their weights sum to one, so t = 0. Pad unused places with any other id
and p = 0.

Shapes: N rows (tokens), V vocabulary, K stored. z (N, V) float16, bfloat16, float32 (float64 in torch only); y (N,)
int64; ids (N, K) int64, distinct in a row; p (N, K) any float. A row with ``y = ignore_index`` has loss and gradient 0.

Bytes moved: z is read twice and written once, as in softmax_loss.py; the targets are K / V of a dense teacher.
"""

# Kernel arguments are Triton pointers and scalars, which have no Python type.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels.backend import jit, tl, triton, use_kernel
from triton_kernels.online import online, online_end


def sparse_loss_reference(
    logits: Tensor, targets: Tensor, ids: Tensor, p: Tensor, *, weight: float, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Definition: (loss (N,), gradient (N, V)) in float32, or float64 for float64 logits."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    p = p.to(z.dtype)
    kept = (targets != ignore_index).unsqueeze(1)
    y = targets.unsqueeze(1).where(kept, 0)
    z_y, hot = z.gather(1, y), z.gather(1, ids)
    z.scatter_(1, ids, -torch.inf)
    top = z.amax(1, keepdim=True)  # of the rest, which may underflow next to the stored ones
    highest = torch.cat([hot, top], 1).amax(1, keepdim=True)
    top = top.where(top != -torch.inf, highest)
    rest = z.sub_(top).exp_()
    total = rest.sum(1, keepdim=True)
    # Logits relative to the highest: differences of large numbers would lose digits.
    z_y, hot, log_rest = z_y - highest, hot - highest, top - highest + total.log()
    log_sum = torch.cat([hot, log_rest], 1).logsumexp(1, keepdim=True)

    mass = p.sum(1, keepdim=True)
    t = (1.0 - mass).clamp(min=0.0).masked_fill(total == 0, 0.0)
    soft = torch.xlogy(p, p) - (p * (hot - log_sum)).where(p != 0, 0.0)
    soft_rest = torch.xlogy(t, t) - (t * (log_rest - log_sum)).where(t != 0, 0.0)
    loss = (1.0 - weight) * (log_sum - z_y) + weight * (soft.sum(1, keepdim=True) + soft_rest)

    scale = (1.0 - weight) + weight * (mass + t)
    factor = scale * (top - highest - log_sum).exp() - weight * t / total.where(total != 0, 1.0)
    gradient = rest.mul_(factor)
    gradient.scatter_(1, ids, scale * (hot - log_sum).exp() - weight * p)
    gradient.scatter_add_(1, y, torch.full_like(z_y, weight - 1.0))
    return loss.masked_fill(~kept, 0.0).squeeze(1), gradient.masked_fill_(~kept, 0.0)


@jit
def _sparse_loss_kernel(
    z_nv, y_n, id_nk, p_nk, hot_nk, loss_n, z_stride, V, K, weight, ignore_index,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # N * V exceeds 2^31 in ordinary use
    z_row = z_nv + row * z_stride
    columns = tl.arange(0, BLOCK)
    y = tl.load(y_n + row)
    if y == ignore_index:
        tl.store(loss_n + row, 0.0)
        for start in range(0, V, BLOCK):
            tl.store(z_row + start + columns, tl.zeros([BLOCK], tl.float32), mask=start + columns < V)
    else:
        # An index outside the vocabulary gives NaN, which is noticed without a host sync.
        z_y = tl.load(z_row + y, mask=(y >= 0) & (y < V), other=float("nan")).to(tl.float32)
        hot_m = tl.full([BLOCK_K], float("-inf"), tl.float32)
        hot_s = tl.zeros([BLOCK_K], tl.float32)
        masses = tl.zeros([BLOCK_K], tl.float32)
        for start in range(0, K, BLOCK_K):
            place = start + tl.arange(0, BLOCK_K)
            ids = tl.load(id_nk + row * K + place, mask=place < K, other=0)
            masses += tl.load(p_nk + row * K + place, mask=place < K, other=0.0).to(tl.float32)
            known = (place < K) & (ids >= 0) & (ids < V)
            hot = tl.load(z_row + ids, mask=known, other=float("nan")).to(tl.float32)
            hot = tl.where(place < K, hot, float("-inf"))
            tl.store(hot_nk + row * K + place, hot, mask=place < K)
            tl.debug_barrier()  # all reads before the first write
            # The stored logits are saved and replaced by -inf, so both passes over z see only the rest. Its sum
            # then does not suffer from cancellation, as 1 - (sum of the stored) would, and no position is compared
            # with K ids.
            tl.store(z_row + ids, tl.full([BLOCK_K], float("-inf"), tl.float32), mask=known)
            hot_m, hot_s = online(hot_m, hot_s, hot)
        tl.debug_barrier()  # all writes before the first read
        # First pass over the rest.
        rest_m = tl.full([BLOCK], float("-inf"), tl.float32)
        rest_s = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            z = tl.load(z_row + start + columns, mask=start + columns < V, other=float("-inf")).to(tl.float32)
            rest_m, rest_s = online(rest_m, rest_s, z)
        # The rest has a separate maximum: relative to that of the stored ones its sum may underflow.
        highest = tl.maximum(tl.max(hot_m, 0), tl.max(rest_m, 0))
        top, total = online_end(rest_m, rest_s)
        empty = total == 0.0
        top = tl.where(empty, highest, top)
        log_rest = top - highest + tl.log(total)  # -inf if the rest is empty
        log_sum = tl.log(tl.sum(hot_s * tl.exp(hot_m - highest), 0) + tl.exp(log_rest))
        mass = tl.sum(masses, 0)
        t = tl.where(empty | (mass > 1.0), 0.0, 1.0 - mass)  # not tl.maximum, which may drop a NaN
        scale = (1.0 - weight) + weight * (mass + t)
        factor = scale * tl.exp(top - highest - log_sum) - weight * t / tl.where(empty, 1.0, total)
        for start in range(0, V, BLOCK):
            index = start + columns
            z = tl.load(z_row + index, mask=index < V, other=float("-inf")).to(tl.float32)
            # Second pass over the rest: the gradient of a token that is not stored.
            gradient = tl.exp(z - top) * factor - tl.where(index == y, 1.0 - weight, 0.0)
            tl.store(z_row + index, gradient, mask=index < V)
        tl.debug_barrier()  # the stored positions are written last
        # The stored tokens: divergence and gradient.
        soft = tl.zeros([BLOCK_K], tl.float32)
        for start in range(0, K, BLOCK_K):
            place = start + tl.arange(0, BLOCK_K)
            ids = tl.load(id_nk + row * K + place, mask=place < K, other=-1)
            p = tl.load(p_nk + row * K + place, mask=place < K, other=0.0).to(tl.float32)
            log_q = tl.load(hot_nk + row * K + place, mask=place < K, other=float("-inf")) - highest - log_sum
            soft += tl.where(p == 0.0, 0.0, p * (tl.log(tl.where(p == 0.0, 1.0, p)) - log_q))
            gradient = scale * tl.exp(log_q) - weight * p - tl.where(ids == y, 1.0 - weight, 0.0)
            tl.store(z_row + ids, gradient, mask=(place < K) & (ids >= 0) & (ids < V))
        soft_rest = tl.where(t == 0.0, 0.0, t * (tl.log(tl.where(t == 0.0, 1.0, t)) - (log_rest - log_sum)))
        loss = (1.0 - weight) * (log_sum - (z_y - highest)) + weight * (tl.sum(soft, 0) + soft_rest)
        tl.store(loss_n + row, loss)


@torch.library.custom_op("epochal_kernels::sparse_loss", mutates_args=("logits",))
def sparse_loss(
    logits: Tensor, targets: Tensor, ids: Tensor, p: Tensor, weight: float, ignore_index: int = -100
) -> Tensor:
    """Return the loss of each row, (N,), and overwrite ``logits`` (N, V) with its gradient.

    Arguments as in the file's docstring. Raises ValueError for mismatched shapes, index types or strides. On the
    kernel path an id or a target outside the vocabulary makes the row's loss NaN.
    """
    _check(logits, targets, ids, p)
    if not use_kernel(logits.device) or logits.dtype == torch.float64:
        loss, gradient = sparse_loss_reference(logits, targets, ids, p, weight=weight, ignore_index=ignore_index)
        logits.copy_(gradient)
        return loss
    rows, vocabulary = logits.shape
    loss = logits.new_zeros(rows, dtype=torch.float32)
    if rows and vocabulary:
        stored = ids.shape[1]
        hot = logits.new_empty(rows, stored, dtype=torch.float32)
        _sparse_loss_kernel[(rows,)](
            logits, targets.contiguous(), ids.contiguous(), p.contiguous(), hot, loss,
            logits.stride(0), vocabulary, stored, float(weight), ignore_index,
            BLOCK=min(triton.next_power_of_2(vocabulary), 4096),
            BLOCK_K=min(triton.next_power_of_2(max(stored, 1)), 1024), num_warps=8,
        )  # fmt: skip
    return loss


@sparse_loss.register_fake
def _(logits, targets, ids, p, weight, ignore_index=-100):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(logits.shape[0], dtype=dtype)


def _check(logits: Tensor, targets: Tensor, ids: Tensor, p: Tensor) -> None:
    if logits.ndim != 2 or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError(
            f"sparse_loss: logits of shape {tuple(logits.shape)} and strides {logits.stride()} are written in place "
            "row by row; pass an (N, V) tensor whose rows are contiguous."
        )
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"sparse_loss: targets {tuple(targets.shape)} {targets.dtype} do not match logits "
            f"{tuple(logits.shape)}; pass int64 indices of shape ({logits.shape[0]},)."
        )
    if ids.ndim != 2 or ids.shape[0] != logits.shape[0] or p.shape != ids.shape or ids.dtype != torch.int64:
        raise ValueError(
            f"sparse_loss: ids {tuple(ids.shape)} {ids.dtype} and p {tuple(p.shape)} do not match logits "
            f"{tuple(logits.shape)}; pass int64 indices and probabilities of shape ({logits.shape[0]}, K)."
        )
