"""The training step: eager, as a CUDA graph, and that nothing in it goes through the host."""

import copy
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from locallip_cuda.experiments import checkpoint, data
from locallip_cuda.experiments.network import build_model
from locallip_cuda.experiments.objective import Objective
from locallip_cuda.experiments.recipes import Recipe, recipe
from locallip_cuda.experiments.trainer import Interrupted, Settings, Trainer
from locallip_cuda.experiments.training_step import TrainingStep, adam
from locallip_cuda.nn import project_thresholds_

NUMBERS = dataclasses.replace(recipe("digits"), iterations=2, sparse=0.05, threshold_init=0.2)
# thresholds that leave their range within a few steps, for the projection to bring back
NEAR_ZERO = {"threshold_init": 2e-3, "clip_init_first": 2e-3, "clip_init_last": 2e-3}
BATCH = 16
# eps, kappa and learning rate of 12 steps: the bounds come in after the fifth, and once it goes back to plain training
SCHEDULE = [(0.0, 1.0, 2e-3 - 1e-4 * k) for k in range(5)]
SCHEDULE += [(0.04 * k, 1 - 0.1 * k, 1e-3 / k) for k in range(1, 7)]
SCHEDULE += [(0.0, 1.0, 1e-3)]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def _step(
    numbers: Recipe = NUMBERS, device: str = "cpu", precision: str = "fp32", capture: bool = False
) -> tuple[TrainingStep, nn.Sequential, torch.optim.Adam]:
    """A step as on a GPU: Adam with its state on the device and over all parameters at once."""
    model = build_model(numbers).to(device)
    optimiser = adam(model.parameters(), 1e-3, capture=True)
    optimiser.param_groups[0]["foreach"] = True
    return TrainingStep(Objective(model, numbers, precision), optimiser, capture=capture), model, optimiser


