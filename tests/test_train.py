"""Recipes, their schedule, the loss, and what makes a run repeatable, resumable and the same on several processes."""

import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import two_processes
from torch import nn

from locallip_cuda import experiments, local_bounds, losses
from locallip_cuda.experiments import checkpoint, data, models
from locallip_cuda.experiments.checkpoint import CheckpointError
from locallip_cuda.experiments.distributed import Workers
from locallip_cuda.experiments.monitor import Evaluation, closeness
from locallip_cuda.experiments.network import build_model, load_model
from locallip_cuda.experiments.objective import STATISTICS, Objective
from locallip_cuda.experiments.recipes import PRESETS, Recipe, recipe
from locallip_cuda.experiments.trainer import Interrupted, Settings, Trainer, TrainingError
from locallip_cuda.propagation.training_norms import SHARE

SHORT = recipe("digits").replace(epochs=2, batch_size=256, crop=1, flip=True, sparse=0.01)


# -- recipes and schedule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "activation", "numbers"),
    [
        ("mnist-4c3f", None, ("gloro", 1.58, 1.75, 300, 0, 150, 175, 256, 1e-3, 5e-6, 0, 0.0, 2.0, 0, False)),
        ("cifar10-4c3f", None, ("bcp", 36 / 255, 0.1551, 800, 20, 400, 425, 256, 1e-3, 1e-6, 0, 0.0, 2.0, 4, True)),
        ("cifar10-6c2f", None, ("bcp", 36 / 255, 0.1551, 800, 20, 400, 425, 256, 1e-3, 1e-6, 0, 0.0, 2.0, 4, True)),
        (
            "cifar10-6c2f",
            "clipped-maxmin",
            ("bcp", 36 / 255, 0.1551, 800, 20, 400, 425, 256, 1e-3, 1e-6, 0, 0.0, 2.0, 4, True),
        ),
        (
            "tinyimagenet-8c2f",
            None,
            ("bcp", 36 / 255, 0.16, 250, 0, 125, 150, 128, 2.5e-4, 5e-7, 0, 0.01, 1.0, 4, True),
        ),
        (
            "tinyimagenet-8c2f",
            "clipped-maxmin",
            ("bcp", 36 / 255, 0.16, 250, 0, 125, 150, 128, 1e-4, 5e-7, 0, 0.01, 1.0, 4, True),
        ),
    ],
)
def test_presets_are_the_published_recipes(preset: str, activation: str | None, numbers: tuple[Any, ...]) -> None:
    """But for the iterations, which are open here."""
    r = recipe(preset, activation)
    times = (r.epochs, r.warmup_epochs, r.rampup_epochs, r.constant_epochs)
    rates = (r.batch_size, r.learning_rate, r.final_learning_rate, r.iterations)
    assert (r.loss, r.eps, r.eps_train, *times, *rates, r.sparse, r.threshold_init, r.crop, r.flip) == numbers
    assert r.activation == (activation or "clipped-relu")
    if preset == "cifar10-6c2f":
        assert (r.clip_init_first, r.clip_init_last) == (0.1, 1.2)
    if preset == "tinyimagenet-8c2f":
        assert (r.clip_init_first, r.clip_init_last, r.threshold_weight) == (0.8, 3.0, 0.1)


def test_schedule() -> None:
    r = recipe("cifar10-6c2f")
    assert [r.kappa(t) for t in (0, 19.99, 20, 120, 220, 420, 799.9)] == [1, 1, 1, 0.75, 0.5, 0, 0]
    assert [r.radius_at(t) for t in (0, 20, 420, 800)] == [0, 0, 0.1551, 0.1551]
    assert r.radius_at(220) == pytest.approx(0.1551 / 2)
    assert [r.learning_rate_at(t) for t in (0, 425)] == [1e-3, 1e-3]
    assert r.learning_rate_at(800) == pytest.approx(1e-6)
    assert r.learning_rate_at((425 + 800) / 2) == pytest.approx(math.sqrt(1e-3 * 1e-6))
    assert recipe("mnist-4c3f").kappa(0) == 1 and recipe("mnist-4c3f").kappa(75) == 0.5


