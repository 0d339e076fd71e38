"""What a run that goes on from a backup does with its data, its callbacks and its logs."""

import functools
import pathlib
from typing import Any

import backups
import keras
import numpy as np
import pytest
import tensorflow as tf
from backups import BATCHES, EPOCHS, Stop, StoppedError, backing_up
from nets import BATCH, X, Y
from runs import assert_same, state_of

import trainstep
from trainstep import _seam, errors

SPEC = {"gradient_accumulation": {"steps": 4, "last_window": "carry"}}


def fit(
    data: Any, *callbacks: Any, compiled: Any = None, build: Any = backups.build, spec: Any = SPEC, **arguments: Any
):
    """Fit anew, as a new process would; `data` makes the positional arguments of `fit`.

    Without metrics, unless `compiled` has some: with these TensorFlow traces a first step twice.
    """
    keras.utils.set_random_seed(0)
    model = trainstep.apply(build(), spec)
    model.compile(keras.optimizers.Adam(0.01), "mse", **(compiled or {}))
    history = model.fit(*data(), epochs=EPOCHS, verbose=0, callbacks=list(callbacks), **arguments)
    return state_of(model, history)


def stop(folder: pathlib.Path, data: Any, save_freq: Any = 3, after: int = 5, **arguments: Any) -> str:
    """Fit, stop after `after` batches of the second epoch, and return the folder of the backup."""
    with pytest.raises(StoppedError):
        fit(data, backing_up(str(folder), save_freq), Stop(after), **arguments)
    return str(folder)


def arrays() -> tuple[Any, ...]:
    return X, Y


def dataset() -> tuple[Any, ...]:
    return (tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(len(X), seed=1).batch(BATCH),)


def repeated() -> tuple[Any, ...]:
    return (dataset()[0].repeat(),)


def augmented() -> tuple[Any, ...]:
    """Return data whose noise goes on from one epoch to the next."""
    return (dataset()[0].map(lambda x, y: (x + 0.1 * tf.random.normal(tf.shape(x)), y)),)


def batches() -> tuple[Any, ...]:
    """Return a generator, of which every batch is drawn but once."""
    generator = np.random.default_rng(0)

    def draw() -> Any:
        while True:
            chosen = generator.integers(len(X), size=BATCH)
            yield X[chosen], Y[chosen]

    return (draw(),)


UNSHUFFLED: dict[str, Any] = {"shuffle": False}  # By Keras, which would warn that datasets have an order of their own.
ARRAYS: dict[str, Any] = {"batch_size": BATCH, "shuffle": False}
DATA: dict[str, Any] = {
    "arrays": (arrays, ARRAYS),
    "shuffled arrays": (arrays, {"batch_size": BATCH}),
    "weighted arrays": (arrays, {**ARRAYS, "sample_weight": np.arange(len(X), dtype="float32")}),
    "half of the arrays an epoch": (arrays, {"batch_size": BATCH, "steps_per_epoch": 3}),
    "dataset": (dataset, UNSHUFFLED),
    "repeated dataset": (repeated, {"steps_per_epoch": 5, **UNSHUFFLED}),
    "dataset with noise": (augmented, UNSHUFFLED),
    "generator": (batches, {"steps_per_epoch": BATCHES, **UNSHUFFLED}),
}


@pytest.mark.parametrize("kind", DATA)
def test_the_rest_of_an_epoch_is_of_the_data_it_would_have_been(kind, tmp_path):
    data, arguments = DATA[kind]
    steps = arguments.get("steps_per_epoch", BATCHES)
    # The backup is from the middle of the second epoch: after all but one of the batches it is stopped at.
    folder = stop(tmp_path, data, save_freq=steps + 2, after=3, **arguments)
    after_a_stop(fit(data, backing_up(folder, 3), **arguments), fit(data, **arguments))


def after_a_stop(resumed: Any, whole: Any) -> None:
    """Assert that `resumed`, from the middle of its second epoch, is `whole`."""
    assert_same(resumed, whole._replace(history={name: values[1:] for name, values in whole.history.items()}))


