"""What the kernel tests share: the device on which kernels run, and errors against float64."""

import pytest
import torch

from triton_kernels import backend


@pytest.fixture(scope="session")
def device():
    """A GPU, or the CPU with Triton's interpreter; never the torch reference in a kernel's place."""
    name = "cuda" if torch.cuda.is_available() else "cpu"
    if not backend.HAS_TRITON:
        pytest.skip("Triton is not installed")
    assert backend.use_kernel(name), "these tests must run kernels: set TRITON_INTERPRET=1 before triton is imported"
    return name


@pytest.fixture(scope="session")
def no_worse():
    """Assert that a result is as near to the float64 one as the reference of the same precision, times a margin."""

    def check(result, reference, exact, margin=1.5, floor=1e-6):
        if backend.INTERPRETED and result.dtype == torch.bfloat16:
            floor = torch.finfo(result.dtype).eps  # the interpreter cuts bfloat16 off where a GPU rounds it
        scale = exact.abs().max().clamp(min=1e-30) if exact.numel() else torch.tensor(1.0)
        mine = (result.double() - exact).abs().max() / scale if exact.numel() else 0.0
        theirs = (reference.double() - exact).abs().max() / scale if exact.numel() else 0.0
        assert mine <= margin * theirs + floor, (float(mine), float(theirs))

    return check