@pytest.mark.parametrize("preset", PRESETS)
def test_a_shorter_run_goes_through_the_whole_schedule(preset: str) -> None:
    whole, short = recipe(preset), recipe(preset).replace(epochs=1)
    for part in torch.linspace(0, 1, 11).tolist():
        assert short.kappa(part) == pytest.approx(whole.kappa(part * whole.epochs), abs=1e-9)
        assert short.learning_rate_at(part) == pytest.approx(whole.learning_rate_at(part * whole.epochs))
    assert recipe(preset).replace(epochs=10, warmup_epochs=3).warmup_epochs == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation", "gelu"),
        ("loss", "hinge"),
        ("epochs", 0),
        ("iterations", -1),
        ("global_epochs", -0.5),
        ("batch_size", -1),
        ("learning_rate", 0.0),
        ("eps", -0.1),
        ("eps_train", math.nan),
        ("rampup_epochs", math.inf),
    ],
)
def test_a_bad_number_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field} is .*{value}"):
        dataclasses.replace(recipe("digits"), **{field: value})


def test_recipes_survive_json() -> None:
    for preset in PRESETS:
        assert Recipe.from_dict(json.loads(json.dumps(recipe(preset).to_dict()))) == recipe(preset)
    with pytest.raises(ValueError, match=r"missing fields \['seed'\] and unknown fields \['sede'\]"):
        values = recipe("digits").to_dict()
        del values["global_epochs"]  # as in a checkpoint of an earlier version
        assert Recipe.from_dict(values) == recipe("digits")
        values["sede"] = values.pop("seed")
        Recipe.from_dict(values)


# -- the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("bcp", losses.robust_cross_entropy),
        ("gloro", losses.gloro),
        ("lmt", losses.lipschitz_margin),
        ("emma", losses.emma),
        ("crm", losses.crm),
    ],
)
def test_objective_is_the_formula(kind: str, function: Callable[..., torch.Tensor]) -> None:
    numbers = dataclasses.replace(SHORT, loss=kind, sparse=0.05, threshold_weight=0.3)
    objective = Objective(build_model(numbers), numbers)
    x, y = data.load("digits", train=True).batch(torch.arange(32), torch.device("cpu"))
    assert objective.norms is not None
    bounds = local_bounds(objective.model, x, 0.3, norms=objective.norms.eval(), y=y)
    clean = F.cross_entropy(objective.model(x), y)
    certified = function(bounds, y) + 0.05 * losses.sparsity(bounds, 0.3)
    for kappa in (0.0, 0.4, 1.0):
        loss, statistics = objective(x, y, 0.3, kappa)
        torch.testing.assert_close(loss, kappa * clean + (1 - kappa) * certified)
        sums = dict(zip(STATISTICS, statistics.tolist(), strict=True))
        assert sums["samples"] == 32 and sums["bounded"] == (0 if kappa == 1 else 32)
        assert sums["correct"] == (objective.model(x).argmax(1) == y).sum()
        assert sums["certified_estimate"] == (0 if kappa == 1 else (bounds.margin(y) > 0).sum())
        assert sums["loss"] == pytest.approx(32 * loss.item(), rel=1e-5)
        if kappa < 1:  # the same, bitwise, from tensors
            eps, weight = (torch.tensor(number, dtype=torch.float64) for number in (0.3, kappa))
            again = objective(x, y, eps, weight)
            assert torch.equal(again[0], loss) and torch.equal(again[1], statistics)


def test_objective_of_the_global_bound() -> None:
    """As long as the recipe says: the published GloRo loss, with the norms kept or by a number of iterations."""
    x, y = data.load("digits", train=True).batch(torch.arange(32), torch.device("cpu"))
    for iterations in (0, 40):
        numbers = dataclasses.replace(SHORT, loss="gloro", sparse=0.05, iterations=iterations)
        objective = Objective(build_model(numbers), numbers)
        assert (objective.norms is None) == (iterations > 0)
        objective.bound = "global"
        loss, statistics = objective(x, y, 0.3, 0.0)
        model = objective.model
        logits, lipschitz = model(x), local_bounds(model, x, 0.3).global_lipschitz.item()
        last = list(model)[-1].weight
        distance = torch.cdist(last, last)[y]
        rival = (logits + 0.3 * lipschitz * distance).scatter(1, y.unsqueeze(1), -math.inf).amax(1, keepdim=True)
        torch.testing.assert_close(loss, F.cross_entropy(torch.cat([logits, rival], 1), y), rtol=1e-3, atol=0)
        sums = dict(zip(STATISTICS, statistics.tolist(), strict=True))
        assert sums["lipschitz_estimate"] == pytest.approx(32 * lipschitz, rel=1e-2)


