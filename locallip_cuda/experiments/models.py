"""The networks of Huang et al. (NeurIPS 2021, arXiv:2111.01395) and a small one for scikit-learn's digits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..nn import ClippedMaxMin, ClippedReLU, MaxMin

__all__ = ["ACTIVATIONS", "MODELS", "ModelSpec", "build", "spec"]

ACTIVATIONS = ("relu", "clipped-relu", "maxmin", "clipped-maxmin")


@dataclass(frozen=True)
class ModelSpec:
    """What a named network takes and gives, and how it starts.

    input_shape: (C, H, W) of one image in [0, 1].   classes: the number of logits.
    data: the name that `locallip_cuda.data.load` knows its data set by.
    convolutions: (kernel, stride, padding, output channels) of each.   hidden: widths of the hidden Linear layers.
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
        ModelSpec("tinyimagenet-8c2f", "tinyimagenet", (3, 64, 64), 200, _8C, (256,), 1.0, (0.8, 3.0)),
    )
}


def spec(name: str) -> ModelSpec:
    """The `ModelSpec` of a named network (input shape, class count, data set). ValueError for an unknown name."""
    if name not in MODELS:
        raise ValueError(f"name must be one of {', '.join(MODELS)}; got {name!r}")
    return MODELS[name]


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
) -> nn.Sequential:
    """A new network: Conv2d layers, Flatten, Linear layers, an activation after each but the last.

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

    count = len(model.convolutions) + len(model.hidden)
    clips = [first + (last - first) * i / (count - 1) for i in range(count)]
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
