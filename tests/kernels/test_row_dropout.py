"""The dropout kernel: a mask for each row that depends on its seed alone."""

from __future__ import annotations

import math

import pytest
import torch

from triton_kernels.row_dropout import row_dropout_kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_each_row_drops_a_share_p_and_scales_the_rest(device, dtype, p):
    x = torch.randn(3, 50, 40, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    y = row_dropout_kernel(x, torch.tensor([7, 8, 2**32 - 1], device=device), p)
    kept = y != 0
    torch.testing.assert_close(y[kept], (x.float() / (1 - p)).to(dtype)[kept])
    deviation = math.sqrt(p * (1 - p) / 2000)
    for row in kept:
        assert abs(float((~row).float().mean()) - p) <= 5 * deviation


def test_a_row_has_the_same_mask_wherever_it_is(device):
    x = torch.ones(4, 1500, device=device)  # more than one block
    seeds = torch.tensor([3, 1, 4, 1], device=device)
    y = row_dropout_kernel(x, seeds, 0.5)
    assert torch.equal(row_dropout_kernel(x[1:], seeds[1:], 0.5), y[1:])
    assert torch.equal(y[1], y[3]) and not torch.equal(y[0], y[1])
    assert row_dropout_kernel(x[:0], seeds[:0], 0.5).shape == (0, 1500)
