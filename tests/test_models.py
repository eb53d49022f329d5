import pytest
import torch
from torch import nn

import locallip_cuda as ll
from locallip_cuda.experiments import models
from locallip_cuda.nn import ClippedMaxMin, ClippedReLU, MaxMin

# (channels, height, width) after each convolution, and the widths of the Linear layers, worked out by hand.
STAGES = {
    "digits": ([(16, 8, 8), (32, 4, 4)], [64, 10]),
    "mnist-4c3f": ([(32, 28, 28), (32, 14, 14), (64, 14, 14), (64, 7, 7)], [512, 512, 10]),
    "cifar10-4c3f": ([(32, 32, 32), (32, 16, 16), (64, 16, 16), (64, 8, 8)], [512, 512, 10]),
    "cifar10-6c2f": (
        [(32, 32, 32), (32, 32, 32), (32, 16, 16), (64, 16, 16), (64, 16, 16), (64, 8, 8)],
        [512, 10],
    ),
    "tinyimagenet-8c2f": (
        [
            *[(64, 64, 64), (64, 64, 64), (64, 31, 31), (128, 31, 31), (128, 31, 31), (128, 14, 14)],
            *[(256, 14, 14), (256, 6, 6)],
        ],
        [256, 200],
    ),
}
TYPES = {"relu": nn.ReLU, "clipped-relu": ClippedReLU, "maxmin": MaxMin, "clipped-maxmin": ClippedMaxMin}


RESIDUAL = {"cifar10-liresnet-s", "cifar10-liresnet"}


@pytest.mark.parametrize("activation", models.ACTIVATIONS)
@pytest.mark.parametrize("name", sorted(RESIDUAL))
def test_residual_networks(name, activation):
    spec = models.spec(name)
    model = models.build(name, activation)
    x = torch.rand(2, *spec.input_shape)
    assert model(x).shape == (2, spec.classes)
    assert len(model.blocks) == spec.blocks and {conv.weight.shape[:2] for conv in model.blocks} == {
        (spec.channels, spec.channels)
    }
    assert [type(each) for each in model.activations] == [TYPES[activation]] * (spec.blocks + 3)
    if name == "cifar10-liresnet-s":
        b = ll.local_bounds(model, x, 0.1)
        assert len(b.layers) == spec.blocks + 3, "a block and its skip are one operator"
        torch.testing.assert_close(b.last_weight.norm(dim=1), torch.ones(10))


def test_networks_that_are_imported(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Linear(3, 2)\ndef number():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert isinstance(models.imported("mine:net"), nn.Linear)
    for place, message in (
        ("mine", "want package.module:function"),
        ("mine:other", "cannot be imported"),
        ("nowhere.at_all:net", "cannot be imported"),
        ("mine:number", "returns int, want a torch.nn.Module"),
    ):
        with pytest.raises(ValueError, match=message):
            models.imported(place)


def test_all_models_are_covered():
    assert set(STAGES) | RESIDUAL == set(models.MODELS)
    assert set(TYPES) == set(models.ACTIVATIONS)


@pytest.mark.parametrize("activation", models.ACTIVATIONS)
@pytest.mark.parametrize("name", STAGES)
def test_layers(name, activation):
    spec = models.spec(name)
    model = models.build(name, activation)
    assert type(model) is nn.Sequential
    assert type(model[-1]) is nn.Linear
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    stages, widths = STAGES[name]
    x = torch.rand(2, *spec.input_shape)
    seen, linear = [], []
    previous = None
    for layer in model:
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            seen.append(tuple(x.shape[1:]))
        elif isinstance(layer, nn.Linear):
            linear.append(x.shape[1])
        elif isinstance(layer, TYPES[activation]):
            assert isinstance(previous, (nn.Conv2d, nn.Linear))
        else:
            assert isinstance(layer, nn.Flatten)
        previous = layer
    assert (seen, linear) == (stages, widths)
    assert x.shape == (2, spec.classes)
    activations = [layer for layer in model if isinstance(layer, TYPES[activation])]
    assert len(activations) == len(stages) + len(widths) - 1


def clips(model):
    layers = [layer for layer in model if isinstance(layer, ClippedMaxMin)]
    for layer in layers:
        assert torch.equal(layer.lower, -layer.upper)
    return [layer.upper.unique().tolist() for layer in layers]


def test_initial_thresholds_of_the_recipes():
    for name, value in (("mnist-4c3f", 2.0), ("cifar10-4c3f", 2.0), ("cifar10-6c2f", 2.0), ("tinyimagenet-8c2f", 1.0)):
        layers = [layer for layer in models.build(name) if isinstance(layer, ClippedReLU)]
        assert layers and all(layer.threshold.unique().tolist() == [value] for layer in layers)
    for name, first, last, count in (("cifar10-6c2f", 0.1, 1.2, 7), ("tinyimagenet-8c2f", 0.8, 3.0, 9)):
        values = torch.tensor(clips(models.build(name, "clipped-maxmin")))
        torch.testing.assert_close(values[:, 0], torch.linspace(first, last, count))


def test_initial_thresholds_can_be_set():
    layers = [layer for layer in models.build("digits", threshold=0.25) if isinstance(layer, ClippedReLU)]
    assert [layer.threshold.unique().tolist() for layer in layers] == [[0.25]] * 3
    values = torch.tensor(clips(models.build("digits", "clipped-maxmin", clip=(1.0, 3.0))))
    torch.testing.assert_close(values[:, 0], torch.tensor([1.0, 2.0, 3.0]))


def test_the_seed_decides_the_weights():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(models.build("digits").state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["0.weight"], states[2]["0.weight"])


def test_unknown_names_are_refused_with_a_list():
    with pytest.raises(ValueError, match=r"mnist-4c3f.*'resnet'"):
        models.build("resnet")
    with pytest.raises(ValueError, match="digits"):
        models.spec("resnet")
    with pytest.raises(ValueError, match=r"clipped-maxmin.*'gelu'"):
        models.build("digits", "gelu")
    with pytest.raises(ValueError, match="threshold"):
        models.build("digits", threshold=-1.0)
    with pytest.raises(ValueError, match="clip"):
        models.build("digits", "clipped-maxmin", clip=(-1.0, 1.0))