def test_a_run_starts_with_the_global_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = dataclasses.replace(SHORT, warmup_epochs=0, global_epochs=1.4)
    seen: list[str] = []
    original = Objective.forward

    def forward(self: Objective, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(self.bound)
        return original(self, *inputs)

    monkeypatch.setattr(Objective, "forward", forward)
    _run(tmp_path, numbers)
    assert seen == ["global"] * 7 + ["local"] * 3
    assert numbers.replace(epochs=4).global_epochs == 2.8


def test_a_look_is_by_the_bound_of_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a run that was stopped in the look, and takes no step before it."""
    trainer = Trainer(SHORT.replace(epochs=1, evaluate_every=1, global_epochs=1, window=2), Settings(out=tmp_path))
    trainer.step = trainer.steps
    bounds = []

    def look(objective: Objective, *_: Any, **__: Any) -> Evaluation:
        bounds.append(objective.bound)
        return Evaluation(0.5, 0.5, 1.0)

    monkeypatch.setattr("locallip_cuda.experiments.trainer.evaluate", look)
    trainer.run()
    assert bounds == ["global"]


def test_bfloat16_bounds_are_near_float32_ones() -> None:
    x, y = data.load("digits", train=True).batch(torch.arange(64), torch.device("cpu"))
    values = {}
    for precision in ("fp32", "bf16"):
        objective = Objective(build_model(SHORT), SHORT, precision)
        loss, _ = objective(x, y, 0.3, 0.5)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())
        values[precision] = loss.item()
    assert values["bf16"] == pytest.approx(values["fp32"], rel=0.05) and values["bf16"] != values["fp32"]


def test_thresholds_start_as_the_recipe_says() -> None:
    for activation in ("clipped-relu", "clipped-maxmin"):
        numbers = dataclasses.replace(recipe("digits", activation), threshold_init=0.7, clip_init_first=0.2)
        parameters = dict(build_model(numbers).named_parameters())
        first = parameters["1.threshold" if activation == "clipped-relu" else "1.upper"]
        assert torch.all(first == (0.7 if activation == "clipped-relu" else 0.2))


# -- runs --------------------------------------------------------------------------------------------------------


def _run(out: Path, numbers: Recipe = SHORT, **settings: Any) -> Trainer:
    trainer = Trainer(numbers, Settings(out=out, **settings))
    trainer.run()
    return trainer


def _same(one: Path, other: Path) -> None:
    """Both checkpoints are bitwise the same but for the times they took."""
    (tensors, config), (tensors2, config2) = (checkpoint.load(p / checkpoint.CHECKPOINT_NAME) for p in (one, other))
    assert tensors.keys() == tensors2.keys()
    for name, value in tensors.items():
        assert torch.equal(value, tensors2[name]), name
    for c in (config, config2):
        for name in ("seconds", "memory"):
            assert c.pop(name) > 0
        for record in c["history"]:
            for name in ("seconds", "samples_per_second"):
                assert record.pop(name) >= 0  # the speed of a resumed epoch that had only its look left is 0
    assert config == config2


@pytest.fixture(scope="module", autouse=True)
def control_within_a_short_run() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("locallip_cuda.experiments.trainer.CONTROL_EVERY", 3)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    _run(out)
    return out


def test_training_learns(tmp_path: Path) -> None:
    numbers = recipe("digits").replace(epochs=5, evaluate_every=5)
    trainer = Trainer(numbers, Settings(out=tmp_path))
    evaluation = trainer.run()
    assert evaluation is not None and evaluation.accuracy > 0.8 and evaluation.certified_estimate > 0.4
    assert evaluation.certified_estimate < evaluation.accuracy


@pytest.mark.parametrize("loss", ["emma", "crm"])
def test_training_learns_with_the_loss(loss: str, tmp_path: Path) -> None:
    numbers = recipe("digits").replace(epochs=4, evaluate_every=4, warmup_epochs=1, rampup_epochs=0, loss=loss)
    trainer = Trainer(numbers, Settings(out=tmp_path))
    evaluation = trainer.run()
    values = [record["robust"] for record in trainer.history[1:]]  # one loss at one radius
    assert values[2] < values[1] < values[0]
    assert evaluation is not None and evaluation.accuracy > 0.7 and evaluation.certified_estimate > 0.2


def test_looks_say_how_close_the_norms_of_training_come(whole: Path) -> None:
    """Of the network as it is trained, by its own radius; the last look's again from the checkpoint."""
    model, numbers, config = load_model(whole / checkpoint.CHECKPOINT_NAME)
    looks = config["history"]
    assert len(looks) == 2
    for record in looks:
        assert ("closeness_mean" in record) == (record["eps"] > 0)
        if record["eps"]:
            assert 0.9 < record["closeness_worst_sample"] <= record["closeness_mean"] <= 1 / SHARE**3
            assert 0.9 < record["closeness_worst_layer"] <= 1 / SHARE
    objective = Objective(model, numbers)
    assert objective.norms is not None
    tensors, _ = checkpoint.load(whole / checkpoint.CHECKPOINT_NAME)
    objective.norms.load_state_dict(checkpoint.group(tensors, "norms"))
    again = closeness(objective, data.load("digits", train=True), looks[-1]["eps"])
    assert again == pytest.approx({name: looks[-1][name] for name in again}, rel=1e-5)


def test_same_seed_same_run(tmp_path: Path, whole: Path) -> None:
    _run(tmp_path)
    _same(tmp_path, whole)
    other = _run(tmp_path / "other", dataclasses.replace(SHORT, seed=1))
    first = load_model(whole / checkpoint.CHECKPOINT_NAME)[0]
    assert not torch.equal(other.model[0].weight, first[0].weight)


@pytest.mark.parametrize(
    ("step", "number"),
    [(1, signal.SIGINT), (3, signal.SIGTERM), (5, signal.SIGINT), (8, signal.SIGINT), (10, signal.SIGINT)],
)
def test_resume_is_exact(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals
) -> None:
    """Stopped by a signal in the middle of an epoch or at its end (5 steps each), then continued."""
    done = 0
    original = Trainer._train_step

    def stop_after(*inputs: Any) -> None:
        nonlocal done
        original(*inputs)
        done += 1
        if done == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "_train_step", stop_after)
    handler_before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as stop:
        _run(tmp_path)
    assert stop.value.number == number and signal.getsignal(signal.SIGINT) is handler_before
    config = checkpoint.load(stop.value.path)[1]
    assert config["position"] == {"epoch": (step - 1) // 5, "step": (step - 1) % 5 + 1}
    torch.rand(3)  # another process would have used its random numbers otherwise
    _run(tmp_path, resume=True)
    assert done == 10
    _same(tmp_path, whole)


def test_resume_goes_on_with_the_random_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in a step draws from torch's generator yet; whatever comes to do so draws the same after a resume."""
    numbers, drawn, stop = dataclasses.replace(SHORT, epochs=1), [], 0
    original = Trainer._train_step

    def draw(*inputs: Any) -> None:
        original(*inputs)
        drawn.append(torch.rand(1).item())
        if len(drawn) == stop:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_train_step", draw)
    _run(tmp_path / "whole", numbers)
    whole, drawn[:], stop = list(drawn), [], 2
    with pytest.raises(Interrupted):
        _run(tmp_path / "stopped", numbers)
    torch.rand(3)
    _run(tmp_path / "stopped", numbers, resume=True)
    assert drawn == whole and len(set(whole)) == 5


def test_resume_only_what_is_there(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint file"):
        _run(tmp_path, resume=True)
    with pytest.raises(FileExistsError, match="exists; resume it, overwrite it"):
        _run(whole)
    with pytest.raises(CheckpointError, match=r"its run has seed 0, not 5"):
        _run(whole, dataclasses.replace(SHORT, seed=5), resume=True)
    before = (whole / checkpoint.CHECKPOINT_NAME).read_bytes()
    trainer = Trainer(SHORT, Settings(out=whole, resume=True))
    assert trainer.epoch == 2 and trainer.run() is None
    assert (whole / checkpoint.CHECKPOINT_NAME).read_bytes() == before


def test_histories_of_earlier_versions_have_the_names_of_now(tmp_path: Path, whole: Path) -> None:
    tensors, config = checkpoint.load(whole / checkpoint.CHECKPOINT_NAME)
    now = config["history"]
    earlier = {"accuracy": "correct", "closeness_worst_sample": "closeness_worst"}
    earlier["closeness_worst_layer"] = "closeness_layer"
    assert earlier.keys() <= now[1].keys()
    before = [{earlier.get(name, name): value for name, value in record.items()} for record in now]
    checkpoint.save(tmp_path / checkpoint.CHECKPOINT_NAME, tensors, {**config, "history": before})
    assert Trainer(SHORT, Settings(out=tmp_path, resume=True)).history == now


def test_incomplete_training_state_is_refused(tmp_path: Path, whole: Path) -> None:
    tensors, config = checkpoint.load(whole / checkpoint.CHECKPOINT_NAME)
    path = tmp_path / checkpoint.CHECKPOINT_NAME
    name = next(n for n in tensors if n.startswith("optimiser/") and n.endswith("0.weight/exp_avg"))
    checkpoint.save(path, {n: t for n, t in tensors.items() if n != name}, config)
    with pytest.raises(CheckpointError, match=r"Adam's state of '0\.weight' is incomplete"):
        _run(tmp_path, resume=True)
    checkpoint.save(path, tensors, {"something": "else"})
    with pytest.raises(CheckpointError, match="its configuration is not a training run's"):
        _run(tmp_path, resume=True)


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:  # the first checkpoint takes two, its file and its folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device; the previous file is kept"):
        _run(tmp_path)
    assert checkpoint.load(tmp_path / checkpoint.CHECKPOINT_NAME)[1]["position"] == {"epoch": 1, "step": 0}
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))
    _run(tmp_path, resume=True)
    _same(tmp_path, whole)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Objective.forward

    def poisoned(self: Objective, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, statistics = original(self, *inputs)
        return loss, statistics * math.nan

    _run(tmp_path, dataclasses.replace(SHORT, epochs=1))
    before = (tmp_path / checkpoint.CHECKPOINT_NAME).read_bytes()
    monkeypatch.setattr(Objective, "forward", poisoned)
    with pytest.raises(TrainingError, match="the loss of epoch 1 is nan"):
        _run(tmp_path, overwrite=True)
    assert (tmp_path / checkpoint.CHECKPOINT_NAME).read_bytes() == before


@pytest.mark.parametrize("poison", ["loss", "weights"])
def test_what_is_no_number_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: str) -> None:
    """Neither by a signal in the middle of an epoch nor when only its last step spoils the weights."""
    numbers = dataclasses.replace(SHORT, epochs=1)
    _run(tmp_path, numbers)
    before = (tmp_path / checkpoint.CHECKPOINT_NAME).read_bytes()
    original = Trainer._train_step

    def spoil(self: Trainer, *inputs: Any) -> None:
        original(self, *inputs)
        if poison == "loss" and self.step == 2:
            self.totals *= math.nan
            os.kill(os.getpid(), signal.SIGINT)
        if poison == "weights" and self.step == 4:
            self.model[0].weight.data[0] = math.inf

    monkeypatch.setattr(Trainer, "_train_step", spoil)
    message = {"loss": "the loss of epoch 1 is nan", "weights": "weights are no numbers in epoch 1"}[poison]
    with pytest.raises(TrainingError, match=message):
        _run(tmp_path, numbers, overwrite=True)
    assert (tmp_path / checkpoint.CHECKPOINT_NAME).read_bytes() == before


