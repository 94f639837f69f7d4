"""Progress on stderr: one line that rewrites itself on a terminal, sparse lines in a log."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

from sparse_expansion.api.listener import Listener
from sparse_expansion.cli.signals import catch_signals
from sparse_expansion.messages import printable

if TYPE_CHECKING:
    from sparse_expansion.execution.base import Progress

LOG_SECONDS = 10.0
"""Seconds between two lines of a log."""
TERMINAL_SECONDS = 0.2
"""Seconds between two states of a terminal's line."""
LEAST_SHARE = 0.02
"""Share of the work that is done before an ETA is given."""


class ProgressLine(Listener):
    """Blocks done, stage, share of the work, time elapsed, and the ETA."""

    def __init__(self, stream: TextIO | None = None, *, verbose: bool = False) -> None:
        self.stream = sys.stderr if stream is None else stream
        self._verbose = verbose
        self.is_terminal = self.stream.isatty()
        self._title = ""
        self._num_blocks = 0
        self._begin = self._last = 0.0
        self._width = 0

    def opens(self) -> None:
        """Keep transformers quiet."""
        silence_transformers(self._verbose)

    def joined(self) -> None:
        """Put our handlers of signals in place again: Ray's dump a stack and die."""
        catch_signals()

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self._clear()
        print(printable(text), file=self.stream, flush=True)

    def start(self, title: str, num_blocks: int) -> None:
        """Begin a phase."""
        self._title, self._num_blocks = title, num_blocks
        self._begin = time.monotonic()
        self._last = self._begin

    def update(self, progress: Progress) -> None:
        """Show that a unit has ended; an observer of executors."""
        now = time.monotonic()
        ended = progress.num_done == progress.num_total
        interval = TERMINAL_SECONDS if self.is_terminal else LOG_SECONDS
        if not ended and now - self._last < interval:
            return
        self._last = now
        text = self._text(progress, now - self._begin)
        if not self.is_terminal:
            print(text, file=self.stream, flush=True)
            return
        self.stream.write("\r" + text.ljust(self._width))
        self.stream.flush()
        self._width = len(text)
        if ended:
            self.close()

    def _text(self, progress: Progress, elapsed: float) -> str:
        share = progress.cost_done / progress.cost_total if progress.cost_total else 1.0
        block = (
            f"block {progress.unit.layer + 1}/{self._num_blocks} · "
            if (progress.unit.layer >= 0 and self._title == "expand")
            else ""
        )
        parts = [
            f"{self._title} · {block}{progress.unit.stage}",
            f"{100 * share:.0f} %",
            f"{_clock(elapsed)} elapsed",
        ]
        if share >= LEAST_SHARE:
            parts.append(f"ETA {_clock(elapsed * (1 - share) / share)}")
        if progress.worker != "local":
            parts.append(progress.worker)
        return printable(" · ".join(parts))

    def close(self) -> None:
        """End the line."""
        if self.is_terminal and self._width:
            self.stream.write("\n")
            self.stream.flush()
            self._width = 0

    def _clear(self) -> None:
        if self.is_terminal and self._width:
            self.stream.write("\r" + " " * self._width + "\r")
            self._width = 0


def silence_transformers(verbose: bool) -> None:
    """Keep transformers' own bars and advice from hiding ours."""
    if not verbose:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
