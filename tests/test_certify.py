from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import DEVICES
from torch import Tensor, nn

import locallip_cuda as ll

pytestmark = pytest.mark.parametrize("device", DEVICES)
GUARANTEES = ["estimate", "probabilistic", "deterministic"]
every_guarantee = pytest.mark.parametrize("guarantee", GUARANTEES)
Setting = tuple[nn.Sequential, Tensor]


@pytest.fixture
def setting(device: str, trained: Callable[[str], nn.Sequential], digits: tuple[Tensor, Tensor]) -> Setting:
    return copy.deepcopy(trained("clipped-relu")).to(device), digits[0][:20].to(device)


@every_guarantee
def test_fields(guarantee: str, setting: Setting, device: str) -> None:
    model, x = setting
    seed = 0 if guarantee == "probabilistic" else None
    c = ll.certify(model, x, 0.2, guarantee=guarantee, seed=seed)
    b = ll.local_bounds(model, x, 0.2, iterations=100, guarantee=guarantee, seed=seed)
    assert c.seed == seed and c.failure_probability == (0 if guarantee == "deterministic" else 1)
    if isinstance(b, ll.ProvedBounds):
        assert b.seed == seed and b.failure_probability == c.failure_probability
    assert torch.equal(c.prediction, model(x).argmax(1)) and c.prediction.dtype == torch.int64
    assert c.certified.dtype == torch.bool and torch.equal(c.certified, c.margin > 0)
    torch.testing.assert_close(c.margin, b.margin(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(c.lipschitz, b.lipschitz, rtol=1e-6, atol=0)
    assert 0 < c.certified.sum() < len(x), "some fall at this eps and some do not, or this test checks little"
    assert not c.margin.requires_grad


@pytest.mark.parametrize("guarantee, stated, width", [("probabilistic", 1e-6, 0.1), ("deterministic", 0, 1e-4)])
def test_a_proof_is_a_little_below_the_estimate(
    guarantee: str, stated: float, width: float, setting: Setting, device: str
) -> None:
    model, x = setting
    proof = ll.certify(model, x, 0.2, guarantee=guarantee, failure_probability=1e-6)
    estimate = ll.certify(model, x, 0.2, guarantee="estimate")
    assert proof.guarantee == guarantee and proof.failure_probability == stated
    assert proof.margin.dtype == proof.lipschitz.dtype == torch.float64
    assert (proof.margin < estimate.margin).all() and (proof.lipschitz > estimate.lipschitz * (1 - 1e-9)).all()
    assert (proof.margin > estimate.margin - width * estimate.margin.abs().max()).all()
    assert torch.equal(proof.prediction, estimate.prediction)


def test_the_default_is_a_proof(setting: Setting, device: str) -> None:
    assert ll.certify(*setting, 0.1).guarantee == "probabilistic"
    assert ll.certify(*setting, 0.1).failure_probability == 1e-9


def test_it_says_that_an_estimate_proves_nothing(setting: Setting, device: str) -> None:
    c = ll.certify(*setting, 0.1, guarantee="estimate")
    assert c.guarantee == "estimate" and c.failure_probability == 1
    assert "proves nothing" in " ".join((ll.certify.__doc__ or "").split())


@every_guarantee
def test_eps_per_sample_and_zero(guarantee: str, setting: Setting, device: str) -> None:
    model, x = setting
    eps = torch.linspace(0, 0.5, len(x), dtype=torch.float64, device=device)
    c = ll.certify(model, x, eps, guarantee=guarantee)
    accuracy = {"rtol": 0.05, "atol": 1e-2} if guarantee == "probabilistic" else {"rtol": 1e-5, "atol": 1e-5}
    for i in (0, 7, 19):
        alone = ll.certify(model, x[i : i + 1], float(eps[i]), guarantee=guarantee)
        torch.testing.assert_close(c.margin[i : i + 1], alone.margin, **accuracy)
    assert ll.certify(model, x, 0.0, guarantee=guarantee).certified.all()


def test_margin_shrinks_with_eps(setting: Setting, device: str) -> None:
    margins = torch.stack([ll.certify(*setting, eps, guarantee="estimate").margin for eps in (0.0, 0.1, 0.5)])
    assert (margins[1:] < margins[:-1]).all()


@every_guarantee
def test_ties_are_not_certified(guarantee: str, device: str) -> None:
    """A margin of zero is not above zero."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3)).double().to(device)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    c = ll.certify(model, torch.rand(4, 2, dtype=torch.float64, device=device), 0.0, guarantee=guarantee)
    assert (c.margin <= 0).all() and not c.certified.any()


@every_guarantee
def test_one_output_is_no_classification(guarantee: str, device: str) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double().to(device)
    x = torch.rand(4, 2, dtype=torch.float64, device=device)
    message = "model: got 1 output, want a logit for each of two classes or more; the sign of one"
    with pytest.raises(ValueError, match=message):
        ll.certify(model, x, 1e6, guarantee=guarantee)
    with pytest.raises(ValueError, match=message):
        ll.certified_radius(model, x, max_eps=1.0, guarantee=guarantee)
    b = ll.local_bounds(model, x, 0.1, guarantee=guarantee)
    y = torch.zeros(4, dtype=torch.int64, device=device)
    kinds = ll.losses
    losses = (kinds.robust_cross_entropy, kinds.gloro, kinds.lipschitz_margin, kinds.emma, kinds.crm)
    for use in (b.worst_logits, b.margin, *(partial(loss, b) for loss in losses)):
        with pytest.raises(ValueError, match=message):
            use(y)
    assert b.lipschitz.shape == (4,), "the features of a regression have bounds"


@every_guarantee
def test_the_sign_of_one_output_as_two_classes(guarantee: str, device: str) -> None:
    """As the documentation of certify has it: f is certified where its sign cannot change, and not where it can."""
    hidden, last = nn.Linear(2, 3).double(), nn.Linear(3, 1).double()
    both = nn.Linear(3, 2).double()
    with torch.no_grad():
        hidden.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        hidden.bias.fill_(10)
        last.weight.copy_(torch.tensor([[1.0, 0.0, 0.0]]))
        last.bias.fill_(-10)  # f(x) = x_0 near the origin
        both.weight.copy_(torch.cat([-last.weight, last.weight]))
        both.bias.copy_(torch.cat([-last.bias, last.bias]))
    model = nn.Sequential(hidden, nn.ReLU(), both).to(device)
    x = torch.tensor([[0.5, 0.0], [-0.5, 1.0]], dtype=torch.float64, device=device)
    c = ll.certify(model, x, 0.49, guarantee=guarantee)
    assert c.prediction.tolist() == [1, 0] and c.certified.all()
    assert not ll.certify(model, x, 0.51, guarantee=guarantee).certified.any()
    f = (nn.Sequential(hidden, nn.ReLU(), last.to(device))(x)).squeeze(1)
    torch.testing.assert_close(ll.certify(model, x, 0.0, guarantee=guarantee).margin, 2 * f.abs().detach())


@every_guarantee
def test_empty_batch(guarantee: str, setting: Setting, device: str) -> None:
    model, x = setting
    c = ll.certify(model, x[:0], 0.1, guarantee=guarantee)
    assert c.prediction.shape == c.certified.shape == c.margin.shape == c.lipschitz.shape == (0,)
    assert ll.certified_radius(model, x[:0], max_eps=1.0, guarantee=guarantee).shape == (0,)


def test_certified_radius_is_certified_and_tight(setting: Setting, device: str) -> None:
    model, x = setting
    for tolerance in (0.05, 5e-3):
        radius = ll.certified_radius(model, x, max_eps=0.4, tolerance=tolerance, guarantee="estimate")
        assert radius.shape == (len(x),) and radius.dtype == x.dtype and not radius.requires_grad
        assert ((radius >= 0) & (radius <= 0.4)).all()
        found = radius > 0
        assert ll.certify(model, x, radius, guarantee="estimate").certified[found].all()
        # bisection ends where a radius up to tolerance larger was refused
        beyond = ll.certify(model, x, radius + tolerance, guarantee="estimate").certified
        assert not beyond[radius < 0.4 - tolerance].any()
    assert (radius == 0.4).any() and (radius < 0.4).any()


def test_certified_radius_is_zero_where_nothing_is_certified(setting: Setting, device: str) -> None:
    model, x = setting
    model = copy.deepcopy(model)
    with torch.no_grad():
        model[-1].weight.zero_()  # type: ignore[union-attr, operator]
        model[-1].bias.zero_()  # type: ignore[union-attr, operator]
    assert (ll.certified_radius(model, x[:5], max_eps=0.5, guarantee="estimate") == 0).all()


@every_guarantee
def test_certified_radius_of_a_linear_net_is_its_distance(guarantee: str, device: str) -> None:
    """One hidden layer that is the identity on the ball: the distance to the decision boundary, by hand."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double().to(device)
    with torch.no_grad():
        for layer, rows in ((model[0], [[1.0, 0.0], [0.0, 1.0]]), (model[2], [[3.0, 4.0], [0.0, 0.0]])):
            layer.weight.copy_(torch.tensor(rows))  # type: ignore[union-attr, operator]
            layer.bias.zero_()  # type: ignore[union-attr, operator]
        model[2].bias[1] = 60.0  # type: ignore[union-attr, operator, index]
    x = torch.tensor([[10.0, 10.0]], dtype=torch.float64, device=device)  # logits 70 and 60: (70 - 60) / 5 away
    radius = ll.certified_radius(model, x, max_eps=8.0, tolerance=1e-4, guarantee=guarantee)
    assert 2 - 1e-4 <= radius.item() <= 2


@pytest.mark.parametrize("guarantee", ["probabilistic", "deterministic"])
def test_certified_radius_of_a_proof_is_close_to_the_estimates(guarantee: str, setting: Setting, device: str) -> None:
    model, x = setting[0], setting[1][:6]
    proved = ll.certified_radius(model, x, max_eps=0.5, tolerance=0.01, guarantee=guarantee)
    estimated = ll.certified_radius(model, x, max_eps=0.5, tolerance=0.01, guarantee="estimate")
    assert proved.dtype == torch.float64 and (proved <= estimated.double() + 1e-6).all()
    assert (proved >= estimated.double() - 0.02).all() and (proved > 0).any()


def test_certified_radius_shares_the_failure_probability(
    setting: Setting, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    honest = ll.certify

    def spy(*arguments: Any, **options: Any) -> ll.Certificate:
        asked.append(options["failure_probability"])
        return honest(*arguments, **options)

    monkeypatch.setattr(sys.modules["locallip_cuda.certify"], "certify", spy)
    ll.certified_radius(setting[0], setting[1][:2], max_eps=1.0, tolerance=0.1, failure_probability=1e-6)
    assert len(asked) > 1 and sum(asked) <= 1e-6 * (1 + 1e-9)


def test_float32(setting: Setting, device: str) -> None:
    model, x = setting
    single = ll.certify(copy.deepcopy(model).float(), x.float(), 0.2, guarantee="estimate")
    double = ll.certify(model, x, 0.2, guarantee="estimate")
    assert single.margin.dtype == torch.float32
    torch.testing.assert_close(single.margin.double(), double.margin, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ({"guarantee": "certain"}, ValueError, "guarantee: got 'certain', want one of 'estimate', 'probabilistic'"),
        ({"guarantee": "estimate", "failure_probability": 2.0}, ValueError, "failure_probability: got 2.0"),
    ],
)
def test_guarantees(
    arguments: dict[str, Any], kind: type[Exception], message: str, setting: Setting, device: str
) -> None:
    with pytest.raises(kind, match=message):
        ll.certify(*setting, 0.1, **arguments)
    with pytest.raises(kind, match=message):
        ll.certified_radius(*setting, max_eps=1.0, **arguments)


@pytest.mark.parametrize("name", ["max_eps", "tolerance"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_bisection_limits(name: str, value: float, setting: Setting, device: str) -> None:
    arguments = {"max_eps": 1.0, "tolerance": 1e-2} | {name: value}
    with pytest.raises(ValueError, match=f"{name}: got {value}, want a finite number > 0"):
        ll.certified_radius(*setting, **arguments, guarantee="estimate")


def test_errors_of_the_bounds_come_through(setting: Setting, device: str) -> None:
    model, x = setting
    with pytest.raises(ValueError, match="eps: got -1"):
        ll.certify(model, x, -1.0, guarantee="estimate")
    with pytest.raises(TypeError, match="model: got function, want a torch.nn.Module"):
        ll.certify(lambda x: x, x, 0.1, guarantee="estimate")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x: got shape .* which model does not take"):
        ll.certify(nn.Linear(2, 2).to(x), x, 0.1, guarantee="estimate")
    with pytest.raises(TypeError, match="x: got list"):
        ll.certified_radius(model, [1.0], max_eps=1.0, guarantee="estimate")  # type: ignore[arg-type]


@every_guarantee
def test_another_default_device_does_not_matter(guarantee: str, device: str) -> None:
    """As after torch.set_default_device("cuda"), with a model on the CPU."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).to(device)
    x = torch.rand(2, 1, 4, 4, device=device)
    expected = ll.certify(model, x, 0.1, guarantee=guarantee)
    with torch.device("meta"):
        found = ll.certify(model, x, 0.1, guarantee=guarantee)
    torch.testing.assert_close(found.margin, expected.margin, rtol=1e-2, atol=1e-3)
