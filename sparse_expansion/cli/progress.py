"""Progress on stderr: a bar on a terminal, plain lines in a log, and never silence for long."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING, TextIO

from sparse_expansion.api.listener import Listener
from sparse_expansion.cli.phase import Phase
from sparse_expansion.cli.signals import catch_signals
from sparse_expansion.messages import printable

if TYPE_CHECKING:
    from sparse_expansion.cli.terminal import BarState, TerminalBar
    from sparse_expansion.execution.base import Executor, Progress, Working

LOG_SECONDS = 4.0
"""Seconds between two lines of a log: the reader waits for five at most, and a thread may be late.
"""
TERMINAL_SECONDS = 0.5
"""Seconds after which a terminal gets its bar, where nothing was told before: most commands that
only read are done by then."""
_DUMB = ("dumb", "unknown")
"""Terminals that cannot rewrite a line: they get a log."""


class ProgressLine(Listener):
    """What a command does, from its beginning until its result is printed.

    A thread says what is being done where nothing else was said for a while: units may take
    minutes, and so do steps that are no units, such as reading a model. It ends with ``close``, and
    dies with the process where nobody closes.
    """

    def __init__(self, stream: TextIO | None = None, *, verbose: bool = False) -> None:
        self.stream = sys.stderr if stream is None else stream
        self._verbose = verbose
        self.is_terminal = self.stream.isatty() and os.environ.get("TERM", "") not in _DUMB
        self._phase = Phase("", 0, time.monotonic())
        self._phase.step = "starting"
        self._executor: Executor | None = None
        self._bar: TerminalBar | None = None
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._fill_silence, name="progress", daemon=True)
        self._thread.start()

    def opens(self) -> None:
        """Keep transformers quiet."""
        silence_transformers(self._verbose)

    def joined(self) -> None:
        """Put our handlers of signals in place again: Ray's dump a stack and die."""
        catch_signals()

    def executes(self, executor: Executor) -> None:
        """Remember whom to ask what is being done."""
        self._executor = executor

    def say(self, text: str) -> None:
        """Print a line of its own."""
        with self._lock:
            self._print(printable(text))

    def doing(self, step: str) -> None:
        """Remember what is done besides units; it is shown where it takes long."""
        with self._lock:
            if not self._phase.title:
                self._phase = Phase("", 0, time.monotonic())
            self._phase.step = step

    def start(self, title: str, num_blocks: int) -> None:
        """Begin a phase."""
        with self._lock:
            self._phase = Phase(title, num_blocks, time.monotonic())
            self._show_bar()

    def update(self, progress: Progress) -> None:
        """Account for a unit that has ended; an observer of executors."""
        with self._lock:
            self._phase.add(progress, time.monotonic())
            if self._phase.is_done:
                self._print(self._words())

    def close(self) -> None:
        """Say nothing more."""
        with self._lock:
            self._ended.set()
            bar, self._bar = self._bar, None
            if bar is not None:
                bar.close()
        # A thread that is still running when the interpreter goes is killed in the middle of
        # whatever it does, which may abort the process after its work is done.
        self._thread.join()

    def _words(self) -> str:
        return self._phase.words(time.monotonic(), self._working())

    def _working(self) -> list[Working]:
        if self._executor is None or self._phase.is_done:
            return []
        return self._executor.working()

    def _print(self, line: str) -> None:
        if self._ended.is_set():
            # What is told after the end, as by a library's thread, is a message all the same.
            print(line, file=self.stream, flush=True)
            return
        self._last = time.monotonic()
        bar = self._show_bar()
        if bar is not None:
            bar.say(line)
        else:
            print(line, file=self.stream, flush=True)

    def _show_bar(self) -> TerminalBar | None:
        """The bar, which is there from now on; None where there is no terminal."""
        if self.is_terminal and self._bar is None and not self._ended.is_set():
            from sparse_expansion.cli.terminal import TerminalBar

            self._bar = TerminalBar(self.stream, self._state)
        return self._bar

    def _state(self) -> BarState:
        """What the bar shows."""
        now, phase, working = time.monotonic(), self._phase, self._working()
        return (
            phase.place(working),
            phase.timing(now, working),
            phase.measures(now, working),
            phase.share(working),
        )

    def _fill_silence(self) -> None:
        """Have a log's lines written, or the bar shown: after that it draws itself."""
        interval = TERMINAL_SECONDS if self.is_terminal else LOG_SECONDS
        wait = interval
        while not self._ended.wait(wait):
            with self._lock:
                wait = self._last + interval - time.monotonic()
                if wait > 0 or self._ended.is_set():
                    continue
                if self.is_terminal:
                    self._show_bar()
                    return
                try:
                    self._print(self._words())
                except (OSError, ValueError):
                    # Nobody reads any more, or the stream is closed.
                    return
                wait = interval


def silence_transformers(verbose: bool) -> None:
    """Keep transformers' own bars and advice from hiding ours."""
    if not verbose:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
