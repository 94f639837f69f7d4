"""Inner loops on a CPU, compiled: the only home of Numba.

Each kernel works on a slice of its arrays and releases the interpreter lock; ``split`` runs
slices on as many threads as PyTorch has, so that a worker of one thread stays on one core. No
kernel's result depends on how its work is split.
Packed values are moved as unsigned integers of their size, which is the same for every dtype.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

Array = np.ndarray[Any, np.dtype[Any]]
MIN_SLICE = 1 << 16
TILE_ROWS = 64
LANES = 16
"""Values that the vector kernels take at a time."""
EAGER_COLUMNS = 8
"""Columns whose errors are pushed one by one; later columns get them together."""
_jit: Any = numba.njit(nogil=True, cache=True, error_model="numpy")
# A product and a sum may be one instruction, as in any BLAS.
_tile_jit: Any = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})


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


BITS = np.arange(256, dtype=np.uint8)[:, None] >> np.arange(8, dtype=np.uint8) & 1
"""The bits of every byte, the lowest first."""
ONES = BITS.sum(axis=1, dtype=np.int64)
"""How many bits of every byte are set."""
BEFORE = (np.cumsum(BITS, axis=1, dtype=np.uint8) - BITS).astype(np.uint8)
"""Bits set below every bit of a byte."""
PLACES = np.argsort(1 - BITS, axis=1, kind="stable").astype(np.uint8)
"""Where a byte's set bits are, in order (then where the others are)."""


@_jit
def count_ones(stream: Array) -> int:
    """Bits set in a stream of bytes."""
    found = 0
    for byte in stream:
        found += ONES[byte]
    return found


@_jit
def compact(values: Array, stream: Array, out: Array) -> None:
    """Values whose bit in the stream is set, in order; ``out`` has exactly that many."""
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


@_jit
def scatter(values: Array, stream: Array, out: Array) -> None:
    """``values`` in order to where the stream's bits are set, zero elsewhere."""
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


@_jit
def dequantize(
    codes: Array, stream: Array, scale: Array, zero_point: Array, group_size: int, out: Array
) -> None:
    """``scale * (code - zero_point)`` in float32 where the stream's bits are set, zero elsewhere.

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


@_jit
def round_to_bfloat16(values: Array, out: Array) -> None:
    """Finite float32 values, given as their bits, to the nearest bfloat16; even on ties."""
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            word = values[row, column]
            word += np.uint32(0x7FFF) + (word >> np.uint32(16) & np.uint32(1))
            out[row, column] = word >> np.uint32(16)


@_jit
def _take(
    buffer: int, filled: int, wanted: int, stream: Array, position: int
) -> tuple[int, int, int]:
    """Read bytes of a stream until the buffer holds at least ``wanted`` bits."""
    while filled < wanted:
        buffer |= np.uint64(stream[position]) << np.uint64(filled)
        position += 1
        filled += 8
    return buffer, filled, position


@_jit
def _emit(buffer: int, filled: int, out: Array, position: int) -> tuple[int, int, int]:
    """Write the buffer's whole bytes to a stream."""
    while filled >= 8:
        out[position] = buffer & np.uint64(255)
        position += 1
        buffer >>= np.uint64(8)
        filled -= 8
    return buffer, filled, position


@_jit
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


@_jit
def decode_patterns(
    fields: Array, columns: int, group: int, patterns: Array, patterns_of_rest: Array, out: Array
) -> int:
    """Inverse of ``encode_patterns``; returns how many fields are out of range."""
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


@_jit
def encode_pairs(stream: Array, bits: int, index_of: Array, out: Array) -> int:
    """Mask bytes, each of two groups of four, to the pairs' indices of ``2 bits`` bits.

    Four bytes at a time fill ``bits`` bytes. Returns how many pairs have no index (255).
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


@_jit
def decode_pairs(stream: Array, bits: int, pairs: Array, out: Array) -> int:
    """Inverse of ``encode_pairs``; ``pairs`` holds 256 where an index is out of range."""
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


@_jit
def pack_fields(fields: Array, bits: int, out: Array) -> None:
    """``bits``-bit fields, the first in the lowest bits of the first byte."""
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


@_jit
def unpack_fields(stream: Array, bits: int, out: Array) -> None:
    """Inverse of ``pack_fields``."""
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


_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), *(ir.IntType(size) for size in (8, 16, 32, 64))


def _vector(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def _splat(element: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(_vector(element), [value] * LANES)


def _data(context: Any, builder: ir.IRBuilder, array_type: Any, array: Any) -> Any:
    """Pointer to an array's first element."""
    return context.make_array(array_type)(context, builder, array).data


