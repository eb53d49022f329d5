"""MNIST, CIFAR-10 and TinyImageNet from their official files, scikit-learn's digits, and batches of them.

Nothing is downloaded. Data files are treated as foreign: reading one never runs code from it, and a missing,
truncated or corrupt one is an error that names the path and what belongs there.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["DATASETS", "Batches", "Dataset", "crop_and_flip", "load"]

_Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Dataset:
    """Images and their classes.

    name: of the data set.   images: uint8, (N, C, H, W).   labels: int64, (N,), in 0..classes - 1, on the same device.
    classes: their number.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: int

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise ValueError(
                f"images must be uint8 (N, C, H, W), got {self.images.dtype} of shape {tuple(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be int64 ({self.images.shape[0]},), "
                f"got {self.labels.dtype} of shape {tuple(self.labels.shape)}"
            )
        if len(self) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.classes:
            raise ValueError(
                f"labels must lie in 0..{self.classes - 1}, got {int(self.labels.min())}..{int(self.labels.max())}"
            )

    def __len__(self) -> int:
        return self.images.shape[0]

    def __getitem__(self, index: slice) -> Dataset:
        """The Dataset of a slice, such as `dataset[:1000]`."""
        if not isinstance(index, slice):
            raise TypeError(f"index must be a slice, got {index!r}")
        return Dataset(self.name, self.images[index], self.labels[index], self.classes)

    def to(self, device: str | torch.device) -> Dataset:
        """The same on another device. Batches of a Dataset on the GPU are put together there."""
        return Dataset(self.name, self.images.to(device), self.labels.to(device), self.classes)

    def batch(self, index: Tensor, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """Those of `index` (int64, (B,)) on `device`: x float32 in [0, 1], (B, C, H, W), and y int64, (B,)."""
        index = _send(index, self.images.device)
        x, y = _send(self.images[index], device), _send(self.labels[index], device)
        return x.to(torch.float32).div_(255), y


def _send(tensor: Tensor, device: str | torch.device) -> Tensor:
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()  # only a copy from pinned memory leaves the host free to go on
    return tensor.to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------
# MNIST: IDX files


def _read(stream: BufferedReader | gzip.GzipFile, count: int) -> bytearray:
    """Up to `count` bytes, in pieces: a lying header must not make us allocate what the file does not hold."""
    data = bytearray()
    while len(data) < count:
        piece = stream.read(min(count - len(data), 1 << 24))
        if not piece:
            break
        data += piece
    return data


def _idx(folder: Path, stem: str, dimensions: int) -> _Bytes:
    """The array of uint8 in folder/stem or folder/stem.gz, an IDX file with so many dimensions."""
    path = next((p for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder / stem}: no such file, with or without .gz; MNIST's official files go there")
    magic = bytes((0, 0, 8, dimensions))
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            header = _read(stream, 4 + 4 * dimensions)
            if header[:4] != magic:
                raise ValueError(f"{path}: wrong magic number {header[:4].hex()}, an MNIST file has {magic.hex()} here")
            if len(header) < 4 + 4 * dimensions:
                raise ValueError(f"{path}: truncated inside the header")
            shape = tuple(int.from_bytes(header[i : i + 4], "big") for i in range(4, len(header), 4))
            size = int(np.prod(shape, dtype=object))
            data = _read(stream, size + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: corrupt or truncated gzip file ({error})") from error
    if len(data) != size:
        found = f"{len(data)}" if len(data) < size else "more"
        raise ValueError(f"{path}: the header announces {shape}, {size} bytes of data, the file holds {found}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _mnist(root: Path, train: bool) -> Dataset:
    folder = _folder(root, "MNIST/raw", "the files train-images-idx3-ubyte(.gz) and so on")
    prefix = "train" if train else "t10k"
    images = _idx(folder, f"{prefix}-images-idx3-ubyte", 3)
    labels = _idx(folder, f"{prefix}-labels-idx1-ubyte", 1)
    if images.shape[1:] != (28, 28):
        raise ValueError(f"{folder / prefix}-images-idx3-ubyte: images must be 28x28, got {images.shape[1:]}")
    if len(images) != len(labels):
        raise ValueError(f"{folder / prefix}-*: {len(images)} images and {len(labels)} labels do not match")
    return _dataset("mnist", images[:, None], labels, 10, folder / f"{prefix}-labels-idx1-ubyte")


# ---------------------------------------------------------------------------------------------------------------
# CIFAR-10: binary records, or pickles of Python 2


class _PickledDtype:
    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like: a single byte has none."""


class _PickledArray:
    """Takes the place of a numpy array in an unpickled file, so that no numpy code sees what the file says."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> _Bytes:
        try:
            _, shape, dtype, fortran, data = self.state
            if dtype.code in ("u1", b"u1") and len(shape) == 2:
                return np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")
        except (TypeError, ValueError, AttributeError):
            pass
        raise ValueError("its array is not a two-dimensional one of uint8")


def _pickled_bytes(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("_codecs.encode of something that is not latin1 text")
    return text.encode("latin1")


class _Cifar10Unpickler(pickle.Unpickler):
    """Knows the few names of CIFAR-10's pickles, each replaced by inert code of this module, and no other."""

    _KNOWN: ClassVar[dict[tuple[str, str], Callable[..., Any]]] = {
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledDtype,
        ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
        ("_codecs", "encode"): _pickled_bytes,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which CIFAR-10 has no use for")
        return self._KNOWN[module, name]


def _cifar10_pickle(path: Path) -> tuple[_Bytes, NDArray[Any]]:
    wanted = "want a pickled dict with b'data' (uint8, N x 3072) and b'labels' (N numbers in 0..9)"
    try:
        with path.open("rb") as stream:
            content = _Cifar10Unpickler(stream, encoding="bytes").load()
        by_name = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in content.items()}
        data = by_name["data"].array()
        labels = np.array(by_name["labels"], dtype=np.int64)
    except OSError:
        raise
    except Exception as error:  # a corrupt pickle can raise nearly anything
        raise ValueError(f"{path}: not a batch of CIFAR-10 ({type(error).__name__}: {error}); {wanted}") from error
    if data.shape[1] != 3072 or labels.shape != (len(data),):
        raise ValueError(f"{path}: got data of shape {data.shape} and labels of shape {labels.shape}; {wanted}")
    return data, labels


def _cifar10_records(path: Path) -> tuple[_Bytes, NDArray[Any]]:
    raw = np.fromfile(path, np.uint8)
    if not raw.size or raw.size % 3073:
        raise ValueError(f"{path}: {raw.size} bytes are not a whole number of CIFAR-10's records of 3073 bytes")
    records = raw.reshape(-1, 3073)
    return records[:, 1:], records[:, 0]


def _cifar10(root: Path, train: bool) -> Dataset:
    binary, pickled = root / "cifar-10-batches-bin", root / "cifar-10-batches-py"
    names = [f"data_batch_{k}" for k in range(1, 6)] if train else ["test_batch"]
    if binary.is_dir():
        paths, reader = [binary / f"{name}.bin" for name in names], _cifar10_records
    elif pickled.is_dir():
        paths, reader = [pickled / name for name in names], _cifar10_pickle
    else:
        raise FileNotFoundError(f"{root}: has neither of CIFAR-10's folders, {binary.name} and {pickled.name}")
    parts = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; CIFAR-10's official files are {', '.join(names)} there")
        images, labels = reader(path)
        parts.append(_dataset("cifar10", images.reshape(-1, 3, 32, 32), labels, 10, path))
    return Dataset("cifar10", torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]), 10)


# ---------------------------------------------------------------------------------------------------------------
# TinyImageNet: folders of JPEG files


def _decode(path: Path) -> _Bytes:
    from PIL import Image

    try:
        with Image.open(path, formats=("JPEG",)) as image:
            if image.size != (64, 64):
                raise ValueError(f"{path}: TinyImageNet's images are 64x64, got {image.size[0]}x{image.size[1]}")
            return np.asarray(image.convert("RGB"), dtype=np.uint8).transpose(2, 0, 1)
    except (OSError, SyntaxError) as error:  # what Pillow raises for a file that is no JPEG, or a truncated one
        raise ValueError(f"{path}: not a readable JPEG file ({error})") from error


def _decode_all(paths: list[Path], cache: Path) -> _Bytes:
    """All images, uint8 (N, 3, 64, 64), from the cache file or from the paths and then into the cache."""
    try:
        images = np.load(cache, allow_pickle=False)
        if images.dtype == np.uint8 and images.shape == (len(paths), 3, 64, 64):
            return images  # type: ignore[no-any-return]
    except (OSError, ValueError, EOFError):  # none yet, or not a whole one
        pass
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'data: TinyImageNet\'s JPEG files need Pillow, which is missing: pip install "locallip-cuda[tinyimagenet]"'
        ) from error
    images = np.empty((len(paths), 3, 64, 64), np.uint8)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for i, image in enumerate(pool.map(_decode, paths)):
            images[i] = image
    # Written aside and moved: neither a full disk nor another process that does the same leaves half a file.
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.save(file, images)
        temporary.replace(cache)
    except OSError as error:
        warnings.warn(f"{cache}: cannot keep the decoded images there: {error}", stacklevel=2)
    finally:
        with suppress(OSError):
            temporary.unlink()
    return images


def _tinyimagenet(root: Path, train: bool) -> Dataset:
    folder = _folder(root, "tiny-imagenet-200", "the folders train and val")
    classes = sorted(p.name for p in _folder(folder, "train", "a folder for each class").iterdir() if p.is_dir())
    if not classes:
        raise FileNotFoundError(f"{folder / 'train'}: has no class folders; want train/<wnid>/images/*.JPEG")
    number = {wnid: i for i, wnid in enumerate(classes)}
    pairs: list[tuple[Path, int]] = []
    if train:
        for wnid in classes:
            found = sorted((folder / "train" / wnid / "images").glob("*.JPEG"))
            if not found:
                raise FileNotFoundError(f"{folder / 'train' / wnid / 'images'}: has no *.JPEG files")
            pairs += [(path, number[wnid]) for path in found]
    else:
        table = folder / "val" / "val_annotations.txt"
        if not table.is_file():
            raise FileNotFoundError(f"{table}: no such file; it gives the class of each image in val/images")
        for line, text in enumerate(table.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            fields = text.split("\t")
            if len(fields) < 2 or fields[1] not in number or Path(fields[0]).name != fields[0]:
                raise ValueError(
                    f"{table}:{line}: want a file name, a tab and the name of a folder in train, got {text!r}"
                )
            path = folder / "val" / "images" / fields[0]
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file, but {table} names it")
            pairs.append((path, number[fields[1]]))
        if not pairs:
            raise ValueError(f"{table}: is empty")
    # The cache's name depends on the files that went into it, so that it is never read for others.
    listing = "".join(f"{path.relative_to(folder)}\0{path.stat().st_size}\0" for path, _ in pairs)
    digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    images = _decode_all([path for path, _ in pairs], folder / f"{'train' if train else 'val'}-images-{digest}.npy")
    labels = np.array([label for _, label in pairs])
    return Dataset("tinyimagenet", torch.from_numpy(images), torch.from_numpy(labels).long(), len(classes))


# ---------------------------------------------------------------------------------------------------------------
# Digits: bundled with scikit-learn


def _digits(train: bool) -> Dataset:
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError("data: digits come with scikit-learn, which is missing: pip install scikit-learn") from error
    bunch = load_digits()
    # RandomState's stream is frozen for good, so the split is the same with every numpy.
    order = np.random.RandomState(0).permutation(len(bunch.target))
    chosen = np.sort(order[360:] if train else order[:360])
    images = np.rint(bunch.images[chosen] * (255 / 16)).astype(np.uint8)  # grey values 0..16
    labels = torch.from_numpy(bunch.target[chosen]).long()
    return Dataset("digits", torch.from_numpy(images[:, None]), labels, 10)


# ---------------------------------------------------------------------------------------------------------------


def _folder(root: Path, name: str, content: str) -> Path:
    folder = root / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; want {content} there")
    return folder


def _dataset(name: str, images: _Bytes, labels: NDArray[Any], classes: int, path: Path) -> Dataset:
    if not labels.size:
        raise ValueError(f"{path}: holds no images")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"{path}: labels must lie in 0..{classes - 1}, got {labels.min()}..{labels.max()}")
    return Dataset(name, torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64)), classes)


