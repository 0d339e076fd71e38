"""The contract between a strategy and the training step.

`Strategy` owns the only `train_step`. A strategy is a subclass that overrides one of its hooks, or
two, and calls `super()`; composing several is inheriting from all of them, sorted by stage:

    train_step(data)
        batch = transform_batch(x, y, sample_weight)         mixup, adversarial examples
        train_batch(batch)                                   several updates from one batch
            compute_gradients(batch)                         SAM, outside or inside of what cuts the batch
                compute_objective(batch)                     TRADES, R-Drop: by default the model's own loss
            sum over replicas                                gradients are now the same everywhere
            update_weights(gradients)                        from the outside in, each hands on to the next:
                gradient_accumulation                        or keeps it, until the window is full
                    mixed_precision                          or skips it, where it is not finite
                        gradient_clipping
                            optimizer.apply_gradients
        report_metrics(batch)                                the metrics given to `compile`

Gradients are unscaled, whatever the loss scale, in a list aligned with `model.trainable_variables`;
a weight the loss does not depend on has None.
"""

import contextlib
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, final

import keras
import numpy as np
import tensorflow as tf

from trainstep import _seam, errors, reports
from trainstep.definition import (
    Declared,
    check_attributes,
    check_losses,
    check_optimizer,
    check_xla,
    why_without_xla,
)
from trainstep.errors import (
    ModelConflictError,
    NonFiniteGradientError,
    NotCompiledError,
    StrategyDefinitionError,
    TrainstepError,
)
from trainstep.gradients import Gradients, differentiate, scale
from trainstep.replicas import check_distribution, forget_traces, sum_over_replicas
from trainstep.resuming import resumable
from trainstep.saving import check_format
from trainstep.state import check_holds_state, slots_of, state_of

# A strategy is always inherited from together with a `keras.Model`, and says so to type checkers only: at run time
# it must come before the model's own class, whichever that is.
_ModelBase = keras.Model if TYPE_CHECKING else object


class Batch(NamedTuple):
    """What one step trains on; all tensors share their first dimension, the examples.

    `extra` holds what one hook leaves for another, by name. `through` is a function that what the model puts out
    passes through before there is a loss of it: for who has to know, or change, how the loss depends on each output.
    """

    x: Any
    y: Any = None
    sample_weight: Any = None
    extra: Mapping[str, Any] = MappingProxyType({})
    through: Callable[[Any], Any] | None = None


class Objective(NamedTuple):
    """The scalar loss (the replica's share of it, see `compute_objective`) and the predictions behind it."""

    loss: tf.Tensor
    y_pred: Any


class Evaluation(NamedTuple):
    """An objective with its gradients."""

    loss: tf.Tensor
    y_pred: Any
    gradients: Gradients


class Update(NamedTuple):
    """Gradients on their way to the optimizer, the same on every replica.

    `terms` is the number of loss terms they are the mean of, over all replicas: a float32 scalar.
    """

    gradients: Gradients
    terms: tf.Tensor


