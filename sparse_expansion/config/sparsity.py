"""Which share of a weight is set to zero, and in what shape."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sparse_expansion.config.checks import require


@dataclass(frozen=True, kw_only=True)
class SparsityPattern:
    """Which share of a weight is set to zero, and in what shape.

    Either ``fraction`` of every sweep block (unstructured), or ``pruned`` of every
    ``group`` consecutive input columns of each row (N:M). N counts the weights that are
    *removed*, as in SparseGPT's ``prunen``/``prunem``: 1:4 leaves three of four.
    """

    fraction: float
    """Share of zeros, 0 to 1."""
    pruned: int | None = None
    """N of N:M, None when unstructured."""
    group: int | None = None
    """M of N:M, None when unstructured."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.group is None or self.pruned is None:
            require(
                math.isfinite(self.fraction) and 0.0 <= self.fraction <= 1.0,
                f"sparsity {self.fraction} is outside 0 to 1: give the share of zeros, e.g. 0.5, "
                "or N:M, e.g. 2:4",
            )
        else:
            require(
                self.group >= 1 and 0 <= self.pruned <= self.group,
                f"sparsity {self.pruned}:{self.group} needs 0 <= N <= M and M >= 1: "
                "N of every M weights are removed, e.g. 2:4",
            )

    @classmethod
    def parse(cls, text: str) -> SparsityPattern:
        """Read ``0.5``, ``2:4`` or ``(2, 4)``.

        Raises:
            ValueError: the text is none of these, or out of bounds.
        """
        match = re.fullmatch(r"\s*\(?\s*(\d+)\s*[:,]\s*(\d+)\s*\)?\s*", text)
        if match:
            pruned, group = int(match[1]), int(match[2])
            require(group >= 1, f"sparsity {text!r}: M must be at least 1, e.g. 2:4")
            return cls(fraction=pruned / group, pruned=pruned, group=group)
        try:
            fraction = float(text)
        except ValueError:
            raise ValueError(
                f"sparsity {text!r} is neither a share of zeros (0.5) nor N:M (2:4 or '(2, 4)')"
            ) from None
        return cls(fraction=fraction)

    def num_pruned(self, numel: int) -> int:
        """Exact number of zeros in an unstructured block of ``numel`` weights."""
        return math.floor(self.fraction * numel + 0.5)

    def num_kept(self, rows: int, columns: int, block_size: int) -> int:
        """Exact number of weights left in a ``rows`` x ``columns`` matrix."""
        if self.group is not None and self.pruned is not None:
            full, rest = divmod(columns, self.group)
            # A last, shorter group loses its proportional share, rounded down.
            return rows * (columns - full * self.pruned - rest * self.pruned // self.group)
        kept = 0
        for start in range(0, columns, block_size):
            numel = rows * min(block_size, columns - start)
            kept += numel - self.num_pruned(numel)
        return kept

    def __str__(self) -> str:
        if self.group is not None:
            return f"{self.pruned}:{self.group}"
        return f"{self.fraction:g}"
