"""Data as the runner takes it, and the order in which it is trained on."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainstep.benchmarks.errors import InvalidDataError

Source = Any
"""(x, y) or (x, y, sample_weight), each an array or a structure of arrays; or a batched `tf.data.Dataset`."""


class Split(NamedTuple):
    """What is trained on and what is measured on."""

    train: Source
    validation: Source


class Batches(NamedTuple):
    """A dataset for `fit`, and how many of its batches make an epoch; None where an epoch is all of it."""

    dataset: tf.data.Dataset
    steps_per_epoch: int | None


def checked(source: Source, name: str) -> Source:
    """Return `source` with arrays as NumPy arrays, float64 as Keras's own float.

    Args:
        source: see `Source`.
        name: what to call it in an error.

    Raises:
        InvalidDataError: it is something else, has no labels, its arrays differ in length, or the dataset
            is not batched, is empty, or never ends.
    """
    if isinstance(source, tf.data.Dataset):
        _check_dataset(source, name)
        return source
    if not (isinstance(source, tuple) and len(source) in (2, 3)):
        raise InvalidDataError(
            f"`{name}` must be (x, y), (x, y, sample_weight) or a batched tf.data.Dataset, not {_kind(source)}."
        )
    parts = [
        tf.nest.map_structure(functools.partial(_array, what=f"{part} of `{name}`"), _without_lists(value))
        for part, value in zip(_PARTS, source, strict=False)
    ]
    lengths = {
        part: sorted({len(array) for array in tf.nest.flatten(value)})
        for part, value in zip(_PARTS, parts, strict=False)
    }
    if len(set(map(tuple, lengths.values()))) > 1 or len(lengths["x"]) != 1:
        shown = ", ".join(f"{part} {' and '.join(map(str, found))}" for part, found in lengths.items())
        raise InvalidDataError(f"The arrays of `{name}` must be of one length, and are not: {shown}.")
    if lengths["x"] == [0]:
        raise InvalidDataError(f"`{name}` is empty: there is no example in it.")
    return tuple(parts)


def train_batches(source: Source, *, seed: int, epochs: int, batch_size: int) -> Batches:
    """Return the batches of `epochs` epochs, shuffled anew for each, in an order that only `seed` decides.

    A `tf.data.Dataset` is iterated as it is, once per epoch: its order is its own.
    """
    if isinstance(source, tf.data.Dataset):
        return Batches(source, None)
    # Not `Dataset.shuffle`, whose order depends on the global seed and on how often it was asked before.
    count = len(tf.nest.flatten(source)[0])
    generator = np.random.default_rng(seed)
    orders = np.stack([generator.permutation(count).astype(np.int32) for _ in range(epochs)])
    tensors = tf.nest.map_structure(tf.constant, source)
    dataset = (
        tf.data.Dataset.from_tensor_slices(orders)
        .flat_map(lambda order: tf.data.Dataset.from_tensor_slices(order).batch(batch_size))
        .map(lambda rows: tf.nest.map_structure(lambda tensor: tf.gather(tensor, rows), tensors))
        .prefetch(2)
    )
    return Batches(dataset, -(-count // batch_size))


def validation_batches(source: Source, batch_size: int) -> tf.data.Dataset:
    """Return the examples in their own order, the last batch perhaps short."""
    if isinstance(source, tf.data.Dataset):
        return source
    return tf.data.Dataset.from_tensor_slices(source).batch(batch_size).prefetch(2)


def first_batch(source: Source, batch_size: int) -> Any:
    """Return one (x, y) or (x, y, sample_weight) of tensors."""
    return next(iter(validation_batches(source, batch_size)))


def _check_dataset(dataset: tf.data.Dataset, name: str) -> None:
    elements = dataset.element_spec
    if not (isinstance(elements, tuple) and len(elements) in (2, 3)):
        raise InvalidDataError(
            f"The dataset `{name}` must yield (x, y) or (x, y, sample_weight), not {_kind(elements)}: {elements}."
        )
    if any(tensor.shape.rank == 0 for tensor in tf.nest.flatten(elements)):
        raise InvalidDataError(f"The dataset `{name}` yields single examples. Batch it: `{name}.batch(32)`.")
    size = int(dataset.cardinality())
    if size == 0:
        raise InvalidDataError(f"The dataset `{name}` is empty.")
    if size == tf.data.INFINITE_CARDINALITY:
        raise InvalidDataError(
            f"The dataset `{name}` never ends, so it has no epochs. Leave out its `repeat()`, or end it: "
            f"`{name}.take(batches)`."
        )


def _without_lists(value: Any) -> Any:
    """Return `value` with tuples for lists, which `tf.data` takes for one array."""
    if isinstance(value, Mapping):
        return {name: _without_lists(one) for name, one in value.items()}
    return tuple(map(_without_lists, value)) if isinstance(value, list | tuple) else value


_PARTS = ("x", "y", "sample_weight")


def _array(value: Any, what: str) -> np.ndarray:
    array = np.asarray(value)
    first = array.ravel()[:1].tolist()
    if array.ndim == 0:
        raise InvalidDataError(
            f"{what} holds {value!r} where an array belongs. A list is taken for several arrays, one for each input: "
            "make one array of it, np.asarray(...)."
        )
    if what[0] == "y" and array.dtype.kind in "USO":
        raise InvalidDataError(
            f"{what} holds {first[0] if first else 'text'!r}: labels are numbers. Number the classes, such as by "
            "np.unique(labels, return_inverse=True)[1]."
        )
    if array.dtype.kind == "O" and not all(isinstance(each, str | bytes) for each in array.flat):
        raise InvalidDataError(f"{what} is an array of objects, such as {first[0]!r}: numbers of one kind are needed.")
    return array.astype(keras.backend.floatx()) if array.dtype == np.float64 else array


def _kind(source: Any) -> str:
    return f"a tuple of {len(source)}" if isinstance(source, tuple) else type(source).__name__
