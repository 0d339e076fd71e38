"""Experiments: the same from YAML, TOML and Python; grids; mistakes with their line; the schema for editors."""

import json
import pathlib
import runpy

import jsonschema
import pytest
import yaml

import trainstep
from trainstep.benchmarks.errors import InvalidExperimentError
from trainstep.benchmarks.experiment import Experiment
from trainstep.benchmarks.schema import json_schema
from trainstep.benchmarks.source import Source

ROOT = pathlib.Path(trainstep.__file__).parent

YAML = """\
workloads: [digits_cnn, {name: digits_cnn, noise: 0.4}]
strategies:
  standard:
  gradient_clipping + mixed_precision:
  clipped: gradient_clipping:global_clipnorm=0.5
  attacked:
    adversarial:
      epsilon: {grid: [0.05, 1e-1]}
      clip_range: [0, 1]
seeds: [3, 5]
updates: 100
optimizer:
  name: sgd
  learning_rate: 1e-2
  schedule: {name: cosine, decay_steps: 100}
metrics: accuracy
target: {accuracy: 0.9}
attack: {epsilon: 0.1, steps: 40}
"""
TOML = """\
workloads = ["digits_cnn", {name = "digits_cnn", noise = 0.4}]
seeds = [3, 5]
updates = 100
metrics = "accuracy"
target = {accuracy = 0.9}
attack = {epsilon = 0.1, steps = 40}

[strategies]
standard = "standard"
"gradient_clipping + mixed_precision" = "gradient_clipping + mixed_precision"
clipped = "gradient_clipping:global_clipnorm=0.5"

[strategies.attacked.adversarial]
epsilon = {grid = [
  0.05,
  0.1,
]}
clip_range = [0, 1]

[optimizer]
name = "sgd"
learning_rate = 1e-2
schedule = {name = "cosine", decay_steps = 100}
"""


def written(folder, text, name="experiment.yaml"):
    path = folder / name
    path.write_text(text)
    return path


def refused(folder, text, name="experiment.yaml"):
    """Return the lines of the error, without the folder."""
    path = written(folder, text, name)
    with pytest.raises(InvalidExperimentError) as caught:
        Experiment.read(path)
    return [line.replace(f"{path}, ", "") for line in str(caught.value).splitlines()]


def test_yaml_toml_and_python_say_the_same(tmp_path):
    from_yaml = Experiment.read(written(tmp_path, YAML))
    from_toml = Experiment.read(written(tmp_path, TOML, "experiment.toml"))
    from_python = Experiment(
        workload=["digits_cnn", {"name": "digits_cnn", "noise": 0.4}],
        strategies={
            "standard": None,
            "gradient_clipping + mixed_precision": {"gradient_clipping": {}, "mixed_precision": {}},
            "clipped": {"gradient_clipping": {"global_clipnorm": 0.5}},
            "attacked": {"adversarial": {"epsilon": {"grid": [0.05, 0.1]}, "clip_range": [0, 1]}},
        },
        seeds=(3, 5),
        updates=100,
        optimizer={"name": "sgd", "learning_rate": 0.01, "schedule": {"name": "cosine", "decay_steps": 100}},
        metrics=["accuracy"],
        target="accuracy=0.9",
        attack={"epsilon": 0.1, "steps": 40},
    )
    assert from_yaml == from_toml == from_python
    assert Experiment.read(from_yaml) is from_yaml


def test_a_grid_is_one_strategy_for_each_value_and_labelled_by_it(tmp_path):
    specs = Experiment.read(written(tmp_path, YAML)).specs()
    assert list(specs) == [
        "standard",
        "gradient_clipping + mixed_precision",
        "clipped",
        "attacked epsilon=0.05",
        "attacked epsilon=0.1",
    ]
    assert specs["attacked epsilon=0.1"] == {"adversarial": {"epsilon": 0.1, "clip_range": [0, 1]}}


def test_grids_of_one_label_are_multiplied_out():
    grids = {"adversarial": {"epsilon": {"grid": [1, 2]}}, "gradient_accumulation": {"steps": {"grid": [3, 4]}}}
    specs = Experiment(strategies={"both": grids}).specs()
    assert list(specs) == [f"both epsilon={epsilon} steps={steps}" for epsilon in (1, 2) for steps in (3, 4)]


