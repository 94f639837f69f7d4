"""Work on as many threads as PyTorch has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

MIN_SLICE = 1 << 16
"""Items that a thread gets at least, unless the caller says otherwise: fewer are done sooner than
a thread wakes up."""


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="sparse-expansion")


def split(
    count: int, align: int, work: Callable[[int, int], object], *, least: int = MIN_SLICE
) -> None:
    """Call ``work(first, last)`` for slices of ``range(count)`` on ``torch.get_num_threads()``.

    Args:
        count: items in all.
        align: slices start at multiples of this.
        work: called with the ends of a slice.
        least: a thread gets at least so many items.
    """
    threads = min(torch.get_num_threads(), max(1, count // max(align, least)))
    step = -(-count // (threads * align)) * align if count else align
    slices = [(first, min(first + step, count)) for first in range(0, count, step)]
    if len(slices) <= 1:
        for first, last in slices:
            work(first, last)
        return
    for done in [_pool(threads).submit(work, *part) for part in slices]:
        done.result()
