"""What ``locallip explain`` measures, against computations by hand on small networks, and how it shows it."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import generator, matrix, true_norms
from torch import Tensor, nn

from locallip_cuda import local_bounds
from locallip_cuda.experiments import checkpoint, cli, data, explanation_report
from locallip_cuda.experiments.explanation import DECIDERS, Explanation, Spread, Thresholds, explain
from locallip_cuda.experiments.network import build_model, load_model
from locallip_cuda.experiments.recipes import recipe
from locallip_cuda.experiments.trainer import Settings, Trainer
from locallip_cuda.nn import ClippedMaxMin, ClippedReLU, MaxMin
from locallip_cuda.ops import reference
from locallip_cuda.propagation.graph import UnsupportedModuleError

EPS = 0.3


def images(count: int, sizes: tuple[int, int, int] = (1, 2, 3), classes: int = 3) -> data.Dataset:
    g = generator(1)
    pixels = torch.randint(256, (count, *sizes), dtype=torch.uint8, generator=g)
    return data.Dataset("noise", pixels, torch.randint(classes, (count,), generator=g), classes)


def spread(numbers: Tensor) -> Spread:
    low, high = np.quantile(numbers.numpy(), [0.05, 0.95])
    return Spread(*(pytest.approx(float(each), rel=1e-4) for each in (numbers.mean(), low, high)))


def share(mask: Tensor) -> float:
    return mask.double().mean().item()


@dataclasses.dataclass
class Value:
    """What is known of a value by hand, in float64: clean, lower, upper (B, n), radius (B,), what can vary (B, n)."""

    clean: Tensor
    lower: Tensor | None
    upper: Tensor | None
    radius: Tensor
    columns: Tensor


@dataclasses.dataclass
class Found:
    rows: Tensor
    columns: Tensor
    by_ball: float
    by_both: float
    by_box: float
    norms: list[Tensor]


def start(dataset: data.Dataset, eps: float) -> Value:
    x = dataset.images.flatten(1).double() / 255
    return Value(x, None, None, torch.full((len(x),), eps, dtype=torch.float64), torch.ones_like(x, dtype=torch.bool))


def closed(terms: list[tuple[Tensor | None, Value]], bias: Tensor, activation: nn.Module) -> tuple[Value, Found]:
    """A layer by hand: the sum of W times values (None: the value itself) and a bias, behind it an activation."""
    clean, half, centre, reach = bias, 0.0, bias, 0.0
    for weight, v in terms:
        w = torch.eye(v.clean.shape[1], dtype=torch.float64) if weight is None else weight.double()
        lower = v.clean - v.radius[:, None] if v.lower is None else v.lower
        upper = v.clean + v.radius[:, None] if v.upper is None else v.upper
        clean = clean + v.clean @ w.T
        centre = centre + (lower + upper) / 2 @ w.T
        half = half + (upper - lower) / 2 @ w.abs().T
        reach = reach + v.radius[:, None] * (v.columns.double() @ w.square().T).sqrt()
    boxed = any(v.lower is not None for _, v in terms)
    lower = torch.maximum(clean - reach, centre - half) if boxed else clean - reach
    upper = torch.minimum(clean + reach, centre + half) if boxed else clean + reach
    ends = (lower == clean - reach).int() + (upper == clean + reach).int()
    kind, first, second = {
        nn.ReLU: lambda a: ("relu", None, None),
        MaxMin: lambda a: ("maxmin", None, None),
        ClippedReLU: lambda a: ("clipped_relu", a.threshold.double(), None),
        ClippedMaxMin: lambda a: ("clipped_maxmin", a.upper.double(), a.lower.double()),
    }[type(activation)](activation)
    box = (torch.cat([clean, (lower + upper) / 2]), (upper - lower) / 2)
    wide = torch.full((1, clean.shape[1]), math.inf, dtype=torch.float64)
    pattern = reference.activation_pattern(*box, wide, torch.ones(len(clean)).double(), kind, first, second)
    values, half_width, rows, columns = pattern[:4]
    out, middle = values.chunk(2)
    norms, radius = [], torch.zeros(len(clean), dtype=torch.float64)
    for weight, v in terms:
        norm = torch.ones(len(clean)).double() if weight is None else true_norms(weight, rows, v.columns)
        norms.append(norm)
        radius = radius + v.radius * norm
    shares = (share(ends == 2), share(ends == 1), share(ends == 0))
    return Value(out, middle - half_width, middle + half_width, radius, columns), Found(rows, columns, *shares, norms)


def check_layers(e: Explanation, found: list[tuple[Found, int, Tensor, Tensor]]) -> None:
    """found: of every norm its layer, its number there, its matrix, and what varies of its input."""
    assert len(e.layers) == len(found)
    for layer, (own, which, weight, inputs) in zip(e.layers, found, strict=True):
        whole = torch.linalg.matrix_norm(weight.double(), 2).item()
        assert layer.rows == pytest.approx(share(own.rows)) and layer.columns == pytest.approx(share(own.columns))
        assert layer.inputs == pytest.approx(share(inputs))
        assert layer.local_norm == spread(own.norms[which])
        assert layer.global_norm == pytest.approx(whole, rel=1e-5)
        assert layer.ratio == pytest.approx(own.norms[which].mean().item() / whole, rel=1e-4)
        for name in ("by_ball", "by_both", "by_box"):
            assert getattr(layer, name) == pytest.approx(getattr(own, name)), (layer.path, name)


def dense_network(*activations: nn.Module) -> nn.Sequential:
    """Linear maps with the activations between them. Half of the rows behind the first map have one entry: there a box
    is the tighter one."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for i, each in enumerate(activations):
        linear = nn.Linear(8 if i else 6, 8)
        if i:
            linear.weight.data[::2] = torch.eye(8)[::2]
        layers += [linear, each]
    return nn.Sequential(*layers, nn.Linear(8, 3)).requires_grad_(False)


