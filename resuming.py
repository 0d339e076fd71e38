"""A run that was stopped goes on as if it had not been: what Keras's own backups leave out, and passing over old data.

Of the state of a run, a backup of Keras lacks the random state of layers, the values of metrics in the middle of an
epoch, and on Keras 3 the batch. Here they become part of what Keras writes, one file or checkpoint, so that a kill
between two writes cannot mix them. Keras also has no way into the middle of an epoch, nor into the order of data that
earlier epochs decide: so a resumed run draws the data from the start of the run, as the run that was stopped did, and
trains only on what was not done:

    for epoch in epochs                                  Keras's own loop, from the first epoch
        for batch in epoch
            epoch, batch done before the backup?         draw the batch, leave it; no callback is called
            the first one that was not                   restore metrics and random state, go on
"""

import io
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainstep import _seam
from trainstep.errors import ModelConflictError

_EPOCH_HOOKS = ("on_epoch_begin", "on_epoch_end")
_BATCH_HOOKS = ("on_train_batch_begin", "on_train_batch_end")
_OUT_OF_STEP = (
    "The backup was written after batch {} of an epoch, and this run takes {} batches at a time: it cannot begin "
    "there. Compile with the steps_per_execution of the run that was stopped."
)
_NO_POSITION = (
    "The backup holds weights, but not where in the data the run was, nor the random state of its layers: it was "
    "written without trainstep. The run goes on as Keras has it."
)
_OTHER_ORDER = (
    "The examples are shuffled, and not as in the run that was stopped: in the epoch it was in, some come twice and "
    "some not at all. Call `keras.utils.set_random_seed` with the same number before the model is built, in every run."
)
_OTHER_METRICS = (
    "The metrics are not those of the run that was stopped: the logs of the epoch it was in are over its other batches."
)
_OTHER_LAYERS = (
    "The backup holds the random state of {} layers, and the model has {}. Build the model that was stopped."
)
_UNKEPT = (
    "No backup holds the random state of {}: Keras 2 leaves it to operations of TensorFlow that do not tell it, and a "
    "run that is resumed draws other numbers. Call `keras.backend.experimental.enable_tf_random_generator()` before "
    "the model is built."
)


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return `arrays` by name as bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def unpack(data: bytes) -> dict[str, np.ndarray]:
    """Return what `pack` was given."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


def order_is_fixed(x: Any, shuffle: Any, steps_per_epoch: int | None) -> bool:
    """Tell whether every epoch is the same batches in the same order: arrays, not shuffled, all of them."""
    return _are_arrays(x) and shuffle is False and steps_per_epoch is None


def _are_arrays(x: Any) -> bool:
    return all(isinstance(leaf, (np.ndarray, tf.Tensor)) for leaf in tf.nest.flatten(x))


@contextmanager
def resumable(model: Any, callbacks: list[Any], arguments: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Yield the callbacks with which `model.fit(**arguments)` can resume: `callbacks`, and two around them."""
    if not any(isinstance(callback, keras.callbacks.BackupAndRestore) for callback in callbacks):
        yield callbacks
        return
    unkept = _seam.unkept_random_layers(model)
    if unkept:
        warnings.warn(_UNKEPT.format(", ".join(unkept)), stacklevel=4)
    others = [*callbacks, *_seam.missing_default_callbacks(callbacks, arguments.get("verbose", "auto"))]
    position = Position(others, arguments)
    with _seam.carried_in_backups(model, position.pack, position.unpack):
        try:
            yield [position, *others, _Start(position)]
        finally:
            position.release()


