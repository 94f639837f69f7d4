"""The k-th smallest number on a GPU, by histograms of eight bits at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

DIGIT_BITS = 8
"""Bits that one look at the numbers decides."""
BINS = 1 << DIGIT_BITS
TILE = 4096
"""Numbers that a program counts at a time."""
PROGRAMS = 1024
"""Programs for a row at most: each adds its counts to the row's once."""


@triton.jit
def count_digits(  # type: ignore[no-untyped-def]
    numbers, prefix, counts, width, shift, row_stride, BINS: tl.constexpr, TILE: tl.constexpr
):
    """Count the digits at ``shift`` of a row's numbers whose higher digits are the prefix.

    ``numbers`` is ``[K, width]`` int32, none negative; ``counts`` ``[K, BINS]`` int32.
    """
    row = tl.program_id(0)
    numbers += row.to(tl.int64) * row_stride
    wanted = tl.load(prefix + row)
    found = tl.zeros((BINS,), tl.int32)
    step = tl.num_programs(1) * TILE
    for start in range(tl.program_id(1) * TILE, width, step):
        place = start + tl.arange(0, TILE)
        inside = place < width
        number = tl.load(numbers + place, mask=inside, other=0)
        digits = number >> shift
        counted = inside & (digits // BINS == wanted)
        found += tl.histogram(digits % BINS, BINS, mask=counted)
    tl.atomic_add(counts + row * BINS + tl.arange(0, BINS), found)


def kth_smallest(bits_KN: torch.Tensor, count: int) -> torch.Tensor:
    """See ``selection.kth_smallest``; rows of at most 2^31 - ``TILE`` numbers."""
    rows, width = bits_KN.shape
    prefix_K1 = bits_KN.new_zeros(rows, 1)
    left_K1 = torch.full_like(prefix_K1, count)
    grid = (rows, min(triton.cdiv(width, TILE), PROGRAMS))
    for shift in range(32 - DIGIT_BITS, -1, -DIGIT_BITS):
        counts_KB = bits_KN.new_zeros(rows, BINS)
        count_digits[grid](
            bits_KN, prefix_K1, counts_KB, width, shift, bits_KN.stride(0), BINS=BINS, TILE=TILE
        )
        sums_KB = counts_KB.cumsum(dim=1, dtype=torch.int32)
        digit_K1 = (sums_KB < left_K1).sum(dim=1, keepdim=True, dtype=torch.int32)
        before_K1 = (sums_KB - counts_KB).gather(1, digit_K1.long())
        left_K1 = left_K1 - before_K1
        prefix_K1 = prefix_K1 << DIGIT_BITS | digit_K1
    return prefix_K1