def test_a_grid_misspelt_is_hinted_at_and_an_option_that_looks_like_one_is_not(tmp_path):
    (line,) = refused(tmp_path, "strategies:\n  a:\n    sam:\n      rho: {gird: [0.1]}")
    assert line.endswith("Did you mean 'grid'?")
    frozen = {"layer_freezing": {"frozen": {"gru": [0, 100]}}}
    assert Experiment(strategies={"a": frozen}).specs() == {"a": frozen}


def test_strategies_may_be_a_list_of_texts():
    assert Experiment(strategies=["standard", "gradient_clipping:clipvalue=1"]).specs() == {
        "standard": {"standard": {}},
        "gradient_clipping:clipvalue=1": {"gradient_clipping": {"clipvalue": 1}},
    }


MISTAKES = {
    "strategies:\n  a: gradient_cliping": [
        "line 2: strategies.a: Unknown strategy 'gradient_cliping'. Did you mean 'gra"
    ],
    "strategies:\n  a:\n    gradient_clipping:\n      clipnrom: 1.0": [
        "line 4: strategies.a.gradient_clipping.clipnrom: gradient_clipping: unknown option 'clipnrom'. Did you mean "
        "'clipnorm'"
    ],
    "strategies:\n  a:\n    gradient_clipping:\n\n      clipnorm: -1.0": [
        "line 5: strategies.a.gradient_clipping.clipnorm: gradient_clipping: clipnorm: Input should be greater than"
    ],
    "strategies:\n  a:\n    adversarial:\n      epsilon: {grid: [0.1, x]}": [
        "line 4: strategies.a.adversarial.epsilon: adversarial: epsilon: Input should be a valid number. Given: 'x'"
    ],
    "strategies:\n  a:\n    adversarial:\n      epsilon: {grid: []}": ["line 4: strategies.a.adversarial.epsilon: "],
    "strategies:\n  a:\n    sam:\n      rho: {gird: [0.1]}": ["line 4: strategies.a.sam.rho: sam: "],
    "strategies: [pcgrad]\nmetrics:\n  left: [mse, acuracy]": [
        "line 3: metrics.left.1: Unknown metric 'acuracy'. Did you mean 'accuracy'"
    ],
    "strategies: [pcgrad]\nmetrics: ['left:acuracy']": ["line 2: metrics.0: Unknown metric 'acuracy'. Did you mean"],
    "strategies: [pcgrad]\nmetrics: [left: accuracy]": [
        "line 2: metrics.0: A metric is given by its name, that of an output as \"output:metric\", not {'left': 'acc"
    ],
    "strategies: [pcgrad]\nmetrics: {left: 'right:accuracy'}": ["line 2: metrics.left: A metric is given by its na"],
    "strategies: [pcgrad]\nmetrics: ':accuracy'": ["line 2: metrics: The metric of an output is OUTPUT:METRIC"],
    "strategies: [pcgrad]\nloss: 3": ["line 2: loss: A loss is a name of Keras, or one for each output by"],
    "strategies: [pcgrad]\nloss: {left: 3}": ["line 2: loss.left: The loss of an output is a name of Keras, or null"],
    "strategies: [pcgrad]\nloss: {}": ["line 2: loss: `loss` by output is empty"],
    "strategies: [pcgrad]\nloss:\n  left: mse\n  right: mes": ["line 4: loss.right: Unknown loss 'mes'. Did you mean"],
    "strategies:\n  a: sam +": ["line 2: strategies.a: A strategy is missing in 'sam +'"],
    "strategies:\n  a:\n    standard: 3": ["line 3: strategies.a.standard: Options of 'standard' are a mapping, not 3"],
    "strategies: [standard, standard]": ["line 1: strategies.1: 'standard' is listed twice"],
    "strategies:\n  - standard\n  - gradient_clipping\n  - ' standard'": [
        "line 4: strategies.2: 'standard' is listed twi"
    ],
    "strategies:\n  a: standard\n  1: sam": ["line 3: strategies.1: A label is a text, not 1. Put it in quotes."],
    "strategies:\n  'a b': standard\n  'a  b': gradient_clipping": ["line 3: strategies.a  b: Two strategies would be"],
    "strategies: [standard]\nloss: mean_sqared_error": [
        "line 2: loss: Unknown loss 'mean_sqared_error'. Did you mean 'mean_squared_error'"
    ],
    "strategies: [standard]\nmetrics:\n  - accuracy\n  - acuracy": [
        "line 4: metrics.1: Unknown metric 'acuracy'. Did you mean 'accuracy'"
    ],
    "strategies: [standard]\noptimizer: {name: sgd, learning_rate: -1.0}": [
        "line 2: optimizer.learning_rate: `learning_rate` must be a number from 0 on, not -1.0."
    ],
    "strategies: [standard]\ntarget: true": [
        "line 2: target: A target is METRIC=VALUE, such as accuracy=0.95, or {met"
    ],
    "strategies: {}": ["line 1: strategies: Strategies are a list of texts"],
    "seeds: 3": ["line 1: 'strategies' is missing."],
    "strategies: [standard]\nseed: 3": ["line 2: seed: unknown key. Did you mean 'seeds'"],
    "strategies: [standard]\nseeds: [1, 1]": ["line 2: seeds: `seeds` is how many"],
    "strategies: [standard]\nseeds: many": ["line 2: seeds: `seeds` is how many"],
    "strategies: [standard]\nepochs: 1\nseconds: 3": ["line 3: seconds: A run has one budget: give epochs or seconds"],
    "strategies: [standard]\nepochs: 1.5": ["line 2: epochs: Input should be a valid integer. Given: 1.5."],
    "workload:\n  - digits_cnn\n  - digits_cn\nstrategies: [standard]": [
        "line 3: workload.1: Unknown workload 'digits_cn'. Did you mean 'digits_cnn'"
    ],
    "workload: {name: digits_cnn, nois: 0.4}\nstrategies: [standard]": ["line 1: workload.nois: unknown key. Did you"],
    "workload: digits_cnn\nmodel: a:b\nstrategies: [standard]": ["line 1: workload: Give a workload, or your own"],
    "strategies: [standard]\noptimizer: adamm": ["line 2: optimizer: Unknown optimizer 'adamm'. Did you mean 'adam"],
    "strategies: [standard]\noptimizer:\n  name: sgd\n  momentun: 0.9": [
        "line 4: optimizer.momentun: sgd: unknown option 'momentun'. Did you mean 'momentum'"
    ],
    "strategies: [standard]\noptimizer:\n  name: sgd\n  schedule: {name: cosinus}": [
        "line 4: optimizer.schedule.name: Unknown schedule 'cosinus'. Did you mean 'cosine_decay'"
    ],
    "strategies: [standard]\ntarget: {accuracy: high}": ["line 2: target: Input should be a valid number"],
    "strategies: [standard]\nattack: {epsilon: -1.0}": ["line 2: attack.epsilon: Input should be greater than 0"],
    # Every mistake is told, in the order of the file.
    "strategies:\n  a: nosuch\n  b: neither\nepochs: 0": [
        "line 2: strategies.a",
        "line 3: strategies.b",
        "line 4: epochs",
    ],
    "strategies: [standard]\nseeds: 3\nseeds: 4": ["line 3: 'seeds' is there already, on line 2."],
    "strategies: [standard": ["line 1: not valid YAML"],
    "- standard": ["{path} must be a mapping with at least `strategies`"],
    "": ["{path} is empty"],
}


