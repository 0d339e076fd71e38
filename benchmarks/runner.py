"""Training one strategy on one task with one seed, and measuring what comes of it."""

import contextlib
import functools
import hashlib
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainstep import _seam, registry
from trainstep.benchmarks.attack import Attack, compiled_attack, robust_accuracy
from trainstep.benchmarks.calibration import expected_calibration_error
from trainstep.benchmarks.data import Split, checked, first_batch, train_batches, validation_batches
from trainstep.benchmarks.environment import environment
from trainstep.benchmarks.errors import DivergedError
from trainstep.benchmarks.metrics import Made, Metrics
from trainstep.benchmarks.records import Budget, Epoch, Run, Settings, key_of
from trainstep.composition import Composition, apply
from trainstep.definition import unpickled_by_value
from trainstep.errors import UnsupportedInputError, first_line

_CHUNK = 64
"""Epochs whose order is made at once, where the budget does not say how many there will be."""


@dataclass(frozen=True)
class Task:
    """What is trained: everything but the strategy and the seed. Nothing is read or built yet."""

    build: Callable[[int], Any]
    """Seed -> a new model, not compiled."""
    load: Callable[[], Split]
    """Reads the data; called once in each process, at first need."""
    make_optimizer: Callable[[], Any]
    """Returns a new optimizer, with its schedule."""
    loss: Any
    metrics: Metrics
    """Verdicts are on the first."""
    settings: Settings
    reusable: bool = False
    """Whether all state of a model in training is in its variables and its optimizer's, so that setting those anew
    is as good as a new model. Not known of a user's own: a layer may draw from a state nobody can reach."""


Weights = list[np.ndarray]


class Bench:
    """A task on its way in one process: with its data, and with initial weights by seed."""

    def __init__(self, task: Task, initial: Mapping[int, Weights] | None = None) -> None:
        self.task = task
        self.initial = dict(initial or {})
        """By seed: given, or kept from the first model built with it."""
        self._variables: dict[int, Weights] = {}

    @property
    def settings(self) -> Settings:
        """Those of the task."""
        return self.task.settings

    @functools.cached_property
    def split(self) -> Split:
        """The data, arrays as tensors.

        Raises:
            InvalidDataError, MissingDataError: see there.
        """
        train, validation = self.task.load()
        return Split(_tensors(checked(train, "train")), _tensors(checked(validation, "validation")))

    @property
    def batch_size(self) -> int:
        """Examples a step; of no effect where the data are a dataset."""
        return self.settings.batch_size or 32

    @functools.cached_property
    def validation(self) -> tf.data.Dataset:
        """Validation examples, in batches."""
        return validation_batches(self.split.validation, self.batch_size)

    @functools.cached_property
    def first_batch(self) -> Any:
        """One (x, y) or (x, y, sample_weight) of training tensors."""
        return first_batch(self.split.train, self.batch_size)

    def first_inputs(self) -> Any:
        """Return the inputs of `first_batch`, which is read where they are asked for."""
        return self.first_batch[0]

    def plain_model(self, seed: int) -> Any:
        """Return a new model with the initial weights of `seed`, and the global seeds set to it."""
        model = self.new_model(seed)
        # A builder may draw from where no seed of ours reaches; paired runs must start alike all the same.
        model.set_weights(self.initial.setdefault(seed, model.get_weights()))
        return model

    def variables(self, seed: int) -> Weights:
        """Return the values of all variables of what `plain_model` returns, built once; the global seeds are set alike.

        For a task that is reusable.
        """
        if seed not in self._variables:
            self._variables[seed] = [variable.numpy() for variable in self.plain_model(seed).variables]
        keras.utils.set_random_seed(seed)
        return self._variables[seed]

    def new_model(self, seed: int) -> Any:
        """Return a new model as the builder makes it, built; the global seeds are set to `seed`."""
        keras.utils.set_random_seed(seed)  # For builders, and for dropout, without a seed of their own.
        model = self.task.build(seed)
        if not model.built:
            _seam.forward(model, self.first_inputs(), training=False)
        return model


