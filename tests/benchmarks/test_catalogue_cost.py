"""The cost of every strategy: each on a net it can train, beside the control there and its own limit."""

import json

import pytest

import trainstep
from trainstep.benchmarks import catalogue_cost

pytestmark = pytest.mark.filterwarnings("ignore:mixed_precision computes in float16:UserWarning")


def test_every_strategy_has_a_net_and_a_limit():
    for name in trainstep.names():
        nets = catalogue_cost.nets_of(name)
        assert {*nets} <= {*catalogue_cost.NETS}
        if "images of any size" in trainstep.get(name).declaration.needs:
            assert [catalogue_cost.NETS[net].build for net in nets] == [catalogue_cost.small_cnn]
        subjects = catalogue_cost.subjects(name, {name: dict(trainstep.get(name).declaration.example)})
        assert subjects[0].label == name
        assert all(subject.target > 0 for subject in subjects)


def test_options_and_targets_are_of_strategies_that_exist():
    labels = {
        subject.label
        for name in trainstep.names()
        for subject in catalogue_cost.subjects(name, {name: dict(trainstep.get(name).declaration.example)})
    }
    assert {*catalogue_cost.OPTIONS, *catalogue_cost.EXAMPLES, *catalogue_cost.NETS_OF} <= {*trainstep.names()}
    assert {*catalogue_cost.TARGETS} <= labels


def test_an_interval_of_sam_has_the_limit_of_the_steps_that_ascend():
    _, fifth, _ = catalogue_cost.subjects("sam", {})
    assert (fifth.label, fifth.target) == ("sam interval=5", 1.22)  # 1 + 1.1 / 5.


def test_it_measures_beside_the_control_and_keeps_what_it_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(catalogue_cost, "BATCH", 4)
    monkeypatch.setattr(catalogue_cost, "STEPS", 1)
    assert (
        catalogue_cost.main(["--rounds", "5", "--only", "standard", "mixup", "pcgrad", "--output", str(tmp_path)]) == 0
    )
    [path] = tmp_path.glob("catalogue_cost_keras-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["net"], row["label"]) for row in rows] == [
        ("cnn", "standard"), ("cnn", "mixup"), ("cnn of two outputs", "standard"), ("cnn of two outputs", "pcgrad"),
    ]  # fmt: skip
    assert all(row["against"] == "standard" for row in rows)
    assert "| cnn | mixup |" in capsys.readouterr().out