@pytest.mark.parametrize("text", MISTAKES, ids=range(len(MISTAKES)))
def test_each_mistake_is_told_with_its_line(tmp_path, text):
    lines, expected = refused(tmp_path, text), MISTAKES[text]
    assert len(lines) == len(expected), lines
    for line, begin in zip(lines, expected, strict=True):
        assert line.startswith(begin.format(path=tmp_path / "experiment.yaml") if "{path}" in begin else begin), line


@pytest.mark.parametrize(
    ("text", "begin"),
    [
        (
            "seeds = 3\n\n[strategies.a.gradient_clipping]\n# why\nclipnrom = 1.0\n",
            "line 5: strategies.a.gradient_clip",
        ),
        ("seeds = 3\nstrategies = [\n  'standard',\n  'nosuch',\n]\n", "line 2: strategies.nosuch"),
        ("strategies = ['standard']\nseed = 3\n", "line 2: seed: unknown key. Did you mean 'seeds'"),
        ('[strategies]\na = """\ngradient_clipping"""\nb = "nosuch"\n', "line 4: strategies.b: Unknown strategy"),
        (
            "strategies = ['standard']\n[[workload]]\nname = 'blobs_mlp'\n[[workload]]\nname = 'x'\n",
            "line 5: workload.1",
        ),
    ],
)
def test_mistakes_in_toml_have_the_line_of_their_statement(tmp_path, text, begin):
    [line] = refused(tmp_path, text, "experiment.toml")
    assert line.startswith(begin) or line.startswith(begin.removesuffix(".nosuch")), line


