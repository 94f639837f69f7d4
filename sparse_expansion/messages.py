"""Errors of libraries, as one line of ours."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What an error says first; the name of its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
