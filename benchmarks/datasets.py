"""Data by name: from a dependency, from a folder of the user's, from Keras's cache, or made by a formula.

All images are float32 (examples, height, width, channels) in [0, 1], all labels int64 class ids (examples,), those of
several outputs by name. Nothing here draws at random but from seeds of its own, so that every call returns the same.
"""

import codecs
import gzip
import io
import os
import pickle
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from trainstep.benchmarks.data import Split
from trainstep.benchmarks.errors import InvalidComparisonError, MissingDataError
from trainstep.models import ClassCounts

VARIABLE = "TRAINSTEP_DATA"
"""Environment variable with the folder of the data."""

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts them."""

_FASHION_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "validation": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
_CIFAR_TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
_CIFAR = [*_CIFAR_TRAIN, "test_batch"]
_WITHOUT = "take a workload whose data come with scikit-learn or are made: digits_cnn, digits_mlp, blobs_mlp"


def load_digits(folder: Path | None = None) -> Split:
    """Return 1,437 and 360 handwritten digits of 8 x 8 pixels, which come with scikit-learn.

    The split is fixed and has each class in proportion.
    """
    del folder
    from sklearn.datasets import load_digits as embedded  # noqa: PLC0415  Takes a second, and only this needs it.
    from sklearn.model_selection import train_test_split  # noqa: PLC0415  As above.

    x, y = embedded(return_X_y=True)
    images = (x / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    x_train, x_validation, y_train, y_validation = train_test_split(
        images, y.astype(np.int64), test_size=360, random_state=0, stratify=y
    )
    return Split((x_train, y_train), (x_validation, y_validation))


def load_fashion_mnist(folder: Path | None = None) -> Split:
    """Return 60,000 and 10,000 pictures of clothes of 28 x 28 pixels.

    They are taken from the user's folder, see `folder_of`; else from Debian's package dataset-fashion-mnist; else
    from Keras's cache, into which Keras downloads 30 MB on first use.

    Raises:
        MissingDataError: they are not there and cannot be downloaded.
    """
    given = folder_of(folder)
    places = [given, given / "fashion-mnist"] if given else [DEBIAN_FASHION_MNIST]
    files = [name for pair in _FASHION_FILES.values() for name in pair]
    for place in places:
        if all((place / name).exists() for name in files):
            return Split(*(_read_idx(place / images, place / labels) for images, labels in _FASHION_FILES.values()))
    if given:
        raise MissingDataError(
            f"Fashion-MNIST is not in the folder {str(given)!r}. Put its four files, {', '.join(files)}, there or into "
            f"{str(given / 'fashion-mnist')!r}, leave out the folder to have them downloaded, or {_WITHOUT}."
        )
    return _from_keras(
        keras.datasets.fashion_mnist.load_data,
        "Fashion-MNIST",
        "storage.googleapis.com",
        f"put its four files ({', '.join(files)}) into a folder and name it by data_dir=, --data-dir or {VARIABLE}; on "
        "Debian and Ubuntu, `apt install dataset-fashion-mnist` does that",
    )


def load_cifar10(folder: Path | None = None) -> Split:
    """Return 50,000 and 10,000 photographs of 32 x 32 pixels in color.

    They are taken from the user's folder, see `folder_of`, where they are as their authors give them: the file
    cifar-10-python.tar.gz, or what is in it; else from Keras's cache, into which Keras downloads 170 MB on first use.

    Raises:
        MissingDataError: they are not there and cannot be downloaded.
    """
    given = folder_of(folder)
    if given is None:
        return _from_keras(
            keras.datasets.cifar10.load_data,
            "CIFAR-10",
            "www.cs.toronto.edu",
            "put cifar-10-python.tar.gz, or what is in it, into a folder and name it by data_dir=, --data-dir or "
            f"{VARIABLE}",
        )
    for place in (given, given / "cifar-10-batches-py"):
        if all((place / name).exists() for name in _CIFAR):
            return _cifar({name: (place / name).read_bytes() for name in _CIFAR})
    archive = given / "cifar-10-python.tar.gz"
    if archive.exists():
        with tarfile.open(archive) as opened:
            files = {Path(member.name).name: opened.extractfile(member) for member in opened if member.isfile()}
            return _cifar({name: file.read() for name, file in files.items() if name in _CIFAR and file})
    raise MissingDataError(
        f"CIFAR-10 is not in the folder {str(given)!r}. Put cifar-10-python.tar.gz, or the folder cifar-10-batches-py "
        f"that is in it, there, leave out the folder to have it downloaded, or {_WITHOUT}."
    )


def make_blobs(folder: Path | None = None) -> Split:
    """Return 512 and 256 points in 8 dimensions, float32, from four normal distributions that overlap a little."""
    del folder
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(4, 8))

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.arange(count) % len(centers)
        return (centers[y] + generator.normal(size=(count, 8))).astype(np.float32), y.astype(np.int64)

    return Split(draw(512), draw(256))


SYMBOLS, LENGTH, CHAINS = 8, 16, 4
"""Of the sequences: different token ids, tokens in one, and classes."""


def make_sequences(folder: Path | None = None) -> Split:
    """Return 4,096 and 512 sequences of 16 token ids, int32, each from one of four Markov chains: its class.

    In each chain a token is followed by one certain other in 3 of 4 cases, and else by any. All tokens are equally
    frequent in all chains, so that only their order tells the class: a bag of tokens says nothing.
    """
    del folder
    generator = np.random.default_rng(0)
    successors = np.stack([generator.permutation(SYMBOLS) for _ in range(CHAINS)])

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.arange(count) % CHAINS
        x = np.empty((count, LENGTH), np.int32)
        x[:, 0] = generator.integers(SYMBOLS, size=count)
        for position in range(1, LENGTH):
            certain = generator.random(count) < 0.75
            any_token = generator.integers(SYMBOLS, size=count)
            x[:, position] = np.where(certain, successors[y, x[:, position - 1]], any_token)
        return x, y.astype(np.int64)

    return Split(draw(4096), draw(512))


def make_pairs(folder: Path | None = None) -> Split:
    """Return 2,874 and 720 pictures of two digits each, float32 (8, 12, 1): one on the left, one on the right.

    As in MultiMNIST they overlap, by half their width here, and where they do the lighter pixel is seen. Each digit of
    `load_digits` is twice on the left and twice on the right, beside one of its part that is drawn at random. Labels
    are {"left": ..., "right": ...}, class ids.

    Sabour et al., "Dynamic Routing Between Capsules", NeurIPS 2017, https://arxiv.org/abs/1710.09829
    """
    generator = np.random.default_rng(0)

    def pairs(part: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        x, y = part
        left = np.concatenate([generator.permutation(len(x)) for _ in range(2)])
        right = np.concatenate([generator.permutation(len(x)) for _ in range(2)])
        images = np.zeros((len(left), 8, 12, 1), np.float32)
        images[:, :, :8] = x[left]
        images[:, :, 4:] = np.maximum(images[:, :, 4:], x[right])
        return images, {"left": y[left], "right": y[right]}

    train, validation = load_digits(folder)
    return Split(pairs(train), pairs(validation))


def one_hot(split: Split, classes: ClassCounts) -> Split:
    """Return `split` with the class ids of both parts, (examples,), as one-hot labels, float32 (examples, classes).

    Args:
        split: where there are several outputs its labels are by their names.
        classes: how many there are, of each output.
    """

    def rows(y: Any) -> Any:
        if isinstance(classes, Mapping):
            return {name: np.eye(count, dtype="float32")[y[name]] for name, count in classes.items()}
        return np.eye(classes, dtype="float32")[y]

    (x, y, *rest), (val_x, val_y, *val_rest) = split
    return Split((x, rows(y), *rest), (val_x, rows(val_y), *val_rest))


def with_noise(split: Split, noise: float) -> Split:
    """Return `split` with a share of the training labels replaced: symmetric label noise.

    Which labels, and by which, is fixed: it belongs to the workload, and is the same for all seeds and strategies. Each
    is replaced by one of the other classes, all equally likely, so that the share that is wrong is exactly `noise`.
    Validation labels stay right.

    Args:
        split: train is (x, y) or (x, y, sample_weight); y are class ids (examples,) or (examples, 1), or one-hot; or
            such of several outputs, by name or in a tuple, of each of which the share is made wrong.
        noise: the share, from 0 to 1.

    Raises:
        InvalidComparisonError: the labels are not classes, or there is one class only.
    """
    if not noise:
        return split
    x, labels, *rest = split.train
    generator = np.random.default_rng(0)
    noisy: Any
    if isinstance(labels, Mapping):
        noisy = {name: _with_wrong(labels[name], noise, generator, f" of {name!r}") for name in sorted(labels)}
    elif isinstance(labels, tuple):
        noisy = tuple(_with_wrong(each, noise, generator) for each in labels)
    else:
        noisy = _with_wrong(labels, noise, generator)
    return Split((x, noisy, *rest), split.validation)


def _with_wrong(labels: Any, noise: float, generator: np.random.Generator, of: str = "") -> np.ndarray:
    """Return `labels`, (examples,), (examples, 1) or one-hot, the share `noise` of them of another class."""
    y = np.asarray(labels)
    in_rows = y.ndim == 2 and y.shape[1] > 1
    ids = y.argmax(axis=1) if in_rows else y.reshape(-1)
    if not np.issubdtype(ids.dtype, np.integer):
        raise InvalidComparisonError(
            f"Label noise needs class ids of an integer dtype, or one-hot; the labels{of} are {y.dtype}."
        )
    classes, positions = (np.arange(y.shape[1]), ids) if in_rows else np.unique(ids, return_inverse=True)
    if len(classes) < 2:
        raise InvalidComparisonError(f"Label noise needs at least two classes among the training labels{of}.")
    chosen = generator.permutation(len(ids))[: round(noise * len(ids))]
    moved = positions.reshape(-1).copy()
    moved[chosen] = (moved[chosen] + generator.integers(1, len(classes), size=len(chosen))) % len(classes)
    return np.eye(len(classes), dtype=y.dtype)[moved] if in_rows else classes[moved].reshape(y.shape)


def folder_of(folder: Path | None) -> Path | None:
    """Return the folder the user named: `folder`, else what the environment says; None for neither.

    Raises:
        MissingDataError: there is no such folder.
    """
    named = folder or os.environ.get(VARIABLE)
    if not named:
        return None
    if not Path(named).is_dir():
        raise MissingDataError(f"The folder of the data, {str(named)!r}, does not exist.")
    return Path(named)


def _from_keras(load: Callable[[], Any], name: str, host: str, advice: str) -> Split:
    try:
        train, validation = load()
    except Exception as error:  # Keras raises a bare `Exception` where a download fails.
        raise MissingDataError(
            f"{name} could not be had: {error}. It is downloaded once from {host}; without a network, {advice}, or "
            f"{_WITHOUT}."
        ) from error
    return Split(_scaled(*train), _scaled(*validation))


def _read_idx(images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    with gzip.open(images) as file:
        x = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(labels) as file:
        y = np.frombuffer(file.read(), np.uint8, offset=8)
    return _scaled(x, y)


def _cifar(files: Mapping[str, bytes]) -> Split:
    def part(names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        batches = [_unpickled(files[name]) for name in names]
        x = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return _scaled(x, np.concatenate([batch[b"labels"] for batch in batches]))

    return Split(part(_CIFAR_TRAIN), part(["test_batch"]))


def _unpickled(content: bytes) -> dict[bytes, Any]:
    return _ArraysOnly(io.BytesIO(content), encoding="bytes").load()


def _empty(kind: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Do what NumPy's own function does, whose module has had several names."""
    return kind(shape, dtype)


class _ArraysOnly(pickle.Unpickler):
    """The authors of CIFAR-10 give pickles; a pickle may run anything, so only what makes arrays is let through."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("numpy") and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if module.startswith("numpy") and name == "_reconstruct":
            return _empty
        if (module, name) == ("_codecs", "encode"):
            return codecs.encode
        raise MissingDataError(f"A file of CIFAR-10 holds {module}.{name}, which is not of the data. It is not read.")


def _scaled(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    images = x if x.ndim == 4 else x[..., np.newaxis]
    return np.divide(images, 255, dtype=np.float32), y.reshape(-1).astype(np.int64)
