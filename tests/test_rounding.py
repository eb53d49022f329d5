"""What proofs take their products by."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICES, generator
from hypothesis import assume, given
from hypothesis import strategies as st

from locallip_cuda import rounding

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@pytest.mark.parametrize("device", DEVICES)
@given(pairs, pairs, st.tuples(st.integers(0, 3), st.integers(0, 3)), pairs, st.integers(1, 3), st.data())
def test_convolution_and_its_adjoint(device, kernel, stride, padding, dilation, groups, data) -> None:  # type: ignore[no-untyped-def]
    size = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    spans = zip(size, padding, dilation, kernel, strict=True)
    assume(all(n + 2 * p > d * (k - 1) for n, p, d, k in spans))
    g = generator(0)
    weight = torch.randn(2 * groups, 3, *kernel, generator=g, dtype=torch.float64).to(device)
    x = torch.randn(2, 3 * groups, *size, generator=g, dtype=torch.float64).to(device).requires_grad_(True)
    expected = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    y = rounding.convolution(x.detach(), weight, stride, padding, dilation, groups)
    torch.testing.assert_close(y, expected.detach())
    z = torch.randn(expected.shape, generator=g, dtype=torch.float64).to(device)
    (adjoint,) = torch.autograd.grad(expected, x, z)
    back = rounding.convolution(z, weight, stride, padding, dilation, groups, transposed_to=size)
    torch.testing.assert_close(back, adjoint)


@pytest.mark.parametrize("value, refused", [("1", True), ("2", True), ("0", False), ("", False), (None, False)])
def test_emulated_float64_is_refused_on_a_gpu(
    value: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_EMULATE_DOUBLE_PRECISION", raising=False)
    if value is not None:
        monkeypatch.setenv("CUBLAS_EMULATE_DOUBLE_PRECISION", value)
    with rounding.textbook_products("cpu"):
        pass
    if not refused:
        with rounding.textbook_products("cuda"):
            return
    with pytest.raises(RuntimeError, match=f"CUBLAS_EMULATE_DOUBLE_PRECISION: got '{value}', want it unset or 0"):
        rounding.textbook_products("cuda").__enter__()
