"""Rules of the repository, checked on its files."""

import ast
import io
import os
import pathlib
import re
import subprocess
import sys
import tokenize
import warnings

import pytest

import trainstep

ROOT = pathlib.Path(trainstep.__file__).parent
STRATEGIES = sorted(path for path in (ROOT / "strategies").glob("*.py") if path.name != "__init__.py")
SOURCES = sorted(
    path
    for path in [
        *ROOT.glob("*.py"),
        *ROOT.glob("strategies/*.py"),
        *ROOT.glob("models/**/*.py"),
        *ROOT.glob("benchmarks/**/*.py"),
    ]
)
SEAM = ROOT / "_seam.py"
LINES_OF_CODE = 150


def relative(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: pathlib.Path) -> list[str]:
    """Return the dotted names a file imports; those of relative imports start with a dot."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            found += [f"{prefix}.{alias.name}" for alias in node.names]
    return found


def lines_of_code(path: pathlib.Path) -> int:
    """Count lines that hold code: no comments, no docstrings, no blank lines."""
    source = path.read_text()
    documented = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node, clean=False) is not None
        ):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def test_there_is_one_registry():
    assert not {"registry", "strategies", "models", "benchmarks"} & sys.modules.keys()
    copies = [
        name
        for name, module in list(sys.modules.items())
        if getattr(module, "__file__", None) == str(ROOT / "registry.py")
    ]
    assert copies == ["trainstep.registry"]


def test_the_catalogue_lists_every_file_of_its_folder():
    listed = {name.rsplit(".", 1)[0] for name in imports_of(ROOT / "strategies" / "__init__.py")}
    present = {f"trainstep.strategies.{path.stem}" for path in STRATEGIES if not path.stem.startswith("_")}
    assert listed == present


def test_each_file_of_the_catalogue_registers_one_strategy_named_like_it():
    modules = {trainstep.get(name).__module__: name for name in trainstep.names()}
    for path in STRATEGIES:
        if not path.stem.startswith("_"):
            assert modules[f"trainstep.strategies.{path.stem}"] == path.stem


@pytest.mark.parametrize("path", STRATEGIES, ids=relative)
def test_a_strategy_is_short(path):
    assert lines_of_code(path) <= LINES_OF_CODE


@pytest.mark.parametrize("path", STRATEGIES, ids=relative)
def test_a_strategy_opens_with_what_it_does(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text
    assert text.splitlines()[0].endswith(".")


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_are_absolute_and_public(path):
    for name in imports_of(path):
        assert not name.startswith("."), f"{name} is relative"
        assert not name.startswith("tensorflow.python"), name
        assert name.split(".")[0] not in {"registry", "strategies", "models", "benchmarks", "step"}, (
            f"{name} would be a second copy"
        )
        if path != SEAM:
            assert not name.startswith("keras.src"), name
            assert not name.startswith("tensorflow.keras"), name


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_private_attribute_of_keras_or_tensorflow_outside_the_seam(path):
    """Only underscore names that the file itself defines or assigns."""
    if path == SEAM:
        return
    tree = ast.parse(path.read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            allowed = node.attr in own or node.attr in ("_replace", "_repr_html_")
            assert allowed, f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            name = ast.unparse(node.args[1]).strip("'")
            assert not name.startswith("_") or name.startswith("__") or name in own, (
                f"{path.name}:{node.lineno}: {ast.unparse(node)}"
            )


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_version_is_asked_for_outside_the_seam(path):
    if path == SEAM:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):  # To record a version is no test of it.
            assert not re.search(r"\b(__version__|VERSION|version)\b", ast.unparse(node)), f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Attribute):
            assert node.attr != "KERAS_3", f"{path.name}:{node.lineno}"


CENTRE = [p for p in SOURCES if p.parent == ROOT or p.parent.name in ("models", "benchmarks", "docs")]
# What each of these measures is beside a peer, or a limit, of its own.
COMPARED_WITH_PEERS = ("step_cost.py", "catalogue_cost.py", "memory.py", "foreign_attack.py")


@pytest.mark.parametrize("path", [p for p in CENTRE if p.name not in COMPARED_WITH_PEERS], ids=relative)
def test_the_centre_knows_no_strategy_by_name(path):
    """Only the catalogue's own list, and benchmarks of single strategies, name one."""
    names = set(trainstep.names()) - {"standard"}  # The control is a word of the language of this package.
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in names, f"{path.name}:{node.lineno} knows {node.value!r}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_path_of_one_machine(path):
    assert not re.search(r"(?<![\w.])/(tmp|home|root|Users|work)/", path.read_text())


def test_the_public_list_is_complete_and_sorted_by_use():
    for name in trainstep.__all__:
        assert hasattr(trainstep, name), name
    assert len(trainstep.__all__) == len(set(trainstep.__all__))
    public = {name for name in vars(trainstep) if not name.startswith("_")}
    modules = {name for name in public if type(vars(trainstep)[name]).__name__ == "module"}
    assert public - modules - {"Any", "TYPE_CHECKING"} <= set(trainstep.__all__)


def test_importing_the_package_costs_little_beyond_tensorflow_and_keras():
    script = (
        "import tensorflow, keras, pydantic, time; start = time.perf_counter(); import trainstep;"
        "print(time.perf_counter() - start)"
    )
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    seconds = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=240, check=True
        )
        seconds.append(float(done.stdout.strip().splitlines()[-1]))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        print(f"import trainstep: {min(seconds):.2f} s beyond TensorFlow, Keras and pydantic")
    # About 0.2 s on two shared cores; plots, tables or scikit-learn pulled in by mistake cost seconds.
    assert min(seconds) < 1.5


def test_plots_and_tables_are_not_imported_with_the_package():
    script = (
        "import sys, keras, tensorflow; before = set(sys.modules); import trainstep;"
        "print(sorted({'plotly', 'sklearn', 'rich', 'typer', 'jinja2'} & (sys.modules.keys() - before)))"
    )
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=240, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == "[]"
