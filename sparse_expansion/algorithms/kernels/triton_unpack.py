"""Experts' dense weights from their stored streams on a GPU, and the checks that come first."""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_expansion.algorithms.kernels.triton_streams import count_ones, kept_values, unit_mask

ROWS, COLUMNS = 4, 256
"""Rows of a program, one for each of its warps, and columns of them at a time."""
COUNT_ROWS, LANES = 16, 32
"""Rows, and units of each, that a program counts at a time."""


@triton.jit
def count_kept(  # type: ignore[no-untyped-def]
    masks,
    counts,
    table,
    rest_table,
    mask_bytes,
    O: tl.constexpr,  # noqa: E741 - the number of rows, as everywhere
    D: tl.constexpr,
    KIND: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    FIELD_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Kept weights of every row: ``counts [experts, O]``, of the masks at so many addresses."""
    expert = tl.program_id(1)
    stream = tl.load(masks + expert).to(tl.pointer_type(tl.uint8))
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_long = row.to(tl.int64)
    found = tl.zeros((ROWS, LANES), tl.int32)
    for first in range(0, (D + UNIT - 1) // UNIT, LANES):
        unit = first + tl.arange(0, LANES)[None, :]
        mask = unit_mask(
            stream,
            table,
            rest_table,
            row_long[:, None],
            unit,
            mask_bytes,
            O,
            D,
            KIND,
            UNIT,
            GROUP,
            FIELD_BITS,
        )
        found += count_ones(mask)
    tl.store(counts + expert.to(tl.int64) * O + row, tl.sum(found, 1), mask=row < O)


@triton.jit
def unpack_rows(  # type: ignore[no-untyped-def]
    out,
    sizes,
    masks,
    values,
    starts,
    scale_of,
    zero_of,
    table,
    rest_table,
    mask_bytes,
    VALUE: tl.constexpr,
    O: tl.constexpr,  # noqa: E741 - the number of rows, as everywhere
    D: tl.constexpr,
    KIND: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_KEPT: tl.constexpr,
    FIELD_BITS: tl.constexpr,
    CODE_BITS: tl.constexpr,
    GRID_SIZE: tl.constexpr,
    SKIPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A few rows of one expert a program: ``out [experts, O, D]``.

    ``UNIT`` is not used: columns are single here. ``masks``, ``values`` (addresses) and
    ``starts [experts, O]`` are those of the first expert of ``out`` and on. Experts without a token
    by ``sizes [experts]`` are left out where ``SKIPS``.
    """
    expert = tl.program_id(1)
    if SKIPS:
        if tl.load(sizes + expert) == 0:
            return
    short_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = short_row.to(tl.int64)[:, None]
    stored = tl.load(values + expert).to(tl.pointer_type(VALUE))
    mask_stream = tl.load(masks + expert).to(tl.pointer_type(tl.uint8))
    if KIND == 1:
        begin = tl.load(starts + expert.to(tl.int64) * O + short_row, mask=short_row < O, other=0)
    else:
        begin = short_row * ROW_KEPT
    out += expert.to(tl.int64) * O * D
    GRIDS: tl.constexpr = 1 if GRID_SIZE == 0 else (D + GRID_SIZE - 1) // GRID_SIZE
    for first in range(0, D, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        inside = (row < O) & (column < D)
        if KIND == 0:
            keep = inside
        elif KIND == 1:
            bit = row * D + column
            byte = tl.load(mask_stream + (bit >> 3), mask=inside, other=0).to(tl.int32)
            keep = inside & (((byte >> (bit & 7).to(tl.int32)) & 1) != 0)
        else:
            # A group's columns read the same field: the caches have it after the first.
            mask = unit_mask(
                mask_stream,
                table,
                rest_table,
                row,
                column // GROUP,
                mask_bytes,
                O,
                D,
                KIND,
                GROUP,
                GROUP,
                FIELD_BITS,
            )
            keep = inside & (((mask >> (column % GROUP)) & 1) != 0)
        kept = keep.to(tl.int32)
        place = begin[:, None] + tl.cumsum(kept, 1) - kept
        w = kept_values(stored, place, keep, CODE_BITS)
        begin += tl.sum(kept, 1)
        if CODE_BITS > 0:
            at = row * GRIDS + column // GRID_SIZE
            scale = tl.load(scale_of + at, mask=inside, other=0.0)
            zero = tl.load(zero_of + at, mask=inside, other=0.0)
            w = tl.where(keep, scale * (w - zero), 0.0)
        tl.store(out + row * D + column, w.to(out.dtype.element_ty), mask=inside)
