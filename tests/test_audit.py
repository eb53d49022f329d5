"""Certificates that are written down and audited: true ones are confirmed, and whatever is changed in them shows."""

from __future__ import annotations

import ast
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor, nn

import locallip_cuda as ll
from locallip_cuda.experiments import audit, cli, data, exact_norms, witness
from locallip_cuda.experiments.audit import Audited, Auditor, Verdict
from locallip_cuda.experiments.exact_norms import Finding, examined
from locallip_cuda.experiments.sequential import steps
from locallip_cuda.experiments.witness import WitnessError
from locallip_cuda.nn import ClippedReLU
from tests.exact import Exact, operator_matrix, plane_network, rational

Change = Callable[[dict[str, Any]], None]
PICTURE = data.Dataset("pictures", torch.arange(36, dtype=torch.uint8).view(1, 1, 6, 6) * 7, torch.tensor([0]), 3)


def recorded(model: nn.Module, x: Tensor, y: Tensor, eps: float, path: Path) -> ll.LocalBounds:
    """Deterministic bounds, and their witness at ``path``."""
    recorder = witness.Recorder(path, witness.weights_digest(model), "", afresh=True)
    bounds = ll.local_bounds(model, x, eps, guarantee="deterministic")
    recorder.keep(range(len(x)), x, y, bounds)
    assert recorder.finish() == len(x), "all are certified"
    return bounds


def changed(path: Path, change: Change) -> Path:
    """A copy with other arrays."""
    arrays = dict(np.load(path, allow_pickle=False))
    change(arrays)
    other = path.with_name("changed.npz")
    np.savez(other, **arrays)
    return other


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short training on digits, certified, with a witness of the first samples."""
    out = tmp_path_factory.mktemp("run")
    assert (
        cli.main(["train", "digits", "--device", "cpu", "--epochs", "3", "--batch-size", "256", "--out", str(out)]) == 0
    )
    certify = ["certify", str(out), "--guarantee", "deterministic", "--eps", "0.03", "--save", "--attack-steps", "2"]
    assert cli.main([*certify, "--limit", "8", "--device", "cpu", "--batch-size", "3"]) == 0
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A network with clipped ReLUs in which every layer loses rows and columns, and a witness of PICTURE."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        ClippedReLU((4, 6, 6), 0.2),
        nn.Flatten(),
        nn.Linear(144, 12),
        ClippedReLU(12, 0.2),
    )
    model.append(nn.Linear(12, 3))
    x, _ = PICTURE.batch(torch.arange(1))
    path = tmp_path_factory.mktemp("small") / witness.NAME
    bounds = recorded(model, x, model(x).argmax(1), 0.01, path)
    assert all(0 < mask.float().mean() < 1 for mask in (*bounds.row_masks, *bounds.column_masks))
    return model, path


def audited(model: nn.Module, path: Path, dataset: data.Dataset | None = None) -> Audited:
    return Auditor(model, witness.read(path), dataset).audit(0)


# --- true certificates ------------------------------------------------------------------------------------------------


def test_a_run_is_confirmed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    certified = [
        sample["index"]
        for sample in json.loads((run / "certify.json").read_text())["result"]["per_sample"]
        if sample["guarantees"].get("deterministic", {}).get("certified")
    ]
    assert len(certified) >= 4 and witness.read(run / witness.NAME).arrays["index"].tolist() == certified
    assert not (run / "certify.witness.parts").exists()
    capsys.readouterr()
    assert cli.main(["audit", str(run), "--limit", "2"]) == 0
    printed = capsys.readouterr().out
    assert f"2 of {len(certified)} certificates of digits, l2 radius 0.03" in printed and "seconds a sample" in printed
    written = json.loads((run / "certify.witness.npz.audit.json").read_text())
    assert [sample["index"] for sample in written["samples"]] == certified[:2] and written["compared_with"] == "digits"
    for sample in written["samples"]:
        assert sample["verdict"] == "confirmed" and not sample["notes"] and sample["label"] in range(10)
        # the global bound, which has no box, may have certified it
        assert 0 < sample["margin_claimed"] <= sample["margin_derived"]
        assert all(sample["seconds"][stage] > 0 for stage in audit.STAGES)


@pytest.mark.parametrize("name", ["relu", "clipped-relu", "maxmin", "clipped-maxmin"])
@pytest.mark.parametrize("seed", range(3))
def test_derived_margins(name: str, seed: int, tmp_path: Path) -> None:
    """Those of the bounds, and at most the network's own, cut into its linear pieces in rationals."""
    model, x = plane_network(name, seed, 2, torch.float32), torch.tensor([[0.3, -0.2]])
    eps = 0.005
    y = model(x).argmax(1)
    bounds = recorded(model, x, y, eps, tmp_path / witness.NAME)
    done = audited(model, tmp_path / witness.NAME)
    assert done.verdict is Verdict.CONFIRMED, done.notes
    assert float(bounds.margin(y)) <= done.margin <= float(bounds.margin(y)) * (1 + 1e-9)
    assert rational(done.margin) <= Exact(model, x[0], eps).margin(int(y))