class Position(_seam.QuietCallback):
    """Counts the batches done and, in a run that is resumed, passes over them; comes before all other callbacks."""

    def __init__(self, others: Iterable[keras.callbacks.Callback], arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self._others = list(others)
        self._x, self._shuffle = arguments.get("x"), arguments.get("shuffle", True)
        self._epochs = arguments.get("epochs", 1)
        self._order_is_fixed = order_is_fixed(self._x, self._shuffle, arguments.get("steps_per_epoch"))
        self._epoch = self._batches = 0
        self._metrics_are_built = False
        self._restored: dict[str, np.ndarray] | None = None
        self._resumes_at: tuple[int, int] | None = None
        self._shadowed: list[tuple[Any, str, Any]] = []

    # --- What Keras's backup holds in addition ---

    def pack(self) -> bytes:
        """Return the epoch, the batches done in it, the global seed, metrics and random state."""
        arrays = {"position": np.array([self._epoch, self._batches, _seam.global_seed()], np.int64)}
        kinds = self._variables()
        if self._batches == 0 or _seam.is_on_many_machines(self.model):
            # An epoch begins with metrics anew; and on many machines to read one takes all of them, where one writes.
            del kinds["metric"]
        for kind, variables in kinds.items():
            arrays |= {f"{kind}_{index}": variable.numpy() for index, variable in enumerate(variables)}
        return pack(arrays)

    def unpack(self, data: bytes) -> None:
        """Take what `pack` returned, to go on from there when training begins."""
        self._restored = unpack(data)

    def _variables(self) -> dict[str, list[Any]]:
        return {"metric": _seam.metric_variables(self.model), "random": _seam.random_variables(self.model)}

    def _values(self, kind: str) -> list[np.ndarray]:
        restored = self._restored or {}
        return [restored[f"{kind}_{index}"] for index in range(sum(key.startswith(kind) for key in restored))]

    # --- Passing over what was done ---

    def start(self) -> None:
        """Let training begin where the backup was written, if one was restored."""
        if self._restored is None:
            if _seam.keras_restored(self.model):
                warnings.warn(_NO_POSITION, stacklevel=2)
            return
        epoch, batches, seed = (int(value) for value in self._restored["position"])
        unlike = seed != _seam.global_seed() or seed < 0
        if batches and unlike and _are_arrays(self._x) and self._shuffle:
            warnings.warn(_OTHER_ORDER, stacklevel=2)
        random, mine = len(self._values("random")), len(self._variables()["random"])
        if random != mine:
            raise ModelConflictError(_OTHER_LAYERS.format(random, mine))
        self._resumes_at = epoch, batches
        nothing_before_counts = self._order_is_fixed or epoch >= self._epochs
        _seam.start_at(self.model, epoch if nothing_before_counts else None)
        for callback in self._others:
            for hook in (*_EPOCH_HOOKS, *_BATCH_HOOKS):
                self._shadow(callback, hook, _silent)
        self._shadow(self.model, "train_function", self._pass_over)
        self._shadow(self.model, "evaluate", lambda *args, **kwargs: {})

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del logs
        self._epoch, self._batches = epoch, 0
        if self._resumes_at and epoch == self._resumes_at[0]:
            for hook in _EPOCH_HOOKS:
                self._reveal(hook)
            if self._resumes_at[1] == 0:
                self._go_on()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        del batch, logs
        if not self._resumes_at:
            self.release()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        del logs
        self._batches = batch + 1

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        del logs
        self._epoch, self._batches = epoch + 1, 0
        if not self._resumes_at:
            self.release()

    def _pass_over(self, iterator: Any) -> dict[str, Any]:
        """Take the place of the training function: draw as many batches, and leave them."""
        batch, count = _seam.draw(self.model, iterator)
        if not self._metrics_are_built:
            self._metrics_are_built = True
            _seam.build_metrics(self.model, batch)  # Keras asks for their values, and they get those they had.
        if self._resumes_at and self._epoch == self._resumes_at[0]:
            self._batches += count
            if self._batches > self._resumes_at[1]:
                raise ModelConflictError(_OUT_OF_STEP.format(self._resumes_at[1], count))
            if self._batches == self._resumes_at[1]:
                self._restore_metrics()
                self._go_on()
        model: Any = self.model
        return model.get_metrics_result()

    def _restore_metrics(self) -> None:
        variables, values = self._variables()["metric"], self._values("metric")
        if [tuple(variable.shape) for variable in variables] != [value.shape for value in values]:
            warnings.warn(_OTHER_METRICS, stacklevel=2)
            model: Any = self.model
            model.reset_metrics()
            return
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    def _go_on(self) -> None:
        """Train from the next batch on. Callbacks do not hear of the end of this one, if it was passed over."""
        self._resumes_at = None
        for variable, value in zip(self._variables()["random"], self._values("random"), strict=True):
            variable.assign(value)
        for name in ("train_function", "evaluate"):
            self._reveal(name)

    # --- Attributes put in front of methods, and taken away again ---

    def _shadow(self, owner: Any, name: str, value: Any) -> None:
        self._shadowed.append((owner, name, vars(owner).get(name)))
        vars(owner)[name] = value  # Past what Keras does with attributes of a model.

    def _reveal(self, *names: str) -> None:
        found = [entry for entry in self._shadowed if entry[1] in names]
        self._shadowed = [entry for entry in self._shadowed if entry[1] not in names]
        for owner, name, before in reversed(found):  # Somebody who is listed twice was given a shadow of a shadow.
            if before is None:
                del vars(owner)[name]
            else:
                vars(owner)[name] = before

    def release(self) -> None:
        """Give everybody their methods back."""
        self._reveal(*{name for _, name, _ in self._shadowed})


class _Start(_seam.QuietCallback):
    """Comes after all other callbacks, so that Keras has restored its backup."""

    def __init__(self, position: Position) -> None:
        super().__init__()
        self._position = position

    def on_train_begin(self, logs: Any = None) -> None:
        del logs
        self._position.start()


def _silent(*args: Any, **kwargs: Any) -> None:
    del args, kwargs
