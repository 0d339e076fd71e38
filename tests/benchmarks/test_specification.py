"""What the page says it takes to run it again is read back as what was run."""

import keras
import pytest
import records
from records import run

from trainstep.benchmarks import optimizers, workload
from trainstep.benchmarks.comparison import Comparison
from trainstep.benchmarks.records import Budget
from trainstep.benchmarks.request import suite_of


def read_back(comparison, folder):
    path = folder / "experiment.yaml"
    path.write_text(comparison.specification, encoding="utf-8")
    return suite_of(experiment=path)


def runs_of(suite):
    """Return runs as if `suite` had been run."""
    return tuple(
        run(
            label,
            seed,
            [0.5],
            given=settings,
            spec={s.declaration.name: o.model_dump(mode="json") for s, o in c.items()},
        )
        for settings in suite.settings.values()
        for label, c in suite.compositions.items()
        for seed in suite.seeds
    )


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param({"workload": name, "seeds": 2}, id=name)
        for name in ("digits_cnn", "digits_mlp", "digits_pair_cnn", "fashion_cnn", "blobs_mlp")
        if name in workload.names()
    ]
    + [
        pytest.param({"workload": ["digits_cnn", "digits_mlp"], "epochs": 2, "batch_size": 16}, id="several"),
        pytest.param({"workload": {"name": "digits_cnn", "noise": 0.4}, "seeds": [3, 5], "updates": 9}, id="noise"),
        pytest.param({"workload": "digits_cnn", "attack": False, "seconds": 1.5, "target": 0.9}, id="attack"),
        pytest.param(
            {
                "workload": "digits_pair_cnn",
                "metrics": {"left": ["accuracy", "mae"], "right": "accuracy"},
                "loss": {"left": "categorical_crossentropy", "right": None},
                "target": {"right:accuracy": 0.5},
            },
            id="outputs",
        ),
        pytest.param(
            {"workload": "digits_cnn", "optimizer": {"name": "sgd", "momentum": 0.9, "schedule": "cosine"}},
            id="schedule",
        ),
    ],
)
def test_settings_compositions_and_seeds_come_back(asked, tmp_path):
    strategies = {"clipped: hard": {"gradient_clipping": {"global_clipnorm": float("inf")}}, "standard": "standard"}
    suite = suite_of(strategies=strategies, **asked)
    again = read_back(Comparison(runs_of(suite), (), suite.control), tmp_path)
    assert again.settings == suite.settings
    assert again.compositions == suite.compositions
    assert (again.seeds, again.control) == (suite.seeds, suite.control)


@pytest.mark.parametrize("name", ["adam", "sgd", "adamw", "rmsprop", "adagrad"])
def test_optimizers_come_back(name, tmp_path):
    suite = suite_of(strategies=["standard"], workload="digits_mlp", optimizer={"name": name, "learning_rate": 0.01})
    again = read_back(Comparison(runs_of(suite), (), suite.control), tmp_path)
    assert again.settings == suite.settings
    made = again.tasks["digits_mlp"].make_optimizer()
    assert optimizers.settings_of(made)["class"].lower() == name


def test_a_model_of_the_users_own_is_left_to_him():
    given = records.settings("own model and data", budget=Budget(updates=5))
    text = Comparison((run("standard", 0, [0.5], given=given),), (), "standard").specification
    assert text.startswith("# This was a model and data of your own.")
    assert "updates: 5" in text
    assert "\nworkload" not in text


def test_a_loss_and_metrics_that_are_no_names_are_left_to_him(tmp_path):
    asked = {
        "workload": "digits_mlp",
        "loss": keras.losses.SparseCategoricalCrossentropy(ignore_class=0),
        "metrics": [keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    }
    suite = suite_of(strategies=["standard"], **asked)
    comparison = Comparison(runs_of(suite), (), suite.control)
    assert comparison.specification.startswith(
        "# What names do not say is not here: give loss and metrics to trainstep.compare(experiment=..., loss=..., metr"
    )
    (tmp_path / "experiment.yaml").write_text(comparison.specification, encoding="utf-8")
    again = suite_of(experiment=tmp_path / "experiment.yaml", loss=asked["loss"], metrics=asked["metrics"])
    assert again.settings == suite.settings


def test_what_a_name_does_not_say_of_its_direction_comes_back(tmp_path):
    suite = suite_of(strategies=["standard"], workload="digits_mlp", metric="accuracy", higher_is_better=False)
    assert read_back(Comparison(runs_of(suite), (), suite.control), tmp_path).settings == suite.settings


def test_noise_is_said_and_comes_back():
    given = records.settings("own model and data", budget=Budget(updates=5), noise=0.3)
    comparison = Comparison((run("standard", 0, [0.5], given=given),), (), "standard")
    assert "\nnoise: 0.3" in comparison.specification
    assert str(comparison).startswith("own model and data, noise 0.3: 5 updates")


def test_what_the_user_wrote_is_shown_as_he_wrote_it():
    written = "workload: digits_cnn  # As always.\n"
    comparison = Comparison((run("standard", 0, [0.5]),), (), "standard", experiment=written)
    assert comparison.specification == written


def test_workloads_that_one_experiment_cannot_describe_are_several():
    one, other = (records.settings(name, batch_size=size) for name, size in (("digits_cnn", 8), ("digits_mlp", 16)))
    text = Comparison((run("standard", 0, [0.5], given=one), run("standard", 0, [0.5], given=other)), (), "standard")
    first, *documents = text.specification.split("---\n")
    assert first.startswith("# Several experiments")
    assert ["batch_size: 8" in documents[0], "batch_size: 16" in documents[1]] == [True, True]