def test_a_mask_may_keep_more(small: tuple[nn.Module, Path]) -> None:
    model, path = small

    def keep(arrays: dict[str, Any]) -> None:
        arrays["columns_1"][:] = 255

    assert audited(model, changed(path, keep)).verdict is Verdict.CONFIRMED


def test_a_module_at_two_places_counts_at_both() -> None:
    shared = nn.Linear(4, 4)
    nested = nn.Sequential(nn.Sequential(shared, nn.ReLU()), shared, nn.ReLU(), nn.Linear(4, 2))
    assert [(step.path, type(step.activation)) for step in steps(nested, (4,))] == [
        ("0.0", nn.ReLU),
        ("1", nn.ReLU),
        ("3", type(None)),
    ]


def test_batches_of_a_stopped_run_are_kept_once(small: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, _ = small
    x = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    for chosen, afresh in ((slice(0, 2), True), (slice(1, 3), False), (slice(0, 1), False)):
        recorder = witness.Recorder(tmp_path / witness.NAME, "", "", afresh=afresh)
        bounds = ll.local_bounds(model, x[chosen], 1e-4, guarantee="deterministic")
        recorder.keep(range(3)[chosen], x[chosen], y[chosen], bounds)
    recorder.keep([3], x[:1], y[:1], ll.local_bounds(model, x[:1], 100.0, guarantee="deterministic"))
    assert recorder.finish() == 3, "of what is certified"
    arrays = witness.read(tmp_path / witness.NAME).arrays
    assert arrays["index"].tolist() == [0, 1, 2] and np.array_equal(arrays["x"], x.numpy())
    again = witness.Recorder(tmp_path / witness.NAME, "", "", afresh=True)
    assert again.finish() == 0 and not (tmp_path / witness.NAME).exists()


# --- false ones -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_a_smaller_norm_is_refuted(small: tuple[nn.Module, Path], layer: int) -> None:
    model, path = small

    def lower(arrays: dict[str, Any]) -> None:
        arrays["norms"][0, layer] *= 1 - 1e-3

    done = audited(model, changed(path, lower))
    assert done.verdict is Verdict.REFUTED
    [(_, note)] = done.notes
    assert note.startswith(f"norm of layer {'03'[layer]!r}: claimed") and "below the norm" in note


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["clipped-relu", "clipped-maxmin"])
def test_a_unit_too_few_is_refuted(name: str, kind: str, layer: int, tmp_path: Path) -> None:
    model, x = plane_network(name, 1, 2, torch.float32), torch.tensor([[0.3, -0.2]])
    recorded(model, x, model(x).argmax(1), 0.05, tmp_path / witness.NAME)
    units = (8, 6)[layer]
    mask = witness.read(tmp_path / witness.NAME).mask(kind, layer, 0, units)
    assert mask.any()
    for unit in np.flatnonzero(mask).tolist():
        fewer = mask.copy()
        fewer[unit] = False

        def clear(arrays: dict[str, Any], fewer: Any = fewer) -> None:
            arrays[f"{kind}_{layer}"] = np.packbits(fewer)[None]

        done = audited(model, changed(tmp_path / witness.NAME, clear))
        assert done.verdict is Verdict.REFUTED
        note = f"{kind} of layer {'02'[layer]!r}: unit {unit} is left out, and can vary"
        assert (Verdict.REFUTED, note) in done.notes


