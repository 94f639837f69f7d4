"""The bar at the foot of a terminal, which draws itself several times a second."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

BAR_WIDTH = 24
"""Columns of the bar itself."""
BarState = tuple[str, str, str, float | None]
"""What is done, its times, what is measured of it, and the share that is done: None where nobody
knows."""


class TerminalBar:
    """A bar with times, and below it in words what is done; lines that are said go above."""

    def __init__(self, stream: TextIO, state: Callable[[], BarState]) -> None:
        """Show it.

        Args:
            stream: a terminal.
            state: tells what to show; it is asked by a thread.
        """
        self._console = Console(file=stream, force_terminal=True, highlight=False)
        self._rich = _Lines(state, self._console)
        self._rich.start()
        # A process that is killed leaves the terminal as it is: let that be with its cursor.
        self._console.show_cursor(True)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(Text(line), soft_wrap=True)

    def close(self) -> None:
        """Take the bar away."""
        self._rich.stop()


class _Lines(Progress):
    """The bar of one task, and the words."""

    def __init__(self, state: Callable[[], BarState], console: Console) -> None:
        self._state = state
        super().__init__(
            SpinnerColumn(),
            BarColumn(BAR_WIDTH),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
            # What the command prints is its result. On stderr, warnings go above the bar.
            redirect_stdout=False,
        )
        self.add_task("", total=None)

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is drawn, as it is now; every line is cut where the terminal ends."""
        place, timing, measures, share = self._state()
        for task in self.tasks:
            task.description = timing
            task.total, task.completed = (None, 0.0) if share is None else (1.0, share)
        yield self.make_tasks_table(self.tasks)
        for line in (place, measures):
            if line:
                yield Text("  " + line, no_wrap=True, overflow="ellipsis")