_READERS: dict[str, Callable[[Path, bool], Dataset]] = {
    "mnist": _mnist,
    "cifar10": _cifar10,
    "tinyimagenet": _tinyimagenet,
}
DATASETS = ("digits", *_READERS)


def load(name: str, root: str | os.PathLike[str] | None = None, *, train: bool) -> Dataset:
    """One split of a data set, on the CPU.

    name: one of `DATASETS`.   train: the training images, otherwise the test images (TinyImageNet: its val).
    root: the folder that holds the official files; digits, bundled with scikit-learn, needs none:
      mnist          MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte, each plain or .gz
      cifar10        cifar-10-batches-bin/{data_batch_1..5,test_batch}.bin, or cifar-10-batches-py/ without .bin
      tinyimagenet   tiny-imagenet-200/train/<wnid>/images/*.JPEG, val/images/*.JPEG, val/val_annotations.txt; the
                     classes are the sorted wnids. The decoded images are kept beside as .npy (1.2 GB for train)
    digits has 1437 training and 360 test images, a fixed split, its grey values 0..16 scaled to 0..255.
    FileNotFoundError: a missing folder or file.   ValueError: an unknown name, or a corrupt or truncated file.
    ImportError: scikit-learn (digits) or Pillow (TinyImageNet) is not installed.
    """
    if name not in DATASETS:
        raise ValueError(f"name must be one of {', '.join(DATASETS)}; got {name!r}")
    if name == "digits":
        return _digits(train)
    if root is None:
        raise ValueError(f"root: the data set {name} needs the folder that holds its files")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{root}: no such folder; want the folder that holds the files of {name}")
    return _READERS[name](Path(root), train)