@pytest.mark.parametrize(
    "compiled", [{"run_eagerly": True}, {"steps_per_execution": 4}, {"jit_compile": True}], ids=str
)
def test_a_run_resumes_however_its_steps_are_run(compiled, tmp_path):
    # With four steps at once, an epoch of six batches takes two executions, of four and of two.
    several = compiled.get("steps_per_execution", 1) > 1
    folder = stop(tmp_path, arrays, 1 if several else 3, 5, compiled=compiled, **ARRAYS)
    after_a_stop(
        fit(arrays, backing_up(folder, 3), compiled=compiled, **ARRAYS), fit(arrays, compiled=compiled, **ARRAYS)
    )


def test_another_number_of_steps_at_once_is_refused(tmp_path):
    folder = stop(tmp_path, arrays, **ARRAYS)
    with pytest.raises(errors.ModelConflictError, match=r"after batch 3 of an epoch, and this run takes 2 batches at"):
        fit(arrays, backing_up(folder, 3), compiled={"steps_per_execution": 2}, **ARRAYS)


def test_a_run_that_is_stopped_twice_ends_as_one_never_stopped(tmp_path):
    arguments = {"compiled": {"metrics": ["mae"]}, **ARRAYS}
    folder = stop(tmp_path, arrays, save_freq=1, after=2, **arguments)
    stop(tmp_path, arrays, save_freq=1, after=4, **arguments)
    after_a_stop(fit(arrays, backing_up(folder, 1), **arguments), fit(arrays, **arguments))


class Heard(keras.callbacks.Callback):
    """Writes down what it hears."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Any] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.events.append(("epoch", epoch))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.events.append(batch)

    def on_test_end(self, logs: Any = None) -> None:
        self.events.append("validation")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.events.append(("end", epoch))


@pytest.mark.parametrize("save_freq", [3, BATCHES], ids=["middle", "last batch"])
def test_callbacks_hear_only_of_what_is_done(save_freq, tmp_path):
    folder = stop(tmp_path, arrays, save_freq, batch_size=BATCH)
    heard = Heard()
    logs = fit(arrays, backing_up(folder), heard, batch_size=BATCH, validation_data=(X, Y)).history
    rest = ["validation", ("end", 1), ("epoch", 2), *range(BATCHES), "validation", ("end", 2)]
    if save_freq == 3:
        assert heard.events == [("epoch", 1), 3, 4, 5, *rest]
        assert len(logs["loss"]) == len(logs["val_loss"]) == 2
    else:
        assert heard.events == [("epoch", 0), "validation", ("end", 0), ("epoch", 1), *range(BATCHES), *rest]
        assert len(logs["loss"]) == len(logs["val_loss"]) == 3


def test_a_callback_list_made_by_the_user_is_left_as_it_was(tmp_path):
    folder = stop(tmp_path, arrays, **ARRAYS)
    keras.utils.set_random_seed(0)
    model = trainstep.apply(backups.build(), SPEC)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    callbacks = keras.callbacks.CallbackList([backing_up(folder, 3)], add_history=True, model=model, epochs=EPOCHS)
    before = list(callbacks.callbacks)
    history = model.fit(X, Y, epochs=EPOCHS, verbose=0, callbacks=callbacks, **ARRAYS)
    assert callbacks.callbacks == before
    after_a_stop(state_of(model, history), fit(arrays, **ARRAYS))


def test_the_next_fit_begins_with_its_first_epoch(tmp_path):
    folder = stop(tmp_path, arrays, **ARRAYS)
    keras.utils.set_random_seed(0)
    model = trainstep.apply(backups.build(), SPEC)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    first = model.fit(
        X, Y, epochs=EPOCHS, verbose=0, callbacks=[backing_up(folder, 3, delete_checkpoint=True)], **ARRAYS
    )
    assert first.epoch == [1, 2]
    assert not list(pathlib.Path(folder).glob("**/*.*"))
    assert model.fit(X, Y, epochs=EPOCHS, verbose=0, **ARRAYS).epoch == [0, 1, 2]


def test_the_backup_of_a_run_that_ended_trains_no_more(tmp_path):
    fit(arrays, backing_up(str(tmp_path)), batch_size=BATCH)
    assert fit(arrays, backing_up(str(tmp_path)), batch_size=BATCH).history == {}


def test_without_a_seed_shuffled_examples_are_warned_of(tmp_path, monkeypatch):
    folder = stop(tmp_path, arrays, batch_size=BATCH)
    with monkeypatch.context() as patch:
        patch.setattr(keras.utils, "set_random_seed", lambda seed: tf.random.set_seed(None))
        with pytest.warns(UserWarning, match=r"shuffled, and not as in the run.* Call `keras.utils.set_random_seed`"):
            fit(arrays, backing_up(folder, 3), batch_size=BATCH)


def test_other_metrics_are_warned_of(tmp_path):
    folder = stop(tmp_path, arrays, compiled={"metrics": ["mae"]}, **ARRAYS)
    keras.utils.set_random_seed(0)
    model = trainstep.apply(backups.build(), SPEC)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    with pytest.warns(UserWarning, match="metrics are not those of the run that was stopped"):
        model.fit(X, Y, epochs=EPOCHS, verbose=0, callbacks=[backing_up(folder, 3)], **ARRAYS)


def test_a_backup_written_without_trainstep_is_warned_of(tmp_path):
    keras.utils.set_random_seed(0)
    plain = backups.build()
    plain.compile(keras.optimizers.Adam(0.01), "mse")
    plain.fit(X, Y, verbose=0, callbacks=[backing_up(str(tmp_path))], **ARRAYS)
    with pytest.warns(UserWarning, match="written without trainstep"):
        resumed = fit(arrays, backing_up(str(tmp_path)), spec="standard", **ARRAYS)
    assert len(resumed.history["loss"]) == EPOCHS - 1


def test_a_checkpoint_written_by_the_same_fit_loads_everywhere(tmp_path):
    checkpoint = keras.callbacks.ModelCheckpoint(str(tmp_path / "model.keras"))
    weights = keras.callbacks.ModelCheckpoint(str(tmp_path / "model.weights.h5"), save_weights_only=True)
    run = fit(arrays, backing_up(str(tmp_path / "backup")), checkpoint, weights, spec="standard", **ARRAYS)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    plain = backups.build()
    plain.load_weights(tmp_path / "model.weights.h5")
    expected = run.variables[: len(plain.get_weights())]
    for model in (loaded, plain):
        assert len(model.get_weights()) == len(expected)


class Draws(keras.layers.Layer):
    """Holds dropout one level down."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.drop = keras.layers.Dropout(0.25, seed=1)

    def call(self, x: Any, training: Any = None) -> Any:
        return self.drop(x, training=training)


