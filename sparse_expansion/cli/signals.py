"""How the command line ends when the system, or whoever sits before it, asks it to."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

PATIENCE_SECONDS = 3.0
"""Seconds for cleaning up after which a second signal ends the process at once."""
_MESSAGES = {
    signal.SIGINT: "interrupted: finished units are kept, continue with --resume",
    signal.SIGTERM: "terminated: finished units are kept, continue with --resume",
}
_asked: tuple[int, float] | None = None
"""The first signal that came, and when; what it raises may arrive as something else."""


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end.

    Of a class of its own: Python notes a plain ``KeyboardInterrupt`` that leaves code which was
    given to ``exec`` as a string (dataclasses are made so), and a process that was started by
    ``python -m`` then ends itself by SIGINT, though the exception was caught and answered.
    """


def end_cleanly() -> None:
    """Raise ``Stopped``, a ``KeyboardInterrupt``, in the main thread on SIGINT and SIGTERM.

    SIGTERM is what ``ray job stop`` and a cluster that shrinks send first. Whatever becomes of the
    exception on its way out, of an import that it interrupts an ImportError, ``exit_code``
    remembers the signal.
    """
    global _asked
    _asked = None
    catch_signals()


def catch_signals() -> None:
    """Put the handlers in place again, where a library may have put its own."""
    if threading.current_thread() is not threading.main_thread():
        return
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _end):
        # Else it is ignored, as a shell asks of what it starts in the background.
        signal.signal(signal.SIGINT, _end)


def exit_code(error: BaseException) -> int | None:
    """The exit code that a signal asked for, after saying so; None where none came."""
    if _asked is not None:
        number = _asked[0]
    elif isinstance(error, KeyboardInterrupt):
        number = signal.SIGINT
    else:
        return None
    _say(number)
    return 128 + number


def _end(number: int, frame: FrameType | None) -> None:
    global _asked
    now = time.monotonic()
    if _asked is None:
        _asked = number, now
        # Ray's compiled code lets a KeyboardInterrupt through as it is, where it makes a
        # SystemError of any other exception that a signal raises while it waits.
        raise Stopped
    # One signal often comes twice, to the process and to its group: the first is being obeyed.
    if now - _asked[1] > PATIENCE_SECONDS:
        _say(_asked[0])
        os._exit(128 + _asked[0])


def _say(number: int) -> None:
    message = _MESSAGES[signal.Signals(number)]
    print(f"sparse-expansion: error: {message}", file=sys.stderr, flush=True)
