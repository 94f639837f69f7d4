"""What somebody who mistyped a name meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LIKENESS = 0.6
"""The least likeness of two names, 0 to 1, at which one is offered for the other."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known name as the end of a sentence; empty where none is near.

    Args:
        name: as it was given.
        known: the names that there are.
    """
    by_spelling = {_plain(other): other for other in known}
    found = difflib.get_close_matches(_plain(name), by_spelling, n=1, cutoff=_LIKENESS)
    return f" (did you mean {by_spelling[found[0]]}?)" if found else ""


def _plain(name: str) -> str:
    """A name as far as its spelling matters: hyphens and underscores are the same, as is case."""
    return name.lower().replace("_", "-").lstrip("-")
