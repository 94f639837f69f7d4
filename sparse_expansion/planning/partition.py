"""How work is cut into pieces: ranges of experts, of blocks and of windows."""

from __future__ import annotations

import itertools

from sparse_expansion.run_files import ExpertRange

GATHER_BYTES = 512 << 20
"""Bytes that a unit which gathers hands on at most, unless one range of experts takes more."""
GROUP_BYTES = 8 << 30
"""Bytes that all shards together hand on at a time at most, unless one range takes more."""


def expert_ranges(num_clusters: int, experts_per_unit: int) -> list[ExpertRange]:
    """First and last expert of every unit that makes experts."""
    return [
        (first, min(first + experts_per_unit, num_clusters) - 1)
        for first in range(0, num_clusters, experts_per_unit)
    ]


def range_size(experts: ExpertRange) -> int:
    """Number of experts of a range, both ends included."""
    return experts[1] - experts[0] + 1


def gathered_ranges(
    ranges: list[ExpertRange], expert_bytes: int, num_shards: int
) -> list[list[ExpertRange]]:
    """Ranges of experts that one unit gathers for: as many as keep what it hands on bounded.

    Args:
        ranges: all ranges of a linear group; none is larger than the first.
        expert_bytes: bytes that one shard hands on for one expert.
        num_shards: shards of the calibration windows.
    """
    range_bytes = max(1, range_size(ranges[0]) * expert_bytes)
    count = max(1, min(GATHER_BYTES // range_bytes, GROUP_BYTES // (range_bytes * num_shards)))
    return [ranges[first : first + count] for first in range(0, len(ranges), count)]


def even_parts(count: int, num_parts: int) -> list[tuple[int, int]]:
    """Start and end (exclusive) of so many nearly equal parts of ``range(count)``.

    There are ``count`` parts at most, so that none is empty, but one at least.
    """
    num_parts = max(1, min(num_parts, count))
    bounds = [count * part // num_parts for part in range(num_parts + 1)]
    return list(itertools.pairwise(bounds))
