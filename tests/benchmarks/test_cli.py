"""The command line."""

import json
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

import trainstep
import trainstep_cli
from trainstep.benchmarks import compare, schema
from trainstep.benchmarks.spec import SpecError, parse_spec
from trainstep.benchmarks.store import Store


def run(*arguments):
    return CliRunner().invoke(trainstep_cli.app, list(arguments))


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("sam", {"sam": {}}),
        ("sam+ema", {"sam": {}, "ema": {}}),
        ("a:x=0.1,y=pgd+b", {"a": {"x": 0.1, "y": "pgd"}, "b": {}}),
        ("a:x=1e+3+b:y=true", {"a": {"x": 1e3}, "b": {"y": True}}),
        ("a:x=+inf", {"a": {"x": float("inf")}}),
        ("a:x=.1,y=True,z=inf,w=None", {"a": {"x": 0.1, "y": True, "z": float("inf"), "w": None}}),
        ("a:x=[0,1],y=[1e+3]+b", {"a": {"x": [0, 1], "y": [1e3]}, "b": {}}),
        ('a:x="p+q,r"+b', {"a": {"x": "p+q,r"}, "b": {}}),
        ("a:x=Infinity", {"a": {"x": float("inf")}}),
        ("a:x=null", {"a": {"x": None}}),
        (" a : x = 1 + b ", {"a": {"x": 1}, "b": {}}),
    ],
)
def test_a_spec_is_read(text, spec):
    assert parse_spec(text) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "missing"),
        ("sam+", "missing"),
        ("sam++ema", "missing"),
        ("sam+sam", "twice"),
        ("sam:", "no options after"),
        ("sam:rho", "not OPTION=VALUE"),
        ("sam:rho=", "not OPTION=VALUE"),
        ("sam:rho=1,rho=2", "twice"),
        ("rho=1", "no name"),
        ("sam:x=[0,1", "counterpart"),
        ("sam:x=[0,a]", "not valid JSON"),
    ],
)
def test_wrong_syntax_is_explained(text, message):
    with pytest.raises(SpecError, match=message):
        parse_spec(text)


