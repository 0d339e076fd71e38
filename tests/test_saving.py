"""What a file keeps, who can read it, and what is said to who cannot."""

import json
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile

import catalogue
import keras
import numpy as np
import pytest
import tensorflow as tf
from catalogue import BY_STATE, REPRESENTATIVES, VARIANTS, registered, task_of, variant_id
from nets import BATCH, NUMBERS, Task, Workload, X, Y, dense, functional, workload_for
from runs import fitted, optimizer_variables, prepared

import trainstep
from trainstep import errors

pytestmark = pytest.mark.filterwarnings("ignore:mixed_precision computes in float16:UserWarning")

WORKLOAD = Workload(dense, X, Y, lambda: {"optimizer": keras.optimizers.Adam(0.01), "loss": "mse"})

# Keras 3 saves the optimizer with the weights, and says so where that of the other model is not the same, or not built.
loads_weights_alone = pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer:UserWarning")


def workload_of(name: str) -> Workload:
    return workload_for(dense, task_of(name), optimizer=lambda: keras.optimizers.Adam(0.01))


def by_batch(model, starts, task: Task = NUMBERS) -> None:
    for start in starts:
        model.train_on_batch(*tf.nest.map_structure(lambda v: v[start : start + BATCH], (task.x, task.y)))  # noqa: B023


def assert_alike(one, other) -> None:
    tf.nest.map_structure(np.testing.assert_array_equal, one.get_weights(), other.get_weights())
    tf.nest.map_structure(
        np.testing.assert_array_equal, optimizer_variables(one.optimizer), optimizer_variables(other.optimizer)
    )


LOADS = """
import pickle, sys, trainstep, keras, numpy as np
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(1)  # As here: convolutions sum in another order with more.
import catalogue  # Which provides what strategies need of others: a teacher.
from runs import optimizer_variables
folder = sys.argv[1]
for index in range(int(sys.argv[2])):
    model = keras.models.load_model(f"{folder}/{index}.keras")
    with open(f"{folder}/{index}.pickle", "rb") as file:
        batches = pickle.load(file)
    for batch in batches:
        model.train_on_batch(*batch)
    np.savez(f"{folder}/{index}.npz", *model.get_weights(), *optimizer_variables(model.optimizer))
    with open(f"{folder}/{index}.applied", "w") as file:
        file.write(repr(trainstep.applied(model)))
"""


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory) -> tuple[pathlib.Path, list[keras.Model]]:
    """Return a folder with what was saved after five of ten batches and what a new process made of it, and the models.

    The models made all ten. Files have the number of the model in `BY_STATE`.
    """
    tmp_path = tmp_path_factory.mktemp("saved")
    # Eagerly, here and there: ten steps are less work than to trace them once. `test_resume.py` does it in graphs.
    models = [prepared(workload_of(name), name, options, run_eagerly=True) for name, options in BY_STATE]
    for index, (model, (name, _)) in enumerate(zip(models, BY_STATE, strict=True)):
        task = task_of(name)
        by_batch(model, range(0, 10, 2), task)
        model.save(tmp_path / f"{index}.keras")
        tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(tmp_path / f"{index}"))
        by_batch(model, range(10, 20, 2), task)
        rest = [
            tf.nest.map_structure(lambda values: values[start : start + BATCH], (task.x, task.y))  # noqa: B023
            for start in range(10, 20, 2)
        ]
        (tmp_path / f"{index}.pickle").write_bytes(pickle.dumps(rest))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADS, str(tmp_path), str(len(models))],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": os.path.dirname(catalogue.__file__)},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return tmp_path, models


each_by_state = pytest.mark.parametrize(
    ("index", "name", "options"),
    [(index, *variant) for index, variant in enumerate(BY_STATE)],
    ids=["-".join((name, variant_id(options))) for name, options in BY_STATE],
)