def test_thresholds_stay_in_range(tmp_path: Path) -> None:
    numbers = dataclasses.replace(SHORT, epochs=1, threshold_init=0.0, learning_rate=0.05)
    thresholds = [p for n, p in _run(tmp_path, numbers).model.named_parameters() if n.endswith("threshold")]
    assert all((t >= 0).all() for t in thresholds)
    assert any((t == 0).any() for t in thresholds) and any((t > 0).any() for t in thresholds)


def test_a_batch_too_large_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be at most the 1437 images"):
        _run(tmp_path, dataclasses.replace(SHORT, batch_size=1438))


@pytest.mark.parametrize("preset", PRESETS)
def test_checkpoints_of_every_preset_load(tmp_path: Path, preset: str) -> None:
    numbers = recipe(preset)
    model = build_model(numbers)
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    checkpoint.save(tmp_path / "c", tensors, {"recipe": numbers.to_dict()})
    loaded, found, _ = load_model(tmp_path / "c")
    assert found == numbers and not loaded.training
    x = torch.rand(2, *models.spec(preset).input_shape)
    assert torch.equal(model(x), loaded(x))


# -- in Python ---------------------------------------------------------------------------------------------------


def test_load(tmp_path: Path, whole: Path) -> None:
    """From a run's folder or its file, into a network that is built or given."""
    expected, _, _ = load_model(whole / checkpoint.CHECKPOINT_NAME)
    x = torch.rand(3, 1, 8, 8)
    drawn = []
    for path in (whole, str(whole / checkpoint.CHECKPOINT_NAME)):
        found = experiments.load(path)
        drawn.append(torch.rand(1).item())  # loading does not seed
        assert not found.training and torch.equal(found(x), expected(x))
    assert drawn[0] != drawn[1]
    own = models.build("digits", "clipped-relu").train()
    assert experiments.load(whole, own) is own and not own.training and torch.equal(own(x), expected(x))