def _batches(device: str = "cpu", size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    dataset = data.load("digits", train=True).to(device)
    return data.Batches(dataset, size, device=device, shuffle=True, drop_last=True).epoch()


def _run(step: TrainingStep, device: str = "cpu") -> list[Tensor]:
    return [step(x, y, *numbers).clone() for (x, y), numbers in zip(_batches(device), SCHEDULE, strict=False)]


def _loop(model: nn.Sequential, optimiser: torch.optim.Adam, numbers: Recipe, precision: str) -> list[Tensor]:
    """The same steps written out, with numbers for what they keep in tensors."""
    objective, found = Objective(model, numbers, precision), []
    for (x, y), (eps, kappa, learning_rate) in zip(_batches(), SCHEDULE, strict=False):
        optimiser.param_groups[0]["lr"] = torch.tensor(learning_rate)
        optimiser.zero_grad()
        loss, statistics = objective(x, y, eps, kappa)
        loss.backward()
        optimiser.step()
        project_thresholds_(model)
        found.append(statistics)
    return found


@pytest.fixture
def capturable_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam does without the host on accelerators only, as torch has it; its arithmetic could everywhere."""
    supported = ["cpu", "cuda", "meta"]
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_get_capturable_supported_devices", lambda **_: supported)


# -- without the host --------------------------------------------------------------------------------------------


class _NoCpuTensors(TorchDispatchMode):
    """Refuses operations that take or make a tensor on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            device = leaf.device if isinstance(leaf, Tensor) else leaf
            if isinstance(device, torch.device) and device.type == "cpu":
                raise RuntimeError(f"{func} goes through the host")
        return func(*args, **(kwargs or {}))


class _NoCopiedNumbers(TorchFunctionMode):
    """Refuses to make tensors from what the host holds: on a GPU a copy that waits, on the meta device none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor):
            raise RuntimeError(f"{func.__name__} goes through the host")
        return func(*args, **(kwargs or {}))


def _steps_off_the_host(monkeypatch: pytest.MonkeyPatch, numbers: Recipe) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _=None: False)  # which does not know the device
    step, _, _ = _step(numbers, "meta")
    x, y = torch.empty(BATCH, 1, 8, 8, device="meta"), torch.empty(BATCH, dtype=torch.int64, device="meta")
    with _NoCpuTensors(), _NoCopiedNumbers():  # and on the meta device there are no values to be read
        for _ in range(2):  # Adam makes its state in the first one
            for kappa in (1.0, 0.5):
                statistics = step(x, y, 0.3, kappa, 1e-3)
                assert statistics.is_meta and statistics.dtype == torch.float64


@pytest.mark.usefixtures("capturable_everywhere")
@pytest.mark.parametrize("radius", ["local", "global"])
@pytest.mark.parametrize("activation", ["clipped-relu", "clipped-maxmin", "maxmin"])
@pytest.mark.parametrize("loss", ["bcp", "gloro", "lmt", "emma", "crm"])
def test_nothing_goes_through_the_host(
    monkeypatch: pytest.MonkeyPatch, loss: str, activation: str, radius: str
) -> None:
    numbers = dataclasses.replace(recipe("digits", activation), loss=loss, radius=radius, sparse=0.05)
    _steps_off_the_host(monkeypatch, numbers)
    _steps_off_the_host(monkeypatch, dataclasses.replace(numbers, iterations=2))


@pytest.mark.usefixtures("capturable_everywhere")
@pytest.mark.parametrize("iterations", [0, 2])
def test_nothing_of_the_global_bound_goes_through_the_host(monkeypatch: pytest.MonkeyPatch, iterations: int) -> None:
    monkeypatch.setattr(Objective, "bound", property(lambda _: "global", lambda *_: None), raising=False)
    _steps_off_the_host(monkeypatch, dataclasses.replace(recipe("digits"), iterations=iterations))


@pytest.mark.usefixtures("capturable_everywhere")
@pytest.mark.parametrize(
    ("reads", "message"),
    [
        (lambda s: s * s.sum().item(), "cannot be called on meta tensors"),
        (lambda s: s if bool(s.isfinite().all()) else -s, "cannot be called on meta tensors"),
        (lambda s: s[s > 0], "nonzero"),
        (lambda s: s + torch.as_tensor(1.0, device=s.device), "as_tensor goes through the host"),
        (lambda s: s + torch.tensor([1.0], device=s.device), "tensor goes through the host"),
        (lambda s: s * torch.ones(()), "aten.ones.default goes through the host"),
    ],
    ids=["item", "bool", "index by mask", "number", "list", "tensor on the host"],
)
def test_what_goes_through_the_host_is_seen(
    monkeypatch: pytest.MonkeyPatch, reads: Callable[[Tensor], Tensor], message: str
) -> None:
    original = Objective.forward

    def forward(self: Objective, *inputs: Any) -> tuple[Tensor, Tensor]:
        loss, statistics = original(self, *inputs)
        return loss, reads(statistics)

    monkeypatch.setattr(Objective, "forward", forward)
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        _steps_off_the_host(monkeypatch, NUMBERS)


# -- capture and replay, on stand-ins ----------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result


def _memory(tree: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tree_leaves(tree) if isinstance(t, Tensor)}


class _StandIn:
    """torch.cuda's streams and graphs on the CPU: a replay does the recorded operations again, on the same memory.

    As on a GPU a capture leaves ``state`` as it was, and numbers of the host stay what they were when captured.
    """

    def __init__(self, state: Callable[[], list[Tensor]]) -> None:
        self.events: list[str] = []
        self.graphs = 0
        events, stand_in = self.events, self

        class Stream:
            def __init__(self, device: torch.device, name: str = "side") -> None:
                self.device, self.name = device, name

            def wait_stream(self, other: "Stream") -> None:
                events.append(f"{self.name} waits for {other.name}")

        class CUDAGraph:
            def __init__(self) -> None:
                stand_in.graphs += 1
                self.number = stand_in.graphs
                self.recorder = _Recorder()

            @torch.no_grad()
            def replay(self) -> None:
                events.append(f"replay {self.number}")
                for func, args, kwargs, result in self.recorder.operations:
                    again = func(*args, **kwargs)
                    if not _memory(result) & _memory((args, kwargs)):  # neither in place nor a view
                        pairs = zip(tree_leaves(result), tree_leaves(again), strict=True)
                        for old, new in pairs:
                            if isinstance(old, Tensor):
                                old.copy_(new)

        @contextmanager
        def graph(cuda_graph: CUDAGraph, stream: Stream) -> Iterator[None]:
            assert stream.name == "side"
            events.append(f"capture {cuda_graph.number}")
            before = [(t, t.detach().clone()) for t in state()]
            with cuda_graph.recorder:
                yield
            with torch.no_grad():
                for t, value in before:
                    t.copy_(value)

        @contextmanager
        def stream(side: Stream) -> Iterator[None]:
            events.append(f"run on {side.name}")
            yield

        self.replacements = {
            "Stream": Stream,
            "CUDAGraph": CUDAGraph,
            "graph": graph,
            "stream": stream,
            "current_stream": lambda device: Stream(device, "current"),
        }


def _stand_in(monkeypatch: pytest.MonkeyPatch, objective: nn.Module, optimiser: torch.optim.Adam) -> list[str]:
    def state() -> list[Tensor]:
        moments = [t for moments in optimiser.state.values() for t in moments.values()]
        assert all(p.grad is None for p in objective.parameters())  # which a capture has to allocate
        return [*objective.parameters(), *objective.buffers(), *moments]

    stand_in = _StandIn(state)
    for name, replacement in stand_in.replacements.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    return stand_in.events


WARM_UP = ["side waits for current", "run on side", "current waits for side"]


@pytest.mark.usefixtures("capturable_everywhere")
@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize(
    ("activation", "loss", "precision"),
    [
        ("clipped-relu", "bcp", "fp32"),
        ("clipped-relu", "bcp", "bf16"),
        ("clipped-maxmin", "gloro", "fp32"),
        ("maxmin", "lmt", "fp32"),
    ],
)
def test_steps_are_those_of_a_loop(
    monkeypatch: pytest.MonkeyPatch, activation: str, loss: str, precision: str, capture: bool
) -> None:
    """Bitwise, though batch, eps, kappa and learning rate change in every step; and in the right order."""
    numbers = dataclasses.replace(recipe("digits", activation), loss=loss, sparse=0.05, **NEAR_ZERO)
    _, expected, adam_expected = _step(numbers)
    statistics_expected = _loop(expected, adam_expected, numbers, precision)
    step, model, optimiser = _step(numbers, precision=precision, capture=capture)
    events = _stand_in(monkeypatch, step._objective, optimiser)
    statistics = _run(step)
    plain = [*WARM_UP * 3, "capture 1", "replay 1", "replay 1"]
    bounded = [*WARM_UP * 3, "capture 2", "replay 2", "replay 2", "replay 2"]
    assert events == ([*plain, *bounded, "replay 1"] if capture else [])
    assert torch.equal(torch.stack(statistics), torch.stack(statistics_expected))
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q), name
        for key, value in optimiser.state[p].items():
            assert torch.equal(value, adam_expected.state[q][key]), (name, key)
        assert optimiser.state[p]["step"] == len(SCHEDULE)


@pytest.mark.usefixtures("capturable_everywhere")
@pytest.mark.parametrize("capture", [False, True])
def test_other_launches_are_another_graph(monkeypatch: pytest.MonkeyPatch, capture: bool) -> None:
    """Iterations that control changes, and the bound: warmed up and captured anew, and the same as eager steps."""
    numbers = recipe("digits")
    results = []
    for captured in (False, capture):
        model = build_model(numbers)
        objective = Objective(model, numbers)
        optimiser = adam(model.parameters(), 1e-3, capture=True)
        optimiser.param_groups[0]["foreach"] = True
        step = TrainingStep(objective, optimiser, capture=captured, launches=objective.launches)
        assert objective.norms is not None
        with monkeypatch.context() as patch:
            events = _stand_in(patch, objective, optimiser)
            statistics = []
            for number, (x, y) in zip(range(15), _batches(), strict=False):
                if number == 5:
                    objective.norms.iterations = [4, 4, 9]
                if number == 10:
                    objective.bound = "global"
                statistics.append(step(x, y, 0.1, 0.5, 1e-3).clone())
        replays = [event for event in events if event.split()[0] in ("capture", "replay")]
        each = [f"{event} {graph}" for graph in (1, 2, 3) for event in ("capture", "replay", "replay")]
        assert replays == (each if captured else [])
        results.append((torch.stack(statistics), list(model.parameters()), list(objective.norms.buffers())))
    for (name, one), other in zip(zip("spn", results[0], strict=True), results[1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), name


@pytest.mark.usefixtures("capturable_everywhere")
def test_a_captured_run_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after its capture, it goes on with steps that warm up and a capture of its own."""
    events: list[list[str]] = []

    def captured(
        objective: nn.Module, optimiser: torch.optim.Adam, *, capture: bool, launches: Callable[[], Hashable]
    ) -> TrainingStep:
        assert not capture  # what the trainer wants on a CPU
        events.append(_stand_in(monkeypatch, objective, optimiser))
        return TrainingStep(objective, optimiser, capture=True, launches=launches)

    loop = "locallip_cuda.experiments.trainer"
    monkeypatch.setattr(f"{loop}.adam", lambda weights, rate, capture: adam(weights, rate, capture=True))
    monkeypatch.setattr(f"{loop}.TrainingStep", captured)
    numbers = recipe("digits").replace(epochs=2, batch_size=256, warmup_epochs=0)
    Trainer(numbers, Settings(out=tmp_path / "whole")).run()
    original = Trainer._train_step

    def stop(self: Trainer, *inputs: Any) -> None:
        original(self, *inputs)
        if (self.epoch, self.step) == (0, 4):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_train_step", stop)
    with pytest.raises(Interrupted):
        Trainer(numbers, Settings(out=tmp_path / "stopped")).run()
    Trainer(numbers, Settings(out=tmp_path / "stopped", resume=True)).run()
    assert [[e.split()[0] for e in run].count("replay") for run in events] == [6, 1, 2]
    whole, stopped = (checkpoint.load(tmp_path / name / checkpoint.CHECKPOINT_NAME)[0] for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys() and all(torch.equal(value, stopped[name]) for name, value in whole.items())


@pytest.mark.usefixtures("capturable_everywhere")
def test_a_captured_step_takes_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    step, model, optimiser = _step(capture=True)
    _stand_in(monkeypatch, model, optimiser)
    x, y = next(_batches())
    step(x, y, 0.1, 0.5, 1e-3)
    before = copy.deepcopy(model.state_dict())
    for given, name in (((x[1:], y[1:]), "x"), ((x, y[1:]), "y")):
        with pytest.raises(ValueError, match=rf"{name}: got shape \(15,.*want the first batch's, \(16,"):
            step(*given, 0.1, 0.5, 1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- Adam's state ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("capturable_everywhere")
def test_state_of_adam_moves_between_devices() -> None:
    """What a checkpoint holds, tensors on the CPU, suits both kinds; each has it where it needs it."""
    x, y = next(_batches())
    model = build_model(NUMBERS)
    plain = adam(model.parameters(), 1e-3, capture=False)
    TrainingStep(Objective(model, NUMBERS), plain, capture=False)(x, y, 0.1, 0.5, 1e-3)
    assert plain.param_groups[0]["lr"] == 1e-3 and not isinstance(plain.param_groups[0]["lr"], Tensor)
    stored = plain.state_dict()["state"]

    there = build_model(NUMBERS).to("meta")
    captured = adam(there.parameters(), 1e-3, capture=True)
    captured.load_state_dict({"state": stored, "param_groups": captured.state_dict()["param_groups"]})
    assert captured.param_groups[0]["lr"].is_meta
    for state in captured.state.values():
        assert all(value.is_meta for value in state.values()) and state["step"].dtype == torch.float32

    step, model, captured = _step()
    step(x, y, 0.1, 0.5, 1e-3)
    back = adam(build_model(NUMBERS).parameters(), 1e-3, capture=False)
    groups = back.state_dict()["param_groups"]
    back.load_state_dict({"state": captured.state_dict()["state"], "param_groups": groups})
    assert back.param_groups[0]["capturable"] is False
    for mine, theirs in zip(back.state.values(), captured.state.values(), strict=True):
        assert tree_map(lambda t: (t.device, t.dtype, t.shape), mine) == {
            key: (torch.device("cpu"), value.dtype, value.shape) for key, value in theirs.items()
        }
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items())


# -- on a GPU ----------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("loss", ["bcp", "gloro", "lmt", "emma", "crm"])
def test_captured_steps_are_the_eager_ones_on_a_gpu(loss: str, precision: str) -> None:
    numbers = dataclasses.replace(NUMBERS, loss=loss)
    eager, expected, _ = _step(numbers, "cuda", precision)
    captured, model, _ = _step(numbers, "cuda", precision, capture=True)
    statistics, statistics_expected = _run(captured, "cuda"), _run(eager, "cuda")
    torch.testing.assert_close(torch.stack(statistics), torch.stack(statistics_expected), rtol=1e-4, atol=1e-4)
    for (name, p), q in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], rtol=1e-3, atol=1e-4, msg=name)


