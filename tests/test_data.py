import gzip
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locallip_cuda.experiments import data
from locallip_cuda.experiments.data import Batches, Dataset, crop_and_flip

REAL = os.environ.get("LOCALLIP_DATA")


def some(count, seed=0, shape=(3, 32, 32), classes=10):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8), rng.integers(0, classes, count, dtype=np.uint8)


def numbered(count):
    """A Dataset whose image i is filled with i, labelled i: what comes out says what went in."""
    images = torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1).expand(count, 1, 6, 6).clone()
    return Dataset("numbered", images, torch.arange(count), count)


# -- MNIST ------------------------------------------------------------------------------------------------------


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(root, train=True, count=5, zipped=True):
    images, labels = some(count, shape=(28, 28))
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        path = folder / f"{'train' if train else 't10k'}-{kind}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    return images, labels


@pytest.mark.parametrize("zipped", [True, False])
def test_mnist(tmp_path, zipped):
    for train, count in ((True, 5), (False, 3)):
        images, labels = write_mnist(tmp_path, train, count, zipped)
        split = data.load("mnist", tmp_path, train=train)
        assert (split.name, split.classes, len(split)) == ("mnist", 10, count)
        assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
        assert np.array_equal(split.images[:, 0].numpy(), images)
        assert np.array_equal(split.labels.numpy(), labels)


def test_mnist_with_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MNIST/raw.*no such folder"):
        data.load("mnist", tmp_path, train=True)
    write_mnist(tmp_path)
    with pytest.raises(FileNotFoundError, match="t10k-images-idx3-ubyte"):
        data.load("mnist", tmp_path, train=False)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: gzip.compress(raw)[:-20], "gzip"),
        (lambda raw: gzip.compress(raw)[:5], "gzip"),
        (lambda raw: b"", "wrong magic number"),
        (lambda raw: b"<html>not here</html>", "gzip"),
        (lambda raw: b"\x1f\x8b\x08" + bytes(60), "gzip"),
        (lambda raw: gzip.compress(b"\0\0\x0d\x03" + raw[4:]), "wrong magic number 00000d03"),
        (lambda raw: gzip.compress(raw[:9]), "truncated inside the header"),
        (lambda raw: gzip.compress(raw[:-1]), "3920 bytes of data, the file holds 3919"),
        (lambda raw: gzip.compress(raw + b"x"), "the file holds more"),
        (lambda raw: gzip.compress(raw[:4] + struct.pack(">3I", 2**32 - 1, 28, 28) + raw[16:]), "the file holds 3920"),
        (lambda raw: gzip.compress(raw[:4] + struct.pack(">3I", 5, 14, 56) + raw[16:]), "28x28"),
        (lambda raw: gzip.compress(idx(np.zeros((4, 28, 28), np.uint8))), "4 images and 5 labels"),
        (lambda raw: gzip.compress(idx(np.zeros((0, 28, 28), np.uint8))), "0 images and 5 labels"),
    ],
)
def test_damaged_mnist(tmp_path, damage, message):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(gzip.decompress(path.read_bytes())))
    with pytest.raises(ValueError, match=message) as error:
        data.load("mnist", tmp_path, train=True)
    assert str(path.parent / "train-") in str(error.value)


def test_mnist_with_foreign_labels(tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.array([0, 1, 2, 3, 10], np.uint8))))
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.9, got 0\.\.10"):
        data.load("mnist", tmp_path, train=True)


# -- CIFAR-10 ---------------------------------------------------------------------------------------------------

TRAIN = [f"data_batch_{k}" for k in range(1, 6)]


