"""A bound is about the function that `model(x)` computes, whatever the model is made of, or there is an error."""

from __future__ import annotations

import pytest
import torch
from helpers import generator
from torch import Tensor, nn

import locallip_cuda as ll
from locallip_cuda import attack

GUARANTEES = ["estimate", "probabilistic", "deterministic"]
every_guarantee = pytest.mark.parametrize("guarantee", GUARANTEES)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def linear(seed: int, inputs: int, outputs: int, scale: float = 1.0) -> nn.Linear:
    """A Linear layer in float64 with weights near an orthogonal map's size."""
    layer = nn.Linear(inputs, outputs).double()
    with torch.no_grad():
        layer.weight.copy_(normal(seed, outputs, inputs) * scale / inputs**0.5)
        layer.bias.copy_(0.3 * normal(seed + 1, outputs))
    return layer


def assert_certificates_hold(model: nn.Module, x: Tensor, eps: float, guarantee: str) -> int:
    """The logits are `model(x)`'s and no attack on `model` breaks what is certified. How many samples are."""
    with torch.no_grad():
        clean = model(x.clone())
    bounds = ll.local_bounds(model, x, eps, iterations=100, guarantee=guarantee)
    torch.testing.assert_close(bounds.logits.detach().double(), clean.double(), rtol=1e-5, atol=1e-5)
    certificate = ll.certify(model, x, eps, guarantee=guarantee)
    held = certificate.certified
    assert torch.equal(certificate.prediction[held], clean.argmax(1)[held])
    for step_size in (eps / 2, eps / 10):
        g = torch.Generator().manual_seed(0)
        points = attack.pgd(model, x, certificate.prediction, eps, steps=30, step_size=step_size, generator=g)
        with torch.no_grad():
            answers = model(points.clone()).argmax(1)
        assert torch.equal(answers[held], certificate.prediction[held]), "a certified sample falls"
    return int(held.sum())


# --- modules used more than once ----------------------------------------------------------------------------------------


@every_guarantee
def test_a_linear_layer_used_twice(guarantee: str) -> None:
    shared = linear(0, 6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), linear(2, 6, 3))
    assert ll.local_bounds(model, normal(9, 4, 6), 0.1, guarantee=guarantee).layer_norms.shape == (4, 2)
    assert 0 < assert_certificates_hold(model, normal(9, 64, 6), 0.05, guarantee) < 64


@every_guarantee
def test_an_activation_used_twice(guarantee: str) -> None:
    activation = nn.ReLU()
    model = nn.Sequential(linear(0, 6, 9), activation, linear(2, 9, 7), activation, linear(4, 7, 3))
    assert 0 < assert_certificates_hold(model, normal(9, 64, 6), 0.1, guarantee) < 64


def test_a_container_used_twice_and_gradients_of_shared_weights() -> None:
    block = nn.Sequential(linear(0, 5, 5), nn.ReLU())
    model = nn.Sequential(block, block, nn.Sequential(block, linear(2, 5, 3)))
    b = ll.local_bounds(model, normal(9, 3, 5), 0.1, iterations=50)
    assert b.layer_norms.shape == (3, 3)
    (shared,) = torch.autograd.grad(b.lipschitz.sum(), block[0].weight)
    copies = [nn.Sequential(linear(0, 5, 5), nn.ReLU()) for _ in range(3)]
    apart = nn.Sequential(*copies, linear(2, 5, 3))
    b = ll.local_bounds(apart, normal(9, 3, 5), 0.1, iterations=50)
    grads = torch.autograd.grad(b.lipschitz.sum(), [copy[0].weight for copy in copies])
    torch.testing.assert_close(shared, sum(grads))
