"""Products through either library, whole or by half, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from epochal.optim.products import SMALL, _dense, gram, matmul, upper_gram

few = settings(max_examples=20, deadline=None, derandomize=True)
side = st.sampled_from([1, 5, SMALL - 1, SMALL, SMALL + 3, 2 * SMALL, 3 * SMALL + 1])
LAYOUTS = {
    "rows": lambda x: x.contiguous(),
    "columns": lambda x: x.mT.contiguous().mT,
    "cut out": lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3:-2],
    "steps": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
}
layout = st.sampled_from(sorted(LAYOUTS))


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(got: Tensor, a: Tensor, b: Tensor) -> bool:
    """Within the rounding of `k` float32 additions of the true product."""
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    return bool(((got.double() - exact).abs() <= 4e-7 * a.shape[-1] ** 0.5 * size + 1e-30).all())


@few
@given(m=side, k=side, n=side, one=layout, other=layout, batch=st.sampled_from([(), (1,), (3,)]))
def test_any_layout_and_batch(m: int, k: int, n: int, one: str, other: str, batch: tuple[int, ...]) -> None:
    a, b = LAYOUTS[one](normal(0, *batch, m, k)), LAYOUTS[other](normal(1, *batch, k, n))
    assert close(matmul(a, b), a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("m", [7, 2 * SMALL, 5 * SMALL + 1])
def test_symmetric_products(m: int, dtype: torch.dtype) -> None:
    x = normal(0, 2, m, 40, dtype=dtype)
    found, upper = gram(x), upper_gram(x)
    truth = x.double() @ x.double().mT
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype] * float(truth.abs().max())
    assert float((found.double() - truth).abs().max()) <= tolerance
    assert float((upper.double() - truth).triu().abs().max()) <= tolerance
    assert bool(upper.isfinite().all())


def test_what_reaches_the_library_is_dense() -> None:
    """Columns cut out of a wider matrix run in a reference loop there, hundreds of times slower."""
    x = normal(0, 200, 300)
    for found in (_dense(x), _dense(x.mT), _dense(x[:, 100:]), _dense(x[50:, :]), _dense(x[:, 100:].mT)):
        assert found.is_contiguous() or found.mT.is_contiguous()
    assert _dense(x.mT).data_ptr() == x.data_ptr()  # nothing is copied without need


def test_compiles_to_plain_products() -> None:
    compiled = torch.compile(lambda a, b: matmul(a, b) + gram(a) @ b, fullgraph=True, backend="eager")
    a, b = normal(0, SMALL, SMALL), normal(1, SMALL, SMALL)
    torch.testing.assert_close(compiled(a, b), a @ b + (a @ a.mT) @ b, rtol=1e-4, atol=1e-3)