@pytest.mark.parametrize("make", [lambda: nn.ReLU(), lambda: ClippedReLU(8, 0.3), lambda: ClippedMaxMin(4, 0.3, -0.1)])
def test_figures_by_hand(make: Callable[[], nn.Module]) -> None:
    model, dataset = dense_network(make(), make(), make()), images(40)
    e = explain(model, model, dataset, EPS, batch_size=16)
    v, found, norms = start(dataset, EPS), [], []
    for at in (1, 3, 5):
        before, (linear, activation) = v.columns, model[at : at + 2]
        v, own = closed([(linear.weight, v)], linear.bias.double(), activation)
        found.append((own, 0, linear.weight, before))
        norms.append(own.norms[0])
    check_layers(e, found)
    assert [layer.path for layer in e.layers] == ["1", "3", "5"] and {layer.module for layer in e.layers} == {"Linear"}
    assert e.layers[0].by_ball == 1
    for name in ("by_ball", "by_both", "by_box"):
        assert any(0 < getattr(layer, name) < 1 for layer in e.layers)
    assert all(0 < layer.rows < 1 for layer in e.layers[1:])  # or the masks are not tested
    local = torch.stack(norms).prod(0)
    assert e.lipschitz_product == spread(local) and e.lipschitz_composed is None
    assert e.lipschitz_global == pytest.approx(math.prod(layer.global_norm for layer in e.layers), rel=1e-5)
    assert [sample["lipschitz_product"] for sample in e.per_sample] == pytest.approx(local.tolist(), rel=1e-4)
    histogram = e.lipschitz_histogram
    assert histogram.edges[0] == 0 and histogram.edges[-1] == pytest.approx(e.lipschitz_global)
    assert sum(histogram.product) == 40 and histogram.composed == []
    assert histogram.product == np.histogram(local, histogram.edges)[0].tolist()


