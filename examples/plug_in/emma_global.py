"""LiResNet with the EMMA loss (Hu, Zou, Wang, Leino, Fredrikson, NeurIPS 2023, arXiv:2301.12549) on digits."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallip_cuda.experiments import data
from locallip_cuda.nn import MaxMin

EPS = 0.3


class Block(nn.Conv2d):
    """x + conv(x), linear."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def norm(operator: Callable[[Tensor], Tensor], vectors: list[Tensor], k: int) -> Tensor:
    """Of a linear map, by power iteration that goes on from step to step."""
    for _ in range(5):
        v = vectors[k].requires_grad_()
        vectors[k] = F.normalize(torch.autograd.grad(operator(v).square().sum(), v)[0].flatten(), dim=0).view_as(v)
    return operator(vectors[k]).norm()


def gains(model: nn.Sequential, x: Tensor, y: Tensor, eps: float, norms: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, K) logits, and what each can gain on logit y within eps."""
    logits, lipschitz = model(x), torch.ones(())
    for k, conv in enumerate(layer for layer in model if isinstance(layer, nn.Conv2d)):
        lipschitz = lipschitz * norm(lambda v, conv=conv: conv(v) - conv(torch.zeros_like(v)), norms, k)
    weight = model[-1].weight
    return logits, eps * lipschitz * (weight[y].unsqueeze(1) - weight).norm(dim=2)


def emma(logits: Tensor, gains: Tensor, y: Tensor) -> Tensor:
    """Cross entropy with each rival raised at most until it is level with logit y."""
    margins = logits.gather(1, y.unsqueeze(1)) - logits
    share = (margins / gains).detach().clamp(0, 1).nan_to_num(0)  # 0 / 0 at y itself
    return F.cross_entropy(logits + share * gains, y)


def main(steps: int = 200) -> float:
    """The share of the test images for which no rival reaches the right class, by the bound of training."""
    torch.manual_seed(0)
    x, y = (train := data.load("digits", train=True)).batch(torch.arange(len(train)))
    stem, blocks = nn.Conv2d(1, 8, 2, stride=2), [Block(8, 8, 3, padding=1) for _ in range(2)]
    model = nn.Sequential(stem, MaxMin(), blocks[0], MaxMin(), blocks[1], MaxMin(), nn.Flatten(), nn.Linear(128, 10))
    norms = [torch.randn(1, 1, 8, 8), torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)]
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(steps):
        batch = torch.randint(len(x), (64,))
        eps = EPS * min(1.0, 2 * step / steps)
        loss = emma(*gains(model, x[batch], y[batch], eps, norms), y[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, y = (test := data.load("digits", train=False)).batch(torch.arange(len(test)))
    logits, rise = gains(model, x, y, EPS, norms)
    return float(((logits + rise).argmax(1) == y).float().mean())


if __name__ == "__main__":
    print(f"certified (estimate) at l2 radius {EPS}: {main():.1%}")