def test_load_says_what_does_not_fit(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint file"):
        experiments.load(tmp_path)
    with pytest.raises(TypeError, match=r"model: got type, want a torch\.nn\.Module or None"):
        experiments.load(whole, nn.Identity)  # type: ignore[arg-type]
    other = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())
    before = other[0].weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"tensor '0\.weight' is torch\.float32"):
        experiments.load(whole, other)
    assert torch.equal(other[0].weight, before) and other.training
    tensors, config = checkpoint.load(whole / checkpoint.CHECKPOINT_NAME)
    recipe_of_own = {**config["recipe"], "model": "somewhere:Net"}
    checkpoint.save(tmp_path / checkpoint.CHECKPOINT_NAME, tensors, {**config, "recipe": recipe_of_own})
    with pytest.raises(ValueError, match="model: got None, want the network of somewhere:Net, which .* trained with"):
        experiments.load(tmp_path)
    experiments.load(tmp_path, models.build("digits", "clipped-relu"))


# -- several processes -------------------------------------------------------------------------------------------


def _torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, *command], capture_output=True, text=True, env=environment, timeout=240)


def test_two_processes_do_as_one(tmp_path: Path) -> None:
    """The same gradients, the same run from the command line, and the same again when it is stopped and resumed."""
    done = _torchrun(two_processes.__file__, str(tmp_path))
    assert done.returncode == 0, done.stderr
    together = safetensors.torch.load_file(tmp_path / "gradients")
    numbers = two_processes.NUMBERS
    objective = Objective(build_model(numbers), numbers)
    for kappa in two_processes.KAPPAS:
        alone = two_processes.gradients(objective, Workers(), numbers, kappa)
        for name, gradient in alone.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(together[f"{kappa}/{name}"], gradient, rtol=1e-3, atol=1e-6)

    options = ["--epochs", "2", "--batch-size", "64", "--device", "cpu", "--out", str(tmp_path / "whole")]
    done = _torchrun("-m", "locallip_cuda", "train", "digits", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/2: ") == 1
    _same(tmp_path / "whole", tmp_path / "resumed")
    tensors, config = checkpoint.load(tmp_path / "whole" / checkpoint.CHECKPOINT_NAME)
    assert config["processes"] == 2 and {"random/cpu/0", "random/cpu/1"} <= tensors.keys()
    single = _run(tmp_path / "single", two_processes.SHORT).history[0]
    for name in ("loss", "clean", "robust", "lipschitz_estimate"):
        assert config["history"][0][name] == pytest.approx(single[name], rel=1e-2)


def test_a_batch_that_processes_cannot_share_is_named(tmp_path: Path) -> None:
    workers = Workers()
    workers.count = 3
    with pytest.raises(ValueError, match="batch_size is 256; it must be a multiple of the 3 processes"):
        Trainer(SHORT, Settings(out=tmp_path), workers)
