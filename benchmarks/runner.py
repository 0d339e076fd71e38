"""Training one strategy on one task with one seed, and measuring it."""

import contextlib
import logging
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import keras
import tensorflow as tf

from trainstep import _seam
from trainstep.benchmarks.attack import Attack, compiled_attack, robust_accuracy
from trainstep.benchmarks.data import Source, first_batch, train_batches, validation_batches
from trainstep.benchmarks.errors import DivergedError
from trainstep.benchmarks.result import Cell
from trainstep.composition import Composition, apply
from trainstep.errors import UnsupportedInputError


@dataclass(frozen=True)
class Task:
    """What is trained: everything but the strategy and the seed."""

    build: Callable[[int], Any]
    """Seed -> a new model, not compiled."""
    train: Source
    validation: Source
    epochs: int
    batch_size: int
    make_optimizer: Callable[[], Any]
    loss: Any
    make_metric: Callable[[], Any]
    attack: Attack | None
    reusable: bool = False
    """Whether all state of a model in training is in its variables and its optimizer's, so that setting those anew
    is as good as a new model. Not known of a user's own: a layer may draw from a state nobody can reach."""
    initial: dict[int, list[Any]] = field(default_factory=dict)
    """Initial weights by seed, kept from the first model built with it."""

    def plain_model(self, seed: int) -> Any:
        """Return a new model with the initial weights of `seed`, and the global seeds set to it."""
        keras.utils.set_random_seed(seed)  # For builders, and for dropout, without a seed of their own.
        model = self.build(seed)
        if not model.built:
            _seam.forward(model, first_batch(self.train, self.batch_size)[0], training=False)
        # A builder may draw from where no seed of ours reaches; paired runs must start alike all the same.
        model.set_weights(self.initial.setdefault(seed, model.get_weights()))
        return model


class Trainer:
    """One strategy on its way through the seeds: compiled once where that is safe, else for each seed."""

    def __init__(self, task: Task, composition: Composition) -> None:
        self.task = task
        self._composition = composition
        self._model: Any = None
        self._attacked: Any = None
        self._optimizer_state: list[tuple[Any, Any]] = []

    @property
    def spec(self) -> dict[str, dict[str, Any]]:
        """All options by strategy name, outermost strategy first, as JSON has them."""
        return {
            strategy.declaration.name: options.model_dump(mode="json")
            for strategy, options in self._composition.items()
        }

    def ready(self, seed: int) -> Any:
        """Return a compiled model as new, with the initial weights of `seed`.

        Raises whatever the strategies, or Keras, have against the model or the optimizer.
        """
        plain = self.task.plain_model(seed)
        if self._model is None or not self.task.reusable:
            self._compile(plain)
        else:
            for variable, value in zip(self._model.variables, plain.variables, strict=True):
                variable.assign(value)
            for variable, value in self._optimizer_state:
                variable.assign(value)
        return self._model

    def _compile(self, model: Any) -> None:
        names = {strategy.declaration.name: options for strategy, options in self._composition.items()}
        apply(model, names).compile(self.task.make_optimizer(), self.task.loss, metrics=[self.task.make_metric()])
        if self.task.reusable:
            # Made now, so that their first values are known. The state of the strategies is among them.
            _seam.build_optimizer(model.optimizer, model.trainable_variables)
            self._optimizer_state = [(v, v.numpy()) for v in model.optimizer.variables]
        self._model, self._attacked = model, None

    def attacked(self, attack: Attack) -> Any:
        """Return the compiled attack on the model that `ready` returned last."""
        if self._attacked is None:
            self._attacked = compiled_attack(self._model, attack)
        return self._attacked


def run_cell(trainer: Trainer, cell: Cell, on_epoch: Callable[[], None]) -> Cell:
    """Train, and return `cell` with what was measured, or with the reason why there is nothing.

    Args:
        trainer: the strategy, and what to train.
        cell: says which label and seed this is; its measurements are still empty.
        on_epoch: called after each epoch.
    """
    task, watch = trainer.task, _Watch(on_epoch)
    measured: dict[str, Any] = {}
    with quiet_tracing():
        try:
            model = trainer.ready(cell.seed)
            batches = train_batches(task.train, seed=cell.seed, epochs=task.epochs, batch_size=task.batch_size)
            validation = validation_batches(task.validation, task.batch_size)
            model.fit(
                batches.dataset,
                steps_per_epoch=batches.steps_per_epoch,
                epochs=task.epochs,
                validation_data=validation,
                shuffle=False,  # The order is made already; and Keras would warn of a dataset it cannot shuffle.
                callbacks=[watch],
                verbose=0,
            )
            measured = _robustness(trainer, validation)
        except Exception as error:  # noqa: BLE001  Whatever a strategy raises is its result; the others go on.
            measured = {"failure": first_line(error)}
    return cell.model_copy(update={**measured, **watch.measured()})


def first_line(error: BaseException) -> str:
    """Return the class of `error` and the line of its message that says what happened."""
    text = re.sub(r"\x1b\[\d+m", "", str(error))  # Keras prints some messages in bold.
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    nodes = [index for index, line in enumerate(lines) if line.startswith("[[{{node")]
    if nodes and nodes[0] > 0:  # TensorFlow puts the message after the stack of the operation, before its name.
        lines = lines[nodes[0] - 1 :]
    elif lines and lines[0].startswith("in user code"):  # Autograph quotes the code, then the error it re-raises.
        lines = [line.split(": ", 1)[1] for line in lines if re.match(r"\w+(\.\w+)*Error: ", line)] or lines
    elif len(lines) > 1 and lines[0].startswith(("Exception encountered when calling", "Graph execution error")):
        lines = lines[1:]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


@contextlib.contextmanager
def quiet_tracing() -> Iterator[None]:
    """Hold back TensorFlow's warning that functions are traced too often: every cell has a new model."""

    def keep(record: logging.LogRecord) -> bool:
        return "retracing" not in record.getMessage()

    logger = tf.get_logger()
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _robustness(trainer: Trainer, validation: tf.data.Dataset) -> dict[str, Any]:
    attack = trainer.task.attack
    if attack is None:
        return {"not_robust": "no attack was asked for: give its budget as attack={'epsilon': ...}"}
    try:
        return {"robust_accuracy": robust_accuracy(trainer.attacked(attack), validation, attack)}
    except UnsupportedInputError as error:
        return {"not_robust": str(error)}


class Clock(keras.callbacks.Callback):
    """Takes the time of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.durations: list[float] = []
        """Seconds, by step; the first with tracing and compilation."""
        self._begin = 0.0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        del batch, logs
        self._begin = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        del batch
        float((logs or {}).get("loss", 0.0))  # Waits until the step is done.
        self.durations.append(time.perf_counter() - self._begin)


class _Watch(Clock):
    """Keeps the values of each epoch as well, and stops a run that diverged."""

    def __init__(self, on_epoch: Callable[[], None]) -> None:
        super().__init__()
        self._on_epoch = on_epoch
        self._losses: list[float] = []
        self._metrics: list[float] = []

    def measured(self) -> dict[str, Any]:
        """Return what there is, by the name of its field in `Cell`."""
        return {
            "losses": tuple(self._losses),
            "metrics": tuple(self._metrics),
            "step_seconds": median(self.durations[1:]) if len(self.durations) > 1 else None,
        }

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs = logs or {}
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise DivergedError(f"the training loss is {loss} in epoch {epoch + 1}")
        self._losses.append(loss)
        [metric] = [float(value) for name, value in logs.items() if name.startswith("val_") and name != "val_loss"]
        self._metrics.append(metric)
        self._on_epoch()
