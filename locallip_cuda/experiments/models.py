"""The networks that train by name, and any other that can be imported.

Those of Huang et al. (NeurIPS 2021, arXiv:2111.01395), a small one for scikit-learn's digits, and residual ones in the
manner of LiResNet (Hu, Zou, Wang, Leino, Fredrikson, "Unlocking Deterministic Robustness Certification on ImageNet",
NeurIPS 2023, arXiv:2301.12549; code: github.com/hukkai/liresnet).
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import ClippedMaxMin, ClippedReLU, MaxMin

__all__ = ["ACTIVATIONS", "MODELS", "LiResNet", "ModelSpec", "build", "imported", "spec"]

ACTIVATIONS = ("relu", "clipped-relu", "maxmin", "clipped-maxmin")


@dataclass(frozen=True)
class ModelSpec:
    """What a named network takes and gives, and how it starts.

    input_shape: (C, H, W) of one image in [0, 1].   classes: the number of logits.
    data: the name that `locallip_cuda.data.load` knows its data set by.
    convolutions: (kernel, stride, padding, output channels) of each.   hidden: widths of the hidden Linear layers.
    blocks, channels: of a residual network; 0 for a plain one. Of that, ``convolutions`` is the stem alone, and
    ``hidden`` the dense neck.
    threshold: initial threshold of clipped ReLU, the same in every layer.
    clip: initial upper (and minus lower) of clipped MaxMin at the first and the last activation, linear between.
    """

    name: str
    data: str
    input_shape: tuple[int, int, int]
    classes: int
    convolutions: tuple[tuple[int, int, int, int], ...]
    hidden: tuple[int, ...]
    threshold: float
    clip: tuple[float, float]
    blocks: int = 0
    channels: int = 0


_4C = ((3, 1, 1, 32), (4, 2, 1, 32), (3, 1, 1, 64), (4, 2, 1, 64))
_6C = ((3, 1, 1, 32), (3, 1, 1, 32), (4, 2, 1, 32), (3, 1, 1, 64), (3, 1, 1, 64), (4, 2, 1, 64))
_8C = (
    *((3, 1, 1, 64), (3, 1, 1, 64), (4, 2, 0, 64)),
    *((3, 1, 1, 128), (3, 1, 1, 128), (4, 2, 0, 128)),
    *((3, 1, 1, 256), (4, 2, 0, 256)),
)

# The paper gives a clipped MaxMin recipe for 6C2F and 8C2F only; 4C3F and digits start from the one of 6C2F.
MODELS: dict[str, ModelSpec] = {
    s.name: s
    for s in (
        ModelSpec("digits", "digits", (1, 8, 8), 10, ((3, 1, 1, 16), (4, 2, 1, 32)), (64,), 2.0, (0.1, 1.2)),
        ModelSpec("mnist-4c3f", "mnist", (1, 28, 28), 10, _4C, (512, 512), 2.0, (0.1, 1.2)),
        ModelSpec("cifar10-4c3f", "cifar10", (3, 32, 32), 10, _4C, (512, 512), 2.0, (0.1, 1.2)),
        ModelSpec("cifar10-6c2f", "cifar10", (3, 32, 32), 10, _6C, (512,), 2.0, (0.1, 1.2)),
        ModelSpec(
            "cifar10-liresnet-s",
            "cifar10",
            (3, 32, 32),
            10,
            ((5, 2, 2, 32),),
            (128,),
            2.0,
            (0.1, 1.2),
            blocks=4,
            channels=32,
        ),
        ModelSpec(
            "cifar10-liresnet",
            "cifar10",
            (3, 32, 32),
            10,
            ((5, 2, 2, 128),),
            (512,),
            2.0,
            (0.1, 1.2),
            blocks=12,
            channels=128,
        ),
        ModelSpec("tinyimagenet-8c2f", "tinyimagenet", (3, 64, 64), 200, _8C, (256,), 1.0, (0.8, 3.0)),
    )
}


def spec(name: str) -> ModelSpec:
    """The `ModelSpec` of a named network (input shape, class count, data set). ValueError for an unknown name."""
    if name not in MODELS:
        raise ValueError(f"name must be one of {', '.join(MODELS)}; got {name!r}")
    return MODELS[name]


class LiResNet(nn.Module):
    """A stem, blocks x + conv(x) with an activation behind each, a learned downsampling, a dense neck, and a last layer
    with rows of length 1.

    Between two activations everything is linear, skip included, so that a block has the norm of the one operator that
    it is, and not one and a norm. The rows of the last layer are divided by their lengths: a margin is then a distance.

    Args:
        model: with ``blocks``.   activation: a new one for the shape of one sample, the i-th in the network.
    """

    def __init__(self, model: ModelSpec, activation: Callable[[tuple[int, ...], int], nn.Module]) -> None:
        super().__init__()
        channels, height, width = model.input_shape
        ((kernel, stride, padding, out),) = model.convolutions
        self.stem = nn.Conv2d(channels, out, kernel, stride, padding)
        height, width = ((n + 2 * padding - kernel) // stride + 1 for n in (height, width))
        inner = (model.channels, height, width)
        self.blocks = nn.ModuleList([nn.Conv2d(out, out, 3, 1, 1) for _ in range(model.blocks)])
        self.down = nn.Conv2d(out, out, 4, 4)
        below = (out, height // 4, width // 4)
        (neck,) = model.hidden
        self.neck = nn.Linear(math.prod(below), neck)
        self.last = nn.Linear(neck, model.classes)
        shapes = [inner, *[inner] * model.blocks, below, (neck,)]
        self.activations = nn.ModuleList([activation(shape, i) for i, shape in enumerate(shapes)])
        with torch.no_grad():  # blocks that are near the identity at first, however many
            for conv in self.blocks:
                conv.weight.div_(math.sqrt(model.blocks))  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        first, *inside, down, neck = self.activations
        x = first(self.stem(x))
        for conv, activation in zip(self.blocks, inside, strict=True):
            x = activation(x + conv(x))
        x = down(self.down(x))
        x = neck(self.neck(x.flatten(1)))
        return F.linear(x, F.normalize(self.last.weight, dim=1), self.last.bias)


def imported(place: str) -> nn.Module:
    """A new network from a function of no arguments, named ``package.module:function``; the working directory counts.

    ValueError where there is none, or where it returns something else than a module.
    """
    module, colon, name = place.partition(":")
    if not (module and colon and name):
        raise ValueError(f"model: got {place!r}, want package.module:function")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model: got {place!r}, which cannot be imported: {error}") from error
    finally:
        sys.path.pop(0)
    model = function()
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: got {place!r}, which returns {type(model).__name__}, want a torch.nn.Module")
    return model


def _activation(kind: str, shape: tuple[int, ...], threshold: float, clip: float) -> nn.Module:
    if kind == "relu":
        return nn.ReLU()
    if kind == "clipped-relu":
        return ClippedReLU(shape, threshold)
    if kind == "maxmin":
        return MaxMin()
    return ClippedMaxMin((shape[0] // 2, *shape[1:]), clip, -clip)


def build(
    name: str,
    activation: str = "clipped-relu",
    *,
    threshold: float | None = None,
    clip: tuple[float, float] | None = None,
) -> nn.Module:
    """A new network: Conv2d layers, Flatten, Linear layers, an activation after each but the last; or a LiResNet.

    name: one of `MODELS`.   activation: one of `ACTIVATIONS`.
    threshold: initial threshold of clipped ReLU (default: the recipe's, `spec(name).threshold`).
    clip: initial upper = -lower of clipped MaxMin at the first and at the last activation, linear between
    (default: the recipe's, `spec(name).clip`).
    Weights are float32 on the CPU, drawn from torch's default distribution with torch's global generator.
    ValueError: an unknown name or activation, a negative threshold or clip.
    """
    model = spec(name)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    threshold = model.threshold if threshold is None else threshold
    first, last = model.clip if clip is None else clip
    if not threshold >= 0:
        raise ValueError(f"threshold must be non-negative, got {threshold!r}")
    if not (first >= 0 and last >= 0):
        raise ValueError(f"clip must be two non-negative numbers, got {clip!r}")

    count = len(model.convolutions) + len(model.hidden) + (model.blocks + 1 if model.blocks else 0)
    clips = [first + (last - first) * i / (count - 1) for i in range(count)]
    if model.blocks:
        return LiResNet(model, lambda shape, i: _activation(activation, shape, threshold, clips[i]))
    layers: list[nn.Module] = []
    channels, height, width = model.input_shape
    for (kernel, stride, padding, out), at in zip(model.convolutions, clips, strict=False):
        layers.append(nn.Conv2d(channels, out, kernel, stride, padding))
        channels = out
        height, width = ((n + 2 * padding - kernel) // stride + 1 for n in (height, width))
        layers.append(_activation(activation, (channels, height, width), threshold, at))
    layers.append(nn.Flatten())
    features = channels * height * width
    for out, at in zip(model.hidden, clips[len(model.convolutions) :], strict=True):
        layers += [nn.Linear(features, out), _activation(activation, (out,), threshold, at)]
        features = out
    layers.append(nn.Linear(features, model.classes))
    return nn.Sequential(*layers)
