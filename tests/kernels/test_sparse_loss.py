"""The sparse loss against float64 autograd of the divergence between merged distributions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from triton_kernels.sparse_loss import sparse_loss, sparse_loss_reference

# The kernel computes log 0 = -inf if the rest is empty, of which numpy warns inside the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")


def stored_targets(rows, vocabulary, count, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    z = (2 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    p, ids = torch.randn(rows, vocabulary, generator=generator).softmax(1).topk(count, 1)
    y = torch.randint(vocabulary, (rows,), generator=generator)
    return tuple(t.to(device) for t in (z, y, ids, p))


def oracle(z, y, ids, p, weight):
    """(loss, gradient) from torch's own losses on the distributions over the stored tokens and the rest."""
    z, p = z.double().requires_grad_(), p.double()
    q = z.softmax(1)
    hot = q.gather(1, ids)
    rest = q.scatter(1, ids, 0.0).sum(1, keepdim=True)
    tail = (1 - p.sum(1, keepdim=True)).clamp(min=0)
    if ids.shape[1] < z.shape[1]:
        p, hot = torch.cat([p, tail], 1), torch.cat([hot, rest], 1)
    soft = F.kl_div(hot.log(), p, reduction="none").sum(1)
    loss = (1 - weight) * F.cross_entropy(z, y, reduction="none") + weight * soft
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_reference_is_the_divergence_of_the_merged_distributions(count, weight):
    z, y, ids, p = stored_targets(5, 8, count, dtype=torch.float64)
    for value, true in zip(
        sparse_loss_reference(z, y, ids, p, weight=weight), oracle(z, y, ids, p, weight), strict=True
    ):
        torch.testing.assert_close(value, true, rtol=1e-7, atol=1e-7)


