"""Networks as users write them, under all guarantees: what the pass computes, what it claims, and its gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from networks import CASES, ResNet18, build
from test_soundness import judge_everything
from torch import Tensor, nn

import locallip_cuda as ll

GUARANTEES = ["estimate", "probabilistic", "deterministic"]
EPS = {"resnet-18": 0.02}
every_network = pytest.mark.parametrize("name", CASES)


def objective(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    b = ll.local_bounds(model, x, eps)
    if b.logits.shape[1] == 1:
        return b.logits.square().mean() + b.radius.mean() + (b.upper - b.lower).square().mean()
    return ll.losses.robust_cross_entropy(b, y) + 0.1 * b.radius.mean() + 0.1 * b.sparsity_loss


def trained(name: str) -> tuple[nn.Module, Tensor]:
    model, x = build(name)
    return briefly_trained(model, x), x


def briefly_trained(model: nn.Module, x: Tensor, steps: int = 8) -> nn.Module:
    """A few steps on a few inputs, for their bounds."""
    y = torch.arange(len(x)) % model(x).shape[1]
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        objective(model, x, y, 0.02).backward()
        optimiser.step()
        ll.nn.project_thresholds_(model)
    for module in model.modules():
        if isinstance(module, nn.PReLU):  # slopes that training took out of [0, 1] have no bound
            module.weight.data.clamp_(0, 1)
    return model


@every_network
@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_the_pass_computes_what_the_model_computes(name: str, guarantee: str) -> None:
    for model, x in (build(name), trained(name)):
        b = ll.local_bounds(model, x, 0.1, guarantee=guarantee)
        with torch.no_grad():
            torch.testing.assert_close(b.logits, model(x), rtol=1e-10, atol=1e-10)


@every_network
@pytest.mark.parametrize("state", ["random", "trained"])
def test_nothing_leaves_its_radius_box_or_margin(name: str, state: str) -> None:
    """Points drawn in the ball, and ascents, against the estimate and both proofs, by both radii."""
    model, x = build(name) if state == "random" else trained(name)
    eps = torch.full((4,), EPS.get(name, 0.15), dtype=torch.float64)
    judge = judge_everything(model.requires_grad_(False), x[:4], eps, steps=6, units=2, count=30)
    assert judge.points > 40 and (judge.reached_radius > 0.02 or name == "resnet-18")  # 20 norms in a row


@every_network
def test_gradients_reach_every_parameter(name: str) -> None:
    model, x = build(name)
    y = torch.arange(len(x)) % 4
    wanted = dict(model.named_parameters())
    found = torch.autograd.grad(objective(model, x, y, 0.05), list(wanted.values()), allow_unused=True)
    for path, gradient in zip(wanted, found, strict=True):
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), path


@pytest.mark.parametrize("name", ["liresnet", "densenet", "u-net", "vgg"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """Along a random direction in all parameters, of norms that have converged."""
    model, x = build(name)
    y = torch.arange(len(x)) % 4

    def loss() -> Tensor:
        b = ll.local_bounds(model, x, 0.05, iterations=100)
        return ll.losses.robust_cross_entropy(b, y) + b.radius.mean()

    wanted = list(model.parameters())
    found = torch.autograd.grad(loss(), wanted)
    g = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in wanted]
    slope = sum((a * b).sum() for a, b in zip(found, direction, strict=True))
    step, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(wanted, direction, strict=True):
                p.add_(d, alpha=sign * step)
            values.append(loss())
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), slope.detach(), rtol=2e-4, atol=1e-6)


@every_network
def test_the_state_of_a_training_fits(name: str) -> None:
    """Kept norms of every network: below the converged ones, near them, and the same number in a state dict."""
    model, x = build(name)
    y = torch.zeros(len(x), dtype=torch.int64)
    norms = ll.TrainingNorms(model, x)
    for step in range(4):
        b = ll.local_bounds(model, x, 0.05, norms=norms, y=y)
        if step == 2:
            norms.control(b, y)
    assert b.closeness.shape == (len(x), len(norms.iterations))
    assert b.closeness.mean() > 0.95
    whole = ll.global_bounds(model, x, 0.05)
    assert (b.radius <= whole.radius * 1.1).all()
    again = ll.TrainingNorms(copy.deepcopy(model), x)
    again.load_state_dict(norms.state_dict())
    assert again.iterations == norms.iterations


@every_network
def test_no_values_are_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate and its gradient on the meta device, which has none: on a GPU nothing waits for them."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _=None: False)  # which does not know the device
    model, x = build(name)
    model, x = model.to("meta"), x.to("meta")
    b = ll.local_bounds(model, x, 0.1)
    loss = b.radius.sum() + b.upper.sum() + b.logits.sum()
    if b.logits.shape[1] > 1:
        loss = loss + b.worst_logits(torch.zeros(len(x), dtype=torch.int64, device="meta")).sum()
    loss.backward()
    assert b.radius.is_meta and all(p.grad is not None and p.grad.is_meta for p in model.parameters())


def test_resnet_18_of_cifar_size() -> None:
    """Its 20 convolutions with their BatchNorms, skips and downsampling, on images of 32 x 32."""
    torch.manual_seed(0)
    model = ResNet18(8, 3, 10).eval()
    x = torch.rand(2, 3, 32, 32)
    b = ll.local_bounds(model, x, 0.01, iterations=2)
    assert len(b.layers) == 20 and b.radius.isfinite().all()
    torch.testing.assert_close(b.logits, model(x))
    c = ll.certify(model, x, 1e-8)
    assert c.margin.isfinite().all()


class Skip(nn.Module):
    def __init__(self, inner: nn.Module, **more: Any) -> None:
        super().__init__()
        self.inner = inner
        self.relu = nn.ReLU()
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(x + self.inner(x)).flatten(1))


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_folded_operators_have_the_norm_of_what_they_are(guarantee: str) -> None:
    """Not 1 + ||W||, nor the product of a convolution's norm and a BatchNorm's."""
    g = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(2, 2, 3, padding=1).double()
    norm = nn.BatchNorm2d(2).double().eval()
    with torch.no_grad():
        conv.weight.copy_(torch.randn(conv.weight.shape, generator=g) * 0.2)
        norm.weight.copy_(torch.tensor([0.3, 2.0]))
        norm.running_var.copy_(torch.tensor([0.1, 3.0]))  # type: ignore[union-attr]
    x = torch.rand(2, 2, 4, 4, generator=g, dtype=torch.float64)
    units = torch.eye(32, dtype=torch.float64).view(32, 2, 4, 4)
    for parts in ([conv], [conv, norm], [norm, conv]):
        inner = nn.Sequential(*copy.deepcopy(parts))
        model = Skip(inner).double().eval()
        with torch.no_grad():
            inner[-1].bias.fill_(100.0)  # type: ignore[union-attr, operator]
            zero = units[:1] * 0
            matrix = ((units + inner(units)) - (zero + inner(zero))).flatten(1).T
        b = ll.local_bounds(model, x, 0.1, guarantee=guarantee, iterations=100)
        assert b.row_masks[0].all() and len(b.layers) == 1, "nothing goes, so that the norm is that of the sum"
        tolerance = 2e-3 if guarantee == "probabilistic" else 1e-6
        expected = torch.linalg.matrix_norm(matrix, 2).expand(2)
        torch.testing.assert_close(b.layer_norms[:, 0], expected, rtol=tolerance, atol=0)
        alone = torch.linalg.matrix_norm((inner(units) - inner(zero)).flatten(1).T, 2).detach()
        assert (expected < 1 + alone - 1e-3).all()
