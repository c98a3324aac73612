"""Shared by the kernel tests: the device on which kernels run, and errors against float64."""

import pytest
import torch

from triton_kernels import backend


@pytest.fixture(scope="session")
def device():
    """A GPU, or the CPU with Triton's interpreter; never the torch reference."""
    name = "cuda" if torch.cuda.is_available() else "cpu"
    if not backend.HAS_TRITON:
        pytest.skip("Triton is not installed")
    assert backend.use_kernel(name), "these tests must run kernels: set TRITON_INTERPRET=1 before triton is imported"
    return name


@pytest.fixture(scope="session")
def no_worse():
    """Assert that the error against float64 is at most `margin` times that of the reference in the same precision."""

    def check(result, reference, exact, margin=1.5, floor=1e-6):
        if backend.INTERPRETED and result.dtype == torch.bfloat16:
            floor = torch.finfo(result.dtype).eps  # the interpreter truncates bfloat16, a GPU rounds it
        scale = exact.abs().max().clamp(min=1e-30) if exact.numel() else torch.tensor(1.0)
        kernel_error = (result.double() - exact).abs().max() / scale if exact.numel() else 0.0
        reference_error = (reference.double() - exact).abs().max() / scale if exact.numel() else 0.0
        assert kernel_error <= margin * reference_error + floor, (float(kernel_error), float(reference_error))

    return check