@pytest.mark.shows("saved")
@each_by_state
def test_saved_in_the_middle_loaded_in_a_new_process_and_trained_on_is_never_stopped(index, name, options, trained_on):
    """In the middle of a window; the other process imports trainstep, and knows nothing of the model but its file."""
    folder, models = trained_on
    assert (folder / f"{index}.applied").read_text() == repr(trainstep.applied(models[index]))
    found = np.load(folder / f"{index}.npz")
    expected = [*models[index].get_weights(), *optimizer_variables(models[index].optimizer)]
    for key, values in zip(found.files, expected, strict=True):
        np.testing.assert_array_equal(found[key], values)


@loads_weights_alone
@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_a_model_checkpoint_holds_all_or_the_weights(name, tmp_path):
    workload = workload_of(name)
    model = prepared(workload, name)
    full = keras.callbacks.ModelCheckpoint(str(tmp_path / "full.keras"))
    weights = keras.callbacks.ModelCheckpoint(str(tmp_path / "only.weights.h5"), save_weights_only=True)
    fitted(model, workload, epochs=1, callbacks=[full, weights])
    loaded = keras.models.load_model(tmp_path / "full.keras")
    assert trainstep.applied(loaded) == trainstep.applied(model)
    assert_alike(loaded, model)
    another = prepared(workload, name)
    another.load_weights(tmp_path / "only.weights.h5")
    tf.nest.map_structure(np.testing.assert_array_equal, another.get_weights(), model.get_weights())
    fitted(another, workload, epochs=1)


@each_by_state
def test_a_checkpoint_of_tensorflow_holds_weights_and_state(index, name, options, trained_on):
    folder, models = trained_on
    restored = prepared(workload_of(name), name, options, run_eagerly=True)
    checkpoint = tf.train.Checkpoint(model=restored, optimizer=restored.optimizer)
    checkpoint.read(str(folder / f"{index}")).assert_existing_objects_matched()
    by_batch(restored, range(10, 20, 2), task_of(name))
    assert_alike(restored, models[index])


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_a_clone_of_a_functional_model_has_the_strategies_and_not_their_state_and_that_of_a_sequential_neither(name):
    model = prepared(workload_for(functional, task_of(name)), name, run_eagerly=True)
    by_batch(model, range(0, 10, 2), task_of(name))
    clone = keras.models.clone_model(model)
    assert trainstep.applied(clone) == trainstep.applied(model)
    if getattr(clone, "optimizer", None) is not None:  # Keras 3 compiles it, with a new optimizer.
        assert clone.optimizer is not model.optimizer
        assert int(clone.optimizer.iterations.numpy()) == 0
    if isinstance(sequential := prepared(workload_of(name), name), keras.Sequential):
        assert trainstep.applied(keras.models.clone_model(sequential)) == {}


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=variant_id)
def test_a_config_is_data_and_makes_the_same_model_again(name, options):
    model = prepared(workload_of(name), name, options)
    config = model.get_config()
    assert config["schema"] == 1
    assert list(config["strategies"]) == [name]
    again = type(model).from_config(json.loads(json.dumps(config)))
    assert trainstep.applied(again) == trainstep.applied(model)
    assert json.dumps(again.get_config(), sort_keys=True) == json.dumps(config, sort_keys=True)


# --- Files that cannot be read ----------------------------------------------------------------------------------------


def edited(path, change) -> str:
    """Return the path of a copy of the file `path` whose config has gone through `change`."""
    out = str(path).replace(".keras", "_edited.keras")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w") as target:
        for entry in source.namelist():
            content = source.read(entry)
            if entry == "config.json":
                config = json.loads(content)
                change(config["config"])
                content = json.dumps(config).encode()
            target.writestr(entry, content)
    return out


@pytest.fixture
def saved(tmp_path):
    model = prepared(WORKLOAD, {"gradient_accumulation": {"steps": 2}, "gradient_clipping": {}})
    fitted(model, WORKLOAD, epochs=1)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    return tmp_path / "model.keras"


