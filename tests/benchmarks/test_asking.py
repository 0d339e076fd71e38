"""A user's own model, data, loss and metrics: what is wrong is refused before anything runs, with its cause."""

import inspect
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import records
import suites
import tensorflow as tf
import yaml
from typer.testing import CliRunner

import trainstep
import trainstep_cli
from trainstep import errors
from trainstep._seam import KERAS_3
from trainstep.benchmarks import engine, executors, report, sinks
from trainstep.benchmarks import errors as benchmark_errors
from trainstep.benchmarks.errors import (
    InvalidComparisonError,
    InvalidDataError,
    InvalidModelError,
    UnknownArgumentError,
)
from trainstep.benchmarks.progress import Progress
from trainstep.benchmarks.records import Epoch, Run
from trainstep.benchmarks.request import compositions

generator = np.random.default_rng(0)
X = generator.normal(size=(20, 4)).astype("float32")
Y = (X.sum(axis=1) > 0).astype("int64")
ONE_HOT = np.eye(2, dtype="float32")[Y]
DATASET = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
layers = keras.layers
AUC, SGD = keras.metrics.AUC(), keras.optimizers.SGD()


def build():
    return keras.Sequential([layers.Input((4,)), layers.Dense(2, "softmax")])


def never(*_):
    raise AssertionError("nothing may be built or read")


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """Let whatever would train or measure say so."""

    def ran(self):
        raise AssertionError("it ran")

    monkeypatch.setattr(engine._Engine, "work", ran)
    monkeypatch.setattr(executors.Here, "__init__", ran)


def asked(**changes):
    given = {"model": build, "train": (X, Y), "validation": (X, Y), "strategies": ["gradient_clipping"], "workers": 1}
    return trainstep.compare(**{**given, **changes})


def refused(error, message, **changes):
    with pytest.raises(error, match=message) as caught:
        asked(**changes)
    assert isinstance(caught.value, errors.TrainstepError)
    assert isinstance(caught.value, ValueError)


# --- Arguments: nothing is built, and nothing is read -----------------------------------------------------------------

WORKLOAD = {"model": None, "train": None, "validation": None, "workload": "digits_mlp"}