# ---------------------------------------------------------------------------------------------------------------
# Batches


def crop_and_flip(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Random crops of the zero-padded images, and random mirroring left-right, for the whole batch at once.

    images: (B, C, H, W), any dtype and device.   padding: pixels; each image is shifted by up to so many either way.
    flip: whether to mirror each image with probability 1/2.   generator: may live on another device than the images.
    -> the same shape and dtype. ValueError: images of another rank, a negative padding.
    """
    if images.dim() != 4:
        raise ValueError(f"images must be (B, C, H, W), got shape {tuple(images.shape)}")
    if padding < 0:
        raise ValueError(f"padding must be non-negative, got {padding!r}")
    return _move(images, _draw_moves(images.shape[0], padding, flip, generator), padding)


def _draw_moves(count: int, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """(count, 3) int64: the corner of the crop, row and column, in 0..2 * padding, and 1 where to mirror."""
    device = generator.device
    corner = torch.randint(0, 2 * padding + 1, (count, 2), generator=generator, device=device)
    mirror = torch.randint(0, 1 + flip, (count, 1), generator=generator, device=device)
    return torch.cat([corner, mirror], 1)


def _move(images: Tensor, moves: Tensor, padding: int) -> Tensor:
    batch, channels, height, width = images.shape
    moves = _send(moves, images.device)
    top, left, mirror = moves[:, 0:1], moves[:, 1:2], moves[:, 2:3]
    rows = torch.arange(height, device=images.device) + top
    columns = torch.arange(width, device=images.device)
    columns = torch.where(mirror == 1, columns.flip(0), columns) + left
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    rows = rows[:, None, :, None].expand(batch, channels, height, padded.shape[3])
    columns = columns[:, None, None, :].expand(batch, channels, height, width)
    return padded.gather(2, rows).gather(3, columns)


class Batches:
    """The epochs of a Dataset in batches, the same for the same seed and epoch, however many ranks share them.

    batch_size: images in a batch of all ranks together. Rank r of n takes the images r, r + n, ... of each batch, so
    that the ranks together see what a single process would, in the same batches, with the same augmentation.
    device: where the batches go.   shuffle: a new order each epoch.   crop, flip: see `crop_and_flip`; 0 is no crop.
    drop_last: leave out an incomplete last batch. Otherwise that one may hold fewer images than there are ranks, and
    the last ranks get none of it: an empty batch, so that all take the same number of steps.
    ValueError: a bad batch_size, crop, seed, rank or world_size, or drop_last with fewer images than one batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        shuffle: bool = False,
        crop: int = 0,
        flip: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size!r}")
        if crop < 0:
            raise ValueError(f"crop must be non-negative, got {crop!r}")
        if seed < 0:
            raise ValueError(f"seed must be non-negative, got {seed!r}")
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0..world_size - 1, got rank {rank!r} of world_size {world_size!r}")
        if drop_last and len(dataset) < batch_size:
            raise ValueError(f"batch_size must be at most the {len(dataset)} images there are, got {batch_size}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.shuffle = shuffle
        self.crop = crop
        self.flip = flip
        self.drop_last = drop_last
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields this rank's batches of an epoch, from number `start` on: `Dataset.batch`, augmented, on `device`.

        All randomness follows from the seed, the epoch and the number of the batch, so that `start` resumes exactly.
        """
        size = len(self.dataset)
        order = torch.randperm(size, generator=self._generator(epoch, 0)) if self.shuffle else torch.arange(size)
        share = slice(self.rank, None, self.world_size)
        for k in range(start, len(self)):
            batch = order[k * self.batch_size : (k + 1) * self.batch_size]
            x, y = self.dataset.batch(batch[share], self.device)
            if self.crop or self.flip:
                # Drawn for the whole batch: an image is moved the same way whichever rank has it.
                moves = _draw_moves(len(batch), self.crop, self.flip, self._generator(epoch, 1 + k))
                x = _move(x, moves[share], self.crop)
            yield x, y

    def _generator(self, epoch: int, use: int) -> torch.Generator:
        """One for the order of an epoch (use 0), and one for the augmentation of each of its batches."""
        state = np.random.SeedSequence((self.seed, epoch, use)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]) >> 1)
