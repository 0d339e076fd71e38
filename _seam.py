"""The one place that knows there are two Kerases, and the one that touches what is not public.

Everything that differs between Keras 3 (on TensorFlow 2.16 and later) and Keras 2.15 (on TensorFlow
2.15, for tensorflow-addons) is here, under one name for both. No other file tests a version. Each
use of something that is not public API says why nothing public serves.
"""

import collections
import contextlib
import copy
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import keras
import numpy as np
import tensorflow as tf

from trainstep.declaration import Slot
from trainstep.errors import ModelConflictError, NotCompiledError
from trainstep.gradients import scale

Result = TypeVar("Result")

KERAS_3 = int(keras.__version__.split(".")[0]) >= 3

if KERAS_3 and keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"trainstep works with the TensorFlow backend of Keras, and Keras runs on {keras.backend.backend()!r} here. "
        "Set the environment variable KERAS_BACKEND=tensorflow before the first import of keras."
    )


# The optimizers of before Keras 2.11, which tensorflow-addons builds on; Keras 3 has none.
_LegacyOptimizer: Any = () if KERAS_3 else keras.optimizers.legacy.Optimizer


# --- The model ------------------------------------------------------------------------------------


def forward(model: Any, x: Any, *, training: bool) -> Any:
    """Call `model` on `x` as Keras's own `train_step` does; on a batch that is `repeated`, with less work."""
    half = _half_of(x)
    shared = _last_before_chance(model) if half is not None and training else None
    if shared is not None:
        with _repeating_its_output(shared):
            return _call(model, half, training=training)
    return _call(model, x, training=training)


def _call(model: Any, x: Any, *, training: bool) -> Any:
    # `_call_has_training_arg` is what Keras 3 itself asks. The answer differs from "always pass it"
    # for a subclassed model whose `call` has no `training`: there Keras leaves dropout switched off.
    if KERAS_3 and not model._call_has_training_arg:
        return model(x)
    return model(x, training=training)


def is_built(model: Any) -> bool:
    """Tell whether all layers of `model` have their weights."""
    return all(layer.built for layer in layers_of(model))


def ensure_built(model: Any, x: Any) -> None:
    """Build the layers of `model` for the inputs `x`, where the first step has yet to do it."""
    if not is_built(model):
        forward(model, x, training=False)


@contextlib.contextmanager
def of_any_size(model: Any) -> Iterator[None]:
    """Let `model`, and models inside of it, take images of other sizes than those of their `keras.Input`.

    The layers of most take them: it is the check of a functional model that does not, where a step runs eagerly.
    """
    # Both Kerases have a setter of `input_spec`; it sets this, which nothing public takes back.
    models = [layer for layer in layers_of(model) if isinstance(layer, keras.Model)]
    specs = [(each, each.input_spec) for each in models if isinstance(each.input_spec, (list, tuple))]
    relaxed = [(each, [_spec_of_any_size(spec) for spec in given]) for each, given in specs]
    with _with_own("_manual_input_spec", relaxed):
        yield


@contextlib.contextmanager
def _with_own(attribute: str, values: Sequence[tuple[Any, Any]]) -> Iterator[None]:
    """Let layers have values of their own for `attribute`, past `Layer.__setattr__`, which would track them."""
    before = [(vars(layer), vars(layer).get(attribute)) for layer, _ in values]
    for layer, value in values:
        vars(layer)[attribute] = value
    try:
        yield
    finally:
        for own, value in before:
            if value is None:
                del own[attribute]
            else:
                own[attribute] = value


def _spec_of_any_size(spec: Any) -> Any:
    if spec is None or spec.shape is None or len(spec.shape) != 4:
        return spec
    spec = copy.copy(spec)
    spec.shape = (spec.shape[0], None, None, spec.shape[3])
    return spec


def shapes_of_outputs(model: Any, x: Any, shapes: Sequence[tuple[int | None, ...]]) -> list[tuple[int | None, ...]]:
    """Return the shapes of the flattened outputs of `model` for inputs like `x`, but of these `shapes`.

    Raises:
        ValueError: its layers do not take them.
    """
    specs = [tf.TensorSpec(shape, tensor.dtype) for tensor, shape in zip(tf.nest.flatten(x), shapes, strict=True)]

    def call(*tensors: tf.Tensor) -> Any:
        return tf.nest.flatten(forward(model, tf.nest.pack_sequence_as(x, tensors), training=False))

    with of_any_size(model):
        return [tuple(each.shape) for each in tf.function(call, autograph=False).get_concrete_function(*specs).outputs]


def compute_loss(model: Any, x: Any, y: Any, y_pred: Any, sample_weight: Any, *, training: bool) -> tf.Tensor:
    """Return the scalar loss of `model.compute_loss`, the user's own where it is overridden.

    Under a distribution strategy this is the replica's share: the mean over its examples divided by
    the number of replicas. Keras 2 updates the metric named "loss" here; for Keras 3 see
    `recorded_loss`.

    Raises:
        NotCompiledError: there is no loss.
        ModelConflictError: it is not a scalar.
    """
    arguments: dict[str, Any] = {"x": x, "y": y, "y_pred": y_pred, "sample_weight": sample_weight}
    # Keras 3.3 added the argument; a `compute_loss` a user wrote before may lack it.
    if KERAS_3 and "training" in inspect.signature(model.compute_loss).parameters:
        arguments["training"] = training
    loss = model.compute_loss(**arguments)
    if loss is None:
        raise NotCompiledError(
            "There is no loss to train on: pass `loss=` to `compile`, or return one from `compute_loss`."
        )
    if loss.shape.rank and 0 not in loss.shape:  # Keras 3 does not reduce the loss of an empty batch.
        raise ModelConflictError(
            f"`compute_loss` of {type(model).__name__} returned a loss of shape {tuple(loss.shape)}, and training "
            "descends a scalar. Return the mean over the examples, `tf.reduce_mean(loss)`."
        )
    return loss


def check_steps_per_execution(model: Any, steps: int | str | None = None) -> None:
    """Raise `ModelConflictError` where Keras cannot run several steps at once on the replicas of `model`.

    Args:
        model: of Keras.
        steps: as `compile` takes them; None: those that `model` is compiled with, if it is.
    """
    replicas = model.distribute_strategy.num_replicas_in_sync
    steps = getattr(model, "steps_per_execution", 1) if steps is None else steps
    if KERAS_3 and replicas > 1 and steps != 1:
        # Plain `fit` fails, up to Keras 3.15 at least: "You must feed a value for placeholder tensor".
        raise ModelConflictError(
            f"Keras 3 cannot run several steps at once on several replicas: steps_per_execution={steps!r} with "
            f"{replicas} replicas fails inside TensorFlow. Leave steps_per_execution at 1."
        )


