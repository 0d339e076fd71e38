"""Results that are kept: what is in a file, that none is written over, and the table that is made of them."""

import json
import pathlib
import runpy

import pytest
import records
from numpy.testing import assert_allclose

import trainstep
from trainstep.benchmarks import evidence, foreign_attack
from trainstep.benchmarks.comparison import Comparison
from trainstep.benchmarks.keeping import keep, newest, path_of
from trainstep.benchmarks.statistics import judge

ROOT = pathlib.Path(trainstep.__file__).parent
EXPERIMENT = """
workload: blobs_mlp
strategies: {standard: , clipped: "gradient_clipping:global_clipnorm=0.1"}
seeds: 2
updates: 2
workers: 1
"""


def kept(folder: pathlib.Path, name: str, day: str, comparison: Comparison) -> pathlib.Path:
    path = path_of(folder, name, {"keras": "3.15.1", "time": f"{day}T00:00:00+00:00"})
    keep(path, evidence.content_of(comparison, "workload: ..."))
    return path


def made_up(**changes) -> Comparison:
    runs, costs = records.suite({"standard": 0.0, "clipped": 0.02}, **changes)
    return Comparison(runs, costs, "standard")


def attack_rows() -> dict:
    rows = [
        {"strategy": label, "seed": seed, "accuracy": 0.9 + seed / 100, "robust_accuracy": 0.5,
         "foolbox_robust_accuracy": 0.25}
        for label in foreign_attack.SPECS for seed in (0, 2)
    ]  # fmt: skip
    settings = {
        "workload": "fashion_cnn",
        "strategies": dict(foreign_attack.SPECS),
        "epochs": 1,
        "train_examples": None,
        "attack": {"epsilon": 0.1, "steps": 40, "examples": 1000},
    }
    return {"settings": settings, "environment": records.ENVIRONMENT | {"foolbox": "3.3.4"}, "rows": rows}


# --- Files --------------------------------------------------------------------------------------------------------