def test_a_toml_file_that_is_none_is_refused(tmp_path):
    [line] = refused(tmp_path, "a = \nb = 1\n", "experiment.toml")
    assert "not valid TOML" in line
    assert "line 1" in line


@pytest.mark.parametrize("name", ["nothing.yaml", "folder.yaml"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(InvalidExperimentError, match=f"{name} cannot be read"):
        Experiment.read(tmp_path / name)


def test_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(InvalidExperimentError, match=r"a file \.yaml, \.yml or \.toml"):
        Experiment.read(written(tmp_path, "", "experiment.json"))


def test_yaml_is_read_by_the_rules_of_today(tmp_path):
    """PyYAML alone would make 1e-3 a text, no a false, 010 an eight, and 1:30 a ninety."""
    text = "a: 1e-3\nb: no\nc: .inf\nd: 1:30\ne: 0o10\nf: true\ng: ~\nh: 2026-01-01\ni: 010\n"
    assert Source(written(tmp_path, text)).content == {
        "a": 0.001, "b": "no", "c": float("inf"), "d": "1:30", "e": 8, "f": True, "g": None, "h": "2026-01-01", "i": 10,
    }  # fmt: skip


def test_yaml_runs_nothing(tmp_path):
    with pytest.raises(InvalidExperimentError, match="could not determine a constructor"):
        Source(written(tmp_path, "a: !!python/object/apply:os.getcwd []"))


def test_an_experiment_does_not_change():
    experiment = Experiment(strategies=["standard"])
    with pytest.raises(ValueError, match="frozen"):
        experiment.seeds = 3


def test_the_published_schema_is_current():
    writer = runpy.run_path(str(ROOT / "docs" / "catalogue.py"))
    assert (ROOT / "docs" / "experiment.schema.json").read_text() == writer["schema"]()  # Else: `make docs`.


def test_the_schema_is_one_and_takes_what_the_reader_takes():
    schema = json.loads(json.dumps(json_schema(), allow_nan=False))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(YAML.replace("1e-1", "0.1").replace("1e-2", "0.01")), schema)


@pytest.mark.parametrize(
    "content",
    [
        {"strategies": {"a": {"gradient_clipping": {"clipnrom": 1.0}}}},
        {"strategies": {"a": {"gradient_cliping": {}}}},
        {"strategies": {"a": {"adversarial": {"epsilon": {"grid": ["x"]}}}}},
        {"strategies": ["standard"], "seed": 3},
        {"strategies": ["standard"], "workload": "digits"},
        {"seeds": 3},
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(content):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, json_schema())
    with pytest.raises(InvalidExperimentError):
        Experiment.read(content)


def test_the_schema_describes_every_option_of_every_strategy():
    composition = json_schema()["$defs"]["Composition"]["anyOf"][2]
    for name in trainstep.names():
        described = composition["properties"][name]["anyOf"][0]["properties"]
        assert list(described) == list(trainstep.get(name).declaration.options.model_fields)
        assert all(option["description"] for option in described.values())
