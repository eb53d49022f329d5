"""Small networks of every kind that has bounds, as their users would write them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from helpers import generator
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from locallip_cuda.nn import MaxMin


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self._block(2, 6), self._block(6, 8)])
        self.classify = nn.Sequential(
            nn.Linear(8 * 2 * 2, 12), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(12, 4)
        )

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.classify(torch.flatten(x, 1))


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet18(nn.Module):
    """Four stages of two blocks, as for CIFAR; ``width`` is 64 there."""

    def __init__(self, width: int, channels: int = 2, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(BasicBlock(a, b, 1 if i == 0 else 2), BasicBlock(b, b, 1))
                for i, (a, b) in enumerate(itertools.pairwise(widths))
            )
        )
        self.fc = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x))
        x = F.adaptive_avg_pool2d(x, 1)
        return self.fc(x.view(x.size(0), -1))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.layers = nn.ModuleList([nn.Conv2d(4 + 3 * i, 3, 3, padding=1) for i in range(3)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(4 + 3 * i) for i in range(3)])
        self.head = nn.Linear(13, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.layers, strict=True):
            x = torch.cat([x, conv(norm(x).relu())], 1)
        return self.head(x.relu().mean((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.inner = nn.Conv2d(4, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 3, 2, stride=2)
        self.out = nn.Conv2d(5, 2, 3, padding=1)
        self.head = nn.Linear(2 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.inner(F.relu(self.down(x))))
        h = torch.cat([F.relu(self.up(h)), x], dim=1)
        h = F.relu(self.out(h)) + F.interpolate(F.avg_pool2d(x, 2), scale_factor=2)
        return self.head(h.reshape(len(h), -1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for _ in range(3):
            x = F.gelu(self.shared(x)) - 0.5 * x
        return self.last(x)


class LiResNet(nn.Module):
    """x + conv(x) with MaxMin behind it, a dense neck, a row-normalised last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(6, 6, 3, padding=1) for _ in range(3)])
        self.neck = nn.Conv2d(6, 8, 2, stride=2)
        self.dense = nn.Linear(8 * 9, 10)
        self.last = nn.Linear(10, 4)
        self.act = MaxMin()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        for conv in self.blocks:
            x = self.act(x + conv(x))
        x = self.act(self.dense(self.act(self.neck(x)).flatten(1)))
        weight = self.last.weight / self.last.weight.norm(dim=1, keepdim=True)
        return F.linear(x, weight, self.last.bias)


class PreActivation(nn.Module):
    """The input of every block is a sum that no activation has closed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 4, 3, padding=1)
        self.convs = nn.ModuleList([nn.Conv1d(4, 4, 3, padding=1, padding_mode="replicate") for _ in range(3)])
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv in self.convs:
            x = x + conv(F.hardswish(x))
        return self.head(F.adaptive_max_pool1d(x, 1).squeeze(2))


@dataclass
class Case:
    build: Callable[[], nn.Module]
    sizes: tuple[int, ...]


CASES = {
    "vgg": Case(VGG, (2, 8, 8)),
    "resnet-18": Case(lambda: ResNet18(2), (2, 16, 16)),
    "densenet": Case(DenseNet, (2, 6, 6)),
    "u-net": Case(UNet, (2, 6, 6)),
    "liresnet": Case(LiResNet, (2, 6, 6)),
    "pre-activation": Case(PreActivation, (2, 8)),
    "conv1d": Case(
        lambda: nn.Sequential(
            nn.Conv1d(2, 5, 3, padding=1), nn.ELU(), nn.MaxPool1d(3, 2, 1), nn.Conv1d(5, 4, 3, dilation=2),
            nn.LeakyReLU(), nn.Flatten(), nn.Linear(12, 4),
        ),
        (2, 14),
    ),
    "conv3d": Case(
        lambda: nn.Sequential(
            nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.AvgPool3d(2), nn.Conv3d(4, 3, 2), nn.Mish(),
            nn.Flatten(), nn.Linear(3, 4),
        ),
        (1, 4, 4, 4),
    ),
    "circular": Case(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=2, stride=2, padding_mode="reflect"), nn.Hardtanh(-0.3, 0.4),
            nn.PixelShuffle(2), nn.Flatten(), nn.Linear(64, 4),
        ),
        (2, 6, 6),
    ),
    "tied": Case(Tied, (5,)),
    "parametrised": Case(
        lambda: nn.Sequential(
            parametrizations.orthogonal(nn.Linear(5, 8)), nn.ReLU(), parametrizations.spectral_norm(nn.Linear(8, 8)),
            nn.Sigmoid(), parametrizations.weight_norm(nn.Linear(8, 4)),
        ),
        (5,),
    ),
    "ends in an activation": Case(
        lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4), nn.PReLU(4)),
        (5,),
    ),
    "one output": Case(lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU6(), nn.Linear(8, 1)), (5,)),
}  # fmt: skip


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network in float64 and eval mode, with statistics and biases that are not all alike, and six inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CASES[name].build().double()
    g = generator(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:
            with torch.no_grad():
                module.weight.mul_(2)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            for buffer, scale, offset in ((module.running_mean, 0.2, 0.0), (module.running_var, 0.5, 0.4)):
                assert buffer is not None
                buffer.copy_(torch.rand(buffer.shape, generator=g) * scale + offset)
            with torch.no_grad():
                module.weight.copy_(torch.rand(module.weight.shape, generator=g) + 0.3)
                module.bias.copy_(torch.randn(module.bias.shape, generator=g) * 0.1 + 0.3)
    return model.eval(), torch.rand(6, *CASES[name].sizes, generator=g, dtype=torch.float64)