class Trainer:
    """One strategy on its way through the seeds: compiled once where that is safe, else for each seed."""

    def __init__(self, bench: Bench, composition: Composition) -> None:
        self.bench = bench
        self._composition = composition
        self._model: Any = None
        self._attacked: Any = None
        self._scores: Any = None
        self._optimizer_state: list[tuple[Any, Any]] = []
        self.metrics: Made | None = None
        """Those of the model that `ready` returned last."""
        self.first_step: float | None = None
        """Seconds from the beginning of `fit` to the end of its first step, when the model was new."""

    @property
    def model(self) -> Any:
        """The model that `ready` returned last."""
        return self._model

    @property
    def spec(self) -> dict[str, dict[str, Any]]:
        """All options by strategy name, outermost strategy first, as JSON has them."""
        return spec_of(self._composition)

    def ready(self, seed: int) -> Any:
        """Return a compiled model as new, with the initial weights of `seed`.

        Raises whatever the strategies, or Keras, have against the model or the optimizer.
        """
        if self._model is None or not self.bench.task.reusable:
            self._compile(self.bench.plain_model(seed))
        else:
            for variable, value in zip(self._model.variables, self.bench.variables(seed), strict=True):
                variable.assign(value)
            for variable, value in self._optimizer_state:
                variable.assign(value)
            self._model.stop_training = False
        return self._model

    def _compile(self, model: Any) -> None:
        task = self.bench.task
        names = {strategy.declaration.name: options for strategy, options in self._composition.items()}
        self.metrics = task.metrics.made(model, self.bench.first_inputs)
        apply(model, names).compile(task.make_optimizer(), task.loss, metrics=self.metrics.compiled)
        if task.reusable:
            # Made now, so that their first values are known. The state of the strategies is among them.
            _seam.build_optimizer(model.optimizer, model.trainable_variables)
            self._optimizer_state = [(v, v.numpy()) for v in model.optimizer.variables]
        self._model, self._attacked, self._scores, self.first_step = model, None, None, None

    def attacked(self, attack: Attack) -> Any:
        """Return the compiled attack on the model that `ready` returned last."""
        if self._attacked is None:
            self._attacked = compiled_attack(self._model, attack)
        return self._attacked

    def scores(self, x: Any) -> Any:
        """Return what the model that `ready` returned last makes of `x`, in inference mode."""
        if self._scores is None:
            model = self._model
            self._scores = tf.function(lambda x: _seam.forward(model, x, training=False), reduce_retracing=True)
        return self._scores(x)


def spec_of(composition: Composition) -> dict[str, dict[str, Any]]:
    """Return all options by strategy name, outermost strategy first, as JSON has them."""
    return {strategy.declaration.name: options.model_dump(mode="json") for strategy, options in composition.items()}


def run_seed(trainer: Trainer, label: str, seed: int, where: Mapping[str, str]) -> Run:
    """Train, and return the run with what was measured, or with the reason why there is nothing.

    Args:
        trainer: the strategy, and what to train.
        label: of the strategy.
        seed: of the run.
        where: versions and machine, see `environment`.
    """
    bench, watch = trainer.bench, _Watch(trainer)
    measured: dict[str, Any] = {}
    with quiet_tracing():
        try:
            model = trainer.ready(seed)
            _fit(model, bench, seed, watch)
            with model.evaluation_weights():  # By which its accuracy is measured, too.
                measured = {**_robustness(trainer), **_calibration(trainer)}
        except Exception as error:  # noqa: BLE001  Whatever a strategy raises is its result; the others go on.
            measured = {"failure": first_line(error)}
    return Run(
        key=key_of("run", trainer.spec, bench.settings, where, seed),
        label=label,
        spec=trainer.spec,
        seed=seed,
        settings=bench.settings,
        environment=dict(where),
        epochs=tuple(watch.epochs),
        **measured,
    )


def _fit(model: Any, bench: Bench, seed: int, watch: "_Watch") -> None:
    budget = bench.settings.budget
    chunk = 0
    while not watch.over:
        batches = train_batches(
            bench.split.train,
            seed=_chunk_seed(seed, chunk),
            epochs=_CHUNK if budget.epochs is None else budget.epochs,
            batch_size=bench.batch_size,
        )
        model.fit(
            batches.dataset,
            steps_per_epoch=batches.steps_per_epoch,
            epochs=_CHUNK if budget.epochs is None else budget.epochs,
            validation_data=bench.validation,
            shuffle=False,  # The order is made already; and Keras would warn of a dataset it cannot shuffle.
            callbacks=[watch],
            verbose=0,
        )
        chunk += 1


def _chunk_seed(seed: int, chunk: int) -> int:
    # The first epochs are those of a budget in epochs.
    return seed if chunk == 0 else int(np.random.SeedSequence([seed, chunk]).generate_state(1)[0])