def is_on_many_machines(model: Any) -> bool:
    """Tell whether `model` is trained by several processes at once, under `MultiWorkerMirroredStrategy`."""
    distribution = model.distribute_strategy
    # What both Kerases themselves ask: alone, the same class of strategy does as `MirroredStrategy`.
    return isinstance(distribution, tf.distribute.MultiWorkerMirroredStrategy) and (
        distribution.extended._in_multi_worker_mode()
    )


class OnManyMachines(keras.Model if TYPE_CHECKING else object):
    """What Keras 3 lacks to `fit` and `evaluate` on many machines: keras #20585, so up to 3.15.1 at least.

    There is no public way: both places are inside `fit`. Changes nothing on one replica, and nothing on Keras 2.
    """

    if KERAS_3:

        def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
            # Keras would build model, metrics and optimizer from the mean of what the replicas get: #20585. On one
            # machine, too, that fails where they get unequal numbers of examples. Only shapes matter here.
            if iterator is not None and self.distribute_strategy.num_replicas_in_sync > 1:
                _, _, batches = next(iter(iterator))
                iterator, data_batch = None, _first_replicas(self, next(batches))
            super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)

        def _make_function(self, step_function: Callable[[Any], Any]) -> Callable[[Any], Any]:
            # Keras takes the mean of what the replicas report along an axis too many, which scalars lack: #20585.
            if is_on_many_machines(self):
                step_function = _with_an_axis(step_function)
            return super()._make_function(step_function)


def _first_replicas(model: Any, batch: Any) -> Any:
    results = model.distribute_strategy.experimental_local_results
    return tf.nest.map_structure(lambda values: results(values)[0], batch)


