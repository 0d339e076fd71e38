"""Training with backups, a copy of which is kept from the middle of a run; as a script, killed there in the end.

python backups.py FOLDER
"""

import os
import pathlib
import pickle
import shutil
import signal
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from catalogue import BY_STATE, companies, task_of
from economy import economize
from nets import BATCH, NUMBERS, Task, X, outputs
from runs import Run, state_of

import trainstep
from trainstep import _seam

EPOCHS, STOPPED_IN, WINDOW = 3, 1, 4
BATCHES = -(-len(X) // BATCH)  # Six an epoch.
FULL = {
    "adversarial": {"epsilon": 0.1, "random_start": True},
    "gradient_accumulation": {"steps": WINDOW, "last_window": "carry"},
    "gradient_clipping": {"global_clipnorm": 0.5},
    "mixed_precision": {"dtype": "float16", "growth_interval": 2, "initial_scale": 2.0**8},
    "skip_nonfinite": {},
}
APPLIED = {"gradient_accumulation": {"steps": WINDOW, "last_window": "apply"}}


class Case(NamedTuple):
    """A run: its strategies, how often it is backed up, and the batch of the second epoch after which it stops."""

    spec: Any
    save_freq: int | str
    stop: int
    shuffle: bool

    @property
    def backed_up(self) -> int:
        """The number of batches done before the last backup."""
        every = BATCHES if self.save_freq == "epoch" else self.save_freq
        return (BATCHES * STOPPED_IN + self.stop) // every * every


COMPANIES = companies(BY_STATE)
CASES = [
    # Backed up after nine batches: one after a window of four, three after the beginning of an epoch.
    *(Case(spec, 3, 5, shuffle=True) for spec in COMPANIES),
    # Backed up after the last batch of an epoch, and before its end, where the last window is applied.
    Case(APPLIED, BATCHES, 3, shuffle=False),
    Case(FULL, BATCHES, 3, shuffle=False),
    Case(FULL, "epoch", 3, shuffle=False),
    Case(FULL, 3, 5, shuffle=True),
]


STACKS = range(len(COMPANIES), len(CASES))
"""The cases that are of no company."""
KILLED = len(CASES) - 1
"""The case whose run was never backed up, and once more was, and ended in the middle, by signal 9, with its process."""


def build(task: Task = NUMBERS, *, norm: bool = True) -> keras.Model:
    """Return a net with batch norm, unless told otherwise, and with dropout whose random state can be kept."""
    random = getattr(keras.backend, "experimental", None)  # Of Keras 2, where a layer decides as it is made.
    if random:
        random.enable_tf_random_generator()
    try:
        x = h = keras.Input(task.shape)
        drop = keras.layers.Dropout(0.25, seed=1)
        mixing = [keras.layers.BatchNormalization()] if norm and not task.separate else []
        for layer in [*task.first_layers(), *mixing, drop]:
            h = layer(h)
        return keras.Model(x, outputs(task.last_layers(), h))
    finally:
        if random:
            random.disable_tf_random_generator()


class StoppedError(Exception):
    """Raised where a run is stopped, but not the process."""


class Stop(keras.callbacks.Callback):
    """Stops after `count` batches of the epoch `STOPPED_IN`."""

    def __init__(self, count: int, stop: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.count, self.stop, self.epoch = count, stop or fail, 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del logs
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        del logs
        if self.epoch == STOPPED_IN and batch + 1 >= self.count:
            self.stop()


def fail() -> None:
    raise StoppedError


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Keep(Stop):
    """Keeps what is in the folder `backup` at the moment at which it would stop, and does not stop."""

    def __init__(self, count: int, backup: pathlib.Path, kept: pathlib.Path) -> None:
        super().__init__(count, self.keep)
        self.backup, self.kept = backup, kept

    def keep(self) -> None:
        if not self.kept.exists():
            shutil.copytree(self.backup, self.kept)


def backup_of(folder: pathlib.Path, index: int) -> str:
    """Return the folder of the backup from the middle of a run."""
    return str(folder / f"{index}-kept")


def whole_of(folder: pathlib.Path, index: int) -> Run:
    """Return what that run was in the end."""
    return pickle.loads((folder / f"{index}.pickle").read_bytes())


def train(case: Case, *callbacks: keras.callbacks.Callback) -> Run:
    task = task_of(*case.spec)
    full = case.spec is FULL
    keras.utils.set_random_seed(0)
    model = trainstep.apply(build(task), case.spec)
    model.compile(keras.optimizers.Adam(0.01), task.loss, metrics=["mae"] if full else None)
    if not full:
        # What the first step makes, metrics too, would have TensorFlow trace it twice.
        _seam.build_optimizer(model.optimizer, model.trainable_variables)
    history = model.fit(
        task.x, task.y, batch_size=BATCH, epochs=EPOCHS, shuffle=case.shuffle, verbose=0, callbacks=list(callbacks)
    )
    return state_of(model, history)


def backing_up(folder: str, save_freq: int | str = "epoch", **arguments: Any) -> keras.callbacks.Callback:
    return keras.callbacks.BackupAndRestore(folder, **{"save_freq": save_freq, "delete_checkpoint": False, **arguments})


def main(folder: pathlib.Path) -> None:
    economize()
    # As in `conftest.py`: with more threads convolutions sum in another order.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    for index, case in enumerate(CASES):
        if index == KILLED:
            whole = train(case)
        else:
            backup, kept = folder / str(index), pathlib.Path(backup_of(folder, index))
            whole = train(case, backing_up(str(backup), case.save_freq), Keep(case.stop, backup, kept))
        (folder / f"{index}.pickle").write_bytes(pickle.dumps(whole))
    train(CASES[KILLED], backing_up(backup_of(folder, KILLED), CASES[KILLED].save_freq), Stop(CASES[KILLED].stop, kill))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