def _load(builder: ir.IRBuilder, base: Any, position: Any, kind: ir.Type) -> Any:
    """A vector (or wider integer) from an array of smaller elements, however aligned."""
    place = builder.bitcast(builder.gep(base, [position]), ir.PointerType(kind))
    return builder.load(place, align=1)


def _in_all_lanes(builder: ir.IRBuilder, scalar: Any, vector: ir.VectorType) -> Any:
    nothing = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(nothing, scalar, _I32(0))
    return builder.shuffle_vector(one, nothing, ir.Constant(_vector(_I32), [0] * LANES))


@_jit
def prune_block(W: Array, diagonal: Array, num_pruned: int, mask: Array) -> None:
    """Mark the ``num_pruned`` smallest saliencies ``(w / U_jj)^2`` of a block; ties by index.

    Args:
        W: float32 ``[B, O]``.
        diagonal: float32 ``[B]``.
        num_pruned: exact count, at least 1.
        mask: uint8 ``[B, O]``; set to 1 where pruned, else to 0.
    """
    columns, rows = W.shape
    values = np.empty((columns, rows), np.float32)
    for j in range(columns):
        for r in range(rows):
            ratio = W[j, r] / diagonal[j]
            values[j, r] = ratio * ratio
    # Non-negative floats are ordered as their bits are.
    bits = values.reshape(-1).view(np.uint32)
    counts = np.zeros(1 << 16, np.int32)
    for word in bits:
        counts[word >> np.uint32(16)] += 1
    before = 0
    bucket = 0
    while before + counts[bucket] < num_pruned:
        before += counts[bucket]
        bucket += 1
    inside = np.empty(counts[bucket], np.uint32)
    position = 0
    for word in bits:
        if word >> np.uint32(16) == bucket:
            inside[position] = word
            position += 1
    inside.sort()
    threshold = inside[num_pruned - before - 1]
    below = before
    for word in inside:
        if word < threshold:
            below += 1
    flat = mask.reshape(-1)
    for i in range(bits.size):
        flat[i] = bits[i] < threshold
    ties = num_pruned - below
    position = 0
    while ties > 0:
        if bits[position] == threshold:
            flat[position] = 1
            ties -= 1
        position += 1


@_jit
def prune_groups(saliency: Array, num_pruned: int, mask: Array) -> None:
    """Mark the smallest of every group; equal ones go by index.

    Args:
        saliency: float32 ``[groups, M, O]``.
        num_pruned: how many of M.
        mask: bytes of the same shape.
    """
    groups, members, width = saliency.shape
    before = np.empty((members, width), dtype=np.uint8)
    for group in range(groups):
        before[:] = 0
        for j in range(1, members):
            for i in range(j):
                for o in range(width):
                    is_first = saliency[group, i, o] <= saliency[group, j, o]
                    before[j, o] += is_first
                    before[i, o] += not is_first
        for j in range(members):
            for o in range(width):
                mask[group, j, o] = before[j, o] < num_pruned


@_tile_jit
def _choose(w: Array, factor: Array, keep: Array, first: int, last: int, pruned: int) -> None:
    """Drop the ``pruned`` smallest saliencies of a group of columns; the first on a tie."""
    values = np.empty((last - first, TILE_ROWS), np.float32)
    rank = np.empty(TILE_ROWS, np.int32)
    for i in range(first, last):
        pivot = factor[i, i]
        for r in range(TILE_ROWS):
            ratio = w[i, r] / pivot
            values[i - first, r] = ratio * ratio
    for i in range(last - first):
        rank[:] = 0
        for other in range(i):
            for r in range(TILE_ROWS):
                rank[r] += values[other, r] <= values[i, r]
        for other in range(i + 1, last - first):
            for r in range(TILE_ROWS):
                rank[r] += values[other, r] < values[i, r]
        for r in range(TILE_ROWS):
            keep[first + i, r] = np.float32(rank[r] >= pruned)


