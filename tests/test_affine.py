from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICES, generator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from locallip_cuda import ops

pytestmark = pytest.mark.parametrize("device", DEVICES)

CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], list[Any]]] = {
    "dense": ((6,), (4, 6), [[1, 1], [0, 0], [1, 1], 1]),
    "convolution": ((3, 7, 6), (5, 3, 3, 3), [[1, 1], [1, 1], [1, 1], 1]),
    "strided, grouped": ((4, 9, 8), (6, 2, 3, 2), [[2, 1], [2, 1], [1, 2], 2]),
    "kernel 1": ((3, 4, 5), (2, 3, 1, 1), [[1, 1], [0, 0], [1, 1], 1]),
}
every_case = pytest.mark.parametrize("case", CASES)


def arguments(
    case: str, batch: int, bias: bool = True, device: str = "cpu", dtype: torch.dtype = torch.float64
) -> list[Any]:
    shape, kernel, conv = CASES[case]
    g = generator(0)
    tensors = [torch.randn(s, generator=g, dtype=torch.float64) for s in ((batch, *shape), kernel, kernel[:1])]
    x, weight, shift = (t.to(device, dtype) for t in tensors)
    return [x, weight, shift if bias else None, *conv]


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def gradients(function: Any, args: list[Any], zero: list[int]) -> list[Tensor]:
    """Of a random combination of the outputs, in which the samples `zero` do not take part."""
    own = [a.detach().clone().requires_grad_(True) if isinstance(a, Tensor) else a for a in args]
    out = function(*own)
    mix = torch.randn(out.shape, generator=generator(1), dtype=torch.float64).to(out)
    mix[zero] = 0
    return list(torch.autograd.grad((out * mix).sum(), [a for a in own if isinstance(a, Tensor)]))


@every_case
@pytest.mark.parametrize("bias", [True, False])
def test_equals_torch(case: str, bias: bool, device: str) -> None:
    args = arguments(case, 5, bias, device)
    torch.testing.assert_close(ops.affine(*args), plain(*args))
    for mine, theirs in zip(gradients(ops.affine, args, []), gradients(plain, args, []), strict=True):
        torch.testing.assert_close(mine, theirs)


@every_case
@pytest.mark.parametrize(
    "zero", [[0], [4], [0, 1], [3, 4], [0, 4], [2], [0, 2, 3, 4], [0, 1, 2, 3], [1, 2, 3, 4], [0, 1, 2, 3, 4]], ids=str
)
def test_samples_without_gradient(case: str, zero: list[int], device: str) -> None:
    """They may be left out of the backward pass, and nothing may show it."""
    args = arguments(case, 5, True, device)
    got, expected = gradients(ops.affine, args, zero), gradients(plain, args, zero)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert (got[0][zero] == 0).all()


def test_nan_gradient_is_a_gradient(device: str) -> None:
    x, weight, *rest = arguments("dense", 3, True, device)
    weight.requires_grad_(True)
    mix = torch.zeros(3, 4, dtype=torch.float64, device=device)
    mix[2, 1] = torch.nan
    (gradient,) = torch.autograd.grad(ops.affine(x, weight, *rest), weight, mix)
    assert gradient[1].isnan().all()


@every_case
@pytest.mark.parametrize("which", [0, 1, 2])
def test_only_the_gradients_that_are_asked_for(case: str, which: int, device: str) -> None:
    args = arguments(case, 3, True, device)
    args[which].requires_grad_(True)
    ops.affine(*args).square().sum().backward()
    plain_args = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
    plain_args[which].requires_grad_(True)
    plain(*plain_args).square().sum().backward()
    torch.testing.assert_close(args[which].grad, plain_args[which].grad)


@every_case
def test_empty_batch(case: str, device: str) -> None:
    args = arguments(case, 0, True, device)
    assert ops.affine(*args).shape == plain(*args).shape
    for gradient, like in zip(gradients(ops.affine, args, []), args[:3], strict=True):
        assert gradient.shape == like.shape and (gradient == 0).all()


@every_case
def test_gradcheck(case: str, device: str) -> None:
    args = arguments(case, 2, True, device)
    inputs = [a.requires_grad_(True) for a in args[:3]]
    assert torch.autograd.gradcheck(lambda *t: ops.affine(*t, *args[3:]), inputs)


@every_case
def test_layouts_do_not_matter(case: str, device: str) -> None:
    args = arguments(case, 4, True, device)

    def scattered(t: Tensor) -> Tensor:
        return torch.stack([t, -t], -1)[..., 0]

    moved = [scattered(a) if isinstance(a, Tensor) else a for a in args]
    torch.testing.assert_close(ops.affine(*moved), ops.affine(*args))
    for mine, theirs in zip(gradients(ops.affine, moved, [0]), gradients(ops.affine, args, [0]), strict=True):
        torch.testing.assert_close(mine, theirs)
    if case != "dense":
        channels_last = [a.contiguous(memory_format=torch.channels_last) for a in args[:2]]
        torch.testing.assert_close(ops.affine(*channels_last, *args[2:]), ops.affine(*args))