class Strategy(Declared, _seam.OnManyMachines, _ModelBase, root=True):
    """Base of all strategies, and the root that ends every hook.

    Not for use by itself: `trainstep.apply`, `trainstep.model_class`, or a strategy among the bases
    of a `keras.Model` subclass put it in front of the model's own class.
    """

    # --- Hooks: a strategy overrides these ---

    def transform_batch(self, batch: Batch) -> Batch:
        """Return the batch to train on in place of `batch`."""
        return batch

    def train_batch(self, batch: Batch) -> Evaluation:
        """Update the weights from `batch`, and return the evaluation that is reported."""
        evaluation = self.compute_gradients(batch)
        if self.trainable_variables:
            gradients, all_terms = shares_of_gradients(self, batch, evaluation)
            if type(self).acts_on_updates:
                gradients = sum_over_replicas(gradients)
            self.update_weights(Update(gradients, all_terms))
        return evaluation

    def compute_objective(self, batch: Batch) -> Objective:
        """Return the loss to descend and the predictions, from a forward pass in training mode.

        The loss is a scalar of the dtype of the predictions. Under a distribution strategy it is the
        replica's share: the mean over its examples, divided by the number of replicas.
        """
        y_pred = _seam.forward(self, batch.x, training=True)
        if batch.through is not None:
            y_pred = batch.through(y_pred)
        loss = _seam.compute_loss(self, batch.x, batch.y, y_pred, batch.sample_weight, training=True)
        return Objective(loss, y_pred)

    def compute_gradients(self, batch: Batch) -> Evaluation:
        """Return the objective with its gradients with respect to `trainable_variables`."""
        with tf.GradientTape() as tape:
            loss, y_pred = self.compute_objective(batch)
        return Evaluation(loss, y_pred, differentiate(self, tape, loss, self.trainable_variables))

    def update_weights(self, update: Update) -> None:
        """Update the weights, and whatever moves with them."""
        summed = type(self).acts_on_updates
        _seam.apply_gradients(self.optimizer, update.gradients, self.trainable_variables, summed=summed)

    def report_metrics(self, batch: Batch, evaluation: Evaluation) -> dict[str, Any]:
        """Update the metrics and return their values by name."""
        logs = self.compute_metrics(batch.x, batch.y, evaluation.y_pred, batch.sample_weight)
        return {**logs, **reports.results(self)} if type(self).collects_reports else logs

    @final
    def record(self, name: str, value: Callable[[], Any]) -> None:
        """Report a number, a scalar that is the same on every replica, under a `name` declared in `reports`.

        `value` is called only where a strategy of the model collects reports: elsewhere it costs nothing.
        """
        if name not in type(self).declared_reports:
            raise StrategyDefinitionError(
                f"{name!r} is recorded, and no strategy declares it: write `reports=lambda options: "
                f"{{{name!r}: Report(...)}}` in the declaration."
            )
        for tally in reports.tallies(self):
            if tally.name == name:
                tally.add(value())

    def loss_scale(self) -> tf.Tensor | None:
        """Return the factor by which losses are multiplied before, and gradients divided after, a backward pass."""
        return _seam.loss_scale(self.optimizer)

    def check_model(self) -> None:
        """Refuse a model the strategy cannot train. Called before it is applied; raises a `TrainstepError`."""
        check_attributes(self)
        check_distribution(self)

    def attach_strategies(self) -> None:
        """Change what has to change in the model itself, its layers' dtype policies for example; idempotent."""
        pass  # Called from `train_step`, and AutoGraph, which Keras 2 uses, cannot take a body of nothing but a string.

    def detach_strategies(self) -> None:
        """Undo `attach_strategies`."""

    def evaluation_weights(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the model has the weights it is to be judged by: by default those it trains."""
        return contextlib.nullcontext()

    def keep_statistics(self, statistics: Sequence[tf.Tensor]) -> None:
        """Take batch-norm statistics estimated for `evaluation_weights`: by default they become those of the model.

        Called on the host by `reestimate_batch_norm`, with one tensor for each of `_seam.statistics_of`.
        """
        for variable, value in zip(_seam.statistics_of(self), statistics, strict=True):
            variable.assign(value)

    def finish_epoch(self) -> None:
        """Finish what the last steps left open. Called on the host when an epoch of `fit` ends, before validation."""

    def check_progress(self) -> None:
        """Raise what went wrong in steps that could not say so themselves, see `require`.

        Called on the host after `finish_epoch`, and after each `train_on_batch`.
        """

    # --- The step ---

    @final
    def train_step(self, data: Any) -> dict[str, Any]:
        """Train on one batch, as `keras.Model.train_step` does, through the hooks."""
        if self.optimizer is None:
            raise NotCompiledError("There is no optimizer to train with: pass `optimizer=` to `compile`.")
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(tf.nest.map_structure(_as_tensor, data))
        batch = Batch(x, _seam.by_place(self, y), _seam.by_place(self, sample_weight))
        if type(self).attach_strategies is not Strategy.attach_strategies:
            _seam.ensure_built(self, batch.x)
            self.attach_strategies()  # To the layers, too, that the model made only now.
        batch = self.transform_batch(batch)
        composite = type(self).composes_objectives
        with _seam.recorded_loss(self, batch.x, composite=composite) as record_loss:
            evaluation = self.train_batch(batch)
            record_loss(evaluation.loss)
        if not self.trainable_variables:
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        return self.report_metrics(batch, evaluation)

    @property
    def strategy_state(self) -> dict[str, dict[str, Any]]:
        """State variables by strategy name and slot name, see `state_of`."""
        return state_of(self)

    # --- What wraps Keras's own entry points ---

    @property
    def metrics(self) -> list[Any]:
        """The metrics of the model, and while it is trained the numbers its strategies report."""
        return [*super().metrics, *reports.shown(self)]

    @functools.wraps(keras.Model.reset_metrics)
    def reset_metrics(self) -> None:
        """Reset the metrics as Keras does, and the numbers its strategies report, which are among them in training."""
        super().reset_metrics()
        reports.reset(self)

    @functools.wraps(keras.Model.make_train_function)
    def make_train_function(self, *args: Any, **kwargs: Any) -> Any:
        """Make the function that trains, as Keras does, and before it what it reports into."""
        reports.prepare(self)
        return super().make_train_function(*args, **kwargs)

    @functools.wraps(keras.Model.evaluate)
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as Keras does, with `evaluation_weights`: what is reported of updates is no part of it."""
        with reports.training(self, active=False), self.evaluation_weights():
            return super().evaluate(*args, **kwargs)

    @functools.wraps(keras.Model.predict)
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict as Keras does, with `evaluation_weights`."""
        with self.evaluation_weights():
            return super().predict(*args, **kwargs)

    @functools.wraps(keras.Model.export)
    def export(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Export as Keras does, with `evaluation_weights`: what is served is what was judged."""
        with self.evaluation_weights():
            return super().export(filepath, *args, **kwargs)

    @functools.wraps(keras.Model.compile)
    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile as Keras does, and refuse what `apply` refuses of a model and its optimizer and loss."""
        forget_traces(self)
        self.check_model()
        given = _given(super().compile, args, kwargs)
        optimizer = given.get("optimizer")
        check_optimizer(type(self), keras.optimizers.get(optimizer) if isinstance(optimizer, Mapping) else optimizer)
        _seam.check_steps_per_execution(self, given.get("steps_per_execution") or 1)
        check_xla(type(self), given.get("jit_compile"))
        self.detach_strategies()  # Under a float16 policy Keras would add a loss scale of its own.
        try:
            super().compile(*args, **kwargs)
        finally:
            self.attach_strategies()
        if self.jit_compile and why_without_xla(type(self)):
            self.jit_compile = False  # Keras 3 decides for XLA by itself, where there is a GPU.
        check_optimizer(type(self), self.optimizer)  # Of which only a description may have been given.
        check_losses(self)
        check_holds_state(self)
        _make_state(self)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as the saved model was; Keras leaves a model with a `compile` of its own uncompiled."""
        inherited: Any = super().compile_from_config
        if inherited.__func__ is not keras.Model.compile_from_config:  # The user's own knows what it was saved with.
            inherited(config)
            return
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            _seam.build_optimizer(self.optimizer, self.trainable_variables)

    @functools.wraps(keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Keras does, and tell the strategies when an epoch ends."""
        bound = inspect.signature(super().fit).bind(*args, **kwargs)
        arguments = _arguments_with_callbacks(type(self), bound)
        callbacks: Any = arguments.get("callbacks")
        given = isinstance(callbacks, keras.callbacks.CallbackList)
        listed = list(callbacks.callbacks if given else tf.nest.flatten(callbacks or []))
        _seam.let_the_chief_write(listed, self)
        for callback in listed:
            if isinstance(callback, keras.callbacks.ModelCheckpoint) and not callback.save_weights_only:
                check_format(self, {"filepath": callback.filepath})  # Not after an epoch that nobody will get back.
        with resumable(self, [_EpochEnd(), *listed], {**bound.arguments, **arguments}) as all_callbacks:
            if not given:
                arguments["callbacks"] = all_callbacks
                with _explained_errors(), reports.training(self):
                    return super().fit(*bound.args, **bound.kwargs)
            callbacks.callbacks[:] = all_callbacks  # Keras 3 has no method for it.
            callbacks.set_model(self)
            try:
                with _explained_errors(), reports.training(self):
                    return super().fit(*bound.args, **bound.kwargs)
            finally:
                callbacks.callbacks[:] = listed

    @functools.wraps(keras.Model.train_on_batch)
    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Train on one batch as Keras does."""
        with _explained_errors(), reports.training(self):
            logs = super().train_on_batch(*args, **kwargs)
        self.check_progress()
        return logs


def _as_tensor(value: Any) -> Any:
    # Keras 3 hands on arrays as they are where a step runs eagerly.
    return tf.convert_to_tensor(value) if isinstance(value, np.ndarray) else value


def _make_state(model: Any) -> None:
    """Make the state of strategies now, where it can be, so that a checkpoint restores into it."""
    trains = model.optimizer is not None and model.built and model.trainable_variables
    if trains and any(slots_of(type(model)).values()):
        with model.distribute_strategy.scope():
            state_of(model)


def _given(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that `method` is called with, by name, by position or by name."""
    bound = inspect.signature(method).bind(*args, **kwargs)
    given = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given


def _arguments_with_callbacks(cls: type, bound: inspect.BoundArguments) -> dict[str, Any]:
    """Return the mapping among the arguments of `fit` that holds the callbacks: where a user wraps it, `**kwargs`."""
    if "callbacks" in bound.signature.parameters:
        return bound.arguments
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            return bound.arguments.setdefault(name, {})
    raise ModelConflictError(
        f"`fit` of {cls.__name__} takes no callbacks, which strategies need. Let it take **kwargs."
    )


class _EpochEnd(keras.callbacks.Callback):
    """Comes first in the list, so that other callbacks, and validation, see the epoch finished."""

    def on_train_begin(self, logs: Any = None) -> None:
        del logs
        _make_state(self.model)  # On several replicas Keras 3 has built the model by now, and a backup comes next.

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del epoch, logs
        self._open = True

    def on_test_begin(self, logs: Any = None) -> None:
        del logs
        self._finish()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        del epoch
        self._finish()
        if logs is not None:  # Keras took them before the epoch was finished.
            logs.update({name: float(value) for name, value in reports.results(self.model).items()})

    def _finish(self) -> None:
        if self._open:
            self._open = False
            model: Any = self.model
            model.finish_epoch()
            model.check_progress()


_FAILURE = re.compile(r"trainstep (\w+): (.*)")


def require(condition: tf.Tensor, message: str, error: type[TrainstepError] = NonFiniteGradientError) -> Any:
    """Stop training from inside the step unless `condition`; `fit` raises `error`, a class of `trainstep.errors`.

    Returns what must not happen where it stops has to depend on.

    XLA leaves such checks out: a strategy that needs one repeats it in `check_progress`.
    """
    return tf.debugging.Assert(condition, [f"trainstep {error.__name__}: {message}"])


class _explained_errors:  # noqa: N801  Used like a function.
    """Turn the operation error of `require` into one that starts with its message."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        found = _FAILURE.search(str(error)) if isinstance(error, tf.errors.InvalidArgumentError) else None
        if found:
            message = found[2].rstrip("'\"] ").replace("\\'", "'")  # TensorFlow shows a quoted string.
            raise getattr(errors, found[1])(message) from error


def shares_of_gradients(model: Any, batch: Batch, evaluation: Evaluation) -> tuple[Gradients, tf.Tensor]:
    """Return this replica's parts of the gradients, which sum to those of the mean over all loss terms; and how many.

    Keras divides the mean over a replica's examples by the number of replicas, so that an example in a smaller share
    would count for more. A compiled loss that is a sum needs no weights.
    """
    terms = num_loss_terms(batch, evaluation.y_pred)
    [all_terms] = sum_over_replicas([terms])
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if replicas == 1 or _seam.sums_its_loss(model):
        return evaluation.gradients, all_terms
    return scale(evaluation.gradients, tf.math.divide_no_nan(replicas * terms, all_terms)), all_terms


def summed_gradients(model: Any, batch: Batch, evaluation: Evaluation) -> Gradients:
    """Return the gradients of the mean over the loss terms of all replicas, the same on each."""
    shares, _ = shares_of_gradients(model, batch, evaluation)
    return sum_over_replicas(shares)


def num_loss_terms(batch: Batch, y_pred: Any) -> tf.Tensor:
    """Return how many terms the mean of the loss runs over: examples, or unmasked entries. A float32 scalar."""
    masks = [_seam.mask_of(output) for output in tf.nest.flatten(y_pred)]
    if len(masks) == 1 and masks[0] is not None:
        return tf.reduce_sum(tf.cast(masks[0], tf.float32))
    return tf.cast(_seam.num_examples(batch.x), tf.float32)