def test_a_layer_without_a_norm_and_a_sum_of_two() -> None:
    """Shares of intervals are those of the norm's own layer."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.skip = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(6, 8)
            self.third, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
            self.relu, self.sorted, self.clipped = nn.ReLU(), MaxMin(), ClippedReLU(8, 0.2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            z = self.clipped(self.second(self.sorted(self.relu(self.first(x)))) + self.skip(x))
            return self.last(self.relu(z + self.third(z)))

    torch.manual_seed(1)
    model, dataset = Net().requires_grad_(False), images(30)
    model.second.weight.data[::2] = torch.eye(8)[::2]
    model.skip.weight.data[::2] = 0
    e = explain(model, model, dataset, EPS)
    x = start(dataset, EPS)
    h, first = closed([(model.first.weight, x)], model.first.bias.double(), model.relu)
    h, _ = closed([(None, h)], torch.zeros(8).double(), model.sorted)
    z, both = closed(
        [(model.second.weight, h), (model.skip.weight, x)],
        model.second.bias.double() + model.skip.bias.double(),
        model.clipped,
    )
    block = torch.eye(8) + model.third.weight
    _, last = closed([(block, z)], model.third.bias.double(), model.relu)
    assert {layer.path for layer in e.layers} == {"first", "second", "skip", "third"}
    by_path = {layer.path: layer for layer in e.layers}
    assert by_path["second"].by_ball == by_path["skip"].by_ball and by_path["second"].by_box > 0
    numbers = {
        "first": (first, 0, model.first.weight, x.columns),
        "second": (both, 0, model.second.weight, h.columns),
        "skip": (both, 1, model.skip.weight, x.columns),
        "third": (last, 0, block, z.columns),
    }
    check_layers(e, [numbers[layer.path] for layer in e.layers])


@pytest.mark.parametrize(
    "activations, eps, window, names",
    [
        ([nn.ReLU()], 1.0, 2, {"product", "functional", "functional by label"}),
        ([nn.ReLU(), nn.ReLU()], 0.3, 2, {"chain", "functional"}),
        ([nn.ReLU(), nn.ReLU()], 3.0, 2, {"chain", "functional by label"}),
        ([ClippedReLU(8, 0.3), ClippedReLU(8, 0.3)], 0.01, 2, {"product", "chain", "functional"}),
        ([nn.ReLU(), ClippedReLU(8, 0.3), nn.ReLU()], 0.1, 9, {"chain", "functional"}),
        ([MaxMin(), MaxMin()], 0.3, 2, {"product"}),
    ],
)
def test_what_decides(activations: list[nn.Module], eps: float, window: int, names: set[str]) -> None:
    """By bounds of which one after another is left out."""
    model, dataset = dense_network(*activations), images(60)
    e = explain(model, model, dataset, eps, window=window, batch_size=60)
    x, y = dataset.batch(torch.arange(60))
    bounds = local_bounds(model, x, eps, iterations=50, window=window)
    product = local_bounds(model, x, eps, iterations=50)
    assert [sample["margin"] for sample in e.per_sample] == pytest.approx(bounds.margin(y).tolist(), abs=1e-6)
    without = {
        name: dataclasses.replace(bounds, functionals=[f for f in bounds.functionals if keep(f)]).margin(y)
        for name, keep in (("masked", lambda f: not f.masked), ("both", lambda f: False))
    }
    for k, sample in enumerate(e.per_sample):
        if without["both"][k] == bounds.margin(y)[k]:
            expected = "chain" if bounds.radius[k] < product.radius[k] else "product"
        else:
            expected = "functional by label" if without["masked"][k] == bounds.margin(y)[k] else "functional"
        assert sample["decided"] == expected, k
    assert sum(own.samples for own in e.decided.values()) == 60
    certified = (bounds.margin(y) > 0).sum().item()
    assert sum(own.certified for own in e.decided.values()) == certified and e.certified == certified / 60
    assert e.lipschitz_composed == spread(bounds.lipschitz.double())
    assert e.lipschitz_product == spread(product.lipschitz.double())
    assert sum(e.lipschitz_histogram.composed) == sum(e.lipschitz_histogram.product) == 60
    assert names <= set(e.decided)
    assert list(e.decided) == [name for name in DECIDERS if name in e.decided]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    Trainer(recipe("digits").replace(epochs=2, evaluate_every=2, sparse=0.05), Settings(out=out)).run()
    return out


def test_a_trained_network(run: Path) -> None:
    """As the library has it, whatever the batch size."""
    model, stored, _ = load_model(run / checkpoint.CHECKPOINT_NAME)
    dataset = data.load("digits", train=False)
    e = explain(model, build_model(stored), dataset, EPS, limit=30, batch_size=7)
    assert e.samples == 30 and [sample["index"] for sample in e.per_sample] == list(range(30))
    x, y = dataset[:30].batch(torch.arange(30))
    bounds = local_bounds(model, x, EPS, iterations=50)
    geometry = {"0": ((1, 8, 8), {"padding": 1}), "2": ((16, 8, 8), {"stride": 2, "padding": 1}), "5": ((), {})}
    for layer, record in zip(e.layers, bounds.layers, strict=True):
        size, conv = geometry[record.path]
        weight = model.get_submodule(record.path).weight.detach()
        true = true_norms(weight, record.row_mask, record.input_mask, size, **conv)
        assert layer.local_norm.mean == pytest.approx(true.mean().item(), rel=1e-3)
        whole = torch.linalg.matrix_norm(matrix(weight, size, **conv), 2).item()
        assert layer.global_norm == pytest.approx(whole, rel=1e-4) and layer.ratio <= 1.001
        assert layer.rows == pytest.approx(share(record.row_mask), abs=1e-4)
        assert layer.columns == pytest.approx(share(record.column_mask), abs=1e-4)
    assert e.layers[2].rows < 0.95
    assert [own["margin"] for own in e.per_sample] == pytest.approx(bounds.margin(y).tolist(), abs=1e-3)
    assert [own["label"] for own in e.per_sample] == y.tolist()
    assert [own["prediction"] for own in e.per_sample] == model(x).argmax(1).tolist()
    assert e.lipschitz_global == pytest.approx(bounds.global_lipschitz.item(), rel=1e-5)
    assert e.lipschitz_product.mean == pytest.approx(bounds.lipschitz.mean().item(), rel=1e-4)
    assert e.decided == {"product": e.decided["product"]} and e.decided["product"].samples == 30
    assert [each.path for each in e.thresholds] == ["1", "3", "6"]
    for each in e.thresholds:
        learnt = model.get_submodule(each.path).threshold.detach().double()
        assert each == Thresholds(each.path, "ClippedReLU", "threshold", Spread(2, 2, 2), spread(learnt))
    assert e.thresholds[2].learnt.mean != 2


def test_thresholds_of_clipped_maxmin() -> None:
    model, initial = (dense_network(ClippedMaxMin(4, 0.3, -0.1), nn.ReLU(), ClippedMaxMin(4, 1, 0)) for _ in range(2))
    model[2].upper.data = torch.tensor([[0.1, 0.2, 0.3, 0.5]])
    e = explain(model, initial, images(4), EPS)
    assert [(each.path, each.name) for each in e.thresholds] == [
        *(("2", "upper"), ("2", "lower"), ("6", "upper"), ("6", "lower"))
    ]
    upper, lower = e.thresholds[:2]
    assert upper.initial.mean == pytest.approx(0.3) and upper.learnt == spread(model[2].upper.double())
    assert lower.initial == lower.learnt and lower.learnt.mean == pytest.approx(-0.1)


def test_a_network_without_hidden_norms_and_a_radius_of_zero() -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    e = explain(linear, linear, images(5), EPS)
    assert e.layers == [] and e.lipschitz_global == 1 and e.lipschitz_product == Spread(1, 1, 1)
    assert "global" in explanation_report.table(e, "title")
    model = dense_network(nn.ReLU())
    e = explain(model, model, images(5), 0.0)
    assert e.layers[0].rows == share(model[1](model[0](images(5).batch(torch.arange(5))[0])) > 0)


def test_the_paper_s_radius() -> None:
    model = dense_network(ClippedReLU(8, 0.3), ClippedReLU(8, 0.3))
    e = explain(model, model, images(20), EPS, radius="global")
    x, _ = images(20).batch(torch.arange(20))
    bounds = local_bounds(model, x, EPS, iterations=50, radius="global")
    assert e.lipschitz_product == spread(bounds.lipschitz.double())
    tighter = explain(model, model, images(20), EPS).lipschitz_product.mean
    assert e.lipschitz_product.mean >= tighter * (1 - 1e-6)


def test_errors() -> None:
    model, dataset = dense_network(nn.ReLU()), images(5)
    for name in ("limit", "batch_size"):
        with pytest.raises(ValueError, match=f"{name}: got 0, want an integer >= 1"):
            explain(model, model, dataset, EPS, **{name: 0})
    with pytest.raises(ValueError, match="window: got 0"):
        explain(model, model, dataset, EPS, window=0)
    with pytest.raises(ValueError, match="window: got 2 with radius='global'"):
        explain(model, model, dataset, EPS, window=2, radius="global")
    with pytest.raises(ValueError, match="eps: got -1"):
        explain(model, model, dataset, -1)
    one = nn.Sequential(nn.Flatten(), nn.Linear(6, 1))
    with pytest.raises(ValueError, match="model: got 1 output"):
        explain(one, one, images(5, classes=1), EPS)
    own = nn.Sequential(nn.Flatten(), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    with pytest.raises(UnsupportedModuleError, match="2"):
        explain(own, own, dataset, EPS)


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", str(run), "--limit", "20", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "digits, clipped-relu: 20 test samples of digits, l2 radius 0.3" in printed
    for part in ("Conv2d 0", "Linear 5", "ClippedReLU 6", "decided by", "product", "estimate: no proof"):
        assert part in printed
    assert f"Written: {run / 'explain.json'}, {run / 'explain.png'}" in printed
    assert (run / "explain.png").read_bytes().startswith(b"\x89PNG")
    values = json.loads((run / "explain.json").read_text())
    result = values["result"]
    assert values["command"] == ["locallip", "explain", str(run), "--limit", "20", "--device", "cpu"]
    assert values["recipe"]["epochs"] == 2 and values["data"]["name"] == "digits" and "commit" in values["environment"]
    assert "no proof" in values["caveats"][0]
    assert result["samples"] == len(result["per_sample"]) == 20 and result["eps"] == 0.3 and result["iterations"] == 50
    assert set(result["layers"][0]["local_norm"]) == {"mean", "low", "high"}
    assert not list(run.glob(".explain*"))

    out = tmp_path / "else"
    wide = ["--eps", "1/2", "--window", "3", "--limit", "10", "--batch-size", "4", "--out", str(out)]
    assert cli.main(["explain", str(run / checkpoint.CHECKPOINT_NAME), *wide]) == 0
    printed = capsys.readouterr().out
    assert "10 test samples of digits, l2 radius 0.5, up to 3 maps composed" in printed
    result = json.loads((out / "explain.json").read_text())["result"]
    assert result["window"] == 3 and result["lipschitz_composed"]["mean"] <= result["lipschitz_product"]["mean"]


def test_the_plot_s_panels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As many as there is something to show of, each with its title and what it shows."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    honest = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), honest(figure, *a, **k))[1])
    for activation, window, count in ((nn.ReLU(), 1, 4), (ClippedReLU(8, 0.3), 1, 5), (ClippedReLU(8, 0.3), 2, 6)):
        model = dense_network(activation, nn.ReLU())
        e = explain(model, model, images(12), EPS, window=window)
        assert explanation_report.plot(tmp_path / "plot.png", e, "title")
        figure = drawn.pop()
        titles = [axes.get_title() for axes in figure.axes]
        assert len(titles) == len(set(titles)) == count
        assert all("estimate" in title for title in titles if title != "Thresholds")
        assert ("Thresholds" in titles) is (count > 4) and ("What gives the margin (estimate)" in titles) is (count > 5)
        widths = [patch.get_width() for patch in figure.axes[0].patches]
        assert widths == pytest.approx(
            [100 * s for name in ("rows", "columns") for s in (getattr(layer, name) for layer in e.layers)]
        )
        assert "threshold" not in explanation_report.table(e, "title") or count > 4


def test_without_matplotlib(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert cli.main(["explain", str(run), "--limit", "5", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "No plot: matplotlib is not installed" in printed and "explain.png" not in printed
    assert (tmp_path / "explain.json").exists() and not (tmp_path / "explain.png").exists()


def test_errors_of_the_command_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for arguments, message in (
        ([str(tmp_path / "no")], "no such checkpoint file"),
        (["model.onnx"], "CHECKPOINT: got model.onnx, want a checkpoint or the folder of a run"),
        ([str(run), "--limit", "0"], "limit: got 0, want an integer >= 1"),
        ([str(run), "--batch-size", "-1"], "batch_size: got -1, want an integer >= 1"),
        ([str(run), "--eps", "-0.5"], "eps: got -0.5"),
        ([str(run), "--window", "0"], "window: got 0"),
        ([str(run), "--model", "own:Net"], "model: got own:Net, want none"),
        ([str(run), "--out", str(file)], "which a file is in the way of"),
    ):
        assert cli.main(["explain", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("locallip: error: ") and error.count("\n") == 1 and message in error
