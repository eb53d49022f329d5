"""What deterministic certificates rest on, written down so that others can check them: ``certify.witness.npz``.

An npz file without pickles. ``format``, ``version``, ``weights`` (:func:`weights_digest`), ``checkpoint`` (SHA-256 of
the file) and, of N certified samples and every masked norm l of the product bound:

    index (N,) int64         in the test set                 label (N,) int64
    x (N, *input) float32    what was certified              x_sha256 (N, 32) uint8, of its bytes
    eps (N,) float64         l2 radius                       margin (N,) float64, claimed: of the label over the ball
    norms (N, L) float64     claimed bounds of the masked operator norms
    rows_l (N, bytes) uint8  np.packbits of the masks of the map's outputs, in the order of the tensor (C, H, W)
    columns_l                the same of what its activation gives
"""

from __future__ import annotations

import hashlib
import io
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .checkpoint import write_atomically

if TYPE_CHECKING:  # an audit takes nothing of what made the bounds
    from ..bounds import LocalBounds

NAME = "certify.witness.npz"
FORMAT = "locallip-cuda witness"
VERSION = 1
Arrays = dict[str, NDArray[Any]]


class WitnessError(ValueError):
    """A file that is no usable witness; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Witness:
    """A file's contents, masks unpacked by need: see the head of this file."""

    weights: str
    checkpoint: str
    arrays: Arrays

    def __len__(self) -> int:
        return len(self.arrays["index"])

    @property
    def layers(self) -> int:
        """Masked norms a sample."""
        return int(self.arrays["norms"].shape[1])

    def mask(self, kind: str, layer: int, sample: int, units: int) -> NDArray[np.bool_]:
        """(units,) of ``kind`` "rows" or "columns". WitnessError where the file's has another length."""
        packed = self.arrays[f"{kind}_{layer}"][sample]
        if len(packed) != -(-units // 8):
            raise WitnessError(f"{kind}_{layer}: got {len(packed)} bytes, want those of {units} units of the network")
        return np.unpackbits(packed, count=units).astype(np.bool_)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the parameters and buffers, sorted by name."""
    value = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        value.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        value.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return value.hexdigest()


def input_digest(x: NDArray[np.float32]) -> bytes:
    """SHA-256 of the float32 numbers of one input."""
    return hashlib.sha256(np.ascontiguousarray(x).tobytes()).digest()


class Recorder:
    """Takes down every deterministic proof of a run, batch by batch, and makes one file of them at the end.

    Batches are kept in a folder beside that file, so that a run that is stopped and goes on loses none.
    """

    def __init__(self, path: Path, weights: str, checkpoint: str, *, afresh: bool) -> None:
        """path: of the file.   weights, checkpoint: digests.   afresh: whether batches of an earlier run go."""
        self.path, self.parts = path, path.with_suffix(".parts")
        self.head: Arrays = {
            "format": np.array(FORMAT),
            "version": np.array(VERSION),
            "weights": np.array(weights),
            "checkpoint": np.array(checkpoint),
        }
        if afresh:
            shutil.rmtree(self.parts, ignore_errors=True)
        self.parts.mkdir(exist_ok=True)

    def keep(self, indices: Sequence[int], x: Tensor, y: Tensor, bounds: LocalBounds) -> None:
        """What certifies samples ``x`` (B, *input) float32 of the test set's ``indices`` for the labels ``y`` (B,)."""
        margin = bounds.margin(y).cpu().numpy()
        kept = margin > 0
        if not kept.any():
            return
        inputs = x.cpu().numpy()[kept]
        arrays: Arrays = {
            "index": np.array(indices, dtype=np.int64)[kept],
            "label": y.cpu().numpy()[kept],
            "x": inputs,
            "x_sha256": np.array([list(input_digest(each)) for each in inputs], dtype=np.uint8),
            "eps": bounds.eps.double().cpu().numpy()[kept],
            "margin": margin[kept],
            "norms": bounds.layer_norms.double().cpu().numpy()[kept],
        }
        for kind, masks in (("rows", bounds.row_masks), ("columns", bounds.column_masks)):
            for layer, mask in enumerate(masks):
                arrays[f"{kind}_{layer}"] = np.packbits(mask.flatten(1).cpu().numpy()[kept], axis=1)
        first, last = int(arrays["index"][0]), int(arrays["index"][-1])
        _write(self.parts / f"{first:08}-{last:08}.npz", {**self.head, **arrays})

    def finish(self) -> int:
        """Write the file. The number of certificates in it; no file where that is 0."""
        parts = [read(part) for part in sorted(self.parts.glob("*.npz"))]
        arrays: Arrays = {}
        if parts:
            for name in parts[0].arrays:
                arrays[name] = np.concatenate([part.arrays[name] for part in parts])
            # a batch that was stopped before it counted as done may be there twice
            _, chosen = np.unique(arrays["index"], return_index=True)
            arrays = {name: array[chosen] for name, array in arrays.items()}
            _write(self.path, {**self.head, **arrays})
        else:
            self.path.unlink(missing_ok=True)
        return len(arrays["index"]) if parts else 0

    def remove(self) -> None:
        """Take the batches away, once the run needs not go on from them."""
        shutil.rmtree(self.parts, ignore_errors=True)


def _write(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    data = io.BytesIO()
    np.savez_compressed(data, allow_pickle=False, **dict(arrays))
    write_atomically(path, data.getvalue())


# kind of dtype and dimensions of what every witness has
_WANTED = {
    **{"index": ("i8", 1), "label": ("i8", 1), "x_sha256": ("u1", 2)},
    **{"eps": ("f8", 1), "margin": ("f8", 1), "norms": ("f8", 2)},
}


def read(path: Path) -> Witness:
    """The witness at ``path``. WitnessError where it is none, is damaged, or does not hold what it must."""
    if not path.is_file():
        raise WitnessError(f"{path}: no such witness file")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise WitnessError(f"{path}: not a whole npz file without pickles ({error})") from error
    head = {name: arrays.pop(name, np.array("")) for name in ("format", "version", "weights", "checkpoint")}
    if str(head["format"]) != FORMAT:
        raise WitnessError(f"{path}: an npz file, but not a witness that locallip wrote")
    if str(head["version"]) != str(VERSION):
        raise WitnessError(f"{path}: witness of version {head['version']}; this program reads version {VERSION}")
    wanted = dict(_WANTED)
    layers = arrays["norms"].shape[-1] if "norms" in arrays else 0
    wanted |= {f"{kind}_{layer}": ("u1", 2) for kind in ("rows", "columns") for layer in range(layers)}
    wanted["x"] = ("f4", arrays["x"].ndim if "x" in arrays else 2)
    for name, (dtype, dimensions) in wanted.items():
        if name not in arrays:
            raise WitnessError(f"{path}: has no array {name!r}")
        got = arrays[name]
        if got.dtype != np.dtype(dtype) or got.ndim != dimensions or len(got) != len(arrays["index"]):
            raise WitnessError(
                f"{path}: array {name!r} is {got.dtype} {got.shape}, want {np.dtype(dtype)} of {dimensions} dimensions "
                f"and {len(arrays['index'])} samples"
            )
    for name in ("x", "eps", "margin", "norms"):
        if not np.isfinite(arrays[name]).all():
            raise WitnessError(f"{path}: array {name!r} has NaN or infinite entries")
    for name in ("eps", "norms"):
        if (arrays[name] < 0).any():
            raise WitnessError(f"{path}: array {name!r} has entries below 0")
    if len(np.unique(arrays["index"])) != len(arrays["index"]):
        raise WitnessError(f"{path}: array 'index' has samples twice")
    return Witness(str(head["weights"]), str(head["checkpoint"]), arrays)