ARGUMENTS = [
    ({"epoch": 3}, UnknownArgumentError, r"no argument 'epoch'\. Did you mean 'epochs'\? Arguments: strategies, exp"),
    ({"metric": "acuracy"}, InvalidComparisonError, r"Unknown metric 'acuracy'\. Did you mean 'accuracy'"),
    ({"metrics": ["accuracy", "mes"]}, InvalidComparisonError, r"Unknown metric 'mes'\. Did you mean 'mse'"),
    ({"metric": "MeanIoU"}, InvalidComparisonError, "'MeanIoU' cannot be made from its name alone"),
    ({"metric": lambda: 3}, InvalidComparisonError, "must return a metric of Keras, not int 3"),
    ({"metric": lambda: 1 / 0}, InvalidComparisonError, "`metric` failed: ZeroDivisionError: division by zero"),
    ({"metric": lambda y, y_pred: y}, InvalidComparisonError, "asks for y, y_pred. Wrap it.*MeanMetricWrapper"),
    ({"metric": lambda: AUC}, InvalidComparisonError, "must return a new one at each call"),
    ({"loss": "mean_sqared_error"}, InvalidComparisonError, r"Unknown loss .*\. Did you mean 'mean_squared_error'"),
    ({"loss": {"a": "mes"}}, InvalidComparisonError, r"Unknown loss 'mes'\. Did you mean 'mse'"),
    ({"loss": 3}, InvalidComparisonError, "`loss` is a name, an object of Keras or a function, not 3"),
    ({"optimizer": "adm"}, InvalidComparisonError, r"Unknown optimizer 'adm'\. Did you mean 'adam'"),
    ({"optimizer": lambda: "adam"}, InvalidComparisonError, "must return an optimizer of Keras, not str 'adam'"),
    ({"optimizer": lambda: SGD}, InvalidComparisonError, "must return a new one at each call"),
    ({"optimizer": {"name": "sgd", "clipnorm": 1.0}}, errors.OptimizerConflictError, "clipnorm=1.0"),
    ({"learning_rate": -1.0}, InvalidComparisonError, "must be a number from 0 on, not -1.0"),
    ({"learning_rate": float("nan")}, InvalidComparisonError, "must be a number from 0 on, not nan"),
    ({"strategies": []}, InvalidComparisonError, "Give strategies= .*at least one of: .*gradient_clipping"),
    ({"strategies": {}}, InvalidComparisonError, "Give strategies="),
    ({"strategies": ["standard", "standard "]}, errors.InvalidSpecError, "'standard' is listed twice"),
    ({"strategies": {"standard"}}, errors.InvalidSpecError, "is a list of names, or a mapping"),
    ({"strategies": [["standard"]]}, errors.InvalidSpecError, "is a list of names, or a mapping"),
    ({"strategies": {1: "standard"}}, errors.InvalidSpecError, "A label is a text, not 1"),
    ({"strategies": {(): "standard"}}, errors.InvalidSpecError, r"A label is a text, not \(\)"),
    ({"strategies": {" ": "standard"}}, errors.InvalidSpecError, "A label is one line of text that can be seen"),
    ({"strategies": {"a\nb": "standard"}}, errors.InvalidSpecError, r"that can be seen, not 'a\\nb'"),
    ({"strategies": {"a b": "standard", "a  b": "adversarial"}}, errors.InvalidSpecError, "would be labelled 'a  b'"),
    ({"strategies": {"nosuch": None}}, errors.UnknownStrategyError, "Unknown strategy 'nosuch'"),
    ({"seeds": 0}, InvalidComparisonError, "`seeds` is how many, at least 1, .*not 0"),
    ({"seeds": -1}, InvalidComparisonError, "not -1"),
    ({"seeds": True}, InvalidComparisonError, "not True"),
    ({"seeds": [0, True]}, InvalidComparisonError, r"not \[0, True\]"),
    ({"seeds": [0, -1]}, InvalidComparisonError, r"not \[0, -1\]"),
    ({"seeds": [1, 1]}, InvalidComparisonError, r"not \[1, 1\]"),
    ({"seeds": [[1]]}, InvalidComparisonError, r"not \[\[1\]\]"),
    ({"epochs": 0}, InvalidComparisonError, "`epochs` must be a positive integer, not 0"),
    ({"batch_size": 21}, InvalidComparisonError, "`batch_size` is 21, and there are 20 examples"),
    ({**WORKLOAD, "batch_size": 1438}, InvalidComparisonError, "there are 1437 examples"),
    ({"train": DATASET, "batch_size": 8}, InvalidComparisonError, "`batch_size` is for arrays"),
    ({"higher_is_better": "yes"}, InvalidComparisonError, "`higher_is_better` is True or False, not 'yes'"),
    ({"target": {"acc": 0.5}}, InvalidComparisonError, "among the metrics: accuracy. Did you mean 'accuracy'"),
    ({"target": 95}, InvalidComparisonError, "is a share, from 0 to 1, not 95. Did you mean 0.95?"),
    ({"target": float("nan")}, InvalidComparisonError, "A target is METRIC=VALUE, .*not nan"),
    ({"data_dir": "/nosuch"}, InvalidComparisonError, "`data_dir` is for the data of workloads"),
    ({**WORKLOAD, "data_dir": "/nosuch"}, InvalidComparisonError, "There is no folder data_dir='/nosuch'"),
    ({"workers": True}, InvalidComparisonError, "`workers` must be a positive integer, not True"),
    ({"workers": "2"}, InvalidComparisonError, "`workers` must be a positive integer, not '2'"),
    ({"time_limit": -1}, InvalidComparisonError, "`time_limit` must be a positive number, not -1"),
    ({"time_limit": 9}, InvalidComparisonError, "with workers=1 all happens in this one"),
    ({"cost": "no"}, InvalidComparisonError, "`cost` is True or False, not 'no'"),
    ({"output": 3}, InvalidComparisonError, "`output` is a path, not 3"),
    ({"validation": None}, InvalidComparisonError, "validation= is missing"),
    ({"model": None, "train": None}, InvalidComparisonError, "model= and train= are missing"),
    ({"train": never}, InvalidComparisonError, "returns .train, validation.: leave out validation="),
    ({"model": lambda a, b: build()}, InvalidModelError, "this one asks for a, b"),
    ({"train": (X, Y[:-1])}, InvalidDataError, "must be of one length, and are not: x 20, y 19"),
    ({"train": (X, Y, np.ones(3))}, InvalidDataError, "x 20, y 20, sample_weight 3"),
    ({"train": (X[:0], Y[:0])}, InvalidDataError, "`train` is empty"),
    ({"validation": (X[:0], Y[:0])}, InvalidDataError, "`validation` is empty"),
    ({"train": [X, Y]}, InvalidDataError, r"`train` must be \(x, y\).*, not list"),
    ({"train": (X.tolist(), Y)}, InvalidDataError, r"x of `train` holds 0\.12.*np.asarray"),
    ({"train": (X, np.array(["cat", "dog"] * 10))}, InvalidDataError, "y of `train` holds 'cat': labels are numbers"),
    ({"train": (np.array([None] * 20), Y)}, InvalidDataError, "an array of objects, such as None"),
]