@contextlib.contextmanager
def quiet_tracing() -> Iterator[None]:
    """Hold back TensorFlow's warning that functions are traced too often: every run has a new model."""

    def keep(record: logging.LogRecord) -> bool:
        return "retracing" not in record.getMessage()

    logger = tf.get_logger()
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _robustness(trainer: Trainer) -> dict[str, Any]:
    budget = trainer.bench.settings.attack
    if budget is None:
        return {"not_robust": "no attack was asked for: give its budget as attack={'epsilon': ...}"}
    attack = Attack(**budget)
    try:
        return {"robust_accuracy": robust_accuracy(trainer.attacked(attack), trainer.bench.validation, attack)}
    except UnsupportedInputError as error:
        return {"not_robust": str(error)}


def _calibration(trainer: Trainer) -> dict[str, Any]:
    scores, labels = [], []
    for x, y, *_ in trainer.bench.validation:
        output = trainer.scores(x)
        if not (isinstance(y, tf.Tensor) and isinstance(output, tf.Tensor) and len(output.shape) == 2):
            return {"not_calibrated": "calibration needs one score for each class as the only output"}
        if trainer.bench.settings.loss not in _CLASS_LOSSES and not y.dtype.is_integer:
            return {"not_calibrated": f"calibration is of classes, and the loss {trainer.bench.settings.loss!r} is not"}
        scores.append(output.numpy())
        labels.append(y.numpy())
    try:
        return {"calibration_error": expected_calibration_error(np.concatenate(scores), np.concatenate(labels))}
    except UnsupportedInputError as error:
        return {"not_calibrated": str(error)}


