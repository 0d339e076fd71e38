"""Training with a backup after each epoch, stopped in the middle of one; run as a script, killed there.

python backups.py FOLDER KIND
"""

import json
import os
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import Any

import keras
from catalogue import VARIANTS
from nets import BATCH, X, Y
from runs import Run, state_of

import trainstep

EPOCHS, STOPPED_IN, WINDOW = 3, 1, 4
FULL = {
    "adversarial": {"epsilon": 0.1, "random_start": True},
    # An epoch has six batches: the backup is taken in the middle of the second window.
    "gradient_accumulation": {"steps": WINDOW, "last_window": "carry"},
    "gradient_clipping": {"global_clipnorm": 0.5},
    "mixed_precision": {"dtype": "float16", "growth_interval": 2, "initial_scale": 2.0**8},
    "skip_nonfinite": {},
}
SPECS = [*({name: options} for name, options in VARIANTS), FULL]


def build(*, deferred: bool = False, synchronized: bool = False) -> keras.Model:
    """Return a net with batch norm, and without dropout: neither Keras saves the state of that in a backup."""
    return keras.Sequential(
        [
            *([] if deferred else [keras.Input((6,))]),
            keras.layers.Dense(5, "tanh"),
            keras.layers.BatchNormalization(synchronized=synchronized),
            keras.layers.Dense(1),
        ]
    )


class StoppedError(Exception):
    """Raised where a run is stopped, but not the process."""


class Stop(keras.callbacks.Callback):
    def __init__(self, stop: Callable[[], None]) -> None:
        super().__init__()
        self.stop, self.epoch = stop, 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del logs
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        del logs
        if (self.epoch, batch) == (STOPPED_IN, 2):
            self.stop()


def backup_of(folder: pathlib.Path, index: int) -> str:
    return str(folder / str(index))


def train(spec: Any, *callbacks: keras.callbacks.Callback) -> Run:
    keras.utils.set_random_seed(0)
    model = trainstep.apply(build(), spec)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    history = model.fit(X, Y, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0, callbacks=list(callbacks))
    return state_of(model, history)


def backing_up(folder: str) -> keras.callbacks.Callback:
    return keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False)


def fail() -> None:
    raise StoppedError


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: pathlib.Path) -> None:
    for index, spec in enumerate(SPECS):
        last = index == len(SPECS) - 1
        try:
            train(spec, backing_up(backup_of(folder, index)), Stop(kill if last else fail))
        except StoppedError:
            print(json.dumps(spec), flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
