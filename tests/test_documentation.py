"""README, CONTRIBUTING and the cards are true: what they show runs, and they miss no strategy."""

import os
import pathlib
import re
import runpy
import subprocess
import sys

import catalogue
import keras
import numpy as np
import pytest
from typer.testing import CliRunner

import trainstep
import trainstep_cli
from trainstep import definition
from trainstep.benchmarks import request
from trainstep.benchmarks.experiment import Experiment
from trainstep.benchmarks.store import Store

ROOT = pathlib.Path(trainstep.__file__).parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]


def snippets(path: pathlib.Path) -> str:
    """Return all Python blocks of a Markdown file, one after the other, on their own lines."""
    text, lines, inside = path.read_text(), [], False
    for line in text.splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            lines.append("")
        else:
            lines.append(line if inside else "")
    return "\n".join(lines)


def run(path: pathlib.Path, names: dict, changes: dict[str, str] | None = None) -> None:
    """Run the Python blocks of a file, with some texts of it replaced."""
    code = snippets(path)
    for old, new in (changes or {}).items():
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, str(path), "exec"), names)


def test_the_readme_runs_from_top_to_bottom(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(ROOT / "README.md", {"__name__": "readme"})
    assert "Did you mean 'gradient_clipping'" in capsys.readouterr().out


def test_the_page_on_comparing_runs(capsys):
    run(ROOT / "docs" / "comparing.md", {"__name__": "comparing"})
    assert "clipped clipnorm=0.01" in " ".join(capsys.readouterr().out.split())


def test_the_page_on_robustness_runs_and_shows_what_is_printed(capsys):
    page = ROOT / "docs" / "robustness.md"
    run(page, {"__name__": "robustness"})
    labels = ("accuracy", "robust accuracy", "under FGSM", "under uniform noise", "robust by epsilon", "zero input")
    printed, shown = (
        [line.strip().split("  ")[0] for line in text.splitlines() if line.strip().startswith(labels)]
        for text in (capsys.readouterr().out, page.read_text())
    )
    assert printed == shown
    assert len(printed) == len(labels)


def experiments() -> dict[str, str]:
    """Return what the documentation shows as experiment files, and the one it holds, by where it is."""
    found = {"docs/experiment.yaml": (ROOT / "docs" / "experiment.yaml").read_text()}
    for path in DOCUMENTS:
        for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", path.read_text(), flags=re.DOTALL), start=1):
            found[f"{path.relative_to(ROOT).as_posix()}, block {number}"] = block
    return found


@pytest.mark.parametrize("place", experiments())
def test_each_experiment_that_is_shown_is_one(place, tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(experiments()[place])
    suite = request.suite_of(**request.merged(path, {})[0])
    assert suite.tasks
    assert len(suite.compositions) > 2


def test_the_experiment_of_the_documentation_runs(tmp_path):
    """On the smallest net of its inputs, for two steps."""
    path = str(ROOT / "docs" / "experiment.yaml")
    arguments = ["compare", path, "-w", "digits_mlp", "--seeds", "1", "--updates", "2", "--workers", "1", "--no-cost"]
    result = CliRunner().invoke(trainstep_cli.app, [*arguments, "--attack", "none", "-o", str(tmp_path)])
    assert result.exit_code == 0, result.output
    with Store(tmp_path / "results.sqlite") as store:
        assert [(run.label, run.failure) for run in store.runs()] == [
            (label, None) for label in Experiment.read(path).specs()
        ]


def shown_on(needs) -> dict:
    """Return the names a snippet may use: a model and data of two classes, and of what a strategy needs besides."""
    images, several = "images" in needs, "outputs" in needs
    inputs = keras.Input((8, 8, 1) if images else (4,))
    h = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(3, 2)(inputs)) if images else inputs
    kind = keras.layers.Dense(2, "softmax", name="kind")(h)
    size = keras.layers.Dense(1, name="size")(h)
    x = np.random.default_rng(0).random((16, *inputs.shape[1:]), dtype="float32")
    y = np.arange(16) % 2
    return {
        "keras": keras,
        "trainstep": trainstep,
        "model": keras.Model(inputs, {"kind": kind, "size": size} if several else kind),
        "x": x,
        "y": {"kind": y, "size": x.mean(axis=1, keepdims=True)} if several else y,
    }


@pytest.mark.parametrize("name", trainstep.names())
def test_the_snippet_of_the_card_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = shown_on(trainstep.get(name).declaration.needs)
    run(ROOT / "docs" / "strategies" / f"{name}.md", names)
    assert name in trainstep.applied(names["model"])


@pytest.mark.parametrize("name", trainstep.names())
def test_the_card_names_every_option_and_the_reference(name):
    card = (ROOT / "docs" / "strategies" / f"{name}.md").read_text()
    declaration = trainstep.get(name).declaration
    assert [option for option in declaration.options.model_fields if f"`{option}`" not in card] == []
    link = re.search(r"https\S+", declaration.reference)
    assert (link.group() if link else declaration.reference) in card


def refused_with(name: str) -> set[str]:
    """Return the strategies that `name` is refused with: as they are by default, or by an option of one of them."""
    found = {partner for partner in catalogue.NAMES if catalogue.conflict(name, partner)}
    for one, options in catalogue.VARIANTS:
        declared = catalogue.declaration(one)
        conflicts = declared.conflicts_with(declared.options(**options))
        if one == name:
            found |= set(conflicts)
        elif name in conflicts:
            found.add(one)
    return found


@pytest.mark.parametrize("name", trainstep.names())
def test_the_card_names_every_strategy_that_it_is_refused_with(name):
    card = (ROOT / "docs" / "strategies" / f"{name}.md").read_text()
    paragraph = card.split("**Combines with**")[1].split("\n\n")[0]
    assert [partner for partner in sorted(refused_with(name)) if f"`{partner}`" not in paragraph] == []


def test_the_card_of_diagnostics_names_every_number_and_who_reports_it():
    card = (ROOT / "docs" / "strategies" / "diagnostics.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith("|")]
    for name, options in [*catalogue.VARIANTS, ("dp_sgd", {"num_examples": 1000})]:
        declared = catalogue.declaration(name)
        for report in declared.reports(declared.options(**options)):
            assert any(f"`{report}`" in row and f"`{name}`" in row for row in rows), (report, name)


def test_the_readme_lists_the_catalogue_as_the_strategies_describe_themselves():
    writer = runpy.run_path(str(ROOT / "docs" / "catalogue.py"))
    text = (ROOT / "README.md").read_text()
    assert writer["with_table"](text) == text  # Else: `make docs`.


def test_the_table_of_the_readme_follows_the_catalogue():
    writer = runpy.run_path(str(ROOT / "docs" / "catalogue.py"))
    text = f"before\n{writer['BEGIN']}| of an earlier day |\n\nafter\n"
    assert writer["with_table"](text) == f"before\n{writer['BEGIN']}{writer['table']()}\nafter\n"


def test_the_page_of_what_is_shown_has_every_strategy_and_is_as_the_tests_noted():
    writer = runpy.run_path(str(ROOT / "docs" / "support.py"))
    noted = writer["noted"]()  # Not complete, or not the page: `make support`.
    for verdicts in noted.values():
        assert {*verdicts} >= {*trainstep.names(), "all together"}
        missing = [(name, what) for name in verdicts for what in writer["PROPERTIES"] if what not in verdicts[name]]
        assert missing == []
    assert (ROOT / "docs" / "support.md").read_text() == writer["page"](noted)


def test_the_page_of_combinations_is_as_the_tests_noted():
    writer = runpy.run_path(str(ROOT / "docs" / "support.py"))
    text = writer["matrix"](writer["noted"]())
    assert (ROOT / "docs" / "combinations.md").read_text() == text
    assert "not tested" not in text


def test_the_page_of_findings_and_the_cards_say_what_the_newest_results_do():
    writer = runpy.run_path(str(ROOT / "docs" / "findings.py"))
    results = writer["kept"]()
    assert (ROOT / "docs" / "findings.md").read_text() == writer["page"](results)  # Else: `make docs`.
    for name in trainstep.names():
        card = (ROOT / "docs" / "strategies" / f"{name}.md").read_text()
        assert writer["card_with"](card, name, results) == card


def test_the_page_of_what_is_shown_says_why_where_something_is_not():
    page = runpy.run_path(str(ROOT / "docs" / "support.py"))["page"]
    text = page({"Keras 3": {"some": {"XLA": "refused"}}, "Keras 2": {"some": {"XLA": "yes"}}})
    assert "Keras 3: no (2), Keras 2: yes" in text
    assert "2. refused" in text
    assert "1. not tested" in text


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_within_the_repository_lead_somewhere(path):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


PLAIN_KERAS = """
import sys, keras, numpy
model = keras.models.load_model(sys.argv[1])
assert "trainstep" not in sys.modules
x, y = numpy.load("x.npy"), numpy.load("y.npy")
numpy.testing.assert_allclose(model.predict(x, verbose=0), y, rtol=1e-6)
model.fit(x, y, verbose=0)
"""


def test_what_the_readme_saves_without_strategies_needs_no_trainstep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    run(ROOT / "README.md", names, {"seeds=5": "seeds=1, workers=1, cost=False"})  # The comparison is not meant here.
    np.save("x.npy", names["x"])
    np.save("y.npy", names["model"].predict(names["x"], verbose=0))
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_KERAS, "plain.keras"],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


TWO_DEVICES = """
import tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
"""


def test_the_recipe_for_many_devices_runs_on_two():
    page = snippets(ROOT / "docs" / "running.md")
    recipe, _ = page.split("import json\n")  # The second is that of test_many_machines.py.
    script = f"{TWO_DEVICES}\n{recipe}\nprint(distribution.num_replicas_in_sync, model.optimizer.iterations.numpy())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "AutoGraph could not transform" not in done.stderr
    assert done.stdout.split()[-2:] == ["2", "4"]  # Two epochs of eight batches, in windows of four.


def test_contributing_names_every_hook():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    hooks = definition.HOOKS
    assert [hook for hook in hooks if f"`{hook}`" not in text or not hasattr(trainstep.Strategy, hook)] == []
