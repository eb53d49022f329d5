"""activation_pattern: bounds in; masks, post-activation box and sparsity terms out, and the gradient.

On 32x32x32 pre-activations, as behind the first convolutions of cifar10-6c2f. Variant `paper` is what the published
method computes at the same place, in plain PyTorch: box and ball intersected, masks by comparison, the box through the
activation, the sparsity terms of its TinyImageNet recipes. Each has the layout its convolutions hand over. No norm is
involved, so there is no materialised variant.

Counted, with N values of 4 bytes in a batch of units: forward, clean, centre and half-width are read and written, 6 N,
and two masks written, N/2; backward, the gradients of the three are read, 3 N, the three read again, 3 N, and their
gradients written, 3 N. Row norms and thresholds are read in both, and their gradients written. Radii and sparsity terms
are left out: a few numbers a sample. It is all memory traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench import paper_method
from bench.case import Case, Random, Setting, Variant
from locallip_cuda import ops
from locallip_cuda.nn import ClippedMaxMin, ClippedReLU

KINDS = ("relu", "clipped-relu", "clipped-maxmin")


def cases(setting: Setting) -> Iterator[Case]:
    labels = ["ours, forward", "ours, backward"] * setting.gpu + ["ours", "paper"]
    for kind in KINDS:
        yield Case("activation_pattern", f"{kind} 32x32x32", labels, partial(build, setting, kind), launch=True)


def build(setting: Setting, kind: str) -> dict[str, Variant]:
    batch, shape = setting.batch(32), (4, 6, 6) if setting.tiny else (32, 32, 32)
    random = Random(setting.device)

    def layout(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last).requires_grad_()

    # About half of the units are constant; half of them by the box, half by the ball.
    clean = random.normal(batch, *shape)
    centre = clean + 0.02 * random.normal(*clean.shape)
    half = layout(0.6 * random.uniform(*clean.shape))
    # The same for all samples, as behind a first layer; on a GPU each sample's own, as behind all others.
    squared = layout((0.5 + random.uniform(batch if setting.gpu else 1, *shape)).square())
    radius = torch.full((batch,), 0.3, device=setting.device, requires_grad=True)
    activation = {
        "relu": nn.ReLU,
        "clipped-relu": lambda: ClippedReLU(shape, 1.0),
        "clipped-maxmin": lambda: ClippedMaxMin((shape[0] // 2, *shape[1:]), 0.5, -0.5),
    }[kind]().to(setting.device)
    thresholds = [layout(t.detach()) for t in activation.parameters()]
    # Clean values and box centres come out of one convolution, stacked.
    leaves = [layout(torch.cat([clean, centre])), half, squared, radius, *thresholds]

    def pattern(inputs: list[Tensor]) -> list[Tensor]:
        first, second = (*inputs[4:], None, None)[:2]
        outputs = ops.activation_pattern(*inputs[:4], kind.replace("-", "_"), first, second)
        return [outputs[0], outputs[1], outputs[4]]  # values, half-width, sparsity terms

    held = pattern(leaves)
    gradients = [random.uniform(*t.shape) for t in held]
    gradients[:2] = [g.contiguous(memory_format=torch.channels_last) for g in gradients[:2]]

    def backward(outputs: list[Tensor], **options: Any) -> list[Tensor]:
        return list(torch.autograd.grad(outputs, leaves, gradients, **options))

    right_values, right_gradients = checks(pattern, leaves, gradients, batch)
    plain = paper(activation, [t.contiguous() for t in (clean, centre, half)], 0.5 + random.uniform(shape[0]), radius)

    size, shared = 4 * clean.numel(), 4 * sum(t.numel() for t in (squared, *thresholds))
    forward_bytes, backward_bytes = 6.5 * size + shared, 9 * size + 2 * shared
    return {
        "ours, forward": Variant(lambda: pattern(leaves), batch, bytes=forward_bytes, check=right_values),
        "ours, backward": Variant(
            lambda: backward(held, retain_graph=True), batch, bytes=backward_bytes, check=right_gradients
        ),
        "ours": Variant(
            lambda: backward(pattern(leaves)), batch, bytes=forward_bytes + backward_bytes, check=right_gradients
        ),
        "paper": Variant(plain, batch),
    }


def checks(
    pattern: Callable[[list[Tensor]], list[Tensor]], leaves: list[Tensor], gradients: list[Tensor], batch: int
) -> list[Callable[[list[Tensor]], tuple[dict[str, float], bool]]]:
    """Of the values, and of the gradients: the first samples against float64 on the CPU.

    Gradients of what the samples share, thresholds for one, sum over all of them, and are left out.
    """
    few = min(batch, 2)
    pairs = [*range(few), *range(batch, batch + few)]  # clean values, then the centres

    def first(tensors: list[Tensor]) -> list[Tensor]:
        """Of the values and what else has a row for every sample."""
        return [t.detach()[pairs if i == 0 else slice(few)].cpu().double() for i, t in enumerate(tensors)]

    inputs = [*first(leaves[:4]), *(t.detach().cpu().double() for t in leaves[4:])]
    inputs = [t.requires_grad_() for t in inputs]
    values = pattern(inputs)
    of_samples = inputs[: 3 if len(leaves[2]) == batch else 2]
    derivatives = torch.autograd.grad(values, of_samples, first(gradients))

    def check(wanted: list[Tensor], limit: float, actual: list[Tensor]) -> tuple[dict[str, float], bool]:
        pairs_of = zip(first(actual[: len(wanted)]), wanted, strict=True)
        errors = [((a - w).norm() / w.norm()).item() for a, w in pairs_of if w.any()]
        return {"relative_error": max(errors)}, all(error < limit for error in errors)

    return [partial(check, [t.detach() for t in values], 1e-5), partial(check, list(derivatives), 1e-3)]


def paper(activation: nn.Module, bounds: list[Tensor], row_norms: Tensor, radius: Tensor) -> Callable[[], object]:
    """What the published method computes here, and its gradient. bounds: clean value, box centre and half-width."""
    leaves = [t.detach().requires_grad_() for t in (*bounds, row_norms, radius)]

    def outputs() -> list[Tensor]:
        lower, upper = paper_method.box_and_ball(*leaves)
        slack = [upper.relu().mean()]
        if isinstance(activation, ClippedMaxMin):
            lower, upper = activation(lower), activation(upper)
            paper_method.column_mask(activation, lower, upper)
            slack = [
                (activation.upper - lower.chunk(2, 1)[0]).relu().mean(),
                (upper.chunk(2, 1)[1] - activation.lower).relu().mean(),
            ]
        else:
            paper_method.row_mask(activation, lower, upper)
            if isinstance(activation, ClippedReLU):
                slack.append((activation.threshold - lower).relu().mean())
            lower, upper = activation(lower), activation(upper)
        return [activation(leaves[0]), (upper + lower) / 2, (upper - lower) / 2, *slack]

    ones = [torch.ones_like(t) for t in outputs()]  # the gradient of a sum, without the sum's own cost
    return lambda: torch.autograd.grad(outputs(), [*leaves, *activation.parameters()], ones)


def test_activation_pattern(turn: Callable[[], None]) -> None:
    turn()
