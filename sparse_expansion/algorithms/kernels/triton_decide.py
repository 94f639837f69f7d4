"""A block of the sweep's columns on a GPU in one launch: the only home of Triton.

PyTorch's operations would be launched some thousand times for a block of 128 columns. Here a tile
of rows stays in registers while its columns are decided one after another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparse_expansion.algorithms.block import Block

TILE_VALUES = 2048
"""Weights of a tile: four such arrays are in the registers of 128 threads. Twice as many are not:
some 350 bytes a thread went through memory for every column."""


@triton.jit
def decide_block(  # type: ignore[no-untyped-def]
    W,
    U,
    mask,
    scale,
    zero_point,
    codes,
    errors,
    W_expert,
    U_expert,
    U_row,
    mask_expert,
    grid_expert,
    codes_expert,
    errors_expert,
    rows,
    columns,
    max_code,
    GROUP: tl.constexpr,
    PRUNED: tl.constexpr,
    IS_QUANTIZED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Decide the columns of a tile of rows of one expert.

    Arrays are ``[columns, rows]`` for every expert, and those of two experts ``*_expert`` apart.
    """
    expert = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    place = column[:, None] * rows + row[None, :]
    inside = (column[:, None] < columns) & (row[None, :] < rows)
    W += expert * W_expert
    U += expert * U_expert
    mask += expert * mask_expert
    errors += expert * errors_expert
    w = tl.load(W + place, mask=inside, other=0.0)
    keep = tl.load(mask + place, mask=inside, other=1) == 0
    diagonal = tl.load(U + column * (U_row + 1), mask=column < columns, other=1.0)
    e = tl.zeros((BLOCK, ROWS), tl.float32)
    for j in range(0, columns):
        if GROUP > 0:
            if j % GROUP == 0:
                ratio = w / diagonal[:, None]
                end = tl.minimum(j + GROUP, columns)
                candidate = (column >= j) & (column < end)
                saliency = tl.where(candidate[:, None], ratio * ratio, float("inf"))
                for number in tl.static_range(PRUNED):
                    if number < (end - j) * PRUNED // GROUP:
                        smallest = tl.argmin(saliency, axis=0)
                        hit = column[:, None] == smallest[None, :]
                        keep = keep & (hit == 0)
                        saliency = tl.where(hit, float("inf"), saliency)
        here = column[:, None] == j
        # One term of each sum is not zero: this reads column j.
        w_j = tl.sum(tl.where(here, w, 0.0), axis=0)
        keep_j = tl.sum(tl.where(here & keep, 1, 0), axis=0) != 0
        q = w_j
        if IS_QUANTIZED:
            at = expert * grid_expert + j * rows + row
            s = tl.load(scale + at, mask=row < rows, other=1.0)
            z = tl.load(zero_point + at, mask=row < rows, other=0.0)
            # Half to even, as PyTorch rounds.
            ratio_j = w_j / s
            low = tl.floor(ratio_j)
            rest = ratio_j - low
            odd = low - 2.0 * tl.floor(low * 0.5)
            up = tl.where(rest > 0.5, 1.0, tl.where(rest == 0.5, odd, 0.0))
            code = tl.minimum(tl.maximum(low + up + z, 0.0), max_code)
            tl.store(
                codes + expert * codes_expert + j * rows + row, code.to(tl.uint8), mask=row < rows
            )
            q = s * (code - z)
        q = tl.where(keep_j, q, 0.0)
        error = (w_j - q) / tl.load(U + j * (U_row + 1))
        factor = tl.load(U + j * U_row + column, mask=(column > j) & (column < columns), other=0.0)
        w = tl.where(here, q[None, :], w - factor[:, None] * error[None, :])
        e = tl.where(here, error[None, :], e)
    tl.store(W + place, w, mask=inside)
    tl.store(errors + place, e, mask=inside)
    tl.store(mask + place, (keep == 0).to(tl.int8), mask=inside)


def decide(block: Block) -> None:
    """Decide a block's columns in place."""
    experts, columns, rows = block.W_KBO.shape
    padded = max(16, triton.next_power_of_2(columns))
    tile = max(4, TILE_VALUES // padded)
    W, U = block.W_KBO, block.U_KBB.contiguous()
    grid = block.grid
    # What is not used still needs a pointer.
    scale = zero_point = codes = W.new_empty(1, 1, 1)
    if grid is not None:
        scale, zero_point = grid.scale_KBO.contiguous(), grid.zero_point_KBO.contiguous()
        codes = torch.empty_like(W, dtype=torch.uint8)
    decide_block[(experts, triton.cdiv(rows, tile))](
        W,
        U,
        block.mask_KBO.view(torch.int8),
        scale,
        zero_point,
        codes,
        block.errors_KBO,
        W.stride(0),
        U.stride(0),
        U.stride(1),
        block.mask_KBO.stride(0),
        scale.stride(0),
        codes.stride(0),
        block.errors_KBO.stride(0),
        rows,
        columns,
        0.0 if grid is None else float(grid.max_code),
        GROUP=block.group,
        PRUNED=block.pruned,
        IS_QUANTIZED=grid is not None,
        BLOCK=padded,
        ROWS=tile,
    )
    if grid is not None:
        grid.codes_KBO.copy_(codes)
