"""The registry: what is registered is found by name, and a broken plugin takes nobody with it."""

import importlib.metadata
import os
import subprocess
import sys
import textwrap

import pytest
from catalogue import NAMES, registered
from nets import dense

import trainstep
from trainstep import errors, registry


def throw_away(name: str) -> type[trainstep.Strategy]:
    declaration = trainstep.Declaration(name, trainstep.Stage.REPORT, "Changes nothing.", "none", neutral={})
    return type("ThrowAway", (trainstep.Strategy,), {"declaration": declaration})


def test_names_are_sorted_and_lead_to_their_classes():
    assert trainstep.names() == sorted(trainstep.names())
    for name in NAMES:
        assert trainstep.get(name).declaration.name == name


def test_every_built_in_strategy_is_exported_under_the_name_of_its_class():
    for name in NAMES:
        strategy = trainstep.get(name)
        assert getattr(trainstep.strategies, strategy.__name__) is strategy


def test_register_is_a_decorator_and_may_be_repeated():
    strategy = throw_away("thrown")
    with registered():
        assert trainstep.register(strategy) is strategy
        assert trainstep.register(strategy) is strategy
        assert trainstep.get("thrown") is strategy
        assert "thrown" in trainstep.names()
    assert trainstep.names() == NAMES


def test_a_registered_strategy_is_never_replaced_by_another():
    first, second = throw_away("thrown"), throw_away("thrown")
    second.__qualname__ = "Another"
    with registered(first):
        with pytest.raises(errors.DuplicateStrategyError):
            trainstep.register(second)
        assert trainstep.get("thrown") is first


def test_a_strategy_may_be_defined_anew_as_a_notebook_does_and_is_then_used():
    first, second = throw_away("thrown"), throw_away("thrown")
    with registered(first):
        assert first in type(trainstep.apply(dense(), "thrown")).__mro__
        trainstep.register(second)
        assert second in type(trainstep.apply(dense(), "thrown")).__mro__


def test_names_returns_a_list_of_ones_own():
    trainstep.names().clear()
    assert trainstep.names() == NAMES


class FakeEntryPoint:
    def __init__(self, name, loaded):
        self.name, self.value, self.loaded = name, f"some_package:{name}", loaded

    def load(self):
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


@pytest.fixture
def plugins(monkeypatch):
    """Return a function that lets given entry points be found by the next look-up."""

    def install(*entry_points):
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entry_points)
        monkeypatch.setattr(registry, "_plugins_loaded", False)
        monkeypatch.setattr(registry, "_failures", {})

    with registered():
        yield install


def test_a_plugin_is_loaded_at_the_first_look_up(plugins):
    strategy = throw_away("from_plugin")
    plugins(FakeEntryPoint("from_plugin", strategy))
    assert trainstep.get("from_plugin") is strategy
    assert trainstep.plan(["from_plugin", "standard"]).strategies.keys() == {"from_plugin", "standard"}


def test_a_broken_plugin_is_reported_by_name_and_breaks_no_other(plugins):
    good = throw_away("good")
    plugins(FakeEntryPoint("bad", ImportError("no module named x")), FakeEntryPoint("good", good))
    with pytest.warns(
        UserWarning, match=r"plugin 'bad' \(some_package:bad\).*ImportError: no module named x.*All other"
    ):
        assert trainstep.get("good") is good
    with pytest.raises(
        errors.UnknownStrategyError, match="The plugin 'bad' could not be loaded: ImportError: no module named x"
    ):
        trainstep.get("bad")


def test_a_plugin_that_shadows_a_built_in_strategy_is_reported_and_does_not_win(plugins):
    plugins(FakeEntryPoint("standard", throw_away("standard")))
    with pytest.warns(
        UserWarning, match="'standard' .*DuplicateStrategyError.*is taken by trainstep.strategies.standard"
    ):
        assert trainstep.get("standard") is trainstep.strategies.Standard


def test_a_plugin_that_is_no_strategy_is_reported(plugins):
    plugins(FakeEntryPoint("wrong", 3))
    with pytest.warns(UserWarning, match="'wrong' .*StrategyDefinitionError"):
        assert trainstep.names() == NAMES


def test_plugins_are_looked_for_once(plugins):
    plugins()
    trainstep.names()
    registry.importlib.metadata.entry_points = None  # Undone by the fixture; a second look-up would call it.
    assert trainstep.names() == NAMES


def test_an_installed_distribution_with_an_entry_point_is_found(tmp_path):
    """The real thing: a distribution on the path, another process, one good and one broken entry point."""
    folder = tmp_path / "plugin-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(
        "[trainstep.strategies]\nshrink = plugin_module:Shrink\nbroken = plugin_module:Missing\n"
    )
    (tmp_path / "plugin_module.py").write_text(
        textwrap.dedent(
            '''
            """Halve every gradient."""
            import trainstep

            class Shrink(trainstep.Strategy):
                declaration = trainstep.Declaration(
                    "shrink", trainstep.Stage.CLIPPING, "Halve every gradient.", "none", why_not_neutral="Always."
                )

                def update_weights(self, update):
                    super().update_weights(update._replace(gradients=[g / 2 for g in update.gradients]))
            '''
        )
    )
    script = textwrap.dedent(
        """
        import warnings
        import numpy as np, keras
        import trainstep
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            print(trainstep.names())
        print([str(w.message) for w in caught if "trainstep" in str(w.message)])
        net = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")])
        trainstep.apply(net, ["shrink", "standard"])
        net.compile(keras.optimizers.SGD(0.125), "mse")
        net.train_on_batch(np.array([[2.0]]), np.array([[1.0]]))
        print(net.get_weights()[0].item())
        print(trainstep.describe("shrink").text)
        """
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    names, warned, weight, text = done.stdout.strip().split("\n")[-4:]
    assert names == str(sorted([*NAMES, "shrink"]))
    assert "'broken' (plugin_module:Missing)" in warned
    assert "AttributeError" in warned
    # g = 2 (w x - y) x = 4, halved: w = 1 - 0.125 * 2.
    assert float(weight) == 0.75
    assert text == "Halve every gradient."