@_tile_jit
def _copy(source: Array, target: Array, count: int) -> None:
    for r in range(count):
        target[r] = source[r]


@_tile_jit
def _keep_of(mask: Array, keep: Array) -> None:
    for r in range(mask.size):
        keep[r] = np.float32(1) - np.float32(mask[r])


@_tile_jit
def _mask_of(keep: Array, mask: Array) -> None:
    for r in range(mask.size):
        mask[r] = np.uint8(1) - np.uint8(keep[r])


@_tile_jit
def _zero(w: Array, keep: Array, pivot: float, error: Array) -> None:
    """One column of a tile: ``q = w keep``, ``e = (w - q) / U_jj``."""
    for r in range(TILE_ROWS):
        q = w[r] * keep[r]
        error[r] = (w[r] - q) / pivot
        w[r] = q


@_tile_jit
def _round(
    w: Array,
    keep: Array,
    scale: Array,
    zero_point: Array,
    max_code: int,
    codes: Array,
    pivot: float,
    error: Array,
) -> None:
    """One column of a tile, rounded to the grid where it is kept."""
    for r in range(scale.size):
        code = np.rint(w[r] / scale[r]) + zero_point[r]
        code = min(max(code, np.float32(0)), np.float32(max_code))
        codes[r] = np.uint8(code)
        q = scale[r] * (code - zero_point[r]) * keep[r]
        error[r] = (w[r] - q) / pivot
        w[r] = q


@_tile_jit
def _subtract(w: Array, error: Array, factor: float) -> None:
    for r in range(TILE_ROWS):
        w[r] -= error[r] * factor


@intrinsic
def _push_eight(
    _typing: Any, w: Any, e: Any, factor: Any, decided: Any, first: Any, columns: Any
) -> Any:
    """Eight decided columns' errors onto columns ``first .. columns`` of a tile.

    Sixteen rows at a time, all of a column's factors in registers: a plain loop over so few rows
    spends most of its time on finding out that its arrays do not overlap.
    """
    signature = types.void(w, e, factor, decided, first, columns)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        w_at, e_at, factor_at = (
            _data(context, builder, signature.args[i], arguments[i]) for i in range(3)
        )
        decided, first, columns = arguments[3:]
        tile = _I64(TILE_ROWS)
        with cgutils.for_range_slice(builder, first, columns, _I64(1)) as (column, _):
            factors = []
            for j in range(8):
                place = builder.mul(builder.add(decided, _I64(j)), columns)
                scalar = builder.load(builder.gep(factor_at, [builder.add(place, column)]))
                factors.append(_in_all_lanes(builder, scalar, _vector(_F32)))
            for row in range(0, TILE_ROWS, LANES):
                place = builder.add(builder.mul(column, tile), _I64(row))
                value = _load(builder, w_at, place, _vector(_F32))
                for j, lanes in enumerate(factors):
                    here = builder.mul(builder.add(decided, _I64(j)), tile)
                    error = _load(builder, e_at, builder.add(here, _I64(row)), _vector(_F32))
                    product = builder.fmul(error, lanes, flags=("contract",))
                    value = builder.fsub(value, product, flags=("contract",))
                target = builder.bitcast(builder.gep(w_at, [place]), ir.PointerType(_vector(_F32)))
                builder.store(value, target, align=4)
        return context.get_dummy_value()

    return signature, codegen


