"""A user's own model, loss, metrics and data, tried on two examples before anything runs.

What would make every run fail is said once, and at once; and so is what would be trained, but not as it was meant:
a model that is not new at each call, and a model that is compiled already.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainstep import _seam
from trainstep.benchmarks.data import validation_batches
from trainstep.benchmarks.errors import InvalidComparisonError, InvalidDataError, InvalidModelError
from trainstep.benchmarks.runner import Bench
from trainstep.composition import Composition, apply, remove
from trainstep.errors import TrainstepError, first_line, nearest

_SPARSE = "sparse_categorical_crossentropy"


def two_models(bench: Bench, seed: int) -> tuple[Any, Any]:
    """Return what two calls of the builder make, built.

    Raises:
        InvalidModelError: a call fails, a model is compiled, does not take the data, or both share weights.
        NotAModelError: it is no model, or has strategies already.
    """
    one, other = _model(bench, seed), _model(bench, seed)
    if one is other:
        raise InvalidModelError(
            f"`model` must return a new model at each call, and returns {one.name!r} again: what one run learns the "
            "next would begin with. Build it inside the function."
        )
    mine = {id(variable) for variable in one.variables}
    shared = [_path(variable) for variable in other.variables if id(variable) in mine]
    if shared:
        raise InvalidModelError(
            f"`model` must return a new model at each call, and two of them share {_some(shared)}: what one run learns "
            "the next would begin with. Make all layers inside the function, those of a pretrained model too."
        )
    return one, other


def check(bench: Bench, model: Any, compositions: Mapping[str, Composition], one_hot: str = "") -> None:
    """Apply each of `compositions` to `model`, compile it, and evaluate it on a few examples of each part of the data.

    Args:
        bench: gives the data, and how the model is compiled.
        model: a new one.
        compositions: by label.
        one_hot: what to say besides, where a strategy asks for one-hot labels.

    Raises:
        InvalidComparisonError: a loss or a metric is of an output that the model has not, or an output has no loss.
        InvalidModelError: loss or metrics do not fit the output and the labels.
        InvalidDataError: labels are not among the classes that the model has scores for.
        ModelConflictError: the model does what a strategy does, has a step of its own, or is none a strategy can train.
        UnsupportedInputError: the data are none a strategy can train on.
    """
    task = bench.task
    for label, composition in compositions.items():
        names: dict[str, Any] = {strategy.declaration.name: options for strategy, options in composition.items()}
        with _labelled(label, composition, one_hot):
            remove(apply(model, names))
    x = _examples(bench.split.train, 2)[0]
    _outputs(model, x, "train")
    metrics, called = task.metrics.made(model, lambda: x), list(_seam.names_of_outputs(model, lambda: x))
    try:
        # Not traced: it takes no time to compile, and its errors are those of the operation that fails.
        model.compile(task.make_optimizer(), task.loss, metrics=metrics.compiled, run_eagerly=True)
    except Exception as error:
        raise InvalidModelError(f"The model cannot be compiled: {first_line(error)}.") from error
    for name, source in zip(("train", "validation"), bench.split, strict=True):
        batch = _examples(source, 2)
        outputs = _outputs(model, batch[0], name)
        sizes = {size for output in tf.nest.flatten(outputs) for size in output.shape[1:]}
        if 2 in sizes:  # Or a mistake could hide, by two labels for two outputs.
            batch = _examples(source, next(count for count in range(3, len(sizes) + 4) if count not in sizes))
            outputs = _outputs(model, batch[0], name)
        if type(model).compute_loss is keras.Model.compute_loss:  # One of the user's own may take other labels.
            _check_structure(task.loss, batch, name, (called, len(tf.nest.flatten(outputs))))
        given = f"for a batch of `{name}` the model returns {_shown(outputs)}, and the labels are {_shown(batch[1])}"
        known = batch[1] if isinstance(source, tf.data.Dataset) else source[1]
        for one in _each_output(model, outputs, (task.loss, batch[1], known), (name, called)):
            _check_scores(one)
            if _is_sparse(one.loss):
                _check_labels(one)
            if _is_broadcast(one):
                raise InvalidModelError(
                    f"The loss {one.loss!r} takes a label for each score. Of {one.place} this is not so: {given}."
                )
        try:
            logs = model.test_on_batch(*batch, return_dict=True)
        except Exception as error:
            loss, measured = bench.settings.loss, ", ".join(bench.settings.metrics)
            raise InvalidModelError(
                f"The loss {loss!r} or the metrics, {measured}, do not fit: {given}. {first_line(error)}."
            ) from error
        metrics.values(logs)
        for label, composition in compositions.items() if name == "train" else ():
            if needs(composition):
                with _labelled(label, composition, one_hot):
                    _train(task, model, composition, batch)


def needs(composition: Composition) -> bool:
    """Tell whether a strategy of `composition` needs something of the model or its data, or looks at the model."""
    return any(strategy.declaration.needs or "check_model" in vars(strategy) for strategy in composition)


@contextlib.contextmanager
def _labelled(label: str, composition: Composition, one_hot: str) -> Iterator[None]:
    """Say of an error of a strategy which of those compared it is, and `one_hot` of one about such labels."""
    names = [strategy.declaration.name for strategy in composition]
    try:
        yield
    except TrainstepError as error:
        text = str(error)
        if one_hot and "one-hot" in text:
            text += f" {one_hot}"
        if label.partition(":")[0].strip() not in names and any(re.search(rf"\b{name}\b", text) for name in names):
            text = f"{label}: {text}"
        raise type(error)(text) from error


def _train(task: Any, model: Any, composition: Composition, batch: Any) -> None:
    """Train `model` by one step on `batch`, so that what a strategy needs and does not find is said now."""
    metrics = task.metrics.made(model, lambda: batch[0]).compiled
    apply(model, {strategy.declaration.name: options for strategy, options in composition.items()})
    try:
        model.compile(task.make_optimizer(), task.loss, metrics=metrics, run_eagerly=True)
        model.train_on_batch(*batch)
    finally:
        remove(model)


def _model(bench: Bench, seed: int) -> Any:
    keras.utils.set_random_seed(seed)
    try:
        model = bench.task.build(seed)
    except TrainstepError:
        raise
    except Exception as error:
        raise InvalidModelError(f"`model` failed: {first_line(error)}.") from error
    if getattr(model, "optimizer", None) is not None:
        raise InvalidModelError(
            f"`model` must return a model that is not compiled, and {model.name!r} is: all strategies train it by "
            "the same settings. Leave out compile(), and give its optimizer=, loss= and metrics= to the comparison."
        )
    _outputs(model, _examples(bench.split.train, 2)[0], "train")
    return model


def _outputs(model: Any, x: Any, name: str) -> Any:
    try:
        return _seam.forward(model, x, training=False)
    except Exception as error:
        wanted = getattr(model, "input_shape", None) if model.built else None
        takes = f" It takes {wanted}." if isinstance(wanted, tuple) else ""
        raise InvalidModelError(
            f"The model does not take the examples of `{name}`: a batch is {_shown(x)}.{takes} {first_line(error)}."
        ) from error


def _examples(source: Any, count: int) -> Any:
    """Return the first (x, y) or (x, y, sample_weight): `count` examples, or the batch of a dataset."""
    return next(iter(validation_batches(source, count)))


class _Output(NamedTuple):
    """One output of a model on a batch."""

    loss: Any
    values: Any
    labels: Any
    known: Any
    """All labels of the part of the data; of a dataset those of its first batch."""
    place: str
    """How an error says where the labels are from."""


def _check_structure(loss: Any, batch: Any, name: str, outputs: tuple[list[str], int]) -> None:
    """Raise where losses, labels or sample weights are not of the outputs: Keras 2 would leave some out in silence.

    Args:
        loss: as the user gave it.
        batch: (x, y) or (x, y, sample_weight).
        name: of the part of the data.
        outputs: their names, nothing where they have none, and how many there are.
    """
    names, _ = outputs
    untrained = [key for key, one in loss.items() if one is None] if isinstance(loss, Mapping) else []
    _check_parts("loss", loss, outputs, needed=names)
    _check_parts(f"labels of `{name}`", batch[1], outputs, needed=[each for each in names if each not in untrained])
    if len(batch) == 3:
        _check_parts(f"sample weights of `{name}`", batch[2], outputs, needed=[])
    if isinstance(batch[1], tf.Tensor) and outputs[1] > 1:
        raise InvalidComparisonError(
            f"The labels of `{name}` are one array, and the model has {outputs[1]} outputs: give them by name, or in a "
            "tuple."
        )


def _check_parts(what: str, given: Any, outputs: tuple[list[str], int], *, needed: list[str]) -> None:
    """Raise where `given`, by name or in order, is of other outputs, or not of those that are `needed`."""
    names, count = outputs
    if isinstance(given, Mapping) and names:
        if unknown := [output for output in given if output not in names]:
            raise InvalidComparisonError(
                f"There is no output {unknown[0]!r} for the {what}.{nearest(str(unknown[0]), names)} Outputs: "
                f"{', '.join(names)}."
            )
        if missing := [name for name in needed if name not in given]:
            raise InvalidComparisonError(
                f"The output {missing[0]!r} has no {what}; given is that of {', '.join(given)}."
                f"{' Give None for one that is not to be trained.' if what == 'loss' else ''}"
            )
    elif isinstance(given, list | tuple) and len(given) != count:
        raise InvalidComparisonError(
            f"The model has {count} output{'s'[: count != 1]}, and the {what} in their order {len(given)} parts."
        )


def _each_output(
    model: Any, outputs: Any, given: tuple[Any, Any, Any], part: tuple[str, list[str]]
) -> Iterator[_Output]:
    """Yield what belongs to each output; nothing where that is for Keras to tell.

    Args:
        model: what is trained.
        outputs: of a batch.
        given: the loss, the labels of the batch, and all labels that are known; each as the user has it.
        part: the name of the part of the data, and those of the outputs.
    """
    values = tf.nest.flatten(outputs)
    parts = [_seam.for_each_output(model, each, outputs) for each in given]
    if any(len(each) != len(values) for each in parts):
        return
    name, names = part
    for index, (value, loss, labels, known) in enumerate(zip(values, *parts, strict=True)):
        output = repr(names[index]) if len(names) == len(values) else index
        place = f"`{name}`, output {output}" if len(values) > 1 else f"`{name}`"
        yield _Output(loss, value, labels, known, place)


def _is_sparse(loss: Any) -> bool:
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    sparse = keras.losses.SparseCategoricalCrossentropy
    return isinstance(loss, sparse) or getattr(loss, "__name__", "") == _SPARSE


def _is_broadcast(output: _Output) -> bool:
    """Return whether a loss of Keras would set one label against several scores, which it does in silence."""
    loss, labels = output.loss, output.labels
    if not isinstance(loss, str) or _is_sparse(loss) or loss.lower() in ("ctc", "circle"):
        return False
    if not isinstance(labels, tf.Tensor):
        return False
    return output.values.shape[1:].num_elements() != labels.shape[1:].num_elements()


def _check_scores(output: _Output) -> None:
    """Raise where a loss of probabilities is given logits, of which it makes something in silence."""
    loss = output.loss
    described = _seam.cross_entropy(keras.losses.get(loss) if isinstance(loss, str) else loss)
    if described is None or described[1]:
        return
    least = float(tf.reduce_min(output.values))
    if least < 0:
        raise InvalidModelError(
            f"The loss takes probabilities, and of {output.place} the model returns scores as low as {least:.4g}: "
            "logits. End it with a softmax, give the loss as an object that is told from_logits=True, or give another."
        )


def _check_labels(output: _Output) -> None:
    """Raise where labels are no classes. On a GPU TensorFlow says nothing, and the loss is not a number.

    Of a dataset the first batch is looked at: how much there is of it nobody knows.
    """
    loss, labels, scores = output.loss, output.known, output.values
    if not (isinstance(labels, tf.Tensor) and scores.shape.rank):
        return
    classes, values = scores.numpy().shape[-1], labels.numpy()
    if labels.shape[1:] == scores.shape[1:] and classes > 1:
        raise InvalidDataError(
            f"The labels of {output.place} are {_shown(labels)}, a number for each score of the model. With the loss "
            f"{_SPARSE} a label is the number of a class; for one-hot labels the loss is categorical_crossentropy."
        )
    if isinstance(loss, keras.losses.Loss):
        values = values[values != loss.get_config().get("ignore_class")]
    whole = values.dtype.kind != "f" or np.array_equal(values, np.round(values))
    if not values.size or (whole and values.min() >= 0 and values.max() < classes):
        return
    found = np.unique(values)
    if classes == 1:
        hint = "With one score, for two classes, the loss is binary_crossentropy."
    elif found[0] < 0:
        hint = "Number the classes from 0 on."
    elif not whole:
        hint = "For labels that are no classes choose another loss, such as mse."
    else:
        hint = f"Number the classes from 0 on, or give the model {max(int(found[-1]) + 1, 2)} scores."
    shown = ", ".join(f"{label:g}" for label in (found[:3] if len(found) > 6 else found))
    shown += f", ..., {found[-1]:g}" if len(found) > 6 else ""
    raise InvalidDataError(
        f"The labels of {output.place} are {shown}, and the model's last axis has {classes} "
        f"score{'s'[: classes != 1]}: with the loss {_SPARSE} labels are whole numbers from 0 to {classes - 1}. {hint}"
    )


def _shown(value: Any) -> str:
    shown = tf.nest.map_structure(lambda tensor: f"{tf.as_dtype(tensor.dtype).name} {tuple(tensor.shape)}", value)
    return shown if isinstance(shown, str) else str(shown).replace("'", "")


def _path(variable: Any) -> str:
    return getattr(variable, "path", None) or variable.name


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
