"""The measurement of the suite itself, on an experiment of two runs and a store of two hundred."""

import json

import pytest

from trainstep.benchmarks import suite_cost


def test_everything_is_measured_for_real_and_kept(tmp_path, capsys):
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text("{workload: blobs_mlp, strategies: {standard: }, epochs: 1}")
    arguments = ["--experiment", str(experiment), "--rounds", "1", "--seeds", "2", "--runs", "200"]
    assert suite_cost.main([*arguments, "--output", str(tmp_path)]) == 0
    content = json.loads(next(tmp_path.glob("suite_cost_keras-*.json")).read_text())
    over = content["overhead"]
    assert over["over_fit"] == over["suite_seconds"] / over["fit_seconds"]
    assert 0 < over["fit_seconds"] < content["comparison_seconds"]
    assert [(store["runs"], store["workloads"]) for store in content["stores"]] == [(200, 20), (200, 1)]
    assert all(0 < store["opened_seconds"] < store["seconds"] for store in content["stores"])
    assert "times the seconds of its calls of fit" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        suite_cost.main([*arguments, "--output", str(tmp_path)])


def test_what_is_above_its_target_is_said():
    content = {
        "comparison_seconds": 91.0,
        "overhead": {"over_fit": 1.149, "over_script": 0.9},
        "stores": [{"runs": 200, "seconds": 3.0}, {"runs": 200, "seconds": 11.0}],
    }
    assert [line.split()[-1] for line in suite_cost.lines(content)[:3]] == ["MISSED)", "reached)", "MISSED)"]
