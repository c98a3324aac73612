"""Loss against stored targets: a few probabilities per token, and what is left over as one bucket.

    L_i = sum_k p_ik (log p_ik - log q_i[id_ik]) + t_i (log t_i - log(1 - sum_k q_i[id_ik])),  q = softmax(z)
    t_i = max(1 - sum_k p_ik, 0) with ``tail``; 0 and no second term without, or where every token is stored

    dL/dz_v = q_v M - p_iv on the stored ids,  q_v M - t_i q_v / q_tail elsewhere,  M = sum_k p_ik + t_i

With ``tail`` this is the KL divergence of the top k and "any other token". Without, it takes importance-sampled targets
(weights summing to one), which are unbiased (arXiv 2503.16870); an id may then occur more than once.

Shapes: N rows (tokens), V vocabulary, K stored. z (N, V) float16, bfloat16, float32 (float64 in torch only);
ids (N, K) int64, p (N, K) float32. An id below 0 is an empty place, with p taken as 0; a row without any has loss 0 and
gradient 0. With ``tail`` the ids of a row are distinct.

Traffic: z read twice and written once; torch also writes log q and its softmax. Stored targets are K / V of the dense.
"""

# The arguments of kernels are Triton's own pointers and numbers.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels.backend import jit, tl, triton, use_kernel