PLAIN = "build the plain model in code and load the weights alone, with `load_weights`"


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda c: c.update(schema=2), errors.SavingError, r"in schema 2, and this version of trainstep reads 1"),
        (lambda c: c.pop("schema"), errors.SavingError, "is damaged: .* has model, strategies"),
        (lambda c: c.update(strategies=None), errors.SavingError, "is damaged"),
        (lambda c: c.update(strategies=["standard"]), errors.SavingError, "is damaged"),
        (lambda c: c.pop("model"), errors.SavingError, "is damaged"),
        (lambda c: c["strategies"].update(no_such={}), errors.UnknownStrategyError, "Unknown strategy 'no_such'"),
        (lambda c: c["strategies"]["gradient_clipping"].update(bound=1), errors.InvalidOptionsError,
         "gradient_clipping: unknown option 'bound'"),
        (lambda c: c["strategies"]["gradient_accumulation"].update(steps=0), errors.InvalidOptionsError, "Given: 0"),
    ],
    ids=["a later schema", "no schema", "no strategies", "a list of them", "no model",
         "an unknown strategy", "an unknown option", "a wrong value"],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_an_error_that_names_the_reason_and_the_way_out(change, error, said, saved):
    with pytest.raises(error, match=said) as caught:
        keras.models.load_model(edited(saved, change))
    assert PLAIN in str(caught.value)


@loads_weights_alone
def test_the_way_out_that_these_errors_name_works(saved):
    plain = prepared(WORKLOAD)
    plain.load_weights(str(saved).replace(".keras", ".weights.h5"))
    np.testing.assert_array_equal(plain.predict(X, verbose=0), keras.models.load_model(saved).predict(X, verbose=0))


def test_a_strategy_of_others_that_is_not_there_is_named_and_loads_once_it_is(tmp_path):
    class Theirs(trainstep.Strategy):
        declaration = trainstep.Declaration("theirs", trainstep.Stage.REPORT, "Does nothing.", "", neutral={})

    with registered(Theirs):
        model = prepared(WORKLOAD, "theirs")
        fitted(model, WORKLOAD, epochs=1)
        model.save(tmp_path / "model.keras")
    with pytest.raises(errors.UnknownStrategyError, match=r"'theirs'.*The file asks for the strategies theirs\."):
        keras.models.load_model(tmp_path / "model.keras")
    with registered(Theirs):
        assert list(trainstep.applied(keras.models.load_model(tmp_path / "model.keras"))) == ["theirs"]


@pytest.mark.parametrize(
    "code", ["__import__('os').mkdir(r'{}')", "import os; os.mkdir(r'{}')"], ids=["expression", "statement"]
)
def test_nothing_in_a_file_is_run_as_code(code, saved, tmp_path):
    code = code.format(tmp_path / "made")
    for change in (
        lambda c: c["strategies"].update({code: {}}),
        lambda c: c["strategies"]["gradient_accumulation"].update(steps=code),
        lambda c: c["strategies"]["gradient_accumulation"].update({code: 1}),
        lambda c: c.update(schema=code),
    ):
        with pytest.raises(errors.TrainstepError):
            keras.models.load_model(edited(saved, change))
    assert not (tmp_path / "made").exists()


# --- Fitting again ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_a_learning_rate_set_between_fits_takes_effect_and_no_state_is_lost(name):
    workload = workload_of(name)
    model = prepared(workload, name)
    fitted(model, workload, epochs=1)
    before = optimizer_variables(model.optimizer), model.get_weights()
    model.optimizer.learning_rate = 0.0
    fitted(model, workload, epochs=1)
    trainable = {id(weight) for weight in model.trainable_weights}
    for weight, then in zip(model.weights, before[1], strict=True):
        if id(weight) in trainable:
            np.testing.assert_array_equal(weight.numpy(), then)
    assert len(optimizer_variables(model.optimizer)) == len(before[0])
    model.optimizer.learning_rate = 0.01
    fitted(model, workload, epochs=1)
    assert not np.array_equal(model.get_weights()[0], before[1][0])
