"""A block of the sweep's columns on a GPU, in a few launches.

PyTorch's operations would be launched some thousand times for a block of 128 columns. Here a few
columns at a time stay in registers, all of a row in one thread, while they are decided one after
another: no thread waits for another. Columns after them get their errors by one product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparse_expansion.algorithms.block import Block

STRIP = 16
"""Columns that are decided in one launch, unless a group of N:M has more."""
ROWS = 32
"""Rows of a program, which is a single warp: one a thread."""
_STRIDES = ("W", "U", "mask", "grid", "codes", "errors")


# Were it known that sizes are multiples of sixteen, a thread would load several rows at once, and
# the columns of a row would be shared out among threads.
@triton.jit(
    do_not_specialize=["rows", "start", "columns", "U_row", *(f"{one}_expert" for one in _STRIDES)]
)
def decide_strip(  # type: ignore[no-untyped-def]
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
    start,
    columns,
    max_code,
    GROUP: tl.constexpr,
    PRUNED: tl.constexpr,
    IS_QUANTIZED: tl.constexpr,
    STRIP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Decide so many columns from a first one on, of a tile of rows of one expert.

    Arrays are ``[columns, rows]`` for every expert, and those of two experts ``*_expert`` apart.
    """
    expert = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, STRIP)
    place = column[:, None] * rows + row[None, :]
    inside = (column[:, None] < columns) & (row[None, :] < rows)
    first = start.to(tl.int64) * rows
    W += expert * W_expert + first
    U += expert * U_expert + start * (U_row + 1)
    mask += expert * mask_expert + first
    errors += expert * errors_expert + first
    scale += expert * grid_expert + first
    zero_point += expert * grid_expert + first
    codes += expert * codes_expert + first
    w = tl.load(W + place, mask=inside, other=0.0)
    keep = tl.load(mask + place, mask=inside, other=1) == 0
    diagonal = tl.load(U + column * (U_row + 1), mask=column < columns, other=1.0)
    for j in tl.static_range(STRIP):
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
        # One number of each sum is not zero: this reads column j. As whole numbers they are added
        # without an instruction, since which of them are zero is known when this is compiled.
        w_j = tl.sum(tl.where(here, w.to(tl.int32, bitcast=True), 0), axis=0)
        w_j = w_j.to(tl.float32, bitcast=True)
        # For every row: the interpreter takes no single truth value for a mask.
        has_weight = (row < rows) & (row * 0 + j < columns)
        keep_j = tl.sum(tl.where(here, keep.to(tl.int32), 0), axis=0) != 0
        q = w_j
        if IS_QUANTIZED:
            s = tl.load(scale + j * rows + row, mask=has_weight, other=1.0)
            z = tl.load(zero_point + j * rows + row, mask=has_weight, other=0.0)
            # Half to even, as PyTorch rounds.
            ratio_j = w_j / s
            low = tl.floor(ratio_j)
            rest = ratio_j - low
            odd = low - 2.0 * tl.floor(low * 0.5)
            up = tl.where(rest > 0.5, 1.0, tl.where(rest == 0.5, odd, 0.0))
            code = tl.minimum(tl.maximum(low + up + z, 0.0), max_code)
            tl.store(codes + j * rows + row, code.to(tl.uint8), mask=has_weight)
            q = s * (code - z)
        q = tl.where(keep_j, q, 0.0)
        error = (w_j - q) / tl.load(U + j * (U_row + 1), mask=j < columns, other=1.0)
        tl.store(errors + j * rows + row, error, mask=has_weight)
        factor = tl.load(U + j * U_row + column, mask=(column > j) & (column < columns), other=0.0)
        later = w - factor[:, None] * error[None, :]
        w = tl.where(here, q[None, :], tl.where(column[:, None] > j, later, w))
    tl.store(W + place, w, mask=inside)
    tl.store(mask + place, (keep == 0).to(tl.int8), mask=inside)


def decide(block: Block) -> None:
    """Decide a block's columns in place."""
    experts, columns, rows = block.W_KBO.shape
    strip = STRIP if not block.group else block.group * max(1, STRIP // block.group)
    W, U, errors = block.W_KBO, block.U_KBB.contiguous(), block.errors_KBO
    mask, grid = block.mask_KBO.view(torch.int8), block.grid
    # What is not used still needs a pointer.
    scale = zero_point = codes = W.new_empty(1, 1, 1)
    if grid is not None:
        scale, zero_point = grid.scale_KBO.contiguous(), grid.zero_point_KBO.contiguous()
        codes = torch.empty_like(W, dtype=torch.uint8)
    for start in range(0, columns, strip):
        end = min(start + strip, columns)
        decide_strip[(experts, triton.cdiv(rows, ROWS))](
            W,
            U,
            mask,
            scale,
            zero_point,
            codes,
            errors,
            W.stride(0),
            U.stride(0),
            U.stride(1),
            mask.stride(0),
            scale.stride(0),
            codes.stride(0),
            errors.stride(0),
            rows,
            start,
            end - start,
            0.0 if grid is None else float(grid.max_code),
            GROUP=block.group,
            PRUNED=block.pruned,
            IS_QUANTIZED=grid is not None,
            STRIP=max(STRIP, triton.next_power_of_2(strip)),
            ROWS=ROWS,
            num_warps=1,
        )
        if end < columns:
            lost = U[:, start:end, end:].transpose(1, 2)
            W[:, end:].baddbmm_(lost, errors[:, start:end], alpha=-1)
    if grid is not None:
        grid.codes_KBO.copy_(codes)