def test_a_larger_margin_is_not_confirmed(small: tuple[nn.Module, Path]) -> None:
    model, path = small
    for factor, verdict in ((1 + 1e-6, Verdict.OPEN), (1e3, Verdict.REFUTED), (0.0, Verdict.REFUTED)):

        def scale(arrays: dict[str, Any], factor: float = factor) -> None:
            arrays["margin"] *= factor

        done = audited(model, changed(path, scale))
        assert done.verdict is verdict and done.notes[0][1].startswith("margin: claimed")


def test_a_larger_radius_is_not_confirmed(small: tuple[nn.Module, Path]) -> None:
    model, path = small

    def widen(arrays: dict[str, Any]) -> None:
        arrays["eps"] *= 1 + 1e-6

    done = audited(model, changed(path, widen))
    assert done.verdict is Verdict.OPEN and any(note.startswith("margin") for _, note in done.notes)


def test_other_inputs_and_labels_are_refuted(small: tuple[nn.Module, Path]) -> None:
    model, path = small
    label = int(witness.read(path).arrays["label"][0])
    same = data.Dataset("pictures", PICTURE.images, torch.tensor([label]), 3)
    assert audited(model, path, same).verdict is Verdict.CONFIRMED

    def brighter(arrays: dict[str, Any]) -> None:
        arrays["x"] = arrays["x"] + np.float32(2**-20)

    def hidden(arrays: dict[str, Any]) -> None:
        brighter(arrays)
        arrays["x_sha256"][0] = list(witness.input_digest(arrays["x"][0]))

    def elsewhere(arrays: dict[str, Any]) -> None:
        arrays["index"][0] = 7

    def other(arrays: dict[str, Any]) -> None:
        arrays["label"][0] = (label + 1) % 3

    def no_class(arrays: dict[str, Any]) -> None:
        arrays["label"][0] = 3

    for change, note in (
        (brighter, "input: its SHA-256 is not the one in the witness"),
        (hidden, "input: not test sample 0 of pictures"),
        (elsewhere, "input: pictures has no test sample 7"),
        (other, f"label: claimed {(label + 1) % 3}, pictures has {label}"),
        (no_class, f"label: claimed 3, pictures has {label}"),
    ):
        done = audited(model, changed(path, change), same)
        assert done.verdict is Verdict.REFUTED and done.notes[0] == (Verdict.REFUTED, note)
    assert (Verdict.REFUTED, "label: claimed 3, want one of 3 classes") in done.notes


def test_a_changed_witness_fails_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lower(arrays: dict[str, Any]) -> None:
        arrays["norms"][0, 1] *= 1 - 1e-3

    path = changed(run / witness.NAME, lower)
    capsys.readouterr()
    assert cli.main(["audit", str(path), "--limit", "1"]) == 1
    printed = capsys.readouterr().out
    assert "refuted: norm of layer '2': claimed" in printed
    assert json.loads((run / "changed.npz.audit.json").read_text())["samples"][0]["verdict"] == "refuted"