@_jit
def decide_block(
    W: Array,
    U: Array,
    mask: Array,
    group: int,
    pruned: int,
    scale: Array,
    zero_point: Array,
    max_code: int,
    codes: Array,
    errors: Array,
    first: int,
    last: int,
) -> None:
    """Decide a block's columns one by one, pushing errors onto the block's later columns.

    ``first .. last`` are tiles of rows of all experts in one sequence.

    Args:
        W: float32 ``[K, B, O]``; overwritten.
        U: float32 ``[K, B, B]``, the factor's diagonal block.
        mask: uint8 ``[K, B, O]``, 1 where pruned; filled here for N:M.
        group: M of N:M, 0 when the mask is given.
        pruned: N of N:M.
        scale: float32 ``[K, B, O]``; empty without a grid.
        zero_point: as ``scale``.
        max_code: largest code.
        codes: uint8 ``[K, B, O]``; empty without a grid.
        errors: float32 ``[K, B, O]``, written.
        first: of the tiles.
        last: after the tiles.
    """
    _, columns, rows = W.shape
    tiles = -(-rows // TILE_ROWS)
    # N:M decides whole groups, so that a step holds whole groups too.
    step = EAGER_COLUMNS if group == 0 else max(group, EAGER_COLUMNS // group * group)
    w = np.zeros((columns, TILE_ROWS), np.float32)
    e = np.zeros((columns, TILE_ROWS), np.float32)
    keep = np.zeros((columns, TILE_ROWS), np.float32)
    for tile in range(first, last):
        k = tile // tiles
        row = tile % tiles * TILE_ROWS
        end = min(row + TILE_ROWS, rows)
        count = end - row
        factor = U[k]
        for j in range(columns):
            _copy(W[k, j, row:end], w[j], count)
            _keep_of(mask[k, j, row:end], keep[j])
        for start in range(0, columns, step):
            stop = min(start + step, columns)
            for j in range(start, stop):
                if group > 0 and j % group == 0:
                    ends = min(j + group, columns)
                    _choose(w, factor, keep, j, ends, (ends - j) * pruned // group)
                if scale.size > 0:
                    _round(
                        w[j],
                        keep[j],
                        scale[k, j, row:end],
                        zero_point[k, j, row:end],
                        max_code,
                        codes[k, j, row:end],
                        factor[j, j],
                        e[j],
                    )
                else:
                    _zero(w[j], keep[j], factor[j, j], e[j])
                for i in range(j + 1, stop):
                    _subtract(w[i], e[j], factor[j, i])
            eights = start + (stop - start) // 8 * 8
            for j in range(start, eights, 8):
                _push_eight(w, e, factor, j, stop, columns)
            for j in range(eights, stop):
                for i in range(stop, columns):
                    _subtract(w[i], e[j], factor[j, i])
        for j in range(columns):
            _copy(w[j], W[k, j, row:end], count)
            _copy(e[j], errors[k, j, row:end], count)
            if group > 0:
                _mask_of(keep[j], mask[k, j, row:end])


@functools.cache
def _has(*names: str) -> bool:
    features = llvmlite.binding.get_host_cpu_features()
    return all(features.get(name) for name in names)


def can_expand() -> bool:
    """Whether this CPU has an instruction for it (AVX-512 with VBMI2)."""
    return _has("avx512f", "avx512vbmi2")


def can_spread() -> bool:
    """Whether this CPU puts packed values into masked lanes fast: AVX-512 VBMI2, or AVX2."""
    return can_expand() or _has("avx2", "fma")


def _sum_of_products(builder: ir.IRBuilder, total: Any, a: Any, b: Any) -> None:
    """``total += a b``, lane by lane."""
    vector = _vector(_F32)
    fma = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{LANES}f32"
    )
    builder.store(builder.call(fma, [a, b, builder.load(total)]), total)


def _across_lanes(builder: ir.IRBuilder, total: Any) -> Any:
    add = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(_F32, [_F32, _vector(_F32)]),
        f"llvm.vector.reduce.fadd.v{LANES}f32",
    )
    zero = ir.Constant(_F32, -0.0)
    return builder.call(add, [zero, builder.load(total)], fastmath=("reassoc",))


def _to_float32(builder: ir.IRBuilder, vector: Any, element: ir.Type) -> Any:
    """Lanes as float32: of bfloat16 (its bits are a float32's upper half) or of small integers."""
    if element == _I16:
        wide = builder.zext(vector, _vector(_I32))
        return builder.bitcast(builder.shl(wide, _splat(_I32, 16)), _vector(_F32))
    if element == _I8:
        return builder.uitofp(vector, _vector(_F32))
    return vector


def _suffix(vector: ir.VectorType) -> str:
    """How LLVM's names of operations on it end."""
    return f"v{vector.count}{'f32' if vector.element == _F32 else vector.element}"


def _spread(builder: ir.IRBuilder, base: Any, start: Any, size: Any, bits: Any, others: Any) -> Any:
    """The values from ``start`` on, in order, in the lanes whose bit is set; else ``others``.

    Sixteen are loaded and then spread, which some CPUs do several times faster than both at once;
    near the end only those are loaded that there are. Where ``others`` are zeros of float32 and the
    values are not, these are converted first: CPUs spread 32 bits faster than 16 or 8.
    """
    vector, stored = others.type, _vector(base.type.pointee)
    converted = stored.element != vector.element
    mask = builder.bitcast(bits, _vector(ir.IntType(1)))
    at_load = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(stored, [base.type, mask.type, stored]),
        f"llvm.masked.expandload.{_suffix(stored)}",
    )
    missing = _splat(stored.element, 0) if converted else others

    def as_wanted(values: Any) -> Any:
        return _to_float32(builder, values, stored.element) if converted else values

    kept = cgutils.alloca_once(builder, vector)
    has_room = builder.icmp_signed("<=", builder.add(start, _I64(LANES)), size)
    with builder.if_else(has_room) as (whole, rest):
        with whole:
            if can_expand():
                in_register = cgutils.get_or_insert_function(
                    builder.module,
                    ir.FunctionType(vector, [vector, vector, mask.type]),
                    f"llvm.x86.avx512.mask.expand.{_suffix(vector)}",
                )
                loaded = as_wanted(_load(builder, base, start, stored))
                spread = builder.call(in_register, [loaded, others, mask])
            else:
                halves = _spread_halves(builder, base, start, bits, stored.element)
                spread = as_wanted(builder.select(mask, halves, missing))
            builder.store(spread, kept)
        with rest:
            place = builder.gep(base, [start])
            builder.store(as_wanted(builder.call(at_load, [place, mask, missing])), kept)
    return builder.load(kept)


