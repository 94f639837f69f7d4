"""One product over experts on a GPU: every token with its own expert's dense weight."""

from __future__ import annotations

import triton
import triton.language as tl

TILE_TOKENS, TILE_ROWS, TILE_COLUMNS = 64, 128, 64
"""Tokens, rows of the weight, and columns of both that a program multiplies at a time."""


@triton.jit
def multiply_grouped(  # type: ignore[no-untyped-def]
    X,
    W,
    out,
    bias,
    order,
    ends,
    first,
    count,
    O: tl.constexpr,  # noqa: E741 - the number of rows, as everywhere
    D: tl.constexpr,
    BIAS_STRIDE: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Write ``X W_k^T`` of the tokens of experts ``first`` to ``first + count - 1``.

    ``X`` is ``[tokens, D]``, ``W [count, O, D]``, ``out [tokens, O]``. ``order`` sorts tokens by
    expert, ``ends [all experts]`` (int64) is where each one's tokens end. Experts' biases are
    ``BIAS_STRIDE`` apart, 0 where they share one; there are none where it is below 0. A program
    finds the expert and tile that it is for by itself; there are more programs than tiles.
    """
    each = tl.arange(0, EXPERTS)
    known = each < count
    end = tl.load(ends + first + each, mask=known, other=0)
    begin = tl.load(ends + first + each - 1, mask=known & (first + each > 0), other=0)
    tiles = tl.where(known, (end - begin + TILE_TOKENS - 1) // TILE_TOKENS, 0)
    until = tl.cumsum(tiles, 0)
    program = tl.program_id(0)
    expert = tl.sum((until <= program).to(tl.int32), 0)
    if expert >= EXPERTS:
        return
    mine = each == expert
    tile = program - tl.sum(tl.where(mine, until - tiles, 0), 0)
    begin_here = tl.sum(tl.where(mine, begin, 0), 0)
    end_here = tl.sum(tl.where(mine, end, 0), 0)
    place = begin_here + tile * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    has_token = place < end_here
    token = tl.load(order + place, mask=has_token, other=0).to(tl.int64)
    row = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    has_row = row < O
    W += expert.to(tl.int64) * O * D
    total = tl.zeros((TILE_TOKENS, TILE_ROWS), tl.float32)
    for start in range(0, D, TILE_COLUMNS):
        column = start + tl.arange(0, TILE_COLUMNS)
        has_column = column < D
        x = tl.load(
            X + token[:, None] * D + column[None, :],
            mask=has_token[:, None] & has_column[None, :],
            other=0.0,
        )
        w = tl.load(
            W + row[:, None].to(tl.int64) * D + column[None, :],
            mask=has_row[:, None] & has_column[None, :],
            other=0.0,
        )
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    if BIAS_STRIDE >= 0:
        bias += (first + expert) * BIAS_STRIDE
        total += tl.load(bias + row, mask=has_row, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + token[:, None] * O + row[None, :],
        total.to(out.dtype.element_ty),
        mask=has_token[:, None] & has_row[None, :],
    )
