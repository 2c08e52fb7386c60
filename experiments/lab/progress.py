"""Progress on a terminal: one bar for whatever is under way, with the time left."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich import progress
from rich.console import Console

T = TypeVar("T")


class Bars:
    """Bars that appear when work starts and go when it is done, so that only the results stay on the screen."""

    def __init__(self, bars: progress.Progress):
        self._bars = bars

    def track(self, values: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Pass the values on; each counts as done when the next one is asked for."""
        if total is None and hasattr(values, "__len__"):
            total = len(values)  # type: ignore[arg-type]
        task = self._bars.add_task(label, total=total)
        try:
            for value in values:
                yield value
                self._bars.advance(task)
        finally:
            self._bars.remove_task(task)


@contextlib.contextmanager
def bars(console: Console) -> Iterator[Bars]:
    """Show bars while the block runs. Where the output is no terminal nothing is drawn."""
    columns = (
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=None),
        progress.MofNCompleteColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(compact=True, elapsed_when_finished=False),
    )
    with progress.Progress(*columns, console=console, transient=True, expand=True, disable=not console.is_terminal) as shown:
        yield Bars(shown)
