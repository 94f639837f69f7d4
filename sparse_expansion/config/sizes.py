"""Numbers of bytes as people write them: ``2GiB``, ``500MB``."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


def parse_size(text: str) -> int:
    """``2GiB``, ``512MB``, ``1000000`` -> bytes.

    Raises:
        ValueError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"size {text!r} is not a number of bytes such as 2GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def format_size(num_bytes: int) -> str:
    """Inverse of ``parse_size``: bytes -> the shortest exact text."""
    factor, unit = max((factor, unit) for unit, factor in _UNITS.items() if not num_bytes % factor)
    return f"{num_bytes // factor}{unit.capitalize()}{'B' if unit else ''}" if num_bytes else "0"