def test_other_weights_are_refused(
    run: Path, small: tuple[nn.Module, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, path = small
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].bias[0] += 2**-20
    with pytest.raises(WitnessError, match="checkpoint: got weights with SHA-256"):
        audited(other, path)
    capsys.readouterr()
    assert cli.main(["audit", str(path), "--checkpoint", str(run)]) == 2
    assert "checkpoint: got weights with SHA-256" in capsys.readouterr().err


def test_files_that_are_no_witness_are_refused(run: Path, tmp_path: Path) -> None:
    def duplicate(arrays: dict[str, Any]) -> None:
        arrays["index"][1] = arrays["index"][0]

    changes: list[tuple[Change, str]] = [
        (lambda a: a.update(norms=a["norms"].astype(object)), "without pickles"),
        (lambda a: a.update(format="other"), "not a witness that locallip wrote"),
        (lambda a: a.update(version=9), "witness of version 9; this program reads version 1"),
        (lambda a: a.pop("rows_1"), "has no array 'rows_1'"),
        (lambda a: a.update(eps=a["eps"].astype(np.float32)), "array 'eps' is float32"),
        (lambda a: a.update(label=a["label"][1:]), "array 'label' is int64"),
        (lambda a: a.update(norms=a["norms"] * np.nan), "array 'norms' has NaN"),
        (lambda a: a.update(eps=-a["eps"]), "array 'eps' has entries below 0"),
        (duplicate, "array 'index' has samples twice"),
    ]
    for change, message in changes:
        with pytest.raises(WitnessError, match=message):
            witness.read(changed(run / witness.NAME, change))
    torn = tmp_path / "torn.npz"
    torn.write_bytes((run / witness.NAME).read_bytes()[:-100])
    for path, message in ((torn, "not a whole npz file"), (tmp_path / "no.npz", "no such witness file")):
        with pytest.raises(WitnessError, match=message):
            witness.read(path)


def test_masks_of_other_sizes_are_refused(small: tuple[nn.Module, Path]) -> None:
    model, path = small
    with pytest.raises(WitnessError, match="rows_1: got 3 bytes, want those of 12 units"):
        audited(model, changed(path, lambda a: a.update(rows_1=np.zeros((1, 3), np.uint8))))
    with pytest.raises(WitnessError, match="norms: got 1 a sample, want those of the 2 hidden maps"):
        audited(model, changed(path, lambda a: a.update(norms=a["norms"][:, :1])))


# --- what is covered --------------------------------------------------------------------------------------------------


def test_networks_that_are_not_covered_are_named() -> None:
    hooked = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    hooked[0].register_forward_hook(lambda *_: None)
    conv = nn.Conv2d(2, 2, 3, groups=2)
    for model, message in (
        (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), "module '1': got a Tanh; an audit covers"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "module '1': got a map right behind another"),
        (nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), "module '0': got an activation that follows no map"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "model: got no Linear at its end"),
        (nn.Sequential(nn.Linear(5, 2)), "module '0': got a Linear of 5 features"),
        (nn.Sequential(nn.Linear(4, 2)).double(), "module '0': got a weight of torch.float64"),
        (hooked, "module '0': got a Linear with hooks"),
        (ll.nn.MaxMin(), "model: got an activation that follows no map"),
    ):
        with pytest.raises(ValueError, match=message):
            steps(model, (4,))
    with pytest.raises(ValueError, match="module '0': got a Conv2d with groups"):
        steps(nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)), (2, 4, 4))
    with pytest.raises(ValueError, match="model: got no Linear at its end"):
        steps(nn.Sequential(nn.Conv2d(1, 2, 4)), (1, 4, 4))


def test_save_asks_for_what_it_can_keep(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    certify = ["certify", str(run), "--save", "--limit", "2", "--attack-steps", "1", "--out", str(tmp_path)]
    assert cli.main(certify) == 2
    assert "--save: got --guarantee probabilistic, want deterministic among them" in capsys.readouterr().err
    composed = ["--guarantee", "deterministic", "--bound", "global", "--window", "3"]
    assert cli.main([*certify, *composed]) == 2
    assert "--save: got --bound global and --window 3, want --window 1" in capsys.readouterr().err
    assert cli.main([*certify, "--guarantee", "deterministic", "--window", "3", "--eps", "0.03"]) == 0
    assert "by products of norms; those by composed norms are not in it" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["audit", "exact_norms", "sequential", "witness"])
