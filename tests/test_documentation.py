"""README, CONTRIBUTING and the cards are true: what they show runs, and they miss no strategy."""

import pathlib
import re

import keras
import numpy as np
import pytest

import trainstep

ROOT = pathlib.Path(trainstep.__file__).parent


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


def run(path: pathlib.Path, names: dict) -> None:
    exec(compile(snippets(path), str(path), "exec"), names)


def test_the_readme_runs_from_top_to_bottom(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(ROOT / "README.md", {"__name__": "readme"})
    assert "Did you mean 'gradient_clipping'" in capsys.readouterr().out


@pytest.mark.parametrize("name", trainstep.names())
def test_the_snippet_of_the_card_runs(name):
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(2, "softmax")])
    x, y = np.random.default_rng(0).random((16, 4), dtype="float32"), np.arange(16) % 2
    run(ROOT / "docs" / "strategies" / f"{name}.md", {"trainstep": trainstep, "model": model, "x": x, "y": y})
    assert name in trainstep.applied(model)


@pytest.mark.parametrize("name", trainstep.names())
def test_the_card_names_every_option_and_the_reference(name):
    card = (ROOT / "docs" / "strategies" / f"{name}.md").read_text()
    declaration = trainstep.get(name).declaration
    assert [option for option in declaration.options.model_fields if f"`{option}`" not in card] == []
    link = re.search(r"https\S+", declaration.reference)
    assert (link.group() if link else declaration.reference) in card


def test_the_readme_lists_the_catalogue_as_the_strategies_describe_themselves():
    rows = [line.split("|") for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    listed = {row[1].strip(" `"): row[2].strip() for row in rows}
    assert listed == {name: trainstep.get(name).declaration.summary for name in trainstep.names()}


def test_contributing_names_every_hook():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    hooks = ["transform_batch", "compute_objective", "compute_gradients", "update_weights", "report_metrics"]
    assert [hook for hook in hooks if f"`{hook}`" not in text or not hasattr(trainstep.Strategy, hook)] == []
