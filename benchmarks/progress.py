"""How far a suite is, where somebody is watching, and nothing otherwise."""

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A bar on the error stream: runs done, running and failed, time left.

    Silent where the stream is no terminal, unless `shown` is True, or where `shown` is False.
    """

    def __init__(self, total: int, done: int = 0, failed: int = 0, shown: bool | None = None) -> None:
        console = Console(stderr=True, force_terminal=shown or None)
        self._running: dict[str, str] = {}
        self._failed = failed
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("runs[red]{task.fields[failed]}[/red]"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal if shown is None else not shown,
        )
        self._task = self._bar.add_task("", total=total, completed=done, failed=self._failures())

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del kind, error, traceback
        self._bar.stop()

    def say(self, text: str) -> None:
        """Show what is being done now."""
        self._bar.update(self._task, description=escape(text))

    def begin(self, key: str, name: str) -> None:
        """Show that the run `key` has begun."""
        self._running[key] = name
        self._show_running()

    def end(self, key: str, *, failed: bool) -> None:
        """Count the run `key`."""
        self._running.pop(key, None)
        self._failed += failed
        self._bar.update(self._task, advance=1, failed=self._failures())
        self._show_running()

    def _show_running(self) -> None:
        names = list(self._running.values())
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        self.say(f"{len(names)} running: {' | '.join(names[:2])}{more}" if names else "")

    def _failures(self) -> str:
        return f", {self._failed} failed" if self._failed else ""