@needs_gpu
def test_a_step_never_waits_for_the_gpu() -> None:
    step, _, _ = _step(device="cuda")
    batches = list(zip(_batches("cuda"), SCHEDULE, strict=False))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for (x, y), numbers in batches:
            step(x, y, *numbers)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_run_moves_between_cpu_and_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _move(tmp_path, monkeypatch, ["cpu", "cuda", "cpu"])


def _move(out: Path, monkeypatch: pytest.MonkeyPatch, devices: list[str]) -> None:
    """A run that is stopped in the middle of every epoch but the last and goes on at the next device."""
    original = Trainer._train_step

    def stop_in_the_middle(self: Trainer, *inputs: Any) -> None:
        original(self, *inputs)
        if self.step == 2 and self.epoch < len(devices) - 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_train_step", stop_in_the_middle)
    numbers = recipe("digits").replace(epochs=len(devices), batch_size=256)  # 5 steps an epoch
    for done, device in enumerate(devices):
        trainer = Trainer(numbers, Settings(out=out, device=torch.device(device), resume=done > 0))
        last = done == len(devices) - 1
        with nullcontext() if last else pytest.raises(Interrupted):
            trainer.run()
        for state in trainer.optimiser.state.values():
            assert state["step"].device.type == device and state["step"] == 5 * done + (5 if last else 3)
    assert len(trainer.history) == len(devices)


def test_batch_norm_keeps_its_statistics() -> None:
    """Those of a batch mix its samples, and have no bound."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    objective = Objective(model, NUMBERS)
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    for _ in range(2):
        assert model.training and not model[1].training
        loss, _ = objective(x, y, 0.1, 0.5)
        loss.backward()
        objective.eval()
        objective.train()
    assert model[1].running_mean.eq(0).all() and model[1].weight.grad.ne(0).any()