@every_case
def test_autocast(case: str, device: str) -> None:
    """Products in bfloat16 (three digits), results and gradients in float32."""
    args = arguments(case, 4, True, device, torch.float32)
    exact, exact_gradients = ops.affine(*args), gradients(ops.affine, args, [3])
    with torch.autocast(device, torch.bfloat16):
        narrow, narrow_gradients = ops.affine(*args), gradients(ops.affine, args, [3])
    assert narrow.dtype == torch.float32
    assert 1e-4 < (narrow - exact).abs().max() / exact.abs().max() < 0.03, "bfloat16 it is, and no less"
    for mine, theirs in zip(narrow_gradients, exact_gradients, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).abs().max() / theirs.abs().max() < 0.03


@every_case
def test_float32_is_not_tf32(case: str, device: str) -> None:
    """torch by itself lets a GPU's convolutions take TF32: here it wants asking, also for the input's gradient."""
    args = arguments(case, 4, True, device, torch.float32)
    exact = [a.double() if isinstance(a, Tensor) else a for a in args]
    of_input = [gradients(ops.affine, own, [0])[0] for own in (args, exact)]
    for mine, theirs in ((ops.affine(*args), ops.affine(*exact)), of_input):
        assert (mine.double() - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("case, batch", [("dense", 3), ("strided, grouped", 3), ("convolution", 0)])
def test_opcheck(case: str, batch: int, device: str) -> None:
    args = [a.requires_grad_(True) if isinstance(a, Tensor) else a for a in arguments(case, batch, True, device)]
    torch.library.opcheck(torch.ops.locallip_cuda.affine.default, [*args, False])
    out = ops.affine(*args).detach()
    detached = [a.detach() for a in args[:2]]
    last = [*args[3:], False, True, True, True]
    torch.library.opcheck(torch.ops.locallip_cuda.affine_backward.default, [torch.randn_like(out), *detached, *last])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2), st.integers(1, 2),
    st.integers(1, 4), st.integers(0, 15),
)  # fmt: skip
def test_any_convolution(
    device: str,
    kernel: int,
    stride: int,
    channels: int,
    padding: int,
    dilation: int,
    groups: int,
    batch: int,
    zeros: int,
) -> None:
    g = generator(zeros)
    size = dilation * (kernel - 1) + 2
    x = torch.randn(batch, groups * channels, size, size + 1, generator=g, dtype=torch.float64).to(device)
    weight = torch.randn(groups * 2, channels, kernel, kernel, generator=g, dtype=torch.float64).to(device)
    args = [x, weight, None, [stride, 1], [padding, 0], [dilation, dilation], groups]
    zero = [b for b in range(batch) if zeros >> b & 1]
    torch.testing.assert_close(ops.affine(*args), plain(*args))
    for mine, theirs in zip(gradients(ops.affine, args, zero), gradients(plain, args, zero), strict=True):
        torch.testing.assert_close(mine, theirs)


# one tap column beside the image, two of three beside it, and a kernel of two taps that steps over it
BESIDE_THE_IMAGE = [
    ((3, 3, 1), (2, 3, 2, 1), ([2, 2], [4, 1], [1, 2])),
    ((3, 2, 2), (2, 3, 1, 1), ([2, 3], [1, 1], [2, 3])),
    ((2, 5, 2), (8, 2, 3, 2), ([2, 3], [2, 4], [2, 3])),
]


@pytest.mark.parametrize("shape, kernel, conv", BESIDE_THE_IMAGE)
def test_a_dilated_convolution_beside_the_image(
    shape: tuple[int, ...], kernel: tuple[int, ...], conv: tuple[list[int], ...], device: str
) -> None:
    """In a process of its own: oneDNN, called as torch calls it on channels-last tensors, ends the process."""
    program = f"""
import torch
from locallip_cuda import ops
from locallip_cuda.ops import reference
x = torch.rand(2, *{shape}, device={device!r}).contiguous(memory_format=torch.channels_last)
weight, bias = torch.rand({kernel}, device={device!r}), torch.rand({kernel[0]}, device={device!r})
exact = reference.affine(x.double(), weight.double(), bias.double(), *{conv}, 1)
torch.testing.assert_close(ops.affine(x, weight, bias, *{conv}, 1).double(), exact, rtol=1e-5, atol=1e-5)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
