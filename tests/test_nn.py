import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from locallip_cuda.nn import ClippedMaxMin, ClippedReLU, MaxMin, Normalize, project_thresholds_


def modules(shape, generator):
    """One of each activation for inputs (B, *shape), shape[0] even, with thresholds that differ from unit to unit."""
    half = (shape[0] // 2, *shape[1:])
    theta = torch.rand(shape, generator=generator)
    upper, width = torch.randn(half, generator=generator), torch.rand(half, generator=generator)
    return [ClippedReLU(shape, theta), MaxMin(), ClippedMaxMin(half, upper, upper - width)]


shapes = st.one_of(
    st.tuples(st.integers(1, 5).map(lambda n: 2 * n)),
    st.tuples(st.integers(1, 3).map(lambda n: 2 * n), st.integers(1, 4), st.integers(1, 4)),
)


def test_clipped_relu_values():
    layer = ClippedReLU((3,), torch.tensor([1.0, 2.0, 0.0]))
    z = torch.tensor([[-1.0, -1.0, -1.0], [0.5, 3.0, 0.5], [1.0, 2.0, 0.0]])
    assert layer(z).tolist() == [[0, 0, 0], [0.5, 2, 0], [1, 2, 0]]
    assert layer.threshold.shape == (1, 3)
    assert dict(layer.named_parameters()).keys() == {"threshold"}


def test_max_min_sorts_the_halves_of_the_channels():
    z = torch.tensor([[1.0, 5.0, 3.0, 2.0]])  # pairs (1, 3) and (5, 2)
    assert MaxMin()(z).tolist() == [[3, 5, 1, 2]]
    image = torch.arange(2 * 4 * 3 * 3, dtype=torch.float32).view(2, 4, 3, 3)
    out = MaxMin()(image)
    assert torch.equal(out[:, :2], image[:, 2:])
    assert torch.equal(out[:, 2:], image[:, :2])


def test_clipped_max_min_values():
    layer = ClippedMaxMin((2,), torch.tensor([2.0, 9.0]), torch.tensor([-1.0, 4.0]))
    z = torch.tensor([[1.0, 5.0, 3.0, 2.0]])
    assert layer(z).tolist() == [[2, 5, 1, 4]]
    assert layer.upper.shape == layer.lower.shape == (1, 2)


@given(shape=shapes, batch=st.integers(0, 3), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=60)
def test_activations_match_their_formulas_and_keep_the_shape(shape, batch, seed):
    g = torch.Generator().manual_seed(seed)
    relu, maxmin, clipped = modules(shape, g)
    z = torch.randn(batch, *shape, generator=g)
    a, b = z.chunk(2, dim=1)
    torch.testing.assert_close(relu(z), z.clamp(min=0).clamp(max=relu.threshold), rtol=0, atol=0)
    pairs = torch.stack([a, b]).sort(dim=0).values
    torch.testing.assert_close(maxmin(z), torch.cat([pairs[1], pairs[0]], 1), rtol=0, atol=0)
    wanted = torch.cat([pairs[1].clamp(max=clipped.upper), pairs[0].clamp(min=clipped.lower)], 1)
    torch.testing.assert_close(clipped(z), wanted, rtol=0, atol=0)


@given(shape=shapes, seed=st.integers(0, 999), scale=st.sampled_from([1e-3, 0.1, 1.0, 10.0]))
@settings(deadline=None, max_examples=60)
def test_activations_are_1_lipschitz(shape, seed, scale):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(8, *shape, generator=g, dtype=torch.float64)
    moved = z + scale * torch.randn(z.shape, generator=g, dtype=torch.float64)
    distance = (moved - z).flatten(1).norm(dim=1)
    for layer in modules(shape, g):
        layer = layer.double()
        assert ((layer(moved) - layer(z)).flatten(1).norm(dim=1) <= distance * (1 + 1e-12)).all(), layer


@pytest.mark.parametrize("shape", [(4,), (4, 2, 3)])
def test_gradients_of_the_clipped_activations(shape):
    # Distinct values at odd multiples of 1/2, thresholds at other quarters: no ties within gradcheck's step.
    g = torch.Generator().manual_seed(0)
    count = 3 * torch.tensor(shape).prod().item()
    z = (torch.randperm(count, generator=g).double() + 0.5 - count // 2).view(3, *shape).requires_grad_()
    theta = (torch.arange(count // 3).double() + 0.25).view(1, *shape)
    half = (shape[0] // 2, *shape[1:])
    upper = (torch.arange(count // 6).double() + 0.25).view(1, *half)

    def relu(z, theta):
        return torch.func.functional_call(ClippedReLU(shape).double(), {"threshold": theta}, z)

    def maxmin(z, upper, lower):
        return torch.func.functional_call(ClippedMaxMin(half, 1.0, -1.0).double(), {"upper": upper, "lower": lower}, z)

    for inputs in ((relu, (z, theta)), (maxmin, (z, upper, -upper))):
        function, arguments = inputs
        assert torch.autograd.gradcheck(function, [a.detach().requires_grad_() for a in arguments])
        gradients = torch.autograd.grad(function(*(a.requires_grad_() for a in arguments)).sum(), arguments)
        assert all(gradient.abs().sum() > 0 for gradient in gradients)  # every threshold is felt somewhere


def test_thresholds_take_tensors_numbers_and_a_plain_integer_shape():
    assert ClippedReLU(3, 2).threshold.tolist() == [[2, 2, 2]]
    assert ClippedReLU((2, 2, 2), torch.tensor([1.0, 2.0]).view(2, 1, 1)).threshold[0, 1].unique().tolist() == [2]
    assert ClippedReLU(2, torch.ones(2, dtype=torch.float64)).threshold.dtype == torch.float64
    given_tensor = torch.ones(1, 2)
    layer = ClippedMaxMin(2, given_tensor, -1)
    assert layer.lower.dtype == torch.float32
    given_tensor.zero_()
    assert layer.upper.tolist() == [[1, 1]]


@pytest.mark.parametrize("shape", [(), (0,), (2, -1), (2.0,), (True,)])
def test_bad_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="shape"):
        ClippedReLU(shape)
    with pytest.raises(ValueError, match="shape"):
        ClippedMaxMin(shape, 1, -1)


@pytest.mark.parametrize("init", [-0.1, float("nan"), float("inf"), torch.tensor([1.0, -1.0, 0.0]), torch.ones(2)])
def test_bad_initial_thresholds_are_refused(init):
    with pytest.raises(ValueError, match="init"):
        ClippedReLU((3,), init)


def test_bad_initial_bounds_are_refused():
    with pytest.raises(ValueError, match="upper must be at least lower"):
        ClippedMaxMin((3,), -1.0, 1.0)
    with pytest.raises(ValueError, match="lower must be finite"):
        ClippedMaxMin((3,), 1.0, float("-inf"))
    with pytest.raises(ValueError, match="upper must be a number or a tensor that broadcasts"):
        ClippedMaxMin((3,), torch.ones(2), -1.0)
    with pytest.raises(TypeError, match="upper"):
        ClippedMaxMin((3,), torch.ones(3, dtype=torch.bool), -1.0)


def test_inputs_of_another_shape_are_refused():
    for layer in (MaxMin(), ClippedMaxMin((2,), 1, -1)):
        for shape in ((2, 5), (4,)):
            with pytest.raises(ValueError, match="even C"):
                layer(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"\(B, 4, 2, 2\), got shape \(1, 2, 2, 2\)"):
        ClippedMaxMin((2, 2, 2), 1, -1)(torch.zeros(1, 2, 2, 2))
    with pytest.raises(ValueError, match=r"\(B, 2, 3\), got an input of shape \(5, 3\)"):
        ClippedReLU((2, 3))(torch.zeros(5, 3))  # would broadcast
    with pytest.raises(ValueError, match="Normalize"):
        Normalize([0.0, 0.0], [1.0, 1.0])(torch.zeros(2, 3, 4, 4))


def test_normalize():
    layer = Normalize([0.5, 1.0], [2.0, 4.0])
    x = torch.rand(3, 2, 4, 4)
    out = layer(x)
    torch.testing.assert_close(out[:, 0], (x[:, 0] - 0.5) / 2)
    torch.testing.assert_close(out[:, 1], (x[:, 1] - 1) / 4)
    torch.testing.assert_close(layer(x[:, :, 0, 0]), out[:, :, 0, 0])
    assert layer.mean.shape == layer.std.shape == (2,)
    assert set(layer.state_dict()) == {"mean", "std"}
    assert not list(layer.parameters())
    assert Normalize(0.1, 0.3).std.shape == (1,)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.0], [0.0], "std must be positive"),
        ([0.0, 0.0], [1.0, -1.0], "std must be positive"),
        ([0.0, 0.0], [1.0], "one number per channel each"),
        ([float("nan")], [1.0], "mean must be one finite"),
        ([0.0], [float("inf")], "std must be one finite"),
        ([[0.0]], [1.0], "mean must be one finite"),
        ([], [], "mean must be one finite"),
    ],
)
def test_bad_normalisations_are_refused(mean, std, message):
    with pytest.raises(ValueError, match=message):
        Normalize(mean, std)


def test_project_thresholds():
    relu = ClippedReLU((3,))
    maxmin = ClippedMaxMin((3,), 1, -1)
    model = nn.Sequential(nn.Linear(3, 3), relu, nn.Sequential(maxmin))
    with torch.no_grad():
        relu.threshold.copy_(torch.tensor([[-1.0, 0.0, 2.0]]))
        maxmin.upper.copy_(torch.tensor([[-1.0, 2.0, 0.0]]))
        maxmin.lower.copy_(torch.tensor([[1.0, 1.0, 0.5]]))
    before = copy.deepcopy(model[0].state_dict())
    parameters = [id(p) for p in model.parameters()]
    project_thresholds_(model)
    assert relu.threshold.tolist() == [[0, 0, 2]]
    assert maxmin.upper.tolist() == [[0, 2, 0.25]]
    assert maxmin.lower.tolist() == [[0, 1, 0.25]]
    assert all(torch.equal(before[name], value) for name, value in model[0].state_dict().items())
    assert [id(p) for p in model.parameters()] == parameters
    assert all(p.requires_grad and p.grad_fn is None for p in model.parameters())


def test_activations_compile_into_one_graph():
    layers = nn.Sequential(ClippedReLU((4,)), MaxMin(), ClippedMaxMin((2,), 1, -1), Normalize([0.0] * 4, [2.0] * 4))
    x = torch.randn(3, 4)
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layers(x), rtol=0, atol=0)