def test_the_audit_takes_nothing_of_what_made_the_bounds(name: str) -> None:
    tree = ast.parse(Path(audit.__file__).with_name(f"{name}.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]
    assert imports or name == "exact_norms"
    for node in imports:
        assert node.level == 1 or node.module == "nn", ast.unparse(node)
        allowed = {"audit", "checkpoint", "data", "exact_norms", "progress", "sequential", "witness"}
        named = {node.module} if node.module else {alias.name for alias in node.names}
        assert node.level == 2 or named <= allowed, ast.unparse(node)


# --- norms ------------------------------------------------------------------------------------------------------------


def _operators() -> dict[str, scipy.sparse.csr_array]:
    """Masked operators, pixel by pixel, and their norms."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 2, 3, 3, generator=draw)
    conv = operator_matrix(weight, (2, 9, 9), 1, 1)
    rows = torch.arange(3 * 81).view(3, 81).T.flatten()
    columns = torch.arange(2 * 81).view(2, 81).T.flatten()
    conv = conv[rows.numpy()][:, columns.numpy()]
    kept = torch.rand(conv.shape[0], generator=draw) < 0.6
    dense = torch.randn(9, 20, generator=draw).double().numpy()
    return {
        "conv": conv,
        "masked": conv[np.flatnonzero(kept.numpy())],
        "dense": scipy.sparse.csr_array(dense),
        "tiny": scipy.sparse.csr_array(np.ldexp(dense, -120).astype(np.float32).astype(np.float64)),
        "one": scipy.sparse.csr_array([[0.0, 3.0]]),
    }


@pytest.mark.parametrize("narrowest", [8, 128])
@pytest.mark.parametrize("name", ["conv", "masked", "dense", "tiny", "one"])
def test_norms(name: str, narrowest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_norms, "NARROWEST", narrowest)
    matrix = _operators()[name]
    norm = float(np.linalg.norm(matrix.toarray(), 2))
    assert examined(matrix, norm * (1 + 2e-7)) is Finding.CONFIRMED
    assert examined(matrix, norm * (1 + 1e-9)) is Finding.CONFIRMED
    assert examined(matrix, norm * (1 - 1e-9)) is not Finding.CONFIRMED
    assert examined(matrix, norm * (1 - 1e-4)) is Finding.REFUTED
    assert examined(matrix, 0.0) is Finding.REFUTED


def test_what_no_row_or_column_is_left_of_has_norm_0() -> None:
    for shape in ((0, 3), (3, 0), (2, 2)):
        assert examined(scipy.sparse.csr_array(shape), 0.0) is Finding.CONFIRMED


def test_nothing_is_assumed_of_the_factor() -> None:
    """One of a larger bound, and none at all, prove nothing of a bound below the norm; the right one proves its own."""
    a = _operators()["conv"]
    norm = float(np.linalg.norm(a.toarray(), 2))
    blocks = [a[first : first + 64] for first in range(0, a.shape[0], 64)]
    for above in (1 + 1e-7, 2.0):
        factor = exact_norms._factor(blocks, (norm * above) ** 2)
        assert factor is not None and exact_norms._is_proof(blocks, norm * above * (1 + 1e-7), factor)
        zeros = [(np.zeros_like(own), np.zeros_like(left)) for own, left in factor]
        for below in (1 - 1e-9, 1 - 1e-3):
            assert not exact_norms._is_proof(blocks, norm * below, factor)
            assert not exact_norms._is_proof(blocks, norm * below, zeros)


def test_what_blocks_have_in_common_counts_in_both() -> None:
    """Rows 3 and 1 in blocks of their own: the norm's square is 10, and R the matrix itself."""
    for entries in ((3.0, 1.0), (1.0, 3.0)):
        blocks = [scipy.sparse.csr_array([[entry]]) for entry in entries]
        nothing = [(np.zeros((1, 1)), np.zeros((1, k))) for k in range(2)]
        assert not exact_norms._is_proof(blocks, 9.9**0.5, nothing)
        assert exact_norms._is_proof(blocks, 12.1**0.5, nothing)


def test_rows_that_meet_are_within_the_width() -> None:
    for name in ("conv", "masked", "dense"):
        a = exact_norms._without_empty(_operators()[name])
        i, j = (abs(a) @ abs(a).T).nonzero()
        assert abs(i - j).max() <= exact_norms._width(a) <= 2 * abs(i - j).max()


def test_wide_gram_matrices_are_not_confirmed(small: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = small
    monkeypatch.setattr(exact_norms, "WIDEST", 64)
    done = audited(model, path)
    assert done.verdict is Verdict.OPEN and all("bandwidth above" in note for _, note in done.notes)


def test_entries_that_float32_has_not_are_refused() -> None:
    with pytest.raises(ValueError, match="entries that float32 has not"):
        examined(scipy.sparse.csr_array([[0.1]]), 1.0)