def write_cifar10(root, pickled=False, names=(*TRAIN, "test_batch"), count=3, **options):
    folder = root / f"cifar-10-batches-{'py' if pickled else 'bin'}"
    folder.mkdir(parents=True, exist_ok=True)
    parts = {}
    for seed, name in enumerate(names):
        images, labels = parts[name] = some(count, seed)
        if pickled:
            content = {"data": images.reshape(count, 3072), "labels": labels.tolist(), "filenames": ["a.png"] * count}
            (folder / name).write_bytes(pickle.dumps(content, **options))
        else:
            records = np.concatenate([labels[:, None], images.reshape(count, 3072)], 1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
    return parts


def python2_batch(images, labels):
    """The opcodes of the official files, which Python 2 wrote: strings as bytes, names from numpy.core."""

    def text(value):
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        + b"K"
        + bytes([len(images)])
        + b"M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        + b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + text(images.tobytes())
        + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([n]) for n in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


@pytest.mark.parametrize("pickled", [False, True])
def test_cifar10(tmp_path, pickled):
    parts = write_cifar10(tmp_path, pickled)
    for train, names in ((True, TRAIN), (False, ["test_batch"])):
        split = data.load("cifar10", str(tmp_path), train=train)
        assert (split.name, split.classes) == ("cifar10", 10)
        assert np.array_equal(split.images.numpy(), np.concatenate([parts[name][0] for name in names]))
        assert np.array_equal(split.labels.numpy(), np.concatenate([parts[name][1] for name in names]))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_cifar10_pickles_of_each_protocol(tmp_path, protocol):
    parts = write_cifar10(tmp_path, pickled=True, protocol=protocol)
    split = data.load("cifar10", tmp_path, train=False)
    assert np.array_equal(split.images.numpy(), parts["test_batch"][0])


def test_cifar10_pickle_of_python_2(tmp_path):
    images, labels = some(3)
    content = python2_batch(images, labels)
    # numpy itself reads those bytes as the same batch, so the fake is a fair one
    reference = pickle.loads(content, encoding="bytes")
    assert np.array_equal(reference[b"data"], images.reshape(3, 3072))
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "test_batch").write_bytes(content)
    split = data.load("cifar10", tmp_path, train=False)
    assert np.array_equal(split.images.numpy(), images)
    assert np.array_equal(split.labels.numpy(), labels)


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_pickle_cannot_run_code(tmp_path):
    write_cifar10(tmp_path, pickled=True)
    path, trace = tmp_path / "cifar-10-batches-py" / "test_batch", tmp_path / "trace"
    for function, *arguments in (
        (os.mkdir, str(trace)),
        (exec, f"import os; os.mkdir({str(trace)!r})"),
        (getattr, "x", "upper"),
        (np.save, str(trace), np.zeros(1)),
        (np.dtype, "O"),
    ):
        path.write_bytes(pickle.dumps({"data": Runs(function, *arguments), "labels": []}))
        with pytest.raises(ValueError, match="not a batch of CIFAR-10") as error:
            data.load("cifar10", tmp_path, train=False)
        assert str(path) in str(error.value)
        assert not trace.exists() and not trace.with_suffix(".npy").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        pickle.dumps([1, 2]),
        pickle.dumps({"labels": [1]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8)}),
        pickle.dumps({"data": np.zeros((1, 3072)), "labels": [1]}),
        pickle.dumps({"data": np.zeros(3072, np.uint8), "labels": [1]}),
        pickle.dumps({"data": np.zeros((1, 3071), np.uint8), "labels": [1]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": ["cat"]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [-1]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [300]}),
        pickle.dumps({"data": b"abc", "labels": [1]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [1]})[:-100],
        pickle.dumps({"data": np.zeros((0, 3072), np.uint8), "labels": []}),
    ],
)
def test_damaged_cifar10_pickles(tmp_path, content):
    write_cifar10(tmp_path, pickled=True)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        data.load("cifar10", tmp_path, train=False)
    assert str(path) in str(error.value)


