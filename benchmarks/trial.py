"""A user's own model, loss, metrics and data, tried on two examples before anything runs.

What would make every run fail is said once, and at once; and so is what would be trained, but not as it was meant:
a model that is not new at each call, and a model that is compiled already.
"""

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainstep import _seam
from trainstep.benchmarks.data import validation_batches
from trainstep.benchmarks.errors import InvalidDataError, InvalidModelError
from trainstep.benchmarks.runner import Bench, first_line
from trainstep.composition import Composition, apply, remove
from trainstep.errors import TrainstepError

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


def check(bench: Bench, model: Any, compositions: Iterable[Composition] = ()) -> None:
    """Apply each of `compositions` to `model`, compile it, and evaluate it on a few examples of each part of the data.

    Raises:
        InvalidModelError: loss or metrics do not fit the output and the labels.
        InvalidDataError: labels are not among the classes that the model has scores for.
        ModelConflictError: the model does what a strategy does, has a step of its own, or is none a strategy can train.
        UnsupportedInputError: the data are none a strategy can train on.
    """
    task, compositions = bench.task, list(compositions)
    for composition in compositions:
        names: dict[str, Any] = {strategy.declaration.name: options for strategy, options in composition.items()}
        remove(apply(model, names))
    try:
        # Not traced: it takes no time to compile, and its errors are those of the operation that fails.
        model.compile(task.make_optimizer(), task.loss, metrics=task.make_metrics(), run_eagerly=True)
    except Exception as error:
        raise InvalidModelError(f"The model cannot be compiled: {first_line(error)}.") from error
    for name, source in zip(("train", "validation"), bench.split, strict=True):
        batch = _examples(source, 2)
        outputs = _outputs(model, batch[0], name)
        sizes = {size for output in tf.nest.flatten(outputs) for size in output.shape[1:]}
        if 2 in sizes:  # Or a mistake could hide, by two labels for two outputs.
            batch = _examples(source, next(count for count in range(3, len(sizes) + 4) if count not in sizes))
            outputs = _outputs(model, batch[0], name)
        _check_scores(outputs, task.loss)
        if _is_sparse(task.loss):
            _check_labels(source, outputs, task.loss, name)
        given = f"for a batch of `{name}` the model returns {_shown(outputs)}, and the labels are {_shown(batch[1])}"
        if _is_broadcast(task.loss, outputs, batch[1]):
            raise InvalidModelError(f"The loss {task.loss!r} takes a label for each output: {given}.")
        try:
            model.test_on_batch(*batch)
        except Exception as error:
            metrics = ", ".join(bench.settings.metrics)
            raise InvalidModelError(
                f"The loss {bench.settings.loss!r} or the metrics, {metrics}, do not fit: {given}. {first_line(error)}."
            ) from error
        for composition in compositions if name == "train" else ():
            if needs(composition):
                _train(task, model, composition, batch)


def needs(composition: Composition) -> bool:
    """Tell whether a strategy of `composition` needs something of the model or its data, or looks at the model."""
    return any(strategy.declaration.needs or "check_model" in vars(strategy) for strategy in composition)


def _train(task: Any, model: Any, composition: Composition, batch: Any) -> None:
    """Train `model` by one step on `batch`, so that what a strategy needs and does not find is said now."""
    apply(model, {strategy.declaration.name: options for strategy, options in composition.items()})
    try:
        model.compile(task.make_optimizer(), task.loss, metrics=task.make_metrics(), run_eagerly=True)
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


def _is_sparse(loss: Any) -> bool:
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    sparse = keras.losses.SparseCategoricalCrossentropy
    return isinstance(loss, sparse) or getattr(loss, "__name__", "") == _SPARSE


def _is_broadcast(loss: Any, outputs: Any, labels: Any) -> bool:
    """Return whether a loss of Keras would set one label against several outputs, which it does in silence."""
    if not isinstance(loss, str) or _is_sparse(loss) or loss.lower() in ("ctc", "circle"):
        return False
    if not (isinstance(outputs, tf.Tensor) and isinstance(labels, tf.Tensor)):
        return False
    return outputs.shape[1:].num_elements() != labels.shape[1:].num_elements()


def _check_scores(outputs: Any, loss: Any) -> None:
    """Raise where a loss of probabilities is given logits, of which it makes something in silence."""
    described = _seam.cross_entropy(keras.losses.get(loss) if isinstance(loss, str) else loss)
    if described is None or described[1] or not isinstance(outputs, tf.Tensor):
        return
    least = float(tf.reduce_min(outputs))
    if least < 0:
        raise InvalidModelError(
            f"The loss takes probabilities, and the model returns scores as low as {least:.4g}: logits. End it with a "
            "softmax, or give the loss as an object that is told from_logits=True."
        )


def _check_labels(source: Any, outputs: Any, loss: Any, name: str) -> None:
    """Raise where labels are no classes. On a GPU TensorFlow says nothing, and the loss is not a number.

    Of a dataset the first batch is looked at: how much there is of it nobody knows.
    """
    labels = _examples(source, 2)[1] if isinstance(source, tf.data.Dataset) else source[1]
    if not (isinstance(labels, tf.Tensor) and isinstance(outputs, tf.Tensor) and outputs.shape.rank):
        return  # Several outputs: whose labels are whose is for Keras to know.
    classes, values = outputs.numpy().shape[-1], labels.numpy()
    if labels.shape[1:] == outputs.shape[1:] and classes > 1:
        raise InvalidDataError(
            f"The labels of `{name}` are {_shown(labels)}, a number for each score of the model. With the loss "
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
        f"The labels of `{name}` are {shown}, and the model's last axis has {classes} "
        f"score{'s'[: classes != 1]}: with the loss {_SPARSE} labels are whole numbers from 0 to {classes - 1}. {hint}"
    )


def _shown(value: Any) -> str:
    shown = tf.nest.map_structure(lambda tensor: f"{tf.as_dtype(tensor.dtype).name} {tuple(tensor.shape)}", value)
    return shown if isinstance(shown, str) else str(shown).replace("'", "")


def _path(variable: Any) -> str:
    return getattr(variable, "path", None) or variable.name


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
