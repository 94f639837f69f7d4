"""What a subcommand is made of."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand."""

    name: str
    """As it is typed."""
    help: str
    """One sentence."""
    examples: str
    """Command lines, one beneath the other, indented by two spaces."""
    add_flags: Callable[[argparse.ArgumentParser], None]
    """Gives the subcommand's parser its flags."""
    run: Callable[[argparse.Namespace], int]
    """Does the work, and returns the exit code."""
    common: tuple[str, ...] = ()
    """Names of the flags that ``--help`` shows; empty where it shows all, and there is no
    ``--help-all``."""
