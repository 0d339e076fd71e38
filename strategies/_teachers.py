"""Teachers: models that others are trained by, found by name, and how their outputs go with those of a student."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import tensorflow as tf

from trainstep import _seam
from trainstep.errors import ModelConflictError, NotAModelError, first_line, nearest
from trainstep.strategies._classes import Classes

_PROVIDED: dict[str, Any] = {}
_MADE: dict[Any, keras.Model] = {}
"""Teachers that were made or loaded here, by the function that made them, or by the file and when it was written."""


def provide(name: str, teacher: keras.Model | Callable[[], keras.Model]) -> None:
    """Let `distillation` find a teacher under `name`, in this process and until another is provided.

    Args:
        name: what the option `teacher` says, and a saved model keeps.
        teacher: a model; or a function that makes or loads one, called without arguments where it is first needed.
    """
    if not (isinstance(teacher, keras.Model) or (callable(teacher) and not isinstance(teacher, type))):
        raise NotAModelError(f"A teacher is a keras.Model, or a function that returns one, not {teacher!r}.")
    _PROVIDED[name] = teacher


def withdraw(name: str) -> None:
    """Forget the teacher that was provided under `name`, so that its memory can be had again."""
    if name not in _PROVIDED:
        raise ModelConflictError(f"No teacher {name!r} was provided.{nearest(name, _PROVIDED)}")
    _MADE.pop(_PROVIDED.pop(name), None)


def name_of(teacher: keras.Model) -> str:
    """Return a name under which `teacher` is provided, from now on if it was not."""
    for name, provided in _PROVIDED.items():
        if provided is teacher:
            return name
    name, number = teacher.name, 0
    while name in _PROVIDED:
        number += 1
        name = f"{teacher.name}_{number}"
    provide(name, teacher)
    return name


@tf.autograph.experimental.do_not_convert
def teacher_of(name: str, student: Any) -> Any:
    """Return the model provided under `name`, or saved at that path.

    Raises:
        ModelConflictError: there is none, or it cannot teach `student`.
        NotAModelError: what was provided returns none.
    """
    provided = _PROVIDED.get(name)
    if provided is None and not os.path.exists(name):
        raise ModelConflictError(
            f"distillation: there is no teacher {name!r} to train {student.name!r} by: nothing is saved at that path, "
            f"and none is provided.{nearest(name, _PROVIDED)} Call "
            f"trainstep.strategies.distillation.provide({name!r}, model), or save the teacher there; without it the "
            "model still predicts."
        )
    if isinstance(provided, keras.Model):
        teacher = provided
    else:
        key = provided or (os.path.abspath(name), os.stat(name).st_mtime_ns)
        if key not in _MADE:
            # In a thread of its own, where no graph is being traced and no distribution takes hold of its variables.
            make: Any = provided or (lambda: keras.models.load_model(name, compile=False))
            with ThreadPoolExecutor(1) as pool:
                try:
                    _MADE[key] = pool.submit(make).result()
                except Exception as error:
                    if provided is not None:
                        raise
                    raise ModelConflictError(
                        f"distillation: the teacher {name!r} cannot be loaded: {first_line(error)}. It is to be a "
                        "model that this Keras saved, by model.save; one with classes of its own a function loads: "
                        f"trainstep.strategies.distillation.provide({name!r}, function)."
                    ) from error
        teacher = _MADE[key]
    if not isinstance(teacher, keras.Model):
        raise NotAModelError(f"distillation: the teacher {name!r} is to be a keras.Model, not {teacher!r}.")
    if teacher is student:
        raise ModelConflictError(f"distillation: the model {name!r} cannot be its own teacher: give a copy of it.")
    if not all(layer.built for layer in _seam.layers_of(teacher)):
        raise ModelConflictError(f"distillation: the teacher {name!r} is not built: call it on a batch first.")
    return teacher


def predicted_by(name: str, teacher: Any, x: Any) -> Any:
    """Return what `teacher` predicts for the inputs `x`, without a gradient.

    Raises:
        ModelConflictError: it fails on them.
    """
    try:
        predicted = _seam.forward(teacher, x, training=False)
    except Exception as error:
        shapes = tf.nest.map_structure(lambda tensor: f"{tensor.dtype.name} {tuple(tensor.shape)}", x)
        raise ModelConflictError(
            f"distillation: the teacher {name!r} fails on the inputs of the model, {shapes}: {first_line(error)}."
        ) from error
    return tf.nest.map_structure(tf.stop_gradient, predicted)


def output_like(name: str, predicted: Any, y_pred: Any, output: Classes, count: int) -> tuple[int, Any]:
    """Return the place, among its outputs, and the value of what the teacher predicts for `output` of the model."""
    theirs, mine = tf.nest.flatten(predicted), tf.nest.flatten(y_pred)
    places = list(range(len(mine)))
    if isinstance(predicted, dict) and isinstance(y_pred, dict):
        places = [sorted(predicted).index(key) if key in predicted else None for key in sorted(y_pred)]
    place: Any = 0 if len(theirs) == count == 1 else places[output.place]
    if place is not None and place < len(theirs):
        value, like = theirs[place], mine[output.place]
        if value.shape.rank == like.shape.rank and value.shape[-1] == like.shape[-1]:
            return place, value
    shapes = [tuple(value.shape) for value in theirs]
    raise ModelConflictError(
        f"distillation: the output {output.place} of the model, of shape {tuple(mine[output.place].shape)}, has none "
        f"like it among those of the teacher {name!r}, of shapes {shapes}. Outputs go by their names, where they have "
        "some, or by their places; a teacher with a single one teaches the only output of classes."
    )


def gives_logits(name: str, teacher: Any, predicted: Any, place: int) -> bool:
    """Tell whether the output at `place` of `teacher` is logits."""
    loss = _seam.losses_of_outputs(teacher, predicted)[place]
    if described := _seam.cross_entropy(loss):
        return described[1]
    layers = _seam.output_layers_of(teacher)
    last = layers[place] if place < len(layers) else None
    activation = "softmax" if isinstance(last, keras.layers.Softmax) else getattr(last, "activation", None)
    if activation in ("softmax", keras.activations.softmax, keras.activations.sigmoid):
        return False
    if activation is keras.activations.linear:
        return True
    raise ModelConflictError(
        f"distillation: whether the teacher {name!r} gives logits or probabilities cannot be told, from neither its "
        "loss nor its last layer. Say so: from_logits=True or False."
    )
