"""A few tokens through their experts on a GPU, straight from the stored streams."""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_expansion.algorithms.kernels.triton_streams import count_ones, kept_values, unit_mask

ROWS = 16
"""Rows of a program: each of its threads takes an input once for several of them."""
LANES = 32
"""Units of a row at a time: a warp's threads count the kept weights before theirs together."""
TOKENS = 4
"""Tokens of one expert that its weights are read once for."""


@triton.jit
def multiply_stored(  # type: ignore[no-untyped-def]
    X,
    experts,
    out,
    masks,
    values,
    starts,
    scales,
    zero_points,
    biases,
    table,
    rest_table,
    tokens,
    num_experts,
    mask_bytes,
    VALUE: tl.constexpr,
    BIAS: tl.constexpr,
    O: tl.constexpr,  # noqa: E741 - the number of rows, as everywhere
    D: tl.constexpr,
    KIND: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_KEPT: tl.constexpr,
    ROW_KEPT: tl.constexpr,
    FIELD_BITS: tl.constexpr,
    CODE_BITS: tl.constexpr,
    GRID_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """``W_k x`` of a tile of rows of one linear, for a token and the next ones of its expert.

    A program is started for every token, and does the work where no earlier token's program does.
    ``X`` is ``[tokens, D]``, ``experts [tokens]``, ``out [linears, tokens, O]``. ``masks``,
    ``values`` and ``biases`` (addresses by linear and expert), ``scales`` and ``zero_points``
    (addresses by linear) lead to the streams; ``starts [linears, experts, O]`` are the kept weights
    before every row of a bitmask. ``VALUE`` and ``BIAS`` are what is at the addresses.
    """
    token = tl.program_id(0)
    linear = tl.program_id(2)
    every = tl.arange(0, PADDED)
    expert = tl.load(experts + token)
    chosen = tl.load(experts + every, mask=every < tokens, other=-1)
    same = chosen == expert
    before = tl.sum((same & (every < token)).to(tl.int32), 0)
    if before % TOKENS != 0:
        return
    rank = tl.cumsum(same.to(tl.int32), 0) - 1
    count = tl.sum(same.to(tl.int32), 0) - before
    which = linear * num_experts + expert.to(tl.int32)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_long = row.to(tl.int64)
    inside = row < O
    stored = tl.load(values + which).to(tl.pointer_type(VALUE))
    mask_stream = tl.load(masks + which).to(tl.pointer_type(tl.uint8))
    if KIND == 1:
        begin = tl.load(starts + which.to(tl.int64) * O + row, mask=inside, other=0)
    else:
        begin = row * ROW_KEPT
    GRIDS: tl.constexpr = 1 if GRID_SIZE == 0 else (D + GRID_SIZE - 1) // GRID_SIZE
    scale = tl.zeros((ROWS, 1 if GRIDS == 1 else LANES), tl.float32)
    zero = scale
    if CODE_BITS > 0:
        scale_of = tl.load(scales + linear).to(tl.pointer_type(tl.float32))
        zero_of = tl.load(zero_points + linear).to(tl.pointer_type(tl.float32))
        grid_row = row[:, None] * GRIDS
        if GRIDS == 1:
            scale = tl.load(scale_of + grid_row, mask=inside[:, None], other=0.0)
            zero = tl.load(zero_of + grid_row, mask=inside[:, None], other=0.0)
    x0 = X + token.to(tl.int64) * D
    x1 = x0
    x2 = x0
    x3 = x0
    if TOKENS == 4:
        # Programs of tokens without a partner multiply another one's input in vain.
        x1 = X + _token_of(same, rank, every, before + 1, token) * D
        x2 = X + _token_of(same, rank, every, before + 2, token) * D
        x3 = X + _token_of(same, rank, every, before + 3, token) * D
    sum0 = tl.zeros((ROWS, LANES), tl.float32)
    sum1 = sum0
    sum2 = sum0
    sum3 = sum0
    for first in range(0, (D + UNIT - 1) // UNIT, LANES):
        unit = first + tl.arange(0, LANES)[None, :]
        mask = unit_mask(
            mask_stream,
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
        if KIND == 1:
            ones = count_ones(mask)
            place = begin[:, None] + tl.cumsum(ones, 1) - ones
            begin += tl.sum(ones, 1)
        elif KIND == 2:
            place = begin[:, None] + unit * (UNIT // GROUP * GROUP_KEPT)
        else:
            place = begin[:, None] + unit * UNIT
        if CODE_BITS > 0 and GRIDS > 1 and GRID_SIZE % UNIT == 0:
            at = grid_row + unit * UNIT // GRID_SIZE
            has_grid = inside[:, None] & (unit * UNIT < D)
            scale = tl.load(scale_of + at, mask=has_grid, other=0.0)
            zero = tl.load(zero_of + at, mask=has_grid, other=0.0)
        # Without a sign an address takes one instruction less.
        place = place.to(tl.uint32)
        for j in tl.static_range(UNIT):
            column = unit * UNIT + j
            keep = (mask & (1 << j)) != 0
            w = kept_values(stored, place, keep, CODE_BITS)
            if CODE_BITS > 0:
                if GRIDS > 1 and GRID_SIZE % UNIT != 0:
                    at = grid_row + column // GRID_SIZE
                    has_grid = inside[:, None] & (column < D)
                    scale = tl.load(scale_of + at, mask=has_grid, other=0.0)
                    zero = tl.load(zero_of + at, mask=has_grid, other=0.0)
                w = tl.where(keep, scale * (w - zero), 0.0)
            place = tl.where(keep, place + 1, place)
            sum0 += w * tl.load(x0 + column, mask=column < D, other=0.0).to(tl.float32)
            if TOKENS == 4:
                sum1 += w * tl.load(x1 + column, mask=column < D, other=0.0).to(tl.float32)
                sum2 += w * tl.load(x2 + column, mask=column < D, other=0.0).to(tl.float32)
                sum3 += w * tl.load(x3 + column, mask=column < D, other=0.0).to(tl.float32)
    bias = tl.zeros((ROWS,), tl.float32)
    if BIAS is not None:
        bias_of = tl.load(biases + which).to(tl.pointer_type(BIAS))
        bias = tl.load(bias_of + row, mask=inside, other=0.0).to(tl.float32)
    out += linear.to(tl.int64) * tokens * O + row
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(out + token.to(tl.int64) * O, (tl.sum(sum0, 1) + bias).to(dtype), inside)
    if TOKENS == 4:
        if count > 1:
            target = out + _token_of(same, rank, every, before + 1, token) * O
            tl.store(target, (tl.sum(sum1, 1) + bias).to(dtype), inside)
        if count > 2:
            target = out + _token_of(same, rank, every, before + 2, token) * O
            tl.store(target, (tl.sum(sum2, 1) + bias).to(dtype), inside)
        if count > 3:
            target = out + _token_of(same, rank, every, before + 3, token) * O
            tl.store(target, (tl.sum(sum3, 1) + bias).to(dtype), inside)


@triton.jit
def _token_of(same, rank, every, wanted, otherwise):  # type: ignore[no-untyped-def]
    """Index of the expert's token of that rank, or of ``otherwise`` where it has fewer (int64)."""
    hit = same & (rank == wanted)
    found = tl.sum(tl.where(hit, every, 0), 0)
    has_one = tl.sum(hit.to(tl.int32), 0) > 0
    return tl.where(has_one, found, otherwise).to(tl.int64)
