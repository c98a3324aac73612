"""The softmax kernels of the losses against float64: odd sizes, empty, strided, NaN and infinity."""

from __future__ import annotations

import math

import pytest
import torch

import epochal.loss
from triton_kernels import softmax_loss as module
from triton_kernels.softmax_add import softmax_add, softmax_add_, softmax_add_reference
from triton_kernels.softmax_loss import softmax_loss, softmax_loss_reference

SHAPES = [(1, 1), (1, 200), (5, 3), (7, 256), (13, 129), (2, 9000), (0, 8)]  # 9,000 columns take several blocks
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def block(rows, vocabulary, dtype, device, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    z = (scale * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    p = torch.randn(rows, vocabulary, generator=generator).softmax(1)
    y = torch.randint(vocabulary, (rows,), generator=generator)
    y[::3] = -100
    return z.to(device), y.to(device), p.to(device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.4, 1.0), (0.4, 2.0), (1.0, 0.7)])
def test_softmax_loss(device, no_worse, shape, dtype, weight, temperature):
    z, y, p = block(*shape, dtype, device)
    teacher = p if weight else None
    options = {"weight": weight, "temperature": temperature}
    exact, exact_gradient = softmax_loss_reference(z.double(), y, None if teacher is None else p.double(), **options)
    plain, plain_gradient = softmax_loss_reference(z, y, teacher, **options)
    value = softmax_loss(z.clone(), y, teacher, weight, temperature, gradient=False)
    written = z.clone()
    loss = softmax_loss(written, y, teacher, weight, temperature)
    assert torch.equal(value, loss)
    no_worse(loss, plain, exact)
    no_worse(written, plain_gradient.to(dtype), exact_gradient)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_too_long_for_the_registers_takes_two_passes(device, no_worse, shape, monkeypatch):
    """Both kernels of the loss without a teacher, on the same rows."""
    z, y, _ = block(*shape, torch.float32, device)
    exact, exact_gradient = softmax_loss_reference(z.double(), y)
    plain, plain_gradient = softmax_loss_reference(z, y)
    for longest in (module.ROW, 0):
        monkeypatch.setattr(module, "ROW", longest)
        written = z.clone()
        no_worse(softmax_loss(written, y), plain, exact)
        no_worse(written, plain_gradient, exact_gradient)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_softmax_loss_reference_is_the_derivative(temperature):
    """The reference against autograd of torch's own losses."""
    z, y, p = block(6, 11, torch.float64, "cpu")
    z.requires_grad_()
    hard = torch.nn.functional.cross_entropy(z, y, reduction="none")
    soft = torch.nn.functional.kl_div((z / temperature).log_softmax(1), p.double(), reduction="none").sum(1)
    plain = torch.where(y == -100, 0.0, 0.7 * hard + 0.3 * temperature**2 * soft)
    (expected,) = torch.autograd.grad(plain.sum(), z)
    loss, gradient = softmax_loss_reference(z.detach(), y, p.double(), weight=0.3, temperature=temperature)
    torch.testing.assert_close(loss, plain.detach())
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)  # p sums to one only in float32


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accumulate", [True, False])
def test_softmax_add(device, no_worse, shape, dtype, accumulate):
    z, _, total = block(*shape, dtype, device)
    base = total if accumulate else torch.zeros_like(total)
    exact = softmax_add_reference(base.double(), z.double(), weight=0.3, temperature=1.7)
    plain = softmax_add_reference(base, z, weight=0.3, temperature=1.7)
    softmax_add(total, z, 0.3, 1.7, accumulate)
    no_worse(total, plain, exact)


def test_softmax_add_in_place(device):
    z, _, _ = block(5, 77, torch.float32, device)
    expected = (z / 2.0).softmax(1)
    softmax_add_(z, z, 1.0, 2.0, False)
    torch.testing.assert_close(z, expected)


