"""GloRo training (Leino, Wang, Fredrikson, ICML 2021, arXiv:2102.08452) on digits."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import locallip_cuda as ll
from locallip_cuda.experiments import data

EPS = 0.3


def with_bottom(model: nn.Sequential, x: Tensor, y: Tensor, eps: float, norms: ll.TrainingNorms) -> Tensor:
    """(B, K + 1) logits, and the one of the class 'not certified': the most that a rival can reach."""
    bounds = ll.local_bounds(model, x, eps, norms=norms, y=y)
    logits = bounds.logits
    chosen = logits.argmax(1)
    worst = bounds.worst_logits(chosen)
    return torch.cat([logits, worst.scatter(1, chosen.unsqueeze(1), -math.inf).amax(1, keepdim=True)], 1)


def main(steps: int = 400) -> float:
    """The share of the test images for which no rival reaches the right class, by the bound of training."""
    torch.manual_seed(0)
    x, y = (train := data.load("digits", train=True)).batch(torch.arange(len(train)))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    norms = ll.TrainingNorms(model, x)
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
