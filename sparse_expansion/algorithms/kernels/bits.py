"""Loops over bit streams: masks, fields of a few bits, and patterns of N:M."""

from __future__ import annotations

import numpy as np

from sparse_expansion.algorithms.kernels.jit import Array, jit

BITS = np.arange(256, dtype=np.uint8)[:, None] >> np.arange(8, dtype=np.uint8) & 1
"""The bits of every byte, the lowest first."""
ONES = BITS.sum(axis=1, dtype=np.int64)
"""How many bits of every byte are set."""
BEFORE = (np.cumsum(BITS, axis=1, dtype=np.uint8) - BITS).astype(np.uint8)
"""Bits set below every bit of a byte."""
PLACES = np.argsort(1 - BITS, axis=1, kind="stable").astype(np.uint8)
"""Where a byte's set bits are, in order (then where the others are)."""


@jit
def count_ones(stream: Array) -> int:
    """Bits set in a stream of bytes."""
    found = 0
    for byte in stream:
        found += ONES[byte]
    return found


@jit
def compact(values: Array, stream: Array, out: Array) -> None:
    """Write to ``out`` the values whose bit in the stream is set, in order; it has that many."""
    position = 0
    whole = values.size // 8
    for i in range(whole):
        byte = stream[i]
        if position + 8 <= out.size:
            # All eight are written, the set ones first; the next byte overwrites the others.
            for j in range(8):
                out[position + j] = values[8 * i + PLACES[byte, j]]
        else:
            for j in range(ONES[byte]):
                out[position + j] = values[8 * i + PLACES[byte, j]]
        position += ONES[byte]
    for j in range(values.size - 8 * whole):
        if stream[whole] >> j & 1:
            out[position] = values[8 * whole + j]
            position += 1


@jit
def scatter(values: Array, stream: Array, out: Array) -> None:
    """Write ``values`` in order to where the stream's bits are set, zero elsewhere."""
    position = 0
    whole = out.size // 8
    zero = values[0] & 0
    for i in range(whole):
        byte = stream[i]
        if position + 8 <= values.size:
            # Eight loads that do not wait for one another, and no branch to mispredict.
            for j in range(8):
                value = values[position + BEFORE[byte, j]]
                out[8 * i + j] = value if byte >> j & 1 else zero
        else:
            for j in range(8):
                if byte >> j & 1:
                    out[8 * i + j] = values[position + BEFORE[byte, j]]
                else:
                    out[8 * i + j] = zero
        position += ONES[byte]
    for i in range(8 * whole, out.size):
        out[i] = zero
        if stream[whole] >> (i - 8 * whole) & 1:
            out[i] = values[position]
            position += 1


