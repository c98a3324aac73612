"""The sparse loss against autograd of the dense divergence, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from triton_kernels.sparse_loss import sparse_loss, sparse_loss_reference


def stored(rows, vocabulary, count, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    z = (2 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    teacher = torch.randn(rows, vocabulary, generator=generator).softmax(1)
    p, ids = teacher.topk(count, 1)
    return z, ids, p


@pytest.mark.parametrize("count", [1, 3, 8])
def test_tail_is_the_divergence_of_the_merged_distributions(count):
    z, ids, p = stored(5, 8, count, dtype=torch.float64)
    z.requires_grad_()
    q = z.softmax(1).gather(1, ids)
    full_p = torch.cat([p.double(), (1 - p.double().sum(1, keepdim=True)).clamp(min=0)], 1)
    full_q = torch.cat([q, 1 - q.sum(1, keepdim=True)], 1)
    if count == 8:  # nothing is left over
        full_p, full_q = full_p[:, :-1], full_q[:, :-1]
    plain = torch.nn.functional.kl_div(full_q.log(), full_p, reduction="none").sum(1)
    (expected,) = torch.autograd.grad(plain.sum(), z)
    loss, gradient = sparse_loss_reference(z.detach(), ids, p, tail=count < 8)
    torch.testing.assert_close(loss, plain.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)


def test_samples_are_unbiased():
    """Without a tail the loss of sampled targets is, on average, the cross-entropy of the whole distribution."""
    z, _, _ = stored(1, 6, 1, dtype=torch.float64)
    teacher = torch.tensor([0.3, 0.3, 0.2, 0.1, 0.05, 0.05], dtype=torch.float64)
    ids = torch.arange(6)[:, None].repeat(1, 2)  # every possible draw, a repeated id, weighted by its probability
    _, gradients = sparse_loss_reference(z.expand(6, 6), ids, torch.full((6, 2), 0.5), tail=False)
    torch.testing.assert_close((teacher[:, None] * gradients).sum(0), z.softmax(1)[0] - teacher)


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 7, 3), (6, 200, 5), (1, 256, 64), (0, 8, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tail", [True, False])
def test_kernel(device, no_worse, shape, dtype, tail):
    z, ids, p = stored(*shape, dtype=dtype)
    ids[::2, 1:] = -1  # some rows have fewer places
    z, ids, p = (t.to(device) for t in (z, ids, p))
    exact, exact_gradient = sparse_loss_reference(z.double(), ids, p, tail=tail)
    plain, plain_gradient = sparse_loss_reference(z, ids, p, tail=tail)
    written = z.clone()
    no_worse(sparse_loss(written, ids, p, tail), plain, exact)
    no_worse(written, plain_gradient.to(dtype), exact_gradient)


@pytest.mark.parametrize("rest", [-200.0, -math.inf])
def test_a_tail_that_the_student_rules_out(device, rest):
    """e^-200 is no float32: finite loss and gradient as in float64; where nothing can be left over, no tail term."""
    z, ids, p = (t.to(device) for t in stored(3, 20, 4))
    z = z.scatter(1, ids, 1.0) + torch.full_like(z, rest).scatter(1, ids, 0.0)
    written = z.clone()
    loss = sparse_loss(written, ids, p, True)
    if rest > -math.inf:
        exact, gradient = sparse_loss_reference(z.double(), ids, p, tail=True)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(written.double(), gradient, rtol=1e-4, atol=1e-6)
    assert torch.isfinite(loss).all() and torch.isfinite(written).all()


def test_every_token_stored(device):
    """Rounding leaves a tail of 1e-7 for which there is no token: it must not become an infinite loss."""
    z, ids, p = (t.to(device) for t in stored(6, 33, 33))
    for value in (sparse_loss_reference(z, ids, p, tail=True)[0], sparse_loss(z, ids, p, True)):
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("tail", [True, False])
def test_a_row_without_targets_counts_nothing(device, tail):
    z, ids, p = (t.to(device) for t in stored(3, 20, 4))
    ids[1] = -1
    loss = sparse_loss(z, ids, p, tail)
    assert loss[1] == 0 and not z[1].any() and z[0].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, inside the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_stay_in_their_row(device, bad):
    z, ids, p = (t.to(device) for t in stored(3, 20, 4))
    z[1, 7] = bad
    expected, _ = sparse_loss_reference(z, ids, p, tail=True)
    loss = sparse_loss(z, ids, p, True)
    assert torch.isnan(loss).tolist() == torch.isnan(expected).tolist() == [False, True, False]
    torch.testing.assert_close(loss[::2], expected[::2])


def test_rows_of_a_larger_block_and_strided_ids(device):
    wide, ids, p = (t.to(device) for t in stored(6, 40, 8))
    view, ids, p = wide[1:5, 3:30], ids[1:5, ::2] % 27, p[1:5, ::2]
    loss, gradient = sparse_loss_reference(view, ids, p, tail=False)
    torch.testing.assert_close(sparse_loss(view, ids, p, False), loss)
    torch.testing.assert_close(wide[1:5, 3:30], gradient)


def test_wrong_use_and_opcheck(device):
    z, ids, p = (t.to(device) for t in stored(3, 20, 4))
    with pytest.raises(ValueError, match="rows are contiguous"):
        sparse_loss(z.t(), ids, p, True)
    with pytest.raises(ValueError, match="int64"):
        sparse_loss(z, ids.int(), p, True)
    torch.library.opcheck(torch.ops.epochal_kernels.sparse_loss.default, (z, ids, p, True))