def test_help_imports_neither_tensorflow_nor_pydantic(record_property):
    code = (
        "import sys, trainstep_cli\nsys.argv = ['trainstep', '--help']\n"
        "try:\n    trainstep_cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'tensorflow', 'keras', 'pydantic', 'numpy'} & set(sys.modules)"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    record_property("seconds", time.perf_counter() - begin)
    assert done.returncode == 0, done.stderr
    assert "compare" in done.stdout


def test_an_error_is_one_message_and_no_noise():
    done = subprocess.run(
        [sys.executable, "-c", "import trainstep_cli; trainstep_cli.main()", "plan", "gradient_cliping"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("trainstep: Unknown strategy 'gradient_cliping'. Did you mean 'gradient_clipping'")
    assert len(done.stderr.splitlines()) == 1


def test_an_import_that_fails_is_not_swallowed(monkeypatch, tmp_path):
    (tmp_path / "tensorflow.py").write_text("import os; os.write(2, b'from native code'); raise ImportError('broken')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import trainstep_cli; trainstep_cli.main()"
    done = subprocess.run([sys.executable, "-c", code, "list"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "from native code" in done.stderr
    assert "ImportError: broken" in done.stderr


def test_version():
    assert run("--version").output.strip() == f"trainstep {trainstep.__version__}"


def test_list_has_every_name():
    result = run("list")
    assert result.exit_code == 0
    assert all(name in result.output for name in [*trainstep.names(), "digits_cnn"])


def test_show_and_plan_print_what_the_package_says():
    assert run("show", "standard").output.strip() == str(trainstep.describe("standard"))
    plan = run("plan", "adversarial:epsilon=0.1,clip_range=[0,1]+gradient_clipping")
    expected = trainstep.plan({"gradient_clipping": {}, "adversarial": {"epsilon": 0.1, "clip_range": (0.0, 1.0)}})
    assert plan.output.strip() == str(expected)


def test_schema_prints_the_schema_of_experiments():
    assert json.loads(run("schema").output) == json.loads(json.dumps(schema.json_schema()))


TINY = ("-w", "blobs_mlp", "--epochs", "1", "--seeds", "1", "--no-cost", "--workers", "1", "--attack", "none")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Return a folder with the results of one comparison, and what was printed."""
    folder = tmp_path_factory.mktemp("results")
    result = run("compare", *TINY, "-s", "standard", "-s", "gradient_clipping:clipvalue=0.1", "-o", str(folder))
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_compare_trains_and_writes(kept):
    folder, printed = kept
    with Store(folder / "results.sqlite") as store:
        assert [run.label for run in store.runs()] == ["standard", "gradient_clipping:clipvalue=0.1"]
    for name in ("results.sqlite", "report.html", "report.md"):
        assert (folder / name).exists()
        assert name in printed.replace("\n", "")
    assert "gradient_clipping" in printed


def test_report_shows_a_store_again_and_writes_its_page(kept, tmp_path):
    folder, _ = kept
    result = run("report", str(folder / "results.sqlite"), "-o", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "gradient_clipping" in result.output
    assert (tmp_path / "report.html").exists()
    assert (tmp_path / "report.md").exists()


def test_compare_against_a_store_says_what_changed(kept, tmp_path):
    folder, _ = kept
    strategies = ("-s", "standard", "-s", "gradient_clipping:clipvalue=0.1")
    same = run("compare", *TINY, *strategies, "--against", str(folder / "results.sqlite"))
    assert same.exit_code == 0, same.output
    assert "Nothing has changed." in same.output
    other = run("compare", *TINY, *strategies, "--learning-rate", "0.1", "--against", str(folder / "results.sqlite"))
    assert other.exit_code == 3, other.output


@pytest.fixture
def asked(monkeypatch):
    """Return what `compare` was asked for, and run nothing."""
    found = {}

    def note(suite, **running):
        found.update(suite=suite, running=running)
        raise trainstep.errors.TrainstepError("enough")

    monkeypatch.setattr(compare, "run_suite", note)
    return found


def test_one_strategy_with_two_options_is_two_rows(asked):
    result = run("compare", "-w", "digits_mlp", "-s", "gradient_clipping", "-s", "gradient_clipping:clipvalue=0.1")
    assert (result.exit_code, result.stderr) == (2, "trainstep: enough\n")
    assert list(asked["suite"].compositions) == ["standard", "gradient_clipping", "gradient_clipping:clipvalue=0.1"]


def test_every_flag_arrives(asked):
    run(
        "compare", "-w", "blobs_mlp", "-w", "digits_mlp", "-s", "gradient_clipping + skip_nonfinite", "--seeds", "2",
        "--updates", "30", "--target", "mse=0.1", "--noise", "0.25", "--batch-size", "16", "--optimizer",
        "sgd:momentum=0.9", "--learning-rate", "0.5", "--metric", "accuracy", "--metric", "mse", "--attack",
        "epsilon=0.2,steps=40", "--loss", "sparse_categorical_crossentropy", "--workers", "3", "--executor", "ray",
        "--time-limit", "9", "--no-cost", "--store", "s.sqlite", "--output", "out", "--tensorboard", "tb",
        "--mlflow", "m", "--retry-failed",
    )  # fmt: skip
    suite = asked["suite"]
    assert (list(suite.tasks), suite.seeds) == (["blobs_mlp noise=0.25", "digits_mlp noise=0.25"], (0, 1))
    settings = suite.settings["blobs_mlp noise=0.25"]
    assert (settings.budget.updates, settings.batch_size, settings.metrics) == (30, 16, ("accuracy", "mse"))
    assert (settings.target.metric, settings.target.value, settings.target.higher_is_better) == ("mse", 0.1, False)
    assert settings.optimizer.items() >= {"class": "SGD", "momentum": 0.9, "learning_rate": 0.5}.items()
    assert (settings.attack["epsilon"], settings.attack["steps"]) == (0.2, 40)
    assert asked["running"] == {
        "workers": 3, "executor": "ray", "time_limit": 9.0, "cost": False, "store": "s.sqlite", "output": "out",
        "tensorboard": "tb", "mlflow": "m", "retry_failed": True,
    }  # fmt: skip


def test_flags_override_the_file(asked, tmp_path):
    path = tmp_path / "e.yaml"
    path.write_text(
        "workload: blobs_mlp\nstrategies: [gradient_clipping]\nseeds: 4\nepochs: 9\nworkers: 2\noptimizer: {name: sgd}"
    )
    run("compare", str(path), "--updates", "5", "--workers", "1")
    assert asked["suite"].seeds == (0, 1, 2, 3)
    settings = asked["suite"].settings["blobs_mlp"]
    assert (settings.budget.updates, settings.budget.epochs, settings.optimizer["class"]) == (5, None, "SGD")
    assert asked["running"] == {"workers": 1}


def test_an_own_model_is_found_in_the_current_folder(asked, tmp_path, monkeypatch):
    (tmp_path / "model_of_mine.py").write_text("def build(): ...\ndef load(): ...\n")
    monkeypatch.chdir(tmp_path)
    result = run("compare", "--model", "model_of_mine:build", "--data", "model_of_mine:load", "-s", "gradient_clipping")
    assert result.stderr == "trainstep: enough\n"
    assert list(asked["suite"].tasks) == ["own model and data"]


def test_a_mistake_in_a_file_has_its_line(tmp_path):
    path = tmp_path / "e.yaml"
    path.write_text("strategies:\n  a: gradient_cliping\n")
    result = run("compare", str(path))
    assert result.exit_code == 2
    assert result.stderr.startswith(
        f"trainstep: {path}, line 2: strategies.a: Unknown strategy 'gradient_cliping'. Did"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("-w", "digits", "-s", "standard"),
        ("-w", "digits_mlp", "-s", "sam1"),
        ("-w", "digits_mlp", "-s", "standard", "-s", "standard"),
        ("-w", "digits_mlp", "-s", "sam+"),
        ("-w", "digits_mlp"),
        ("-s", "standard"),
        ("-w", "digits_mlp", "-s", "standard", "--epochs", "1", "--seconds", "1"),
        ("-w", "digits_mlp", "-s", "standard", "--optimizer", "adamm"),
        ("-w", "digits_mlp", "-s", "standard", "--target", "accuracy"),
        ("-w", "digits_mlp", "-s", "standard", "--model", "a:b"),
        ("nosuch.yaml",),
    ],
)
def test_a_wrong_comparison_ends_with_code_2(arguments):
    result = run("compare", *arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output


def test_a_store_that_is_none_ends_with_code_2(kept, asked, tmp_path):
    none, folder = str(tmp_path / "nothing.sqlite"), kept[0]
    assert run("report", none).exit_code == 2
    within = run("report", str(folder))
    assert within.exit_code == 2
    assert f"Did you mean '{folder / 'results.sqlite'}'?" in within.output.replace("\n", "")
    # Before anything is trained.
    assert run("compare", *TINY, "-s", "standard", "--against", none).exit_code == 2
    assert asked == {}


def test_a_report_that_cannot_be_written_ends_with_code_2(kept, tmp_path):
    (tmp_path / "taken").write_text("")
    result = run("report", str(kept[0] / "results.sqlite"), "-o", str(tmp_path / "taken"))
    assert result.exit_code == 2
    assert "Nothing can be written to" in result.output