def test_sampled_targets_are_unbiased():
    """Averaged over every draw, the gradient of sampled targets is that of the full distribution."""
    z, _, _, _ = stored_targets(1, 6, 1, dtype=torch.float64)
    teacher = torch.tensor([0.3, 0.3, 0.2, 0.1, 0.05, 0.05], dtype=torch.float64)
    ids = torch.stack([torch.arange(6), (torch.arange(6) + 1) % 6], 1)  # the second place is padding
    p = torch.tensor([[1.0, 0.0]]).expand(6, 2)
    _, gradients = sparse_loss_reference(z.expand(6, 6), ids[:, 0], ids, p, weight=1.0)
    torch.testing.assert_close((teacher[:, None] * gradients).sum(0), z.softmax(1)[0] - teacher)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (4, 7, 3), (6, 5000, 5), (1, 1300, 1100), (2, 9, 9), (3, 6, 0), (0, 8, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel(device, no_worse, shape, dtype):
    z, y, ids, p = stored_targets(*shape, dtype=dtype, device=device)
    y[::3] = -100
    exact, exact_gradient = sparse_loss_reference(z.double(), y, ids, p, weight=0.4)
    plain, plain_gradient = sparse_loss_reference(z, y, ids, p, weight=0.4)
    written = z.clone()
    no_worse(sparse_loss(written, y, ids, p, 0.4), plain, exact)
    no_worse(written, plain_gradient.to(dtype), exact_gradient)
    assert not written[::3].any()


@pytest.mark.parametrize("rest", [-200.0, -math.inf])
def test_loss_is_finite_if_the_rest_underflows(device, rest):
    """exp(-200) underflows float32: loss and gradient as in float64; with logits of -inf the term vanishes."""
    z, _, ids, p = stored_targets(3, 20, 4, device=device)
    z = z.scatter(1, ids, 1.0) + torch.full_like(z, rest).scatter(1, ids, 0.0)
    for path in (
        lambda t: sparse_loss(t, ids[:, 0], ids, p, 0.9),
        lambda t: reference_in_place(t, ids[:, 0], ids, p, 0.9),
    ):
        written = z.clone()
        loss = path(written)
        if rest > -math.inf:
            exact, gradient = oracle(z, ids[:, 0], ids, p, 0.9)
            torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(written.double(), gradient, rtol=1e-4, atol=1e-6)
        assert torch.isfinite(loss).all() and torch.isfinite(written).all()


def reference_in_place(z, *arguments):
    loss, gradient = sparse_loss_reference(z, *arguments[:-1], weight=arguments[-1])
    z.copy_(gradient)
    return loss


@pytest.mark.parametrize("sign", [1, -1])
def test_a_common_offset_of_the_logits_changes_nothing(device, sign):
    z, y, ids, p = stored_targets(4, 50, 50, device=device)
    z = (64 * z).round() / 64  # exact after the shift
    shifted = z + sign * 4096.0
    loss, shifted_loss = sparse_loss(z, y, ids, p, 0.5), sparse_loss(shifted, y, ids, p, 0.5)
    torch.testing.assert_close(shifted_loss, loss)
    torch.testing.assert_close(shifted, z)


def test_loss_is_finite_if_every_token_is_stored(device):
    """Rounding assigns 1e-7 to an empty rest, which must not become an infinite loss."""
    z, y, ids, p = stored_targets(6, 33, 33, device=device)
    for value in (sparse_loss_reference(z, y, ids, p, weight=0.5)[0], sparse_loss(z, y, ids, p, 0.5)):
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("on_stored_id", [True, False])
def test_non_finite_numbers_stay_in_their_row(device, bad, on_stored_id):
    z, y, ids, p = stored_targets(3, 20, 4, device=device)
    y[:] = ids[:, 1]
    z[1, ids[1, 2] if on_stored_id else _first_not_stored(ids[1])] = bad
    expected, _ = sparse_loss_reference(z, y, ids, p, weight=0.5)
    loss = sparse_loss(z, y, ids, p, 0.5)
    assert torch.isnan(loss).tolist() == torch.isnan(expected).tolist() == [False, True, False]
    torch.testing.assert_close(loss[::2], expected[::2])


def _first_not_stored(ids):
    return next(v for v in range(20) if v not in ids.tolist())


def test_an_index_outside_the_vocabulary_gives_nan(device):
    z, y, ids, p = stored_targets(5, 20, 4, device=device)
    ids[1, 2], ids[2, 0], y[3] = 20, -1, 20
    before = z.clone()
    assert torch.isnan(sparse_loss(z, y, ids, p, 0.5)).tolist() == [False, True, True, True, False]
    expected = sparse_loss_reference(before[::4], y[::4], ids[::4], p[::4], weight=0.5)[1]
    torch.testing.assert_close(z[::4], expected)


def test_rows_of_a_larger_block_and_strided_targets(device):
    wide, y, ids, p = stored_targets(6, 40, 8, device=device)
    view, before, y = wide[1:5, 3:30], wide.clone(), y[1:5] % 27
    ids, p = torch.stack([torch.arange(4) + 3 * k for k in range(8)], 1).to(device)[:, ::2], p[1:5, ::2]
    loss, gradient = sparse_loss_reference(view, y, ids, p, weight=0.5)
    torch.testing.assert_close(sparse_loss(view, y, ids, p, 0.5), loss)
    torch.testing.assert_close(wide[1:5, 3:30], gradient)
    wide[1:5, 3:30] = before[1:5, 3:30]
    assert torch.equal(wide, before)


def test_wrong_arguments_are_refused_and_opcheck_passes(device):
    z, y, ids, p = stored_targets(3, 20, 4, device=device)
    with pytest.raises(ValueError, match="rows are contiguous"):
        sparse_loss(z.t(), y, ids, p, 0.5)
    with pytest.raises(ValueError, match="do not match"):
        sparse_loss(z, y[:-1], ids, p, 0.5)
    with pytest.raises(ValueError, match="int64"):
        sparse_loss(z, y, ids.int(), p, 0.5)
    torch.library.opcheck(torch.ops.epochal_kernels.sparse_loss.default, (z, y, ids, p, 0.5, -100))
