"""Train a workload and keep everything that could differ."""

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from catalogue import spec_of, task_of
from nets import BATCH, Task, Workload

import trainstep
from trainstep import _seam


class Run(NamedTuple):
    """What a training run left.

    All variables of the model (statistics and seeds too), the optimizer's own, the logs, and the state of strategies:
    None for a plain model, which can have none.
    """

    variables: list[np.ndarray]
    optimizer: list[np.ndarray]
    history: dict[str, list[float]]
    state: list[np.ndarray] | None


def variables_of(optimizer: Any) -> list[Any]:
    variables = optimizer.variables
    return list(variables() if callable(variables) else variables)


def optimizer_variables(optimizer: Any) -> list[np.ndarray]:
    return [variable.numpy() for variable in variables_of(optimizer)]


def state_of(model: keras.Model, history: Any) -> Run:
    variables = [variable.numpy() for variable in model.variables]
    logs = {key: list(map(float, values)) for key, values in history.history.items()}
    optimizer = optimizer_variables(model.optimizer)
    if not isinstance(model, trainstep.Strategy):
        return Run(variables, optimizer, logs, None)
    count = len(tf.nest.flatten(model.strategy_state))
    own = len(optimizer) - count
    return Run(variables, optimizer[:own], logs, optimizer[own:])


def with_examples(spec: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the strategies `spec` with their options: for one without any, those of its example."""
    if isinstance(spec, str):
        spec = {spec: options}
    elif not isinstance(spec, dict):
        spec = {name: {} for name in spec}
    return {name: {**spec_of(name)[name], **options} for name, options in spec.items()}


def prepared(workload: Workload, spec: Any = None, options: Any = None, **compiled: Any) -> keras.Model:
    """Return the model of `workload` with strategies `spec` applied, and compiled."""
    keras.utils.set_random_seed(0)
    model = workload.build()
    if spec is not None:
        trainstep.apply(model, with_examples(spec, options or {}))
    model.compile(**{**workload.compile(), **compiled})
    if model.built and model.trainable_variables and _seam.holds_state(model.optimizer):
        # Its variables, made in the first step, would have TensorFlow trace that twice.
        _seam.build_optimizer(model.optimizer, model.trainable_variables)
        _build_metrics(model, workload)
    return model


def _build_metrics(model: keras.Model, workload: Workload) -> None:
    """Make what metrics of `model` and losses of its outputs count in: the first step would, and be traced twice."""
    nothing = len(model.outputs) == 1 and not workload.compile().get("metrics")
    if nothing or workload.y is None or tf.distribute.has_strategy():  # Keras 2 cannot, where there are replicas.
        return
    x, y = tf.nest.map_structure(lambda values: tf.constant(values[:1]), (workload.x, workload.y))
    y_pred = model(x)
    model.compute_loss(x=x, y=y, y_pred=y_pred)
    model.compute_metrics(x=x, y=y, y_pred=y_pred, sample_weight=None)
    model.reset_metrics()


def fitted(model: keras.Model, workload: Workload, **fit: Any) -> Run:
    """Fit `model`, two epochs unless said otherwise, and return what is left."""
    arguments = {"batch_size": BATCH, "epochs": 2, "shuffle": False, "verbose": 0, **workload.fit, **fit}
    x, y = workload.x, workload.y
    # Of a list of labels TensorFlow would make one tensor; shuffling, weights and a split Keras does to arrays alone.
    arrays = arguments["shuffle"] or arguments.keys() & {"sample_weight", "validation_split"} or isinstance(y, list)
    if y is not None and arrays:
        return state_of(model, model.fit(x, y, **arguments))
    batch_size = arguments.pop("batch_size")
    # A quarter of a fit this small is what Keras does to arrays before it begins.
    data = x if y is None else tf.data.Dataset.from_tensor_slices((x, y)).batch(batch_size)
    return state_of(model, model.fit(data, **arguments))


def run(workload: Workload, spec: Any = None, options: Any = None, fit: Any = None, **compiled: Any) -> Run:
    """Build, apply, compile, fit; `compiled` overrides arguments of `compile`, `fit` those of `fit`."""
    return fitted(prepared(workload, spec, options, **compiled), workload, **(fit or {}))


def stepped(model: keras.Model, workload: Workload) -> Run:
    """Train `model` on six examples, twice over, in batches of four and of two; return what is left.

    Without `fit`, and eagerly if so compiled, it is a fraction of what a fit takes. The history has the loss of both
    times.
    """
    if workload.y is None:
        batches = [(x, None, None) for x in workload.x.take(2)]
    else:
        whole = workload.x, workload.y, workload.fit.get("sample_weight")
        batches = [
            tf.nest.map_structure(lambda values: None if values is None else values[part], whole)  # noqa: B023  Called here.
            for part in (slice(4), slice(8, 10))
        ]
    arguments, losses = {**workload.fit}, []
    arguments.pop("sample_weight", None)
    for _ in range(2):
        model.reset_metrics()
        for x, y, sample_weight in batches:
            logs = model.train_on_batch(x, y, sample_weight=sample_weight, return_dict=True, **arguments)
        losses.append(float(logs["loss"]))
    return state_of(model, keras.callbacks.History())._replace(history={"loss": losses})


def briefly(workload: Workload, spec: Any = None, options: Any = None) -> Run:
    """Build, apply, compile, and train a few steps, eagerly."""
    return stepped(prepared(workload, spec, options, run_eagerly=True), workload)


@functools.cache
def _remembered(
    how: Callable[..., Run], workload: Callable[[Task], Workload], name: str | None, options: str, task: Task
) -> Run:
    return how(workload(task), name, json.loads(options))


def known(
    workload: Callable[[Task], Workload],
    name: str | None = None,
    options: Any = None,
    like: str = "standard",
    how: Callable[..., Run] = run,
) -> Run:
    """Return what `run` gives, made once per process: the same run serves many tests.

    Args:
        workload: makes one of the task of the strategy.
        name: of the strategy; None for plain Keras.
        options: of the strategy.
        like: the strategy whose task plain Keras is to train for.
        how: `run`, or `briefly`.
    """
    return _remembered(how, workload, name, json.dumps(options or {}, sort_keys=True), task_of(name or like))


def assert_same(actual: Run, expected: Run) -> None:
    """Assert that two runs are equal bit for bit, and finite."""
    assert actual.history == expected.history
    for kind in ("variables", "optimizer", "state") if expected.state is not None else ("variables", "optimizer"):
        left, right = getattr(actual, kind), getattr(expected, kind)
        assert len(left) == len(right), kind
        for a, b in zip(left, right, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=kind, strict=True)
    assert is_finite(actual)


def comparable(result: Run) -> Run:
    """Return `result` without the losses of single outputs.

    Keras 3 logs them otherwise in a graph, where each batch counts the same, than eagerly, where examples do; and
    under replicas of unequal shares not at all as one device does. The loss of the whole model is logged right.
    """
    logs = {key: values for key, values in result.history.items() if key not in ("kind_loss", "value_loss")}
    return result._replace(history=logs)


def is_finite(result: Run) -> bool:
    return all(np.isfinite(value).all() for value in [*result.variables, *result.history.values()])


def differs(actual: Run, expected: Run) -> bool:
    """Tell whether some variable of the model differs by more than rounding."""
    return any(
        not np.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
        for a, b in zip(actual.variables, expected.variables, strict=True)
    )
