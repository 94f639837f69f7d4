"""How often units of a graph were tried in vain, and which are given up."""

from __future__ import annotations

from sparse_expansion.types import CompressionError


class Attempts:
    """Failed tries by unit, and the messages of the units that are given up."""

    def __init__(self) -> None:
        """No unit has failed yet."""
        self.counts: dict[str, int] = {}
        self.given_up: dict[str, str] = {}
        """Message by key of the unit."""
        self._error: Exception | None = None

    def failed(self, key: str, message: str, *, limit: int, error: Exception | None = None) -> bool:
        """Count a failed try; returns whether the unit is given up with it.

        Args:
            key: of the unit.
            message: that tells the user why, should it be the last try.
            limit: number of tries.
            error: that the unit itself raised.
        """
        self.counts[key] = self.counts.get(key, 0) + 1
        if self.counts[key] < limit:
            return False
        self.given_up[key] = message
        self._error = self._error or error
        return True

    def raise_first(self) -> None:
        """Raise what ended the first unit that was given up, if any was.

        Raises:
            OSError: a unit failed for that reason, a full disk say.
            CompressionError: units failed for another.
        """
        if isinstance(self._error, OSError):
            raise self._error
        if self.given_up:
            first, *others = self.given_up.values()
            raise CompressionError(f"{first}{f' (and {len(others)} more units)' if others else ''}")
