"""The proved global bound: against singular values, against the local one, where it is tight, and with kept norms.

Points in the ball are put to it by test_soundness.py, test_networks.py and test_random_graphs.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import ZOO, generator, small_network, zoo_input
from networks import build
from torch import Tensor, nn

import locallip_cuda as ll
from locallip_cuda.norms.linear import Convolution, Dense, same
from locallip_cuda.propagation import proof as proved
from locallip_cuda.propagation.recursion import ChainBound

PROOFS = ["probabilistic", "deterministic"]
every_proof = pytest.mark.parametrize("guarantee", PROOFS)
WIDTH = {"probabilistic": 1e-3, "deterministic": 1e-5}
LOCAL_WIDTH = {"probabilistic": 0.02, "deterministic": 1e-5}
SEVERAL = ["vgg", "liresnet", "circular", "ends in an activation"]
NETWORKS = ["convolutional, relu", "dense, clipped-maxmin", "normalised, pooled, grouped", "linear twice", "dense, ELU"]


def true_norm(record: ChainBound) -> Tensor:
    return torch.linalg.svdvals(record.linear.of_samples(torch.tensor([0])).dense())[0]


@every_proof
@pytest.mark.parametrize("name", NETWORKS)
def test_against_singular_values(name: str, guarantee: str) -> None:
    """Norms of maps and of chains, their product, and the margin that they come to."""
    model, x = ZOO[name][0], zoo_input(name, 4)
    eps = torch.tensor([0.0, 0.01, 0.1, 1.0], dtype=torch.float64)
    plain = ll.global_bounds(model, x, eps, guarantee=guarantee)
    b = ll.global_bounds(model, x, eps, guarantee=guarantee, window=math.inf)
    for record in (*plain.layers, *b.layers, *b.composed):
        true = true_norm(record)
        assert record.norm is not None and record.norm.shape == (4,)
        assert (record.norm >= true * (1 - 1e-14)).all() and (record.norm <= true * (1 + WIDTH[guarantee])).all()
    lipschitz = math.prod(float(true_norm(record)) for record in plain.layers)
    assert (plain.lipschitz >= lipschitz * (1 - 1e-14)).all()
    assert (plain.lipschitz <= lipschitz * (1 + WIDTH[guarantee])).all()
    with torch.no_grad():
        logits = model(x)
    y, weight = logits.argmax(1), plain.last_weight
    gain = (eps * lipschitz).unsqueeze(1) * (weight - weight[y].unsqueeze(1)).norm(dim=2)
    excess = logits - logits.gather(1, y.unsqueeze(1)) + gain
    margin = -excess.scatter(1, y.unsqueeze(1), -math.inf).amax(1)
    assert (plain.margin(y) <= margin + 1e-12).all()
    assert (plain.margin(y) >= margin - WIDTH[guarantee] * gain.amax(1) - 1e-9).all()
    assert (b.margin(y) >= plain.margin(y) - WIDTH[guarantee] * gain.amax(1)).all()
    assert plain.margin().dtype == torch.float64 and not plain.margin().requires_grad
    assert isinstance(plain, ll.ProvedBounds) and plain.failure_probability == {"deterministic": 0}.get(guarantee, 1e-9)


@every_proof
@pytest.mark.parametrize("window", [1, 2, math.inf])
def test_the_local_bound_is_never_above(
    guarantee: str, window: float, trained: Callable[[str], nn.Sequential], digits: tuple[Tensor, Tensor]
) -> None:
    """But for the width of proofs; nor is a proof below the estimate of the same bound."""
    networks = [(trained("clipped-relu"), digits[0][:6]), *(build(name) for name in SEVERAL)]
    for model, x in networks:
        model = model.eval()
        whole = ll.global_bounds(model, x, 0.05, guarantee=guarantee, window=window)
        own = ll.local_bounds(model, x, 0.05, guarantee=guarantee, window=window)
        estimate = ll.global_bounds(model, x, 0.05, iterations=100, window=window)
        assert (own.lipschitz <= whole.lipschitz * (1 + LOCAL_WIDTH[guarantee])).all()
        assert (own.radius <= whole.radius * (1 + LOCAL_WIDTH[guarantee])).all()
        first, second = whole.logits.topk(2).values.unbind(1)
        room = first - second - whole.margin()
        assert (own.margin() >= whole.margin() - LOCAL_WIDTH[guarantee] * room).all()
        assert (whole.margin() <= estimate.margin() + 1e-9).all()
        assert (whole.lipschitz >= estimate.lipschitz * (1 - 1e-9)).all()
        assert (whole.margin() >= estimate.margin() - WIDTH[guarantee] * room).all()


@every_proof
@pytest.mark.parametrize("window", [1, math.inf])
def test_where_it_is_tight(guarantee: str, window: float) -> None:
    """Multiples of rotations, every unit active: the margin is known exactly, and attained."""
    turn = torch.tensor([[3.0, 4.0], [-4.0, 3.0]], dtype=torch.float64)  # 5 times a rotation
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(2, 2).double(), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(2, 2).double())
    x, eps = torch.tensor([[0.5, 0.25], [-0.5, 1.0]], dtype=torch.float64), 0.125
    with torch.no_grad():
        for k, layer in enumerate(layers[::2]):
            layer.weight.copy_(turn)
            layer.bias.fill_(2.0 ** (8 + 4 * k))
        model[-1].weight.copy_(torch.tensor([[0.0, 0.0], [6.0, 8.0]]))
        model[-1].bias.zero_()
        logits = model(x)  # every number on the way has few bits
        gap = logits[:, 1] - logits[:, 0]
        b = ll.global_bounds(model, x, eps, guarantee=guarantee, window=window)
        least = gap - eps * 5**3 * 10
        assert (b.margin(torch.ones(2, dtype=torch.int64)) <= least).all()
        assert (b.margin(torch.ones(2, dtype=torch.int64)) >= least - WIDTH[guarantee] * eps * 5**3 * 10).all()
        direction = torch.tensor([6.0, 8.0], dtype=torch.float64)
        for layer in layers[::2]:
            direction = direction @ layer.weight
        worst = model(x - eps * direction / direction.norm())
    torch.testing.assert_close(worst[:, 1] - worst[:, 0], least, rtol=1e-13, atol=0)


def test_functions_that_are_known_by_their_constant() -> None:
    """They have no box: the error of the clean values grows with what is in front of it."""
    model, x = small_network("relu"), torch.rand(3, 2, 6, 6, generator=generator(3), dtype=torch.float64)
    constant = nn.Sequential(*model[:2], nn.GELU(), *model[2:])
    b = ll.global_bounds(constant, x, 0.1, guarantee="deterministic")
    local = ll.local_bounds(constant, x, 0.1, guarantee="deterministic")
    torch.testing.assert_close(b.logits, constant(x).detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(b.feature_error, local.feature_error) and (b.margin() <= local.margin()).all()


@pytest.fixture
def norms_taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    taken: list[str] = []
    single, chain = proved.term_norm, proved.proved_chain_norm

    def counted(function: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
        def count(*arguments: Any) -> Tensor:
            taken.append(name)
            return function(*arguments)

        return count

    monkeypatch.setattr(proved, "term_norm", counted(single, "map"))
    monkeypatch.setattr(proved, "proved_chain_norm", counted(chain, "chain"))
    return taken


@every_proof
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kept_norms(guarantee: str, dtype: torch.dtype, norms_taken: list[str]) -> None:
    """Taken once for a network, and anew for what is another one, be it by one weight that was changed in place."""
    model, kept = small_network("clipped-relu", dtype=dtype), ll.ProvedNorms()
    x = torch.rand(5, 2, 6, 6, generator=generator(2)).to(dtype)

    def bound(**more: Any) -> ll.LocalBounds:
        norms_taken.clear()
        return ll.global_bounds(model, x, 0.1, guarantee=guarantee, norms=kept, **more)

    first = bound(window=2)
    assert norms_taken.count("map") == 3 and norms_taken.count("chain") == 2
    second = bound(window=2)
    assert not norms_taken and torch.equal(first.margin(), second.margin())
    fresh = ll.global_bounds(model, x[:2], 0.1, guarantee=guarantee, window=2)
    torch.testing.assert_close(second.margin()[:2], fresh.margin(), rtol=0, atol=0.02)
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] += 2.0
    changed = bound(window=2)
    assert norms_taken.count("map") == 1 and norms_taken.count("chain") == 2
    assert (changed.lipschitz > second.lipschitz * 1.01).all()
    model[2].stride = (1, 1)
    model[2].padding, model[2].dilation = (1, 1), (2, 2)  # 4 x 4 pixels
    model[5] = nn.Linear(96, 16).to(dtype)
    model[3] = nn.ReLU()
    bound(window=2)
    assert norms_taken.count("map") == 2 and norms_taken.count("chain") == 2
    bound(window=2)
    assert not norms_taken
    if guarantee == "probabilistic":
        for more in ({"failure_probability": 1e-12}, {"seed": 3}, {"seed": 4}):
            found = bound(window=2, **more)
            assert len(norms_taken) == 5
            assert isinstance(found, ll.ProvedBounds)
            assert found.failure_probability == (1 if "seed" in more else 1e-12)


def test_what_is_the_same_map() -> None:
    weight = torch.randn(4, 2, 3, 3, generator=generator(0))
    first = Convolution(weight, [2, 6, 6], [1, 1], [1, 1], [1, 1], 1)
    assert same(first, first.snapshot())
    assert not same(first, Convolution(weight, [2, 6, 6], [2, 2], [1, 1], [1, 1], 1))
    assert not same(first, Convolution(weight, [2, 6, 6], [1, 1], [2, 2], [1, 1], 1))
    assert not same(first, Convolution(weight, [2, 6, 7], [1, 1], [1, 1], [1, 1], 1))
    assert not same(first, Convolution(weight, [2, 6, 6], [1, 1], [1, 1], [1, 1], 1, roundings=1))
    assert not same(first, first.with_weights(lambda w: w.double()))
    assert not same(Dense(weight[0, 0]), Dense(weight[0, 0].nextafter(torch.ones(1))))
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.ReLU(), nn.Linear(12, 2)).double()
    x = torch.rand(2, 2, 4, 4, dtype=torch.float64)
    maps = [ll.local_bounds(model, x, 0.1).layers[0].linear for _ in range(2)]
    assert same(*maps)


def test_arguments() -> None:
    model, x = small_network("relu"), torch.rand(2, 2, 6, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="norms: got ProvedNorms under guarantee 'estimate'"):
        ll.global_bounds(model, x, 0.1, norms=ll.ProvedNorms())
    with pytest.raises(ValueError, match="norms: got some under guarantee 'deterministic', want None"):
        ll.global_bounds(model, x, 0.1, guarantee="deterministic", norms=ll.TrainingNorms(model, x))
    with pytest.raises(ValueError, match="guarantee: got 'sure'"):
        ll.global_bounds(model, x, 0.1, guarantee="sure")
    with pytest.raises(ll.UnsupportedModuleError, match="has no proof"):
        ll.global_bounds(nn.Sequential(*model[:1], nn.Softplus(), *model[2:]), x, 0.1, guarantee="deterministic")
    empty = ll.global_bounds(model, x[:0], 0.1, guarantee="probabilistic", window=2)
    assert empty.margin().shape == (0,)
    seeded = [ll.global_bounds(model, x, 0.1, guarantee="probabilistic", seed=1) for _ in range(2)]
    assert torch.equal(seeded[0].margin(), seeded[1].margin())
    assert isinstance(seeded[0], ll.ProvedBounds) and seeded[0].failure_probability == 1
    moved = copy.deepcopy(model)
    b = ll.global_bounds(moved, x, 0.1, guarantee="deterministic", window=2)
    margin = b.margin().clone()
    with torch.no_grad():
        moved[-1].weight.mul_(2)
        moved[0].weight.mul_(2)
    assert torch.equal(b.margin(), margin)
