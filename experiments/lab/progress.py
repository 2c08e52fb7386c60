"""Where a run stands: bars with the time left on a terminal, a line every ten seconds where there is none."""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich import progress
from rich.console import Console
from rich.text import Text

T = TypeVar("T")
EVERY = 10.0  # seconds between two lines


class Bars:
    """Bars that appear when work starts and go when it is done, so that only the results stay on the screen."""

    def __init__(self, console: Console, bars: progress.Progress):
        self._console, self._bars = console, bars

    def track(self, values: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Pass the values on; each counts as done when the next one is asked for."""
        task = self._bars.add_task(label, total=_length(values, total))
        try:
            for value in values:
                yield value
                self._bars.advance(task)
        finally:
            self._bars.remove_task(task)

    def say(self, line: str) -> None:
        """Print a line that stays, above the bars."""
        self._console.print(Text(line), soft_wrap=True)


class Lines:
    """A line every ten seconds that says what is under way, for logs and pipes."""

    def __init__(self, console: Console):
        self._console, self._start = console, time.monotonic()
        self._tasks: list[list] = []  # of what is under way, outermost first: label, done, total

    def track(self, values: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Pass the values on and count them."""
        task = [label, 0, _length(values, total)]
        self._tasks.append(task)
        try:
            for value in values:
                yield value
                task[1] += 1
        finally:
            self._tasks.remove(task)

    def say(self, line: str) -> None:
        """Print a line."""
        self._console.print(Text(line), soft_wrap=True)

    def state(self) -> str:
        """What is under way, and since when."""
        parts = [f"{label} {done}/{'?' if total is None else total}" for label, done, total in list(self._tasks)]
        return f"{time.monotonic() - self._start:.0f} s: {', '.join(parts) or 'working'}"


@contextlib.contextmanager
def shown(console: Console, *, every: float = EVERY) -> Iterator[Bars | Lines]:
    """Show progress while the block runs.

    Args:
      console: a terminal gets bars; anything else gets lines.
      every: seconds between two lines.
    """
    if not console.is_terminal:
        lines, done = Lines(console), threading.Event()

        def report() -> None:
            while not done.wait(every):
                lines.say(lines.state())

        thread = threading.Thread(target=report, daemon=True)
        thread.start()
        try:
            yield lines
        finally:
            done.set()
            thread.join()
        return
    columns = (
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=None),
        progress.MofNCompleteColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(compact=True, elapsed_when_finished=False),
    )
    with progress.Progress(*columns, console=console, transient=True, expand=True) as bars:
        yield Bars(console, bars)


def _length(values: Iterable[T], total: int | None) -> int | None:
    return len(values) if total is None and hasattr(values, "__len__") else total  # type: ignore[arg-type]
