"""The smallest numbers of every row on a GPU, by histograms of eight bits at a time.

A row is looked at six times: four digits, then the numbers that equal the last one taken, of which
those with the lowest index are, and then the mask is written. No look is a running sum over a row:
PyTorch has one program for each row do that, and there are few rows and millions of numbers.
"""

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


@triton.jit
def choose_digit(prefix, left, counts, BINS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Append to a row's prefix the digit of the number that is wanted, and empty the counts.

    ``prefix`` and ``left`` are ``[K]`` int32: the digits so far, and how many of the numbers that
    begin with them are to be taken.
    """
    row = tl.program_id(0)
    each = tl.arange(0, BINS)
    found = tl.load(counts + row * BINS + each)
    tl.store(counts + row * BINS + each, tl.zeros_like(found))
    until = tl.cumsum(found, 0)
    wanted = tl.load(left + row)
    digit = tl.sum((until < wanted).to(tl.int32), 0)
    before = tl.sum(tl.where(each < digit, found, 0), 0)
    tl.store(left + row, wanted - before)
    tl.store(prefix + row, tl.load(prefix + row) * BINS + digit)


@triton.jit
def count_ties(  # type: ignore[no-untyped-def]
    numbers, threshold, ties, width, row_stride, TILE: tl.constexpr
):
    """How many of a tile of a row's numbers equal its threshold, ``ties [K, tiles]`` (int32)."""
    row = tl.program_id(0)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = place < width
    number = tl.load(numbers + row.to(tl.int64) * row_stride + place, mask=inside, other=-1)
    equal = number == tl.load(threshold + row)
    tl.store(ties + row * tl.num_programs(1) + tl.program_id(1), tl.sum(equal.to(tl.int32), 0))


@triton.jit
def mark_smallest(  # type: ignore[no-untyped-def]
    numbers, threshold, left, ties_until, mask, width, row_stride, TILE: tl.constexpr
):
    """Write a tile of a row's mask: below the threshold, and the first that equal it.

    ``left [K]`` of these are taken; ``ties_until [K, tiles]`` are those in a tile and before it.
    ``mask`` is ``[K, width]`` int8.
    """
    row = tl.program_id(0)
    tile = tl.program_id(1)
    place = tile * TILE + tl.arange(0, TILE)
    inside = place < width
    number = tl.load(numbers + row.to(tl.int64) * row_stride + place, mask=inside, other=0)
    last = tl.load(threshold + row)
    equal = (inside & (number == last)).to(tl.int32)
    before = tl.load(ties_until + row * tl.num_programs(1) + tile) - tl.sum(equal, 0)
    is_taken = before + tl.cumsum(equal, 0) <= tl.load(left + row)
    found = (number < last) | ((equal != 0) & is_taken)
    tl.store(mask + row.to(tl.int64) * width + place, found.to(tl.int8), mask=inside)


def smallest(bits_KN: torch.Tensor, count: int) -> torch.Tensor:
    """See ``selection.smallest``; rows of at most 2^31 - ``TILE`` numbers."""
    rows, width = bits_KN.shape
    stride = bits_KN.stride(0)
    counts_KB = bits_KN.new_zeros(rows, BINS)
    threshold_K = bits_KN.new_zeros(rows)
    left_K = torch.full_like(threshold_K, count)
    tiles = triton.cdiv(width, TILE)
    grid = (rows, min(tiles, PROGRAMS))
    for shift in range(32 - DIGIT_BITS, -1, -DIGIT_BITS):
        count_digits[grid](
            bits_KN, threshold_K, counts_KB, width, shift, stride, BINS=BINS, TILE=TILE
        )
        choose_digit[(rows,)](threshold_K, left_K, counts_KB, BINS=BINS)
    ties_KT = bits_KN.new_empty(rows, tiles)
    count_ties[(rows, tiles)](bits_KN, threshold_K, ties_KT, width, stride, TILE=TILE)
    ties_KT = ties_KT.cumsum(dim=1, dtype=torch.int32)
    mask_KN = torch.empty_like(bits_KN, dtype=torch.bool)
    mark_smallest[(rows, tiles)](
        bits_KN, threshold_K, left_K, ties_KT, mask_KN.view(torch.int8), width, stride, TILE=TILE
    )
    return mask_KN
