"""GloRo training (Leino, Wang, Fredrikson, ICML 2021, arXiv:2102.08452) on digits."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallip_cuda.experiments import data

EPS = 0.3


def lipschitz(model: nn.Sequential, vectors: list[Tensor]) -> Tensor:
    """The product of the norms of all layers but the last, by power iteration that goes on from step to step."""
    product = torch.ones(())
    for k, layer in enumerate(layer for layer in model[:-1] if isinstance(layer, nn.Linear)):
        for _ in range(5):
            vectors[k] = F.normalize(layer.weight.detach().T @ (layer.weight.detach() @ vectors[k]), dim=0)
        product = product * (layer.weight @ vectors[k]).norm()
    return product


def with_bottom(model: nn.Sequential, x: Tensor, y: Tensor, eps: float, norms: list[Tensor]) -> Tensor:
    """(B, K + 1) logits, and the one of the class 'not certified': the most that a rival can reach."""
    logits = model(x)
    chosen = logits.argmax(1)
    weight = model[-1].weight
    worst = logits + eps * lipschitz(model, norms) * (weight[chosen].unsqueeze(1) - weight).norm(dim=2)
    return torch.cat([logits, worst.scatter(1, chosen.unsqueeze(1), -math.inf).amax(1, keepdim=True)], 1)


def main(steps: int = 400) -> float:
    """The share of the test images for which no rival reaches the right class, by the bound of training."""
    torch.manual_seed(0)
    x, y = (train := data.load("digits", train=True)).batch(torch.arange(len(train)))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    norms = [torch.randn(64), torch.randn(128)]
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(steps):
        batch = torch.randint(len(x), (64,))
        eps = EPS * min(1.0, 2 * step / steps)
        loss = F.cross_entropy(with_bottom(model, x[batch], y[batch], eps, norms), y[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, y = (test := data.load("digits", train=False)).batch(torch.arange(len(test)))
    return float((with_bottom(model, x, y, EPS, norms).argmax(1) == y).float().mean())


if __name__ == "__main__":
    print(f"certified (estimate) at l2 radius {EPS}: {main():.1%}")
