"""The stage that finds out what a worker's device can do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from sparse_expansion.work.context import WorkContext
from sparse_expansion.work.registry import Done, stage

MATRIX_SIDE = 2048
"""Rows and columns of the float32 matrices that are multiplied."""
COPIED_FLOATS = 64 << 20
"""Float32 values that are copied."""


@stage()
def ceilings(context: WorkContext) -> Done:
    """Measure float32 products (operations per second) and copies (bytes per second)."""
    A, B = (torch.randn(MATRIX_SIDE, MATRIX_SIDE, device=context.device) for _ in range(2))
    source = torch.ones(COPIED_FLOATS, device=context.device)
    target = torch.empty_like(source)
    product = _median_seconds(context.device, lambda: A @ B)
    copy = _median_seconds(context.device, lambda: target.copy_(source))
    # A copy reads and writes.
    copied = 2 * source.element_size() * COPIED_FLOATS
    return Done(
        stats={
            "matmul_flops_per_second": 2 * MATRIX_SIDE**3 / product,
            "copy_bytes_per_second": copied / copy,
        }
    )


def _median_seconds(device: str, work: Callable[[], object]) -> float:
    """Median seconds of five calls, after one to warm up."""
    found = []
    for _ in range(6):
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])