def _spread_halves(builder: ir.IRBuilder, base: Any, start: Any, bits: Any, element: Any) -> Any:
    """The same by AVX2, eight lanes at a time, with anything where the bit is not set."""
    half = LANES // 2
    table = cgutils.global_constant(
        builder.module,
        "before",
        ir.Constant(ir.ArrayType(_I8, BEFORE.size), bytearray(BEFORE.tobytes())),
    )
    order_at = builder.bitcast(table, ir.PointerType(_I8))
    low = builder.and_(bits, _I16(255))
    after_low = builder.add(start, builder.zext(_count_ones(builder, low), _I64))
    found = []
    for byte, position in ((low, start), (builder.lshr(bits, _I16(8)), after_low)):
        row = builder.mul(builder.zext(byte, _I64), _I64(half))
        order = _load(builder, order_at, row, _vector(_I8, half))
        loaded = _load(builder, base, position, _vector(element, half))
        found.append(_permute(builder, loaded, order))
    lanes = ir.Constant(_vector(_I32), list(range(LANES)))
    return builder.shuffle_vector(*found, lanes)


def _permute(builder: ir.IRBuilder, values: Any, order: Any) -> Any:
    """Lane j of the result is lane ``order[j]`` of eight values (AVX2 has it for 32 and 8 bits)."""
    kind = values.type
    if kind.element in (_F32, _I32):
        wide = _vector(_I32, kind.count)
        permd = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(wide, [wide, wide]), "llvm.x86.avx2.permd"
        )
        whole = builder.call(permd, [builder.bitcast(values, wide), builder.zext(order, wide)])
        return builder.bitcast(whole, kind)
    pair = _vector(_I16, kind.count)
    bytes16 = _vector(_I8, 2 * kind.count)
    shuffle = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(bytes16, [bytes16] * 2), "llvm.x86.ssse3.pshuf.b.128"
    )
    # As 16-bit lanes: the bytes 2 i and 2 i + 1 of lane i.
    twice = ir.Constant(pair, [0x0202] * kind.count)
    second = ir.Constant(pair, [0x0100] * kind.count)
    wide_values = values if kind.element == _I16 else builder.zext(values, pair)
    places = builder.add(builder.mul(builder.zext(order, pair), twice), second)
    found = builder.call(
        shuffle, [builder.bitcast(wide_values, bytes16), builder.bitcast(places, bytes16)]
    )
    found = builder.bitcast(found, pair)
    return found if kind.element == _I16 else builder.trunc(found, kind)


