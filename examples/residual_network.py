"""Why a block x + conv(x) has one norm: the skip is folded into the convolution before the norm is taken."""

import torch
from torch import Tensor, nn

import locallip_cuda as ll


class Residual(nn.Module):
    """Blocks x + conv(x) with MaxMin behind each: linear between two activations."""

    def __init__(self, channels: int = 8, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1) for _ in range(blocks)])
        self.head = nn.Linear(channels * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = ll.nn.maxmin(self.stem(x))
        for conv in self.blocks:
            x = ll.nn.maxmin(x + conv(x))
        return self.head(x.flatten(1))


def main() -> tuple[float, float]:
    """The product of the norms of the operators that the blocks are, and that of one and their convolutions' norms."""
    torch.manual_seed(0)
    model, x = Residual(), torch.rand(4, 1, 8, 8)
    bounds = ll.local_bounds(model, x, eps=0.1, iterations=50)
    for layer in bounds.layers:
        print(f"{layer.path:10} norms {', '.join(f'{norm:.3f}' for norm in layer.norm.tolist())}")
    apart = 1.0
    for conv in model.blocks:
        norm = ll.masked_norm(conv.weight.detach(), input_size=(8, 8, 8), padding=1, iterations=50)
        apart *= 1 + float(norm)
    return float(bounds.layer_norms[0, 1:].prod()), apart


if __name__ == "__main__":
    together, apart = main()
    print(f"product over the blocks: {together:.3f}; with 1 + ||W|| for each: {apart:.3f}")
