"""The measurement of what a step costs: small here, and its arithmetic by hand."""

import json

import keras
import pytest

from trainstep.benchmarks import step_cost
from trainstep.benchmarks.step_cost import Row, Seconds, Subject


def tiny() -> keras.Model:
    return keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(10, "softmax")])


def test_a_ratio_is_the_median_of_those_of_the_turns(monkeypatch):
    # The machine slows down threefold in the last turn, for both: 2 / 1, 2 / 1, 9 / 3.
    clocks = {"Keras fit": iter([1.0, 1.0, 3.0]), "standard": iter([2.0, 2.0, 9.0])}
    trained = []

    class Net:
        def __init__(self, label: str) -> None:
            self.label = label
            self.traced = False

        def fit(self, *args: object, **kwargs: object) -> None:
            trained.append(self.label)

    monkeypatch.setattr(step_cost, "FRESH", 1)
    monkeypatch.setattr(step_cost, "compiled", lambda subject, build, loss: Net(subject.label))

    def timed(function):
        function()
        seconds = next(clocks[trained[-1]])
        return Seconds(seconds, seconds / 2)

    monkeypatch.setattr(step_cost, "_timed", timed)
    entries = [Subject("Keras fit"), Subject("standard", "standard", target=1.999)]
    plain, standard = step_cost.measure("tiny", tiny, entries, batch=2, rounds=3, steps=1)
    assert (plain.ratio, standard.ratio, standard.processor_ratio) == (1.0, 2.0, 2.0)
    assert standard.milliseconds == 2000.0
    assert standard.reached is False
    assert plain.reached is None


def test_a_target_is_reached_to_the_last_digit_shown():
    def row(ratio: float) -> Row:
        return Row("net", "label", "other", 1.0, (1.0, 1.0), ratio, ratio, 1.02)

    assert [row(ratio).reached for ratio in (1.01, 1.02, 1.0204, 1.021)] == [True, True, True, False]
    assert "| 1.021 | 1.021 | other | 1.02 MISSED |" in step_cost.table([row(1.021)])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_measures_every_subject_and_writes_what_it_measured(monkeypatch, tmp_path, capsys):
    for net in ("cnn", "mlp", "wide"):
        monkeypatch.setattr(step_cost, net, tiny)
    monkeypatch.setattr(step_cost, "PARTS", ("cnn", "wide"))
    assert step_cost.main(["--rounds", "2", "--output", str(tmp_path)]) == 0
    [path] = tmp_path.glob("step_cost_keras-*.json")
    report = json.loads(path.read_text())
    labels = [row["label"] for row in report["rows"]]
    assert labels[: len(step_cost.subjects())] == [subject.label for subject in step_cost.subjects()]
    assert all(row["ratio"] > 0 for row in report["rows"])
    assert report["environment"]["keras"] == keras.__version__
    assert path.with_suffix(".md").exists()
    assert "| cnn | standard |" in capsys.readouterr().out
    assert step_cost.main(["--rounds", "2", "--output", str(tmp_path), "--only", "wide"]) == 0
    again = json.loads(path.read_text())["rows"]
    assert again[:-2] == report["rows"][:-2]
    assert again[-2:] != report["rows"][-2:]
