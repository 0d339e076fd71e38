"""What the tests show of each strategy, collected while they run: `pytest --ledger=FILE`.

With a space instead, pytest takes a file that is there already for a test.

A test marked `shows("saved")` shows that of the strategy it is parametrised with, or of what `of` names; one marked
`shows("pair")` that the strategies of its parameter `pair` go together. What it could
not show it says as the reason of a skip, or by `record_property("instead", reason)` where a clear refusal is what was
tested. The documentation's table is made from these files, see `docs/support.py`.
"""

import json
import pathlib
from typing import Any

import pytest

import trainstep

_KEY = "shows"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ledger", type=pathlib.Path, help="write what the tests show of each strategy to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "shows(what, of): the test shows this of the strategy it is parametrised with, or of what `of` names"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("shows")
        if marker is not None:  # Travels with the report, from a worker of pytest-xdist too.
            item.user_properties.append((_KEY, _what_is_shown(item, marker)))


def _what_is_shown(item: Any, marker: pytest.Mark) -> list[str]:
    """Return of which strategy the test shows something, and what."""
    if marker.args[0] == "pair":
        one, other = item.callspec.params["pair"]
        return [one, f"with {other}"]
    return [marker.kwargs.get("of") or _strategy_of(item), marker.args[0]]


def _strategy_of(item: Any) -> str:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    spec = next((parameters[name] for name in ("name", "spec") if name in parameters), None)
    if spec is None:
        raise pytest.UsageError(f"{item.nodeid} shows something of a strategy and is parametrised with none.")
    names = [spec] if isinstance(spec, str) else list(spec)
    return names[0] if len(names) == 1 and names[0] in trainstep.names() else "all together"


class Ledger:
    """Verdicts by strategy and property: "yes", or the reasons why not."""

    def __init__(self) -> None:
        self._reasons: dict[str, dict[str, set[str]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if _KEY not in properties or (report.when != "call" and report.passed):
            return
        strategy, what = properties[_KEY]
        reasons = self._reasons.setdefault(strategy, {}).setdefault(what, set())
        if report.failed:
            reasons.add("the test fails")
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            reasons.add(reason.removeprefix("Skipped: "))
        elif "instead" in properties:
            reasons.add(properties["instead"])

    def verdicts(self) -> dict[str, dict[str, str]]:
        return {
            strategy: {what: "; ".join(sorted(reasons)) or "yes" for what, reasons in sorted(shown.items())}
            for strategy, shown in sorted(self._reasons.items())
        }


def pytest_sessionstart(session: pytest.Session) -> None:
    path = session.config.getoption("--ledger")
    if path is not None and not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(Ledger(), "ledger-of-strategies")


def pytest_sessionfinish(session: pytest.Session) -> None:
    ledger: Any = session.config.pluginmanager.get_plugin("ledger-of-strategies")
    if ledger is not None:
        path = session.config.getoption("--ledger")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(ledger.verdicts(), indent=2) + "\n")