def nested() -> keras.Model:
    return keras.Sequential([keras.Input((6,)), Draws(), keras.Sequential([keras.Input((6,)), Draws()])])


@pytest.mark.skipif(hasattr(keras.backend, "experimental"), reason="Of Keras 3; for Keras 2 see the test below.")
def test_random_state_is_found_at_any_depth():
    model = trainstep.apply(nested(), SPEC)
    model.compile("sgd", "mse", metrics=["mae"])
    assert len(_seam.random_variables(model)) == 2


@pytest.mark.skipif(not hasattr(keras.backend, "experimental"), reason="Keras 3 can keep the state of all its layers.")
def test_layers_whose_random_state_cannot_be_kept_are_warned_of(tmp_path):
    lstm = keras.Sequential([keras.Input((6, 1)), keras.layers.LSTM(2), keras.layers.Dense(1)])
    fit(arrays, backing_up(str(tmp_path / "lstm")), build=lambda: lstm, **ARRAYS)  # It has no dropout.
    drops = keras.Sequential([keras.Input((6,)), keras.layers.Dropout(0.2, name="drop"), keras.layers.Dense(1)])
    with pytest.warns(UserWarning, match=r"random state of drop: Keras 2.*enable_tf_random_generator"):
        fit(arrays, backing_up(str(tmp_path / "drop")), build=lambda: drops, **ARRAYS)


def test_a_run_on_two_replicas_resumes(tmp_path, mirrored, assert_close):
    """Without batch norm: of its statistics, one for each replica, Keras 2 saves the mean, which is off by rounding.

    So are the logs of the resumed epoch: a metric is a sum for each replica, and what is saved is the sum of those.
    """
    arguments = {"build": functools.partial(backups.build, norm=False), **ARRAYS}
    with mirrored.scope():
        folder = stop(tmp_path, arrays, **arguments)
        resumed, whole = fit(arrays, backing_up(folder, 3), **arguments), fit(arrays, **arguments)
        assert_close(resumed.history, {name: values[1:] for name, values in whole.history.items()})
        after_a_stop(resumed._replace(history={name: v[1:] for name, v in whole.history.items()}), whole)