def _with_an_axis(step_function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def step(data: Any) -> Any:
        return tf.nest.map_structure(lambda value: tf.expand_dims(value, 0), step_function(data))

    return step


def let_the_chief_write(callbacks: Sequence[Any], model: Any) -> None:
    """Keep the processes of a training on many machines from writing one and the same file.

    Keras 2 sees to it in its callbacks. Keras 3 has no notion of a chief: there the other processes restore from a
    backup, but write none, and no checkpoints.
    """
    if not KERAS_3 or not is_on_many_machines(model) or model.distribute_strategy.extended.should_checkpoint:
        return
    for callback in callbacks:
        if isinstance(callback, (keras.callbacks.BackupAndRestore, keras.callbacks.ModelCheckpoint)):
            # In batches: there is no setting for never.
            setattr(callback, "save_freq", sys.maxsize)  # noqa: B010  Keras annotates nothing; its default is a string.
        if isinstance(callback, keras.callbacks.BackupAndRestore):
            callback.delete_checkpoint = False


def compiled_losses(model: Any) -> list[Any]:
    """Return all that `compile` was given as losses, flattened: functions, losses, or None."""
    return [_loss_by_name(loss) for loss in tf.nest.flatten(model.loss)]


def _loss_by_name(loss: Any) -> Any:
    return keras.losses.get(loss) if isinstance(loss, str) else loss


def sums_its_loss(model: Any) -> bool:
    """Tell whether a loss that `model` was compiled with is a sum over examples, not a mean."""
    return any(is_sum(loss) for loss in compiled_losses(model))


def is_sum(loss: Any) -> bool:
    """Tell whether `loss`, of one output, is a sum over examples."""
    return getattr(loss, "reduction", None) == "sum"


def losses_of_outputs(model: Any, y_pred: Any) -> list[Any]:
    """Return what `compile` was given to train each of the flattened outputs by: a function, a loss, or None."""
    loss = getattr(model, "loss", None)  # Which a model of Keras 2 has from `compile` on.
    return [_loss_by_name(loss) for loss in for_each_output(model, loss, y_pred)]


def weights_of_outputs(model: Any, y_pred: Any) -> list[float]:
    """Return the `loss_weights` of `compile` for each of the flattened outputs."""
    # Public only as part of `get_compile_config`, which takes everything else, the optimizer too, apart with it.
    container = model._compile_loss if KERAS_3 else model.compiled_loss
    weights = for_each_output(model, container and container._user_loss_weights, y_pred)
    return [1.0 if weight is None else float(weight) for weight in weights]


def for_each_output(model: Any, given: Any, y_pred: Any) -> list[Any]:
    """Return what was `given` for each of the flattened outputs: one for all, by name, or in their order.

    It may be an argument of `compile`, or labels or sample weights of a batch.
    """
    outputs = tf.nest.flatten(y_pred)
    if isinstance(given, dict):
        names = sorted(y_pred) if isinstance(y_pred, dict) else list(getattr(model, "output_names", None) or given)
        return [given.get(name) for name in names]
    if isinstance(given, (list, tuple)):
        return list(given)
    return [given] * len(outputs)


def names_of_outputs(model: Any, batch: Callable[[], Any]) -> dict[str, str]:
    """Return the names by which `compile` knows the outputs of `model`, and those in front of metrics in its logs.

    They are the keys where the outputs are in a dict, else the names of layers; a model that is no graph of layers is
    asked for its outputs on the inputs that `batch` returns, and has none if these are in no dict.
    """
    layers = list(getattr(model, "output_names", None) or ()) if getattr(model, "inputs", None) else []
    outputs = getattr(model, "output", None) if layers else None
    if not layers and not isinstance(model, keras.Sequential):
        found = forward(model, batch(), training=False)
        return {str(key): str(key) for key in sorted(found)} if isinstance(found, dict) else {}
    if not isinstance(outputs, dict):
        return dict(zip(layers, layers, strict=True))
    keys = sorted(outputs)
    return dict(zip(keys, keys if KERAS_3 else layers, strict=True))


def by_place(model: Any, given: Any) -> Any:
    """Return labels or weights `given` by name in the order of the outputs, where `model` returns a list of these.

    Keras 3 refuses these, and Keras 2 puts them in order where it takes the loss, which is behind the strategies.
    """
    names = getattr(model, "output_names", None)
    if KERAS_3 or not isinstance(given, dict) or not names or not set(given) <= set(names):
        return given
    outputs = getattr(model, "output", None)
    return for_each_output(model, given, outputs) if isinstance(outputs, (list, tuple)) else given


_CROSS_ENTROPIES = {
    "categorical": (keras.losses.CategoricalCrossentropy, keras.losses.CategoricalFocalCrossentropy),
    "sparse": (keras.losses.SparseCategoricalCrossentropy,),
    "binary": (keras.losses.BinaryCrossentropy, keras.losses.BinaryFocalCrossentropy),
}
_CROSS_ENTROPY_FUNCTIONS = {
    "categorical": (keras.losses.categorical_crossentropy, keras.losses.categorical_focal_crossentropy),
    "sparse": (keras.losses.sparse_categorical_crossentropy,),
    "binary": (keras.losses.binary_crossentropy, keras.losses.binary_focal_crossentropy),
}


def cross_entropy(loss: Any) -> tuple[Any, bool] | None:
    """Return the kind of cross-entropy `loss` is, "categorical", "sparse" or "binary", and whether it takes logits."""
    for kind, classes in _CROSS_ENTROPIES.items():
        if isinstance(loss, classes):
            return kind, bool(loss.get_config()["from_logits"])
    for kind, functions in _CROSS_ENTROPY_FUNCTIONS.items():
        if loss in functions:
            return kind, False
    return None


def logits_behind(output: Any) -> Any:
    """Return the logits that `output` is the softmax or the sigmoid of, where its layer left them, or None."""
    # Keras's own cross-entropies look for the attribute, so that a prediction that is nearly sure still has a gradient.
    return getattr(output, "_keras_logits", None)


def losses_of_entries(loss: Any, y: Any, y_pred: Any) -> tf.Tensor:
    """Return the loss of each entry of one output, not reduced: (batch, ...).

    Args:
        loss: one of `losses_of_outputs`.
        y: the labels of the output.
        y_pred: the output.
    """
    if not isinstance(loss, keras.losses.Loss):
        loss = _OfFunction(loss)
    reduction = loss.reduction
    loss.reduction = "none"
    try:
        losses: Any = loss(y, y_pred)
    finally:
        loss.reduction = reduction
    return losses


class _OfFunction(keras.losses.Loss):
    """A function as a loss, which makes labels and predictions of one rank and dtype before it calls it."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        super().__init__(name="of_function")  # Keras 3 makes a scope of it, which may not begin with an underscore.
        self._function = function

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self._function(y_true, y_pred)


def num_examples(x: Any) -> tf.Tensor:
    """Return the number of examples in `x`, an int32 scalar: the length of its first tensor."""
    first = next(tensor for tensor in tf.nest.flatten(x) if tensor is not None)
    return tf.shape(first)[0]


@contextlib.contextmanager
def recorded_loss(model: Any, x: Any, *, composite: bool) -> Iterator[Callable[[tf.Tensor], None]]:
    """Yield the function that enters the loss of this step into the metric named "loss".

    Keras 3 leaves that to the caller. Keras 2 has done it inside `compute_loss`, which is right
    unless the loss is `composite`, put together from several calls: then what they entered is taken
    back and the whole entered instead.
    """
    if KERAS_3:
        yield lambda loss: _update_loss_metric(_loss_tracker(model), loss, x)
        return
    if not composite:
        yield lambda loss: None
        return
    tracker = model.compiled_loss._total_loss_mean  # Keras 2 shows it in `metrics` only after the first step.
    before = _snapshot(tracker.variables)

    def record(loss: tf.Tensor) -> None:
        for variable, value in before:
            variable.assign(value)
        _update_loss_metric(tracker, loss, x)

    yield record


def _update_loss_metric(metric: Any, loss: tf.Tensor, x: Any) -> None:
    if metric is not None:
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        unscaled = loss * tf.cast(replicas, loss.dtype) if replicas > 1 else loss
        metric.update_state(unscaled, sample_weight=num_examples(x))


def _loss_tracker(model: Any) -> Any:
    # Through the class: a user may override `metrics`, and Keras updates this one all the same.
    prop: Any = keras.Model.metrics
    metrics = prop.fget(model)
    return metrics[0] if metrics and metrics[0].name == "loss" else None


def probe(model: Any, x: Any, y: Any, sample_weight: Any, *, training: bool) -> tf.Tensor:
    """Return the loss of an extra forward pass that leaves no trace, see `without_trace`."""

    def loss() -> tf.Tensor:
        y_pred = forward(model, x, training=training)
        return compute_loss(model, x, y, y_pred, sample_weight, training=training)

    return without_trace(model, loss, training=training)


def without_trace(
    model: Any, function: Callable[[], Result], *, training: bool, random_state: Sequence[tuple[Any, Any]] = ()
) -> Result:
    """Return what `function` returns, which passes through `model`, and leave everything as it was before.

    Batch-norm statistics, metrics and, on Keras 3, the state of dropout are as before it. On Keras 2
    dropout draws from TensorFlow's stateful operations, whose state cannot be reached: with
    `training=True` such a pass draws masks of its own.

    Args:
        model: compiled.
        function: looks at the model and changes no weight; returns a tensor, or nested ones, gradients too.
        training: whether it passes through the model in training mode.
        random_state: what `random_state` returned: the masks of dropout are those drawn from there.
    """
    if KERAS_3:
        # Regularizers look only at weights that the scope maps, and fail on others. To the variables themselves: a
        # scope made with them reads them at once, and a tape opened within it would not see that they are used.
        weights = {id(weight): tf_variable(weight) for weight in model.trainable_variables}
        scope = keras.StatelessScope(random_state, collect_losses=True)
        scope.state_mapping.update(weights)
        with scope:
            return function()
    statistics = _snapshot(model.non_trainable_variables) if training else []
    metrics = _snapshot(metric_variables(model))  # Now: those of `add_metric` are updated by the forward pass.
    container: Any = getattr(model, "compiled_loss", None)
    # There is none in a model that is not compiled; within another function without a trace it has one of that.
    build_of_others = container and container.build

    def build(y_pred: Any) -> None:
        # Keras makes metrics here, at the first call, and updates them at once: keep them in between.
        build_of_others(y_pred)
        metrics.extend(_snapshot_of_others(model, metrics))

    own: dict[str, Any] = {} if container is None else vars(container)
    nested = "build" in own
    own["build"] = build
    try:
        value = function()
    finally:
        del own["build"]
        if nested:
            own["build"] = build_of_others
    for variable, before in [*statistics, *metrics]:
        variable.assign(before)
    return value


def random_state(model: Any) -> list[tuple[Any, tf.Tensor]]:
    """Return what the next masks of dropout are drawn from; nothing on Keras 2, where it cannot be reached."""
    return [(variable, tf.convert_to_tensor(variable)) for variable in random_variables(model)] if KERAS_3 else []


@contextlib.contextmanager
def same_masks(random_state: Sequence[tuple[Any, Any]]) -> Iterator[None]:
    """Let dropout draw, as long as this lasts, the masks it drew since `random_state`, and go on as without it."""
    now = [(variable, tf.convert_to_tensor(variable)) for variable, _ in random_state]
    for variable, value in random_state:
        variable.assign(value)
    try:
        yield
    finally:
        for variable, value in now:
            variable.assign(value)


def _snapshot_of_others(model: Any, kept: Sequence[tuple[Any, tf.Tensor]]) -> list[tuple[Any, tf.Tensor]]:
    """Return a snapshot of the metric variables of `model` that are not among `kept`."""
    known = {id(variable) for variable, _ in kept}
    return _snapshot([variable for variable in metric_variables(model) if id(variable) not in known])


def metric_variables(model: Any) -> list[Any]:
    """Return the variables of the metrics that `model` has by now, see `build_metrics`."""
    return [variable for metric in model.metrics for variable in metric.variables]


def _snapshot(variables: Sequence[Any]) -> list[tuple[Any, tf.Tensor]]:
    return [(variable, tf.identity(variable)) for variable in variables]


# --- Going on with a run that was stopped ---------------------------------------------------------

_CARRIER = "trainstep_position"


@contextlib.contextmanager
def carried_in_backups(model: Any, pack: Callable[[], bytes], unpack: Callable[[bytes], None]) -> Iterator[None]:
    """Let backups of `model` hold what `pack` returns then; where one is restored, `unpack` gets it.

    Raises:
        ModelConflictError: on Keras 2, there is random state that the layers have yet to make.
    """
    if KERAS_3:
        # Saving visits the attributes of a model, and of those the metrics, whether or not the model knows them.
        vars(model)[_CARRIER] = _Carrier(pack, unpack)
        try:
            yield
        finally:
            del vars(model)[_CARRIER]
            model._initial_epoch = None  # Where a backup was restored, Keras would start every later `fit` there.
        return
    generators = {f"random_{index}": generator for index, generator in enumerate(_tf_random_generators(model))}
    setattr(model, _CARRIER, tf.train.Checkpoint(position=_Carrier(pack, unpack), **generators))
    try:
        yield
    finally:
        delattr(model, _CARRIER)
        model._training_state = vars(model).get("_training_state")  # Keras 2 deletes it, and fails without.


_CarrierBase: Any = keras.metrics.Metric if KERAS_3 else tf.train.experimental.PythonState


class _Carrier(_CarrierBase):
    """The smallest thing that Keras 3 saves through methods, no metric at all; on Keras 2 TensorFlow does so."""

    def __init__(self, pack: Callable[[], bytes], unpack: Callable[[bytes], None]) -> None:
        if KERAS_3:
            super().__init__(name=_CARRIER)
        self._pack, self._unpack = pack, unpack

    def save_own_variables(self, store: Any) -> None:
        store["packed"] = np.frombuffer(self._pack(), np.uint8)

    def load_own_variables(self, store: Any) -> None:
        if "packed" in store.keys():  # noqa: SIM118  A store of Keras has keys, and no `in`.
            self._unpack(np.asarray(store["packed"]).tobytes())

    def serialize(self) -> bytes:
        return self._pack()

    def deserialize(self, string_value: bytes) -> None:
        self._unpack(string_value)


def random_variables(model: Any) -> list[Any]:
    """Return the variables of random state in `model`; on Keras 2 none, see `carried_in_backups`."""
    if not KERAS_3:
        return []
    # `variables` is what `weights` is and the state of `SeedGenerator`s, at any depth.
    others = {id(variable) for variable in [*model.weights, *metric_variables(model)]}
    return [variable for variable in model.variables if id(variable) not in others]


def _random_generators(model: Any) -> list[tuple[Any, Any]]:
    """Return, on Keras 2, the layers that draw random numbers, each with what it draws them by."""
    # The attribute of `BaseRandomLayer`, which has no public name.
    found = [(layer, getattr(layer, "_random_generator", None)) for layer in layers_of(model)]
    return [(layer, generator) for layer, generator in found if generator is not None]


def _tf_random_generators(model: Any) -> list[Any]:
    # Keras 2 leaves them out of checkpoints on purpose, for those who have old ones.
    found = []
    for layer, generator in _random_generators(model):
        if generator._rng_type != generator.RNG_STATEFUL:
            continue
        if not generator._built:
            raise ModelConflictError(
                f"The layer {layer.name!r} has yet to make its random state, which a backup has to hold. Build the "
                "model before `fit`, by calling it on a batch."
            )
        found.append(generator._generator)
    return found


def unkept_random_layers(model: Any) -> list[str]:
    """Return the names of layers whose random state cannot be read: on Keras 2 those of stateful operations."""
    if KERAS_3:
        return []
    names = []
    for layer, generator in _random_generators(model):
        recurrent = hasattr(layer, "recurrent_dropout")  # These could draw, and mostly do not.
        if generator._rng_type == generator.RNG_LEGACY_STATEFUL and not (
            recurrent and not layer.dropout and not layer.recurrent_dropout
        ):
            names.append(layer.name)
    return names


def global_seed() -> int:
    """Return the seed of `keras.utils.set_random_seed`, or -1 where none was set."""
    # The only public way, and it cannot tell the default from none.
    with tf.init_scope():
        seed, _ = tf.compat.v1.get_seed(1)
    return -1 if seed is None or int(seed) == _DEFAULT_GRAPH_SEED else int(seed)


_DEFAULT_GRAPH_SEED = 87654321


class QuietCallback(keras.callbacks.Callback):
    """A callback that looks at no logs of batches."""

    _supports_tf_logs = True  # Without it Keras 2 fetches the logs of every batch; there is no public way to say so.


def missing_default_callbacks(callbacks: Sequence[Any], verbose: Any) -> list[Any]:
    """Return the callbacks that `fit` would itself add to `callbacks`."""
    missing: list[Any] = []
    if not any(isinstance(callback, keras.callbacks.History) for callback in callbacks):
        missing.append(keras.callbacks.History())
    if verbose != 0 and not any(isinstance(callback, keras.callbacks.ProgbarLogger) for callback in callbacks):
        arguments = {} if KERAS_3 else {"count_mode": "steps"}
        missing.append(keras.callbacks.ProgbarLogger(**arguments))
    return missing


def keras_restored(model: Any) -> bool:
    """Tell, when training begins, whether a `BackupAndRestore` has restored a backup."""
    # Neither Keras says so in public: these are what `fit` itself looks at.
    if KERAS_3:
        return model._initial_epoch is not None
    return int(model._training_state._ckpt_saved_epoch.numpy()) >= 0


def start_at(model: Any, epoch: int | None) -> None:
    """Let `fit`, which is about to begin, start with `epoch`, or with that of its own argument if None."""
    # What a `BackupAndRestore` told it through the same attributes counts epochs, and on Keras 2 batches without
    # passing over their data.
    if KERAS_3:
        model._initial_epoch = epoch
    else:
        state: Any = model._training_state
        state.maybe_load_initial_counters_from_ckpt = lambda steps_per_epoch, initial_epoch, mode: (
            initial_epoch if epoch is None else epoch,
            0,
        )


def draw(model: Any, iterator: Any) -> tuple[Any, int]:
    """Draw what one call of the training function would; return the last batch, and the count of what was asked for."""
    # Keras 2 changes its variable before the last, shorter execution; Keras 3 just comes to the end of the data.
    steps = model.steps_per_execution if KERAS_3 else int(model._steps_per_execution.numpy())
    batch = next(iterator)
    for _ in range(steps - 1):
        batch = next(iterator, batch)
    return batch, steps


def build_metrics(model: Any, batch: Any) -> None:
    """Let `model` make the metrics that it makes at its first batch; their values mean nothing then."""

    def measure(data: Any) -> None:
        # Keras 3 puts an empty Optional where the data has None.
        data = tf.nest.map_structure(lambda part: None if isinstance(part, tf.experimental.Optional) else part, data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        y_pred = forward(model, x, training=False)
        compute_loss(model, x, y, y_pred, sample_weight, training=False)
        model.compute_metrics(x, y, y_pred, sample_weight)

    def run(data: Any) -> None:
        model.distribute_strategy.run(measure, args=(data,))

    # Once and on one batch, which is not worth a trace; several replicas make variables only inside of one.
    one = model.distribute_strategy.num_replicas_in_sync == 1
    (run if one or model.run_eagerly else tf.function(run, autograph=False))(batch)


# --- The optimizer --------------------------------------------------------------------------------


def is_loss_scale_optimizer(optimizer: Any) -> bool:
    """Tell whether `optimizer` is one of Keras's `LossScaleOptimizer`s."""
    if KERAS_3:
        return isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    # The public name is the class of new optimizers; the one of legacy optimizers shares only this method.
    return hasattr(optimizer, "get_scaled_loss")


_ARGUMENTS = (
    "clipnorm", "global_clipnorm", "clipvalue", "gradient_accumulation_steps", "loss_scale_factor", "use_ema",
)  # fmt: skip
OPTIMIZER_SETTINGS = (*_ARGUMENTS, "LossScaleOptimizer")
"""What an optimizer may do to gradients and weights besides its own rule."""


def optimizer_settings(optimizer: Any) -> dict[str, Any]:
    """Return what `optimizer` does to gradients and weights besides its own rule, by the name of its argument."""
    if optimizer is None:
        return {}
    settings = {name: getattr(optimizer, name, None) for name in _ARGUMENTS}
    if is_loss_scale_optimizer(optimizer):
        inner = optimizer.inner_optimizer
        settings = {name: getattr(inner, name, None) for name in _ARGUMENTS}
        settings["LossScaleOptimizer"] = type(inner).__name__
    return {name: value for name, value in settings.items() if value is not None and value is not False}


def loss_scale(optimizer: Any) -> tf.Tensor | None:
    """Return the factor by which `optimizer` wants the loss scaled, or None where it wants none."""
    if is_loss_scale_optimizer(optimizer):
        one = tf.ones(())
        return optimizer.scale_loss(one) if KERAS_3 else optimizer.get_scaled_loss(one)
    factor = getattr(optimizer, "loss_scale_factor", None)
    return None if factor is None else tf.constant(factor, tf.float32)


def apply_gradients(optimizer: Any, gradients: Sequence[Any], weights: Sequence[Any], *, summed: bool) -> None:
    """Update `weights` by unscaled `gradients`; `summed` says they are summed over replicas already."""
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    # Keras wants them from one graph: in a branch of a condition some are made there, and others come from outside.
    gradients = [
        None if gradient is None else tf.nest.map_structure(tf.identity, gradient, expand_composites=True)
        for gradient in gradients
    ]
    if KERAS_3:
        factor = loss_scale(optimizer)  # Keras 3 unscales inside `apply_gradients`.
        if summed and replicas > 1:
            # There is no public way around the sum in there: give each replica its share of it.
            share = tf.constant(1 / replicas)
            factor = share if factor is None else factor * share
        if factor is not None:
            gradients = scale(gradients, factor)
        optimizer.apply_gradients(zip(gradients, weights, strict=True))
        return
    if is_loss_scale_optimizer(optimizer):
        optimizer.get_unscaled_gradients([])  # They are unscaled; Keras 2 warns where it was not asked to do it.
    arguments: dict[str, Any] = {}
    if summed and replicas > 1:
        if isinstance(optimizer, _LegacyOptimizer):
            arguments["experimental_aggregate_gradients"] = False
        else:
            arguments["skip_gradients_aggregation"] = True
    optimizer.apply_gradients(zip(gradients, weights, strict=True), **arguments)


def build_optimizer(optimizer: Any, weights: Sequence[Any]) -> None:
    """Create the optimizer's own slots, so that what strategies add comes after them."""
    if is_loss_scale_optimizer(optimizer) and not KERAS_3:
        optimizer = optimizer.inner_optimizer
    if not KERAS_3 and isinstance(optimizer, _LegacyOptimizer):
        optimizer._create_all_weights(weights)  # Legacy optimizers have no public `build`.
    elif KERAS_3 and optimizer.built:
        return
    else:
        optimizer.build(weights)


def holds_state(optimizer: Any) -> bool:
    """Tell whether `optimizer` can hold variables of others, beside its own and saved along with them."""
    # Keras 2 also takes optimizers of TensorFlow 1, in a wrapper that has neither.
    return hasattr(optimizer, "add_variable_from_reference") or hasattr(optimizer, "add_slot")


def is_saved_without_state(optimizer: Any) -> bool:
    """Tell whether a `.keras` file leaves out the variables of `optimizer`, of which it holds the settings."""
    return isinstance(optimizer, _LegacyOptimizer)  # Keras 2 saves those of new optimizers only.


def add_optimizer_slots(optimizer: Any, weights: Sequence[Any], name: str) -> list[Any]:
    """Add to `optimizer` one variable of zeros for each of `weights`, saved along with its own."""
    if KERAS_3:
        return [optimizer.add_variable_from_reference(weight, name=name) for weight in weights]
    if is_loss_scale_optimizer(optimizer):
        optimizer = optimizer.inner_optimizer
    if isinstance(optimizer, _LegacyOptimizer):
        return [optimizer.add_slot(weight, name) for weight in weights]
    return [optimizer.add_variable_from_reference(weight, name) for weight in weights]


def add_optimizer_variable(optimizer: Any, name: str, slot: Slot) -> Any:
    """Add to `optimizer` one variable, not of any weight, saved along with its own."""
    dtype = tf.as_dtype(slot.dtype)
    initializer = keras.initializers.Constant(int(slot.initial) if dtype.is_integer else slot.initial)
    if KERAS_3:
        return optimizer.add_variable(slot.shape, initializer, slot.dtype, name=name)
    if is_loss_scale_optimizer(optimizer):
        optimizer = optimizer.inner_optimizer
    if isinstance(optimizer, _LegacyOptimizer):
        aggregation = tf.VariableAggregation.ONLY_FIRST_REPLICA
        return optimizer.add_weight(name, slot.shape, dtype, initializer, trainable=False, aggregation=aggregation)
    return optimizer.add_variable(slot.shape, dtype, initializer, name)


def key_of(weight: Any) -> int:
    """Return what identifies `weight` as long as it lives, whether or not it casts itself."""
    # Keras 2 wraps a weight that casts itself, see `set_dtype_policy`; the wrapper comes and goes.
    return id(weight) if KERAS_3 else id(getattr(weight, "_variable", weight))


def path_of(weight: Any) -> str:
    """Return the name of `weight` with those of the layers around it, "hidden/kernel" for example."""
    return weight.path if KERAS_3 else weight.name.split(":")[0]


def tf_variable(variable: Any) -> Any:
    """Return what TensorFlow itself knows `variable` as."""
    return variable.value if KERAS_3 and isinstance(variable, keras.Variable) else variable


# --- What layers do with an example ---------------------------------------------------------------

_SEPARABLE = {
    "mean_squared_error": "MeanSquaredError",
    "mean_absolute_error": "MeanAbsoluteError",
    "mean_absolute_percentage_error": "MeanAbsolutePercentageError",
    "mean_squared_logarithmic_error": "MeanSquaredLogarithmicError",
    "huber": "Huber",
    "log_cosh": "LogCosh",
    "poisson": "Poisson",
    "kl_divergence": "KLDivergence",
    "hinge": "Hinge",
    "squared_hinge": "SquaredHinge",
    "categorical_hinge": "CategoricalHinge",
    "categorical_crossentropy": "CategoricalCrossentropy",
    "categorical_focal_crossentropy": "CategoricalFocalCrossentropy",
    "sparse_categorical_crossentropy": "SparseCategoricalCrossentropy",
    "binary_crossentropy": "BinaryCrossentropy",
    "binary_focal_crossentropy": "BinaryFocalCrossentropy",
}
"""Losses of Keras whose value for an example is of that example alone, by the name of the function and of the class."""
_MEANS = ("sum_over_batch_size", "mean", "auto")  # "auto" is the mean of Keras 2.


def is_batch_norm(layer: Any) -> bool:
    """Tell whether `layer` is a batch norm of any kind."""
    # Those of TensorFlow 1 and across replicas, which Keras 2 has besides, have a base in common without a public name.
    kind = keras.layers.BatchNormalization if KERAS_3 else keras.layers.BatchNormalization.__base__
    return isinstance(layer, kind)


def is_separable(model: Any) -> bool:
    """Tell whether the loss of `model` is a mean of losses of examples, each of one example alone, and Keras's own."""
    if not _is_of_keras(type(model).compute_loss):
        return False
    functions = [getattr(keras.losses, name) for name in _SEPARABLE]
    classes = [getattr(keras.losses, name) for name in _SEPARABLE.values()]
    for loss in tf.nest.flatten(model.loss):
        made: Any = keras.losses.get(loss) if isinstance(loss, str) else loss
        if not (made in functions or (type(made) in classes and made.reduction in _MEANS)):
            return False
    return True


def calls_its_layers_only(model: Any) -> bool:
    """Tell whether a pass through `model` is one through its layers, in a graph known to Keras, and nothing else."""
    if not _is_of_keras(type(model).call):
        return False
    # Operations that are no layers are part of a graph of Keras 3 only; those of Keras 2 are layers.
    return all(isinstance(operation, keras.layers.Layer) for operation in getattr(model, "operations", ()))


def _is_of_keras(function: Any) -> bool:
    return function.__module__.split(".")[0] == "keras"


def regularization(model: Any) -> list[tf.Tensor]:
    """Return those losses of `model` that are of its weights alone, whatever it was called on."""
    if KERAS_3:
        return [weight.regularizer(weight) for weight in model.trainable_variables if weight.regularizer is not None]
    # Among the public `losses` are those of the last call, too.
    losses = [loss() for layer in layers_of(model) for loss in layer._callable_losses]
    return [loss for loss in losses if loss is not None]


class Call(NamedTuple):
    """One call of a layer: what it got, and what it made of it before its activation."""

    layer: Any
    inputs: tf.Tensor
    outputs: tf.Tensor


@contextlib.contextmanager
def watched_calls(layers: Sequence[Any]) -> Iterator[list[Call]]:
    """Yield a list that takes in each call of one of `layers`, as long as this lasts."""
    calls: list[Call] = []
    before = [(vars(layer), {name: vars(layer)[name] for name in _WATCHED if name in vars(layer)}) for layer in layers]
    for layer in layers:
        _watch(layer, calls)
    try:
        yield calls
    finally:
        for attributes, own in before:
            for name in _WATCHED:
                attributes.pop(name, None)
            attributes.update(own)


_WATCHED = ("call", "activation")


def _watch(layer: Any, calls: list[Call]) -> None:
    # Neither Keras tells, where it computes, what a layer got, or made before its activation. Both look for the two
    # attributes at each call; they are set past `Layer.__setattr__`, which would track them.
    call, made = layer.call, []
    activation: Any = getattr(layer, "activation", None)

    @functools.wraps(call)
    def watched_call(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = call(inputs, *args, **kwargs)
        calls.append(Call(layer, inputs, made.pop() if made else outputs))
        return outputs

    def watched_activation(values: Any) -> Any:
        made.append(values)
        return activation(values)

    vars(layer)["call"] = watched_call
    if activation is not None:
        vars(layer)["activation"] = watched_activation


# --- Dtype policies -------------------------------------------------------------------------------


def layers_of(model: Any) -> list[Any]:
    """Return `model` and every layer inside it, at any depth, each once."""
    # Neither Keras has a public way: `model.layers` stops at the first level, and Keras 2's
    # `submodules` holds metrics and optimizers too.
    return list(dict.fromkeys(model._flatten_layers()))


def statistics_of(model: Any) -> list[Any]:
    """Return the variables that layers of `model` keep and no optimizer trains, frozen or not: those of batch norm."""
    # `non_trainable_weights` of a frozen layer are all it has, and of a model those of its frozen layers, too.
    name = "_non_trainable_variables" if KERAS_3 else "_non_trainable_weights"
    found = {key_of(v): v for layer in layers_of(model) for v in getattr(layer, name, [])}
    return [variable for variable in found.values() if tf.as_dtype(variable.dtype).is_floating]


def output_layers_of(model: Any) -> list[Any]:
    """Return the innermost layers whose outputs are those of `model`; none where that is not known."""
    if isinstance(model, keras.Sequential):
        last = model.layers[-1:]
    else:
        tensors = tf.nest.flatten(getattr(model, "outputs", None) or [])
        # `_keras_history` is what both Kerases document for extending a graph of layers; Keras 2 and 3
        # name its first field `layer` and `operation`.
        last = [tensor._keras_history[0] for tensor in tensors if hasattr(tensor, "_keras_history")]
    return [inner for layer in last for inner in _innermost(layer)]


def _innermost(layer: Any) -> list[Any]:
    if isinstance(layer, keras.Model):
        return output_layers_of(layer)
    return _innermost(layer.layer) if isinstance(layer, keras.layers.TimeDistributed) else [layer]


def dtype_policy_name(layer: Any) -> str:
    """Return the name of the layer's dtype policy, `"float32"` or `"mixed_bfloat16"` for example."""
    return layer.dtype_policy.name


def is_mixed(layer: Any) -> bool:
    """Tell whether `layer` computes in another dtype than that of its variables."""
    policy = layer.dtype_policy
    return policy.compute_dtype != policy.variable_dtype


def set_dtype_policy(layer: Any, name: str) -> None:
    """Let `layer`, built or not, compute under the policy `name`; its variables keep their dtype."""
    if KERAS_3:
        layer.dtype_policy = name
        return
    # Keras 2 has no public setter, and decides when a variable is made whether the layer will see it
    # cast: under a mixed policy the variables of a built layer have to be wrapped now.
    autocast_variable = importlib.import_module("keras.src.mixed_precision.autocast_variable")
    # These keep their variables as they are under a mixed policy too, and cast by themselves. All kinds of batch norm,
    # that of TensorFlow 1 among them, have the base in common.
    casts_itself = (keras.layers.BatchNormalization.__base__, keras.layers.LayerNormalization, keras.layers.Embedding)
    policy = keras.mixed_precision.Policy(name)
    mixed = policy.compute_dtype != policy.variable_dtype

    def replace(variable: Any) -> Any:
        if mixed and variable.dtype.is_floating and not isinstance(variable, autocast_variable.AutoCastVariable):
            return autocast_variable.create_autocast_variable(variable)
        if not mixed and isinstance(variable, autocast_variable.AutoCastVariable):
            return variable._variable
        return variable

    replacements = []
    for weights in (layer._trainable_weights, layer._non_trainable_weights):
        for index, variable in enumerate(() if isinstance(layer, casts_itself) else weights):
            replacement = replace(variable)
            if replacement is variable:
                continue
            if not _is_in_container(layer, variable):
                replacements.append((weights, index, variable, replacement))
            elif mixed:  # The other way round it may stay: it casts only where a layer asks for it.
                raise ModelConflictError(
                    f"The layer {layer.name!r} keeps weights in a list or a dict, where Keras 2 cannot cast them once "
                    "they are made. Apply the strategies before the model is built, or keep each weight in an "
                    "attribute of its own."
                )
    layer._set_dtype_policy(name)
    for weights, index, variable, replacement in replacements:
        weights[index] = replacement
        _replace_attribute(layer, variable, replacement)


def _is_in_container(layer: Any, variable: Any) -> bool:
    of_keras = ("_trainable_weights", "_non_trainable_weights", "_obj_reference_counts_dict")
    containers = [
        value
        for name, value in vars(layer).items()
        if isinstance(value, (list, tuple, dict)) and name not in of_keras and not name.startswith("_self_")
    ]
    return any(held is variable for held in tf.nest.flatten(containers))


def _replace_attribute(layer: Any, old: Any, new: Any) -> None:
    # Past `Layer.__setattr__`, which would track the variable a second time.
    for name, value in list(vars(layer).items()):
        if value is old:
            object.__setattr__(layer, name, new)


def with_mask(tensor: Any, mask: Any) -> Any:
    """Let `tensor` carry `mask`, where it is not None, as layers do; return `tensor`."""
    # The attribute is the one Keras's guide to masking shows; only Keras 3 has functions for it, private ones.
    if mask is not None:
        tensor._keras_mask = mask
    return tensor


def mask_of(y_pred: Any) -> Any:
    """Return the Keras mask that `y_pred` carries, or None."""
    return getattr(y_pred, "_keras_mask", None)


# --- A batch that is repeated ---------------------------------------------------------------------

_HALF = "_trainstep_half"


def repeated(value: Any) -> Any:
    """Return a tensor followed by itself, along its first dimension, with its mask; a None stays None.

    It knows that it is, and `forward` passes what both halves have in common once: where dropout comes late in a net,
    nearly all of it.
    """
    if value is None:
        return None
    if isinstance(value, tf.SparseTensor):
        return tf.sparse.concat(0, [value, value])
    twice = with_mask(tf.concat([value, value], axis=0), repeated(mask_of(value)))
    if isinstance(twice, tf.Tensor):
        setattr(twice, _HALF, value)
    return twice


def _half_of(x: Any) -> Any:
    halves = [getattr(tensor, _HALF, None) for tensor in tf.nest.flatten(x)]
    masked = any(mask_of(half) is not None for half in halves)
    return None if masked or any(half is None for half in halves) else tf.nest.pack_sequence_as(x, halves)


def _last_before_chance(model: Any) -> Any:
    """Return the last layer up to which both halves of a repeated batch are the same; None where none is known.

    All that the outputs depend on passes through its output, and nothing up to there draws random numbers.
    """
    # The graph of a model is public as a picture only. Replicas take turns within a pass, and share the layers.
    of_keras = inspect.unwrap(type(model).call).__module__.split(".")[0] == "keras"
    if not of_keras or tf.distribute.get_strategy().num_replicas_in_sync > 1:
        return None
    ends = [_node_of(output) for output in getattr(model, "outputs", None) or []]
    nodes = _in_order(ends)
    last_use = {id(parent): place for place, node in enumerate(nodes) for parent in node.parent_nodes}
    last_use |= {id(node): len(nodes) for node in ends}
    uses = collections.Counter(id(part) for node in nodes for part in _parts_of(_operation_of(node)))
    found, reach = None, 0  # `reach`: the last node that needs one of those before.
    for place, node in enumerate(nodes):
        operation = _operation_of(node)
        if not all(map(_is_certain, _parts_of(operation))):
            break
        reach_here = last_use[id(node)]
        one = uses[id(operation)] == 1 and len(tf.nest.flatten(node.outputs)) == 1
        able = one and not node.is_input and isinstance(operation, keras.layers.Layer)
        if able and reach <= place and reach_here < len(nodes):
            found = operation
        reach = max(reach, reach_here)
    return found


def _node_of(tensor: Any) -> Any:
    history = tensor._keras_history
    return history[0]._inbound_nodes[history.node_index]


def _operation_of(node: Any) -> Any:
    return node.operation if KERAS_3 else node.layer


def _in_order(ends: Sequence[Any]) -> list[Any]:
    """Return the nodes of a graph that ends in these, each after those it depends on."""
    found: dict[int, Any] = {}
    waiting = [(node, False) for node in reversed(ends)]
    while waiting:  # Not by recursion: a net may be deeper than Python's stack.
        node, ready = waiting.pop()
        if id(node) in found:
            continue
        if ready:
            found[id(node)] = node
        else:
            waiting += [(node, True), *((parent, False) for parent in node.parent_nodes)]
    return list(found.values())


def _parts_of(operation: Any) -> list[Any]:
    return layers_of(operation) if isinstance(operation, keras.layers.Layer) else [operation]


def _is_certain(part: Any) -> bool:
    """Tell whether a layer, or an operation of Keras 3, makes the same of the same, and no mask."""
    own_code = type(part).__module__.split(".")[0] != "keras" or type(part).__name__.endswith("Lambda")
    draws = getattr(part, "_seed_generators", None) or getattr(part, "_random_generator", None)
    masks = isinstance(part, keras.layers.Masking) or getattr(part, "mask_zero", False)
    return not (own_code or draws or masks)


@contextlib.contextmanager
def _repeating_its_output(layer: Any) -> Iterator[None]:
    call, repeats = layer.call, iter([2])  # Only where the graph has it: a layer of the user may call it once more.

    @functools.wraps(call)
    def repeating(*args: Any, **kwargs: Any) -> Any:
        return tf.concat([call(*args, **kwargs)] * next(repeats, 1), axis=0)

    with _with_own("call", [(layer, repeating)]):
        yield


# --- Calls that are made again --------------------------------------------------------------------


def check_repeatable(layer: Any) -> None:
    """Raise `ModelConflictError` where a second call of `layer` would draw other random numbers than the first."""
    if KERAS_3:
        return  # Their state is in variables, see `with_repeated_calls`.
    for inner, _ in _random_generators(layer):
        drawn = [getattr(inner, name, 0) for name in ("rate", "dropout", "recurrent_dropout", "stddev")]
        if any(drawn) or not any(hasattr(inner, name) for name in ("rate", "dropout", "stddev")):
            raise ModelConflictError(
                f"The layer {inner.name!r} draws random numbers, and on Keras 2 cannot draw the same ones again: its "
                "gradient would be that of another network. Leave it out, or use Keras 3."
            )


@contextlib.contextmanager
def with_repeated_calls(layers: Sequence[Any]) -> Iterator[None]:
    """Let each call of one of `layers` be made once more by whoever differentiates it; nothing of it is kept till then.

    The second call has the masks of dropout of the first, and leaves no trace in statistics.
    """
    with _with_own("call", [(layer, _repeated(layer, layer.call)) for layer in layers]):
        yield


def _repeated(layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def repeated_call(*args: Any, **kwargs: Any) -> Any:
        flat = tf.nest.flatten((args, kwargs))
        moving = [index for index, each in enumerate(flat) if tf.is_tensor(each) and each.dtype.is_floating]
        # On Keras 3 random state is among them: what is drawn the second time is drawn from there.
        state = [(variable, tf.convert_to_tensor(variable)) for variable in _changing(layer)] if KERAS_3 else []
        found: list[Any] = []

        def outputs(*tensors: tf.Tensor) -> list[tf.Tensor]:
            given = list(flat)
            for index, tensor in zip(moving, tensors, strict=True):
                given[index] = tensor
            first = not found
            made = _called(layer, call, state, tf.nest.pack_sequence_as((args, kwargs), given), first=first)
            if first:
                found.append(tf.nest.map_structure(lambda each: each, made))
            return tf.nest.flatten(made)

        tensors = tf.recompute_grad(outputs)(*(flat[index] for index in moving))
        pairs = zip(tensors, tf.nest.flatten(found[0]), strict=True)
        return tf.nest.pack_sequence_as(found[0], [with_mask(tensor, mask_of(before)) for tensor, before in pairs])

    return repeated_call


def _changing(layer: Any) -> list[Any]:
    trained = {id(variable) for variable in layer.trainable_variables}
    return [variable for variable in layer.variables if id(variable) not in trained]


def _called(layer: Any, call: Callable[..., Any], state: Sequence[Any], given: Any, *, first: bool) -> Any:
    args, kwargs = given
    if first:
        losses = _num_added_losses(layer)
        made = call(*args, **kwargs)
        if _num_added_losses(layer) != losses:
            raise ModelConflictError(
                f"The layer {layer.name!r} adds to the loss in its call, and what is computed again has no gradient "
                "but that of its outputs. Leave it out."
            )
        return made
    # The layer as a whole: outside of it weights are not cast as its dtype policy says.
    if KERAS_3:
        with keras.StatelessScope(state, collect_losses=True):
            return layer(*args, **kwargs)
    before = _snapshot(_changing(layer))
    made = layer(*args, **kwargs)
    for variable, value in before:
        variable.assign(value)
    return made


def _num_added_losses(layer: Any) -> int:
    if KERAS_3:
        return len(layer.losses)
    # The public `losses` shows those of this call in place of those of the graph, which may be as many.
    return sum(len(inner._losses) + len(inner._eager_losses) for inner in layers_of(layer))