@pytest.mark.parametrize(("changes", "error", "message"), ARGUMENTS)
def test_a_wrong_argument_is_refused_before_anything_is_built(changes, error, message):
    refused(error, message, **{"model": never, **changes})


def test_arguments_have_names():
    with pytest.raises(UnknownArgumentError, match=r"have names: compare\(strategies=...\), not \['standard'\]"):
        trainstep.compare(["standard"])
    assert issubclass(UnknownArgumentError, TypeError)  # As Python has it.
    assert list(inspect.signature(trainstep.compare).parameters)[:2] == ["strategies", "experiment"]


def test_integers_of_numpy_are_integers():
    with pytest.raises(AssertionError, match="it ran"):
        asked(seeds=np.arange(2), epochs=np.int64(1), batch_size=np.int32(8))


@pytest.mark.parametrize("sink", ["tensorboard", "mlflow"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, sink):
    pytest.importorskip(sink, reason="an extra")
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" if sink == "tensorboard" else tmp_path / "file" / "mlflow.db"
    refused(InvalidComparisonError, f"Nothing can be written to {sink}=", model=never, **{sink: path})


# --- The model: built, and tried on two examples ----------------------------------------------------------------------


class Own(keras.Model):
    """Subclassed, and its own builder."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2, "softmax")

    def call(self, x):
        return self.dense(x)


class WithAStep(Own):
    def train_step(self, data):
        return {}


def compiled():
    model = build()
    model.compile("sgd", "mse")
    return model


def one_score():
    return keras.Sequential([layers.Input((4,)), layers.Dense(1, "sigmoid")])


def shared():
    """Return a builder of new models around layers that are not new."""
    body = keras.Sequential([layers.Input((4,)), layers.Dense(3)])
    return lambda: keras.Sequential([body, layers.Dense(2, "softmax")])


def same():
    model = build()
    return lambda: model


WRONG_MODELS = [
    (same(), InvalidModelError, r"must return a new model at each call, and returns 'sequential\w*' again"),
    (shared(), InvalidModelError, r"two of them share \S*dense\S*/kernel\S*, \S*/bias.*pretrained"),
    (lambda: 3, errors.NotAModelError, r"must return a keras\.Model, not int 3"),
    (lambda: None, errors.NotAModelError, r"must return a keras\.Model, not NoneType"),
    (lambda: 1 / 0, InvalidModelError, "`model` failed: ZeroDivisionError: division by zero"),
    (compiled, InvalidModelError, r"not compiled, and 'sequential\w*' is: .*Leave out compile\(\)"),
    (lambda: trainstep.apply(build(), "standard"), errors.NotAModelError, "has strategies already"),
    (WithAStep, errors.ModelConflictError, "WithAStep overrides `train_step`"),
    (keras.Model, InvalidModelError, "does not take the examples of `train`"),
]


@pytest.mark.parametrize(("model", "error", "message"), WRONG_MODELS)
def test_a_model_that_cannot_be_compared_is_refused(model, error, message):
    refused(error, message, model=model)


def logits():
    return keras.Sequential([layers.Input((4,)), layers.Dense(2)])


WRONG_DATA = [
    ({"train": (X[:, :3], Y)}, InvalidModelError, r"not take the examples of `train`: a batch is float32 \(2, 3\)"),
    ({"validation": (X[:, :3], Y)}, InvalidModelError, "does not take the examples of `validation`"),
    ({"train": (X, Y + 1)}, InvalidDataError, "labels of `train` are 1, 2, .*has 2 scores.*give the model 3 scores"),
    ({"train": (X, np.r_[Y[:-1], 9])}, InvalidDataError, "are 0, 1, 9"),  # The last of them, and no other.
    (
        {"validation": (X, Y - 1)},
        InvalidDataError,
        "labels of `validation` are -1, 0, .*Number the classes from 0 on.$",
    ),
    ({"train": (X, X[:, 0])}, InvalidDataError, "whole numbers from 0 to 1"),
    ({"train": (X, X[:, 0] > 0.5), "model": one_score}, InvalidDataError, "With one score, .*binary_crossentropy"),
    ({"train": (X, ONE_HOT)}, InvalidDataError, "for one-hot labels the loss is categorical_crossentropy"),
    ({"train": DATASET.map(lambda x, y: (x, y + 1))}, InvalidDataError, "labels of `train` are 1, 2"),
    ({"loss": "mse", "metric": "mse"}, InvalidModelError, r"'mse' takes a label for each score.*\(3, 2\).*\(3,\)"),
    ({"metric": "AUC"}, InvalidModelError, "the metrics, AUC, do not fit: for a batch of `train`"),
    ({"train": lambda: 1 / 0, "validation": None}, InvalidDataError, "function of the data failed: ZeroDivision"),
    (
        {"strategies": {"standard": "standard", "frozen": {"layer_freezing": {"frozen": {"nothing": (0, 1)}}}}},
        errors.ModelConflictError,
        "layer_freezing: no trainable weight is called 'nothing'",
    ),
    ({**WORKLOAD, "loss": "mse"}, InvalidModelError, r"'mse' takes a label for each score"),
    (
        {**WORKLOAD, "strategies": {"frozen": {"layer_freezing": {"frozen": {"nothing": (0, 1)}}}}},
        errors.ModelConflictError,
        "layer_freezing: no trainable weight is called 'nothing'",
    ),
    (
        {**WORKLOAD, "strategies": {"mixed hard": "mixup:alpha=1.0"}},
        errors.ModelConflictError,
        "^mixed hard: mixup mixes labels.*Those of a workload are, where the loss is categorical_crossentropy.$",
    ),
    (
        {"strategies": {"mixed hard": "mixup:alpha=1.0"}},
        errors.ModelConflictError,
        "^mixed hard: mixup .*_crossentropy'.$",
    ),
    (
        {**WORKLOAD, "target": {"accuracy": 95}},
        InvalidComparisonError,
        "is a share, from 0 to 1, not 95. Did you mean 0.95",
    ),
    ({**WORKLOAD, "workload": "markov_transformer", "strategies": ["trades"]}, errors.UnsupportedInputError, "int32"),
    (
        {"model": logits},
        InvalidModelError,
        "takes probabilities, and of `train` the model returns scores as low as -.*: logits",
    ),
    (
        {"attack": {"epsilon": 0.1, "clip_range": (0.0, 1.0)}},
        errors.UnsupportedInputError,
        r"from -.* to .*, outside of clip_range=\(0\.0, 1\.0\)",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG_DATA)
def test_data_and_loss_that_do_not_go_with_the_model_are_refused(changes, error, message):
    refused(error, message, **changes)


@pytest.mark.skipif(not KERAS_3, reason="Keras 2 sets one label against several scores")
def test_two_labels_for_two_scores_do_not_hide_a_metric_that_does_not_fit():
    refused(InvalidModelError, r"accuracy, mse, do not fit: .*\(3, 2\).*\(3,\)", metrics=["accuracy", "mse"])


RIGHT = [
    {"model": Own},
    {**WORKLOAD, "loss": keras.losses.CategoricalCrossentropy(), "strategies": ["mixup"]},
    {"model": lambda: keras.Sequential([layers.Dense(2, "softmax")])},  # Built by the data.
    {"train": (X, ONE_HOT), "validation": (X, ONE_HOT), "loss": "categorical_crossentropy"},
    {"train": (X, np.where(Y, -1, 0)), "loss": keras.losses.SparseCategoricalCrossentropy(ignore_class=-1)},
    {"train": (X, Y.astype("float32"), np.ones(20))},
    {"train": (X, Y[:, None]), "validation": (X, Y[:, None])},
    {"train": (X, X[:, 0]), "validation": (X, X[:, 0]), "model": one_score, "loss": "mse", "metric": "mae"},
    {"train": DATASET, "validation": DATASET},
    {"train": lambda: (DATASET, (X, Y)), "validation": None},
    {"metrics": ["accuracy", lambda: keras.metrics.SparseCategoricalCrossentropy(name="xent")]},
]


@pytest.mark.parametrize("changes", RIGHT)
def test_what_goes_together_is_run(changes):
    with pytest.raises(AssertionError, match="it ran"):
        asked(**changes)


# --- The same on the command line, and in a file ----------------------------------------------------------------------

CODE = """
import keras
import numpy as np

def build(): return keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(2, "softmax")])
def load(): return (np.ones((4, 4)), np.arange(4) % 2), (np.ones((4, 4)), np.arange(4) % 2)
def labelled_from_one(): return (np.ones((4, 4)), np.arange(4) % 2 + 1), (np.ones((4, 4)), np.arange(4) % 2)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "asking_own.py").write_text(CODE)
    (tmp_path / "asking_broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path
    sys.modules.pop("asking_own", None)


def said(*arguments):
    result = CliRunner().invoke(trainstep_cli.app, ["compare", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("asking_own:biuld", "asking_own:load", "no function 'biuld' in asking_own. Did you mean 'build'?"),
        (
            "asking_broken:build",
            "asking_own:load",
            "asking_broken cannot be imported: ZeroDivisionError: division by z",
        ),
        ("asking_own:build", "asking_own:labelled_from_one", "The labels of `train` are 1, 2, and the model's last"),
        ("asking_own:build", "asking_own:build", "The function of the data must return (train, validation)"),
        ("asking_own:load", "asking_own:load", "`model` must return a keras.Model, not tuple"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_an_own_model_on_the_command_line_is_tried_too(model, data, message):
    strategy = ("-s", "gradient_clipping", "--workers", 1)
    assert message in said("--model", model, "--data", data, *strategy)


def test_in_a_file_a_function_that_is_not_there_has_its_line(folder):
    path = folder / "experiment.yaml"
    path.write_text("strategies: [standard]\nmodel: asking_own:build\ndata: asking_own:laod\n")
    message = "line 3: data: There is no function 'laod' in asking_own. Did you mean 'load'?"
    assert said(path).startswith(f"trainstep: {path}, {message}")
    assert "function 'biuld'" in said(path, "--model", "asking_own:biuld")
    assert "line 2" not in said(path, "--model", "asking_own:biuld")  # Which is not from the file.


# --- What is there from the start -------------------------------------------------------------------------------------


def test_the_class_of_comparisons_is_there_and_costs_nothing_until_it_is_used():
    code = (
        "import sys, keras\n"  # Which imports pandas and others itself, where they are there.
        "before = set(sys.modules)\n"
        "import trainstep\n"
        "heavy = {'pandas', 'plotly', 'scipy', 'sklearn', 'jinja2', 'yaml', 'trainstep.benchmarks.comparison'}\n"
        "assert not heavy & (set(sys.modules) - before), heavy & set(sys.modules)\n"
        "from trainstep import Comparison\n"
        "from trainstep.benchmarks import comparison\n"
        "assert Comparison is comparison.Comparison and 'Comparison' in trainstep.__all__\n"
        "assert not {'pandas', 'plotly', 'sklearn'} & (set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_errors_of_comparisons_are_of_one_family():
    for error in vars(benchmark_errors).values():
        if isinstance(error, type) and error.__name__.startswith(("Invalid", "Unknown", "Missing", "Store")):
            assert issubclass(error, errors.TrainstepError)


# --- Labels -----------------------------------------------------------------------------------------------------------

LABELS = [
    "[red]a[/red] | <b>b</b> & `c`",
    "..",
    "../../up",
    "# *x* _y_ ~~z~~ $1$ \\",
    "ä" * 200,
    'a/b:c?"d"%',
]


def labelled():
    runs, costs = records.suite({"standard": 0, **dict.fromkeys(LABELS, 0.01)})
    return trainstep.Comparison(runs, costs, "standard")


def test_a_label_that_is_a_combination_is_its_own_specification():
    for strategies in (["gradient_clipping + mixed_precision"], {"gradient_clipping + mixed_precision": None}):
        composed, control = compositions(strategies)
        assert (control, list(composed)) == ("standard", ["standard", "gradient_clipping + mixed_precision"])
        names = {strategy.declaration.name for strategy in composed["gradient_clipping + mixed_precision"]}
        assert names == {"gradient_clipping", "mixed_precision"}


def test_a_terminal_shows_labels_as_they_are():
    text = report.text(labelled().groups, 200).replace("\n", "")
    for label in LABELS:
        assert label[:25].strip() in text


def test_progress_shows_labels_as_they_are(capsys):
    with Progress(2, shown=True) as bar:
        for index, label in enumerate(LABELS):
            bar.begin(str(index), label)
            bar.end(str(index), failed=False)
        bar.begin("x", "[/red] no markup [bold")
    assert "[/red] no markup" in capsys.readouterr().err


def test_markdown_has_a_row_of_equal_width_for_each_label():
    groups = labelled().groups
    rows = [line for line in report.markdown(groups, "x: 1").splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", row)) for row in rows[: len(LABELS) + 3]}
    assert len(widths) == 1
    assert "| \\[red\\]a\\[/red\\] \\| &lt;b&gt;b&lt;/b&gt; &amp; \\`c\\` |" in rows[3]
    assert "| \\# \\*x\\* \\_y\\_ \\~\\~z\\~\\~ \\$1\\$ \\\\ |" in rows[6]


def test_html_of_a_notebook_has_no_markup_of_a_label():
    page = labelled()._repr_html_()
    assert "<b>b</b>" not in page
    assert "&lt;b&gt;b&lt;/b&gt;" in page


def test_a_page_has_no_markup_of_a_label_and_may_break_it_at_underscores(tmp_path):
    trainstep.Comparison(*records.suite({"a_b <i>": 0}), "a_b <i>").to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "a_<wbr>b &lt;i&gt;" in page
    assert "a_b <i>" not in page


def test_what_runs_it_again_has_the_labels():
    assert list(yaml.safe_load(labelled().specification)["strategies"]) == ["standard", *LABELS]


def test_tensorboard_writes_each_label_below_its_folder(tmp_path):
    pytest.importorskip("tensorboard", reason="an extra")
    sink = sinks.TensorBoard(tmp_path / "logs" / "deep")
    names = set()
    for index, label in enumerate(LABELS):
        sink.add(sink_run(label, f"{index}123456789"))
    for path in tmp_path.rglob("events.out.tfevents.*"):
        names.add(path.relative_to(tmp_path / "logs" / "deep" / "tiny").parts[0])
    assert len(names) == len(LABELS)
    assert all(len(name.encode()) <= 120 and not name.startswith(".") for name in names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_mlflow_takes_each_label(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="an extra")
    sink = sinks.MLflow(tmp_path / "mlflow.db")
    for index, label in enumerate(LABELS):
        sink.add(sink_run(label, f"{index}123456789"))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("trainstep tiny").experiment_id])
    assert {run.data.params["strategy"] for run in found} == set(LABELS)
    assert {run.info.run_name for run in found} == {f"{label}, seed 0" for label in LABELS}


def sink_run(label, key):
    epoch = Epoch(updates=1, seconds=0.5, loss=1.0, metrics={"accuracy": 0.5})
    return Run(key=key, label=label, spec={}, seed=0, settings=suites.settings(), environment={}, epochs=(epoch,))
