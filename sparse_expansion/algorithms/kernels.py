"""Loops over packed streams on a CPU, compiled: the only home of Numba.

Each kernel works on a slice of its arrays and releases the interpreter lock; ``split`` runs
slices on as many threads as PyTorch has, so that a worker of one thread stays on one core.
Values are moved as unsigned integers of their size, which is the same for every dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[Any]]
MIN_SLICE = 1 << 16
_jit: Any = numba.njit(nogil=True, cache=True)


def split(count: int, align: int, work: Callable[[int, int], object]) -> None:
    """Call ``work(first, last)`` for slices of ``range(count)`` on ``torch.get_num_threads()``."""
    threads = min(torch.get_num_threads(), max(1, count // max(align, MIN_SLICE)))
    step = -(-count // (threads * align)) * align if count else align
    slices = [(first, min(first + step, count)) for first in range(0, count, step)]
    if len(slices) <= 1:
        for first, last in slices:
            work(first, last)
        return
    with ThreadPoolExecutor(len(slices)) as pool:
        for done in [pool.submit(work, *part) for part in slices]:
            done.result()


@_jit
def count_true(mask: Array) -> int:
    """Ones of a flat uint8 mask."""
    total = 0
    for i in range(mask.size):
        total += mask[i]
    return total


@_jit
def compact(values: Array, mask: Array, out: Array) -> None:
    """Values where the mask is 1, in order; ``out`` has exactly that many."""
    last = out.size - 1
    position = 0
    for i in range(values.size):
        if position > last:
            break
        # Written always, kept only where the mask says so: no branch to mispredict.
        out[position] = values[i]
        position += mask[i]


@_jit
def scatter(values: Array, mask: Array, out: Array) -> None:
    """``values`` in order to where the mask is 1, zero elsewhere; ``values`` is not empty."""
    last = values.size - 1
    position = 0
    zero = values[0] & 0
    for i in range(mask.size):
        value = values[min(position, last)]
        out[i] = value if mask[i] else zero
        position += mask[i]


@_jit
def dequantize(
    codes: Array, mask: Array, scale: Array, zero_point: Array, group_size: int, out: Array
) -> None:
    """``scale * (code - zero_point)`` in float32 where the mask is 1, zero elsewhere.

    ``mask`` and ``out`` are ``[rows, columns]``; ``codes`` are the kept ones, in order.
    """
    last = codes.size - 1
    position = 0
    for row in range(out.shape[0]):
        for first in range(0, out.shape[1], group_size):
            group = first // group_size
            s = scale[row, group]
            z = zero_point[row, group]
            for column in range(first, min(first + group_size, out.shape[1])):
                keep = mask[row, column]
                value = s * (np.float32(codes[min(position, last)]) - z)
                out[row, column] = value if keep else np.float32(0)
                position += keep


@_jit
def encode_patterns(
    mask: Array, group: int, index_of: Array, index_of_rest: Array, fields: Array
) -> int:
    """Index of every group's pattern of ones; returns how many groups have no index (65535)."""
    bad = 0
    columns = mask.shape[1]
    for row in range(mask.shape[0]):
        for number in range(fields.shape[1]):
            first = number * group
            size = min(group, columns - first)
            pattern = 0
            for j in range(size):
                pattern |= int(mask[row, first + j]) << j
            field = index_of[pattern] if size == group else index_of_rest[pattern]
            bad += field == 65535
            fields[row, number] = field
    return bad


@_jit
def decode_patterns(
    fields: Array, group: int, patterns: Array, patterns_of_rest: Array, mask: Array
) -> int:
    """Inverse of ``encode_patterns``; returns how many fields are out of range."""
    bad = 0
    columns = mask.shape[1]
    for row in range(mask.shape[0]):
        for number in range(fields.shape[1]):
            first = number * group
            size = min(group, columns - first)
            table = patterns if size == group else patterns_of_rest
            field = fields[row, number]
            if field >= table.size:
                bad += 1
                field = 0
            pattern = table[field]
            for j in range(size):
                mask[row, first + j] = (pattern >> j) & 1
    return bad


@_jit
def pack_fields(fields: Array, bits: int, out: Array) -> None:
    """``bits``-bit fields, the first in the lowest bits of the first byte."""
    buffer = np.uint64(0)
    filled = 0
    position = 0
    for i in range(fields.size):
        buffer |= np.uint64(fields[i]) << np.uint64(filled)
        filled += bits
        while filled >= 8:
            out[position] = buffer & np.uint64(255)
            position += 1
            buffer >>= np.uint64(8)
            filled -= 8
    if filled:
        out[position] = buffer & np.uint64(255)


@_jit
def unpack_fields(stream: Array, bits: int, out: Array) -> None:
    """Inverse of ``pack_fields``."""
    buffer = np.uint64(0)
    filled = 0
    position = 0
    wanted = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    for i in range(out.size):
        while filled < bits:
            buffer |= np.uint64(stream[position]) << np.uint64(filled)
            position += 1
            filled += 8
        out[i] = buffer & wanted
        buffer >>= np.uint64(bits)
        filled -= bits