def _count_ones(builder: ir.IRBuilder, bits: Any) -> Any:
    ones = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_I16, [_I16]), "llvm.ctpop.i16"
    )
    return builder.call(ones, [bits])


@contextlib.contextmanager
def _chunks(
    context: Any, builder: ir.IRBuilder, kinds: Any, arguments: Any, others: Any, count: Any
) -> Iterator[tuple[Any, Any, Any, Any]]:
    """A loop over ``count`` times 16 places; the body is what the caller emits inside.

    The first four arguments are the stream of bits, the byte to begin with, the kept values, and
    the first of them. Yields the chunk's number, its mask, its values spread to their lanes, and a
    pointer to the position after the last value taken.
    """
    bits_at = _data(context, builder, kinds[0], arguments[0])
    values = context.make_array(kinds[2])(context, builder, arguments[2])
    position = cgutils.alloca_once_value(builder, arguments[3])
    with cgutils.for_range(builder, count) as loop:
        place = builder.add(arguments[1], builder.mul(loop.index, _I64(2)))
        bits = _load(builder, bits_at, place, _I16)
        mask = builder.bitcast(bits, _vector(ir.IntType(1)))
        start = builder.load(position)
        spread = _spread(builder, values.data, start, values.nitems, bits, others)
        yield loop.index, mask, spread, position
        step = builder.zext(_count_ones(builder, bits), _I64)
        builder.store(builder.add(start, step), position)


@intrinsic
def _kept_dot(
    _typing: Any, stream: Any, byte: Any, values: Any, first: Any, x: Any, at: Any, n: Any
) -> Any:
    """Over ``16 n`` columns: the dot product of x with the kept values, and the sum of x there.

    Vectors of x are read from position ``at``, bits from byte ``byte``, values from ``first`` on.
    The sum is of use, and made, for codes only.
    """
    signature = types.containers.UniTuple(types.float32, 2)(stream, byte, values, first, x, at, n)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x_at = _data(context, builder, signature.args[4], arguments[4])
        element = context.get_data_type(signature.args[2].dtype)
        dot = cgutils.alloca_once_value(builder, _splat(_F32, 0.0))
        here = cgutils.alloca_once_value(builder, _splat(_F32, 0.0))
        zeros = _splat(_F32, 0)
        with _chunks(context, builder, signature.args, arguments, zeros, arguments[6]) as chunk:
            number, mask, kept, _ = chunk
            column = builder.add(arguments[5], builder.mul(number, _I64(LANES)))
            part = _load(builder, x_at, column, _vector(_F32))
            _sum_of_products(builder, dot, kept, part)
            if element == _I8:
                seen = builder.select(mask, part, _splat(_F32, 0.0))
                builder.store(builder.fadd(builder.load(here), seen), here)
        both = [_across_lanes(builder, dot), _across_lanes(builder, here)]
        return context.make_tuple(builder, signature.return_type, both)

    return signature, codegen


@intrinsic
def _spread_to(
    _typing: Any,
    stream: Any,
    byte: Any,
    values: Any,
    first: Any,
    other: Any,
    out: Any,
    at: Any,
    n: Any,
) -> Any:
    """Write ``16 n`` places of ``out``: kept values in order, ``other`` where the bit is not set.

    Returns the position after the last value taken.
    """
    signature = types.int64(stream, byte, values, first, values.dtype, out, at, n)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out_at = _data(context, builder, signature.args[5], arguments[5])
        vector = _vector(context.get_data_type(signature.args[2].dtype))
        others = _in_all_lanes(builder, arguments[4], vector)
        with _chunks(context, builder, signature.args, arguments, others, arguments[7]) as chunk:
            number, _, spread, position = chunk
            column = builder.add(arguments[6], builder.mul(number, _I64(LANES)))
            target = builder.bitcast(builder.gep(out_at, [column]), ir.PointerType(vector))
            builder.store(spread, target, align=1)
        return builder.load(position)

    return signature, codegen