class _Watch(keras.callbacks.Callback):
    """Keeps the values of each epoch, ends the run when its budget is used up, and stops one that diverged.

    The clock runs from the beginning of an epoch to the end of its last step: evaluation is off it. Tracing and
    compilation are on it, once for each run: what a run with a used model saved is added.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self.epochs: list[Epoch] = []
        self.over = False
        """Whether the budget is used up."""
        self._trainer = trainer
        self._budget: Budget = trainer.bench.settings.budget
        self._updates = 0
        self._seconds = 0.0
        self._since = 0.0
        self._step_end = 0.0
        self._begun = False

    def on_train_begin(self, logs: Any = None) -> None:
        del logs
        self._since = time.perf_counter()
        self._begun = True

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del epoch, logs
        if not self._begun:
            self._since = time.perf_counter()
        self._begun = False

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        del batch
        self._updates += 1
        if self._updates == 1:
            self._add_tracing(logs)
        if self._budget.seconds is not None:
            _wait(logs)
            self._stop(self._seconds + time.perf_counter() - self._since >= self._budget.seconds)
        elif self._budget.updates is not None:
            self._stop(self._updates >= self._budget.updates)
        self._step_end = time.perf_counter()

    def _add_tracing(self, logs: Any) -> None:
        _wait(logs)
        first = time.perf_counter() - self._since
        if self._trainer.first_step is None:
            self._trainer.first_step = first
        self._seconds += max(0.0, self._trainer.first_step - first)

    def _stop(self, over: bool) -> None:
        if over:
            self.over = True
            model: Any = self.model
            model.stop_training = True

    def on_test_begin(self, logs: Any = None) -> None:
        del logs
        self._pause()

    def _pause(self) -> None:
        if self._since:
            begin = time.perf_counter()
            model: Any = self.model
            np.asarray(model.optimizer.iterations)  # Waits until the last step is done.
            self._seconds += self._step_end - self._since + time.perf_counter() - begin
            self._since = 0.0

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        del epoch
        self._pause()
        logs = logs or {}
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise DivergedError(f"the training loss is {loss} in epoch {len(self.epochs) + 1}")
        made: Any = self._trainer.metrics
        metrics = made.values({name[4:]: value for name, value in logs.items() if name.startswith("val_")})
        self.epochs.append(Epoch(updates=self._updates, seconds=self._seconds, loss=loss, metrics=metrics))
        if self._budget.epochs is not None:
            self._stop(len(self.epochs) >= self._budget.epochs)


def _wait(logs: Any) -> None:
    float((logs or {}).get("loss", 0.0))  # Waits until the step is done.


_CLASS_LOSSES = ("sparse_categorical_crossentropy", "categorical_crossentropy")


def _tensors(source: Any) -> Any:
    return source if isinstance(source, tf.data.Dataset) else tf.nest.map_structure(tf.constant, source)


# --- A user's own model ---------------------------------------------------------------------------


def fingerprint(bench: Bench, seeds: tuple[int, ...], models: tuple[Any, Any]) -> tuple[str, dict[int, Weights]]:
    """Return what tells a user's own model and data from others, and initial weights that no seed decides.

    Layers with their options, initial weights, and data are part of it; of a `tf.data.Dataset` only what it says of
    itself. A function, such as a custom activation, counts by its name.

    Args:
        bench: the model and the data.
        seeds: of the runs. Where the builder makes other weights at each call, those of the first call for each are
            returned, so that all processes take the same.
        models: what two calls of the builder with the first seed made, built.
    """
    one, other = models
    weights = one.get_weights()
    same = all(np.array_equal(a, b) for a, b in zip(weights, other.get_weights(), strict=True))
    digest = hashlib.sha256(_structure(one).encode())
    for weight in weights:
        digest.update(repr((weight.shape, str(weight.dtype))).encode() + np.ascontiguousarray(weight).tobytes())
    for source in bench.split:
        if isinstance(source, tf.data.Dataset):
            digest.update(f"{source.element_spec} {int(source.cardinality())}".encode())
        else:
            for tensor in tf.nest.flatten(source):
                array = np.ascontiguousarray(tensor.numpy())
                digest.update(repr((array.shape, str(array.dtype))).encode() + _bytes(array))
    initial = {} if same else {seeds[0]: weights, **{seed: bench.new_model(seed).get_weights() for seed in seeds[1:]}}
    return digest.hexdigest()[:24], initial


def _structure(model: Any) -> str:
    try:
        text = model.to_json()
    except Exception:  # noqa: BLE001  A subclassed model says nothing of itself, each in another way.
        text = repr([(type(layer).__name__, layer.count_params()) for layer in _seam.layers_of(model)])
    # Names that Keras numbers, and identities, differ between two models that are the same.
    return re.sub(r'_\d+(?=")|"shared_object_id": \d+', "", text)


def _bytes(array: np.ndarray) -> bytes:
    return repr(array.tolist()).encode() if array.dtype == object else array.tobytes()


# --- In the process of a worker -------------------------------------------------------------------


class Parcel:
    """All that a worker needs: tasks and initial weights by workload, compositions by label."""

    def __init__(
        self,
        tasks: Mapping[str, Task],
        compositions: Mapping[str, Composition],
        initial: Mapping[str, Mapping[int, Weights]],
    ) -> None:
        self.tasks, self.compositions, self.initial = dict(tasks), dict(compositions), dict(initial)


class Workplace:
    """What a worker has unpacked, read, compiled and traced so far."""

    def __init__(self, parcel: Parcel) -> None:
        self._parcel = parcel
        self._benches: dict[str, Bench] = {}
        self._trainers: dict[tuple[str, str], Trainer] = {}
        self.environment = environment()
        for composition in parcel.compositions.values():
            for strategy in composition:
                if strategy.declaration.name not in registry.names():  # One defined in `__main__`, say.
                    registry.register(strategy)

    def bench(self, workload: str) -> Bench:
        """Return the task of `workload`, with what was read of it."""
        if workload not in self._benches:
            self._benches[workload] = Bench(self._parcel.tasks[workload], self._parcel.initial.get(workload))
        return self._benches[workload]

    def trainer(self, workload: str, label: str) -> Trainer:
        """Return the strategy called `label` on `workload`."""
        place = (workload, label)
        if place not in self._trainers:
            self._trainers[place] = self.new_trainer(workload, label)
        return self._trainers[place]

    def new_trainer(self, workload: str, label: str) -> Trainer:
        """Return a trainer of its own."""
        return Trainer(self.bench(workload), self._parcel.compositions[label])


_received: bytes | Parcel | None = None
_workplace: Workplace | None = None


def receive(parcel: bytes | Parcel) -> None:
    """Keep what `run_job` and others need: a `Parcel`, or one pickled by cloudpickle, which is read at first need."""
    global _received, _workplace
    _received, _workplace = parcel, None


def workplace() -> Workplace:
    """Return that of this process."""
    global _workplace
    if _workplace is None:
        import cloudpickle  # noqa: PLC0415  Not everybody who imports this needs it.

        with unpickled_by_value():
            parcel = cloudpickle.loads(_received) if isinstance(_received, bytes) else _received
        assert isinstance(parcel, Parcel)
        _workplace = Workplace(parcel)
    return _workplace


def run_job(workload: str, label: str, seed: int) -> Run:
    """Do one run in the process of a worker."""
    place = workplace()
    return run_seed(place.trainer(workload, label), label, seed, place.environment)


def get_ready(workloads: list[str]) -> None:
    """Import, and read the data: what need not be on anybody's clock."""
    for workload in workloads:
        _ = workplace().bench(workload).split