def sparse_loss_reference(logits: Tensor, ids: Tensor, p: Tensor, *, tail: bool) -> tuple[Tensor, Tensor]:
    """Return (loss (N,), gradient (N, V)) in float32, or float64 if the logits are: the definition."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    kept = ids >= 0
    p, ids = p.to(z.dtype).where(kept, 0.0), ids.where(kept, 0)
    log_q = z.log_softmax(1)
    q = log_q.exp()
    log_hot = log_q.gather(1, ids)
    loss = (torch.xlogy(p, p) - p * log_hot).sum(1)
    mass = p.sum(1)
    if tail:
        stored = torch.zeros_like(z).scatter_add_(1, ids, kept.to(z.dtype)) > 0
        t = (1.0 - mass).clamp(min=0.0) * (kept.any(1) & ~stored.all(1))
        # From the tail itself: 1 - sum of the rest would cancel when the stored ids hold nearly everything.
        log_rest = z.masked_fill(stored, -torch.inf).log_softmax(1)
        log_tail = z.masked_fill(stored, -torch.inf).logsumexp(1) - z.logsumexp(1)
        loss = loss + torch.where(t > 0, torch.xlogy(t, t) - t * log_tail, 0.0)
        share = torch.where((t > 0)[:, None], t[:, None] * log_rest.exp(), 0.0)
        gradient = q * (mass + t)[:, None] - share
    else:
        gradient = q * mass[:, None]
    return loss, gradient.scatter_add_(1, ids, -p)


@jit
def _sparse_loss_kernel(
    z_nv, id_nk, p_nk, loss_n, z_stride, V, K, TAIL: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_row = z_nv + row * z_stride
    columns = tl.arange(0, BLOCK)
    place = tl.arange(0, BLOCK_K)
    ids = tl.load(id_nk + row * K + place, mask=place < K, other=-1)
    kept = ids >= 0
    p = tl.where(kept, tl.load(p_nk + row * K + place, mask=place < K, other=0.0), 0.0)
    hot = tl.load(z_row + ids, mask=kept, other=0.0).to(tl.float32)

    top = tl.full([BLOCK], float("-inf"), tl.float32)
    tail_top = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        index = start + columns
        z = tl.load(z_row + index, mask=index < V, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, z)
        if TAIL:
            # K is small: comparing with each stored id costs less than a (V,) mask in memory.
            for k in range(0, K):
                z = tl.where(index == tl.load(id_nk + row * K + k), float("-inf"), z)
            tail_top = tl.maximum(tail_top, z)
    m = tl.max(top, 0)
    # The tail has a maximum of its own: next to the stored ids its sum may underflow.
    tail_m = tl.max(tail_top, 0)
    some_tail = tail_m > float("-inf")
    tail_m = tl.where(some_tail, tail_m, 0.0)
    all_sums = tl.zeros([BLOCK], tl.float32)
    tail_sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        index = start + columns
        z = tl.load(z_row + index, mask=index < V, other=float("-inf")).to(tl.float32)
        all_sums += tl.exp(z - m)
        if TAIL:
            for k in range(0, K):
                z = tl.where(index == tl.load(id_nk + row * K + k), float("-inf"), z)
            tail_sums += tl.exp(z - tail_m)
    log_sum = tl.log(tl.sum(all_sums, 0))
    mass = tl.sum(p, 0)
    log_p = tl.log(tl.where(p == 0.0, 1.0, p))
    loss = tl.sum(tl.where(p == 0.0, 0.0, p * (log_p - (hot - m - log_sum))), 0)
    t = 0.0
    log_tail = 0.0
    if TAIL:
        t = tl.maximum(1.0 - mass, 0.0)
        t = tl.where((tl.max(kept.to(tl.int32), 0) > 0) & some_tail, t, 0.0)
        log_tail = tail_m + tl.log(tl.where(some_tail, tl.sum(tail_sums, 0), 1.0))
        loss += tl.where(t > 0.0, t * (tl.log(tl.where(t > 0.0, t, 1.0)) - log_tail + m + log_sum), 0.0)
        mass += t
    tl.store(loss_n + row, loss)
    for start in range(0, V, BLOCK):
        index = start + columns
        inside = index < V
        z = tl.load(z_row + index, mask=inside, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(z - m - log_sum) * mass
        for k in range(0, K):
            same = index == tl.load(id_nk + row * K + k)
            gradient -= tl.where(same, tl.load(p_nk + row * K + k), 0.0)
            z = tl.where(same, float("-inf"), z)
        if TAIL:
            gradient -= tl.where(t > 0.0, t * tl.exp(z - log_tail), 0.0)
        tl.store(z_row + index, gradient, mask=inside)


@torch.library.custom_op("epochal_kernels::sparse_loss", mutates_args=("logits",))
def sparse_loss(logits: Tensor, ids: Tensor, p: Tensor, tail: bool) -> Tensor:
    """Return the loss of each row, (N,), and overwrite ``logits`` (N, V) with its gradient.

    Arguments as in the file's docstring. Raises ValueError for shapes, index types or strides that do not fit.
    """
    if logits.ndim != 2 or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError(
            f"sparse_loss: logits of shape {tuple(logits.shape)} and strides {logits.stride()} are written in place "
            "row by row; pass an (N, V) tensor whose rows are contiguous."
        )
    if ids.ndim != 2 or ids.shape[0] != logits.shape[0] or p.shape != ids.shape or ids.dtype != torch.int64:
        raise ValueError(
            f"sparse_loss: ids {tuple(ids.shape)} {ids.dtype} and p {tuple(p.shape)} do not fit logits "
            f"{tuple(logits.shape)}; pass int64 indices and probabilities of shape ({logits.shape[0]}, K)."
        )
    if not use_kernel(logits.device) or logits.dtype == torch.float64:
        loss, gradient = sparse_loss_reference(logits, ids, p, tail=tail)
        logits.copy_(gradient)
        return loss
    rows, vocabulary = logits.shape
    loss = logits.new_zeros(rows, dtype=torch.float32)
    if rows and vocabulary:
        stored = ids.shape[1]
        _sparse_loss_kernel[(rows,)](
            logits, ids.contiguous(), p.float().contiguous(), loss, logits.stride(0), vocabulary, stored,
            TAIL=tail, BLOCK=min(triton.next_power_of_2(vocabulary), 4096),
            BLOCK_K=triton.next_power_of_2(max(stored, 1)), num_warps=8,
        )  # fmt: skip
    return loss


@sparse_loss.register_fake
def _(logits, ids, p, tail):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(logits.shape[0], dtype=dtype)
