"""margin: the most every logit can gain on the label's within ball and box, and the gradient.

Variants: `ours`; `paper`, the published translation loop for the label's K pairs; `paper-all-pairs`, the same loop for
all K x K pairs as published (left out for K=200, where one of its many tensors takes gigabytes). No norm is involved,
so there is no materialised variant. `excess` says how far above the maximum (from 200 bisections in float64) a result
lies, relative to it: every variant is an upper bound.

Counted, of each of the B (K - 1) h terms: one difference of weights, and at the least one evaluation of the dual at the
multiplier found (scaled, clipped at two sides, squared and summed, multiplied and summed), 8 flops; how many
evaluations find it depends on the data. Backward: 6 (difference, shift, and the two gradients' sums). Bytes forward:
features, box and weight read, gain and step written; backward: those read, and the gradients written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import paper_method
from bench.case import Case, Random, Setting, Variant, no_grad
from locallip_cuda import ops
from locallip_cuda.ops import reference

ROUNDS = 10  # of the translation loop, as in the paper's MNIST recipe
SIZES = ((10, 512), (200, 256))  # classes, features


def cases(setting: Setting) -> Iterator[Case]:
    for classes, width in SIZES:
        labels = ["ours, forward", "paper, forward"] * setting.gpu + ["ours", "paper"]
        labels += ["paper-all-pairs"] * (classes == 10)
        make = partial(build, setting, classes, width)
        yield Case("margin", f"K={classes} h={width}", labels, make, launch=classes == 10)


def build(setting: Setting, classes: int, width: int) -> dict[str, Variant]:
    batch, width = setting.batch(256 if classes == 10 else 64), width // 32 if setting.tiny else width
    random = Random(setting.device)
    # Features of a clipped ReLU layer, a third of them constant, with a radius at which ball and box both bind.
    z, reach = random.normal(batch, width), 0.5 * random.uniform(batch, width)
    features, lower, upper = (t.clamp(0, 1).requires_grad_() for t in (z, z - reach, z + reach))
    weight = random.normal(classes, width).div_(width**0.5).requires_grad_()
    radius = (0.5 + 2 * random.uniform(batch)).requires_grad_()
    labels = random.integers(classes, batch)
    leaves = [features, lower, upper, radius, weight]
    few = min(batch, 8)
    doubles = [t.detach().double() for t in leaves]
    maximum = reference.margin(*(t[:few] for t in doubles[:4]), doubles[4], labels[:few])

    def ours() -> Tensor:
        return ops.margin(features, lower, upper, radius, weight, labels)

    def sides() -> tuple[Tensor, Tensor]:
        return (lower - features).clamp(max=0), (upper - features).clamp(min=0)

    def paper() -> Tensor:
        low, high = sides()
        difference = weight - weight[labels].unsqueeze(1)
        gain = paper_method.translation_loop(difference, radius.view(-1, 1), low[:, None], high[:, None], ROUNDS)
        return gain.scatter(1, labels.unsqueeze(1), 0)

    def all_pairs() -> Tensor:
        low, high = (t[:, None, None] for t in sides())
        difference = weight.unsqueeze(0) - weight.unsqueeze(1)
        gain = paper_method.translation_loop(difference[None], radius.view(-1, 1, 1), low, high, ROUNDS)
        return gain[torch.arange(batch, device=setting.device), labels].scatter(1, labels.unsqueeze(1), 0)

    def with_gradient(gains: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def both() -> tuple[Tensor, ...]:
            gain = gains()
            return gain.detach(), *torch.autograd.grad(gain, leaves, torch.ones_like(gain))

        return both

    def check(result: Tensor | tuple[Tensor, ...]) -> tuple[dict[str, float], bool]:
        gain = result if isinstance(result, Tensor) else result[0]
        excess = ((gain[:few].double() - maximum) / maximum.clamp(min=1e-6)).flatten()
        low, high = excess.min().item(), excess.max().item()
        return {"excess_min": low, "excess_max": high}, low > -1e-5 and high < 1e-3

    def bound_check(result: Any) -> tuple[dict[str, float], None]:
        return check(result)[0], None  # the published loop stops early: how far above is its affair

    terms = batch * (classes - 1) * width
    read = 4 * sum(t.numel() for t in leaves) + 8 * batch
    written = 8 * batch * classes
    forward = (batch, 8.0 * terms, read + written)
    both = (batch, 14.0 * terms, 2 * read + 2 * written + 4 * sum(t.numel() for t in leaves))
    # The loop asks after every round whether it can end, which waits for the device.
    loop: dict[str, Any] = {"check": bound_check, "capture": False}
    return {
        "ours, forward": Variant(no_grad(ours), *forward, check),
        "ours": Variant(with_gradient(ours), *both, check),
        "paper, forward": Variant(no_grad(paper), *forward, **loop),
        "paper": Variant(with_gradient(paper), *both, **loop),
        "paper-all-pairs": Variant(with_gradient(all_pairs), batch, **loop),
    }


def test_margin(turn: Callable[[], None]) -> None:
    turn()