@jit
def dequantize(
    codes: Array, stream: Array, scale: Array, zero_point: Array, group_size: int, out: Array
) -> None:
    """Write ``scale * (code - zero_point)``, float32, where the stream's bits are set, else zero.

    ``out`` is ``[rows, columns]``; ``codes`` are the kept ones, in order.
    """
    position = 0
    columns = out.shape[1]
    for row in range(out.shape[0]):
        for first in range(0, columns, group_size):
            s = scale[row, first // group_size]
            z = zero_point[row, first // group_size]
            column = first
            end = min(first + group_size, columns)
            while column < end:
                place = row * columns + column
                byte = stream[place >> 3]
                low = place & 7
                count = min(8 - low, end - column)
                if count == 8 and position + 8 <= codes.size:
                    for j in range(8):
                        value = s * (np.float32(codes[position + BEFORE[byte, j]]) - z)
                        out[row, column + j] = value if byte >> j & 1 else np.float32(0)
                    position += ONES[byte]
                else:
                    for j in range(count):
                        if byte >> (low + j) & 1:
                            out[row, column + j] = s * (np.float32(codes[position]) - z)
                            position += 1
                        else:
                            out[row, column + j] = np.float32(0)
                column += count


@jit
def round_to_bfloat16(values: Array, out: Array) -> None:
    """Round finite float32 values, given as their bits, to the nearest bfloat16; ties to even."""
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            word = values[row, column]
            word += np.uint32(0x7FFF) + (word >> np.uint32(16) & np.uint32(1))
            out[row, column] = word >> np.uint32(16)


@jit
def _take(
    buffer: int, filled: int, wanted: int, stream: Array, position: int
) -> tuple[int, int, int]:
    """Read bytes of a stream until the buffer holds at least ``wanted`` bits."""
    while filled < wanted:
        buffer |= np.uint64(stream[position]) << np.uint64(filled)
        position += 1
        filled += 8
    return buffer, filled, position


@jit
def _emit(buffer: int, filled: int, out: Array, position: int) -> tuple[int, int, int]:
    """Write the buffer's whole bytes to a stream."""
    while filled >= 8:
        out[position] = buffer & np.uint64(255)
        position += 1
        buffer >>= np.uint64(8)
        filled -= 8
    return buffer, filled, position


@jit
def encode_patterns(
    stream: Array, columns: int, group: int, index_of: Array, index_of_rest: Array, fields: Array
) -> int:
    """Index of every group's pattern of ones; returns how many groups have no index (65535).

    ``fields`` is ``[rows, groups]``; the stream has ``columns`` bits per row.
    """
    bad = 0
    buffer = np.uint64(0)
    filled = 0
    position = 0
    for row in range(fields.shape[0]):
        for number in range(fields.shape[1]):
            size = min(group, columns - number * group)
            buffer, filled, position = _take(buffer, filled, size, stream, position)
            pattern = buffer & ((np.uint64(1) << np.uint64(size)) - np.uint64(1))
            buffer >>= np.uint64(size)
            filled -= size
            field = index_of[pattern] if size == group else index_of_rest[pattern]
            bad += field == 65535
            fields[row, number] = field
    return bad


@jit
def decode_patterns(
    fields: Array, columns: int, group: int, patterns: Array, patterns_of_rest: Array, out: Array
) -> int:
    """Do the inverse of ``encode_patterns``; return how many fields are out of range."""
    bad = 0
    buffer = np.uint64(0)
    filled = 0
    position = 0
    for row in range(fields.shape[0]):
        for number in range(fields.shape[1]):
            size = min(group, columns - number * group)
            table = patterns if size == group else patterns_of_rest
            field = fields[row, number]
            if field >= table.size:
                bad += 1
                field = 0
            buffer |= np.uint64(table[field]) << np.uint64(filled)
            filled += size
            buffer, filled, position = _emit(buffer, filled, out, position)
    if filled:
        out[position] = buffer & np.uint64(255)
    return bad


@jit
def encode_pairs(stream: Array, bits: int, index_of: Array, out: Array) -> int:
    """Write the index, of ``2 bits`` bits, of every mask byte, which is a pair of groups of four.

    Four bytes of the mask fill ``bits`` bytes. Returns how many pairs have no index (255).
    """
    bad = 0
    for i in range(stream.size // 4):
        word = np.uint32(0)
        for j in range(4):
            index = index_of[stream[4 * i + j]]
            bad += index == 255
            word |= np.uint32(index) << np.uint32(2 * bits * j)
        for j in range(bits):
            out[bits * i + j] = word >> np.uint32(8 * j) & np.uint32(255)
    return bad


@jit
def decode_pairs(stream: Array, bits: int, pairs: Array, out: Array) -> int:
    """Do the inverse of ``encode_pairs``; ``pairs`` holds 256 where an index is out of range."""
    bad = 0
    last = np.uint32((1 << 2 * bits) - 1)
    for i in range(out.size // 4):
        word = np.uint32(0)
        for j in range(bits):
            word |= np.uint32(stream[bits * i + j]) << np.uint32(8 * j)
        for j in range(4):
            pair = pairs[word >> np.uint32(2 * bits * j) & last]
            bad += pair == 256
            out[4 * i + j] = pair
    return bad


@jit
def pack_fields(fields: Array, bits: int, out: Array) -> None:
    """Write fields of ``bits`` bits, the first in the lowest bits of the first byte."""
    if bits == 4:
        for i in range(fields.size // 2):
            out[i] = np.uint8(fields[2 * i]) | np.uint8(fields[2 * i + 1]) << np.uint8(4)
        if fields.size % 2:
            out[fields.size // 2] = fields[fields.size - 1]
        return
    buffer = np.uint64(0)
    filled = 0
    position = 0
    for i in range(fields.size):
        buffer |= np.uint64(fields[i]) << np.uint64(filled)
        filled += bits
        buffer, filled, position = _emit(buffer, filled, out, position)
    if filled:
        out[position] = buffer & np.uint64(255)


@jit
def unpack_fields(stream: Array, bits: int, out: Array) -> None:
    """Do the inverse of ``pack_fields``."""
    if bits == 4:
        for i in range(out.size // 2):
            out[2 * i] = stream[i] & np.uint8(15)
            out[2 * i + 1] = stream[i] >> np.uint8(4)
        if out.size % 2:
            out[out.size - 1] = stream[out.size // 2] & np.uint8(15)
        return
    buffer = np.uint64(0)
    filled = 0
    position = 0
    wanted = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    for i in range(out.size):
        buffer, filled, position = _take(buffer, filled, bits, stream, position)
        out[i] = buffer & wanted
        buffer >>= np.uint64(bits)
        filled -= bits