def test_a_file_is_written_once_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "a.json"
    keep(path, {"a": 1})
    with pytest.raises(FileExistsError):
        keep(path, {"a": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        keep(tmp_path / "new" / "b.json", {"a": float("inf")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_the_newest_is_the_one_of_the_latest_day_whatever_the_version(tmp_path):
    assert newest(tmp_path, "digits") is None
    for name in ("digits_keras-3.9.0_2026-11-25", "digits_keras-3.15.1_2026-11-24", "digits2_keras-3.15.1_2026-12-01"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert newest(tmp_path, "digits") == tmp_path / "digits_keras-3.9.0_2026-11-25.json"


# --- What is in them ----------------------------------------------------------------------------------------------


def test_verdicts_follow_from_the_values_by_seed_that_are_kept_beside_them(tmp_path):
    path = kept(tmp_path, "digits", "2026-11-25", made_up())
    [workload] = json.loads(path.read_text())["workloads"]
    values = {label: each["by_seed"]["accuracy"] for label, each in workload["strategies"].items()}
    pairs = zip(values["clipped"], values["standard"], strict=True)
    expected = judge({"clipped": [mine - control for mine, control in pairs]})["clipped"]
    found = workload["strategies"]["clipped"]["difference"]
    assert found["verdict"] == expected.verdict == "better"
    assert_allclose([found["mean"], found["low"], found["p"]], [expected.mean, expected.low, expected.p])
    assert workload["strategies"]["standard"]["difference"] is None
    assert path.stat().st_size < 8_000


def test_a_seed_that_failed_or_missed_the_target_is_a_hole_not_left_out(tmp_path):
    runs = [records.run("standard", seed, [0.8, 0.95 if seed else 0.85]) for seed in range(3)]
    runs.append(records.run("clipped", 0, [], failure="DivergedError: loss"))
    runs += [records.run("clipped", seed, [0.95, 0.96]) for seed in (1, 2)]
    path = kept(tmp_path, "digits", "2026-11-25", Comparison(tuple(runs), (), "standard"))
    [workload] = json.loads(path.read_text())["workloads"]
    standard, clipped = workload["strategies"].values()
    assert standard["by_seed"]["updates_to_target"] == [None, 20, 20]  # The target is 0.9; an epoch is 10 updates.
    assert clipped["by_seed"]["accuracy"] == [None, 0.96, 0.96]
    assert clipped["failures"] == {"DivergedError: loss": [0]}
    assert clipped["cost"] is None


def test_an_experiment_is_run_kept_with_its_text_and_not_run_again(tmp_path, capsys):
    file = tmp_path / "tiny.yaml"
    file.write_text(EXPERIMENT)
    arguments = [str(file), "--output", str(tmp_path / "kept"), "--store", str(tmp_path / "store.sqlite")]
    assert evidence.main(arguments) == 0
    [path] = (tmp_path / "kept").iterdir()
    written = path.read_text()
    content = json.loads(written)
    assert content["experiment"] == EXPERIMENT
    [workload] = content["workloads"]
    assert workload["environment"].keys() >= {"keras", "tensorflow", "python", "processor", "time"}
    assert workload["settings"]["budget"]["updates"] == 2
    assert list(workload["strategies"]) == ["standard", "clipped"]
    for strategy in workload["strategies"].values():
        assert strategy["difference"] is None or strategy["difference"]["verdict"] == "too few seeds"
        assert strategy["cost"]["ratio"]
        assert None not in strategy["by_seed"]["robust_accuracy"]
    capsys.readouterr()
    assert evidence.main(arguments) == 0
    assert f"{path} is there" in capsys.readouterr().out
    assert path.read_text() == written


# --- The README ---------------------------------------------------------------------------------------------------


@pytest.fixture
def writer() -> dict:
    return runpy.run_path(str(ROOT / "docs" / "evidence.py"))


def test_the_readme_says_what_the_newest_results_do(writer):
    text = (ROOT / "README.md").read_text()
    assert writer["with_evidence"](text) == text  # Else: `make docs`.


def test_without_results_nothing_is_claimed(writer, tmp_path):
    empty = f"before\n\n{writer['BEGIN']}{writer['END']}\nafter\n"
    filled = empty.replace(writer["END"], f"| old |\n{writer['END']}")
    assert writer["with_evidence"](filled, tmp_path) == empty


def test_the_table_has_a_row_for_each_strategy_and_columns_for_each_workload(writer, tmp_path):
    kept(tmp_path, "digits", "2026-11-24", made_up(seeds=3))
    digits = made_up()
    path = kept(tmp_path, "digits", "2026-11-25", digits)
    runs, costs = records.suite({"standard": 0.0}, workloads=["fashion_cnn"])
    kept(tmp_path, "fashion", "2026-11-25", Comparison(runs, costs, "standard"))
    empty = f"{writer['BEGIN']}{writer['END']}"
    text = writer["with_evidence"](empty, tmp_path)
    [head, _, standard, clipped] = [line for line in text.splitlines() if line.startswith("|")]
    assert head == "| strategy | digits_cnn: accuracy | difference | cost | fashion_cnn: accuracy | difference | cost |"
    assert standard.startswith("| standard | 0.")
    assert [cell.strip() for cell in standard.split("|")[3:5]] == ["", "1.00"]
    row = digits.rows[1].difference
    assert f"| {row.mean:+.4f} [{row.low:+.4f}, {row.high:+.4f}], better | 1.50 |  |  |  |" in clipped
    assert "digits_cnn: 8 epochs, 5 seeds, Keras 3.15.1, a processor, 2026-11-25" in text
    assert f"[{path.name}](benchmarks/results/{path.name})" in text
    assert writer["with_evidence"](text, tmp_path) == text


def test_the_adversarial_row_has_both_attacks_and_the_budget(writer, tmp_path):
    keep(tmp_path / "foreign_attack_keras-2.15.0_2026-11-25.json", attack_rows())
    text = "\n".join(writer["paragraphs"](tmp_path))
    # 0.90 and 0.92: each 0.01 from the mean, so the standard deviation is 0.01 * sqrt(2).
    assert "| standard | 0.9100 ± 0.0141 | 0.5000 ± 0.0000 | 0.2500 ± 0.0000 |\n| adversarial pgd |" in text
    assert "under our PGD-40 | under foolbox's PGD-40 |" in text
    assert "1 epoch; L-infinity ball of radius 0.1, random start, first 1000 test examples; 2 seeds," in text
    assert "foolbox 3.3.4" in text
