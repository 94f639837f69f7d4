"""Units that measure what each block loses when it alone is pruned, and the windows they take."""

from __future__ import annotations

import math

from sparse_expansion.config import RunConfig
from sparse_expansion.planning.evaluation import block_gap_units
from sparse_expansion.planning.shapes import ModelShape
from sparse_expansion.units import Unit

PRUNED_TOKENS = 8192
"""Tokens of a run's calibration windows on which blocks are pruned to measure their gaps."""
SCORED_TOKENS = 4096
"""Tokens of further calibration windows that are scored to measure blocks' gaps."""


def window_counts(count: int, seqlen: int) -> tuple[int, int]:
    """How many of so many windows to prune on, and how many others to score, maybe none.

    Args:
        count: calibration windows of the run.
        seqlen: tokens of a window.
    """
    pruned = min(math.ceil(PRUNED_TOKENS / seqlen), max(1, 2 * count // 3))
    return pruned, min(math.ceil(SCORED_TOKENS / seqlen), count - pruned)


def gap_units_of(config: RunConfig, shape: ModelShape, num_workers: int) -> list[Unit]:
    """The units that a run would measure its blocks' gaps with, for a plan: windows are empty."""
    pruned, scored = window_counts(config.calibration.dataset_size, config.calibration.seqlen)
    windows: list[list[int]] = [[]]
    return block_gap_units(
        config, shape, windows * pruned, windows * max(1, scored), num_ranges=num_workers
    )
