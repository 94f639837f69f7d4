"""Loops that choose, zero and round weights: the inside of a block of the column sweep."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from sparse_expansion.algorithms.kernels.jit import LANES, Array, jit, tile_jit
from sparse_expansion.algorithms.kernels.llvm import (
    F32,
    I64,
    data_pointer,
    in_all_lanes,
    load_at,
    vector_of,
)

TILE_ROWS = 64
"""Rows of weights (output features) that stay in a cache while their columns are decided."""
EAGER_COLUMNS = 8
"""Columns whose errors are pushed one by one; later columns get them together."""


@jit
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


@jit
def prune_groups(saliency: Array, num_pruned: int, mask: Array) -> None:
    """Mark the smallest saliencies of every group of M columns; ties by index.

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


@tile_jit
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


@tile_jit
def _copy(source: Array, target: Array, count: int) -> None:
    for r in range(count):
        target[r] = source[r]


@tile_jit
def _keep_of(mask: Array, keep: Array) -> None:
    for r in range(mask.size):
        keep[r] = np.float32(1) - np.float32(mask[r])


@tile_jit
def _mask_of(keep: Array, mask: Array) -> None:
    for r in range(mask.size):
        mask[r] = np.uint8(1) - np.uint8(keep[r])


@tile_jit
def _zero(w: Array, keep: Array, pivot: float, error: Array) -> None:
    """Zero the pruned weights of one column of a tile: ``q = w keep``, ``e = (w - q) / U_jj``."""
    for r in range(TILE_ROWS):
        q = w[r] * keep[r]
        error[r] = (w[r] - q) / pivot
        w[r] = q


@tile_jit
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
    """Round one column of a tile to the grid where it is kept, else to zero."""
    for r in range(scale.size):
        code = np.rint(w[r] / scale[r]) + zero_point[r]
        code = min(max(code, np.float32(0)), np.float32(max_code))
        codes[r] = np.uint8(code)
        q = scale[r] * (code - zero_point[r]) * keep[r]
        error[r] = (w[r] - q) / pivot
        w[r] = q


@tile_jit
def _subtract(w: Array, error: Array, factor: float) -> None:
    for r in range(TILE_ROWS):
        w[r] -= error[r] * factor


@intrinsic
def _push_eight(
    _typing: Any, w: Any, e: Any, factor: Any, decided: Any, first: Any, columns: Any
) -> Any:
    """Push eight decided columns' errors onto columns ``first .. columns`` of a tile.

    Sixteen rows at a time, all of a column's factors in registers: a plain loop over so few rows
    spends most of its time on finding out that its arrays do not overlap.
    """
    signature = types.void(w, e, factor, decided, first, columns)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        w_at, e_at, factor_at = (
            data_pointer(context, builder, signature.args[i], arguments[i]) for i in range(3)
        )
        decided, first, columns = arguments[3:]
        tile = I64(TILE_ROWS)
        with cgutils.for_range_slice(builder, first, columns, I64(1)) as (column, _):
            factors = []
            for j in range(8):
                place = builder.mul(builder.add(decided, I64(j)), columns)
                scalar = builder.load(builder.gep(factor_at, [builder.add(place, column)]))
                factors.append(in_all_lanes(builder, scalar, vector_of(F32)))
            for row in range(0, TILE_ROWS, LANES):
                place = builder.add(builder.mul(column, tile), I64(row))
                value = load_at(builder, w_at, place, vector_of(F32))
                for j, lanes in enumerate(factors):
                    here = builder.mul(builder.add(decided, I64(j)), tile)
                    error = load_at(builder, e_at, builder.add(here, I64(row)), vector_of(F32))
                    product = builder.fmul(error, lanes, flags=("contract",))
                    value = builder.fsub(value, product, flags=("contract",))
                target = builder.bitcast(builder.gep(w_at, [place]), ir.PointerType(vector_of(F32)))
                builder.store(value, target, align=4)
        return context.get_dummy_value()

    return signature, codegen


@jit
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
        first: the first tile.
        last: the tile after the last one.
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
