"""The measurement of memory: its arithmetic by hand, and one process for real."""

import json
import sys

import pytest

from trainstep.benchmarks import memory
from trainstep.benchmarks.memory import Measured, Subject

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="It reads what Linux says of a process.")


def test_ratios_are_of_medians_and_to_the_first_subject_of_the_net():
    plain = Subject("net", "Keras fit")
    parts = Subject("net", "in parts", {"micro_batches": {}}, target_memory=0.35, target_time=1.1)
    rows = memory.rows_of(
        {
            plain: [Measured(100.0, 1.0, 10.0), Measured(900.0, 9.0, 10.0), Measured(80.0, 2.0, 10.0)],
            parts: [Measured(25.0, 2.5, 10.0), Measured(30.0, 2.4, 10.0), Measured(20.0, 3.0, 10.0)],
        }
    )
    # Medians: 100 and 25 mebibytes, 2 and 2.5 seconds; 75 mebibytes less are 7.5 copies of the weights.
    assert [row["memory_ratio"] for row in rows] == [1.0, 0.25]
    assert [row["time_ratio"] for row in rows] == [1.0, 1.25]
    assert rows[1]["copies_of_the_weights"] == -7.5
    assert "| net | in parts | 25 | 0.25 (0.35 reached) | 1.25 (1.10 MISSED) | less |" in memory.table(rows)


def test_a_process_of_its_own_measures_the_accumulator():
    accumulation = next(subject for subject in memory.SUBJECTS if subject.label == "gradient_accumulation")
    measured = memory.measure(accumulation)
    # 784 to 4096, three times 4096 to 4096, 4096 to 10, with biases; 4 bytes each.
    count = (784 + 1) * 4096 + 3 * (4096 + 1) * 4096 + (4096 + 1) * 10
    assert measured.weights == pytest.approx(4 * count / 2**20)
    assert measured.peak > measured.weights  # The sum of the gradients is there.
    assert measured.seconds > 0


def test_what_was_measured_is_written(monkeypatch, tmp_path, capsys):
    small = [Subject("tiny", "Keras fit"), Subject("tiny", "in parts", {"micro_batches": {"count": 2}})]

    def tiny():
        return memory.trainstep.models.build("mlp", input_shape=(6,), classes=10, units=(4,))

    monkeypatch.setattr(memory, "SUBJECTS", small)
    monkeypatch.setattr(memory, "NETS", {"tiny": memory.Net(tiny, 8, 2, warm=True)})
    # In this process: another one would not know these subjects.
    monkeypatch.setattr(memory, "measure", lambda subject: memory.measure_here(subject, memory.NETS[subject.net]))
    assert memory.main(["--rounds", "1", "--output", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*.json")
    assert [row["label"] for row in json.loads(path.read_text())["rows"]] == ["Keras fit", "in parts"]
    assert path.with_suffix(".md").read_text().startswith("# What a strategy takes of memory")
    assert "| tiny | in parts |" in capsys.readouterr().out
