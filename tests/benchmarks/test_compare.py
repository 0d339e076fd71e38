"""The one call: what it writes, that it goes on, what of a user's own it takes; and models that are used again."""

import keras
import numpy as np
import pytest
import suites
import tensorflow as tf
from catalogue import NAMES, representatives

import trainstep
from trainstep.benchmarks import errors as benchmark_errors
from trainstep.benchmarks import request
from trainstep.benchmarks.comparison import Comparison
from trainstep.benchmarks.data import Split
from trainstep.benchmarks.runner import Bench, Trainer, quiet_tracing, run_seed

generator = np.random.default_rng(0)
X = generator.normal(size=(22, 4)).astype("float32")
Y = (X.sum(axis=1) > 0).astype("int64")
VERSIONS = dict.fromkeys(("trainstep", "keras", "tensorflow", "python"), "1")
DATA = {"train": (X, Y), "validation": (X[:10], Y[:10])}


def build():
    return keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(3, "tanh"), keras.layers.Dense(2, "softmax")])


def compared(strategies=("standard",), **changes):
    arguments = {"model": build, **DATA, "seeds": 1, "epochs": 2, "batch_size": 8, "workers": 1, "cost": False}
    return trainstep.compare(strategies=strategies, **{**arguments, **changes})


def test_a_folder_holds_store_and_reports_and_the_same_call_goes_on(tmp_path):
    first = compared(seeds=[0], output=tmp_path, cost=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md", "results.sqlite"]
    assert first.output == tmp_path
    assert [cost.ratio for cost in first.costs] == [(1.0, 1.0, 1.0)]
    second = compared(seeds=[0, 1], output=tmp_path, cost=True)
    assert second.runs[0] == first.runs[0]
    assert second.costs == first.costs
    assert len(second.runs) == 2
    stored = Comparison.from_store(tmp_path / "results.sqlite")
    assert (stored.runs, stored.costs) == (second.runs, second.costs)


def test_a_store_may_be_elsewhere_and_runs_go_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="an extra")
    compared(store=tmp_path / "kept" / "all.sqlite", tensorboard=tmp_path / "logs")
    assert (tmp_path / "kept" / "all.sqlite").exists()
    assert len(list((tmp_path / "logs").rglob("events.out.tfevents.*"))) == 1


def test_an_error_while_training_is_a_row_and_the_others_go_on(monkeypatch):
    def broken(self, update):
        raise RuntimeError("no such luck\nsecond line")

    monkeypatch.setattr(trainstep.strategies.GradientClipping, "update_weights", broken)
    standard, clipped = compared(["gradient_clipping"]).runs
    assert standard.failure is None
    assert "RuntimeError" in clipped.failure
    assert "\n" not in clipped.failure


def test_token_inputs_have_no_robust_accuracy_but_a_reason():
    def tokens():
        layers = [keras.layers.Input((4,), dtype="int32"), keras.layers.Embedding(5, 2), keras.layers.Flatten()]
        return keras.Sequential([*layers, keras.layers.Dense(2, "softmax")])

    x = generator.integers(0, 5, (22, 4)).astype("int32")
    [run] = compared(model=tokens, train=(x, Y), validation=(x, Y), attack={"epsilon": 0.1}, epochs=1).runs
    assert run.robust_accuracy is None
    assert run.not_robust.startswith("Dense inputs of a floating dtype are moved")  # And nothing of TensorFlow's.


def test_an_attack_that_is_cut_off_within_the_data_has_no_robust_accuracy_but_a_reason():
    arguments = {"model": None, "train": None, "validation": None, "workload": "blobs_mlp"}
    [run] = compared(**arguments, attack={"epsilon": 0.1, "clip_range": (0.0, 0.1)}, epochs=1).runs
    assert run.robust_accuracy is None
    assert "outside of clip_range=(0.0, 0.1)" in run.not_robust


def test_a_dataset_is_taken_as_it_is_in_this_process_where_it_cannot_be_sent():
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
    [run] = compared(train=dataset, validation=dataset, workers=None, batch_size=None).runs
    assert run.failure is None
    assert run.settings.batch_size is None


def trains_digits(name: str) -> bool:
    """Tell whether the dense net for digits, whose labels are class ids, has what `name` needs."""
    declaration = trainstep.get(name).declaration
    return not {*declaration.needs} & {"one-hot labels", "images", "outputs"} and not declaration.example


@pytest.mark.parametrize("name", representatives([name for name in NAMES if trains_digits(name)]))
def test_a_model_used_again_is_as_good_as_a_new_one(name):
    """Weights, optimizer and the strategy's own state are set back: the same bits as from a fresh model."""
    [task] = request.suite_of(workload="digits_mlp", strategies=["standard"], epochs=1).tasks.values()
    assert task.reusable
    bench, composition = Bench(task), trainstep.composition.compose(name)
    x, y = (tensor[:96] for tensor in bench.split.train)

    def trained(trainer, seed):
        model = trainer.ready(seed)
        model.fit(x, y, batch_size=32, shuffle=False, verbose=0)
        return model.get_weights()

    used = Trainer(bench, composition)
    with quiet_tracing():
        trained(used, 0)
        for again, fresh in zip(trained(used, 1), trained(Trainer(bench, composition), 1), strict=True):
            np.testing.assert_array_equal(again, fresh)


def test_an_output_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(benchmark_errors.InvalidComparisonError, match="Nothing can be written to output="):
        compared(output=tmp_path / "file")


def test_the_reason_of_a_failure_is_what_happened_and_not_what_keras_wraps_it_in():
    def reason(x, y):
        task = suites.task(load=lambda: Split((x, y), (X, Y)))
        return run_seed(Trainer(Bench(task), trainstep.composition.compose("standard")), "label", 0, VERSIONS).failure

    assert "is incompatible with the layer" in reason(X[:, :3], Y)
    assert "Received a label value of 8" in reason(X, Y + 7)


def test_what_a_strategy_needs_and_does_not_find_is_said_before_anything_runs(tmp_path):
    def regression():
        return keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1)])

    with pytest.raises(trainstep.errors.ModelConflictError, match="confidence_penalty needs an output of classes"):
        compared(
            ["standard", "confidence_penalty"], model=regression, loss="mse", metrics=["mae"], output=tmp_path / "out"
        )
    assert not (tmp_path / "out" / "report.md").exists()


def test_a_workload_trains_on_one_hot_labels_where_its_loss_takes_them():
    arguments = {"workload": "blobs_mlp", "seeds": 1, "epochs": 1, "workers": 1, "cost": False}
    one_hot = trainstep.compare(strategies=["standard"], loss="categorical_crossentropy", **arguments)
    numbers = trainstep.compare(strategies=["standard"], **arguments)
    assert one_hot.runs[0].metric == pytest.approx(numbers.runs[0].metric, abs=0.02)
