"""A progress bar where somebody is watching, and nothing otherwise."""

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A bar on the error stream, counting epochs; silent where that is no terminal, or where `shown` is False."""

    def __init__(self, total: int, shown: bool | None = None) -> None:
        console = Console(stderr=True)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("epochs"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (console.is_terminal if shown is None else shown),
        )
        self._task = self._bar.add_task("", total=total)

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

    def advance(self, epochs: int = 1) -> None:
        """Count epochs done."""
        self._bar.advance(self._task, epochs)
