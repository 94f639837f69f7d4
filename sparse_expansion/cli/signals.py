"""How the command line ends when the system asks it to."""

from __future__ import annotations

import signal
import threading
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is what ``ray job stop`` and a cluster that shrinks send first.

    Ray's compiled code lets a KeyboardInterrupt through as it is, where it makes a SystemError of
    any other exception that a signal raises while it waits.
    """


def end_cleanly_on_sigterm() -> None:
    """Raise ``Terminated`` in the main thread on SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        return

    def terminate(signum: int, frame: object) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
