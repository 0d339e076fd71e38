"""Comparing strategies: paired runs, failures as rows, refusals before any work, results that can be read again."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import trainstep
from trainstep import errors
from trainstep.benchmarks import errors as benchmark_errors
from trainstep.benchmarks import request, workload
from trainstep.benchmarks.result import read_lines
from trainstep.benchmarks.runner import Trainer

generator = np.random.default_rng(0)
X = generator.normal(size=(22, 4)).astype("float32")
Y = (X.sum(axis=1) > 0).astype("int64")
DATASET = tf.data.Dataset.from_tensor_slices((X, Y))
DATA = {"train": (X, Y), "validation": (X[:10], Y[:10])}


def build():
    return keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(3, "tanh"), keras.layers.Dense(2, "softmax")])


def compared(strategies=("standard",), **changes):
    arguments = {"model": build, **DATA, "seeds": 1, "epochs": 2, "batch_size": 8, **changes}
    return trainstep.compare(strategies=strategies, **arguments)


def exploding():
    """Return an optimizer whose first step makes the weights, and with them the next loss, infinite."""
    return keras.optimizers.SGD(float("inf"))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    strategies = {
        "standard": "standard",
        "again": {"gradient_clipping": {"global_clipnorm": float("inf")}, "gradient_accumulation": {"steps": 1}},
    }
    return compared(strategies, seeds=2, attack={"epsilon": 0.1}, output=tmp_path_factory.mktemp("results"))


def test_there_is_a_cell_for_each_strategy_and_seed(comparison):
    assert [(cell.label, cell.seed) for cell in comparison.cells] == [
        (label, seed) for seed in (0, 1) for label in ("standard", "again")
    ]
    assert all(len(cell.metrics) == len(cell.losses) == 2 for cell in comparison.cells)
    assert not any(cell.failure for cell in comparison.cells)


def test_runs_of_one_seed_are_paired(comparison):
    """Neutral options are `standard`; so equal weights and equal order must give equal results."""
    standard, again = ([c for c in comparison.cells if c.label == label] for label in ("standard", "again"))
    for one, other in zip(standard, again, strict=True):
        assert (one.losses, one.metrics, one.robust_accuracy) == (other.losses, other.metrics, other.robust_accuracy)
    assert standard[0].losses != standard[1].losses
    [row] = [row for row in comparison.rows if row.label == "again"]
    assert (row.difference.low, row.difference.mean, row.difference.high) == (0, 0, 0)
    assert not row.difference.significant


def test_robust_accuracy_is_at_most_the_accuracy(comparison):
    assert all(0 <= cell.robust_accuracy <= cell.metrics[-1] + 1e-6 for cell in comparison.cells)


def test_the_control_costs_one(comparison):
    costs = {row.label: row.cost for row in comparison.rows}
    assert costs["standard"].ratio == costs["standard"].low == costs["standard"].high == 1
    assert all(cost.seconds > 0 and cost.trace_seconds > cost.seconds for cost in costs.values())


def test_lines_are_json_that_gives_the_cells_back(comparison):
    lines = (comparison.output / "results.jsonl").read_text().splitlines()
    assert all(json.loads(line)["environment"]["tensorflow"] == tf.__version__ for line in lines)
    assert tuple(read_lines(comparison.output / "results.jsonl")) == comparison.cells


def test_a_line_that_is_no_result_is_named(tmp_path):
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(benchmark_errors.InvalidDataError, match="line 1: label: Field required"):
        read_lines(tmp_path / "results.jsonl")


def test_earlier_results_stay(comparison):
    before = (comparison.output / "results.jsonl").read_bytes()
    second = compared(output=comparison.output, epochs=1)
    assert second.output.parent == comparison.output
    assert (second.output / "report.html").exists()
    assert (comparison.output / "results.jsonl").read_bytes() == before


def test_a_run_that_diverges_is_a_row_with_its_reason():
    comparison = compared(["standard", "adversarial"], optimizer=exploding)
    assert [cell.failure.split(":")[0] for cell in comparison.cells] == ["DivergedError"] * 2
    assert comparison.rows[0].metrics == ()
    assert "1 of 1 runs failed: DivergedError: the training loss is" in str(comparison)


def test_an_error_while_training_is_a_row_and_the_others_go_on(monkeypatch):
    def broken(self, batch):
        raise RuntimeError("no such luck\nsecond line")

    monkeypatch.setattr(trainstep.strategies.Adversarial, "transform_batch", broken)
    comparison = compared(["adversarial"])
    assert [cell.label for cell in comparison.cells] == ["standard", "adversarial"]
    standard, adversarial = comparison.cells
    assert standard.failure is None
    assert "RuntimeError" in adversarial.failure
    assert "\n" not in adversarial.failure
    assert adversarial.cost is None
    assert adversarial.not_costed == adversarial.failure


def test_token_inputs_have_no_robust_accuracy_but_a_reason():
    def tokens():
        return keras.Sequential(
            [
                keras.layers.Input((4,), dtype="int32"),
                keras.layers.Embedding(5, 2),
                keras.layers.Flatten(),
                keras.layers.Dense(2, "softmax"),
            ]
        )

    x = generator.integers(0, 5, (22, 4)).astype("int32")
    [cell] = compared(model=tokens, train=(x, Y), validation=(x, Y), attack={"epsilon": 0.1}, epochs=1).cells
    assert cell.robust_accuracy is None
    assert "floating dtype" in cell.not_robust


def test_a_dataset_is_taken_as_it_is():
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
    [cell] = compared(train=dataset, validation=dataset).cells
    assert cell.failure is None
    assert cell.settings.batch_size is None


def test_a_builder_with_a_seed_gets_it():
    seen = []

    def seeded(seed):
        seen.append(seed)
        return build()

    compared(model=seeded, seeds=[4, 7], epochs=1)
    assert set(seen) == {4, 7}


@pytest.mark.parametrize("name", trainstep.names())
def test_a_model_used_again_is_as_good_as_a_new_one(name):
    """Weights, optimizer and the strategy's own state are set back: the same bits as from a fresh model."""
    task = request.task_of_workload(workload.get("digits_mlp"), {"epochs": 1})
    assert task.reusable
    composition = trainstep.composition.compose(name)
    used = Trainer(task, composition)
    x, y = task.train[0][:96], task.train[1][:96]

    def trained(trainer, seed):
        model = trainer.ready(seed)
        model.fit(x, y, batch_size=32, shuffle=False, verbose=0)
        return model.get_weights()

    trained(used, 0)
    for again, fresh in zip(trained(used, 1), trained(Trainer(task, composition), 1), strict=True):
        np.testing.assert_array_equal(again, fresh)


