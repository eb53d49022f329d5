"""A layer of which only its Lipschitz constant is known, given a rule in three lines, tried, and certified through."""

import torch
from torch import Tensor, nn

import locallip_cuda as ll


class Block(nn.Module):
    """A layer of constant 1 for any weight (Araujo, Havens, Delattre, Allauzen, Hu, ICLR 2023)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight.T @ self.weight).abs().sum(1)
        return x - 2 * (torch.relu(x @ self.weight + self.bias) / scale) @ self.weight.T


@ll.rule(Block)
def _(at: ll.rules.Site, module: Block) -> ll.rules.Lipschitz:
    return ll.rules.Lipschitz(module, 1.0, error=1e-12)


def main() -> torch.Tensor:
    """(B,) margins over the ball, proved."""
    torch.manual_seed(0)
    ll.testing.check_rule(Block(16), (16,))
    model = nn.Sequential(nn.Linear(8, 16), Block(16), Block(16), nn.Linear(16, 3))
    return ll.certify(model, torch.randn(5, 8), eps=0.01, guarantee="deterministic").margin


if __name__ == "__main__":
    print("proved margins:", ", ".join(f"{margin:.3f}" for margin in main().tolist()))
