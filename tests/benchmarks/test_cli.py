"""The command line."""

import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

import trainstep
import trainstep_cli
from trainstep.benchmarks.result import read_lines
from trainstep_cli import SpecError, parse_spec


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


def test_compare_trains_and_writes(tmp_path):
    result = run("compare", "-w", "digits_mlp", "-s", "standard", "--seeds", "1", "--epochs", "1", "-o", str(tmp_path))
    assert result.exit_code == 0, result.output
    [cell] = read_lines(tmp_path / "results.jsonl")
    assert (cell.label, len(cell.metrics), cell.failure) == ("standard", 1, None)
    assert str(tmp_path / "report.html") in result.output
    assert (tmp_path / "report.html").exists()


def test_compare_keeps_one_strategy_with_two_options(monkeypatch):
    asked = {}

    def refuse(**arguments):
        asked.update(arguments)
        raise trainstep.errors.TrainstepError("enough")

    monkeypatch.setattr(trainstep, "compare", refuse)
    result = run("compare", "-w", "digits_mlp", "-s", "gradient_clipping", "-s", "gradient_clipping:clipvalue=0.1")
    assert (result.exit_code, result.stderr) == (2, "trainstep: enough\n")
    assert asked["strategies"] == {
        "gradient_clipping": {"gradient_clipping": {}},
        "gradient_clipping:clipvalue=0.1": {"gradient_clipping": {"clipvalue": 0.1}},
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ("-w", "digits", "-s", "standard"),
        ("-w", "digits_mlp", "-s", "sam1"),
        ("-w", "digits_mlp", "-s", "standard", "-s", "standard"),
    ],
)
def test_a_wrong_comparison_ends_with_code_2(arguments):
    assert run("compare", *arguments).exit_code == 2