@_jit
def scatter_vectors(values: Array, stream: Array, out: Array) -> None:
    """``scatter`` by vectors; ``out`` has a multiple of 16 places."""
    _spread_to(stream, 0, values, 0, values[0] & 0, out, 0, out.size // LANES)


@_jit
def dequantize_vectors(
    codes: Array, stream: Array, scale: Array, zero_point: Array, group_size: int, out: Array
) -> None:
    """``dequantize`` by vectors; whole zero points of 0 to 255, columns and groups multiples of 16.

    A dropped weight takes the zero point for its code, which is worth exactly zero.
    """
    rows, columns = out.shape
    spread = np.empty(columns, np.uint8)
    position = 0
    for row in range(rows):
        for first in range(0, columns, group_size):
            s = scale[row, first // group_size]
            z = zero_point[row, first // group_size]
            count = min(group_size, columns - first)
            place = (row * columns + first) // 8
            position = _spread_to(
                stream, place, codes, position, np.uint8(z), spread, first, count // LANES
            )
            for column in range(first, first + count):
                out[row, column] = s * (np.float32(spread[column]) - z)


@intrinsic
def _nibble_dot(_typing: Any, stream: Any, byte: Any, even: Any, odd: Any, at: Any, n: Any) -> Any:
    """Dot product of ``32 n`` codes of 4 bits with x, whose even and odd entries come apart."""
    signature = types.float32(stream, byte, even, odd, at, n)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        stream_at, even_at, odd_at = (
            _data(context, builder, signature.args[i], arguments[i]) for i in (0, 2, 3)
        )
        total = cgutils.alloca_once_value(builder, _splat(_F32, 0.0))
        with cgutils.for_range(builder, arguments[5]) as loop:
            offset = builder.mul(loop.index, _I64(LANES))
            codes = _load(builder, stream_at, builder.add(arguments[1], offset), _vector(_I8))
            low = builder.and_(codes, _splat(_I8, 15))
            high = builder.lshr(codes, _splat(_I8, 4))
            for nibble, x_at in ((low, even_at), (high, odd_at)):
                part = _load(builder, x_at, builder.add(arguments[4], offset), _vector(_F32))
                _sum_of_products(builder, total, builder.uitofp(nibble, _vector(_F32)), part)
        return _across_lanes(builder, total)

    return signature, codegen


@_jit
def kept_matvec(
    stream: Array, values: Array, starts: Array, x: Array, out: Array, first: int, last: int
) -> None:
    """``out = W x`` for rows ``first .. last`` of packed kept values.

    Args:
        stream: bits of the kept weights.
        values: float32, or uint16 that hold bfloat16.
        starts: ``[rows]``, kept values before each row.
        x: float32 ``[D]``, D a multiple of 16.
        out: float32 ``[rows]``.
        first: of the rows.
        last: after the rows.
    """
    width = x.size
    for row in range(first, last):
        out[row] = _kept_dot(stream, row * width // 8, values, starts[row], x, 0, width // LANES)[0]


@_jit
def kept_code_matvec(
    stream: Array,
    codes: Array,
    starts: Array,
    scale: Array,
    zero_point: Array,
    group_size: int,
    x: Array,
    out: Array,
    first: int,
    last: int,
) -> None:
    """The same for codes of a grid: ``sum s (sum c x - z sum x)`` over groups of columns.

    ``starts`` is ``[rows, groups]``; the group size is a multiple of 16, like D.
    """
    width = x.size
    for row in range(first, last):
        total = np.float32(0)
        for group in range(scale.shape[1]):
            at = group * group_size
            count = min(group_size, width - at) // LANES
            dot, here = _kept_dot(
                stream, (row * width + at) // 8, codes, starts[row, group], x, at, count
            )
            total += scale[row, group] * (dot - zero_point[row, group] * here)
        out[row] = total


@_jit
def nibble_matvec(
    stream: Array,
    scale: Array,
    zero_point: Array,
    group_size: int,
    even: Array,
    odd: Array,
    sums: Array,
    out: Array,
    first: int,
    last: int,
) -> None:
    """``out = W x`` for dense codes of 4 bits.

    ``sums`` are the sums of x over each group; group size and D are multiples of 32.
    """
    half = even.size
    for row in range(first, last):
        total = np.float32(0)
        for group in range(scale.shape[1]):
            at = group * group_size // 2
            count = min(group_size // 2, half - at) // LANES
            dot = _nibble_dot(stream, row * half + at, even, odd, at, count)
            total += scale[row, group] * (dot - zero_point[row, group] * sums[group])
        out[row] = total
