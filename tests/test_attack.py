import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from locallip_cuda import attack
from locallip_cuda.attack import pgd
from locallip_cuda.experiments import data, models


def norms(points, x):
    return (points.double() - x.double()).flatten(1).norm(dim=1)


def linear(weight, bias=None):
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(torch.zeros(weight.shape[0]) if bias is None else bias)
    return layer


@pytest.fixture(scope="module")
def digits_net():
    """A digits net after a few epochs, in training mode, and test images."""
    torch.manual_seed(0)
    model = models.build("digits")
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    batches = data.Batches(data.load("digits", train=True), 64, shuffle=True)
    for epoch in range(6):
        for x, y in batches.epoch(epoch):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimiser.step()
    x, y = data.load("digits", train=False).batch(torch.arange(100))
    return model, x, y


@given(
    shape=st.sampled_from([(3,), (2, 4, 4), (1, 8, 8)]),
    batch=st.integers(0, 4),
    seed=st.integers(0, 999),
    eps=st.sampled_from([0.0, 1e-7, 1e-3, 0.3, 5.0, 1e3]),
    scale=st.sampled_from([1e-3, 1.0, 255.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    random_start=st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_the_result_stays_in_the_ball(shape, batch, seed, eps, scale, dtype, random_start):
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    x = scale * torch.randn(batch, *shape, generator=g, dtype=dtype)
    y = torch.randint(0, 3, (batch,), generator=g)
    radius = eps * torch.rand(batch, generator=g, dtype=dtype)
    out = pgd(model, x, y, radius, steps=5, random_start=random_start, generator=g)
    assert out.shape == x.shape and out.dtype == dtype and not out.requires_grad
    assert torch.isfinite(out).all()
    if dtype == torch.float32:  # float64 measures it exactly enough
        assert (norms(out, x) <= radius.double()).all()
    else:
        assert (norms(out, x) <= radius * (1 + 1e-15)).all()
    if eps == 0:
        assert torch.equal(out, x)


def test_it_finds_the_boundary_of_a_linear_classifier():
    # Two classes, so that the loss has no local maximum: the radius at which the attack must succeed is known.
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 6, generator=g, dtype=torch.float64)
    model = linear(weight)
    x = torch.randn(50, 6, generator=g, dtype=torch.float64)
    logits = model(x).detach()
    y = logits.argmax(1)
    distance = (logits[:, 0] - logits[:, 1]).abs() / (weight[0] - weight[1]).norm()
    far = pgd(model, x, y, 1.001 * distance, generator=g)
    assert (model(far).argmax(1) != y).all()
    near = pgd(model, x, y, 0.999 * distance, generator=g)
    assert (model(near).argmax(1) == y).all()
    reached = (model(near).detach() * torch.tensor([[-1.0, 1.0]])).sum(1).abs() / (weight[0] - weight[1]).norm()
    assert (reached < 0.005 * distance).all()  # the highest loss, not just any point


def test_misclassified_samples_come_back_as_they_are():
    model = linear(torch.eye(2))
    x = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    out = pgd(model, x, torch.tensor([0, 0]), 0.1, steps=10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(out[1], x[1])
    assert not torch.equal(out[0], x[0])


def test_it_breaks_more_of_a_trained_net_than_random_points(digits_net):
    model, x, y = digits_net
    eps = 0.5
    g = torch.Generator().manual_seed(0)
    accuracy = [(model(x).argmax(1) == y).float().mean().item()]
    accuracy += [(model(pgd(model, x, y, r, steps=30, generator=g)).argmax(1) == y).float().mean() for r in (0.2, eps)]
    noise = torch.randn(x.shape, generator=g)
    random = x + eps * noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert accuracy[0] > 0.9
    assert accuracy[0] > accuracy[1] > accuracy[2]
    assert (model(random).argmax(1) == y).float().mean() > accuracy[2] + 0.2


def test_more_steps_do_not_lose_what_was_found(digits_net):
    model, x, y = digits_net

    def loss(steps):
        out = pgd(model, x, y, 0.3, steps=steps, generator=torch.Generator().manual_seed(1))
        logits = model(out).detach()
        true = logits.gather(1, y[:, None])[:, 0]
        return logits.scatter(1, y[:, None], -math.inf).amax(1) - true

    few, many = loss(3), loss(20)
    broken = few > 0
    assert (many[broken] > 0).all()
    assert (many >= few - 1e-5)[~broken].all()


def test_the_generator_decides_the_result(digits_net):
    model, x, y = digits_net
    runs = [pgd(model, x, y, 0.1, steps=4, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    torch.manual_seed(3)
    first = pgd(model, x, y, 0.1, steps=4)
    torch.manual_seed(3)
    assert torch.equal(first, pgd(model, x, y, 0.1, steps=4))
    start = [
        pgd(model, x, y, 0.1, steps=4, random_start=False, generator=torch.Generator().manual_seed(s)) for s in (0, 1)
    ]
    assert torch.equal(*start)


def test_the_random_start_is_uniform_in_the_ball():
    # With no step and a loss of 0 at x only, the start itself is returned.
    class AwayFromZero(nn.Module):
        def forward(self, x):
            return torch.stack([torch.zeros(len(x)), x.norm(dim=1)], 1)

    x = torch.zeros(20000, 3)
    out = pgd(AwayFromZero(), x, torch.zeros(len(x), dtype=torch.int64), 2.0, steps=0)
    # The share within half the radius is 1/8, and every octant gets the same.
    assert abs((out.norm(dim=1) < 1).float().mean().item() - 1 / 8) < 0.015
    octant = ((out > 0) * torch.tensor([1, 2, 4])).sum(1).bincount() / len(x)
    assert (octant - 1 / 8).abs().max() < 0.015


def test_a_vanishing_gradient_is_left_in_a_random_direction():
    # At x = 0 the gradient is 0; logit 1 wins beyond a norm of 0.5.
    class Basin(nn.Module):
        def forward(self, x):
            return torch.stack([torch.zeros(len(x)), torch.relu(x.norm(dim=1) - 0.1) - 0.4], 1)

    x, y = torch.zeros(8, 4), torch.zeros(8, dtype=torch.int64)
    out = pgd(Basin(), x, y, 1.0, random_start=False, generator=torch.Generator().manual_seed(0))
    assert (norms(out, x) > 0.5).all()
    assert (Basin()(out).argmax(1) == 1).all()
    still = linear(torch.zeros(3, 4), torch.tensor([1.0, 0.0, 0.0]))  # nothing to find, and no NaN
    assert torch.isfinite(pgd(still, x, y, 1.0, steps=3)).all()


def test_a_tiny_gradient_counts():
    # The gradient's square underflows in float32.
    model = linear(torch.tensor([[1e-30, 0.0], [0.0, 1e-30]]), torch.tensor([1e-30, 0.0]))
    x, y = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    assert (model(pgd(model, x, y, 1.0)).argmax(1) == 1).all()
    step = pgd(model, x, y, 1.0, steps=1, step_size=0.125, random_start=False)
    torch.testing.assert_close(norms(step, x), torch.tensor([0.125], dtype=torch.float64), rtol=1e-5, atol=0)


def test_the_box_is_kept():
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), linear(torch.randn(5, 12, generator=g)))
    x, y = torch.rand(30, 3, 2, 2, generator=g), torch.randint(0, 5, (30,), generator=g)
    boxed = pgd(model, x, y, 2.0, generator=g, steps=10, box=(0.0, 1.0))
    assert boxed.min() >= 0 and boxed.max() <= 1
    assert (norms(boxed, x) <= 2).all()
    free = pgd(model, x, y, 2.0, generator=g, steps=10)
    assert free.min() < 0 and free.max() > 1
    with pytest.raises(ValueError, match="box"):
        pgd(model, x - 1, y, 2.0, box=(0.0, 1.0))


def test_the_model_and_the_callers_tensors_are_left_alone(digits_net):
    model, x, y = digits_net
    model = nn.Sequential(*model, nn.Dropout(0.5))
    model.train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    x, labels = x.clone().requires_grad_(), y.clone()
    before = x.detach().clone()
    out = pgd(model, x, labels, 0.2, steps=3)
    assert [module.training for module in model.modules()] == modes
    assert all((parameter.grad == 7).all() for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert x.grad is None and torch.equal(x, before) and torch.equal(labels, y)
    assert out.data_ptr() != x.data_ptr()

    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("as asked")

    fails = nn.Sequential(Fails())
    with pytest.raises(RuntimeError, match="as asked"):
        pgd(fails, x, y, 0.2)
    assert fails.training and fails[0].training


def test_dropout_is_off():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(self.training)
            return x

    pgd(Spy(), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), 1.0, steps=2)
    assert seen and not any(seen)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(digits_net, mode):
    model, x, y = digits_net
    wanted = pgd(model, x, y, 0.5, steps=5, generator=torch.Generator().manual_seed(0))
    with mode():
        got = pgd(model, x + 0, y + 0, 0.5, steps=5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(got, wanted)


def test_it_stops_when_all_are_broken():
    calls = []

    class Counts(nn.Module):
        def forward(self, x):
            calls.append(len(x))
            return torch.stack([-x[:, 0], x[:, 0]], 1)

    x, y = torch.tensor([[-0.1, 0.0], [-0.4, 0.0]]), torch.zeros(2, dtype=torch.int64)
    pgd(Counts(), x, y, 0.5, steps=100, random_start=False)
    assert calls[0] == 2 and calls[-1] == 1  # the sample broken first is dropped
    assert len(calls) < 10


def test_looking_less_often_gives_the_same(digits_net, monkeypatch):
    # On a GPU broken samples stay in the batch for some steps; what was found first is kept all the same.
    model, x, y = digits_net
    often = pgd(model, x, y, 0.5, steps=25, random_start=False)
    monkeypatch.setattr(attack, "_CHECK_EVERY", {"cpu": 10})
    seldom = pgd(model, x, y, 0.5, steps=25, random_start=False)
    torch.testing.assert_close(seldom, often, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(digits_net):
    model, x, y = digits_net
    moved = copy.deepcopy(model).cuda()
    out = pgd(moved, x.cuda(), y.cuda(), 0.5, generator=torch.Generator().manual_seed(0))
    assert out.is_cuda and (norms(out.cpu(), x) <= 0.5).all()
    here = pgd(model, x, y, 0.5, generator=torch.Generator().manual_seed(0))
    broken = [
        (net(points).argmax(1) != labels).sum().item()
        for net, points, labels in ((moved, out, y.cuda()), (model, here, y))
    ]
    assert abs(broken[0] - broken[1]) <= 3


def test_eps_and_step_size_per_sample():
    model = linear(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([9.0, 0.0]))
    x, y = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    out = pgd(model, x, y, torch.tensor([0.0, 1.0, 2.0]), random_start=False, steps=50)
    torch.testing.assert_close(norms(out, x), torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64), rtol=1e-4, atol=0)
    out = pgd(model, x, y, 10.0, step_size=torch.tensor([0.5, 0.25, 1.0]), random_start=False, steps=2)
    torch.testing.assert_close(norms(out, x), torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "x must be a floating-point"),
        ({"x": [[0.0]]}, TypeError, "x must be a floating-point"),
        ({"y": torch.zeros(3, dtype=torch.int64)}, TypeError, r"y must be an int64 tensor of shape \(2,\)"),
        ({"y": torch.zeros(2)}, TypeError, "y must be an int64"),
        ({"y": torch.tensor([0, 3])}, ValueError, r"y must lie in 0\.\.2"),
        ({"y": torch.tensor([-1, 0])}, ValueError, r"y must lie in 0\.\.2"),
        ({"eps": -0.1}, ValueError, "eps must be finite and non-negative"),
        ({"eps": math.nan}, ValueError, "eps must be finite and non-negative"),
        ({"eps": torch.ones(3)}, ValueError, r"eps must be a number or have shape \(2,\)"),
        ({"step_size": -1.0}, ValueError, "step_size must be"),
        ({"steps": -1}, ValueError, "steps must be"),
        ({"steps": 1.5}, ValueError, "steps must be"),
        ({"model": nn.Flatten(0)}, ValueError, "model must give logits"),
        ({"model": nn.Linear(3, 1)}, ValueError, "K >= 2"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    arguments = {"model": nn.Linear(3, 3), "x": torch.zeros(2, 3), "y": torch.zeros(2, dtype=torch.int64), "eps": 1.0}
    arguments |= change
    positional = [arguments.pop(name) for name in ("model", "x", "y", "eps")]
    with pytest.raises(error, match=message):
        pgd(*positional, **arguments)