def test_damaged_cifar10_records(tmp_path):
    write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], "9218 bytes are not a whole number"),
        (b"", "0 bytes are not"),
        (bytes([10]) + whole[1:], r"labels must lie in 0\.\.9"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            data.load("cifar10", tmp_path, train=True)
        assert str(path) in str(error.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3\.bin"):
        data.load("cifar10", tmp_path, train=True)


def test_cifar10_without_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-bin and cifar-10-batches-py"):
        data.load("cifar10", tmp_path, train=True)


# -- TinyImageNet -----------------------------------------------------------------------------------------------


def write_tinyimagenet(root, classes=("n03", "n01", "n02"), each=2, size=(64, 64)):
    """Images of one colour, so that JPEG keeps them; returns the colours by path."""
    image = pytest.importorskip("PIL.Image")
    folder = root / "tiny-imagenet-200"
    colours = {}

    def write(path, grey=False):
        path.parent.mkdir(parents=True, exist_ok=True)
        value = 20 * (len(colours) + 1)
        colours[path] = (value,) * 3 if grey else (value, 255 - value, 128)
        image.new("L" if grey else "RGB", size, value if grey else colours[path]).save(path, "JPEG", quality=95)

    for wnid in classes:
        for k in range(each):
            write(folder / "train" / wnid / "images" / f"{wnid}_{k}.JPEG", grey=k == 1)
    lines = []
    for k, wnid in enumerate(classes):
        write(folder / "val" / "images" / f"val_{k}.JPEG")
        lines.append(f"val_{k}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return folder, colours


def test_tinyimagenet(tmp_path, monkeypatch):
    folder, colours = write_tinyimagenet(tmp_path, ("n04", "n01", "n03", "n02"))
    train = data.load("tinyimagenet", tmp_path, train=True)
    assert (train.name, train.classes) == ("tinyimagenet", 4)
    assert train.images.shape == (8, 3, 64, 64)
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]  # n01, n02, n03, n04
    paths = sorted(path for path in colours if "train" in path.parts)
    wanted = torch.tensor([colours[path] for path in paths])
    assert (train.images[:, :, 10, 20].int() - wanted).abs().max() <= 3
    test = data.load("tinyimagenet", tmp_path, train=False)
    assert test.labels.tolist() == [3, 0, 2, 1]

    # Now from the cache: nothing is decoded any more.
    assert len(list(folder.glob("*.npy"))) == 2 and not list(folder.glob("*.tmp"))
    with monkeypatch.context() as patch:
        patch.setattr(data, "_decode", None)
        assert torch.equal(data.load("tinyimagenet", tmp_path, train=True).images, train.images)

    # A damaged cache, and one for other files, are not used.
    (cache,) = folder.glob("train-*.npy")
    cache.write_bytes(cache.read_bytes()[:-1])
    assert torch.equal(data.load("tinyimagenet", tmp_path, train=True).images, train.images)
    first, second = paths[0], paths[2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes() + b"\0")
    changed = data.load("tinyimagenet", tmp_path, train=True)
    assert torch.equal(changed.images[0], train.images[2]) and torch.equal(changed.images[1:], train.images[1:])
    first.write_bytes(content)
    assert torch.equal(data.load("tinyimagenet", tmp_path, train=True).images, train.images)


def test_a_cache_that_is_a_pickle_is_not_run(tmp_path):
    folder, _ = write_tinyimagenet(tmp_path)
    before = data.load("tinyimagenet", tmp_path, train=True)
    (cache,) = folder.glob("train-*.npy")
    with cache.open("wb") as file:
        np.save(file, np.array([Runs(os.mkdir, str(tmp_path / "trace"))], dtype=object), allow_pickle=True)
    assert torch.equal(data.load("tinyimagenet", tmp_path, train=True).images, before.images)
    assert not (tmp_path / "trace").exists()


def test_tinyimagenet_where_nothing_can_be_written(tmp_path, monkeypatch):
    folder, _ = write_tinyimagenet(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert len(data.load("tinyimagenet", tmp_path, train=True)) == 6
    assert sorted(p.name for p in folder.iterdir()) == ["train", "val"]


def test_damaged_tinyimagenet(tmp_path):
    with pytest.raises(FileNotFoundError, match="tiny-imagenet-200"):
        data.load("tinyimagenet", tmp_path, train=True)
    folder, colours = write_tinyimagenet(tmp_path)
    path = min(path for path in colours if "train" in path.parts)
    whole = path.read_bytes()
    for content in (whole[:300], b"not a JPEG", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a readable JPEG") as error:
            data.load("tinyimagenet", tmp_path, train=True)
        assert str(path) in str(error.value)
    pytest.importorskip("PIL.Image").new("RGB", (64, 64)).save(path, "PNG")
    with pytest.raises(ValueError, match="not a readable JPEG"):
        data.load("tinyimagenet", tmp_path, train=True)
    path.write_bytes(whole)
    table = folder / "val" / "val_annotations.txt"
    lines = table.read_text()
    for text, error, message in (
        (lines.replace("n02", "n99"), ValueError, r"val_annotations.txt:3: want"),
        (lines.replace("\t", " "), ValueError, r"val_annotations.txt:1: want"),
        (lines.replace("val_1", "../val_1"), ValueError, r"val_annotations.txt:2: want"),
        (lines.replace("val_1", "val_9"), FileNotFoundError, "val_9.JPEG"),
        ("", ValueError, "is empty"),
    ):
        table.write_text(text)
        with pytest.raises(error, match=message):
            data.load("tinyimagenet", tmp_path, train=False)
    table.unlink()
    with pytest.raises(FileNotFoundError, match=r"val_annotations\.txt"):
        data.load("tinyimagenet", tmp_path, train=False)
    path.unlink()
    path.with_name(path.name.replace("_0", "_1")).unlink()
    with pytest.raises(FileNotFoundError, match=r"n01/images.*no \*\.JPEG"):
        data.load("tinyimagenet", tmp_path, train=True)


def test_tinyimagenet_of_another_size(tmp_path):
    write_tinyimagenet(tmp_path, size=(65, 64))
    with pytest.raises(ValueError, match="64x64, got 65x64"):
        data.load("tinyimagenet", tmp_path, train=True)


# -- digits, and load -------------------------------------------------------------------------------------------


def test_digits():
    train, test = data.load("digits", train=True), data.load("digits", train=False)
    assert (len(train), len(test), train.classes, train.name) == (1437, 360, 10, "digits")
    assert train.images.shape[1:] == (1, 8, 8)
    assert set(train.images.unique().tolist()) == {round(n * 255 / 16) for n in range(17)}
    assert (test.labels.bincount(minlength=10) >= 20).all()
    again = data.load("digits", train=False)
    assert torch.equal(again.images, test.images) and torch.equal(again.labels, test.labels)
    # the two together are the whole set
    from sklearn.datasets import load_digits

    rows = np.concatenate([train.images.numpy(), test.images.numpy()]).reshape(1797, 64)
    whole = np.rint(load_digits().data * 255 / 16)
    assert np.array_equal(rows[np.lexsort(rows.T)], whole[np.lexsort(whole.T)])


def test_bad_calls_of_load(tmp_path):
    with pytest.raises(ValueError, match="digits, mnist, cifar10, tinyimagenet; got 'imagenet'"):
        data.load("imagenet", train=True)
    with pytest.raises(ValueError, match="root"):
        data.load("mnist", train=True)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.load("cifar10", tmp_path / "nowhere", train=True)


@pytest.mark.skipif(REAL is None, reason="LOCALLIP_DATA does not name a folder with the real MNIST and CIFAR-10")
@pytest.mark.parametrize(("name", "shape"), [("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32))])
def test_real_data(name, shape):
    train, test = (data.load(name, Path(REAL), train=train) for train in (True, False))
    assert train.images.shape == ({"mnist": 60000, "cifar10": 50000}[name], *shape)
    assert test.images.shape == (10000, *shape)
    assert (
        (train.labels.bincount() > 5000 - 1).all() if name == "cifar10" else train.labels[:4].tolist() == [5, 0, 4, 1]
    )


# -- Dataset ----------------------------------------------------------------------------------------------------


def test_dataset():
    split = numbered(10)
    part = split[2:5]
    assert (len(split), len(part), part.name, part.classes) == (10, 3, "numbered", 10)
    x, y = split.batch(torch.tensor([7, 3]))
    assert y.tolist() == [7, 3] and x.dtype == torch.float32 and x.shape == (2, 1, 6, 6)
    torch.testing.assert_close(x[:, 0, 0, 0], torch.tensor([7 / 255, 3 / 255]))
    assert split.images[7].eq(7).all()  # scaled in a copy
    white = Dataset("white", torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), 1)
    assert white.batch(torch.tensor([0]))[0].item() == 1.0
    with pytest.raises(TypeError, match="slice"):
        split[3]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 1, 3, 3), torch.zeros(2, dtype=torch.int64), "images must be uint8"),
        (torch.zeros(2, 3, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "images must be uint8"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(2), "labels must be int64"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), "labels must be int64"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.tensor([0, 2]), r"labels must lie in 0\.\.1"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.tensor([0, -1]), r"labels must lie in 0\.\.1"),
    ],
)
def test_a_dataset_that_does_not_fit_is_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        Dataset("bad", images, labels, 2)


# -- crop and flip ----------------------------------------------------------------------------------------------


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(
    batch=st.integers(0, 5),
    channels=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    padding=st.integers(0, 4),
    flip=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=80)
def test_crop_and_flip_gives_shifted_and_mirrored_images(batch, channels, height, width, padding, flip, seed):
    images = torch.randint(1, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator(seed))
    out = crop_and_flip(images, padding, flip, generator(seed))
    assert out.shape == images.shape and out.dtype == images.dtype
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    for before, after in zip(padded, out, strict=True):
        crops = [
            before[:, top : top + height, left : left + width]
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
        ]
        allowed = crops + [crop.flip(2) for crop in crops] * flip
        assert any(torch.equal(after, crop) for crop in allowed)


def test_crop_and_flip_reaches_every_move_equally():
    image = torch.arange(1, 26, dtype=torch.float32).view(1, 1, 5, 5)
    count = 9 * 2 * 400
    out = crop_and_flip(image.expand(count, 1, 5, 5), 1, True, generator())
    _, counts = out.flatten(1).unique(dim=0, return_counts=True)
    assert len(counts) == 18
    assert counts.min() > 300 and counts.max() < 500


def test_crop_and_flip_without_either_is_the_identity():
    images = torch.rand(4, 2, 5, 6)
    assert torch.equal(crop_and_flip(images, 0, False, generator()), images)
    mirrored = crop_and_flip(images, 0, True, generator(1))
    assert all(torch.equal(m, i) or torch.equal(m, i.flip(2)) for m, i in zip(mirrored, images, strict=True))
    assert not torch.equal(mirrored, images)


def test_crop_and_flip_is_decided_by_its_generator():
    images = torch.rand(16, 3, 8, 8)
    torch.manual_seed(0)
    first = crop_and_flip(images, 4, True, generator(5))
    torch.manual_seed(1)
    assert torch.equal(first, crop_and_flip(images, 4, True, generator(5)))
    assert not torch.equal(first, crop_and_flip(images, 4, True, generator(6)))
    channels_last = images.to(memory_format=torch.channels_last)
    assert torch.equal(first, crop_and_flip(channels_last, 4, True, generator(5)))


def test_crop_and_flip_refuses_bad_input():
    with pytest.raises(ValueError, match="images"):
        crop_and_flip(torch.zeros(3, 8, 8), 4, True, generator())
    with pytest.raises(ValueError, match="padding"):
        crop_and_flip(torch.zeros(1, 3, 8, 8), -1, True, generator())


# -- batches ----------------------------------------------------------------------------------------------------


def drawn(batches, epoch=0, start=0):
    return [y.tolist() for _, y in batches.epoch(epoch, start)]


def flat(lists):
    return [number for numbers in lists for number in numbers]


def test_batches_in_order():
    batches = Batches(numbered(10), 4)
    assert drawn(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] and len(batches) == 3
    batches = Batches(numbered(10), 4, drop_last=True)
    assert drawn(batches) == [[0, 1, 2, 3], [4, 5, 6, 7]] and len(batches) == 2
    for x, y in batches.epoch():
        assert x.dtype == torch.float32 and torch.equal((x[:, 0, 0, 0] * 255).round().long(), y)


def test_shuffling_depends_on_seed_and_epoch_only():
    split = numbered(50)
    batches = Batches(split, 8, shuffle=True, seed=3)
    orders = [flat(drawn(batches, epoch)) for epoch in range(4)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    torch.manual_seed(99)
    assert flat(drawn(Batches(split, 8, shuffle=True, seed=3), 2)) == orders[2]
    assert flat(drawn(Batches(split, 5, shuffle=True, seed=3), 2)) == orders[2]
    assert flat(drawn(Batches(split, 8, shuffle=True, seed=4), 2)) != orders[2]
    # (seed 0, epoch 1) and (seed 1, epoch 0) are different streams
    assert drawn(Batches(split, 8, shuffle=True, seed=0), 1) != drawn(Batches(split, 8, shuffle=True, seed=1), 0)


def test_an_epoch_goes_on_from_any_batch():
    split = data.load("digits", train=False)
    options = {"shuffle": True, "crop": 2, "flip": True, "seed": 1}
    whole = list(Batches(split, 50, **options).epoch(7))
    rest = list(Batches(split, 50, **options).epoch(7, start=3))
    assert len(rest) == len(whole) - 3
    for (x, y), (x_again, y_again) in zip(whole[3:], rest, strict=True):
        assert torch.equal(x, x_again) and torch.equal(y, y_again)
    assert list(Batches(split, 50, **options).epoch(7, start=len(whole))) == []


@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    world=st.integers(1, 4),
    drop_last=st.booleans(),
    epoch=st.integers(0, 3),
)
@settings(deadline=None, max_examples=60)
def test_the_ranks_share_what_one_process_sees(count, batch_size, world, drop_last, epoch):
    if drop_last and count < batch_size:
        return
    options = {"shuffle": True, "crop": 1, "flip": True, "drop_last": drop_last, "seed": 2}
    split = numbered(count)
    alone = list(Batches(split, batch_size, **options).epoch(epoch))
    ranks = [list(Batches(split, batch_size, rank=r, world_size=world, **options).epoch(epoch)) for r in range(world)]
    assert {len(rank) for rank in ranks} == {len(alone)}
    seen = []
    for k, (x, y) in enumerate(alone):
        shares = [rank[k] for rank in ranks]
        sizes = [len(labels) for _, labels in shares]
        assert sum(sizes) == len(y) and max(sizes) - min(sizes) <= 1
        images = {
            label: image for images, labels in shares for image, label in zip(images, labels.tolist(), strict=True)
        }
        assert sorted(images) == sorted(y.tolist())
        assert all(torch.equal(images[label], image) for image, label in zip(x, y.tolist(), strict=True))
        seen += [label for _, labels in shares for label in labels.tolist()]
    assert len(set(seen)) == len(seen)
    assert len(seen) == (count // batch_size * batch_size if drop_last else count)


def test_augmentation_changes_with_epoch_and_batch():
    split = Dataset(
        "same",
        torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).repeat(64, 1, 1, 1),
        torch.zeros(64, dtype=torch.int64),
        1,
    )
    batches = Batches(split, 32, crop=4, flip=True)
    (a, _), (b, _) = batches.epoch(0)
    (c, _), _ = batches.epoch(1)
    assert not torch.equal(a, b) and not torch.equal(a, c)
    plain, _ = next(Batches(split, 32).epoch())
    assert torch.equal(plain, split.batch(torch.arange(32))[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu():
    split = data.load("digits", train=False)
    options = {"shuffle": True, "crop": 2, "flip": True}
    here = list(Batches(split, 100, **options).epoch(1))
    for source in (split, split.to("cuda")):
        there = list(Batches(source, 100, device="cuda", **options).epoch(1))
        for (x, y), (x_there, y_there) in zip(here, there, strict=True):
            assert x_there.is_cuda and torch.equal(x_there.cpu(), x) and torch.equal(y_there.cpu(), y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 11, "drop_last": True}, "batch_size must be at most the 10"),
        ({"crop": -1}, "crop"),
        ({"seed": -1}, "seed"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"rank": -1}, "rank"),
        ({"world_size": 0}, "world_size"),
    ],
)
def test_bad_batches_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Batches(numbered(10), **({"batch_size": 4} | options))
