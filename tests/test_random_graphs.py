"""Random small graphs: estimates below proofs, proofs against sampling, and proved norms against singular values."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from helpers import generator
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_linear_bound import true_norms
from torch import Tensor, nn

import locallip_cuda as ll

SIDE = 4
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "abs": torch.abs,
    "tanh": torch.tanh,
    "hardtanh": lambda x: F.hardtanh(x, -0.3, 0.5),
    "clamp": lambda x: x.clamp(min=-0.2),
    "maxmin": ll.nn.maxmin,
    "max pool": lambda x: F.max_pool2d(x, 3, 1, 1),
    "max pool of pairs": lambda x: F.max_pool2d(x, (1, 2), (1, 1), (0, 1))[..., :SIDE],
}
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda x: x.flip(3),
    "channels": lambda x: torch.cat([x[:, 1:], x[:, :1]], 1),
    "transpose": lambda x: x.transpose(2, 3),
    "scale": lambda x: -1.5 * x + 0.1,
    "average": lambda x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2),
    "circular": lambda x: F.pad(x, (1, 1, 1, 1), mode="circular")[..., 1:-1, :-2],
    "part": lambda x: F.pad(x[:, :, 1:], (0, 0, 1, 0)),
}


class RandomGraph(nn.Module):
    """Steps of ("conv", of, kernel, groups), ("act" or "move", of, name), ("sum", a, b, sign) and ("cat", a, b), of
    values with two channels; each reads values by number, the input being 0, and the last three are put together."""

    def __init__(self, steps: list[tuple[object, ...]], seed: int) -> None:
        super().__init__()
        self.steps = steps
        g = generator(seed)

        def conv(outputs: int, inputs: int, kernel: int, groups: int = 1) -> nn.Conv2d:
            made = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups).double()
            with torch.no_grad():
                for p in made.parameters():
                    p.copy_(torch.randn(p.shape, generator=g) * 0.5)
            return made

        self.convs = nn.ModuleDict()
        for i, (kind, *rest) in enumerate(steps):
            if kind == "conv":
                self.convs[str(i)] = conv(2, 2, int(rest[1]), int(rest[2]))  # type: ignore[call-overload]
            elif kind == "cat":
                self.convs[str(i)] = conv(2, 4, 1)
        self.head = nn.Linear(2 * SIDE * SIDE, 3).double()
        with torch.no_grad():
            for p in self.head.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for i, (kind, *rest) in enumerate(self.steps):
            a = values[rest[0] % len(values)]  # type: ignore[operator]
            if kind == "conv":
                values.append(self.convs[str(i)](a))
            elif kind == "act":
                values.append(ACTIVATIONS[str(rest[1])](a))
            elif kind == "move":
                values.append(MOVES[str(rest[1])](a))
            else:
                b = values[rest[1] % len(values)]  # type: ignore[operator]
                if kind == "cat":
                    values.append(self.convs[str(i)](torch.cat([a, b], 1)))
                else:
                    values.append(a + b if rest[2] else torch.sub(a, b, alpha=0.5))
        return self.head(sum(values[-3:]).flatten(1))  # type: ignore[union-attr]


def graphs(activations: list[str]) -> st.SearchStrategy[list[tuple[object, ...]]]:
    numbers = st.integers(0, 6)
    steps = st.one_of(
        st.tuples(st.just("conv"), numbers, st.sampled_from([1, 3]), st.sampled_from([1, 2])),
        st.tuples(st.just("act"), numbers, st.sampled_from(activations)),
        st.tuples(st.just("act"), numbers, st.just("relu")),
        st.tuples(st.just("move"), numbers, st.sampled_from(sorted(MOVES))),
        st.tuples(st.just("sum"), numbers, numbers, st.booleans()),
        st.tuples(st.just("cat"), numbers, numbers),
    )
    return st.lists(steps, min_size=2, max_size=7)


def points(x: Tensor, eps: float, count: int, seed: int) -> list[Tensor]:
    g = generator(seed)
    found = []
    for _ in range(count):
        step = torch.randn(x.shape, generator=g, dtype=torch.float64)
        length = step.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        found.append(x + eps * step / length)
    return found


@settings(max_examples=60, deadline=None)
@given(
    graphs(sorted(ACTIVATIONS)), st.integers(0, 99), st.sampled_from([0.02, 0.3]), st.sampled_from(["local", "global"])
)
@example([("conv", 0, 3, 1), ("act", 0, "relu"), ("act", 0, "relu"), ("act", 1, "relu")], 0, 0.3, "global")
def test_random_graphs(steps: list[tuple[object, ...]], seed: int, eps: float, radius: str) -> None:
    model = RandomGraph(steps, seed).eval().requires_grad_(False)
    x = torch.rand(3, 2, SIDE, SIDE, generator=generator(seed), dtype=torch.float64)
    estimate = ll.local_bounds(model, x, eps, iterations=60, radius=radius)  # type: ignore[arg-type]
    proof = ll.local_bounds(model, x, eps, guarantee="deterministic", radius=radius)  # type: ignore[arg-type]
    torch.testing.assert_close(estimate.logits, model(x), rtol=1e-9, atol=1e-9)
    if radius == "local":  # by the paper's, a ball takes the whole kernel at an image's border in the estimate alone
        assert (estimate.radius <= proof.radius * (1 + 1e-9)).all()
        assert (estimate.lipschitz <= proof.lipschitz * (1 + 1e-9)).all()
        assert (estimate.margin() >= proof.margin() - 1e-9).all()
        assert (proof.lower <= estimate.lower + 1e-9).all() and (proof.upper >= estimate.upper - 1e-9).all()
    for layer in proof.layers:
        true = true_norms(layer.linear, layer.row_mask, layer.input_mask)
        assert (layer.norm >= true * (1 - 1e-14)).all()
        assert (layer.norm <= true * (1 + 1e-5) + 1e-12).all()
    whole = ll.global_bounds(model, x, eps, guarantee="deterministic", window=2)
    first, second = whole.logits.topk(2).values.unbind(1)
    room = first - second - whole.margin()
    composed = ll.local_bounds(model, x, eps, guarantee="deterministic", window=2)
    assert (composed.margin() >= whole.margin() - 1e-5 * room - 1e-9).all()
    prediction = proof.logits.argmax(1)
    most = whole.worst_logits(prediction)
    gains = proof.worst_logits(prediction) - proof.logits.gather(1, prediction.unsqueeze(1))
    for point in points(x, eps, 20, seed):
        features = ll.global_bounds(model, point, 0.0, iterations=0).features
        moved = (features - proof.features).norm(dim=1)
        assert (moved <= proof.radius * (1 + 1e-9) + 1e-12).all(), "the features leave their radius"
        assert (features >= proof.lower - 1e-9).all() and (features <= proof.upper + 1e-9).all(), "or their box"
        logits = model(point)
        own = logits.gather(1, prediction.unsqueeze(1))
        assert (logits - own <= gains + 1e-9).all(), "a logit gains more than its bound"
        gained = whole.logits.gather(1, prediction.unsqueeze(1))
        assert (logits - own <= most - gained + 1e-9).all(), "or than its global one"
