"""Experts' dense weights from their stored streams on a GPU, and the checks that come first."""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_expansion.algorithms.kernels.triton_streams import count_ones, kept_values, unit_mask

ROWS, UNITS = 1, 128
"""Rows of a program, and units of a row at a time, one for a thread: the more of a row is under way
at once, the less often the next part has to wait for the number of weights before it."""
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
    PADDED_UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A few rows of one expert a program: ``out [experts, O, D]``.

    ``masks``, ``values`` (addresses) and ``starts [experts, O]`` are those of the first expert of
    ``out`` and on. Experts without a token by ``sizes [experts]`` are left out where ``SKIPS``.
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
    out += expert.to(tl.int64) * O * D + row * D
    GRIDS: tl.constexpr = 1 if GRID_SIZE == 0 else (D + GRID_SIZE - 1) // GRID_SIZE
    # The columns of a unit, and of none where they are no power of two, are beside each other.
    place_in_unit = tl.arange(0, PADDED_UNIT)
    bits = place_in_unit[None, None, :]
    lanes = tl.arange(0, UNITS)
    for first in range(0, (D + UNIT - 1) // UNIT, UNITS):
        unit = first + lanes
        mask = unit_mask(
            mask_stream,
            table,
            rest_table,
            row,
            unit[None, :],
            mask_bytes,
            O,
            D,
            KIND,
            UNIT,
            GROUP,
            FIELD_BITS,
        )
        kept = tl.reshape((mask[:, :, None] >> bits) & 1, (ROWS, UNITS * PADDED_UNIT))
        column = unit[:, None] * UNIT + place_in_unit[None, :]
        is_column = (place_in_unit < UNIT)[None, :] & (column < D)
        column = tl.reshape(column, (1, UNITS * PADDED_UNIT))
        inside = (row < O) & tl.reshape(is_column, (1, UNITS * PADDED_UNIT))
        keep = kept != 0
        place = begin[:, None] + tl.cumsum(kept, 1) - kept
        w = kept_values(stored, place, keep, CODE_BITS)
        begin += tl.sum(kept, 1)
        if CODE_BITS > 0:
            at = row * GRIDS + column // GRID_SIZE
            scale = tl.load(scale_of + at, mask=inside, other=0.0)
            zero = tl.load(zero_of + at, mask=inside, other=0.0)
            w = tl.where(keep, scale * (w - zero), 0.0)
        tl.store(out + column, w.to(out.dtype.element_ty), mask=inside)
