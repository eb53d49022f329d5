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

from locallip_cuda.nn import ClippedMaxMin, ClippedReLU, MaxMin, maxmin


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


class Written(nn.Module):
    """Parts, and a program of them."""

    def __init__(self, program: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.program, self.parts = program, nn.ModuleDict(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.program(x, **self.parts)


def _residual(x: Tensor, a: nn.Module, b: nn.Module, head: nn.Module) -> Tensor:
    h = F.relu(a(x))
    return head(F.relu(0.8 * h + b(h) - 0.1))


def _two_skips(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module, head: nn.Module) -> Tensor:
    """Sums that no activation closes, read by two functions or by the last layer."""
    h = a(x)
    h = h + b(F.relu(h))
    return head(h - torch.abs(c(h)) / 3)


def _past_everything(x: Tensor, a: nn.Module, b: nn.Module, head: nn.Module) -> Tensor:
    return head(F.leaky_relu(b(F.relu(a(x))), 0.2)) + torch.cat([x, 1 - x[:, :1]], 1)


def _dense(x: Tensor, a: nn.Module, b: nn.Module, act: nn.Module, head: nn.Module) -> Tensor:
    h = torch.cat([x, F.relu(a(x))], 1)
    return head(torch.cat([h, act(b(h)), 0.5 * h[:, 1:3]], 1))


def _pooled(x: Tensor, a: nn.Module, b: nn.Module, head: nn.Module) -> Tensor:
    """Windows that overlap, and a pool that is one branch of a sum."""
    h = a(x).view(-1, 2, 4)
    h = F.max_pool1d(h, 3, 1, 1) - F.avg_pool1d(h, 3, 1, 1)
    return head(F.max_pool1d(b(h), 2).flatten(1))


def _liresnet(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module, head: nn.Module) -> Tensor:
    h = maxmin(a(x).view(-1, 2, 2, 2))
    for conv in (b, c):
        h = maxmin(h + conv(h))
    weight = head.weight / head.weight.norm(dim=1, keepdim=True)  # type: ignore[operator, union-attr]
    return F.linear(h.flatten(1), weight, head.bias)  # type: ignore[arg-type]


def _tied(x: Tensor, a: nn.Module, b: nn.Module, head: nn.Module) -> Tensor:
    x = F.relu(a(x))
    for _ in range(2):
        x = F.relu(b(x)) - 0.5 * x
    return head(x)


def _normalised(x: Tensor, a: nn.Module, block: nn.Module, head: nn.Module) -> Tensor:
    return head(block(a(x).view(-1, 2, 2, 2)).mean((2, 3)))


def _moved(x: Tensor, a: nn.Module, up: nn.Module, round_: nn.Module, head: nn.Module) -> Tensor:
    h = up(F.relu(a(x).view(-1, 2, 1, 2)))  # (1, 2, 4)
    first, second = round_(h).chunk(2, 1)
    h = F.hardtanh(first.transpose(2, 3).reshape(h.shape) + second.flip(3), -0.4, 0.5)
    return head((h + F.interpolate(h[..., ::2], scale_factor=(1.0, 2.0))).permute(0, 2, 3, 1).flatten(1))


def _clipped(x: Tensor, a: nn.Module, b: nn.Module, relu: nn.Module, act: nn.Module, head: nn.Module) -> Tensor:
    h = relu(a(x))
    return head(act(h + b(h)))


# piecewise linear, of two inputs: cut in less than a second
PROGRAMS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: Written(_residual, a=nn.Linear(2, 6), b=nn.Linear(6, 6), head=nn.Linear(6, 3)),
    "two skips": lambda: Written(
        _two_skips, a=nn.Linear(2, 5), b=nn.Linear(5, 5), c=nn.Linear(5, 5), head=nn.Linear(5, 3)
    ),
    "past everything": lambda: Written(_past_everything, a=nn.Linear(2, 6), b=nn.Linear(6, 4), head=nn.Linear(4, 3)),
    "dense": lambda: Written(_dense, a=nn.Linear(2, 5), b=nn.Linear(7, 4), act=MaxMin(), head=nn.Linear(13, 3)),
    "pooled": lambda: Written(_pooled, a=nn.Linear(2, 8), b=nn.Conv1d(2, 2, 3, padding=1), head=nn.Linear(4, 3)),
    "windows": lambda: Written(
        lambda x, a, head: head(F.max_pool1d(a(x).unsqueeze(1), 3, 1, 1).squeeze(1)),
        a=nn.Linear(2, 5), head=nn.Linear(5, 3),
    ),
    "liresnet": lambda: Written(
        _liresnet, a=nn.Linear(2, 8), b=nn.Conv2d(2, 2, 3, padding=1), c=nn.Conv2d(2, 2, 3, padding=1),
        head=nn.Linear(8, 3),
    ),
    "tied": lambda: Written(_tied, a=nn.Linear(2, 5), b=nn.Linear(5, 5), head=nn.Linear(5, 3)),
    "normalised": lambda: Written(
        _normalised, a=nn.Linear(2, 8), block=nn.Sequential(BasicBlock(2, 2, 1), BasicBlock(2, 3, 2)),
        head=nn.Linear(3, 3),
    ),
    "moved": lambda: Written(
        _moved, a=nn.Linear(2, 4), up=nn.ConvTranspose2d(2, 1, 2, stride=2),
        round_=nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), head=nn.Linear(8, 3),
    ),
    "clipped": lambda: Written(
        _clipped, a=nn.Linear(2, 6), b=nn.Linear(6, 6), relu=ClippedReLU(6, 0.5), act=ClippedMaxMin(3, 0.4, -0.1),
        head=nn.Linear(6, 3),
    ),
    "ends in an activation": lambda: nn.Sequential(nn.Linear(2, 7), nn.ReLU(), nn.Linear(7, 3), nn.PReLU(3)),
    "one output": lambda: Written(
        lambda x, a, b, head: head(F.relu6(a(x)) + b(x)), a=nn.Linear(2, 7), b=nn.Linear(2, 7), head=nn.Linear(7, 1)
    ),
}  # fmt: skip
SMALL = {name: Case(made, (2,)) for name, made in PROGRAMS.items()}


def with_rational_roots(model: nn.Module) -> nn.Module:
    """Each variance near to what it was, and with `eps` the square of a multiple of 1/64."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            variance = module.running_var
            assert variance is not None
            roots = (variance.sqrt() * 64).round().clamp_min(2) / 64
            module.eps = 2.0**-12
            variance.copy_(roots.square() - module.eps)
    return model


def build(name: str, seed: int = 0, of: dict[str, Case] = CASES) -> tuple[nn.Module, Tensor]:
    """A network in float64 and eval mode, with statistics and biases that are not all alike, and six inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = of[name].build().double()
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
    return model.eval(), torch.rand(6, *of[name].sizes, generator=g, dtype=torch.float64)
