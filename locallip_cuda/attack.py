"""A projected-gradient attack in the l2 ball (Madry et al., ICLR 2018): an upper bound on the true robust accuracy."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["pgd"]

# The host looks which samples are broken, and drops them, every so many steps. On a GPU each look waits for the device.
_CHECK_EVERY = {"cpu": 1, "cuda": 10}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; each module's own mode is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), which broadcasts against `like`."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def _per_sample(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """`value` as a (B, 1, ..., 1) tensor that broadcasts against x."""
    numbers = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    if numbers.dim() and numbers.shape != x.shape[:1]:
        raise ValueError(f"{name} must be a number or have shape ({x.shape[0]},), got shape {tuple(numbers.shape)}")
    if not bool((numbers.isfinite() & (numbers >= 0)).all()):
        raise ValueError(f"{name} must be finite and non-negative, got {value!r}")
    return _column(numbers.expand(x.shape[0]), x)


def _norm(x: Tensor) -> Tensor:
    """Each sample's l2 norm as a (B, 1, ..., 1) tensor of x's dtype.

    The squares are summed in float64: a certified net's gradient may be so small that they underflow in float32.
    """
    return _column(torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64).to(x.dtype), x)


def _unit(x: Tensor) -> Tensor:
    return x / _norm(x).clamp(min=torch.finfo(x.dtype).tiny)


def _randn(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    """Best other logit minus logit y, (B,): above 0 where the sample is misclassified."""
    true = logits.gather(1, y[:, None])[:, 0]
    return logits.scatter(1, y[:, None], -torch.inf).amax(1) - true


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    steps: int = 100,
    step_size: float | Tensor | None = None,
    random_start: bool = True,
    generator: torch.Generator | None = None,
    box: tuple[float, float] | None = None,
) -> Tensor:
    """Adversarial points for `model` in the l2 balls of radius eps around x.

    model: maps (B, ...) to logits (B, K), K >= 2, each sample on its own. It runs in eval mode, which is restored;
    its parameters' gradients are left alone.
    x: (B, ...), floating point.   y: (B,), int64, the true classes.
    eps: a number or (B,), in the units of x.   step_size: the same; None is eps / 4.
    random_start: start from a point drawn uniformly from the ball instead of from x.
    generator: draws the start, and the directions where the gradient vanishes; None is torch's global one.
    box: (low, high), keeps the points in that range too; x has to lie in it. The default None is the threat model
    of the certificates, the full ball.
    -> (B, ...), x's dtype: for each sample the first point found that is misclassified, or else the one with the
    highest loss; x itself is the first that is tried. In exact arithmetic on the returned numbers,
    ||result - x||_2 <= eps.

    The loss is the margin, best other logit minus logit y. Cross entropy would mix in every other class by its
    probability, and a net with a small Lipschitz constant has all its logits close together: its gradient would
    point between the classes. The margin's points at the nearest one, at any scale of the logits, and its sign says
    whether the attack has succeeded. Each step is step_size times the unit gradient, then the projection.

    ValueError, TypeError: shapes that do not fit, a bad eps, steps, step_size or label, x outside the box.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(type(x))
        raise TypeError(f"x must be a floating-point tensor (B, ...) with two or more dimensions, got {got}")
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != x.shape[:1]:
        got = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else repr(type(y))
        raise TypeError(f"y must be an int64 tensor of shape ({x.shape[0]},), got {got}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be a non-negative integer, got {steps!r}")

    with torch.inference_mode(False), _evaluating(model):
        x = x.detach().clone()
        y = y.detach().clone()
        radius = _per_sample("eps", eps, x)
        step = radius / 4 if step_size is None else _per_sample("step_size", step_size, x)
        if box is not None and x.numel() and not bool(((x >= box[0]) & (x <= box[1])).all()):
            raise ValueError(f"x must lie in the box {box!r}, got values in [{float(x.min())}, {float(x.max())}]")
        if not x.shape[0]:
            return x

        with torch.no_grad():
            logits = model(x.clone())  # an activation in place may write over its input
        if logits.dim() != 2 or logits.shape[0] != x.shape[0] or logits.shape[1] < 2:
            raise ValueError(f"model must give logits ({x.shape[0]}, K) with K >= 2, got shape {tuple(logits.shape)}")
        if int(y.min()) < 0 or int(y.max()) >= logits.shape[1]:
            raise ValueError(f"y must lie in 0..{logits.shape[1] - 1}, got {int(y.min())}..{int(y.max())}")
        best, best_loss = x.clone(), _margin(logits, y)

        # Rounding x + delta moves it by up to half an ulp per coordinate; the ball is shrunk by the norm of that
        # and by the rounding of the norm and the scaling here, so that the result stays inside the true ball.
        ulp = torch.finfo(x.dtype).eps
        reach = (radius * (1 - 8 * ulp) - ulp * (_norm(x) + radius)).clamp(min=0)

        def project(delta: Tensor, x: Tensor, reach: Tensor) -> Tensor:
            point = x + delta * (reach / _norm(delta).clamp(min=torch.finfo(delta.dtype).tiny)).clamp(max=1)
            return point if box is None else point.clamp(*box)

        if random_start:
            device = x.device if generator is None else generator.device
            # Uniform in the ball: a uniform direction, and a radius with density proportional to r^(n-1).
            uniform = torch.rand(radius.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
            point = project(_unit(_randn(x, generator)) * reach * uniform ** (1 / x[0].numel()), x, reach)
        else:
            point = x.clone()

        index = torch.arange(x.shape[0], device=x.device)  # the samples still under attack
        check_every = _CHECK_EVERY.get(x.device.type, 1)
        for k in range(steps + 1):
            if k % check_every == 0:
                alive = (best_loss[index] <= 0) & (reach[index].flatten() > 0)
                if not bool(alive.all()):
                    index, point = index[alive], point[alive]
                if not index.numel():
                    break
            point.requires_grad_(True)
            with torch.enable_grad():
                loss = _margin(model(point.clone()), y[index])
                (gradient,) = torch.autograd.grad(loss.sum(), point)
            point = point.detach()
            loss = loss.detach()
            better = (best_loss[index] <= 0) & (loss > best_loss[index])
            best[index] = torch.where(_column(better, x), point, best[index])
            best_loss[index] = torch.where(better, loss, best_loss[index])
            if k == steps:
                break
            flat = (gradient == 0).flatten(1).all(1)
            if check_every > 1 or bool(flat.any()):
                noise = _randn(gradient, generator)
                gradient = torch.where(_column(flat, x), noise, gradient)
            point = project(point - x[index] + step[index] * _unit(gradient), x[index], reach[index])
        return best