def test_rows_of_a_larger_block(device):
    """Chunks are views: rows may be further apart than the vocabulary, and nothing between them is touched."""
    wide, y, p = block(9, 64, torch.float32, device)
    view, before = wide[2:7, 10:53], wide.clone()
    y = (y[2:7] % 43).clone()
    teacher = p[2:7, 10:53]
    loss, gradient = softmax_loss_reference(view, y, teacher, weight=0.5)
    torch.testing.assert_close(softmax_loss(view, y, teacher, 0.5), loss)
    torch.testing.assert_close(wide[2:7, 10:53], gradient)
    wide[2:7, 10:53] = before[2:7, 10:53]
    assert torch.equal(wide, before)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, inside the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_numbers_stay_in_their_row(device, bad):
    z, y, p = block(4, 50, torch.float32, device)
    y[:] = 3
    z[1, 7] = bad
    expected, _ = softmax_loss_reference(z, y, p, weight=0.5)
    loss = softmax_loss(z, y, p, 0.5)
    assert torch.isnan(loss[1]) and torch.isnan(expected[1])
    torch.testing.assert_close(loss[[0, 2, 3]], expected[[0, 2, 3]])
    assert torch.isfinite(z[[0, 2, 3]]).all()


def test_a_logit_of_minus_infinity_has_probability_zero(device):
    """A masked token does not change the loss of the others."""
    z, y, _ = block(3, 20, torch.float32, device)
    y[:] = 3
    z[:, 5] = -math.inf
    expected, _ = softmax_loss_reference(z, y)
    torch.testing.assert_close(softmax_loss(z, y), expected)
    assert torch.isfinite(expected).all() and not z[:, 5].any()


def test_a_target_outside_the_vocabulary_gives_nan(device):
    z, y, _ = block(4, 30, torch.float32, device)
    y[:] = torch.tensor([0, 30, -1, 29])
    assert torch.isnan(softmax_loss(z, y)).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, y, p: softmax_loss(z.t(), y), "rows are contiguous"),
        (lambda z, y, p: softmax_loss(z, y.int()), "int64"),
        (lambda z, y, p: softmax_loss(z, y[:-1]), "do not match"),
        (lambda z, y, p: softmax_loss(z, y, p[:, :-1]), "teacher"),
        (lambda z, y, p: softmax_loss(z, y, p[:, :1].expand(4, 6)), "teacher"),
        (lambda z, y, p: softmax_loss(z, y, p.t().contiguous().t()), "teacher"),
        (lambda z, y, p: softmax_add(p, z[:-1], 1.0, 1.0, True), "do not match"),
        (lambda z, y, p: softmax_add(p.half(), z, 1.0, 1.0, True), "float32"),
        (lambda z, y, p: softmax_add(p.t(), z.t(), 1.0, 1.0, True), "contiguous"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*block(4, 6, torch.float32, "cpu"))


def test_opcheck(device):
    z, y, p = block(4, 30, torch.float32, device)
    torch.library.opcheck(torch.ops.epochal_kernels.softmax_loss.default, (z, y, p, 0.5, 2.0, -100, True))
    torch.library.opcheck(torch.ops.epochal_kernels.softmax_add.default, (p, z, 0.5, 2.0, True))


@pytest.mark.parametrize("average", ["logits", "probs"])
def test_distillation_loss_is_the_same_through_the_kernels(device, monkeypatch, average):
    """The kernel path of epochal.loss has the loss and gradients of plain torch."""
    generator = torch.Generator().manual_seed(1)
    hidden, head, x1, w1, x2, w2 = (
        torch.randn(shape, generator=generator).to(device)
        for shape in [(9, 8), (67, 8), (9, 5), (67, 5), (9, 6), (67, 6)]
    )
    parameters = [hidden.requires_grad_(), head.requires_grad_()]
    y = torch.tensor([0, 66, -100, 3, 4, 5, 6, 7, 8], device=device)
    results = []
    for path in ("torch", "triton"):
        monkeypatch.setattr(epochal.loss, "backend", lambda _, path=path: path)
        options = {"average": average, "weight": 0.5, "temperature": 2.0, "chunk_tokens": 4}
        value = epochal.loss.distillation_loss(hidden, head, y, [(x1, w1), (x2, w2)], **options)
        results.append((value.detach(), *torch.autograd.grad(value, parameters)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