@pytest.mark.parametrize(
    ("error", "changes"),
    [
        (errors.UnknownStrategyError, {"strategies": ["standrad"]}),
        (errors.InvalidOptionsError, {"strategies": {"a": {"gradient_clipping": {"norm": 1}}}}),
        (errors.InvalidSpecError, {"strategies": "standard"}),
        (errors.InvalidSpecError, {"strategies": {"gradient_clipping": {"clipvalue": 1.0}}}),
        (errors.InvalidSpecError, {"strategies": {"standard": "gradient_clipping"}}),
        (errors.InvalidOptionsError, {"attack": {"epsilon": -1.0}}),
        (errors.NotAModelError, {"model": 3}),
        (benchmark_errors.InvalidComparisonError, {"seeds": 0}),
        (benchmark_errors.InvalidComparisonError, {"seeds": [1, 1]}),
        (benchmark_errors.InvalidComparisonError, {"seeds": 1.5}),
        (benchmark_errors.InvalidComparisonError, {"epochs": 0}),
        (benchmark_errors.InvalidComparisonError, {"workload": "digits_cnn"}),
        (benchmark_errors.InvalidComparisonError, {"model": None}),
        (benchmark_errors.InvalidDataError, {"train": X}),
        (benchmark_errors.InvalidDataError, {"train": (X, Y[:3])}),
        (benchmark_errors.InvalidDataError, {"train": DATASET}),
        (benchmark_errors.InvalidDataError, {"train": DATASET.batch(4).take(0)}),
        (benchmark_errors.InvalidDataError, {"train": DATASET.batch(4).repeat()}),
        (benchmark_errors.InvalidDataError, {"validation": DATASET.batch(4).map(lambda x, y: x)}),
        (
            benchmark_errors.UnknownWorkloadError,
            {"workload": "digts", "model": None, "train": None, "validation": None},
        ),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_built(error, changes, tmp_path):
    def never():
        raise AssertionError("nothing may be built")

    with pytest.raises(error):
        compared(**{"model": never, "output": tmp_path / "out", **changes})
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(benchmark_errors.InvalidComparisonError, match="Nothing can be written to output="):
        compared(output=tmp_path / "file")


def test_a_builder_that_returns_one_model_again_is_told_so():
    model = build()
    with pytest.raises(errors.NotAModelError, match="a new, plain model for each run"):
        request.task_of_user(lambda: trainstep.apply(model, "standard"), (X, Y), (X, Y), {}).build(0)


def test_the_reason_of_a_failure_is_what_happened_and_not_what_keras_wraps_it_in():
    [shapes] = compared(train=(X[:, :3], Y)).cells
    assert "is incompatible with the layer" in shapes.failure
    [labels] = compared(train=(X, Y + 7)).cells
    assert "Received a label value of 8" in labels.failure


def test_digits_are_the_same_at_every_call():
    one, other = workload.load_digits(), workload.load_digits()
    for a, b in zip(tf.nest.flatten(tuple(one)), tf.nest.flatten(tuple(other)), strict=True):
        np.testing.assert_array_equal(a, b)
    (x, y), (x_validation, y_validation) = one
    assert (len(x) + len(x_validation), x.shape[1:], x.dtype) == (1797, (8, 8, 1), np.float32)
    assert (min(x.min(), x_validation.min()), max(x.max(), x_validation.max())) == (0, 1)
    assert set(y) == set(y_validation) == set(range(10))


def test_missing_data_say_how_to_get_them(monkeypatch):
    def offline():
        raise Exception("URL fetch failure")  # As Keras does.

    monkeypatch.setattr(keras.datasets.fashion_mnist, "load_data", offline)
    with pytest.raises(benchmark_errors.MissingDataError, match=r"URL fetch failure.*digits_cnn"):
        workload.get("fashion_cnn").load()
