"""Who hears what a job does."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparse_expansion.execution.base import Executor, Progress


class Listener:
    """Hears what a job does, and does nothing with it: others override what they want."""

    def opens(self) -> None:
        """The settings are in order; what follows loads libraries, downloads and computes."""

    def joined(self) -> None:
        """Ray was joined, which puts its own handlers of signals in place."""

    def say(self, text: str) -> None:
        """Something happened, in a line for people."""

    def doing(self, step: str) -> None:
        """A step that is no unit begins, such as reading the model; it may take long.

        Args:
            step: in words, such as ``reading the model``; empty where none follows.
        """

    def executes(self, executor: Executor) -> None:
        """This is to do the units; it can be asked which of them it does."""

    def start(self, title: str, num_blocks: int) -> None:
        """A phase begins.

        Args:
            title: of the phase.
            num_blocks: of the model.
        """

    def update(self, progress: Progress) -> None:
        """A unit of the phase has ended."""
