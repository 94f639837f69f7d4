"""What decides a block of columns: PyTorch's own loop, a compiled one, or Triton's kernel.

Shapes: K experts, O output features, B columns of a block, as in ``Block``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from sparse_expansion.algorithms.block import Block
from sparse_expansion.algorithms.kernels import decide as decide_kernels
from sparse_expansion.algorithms.kernels import threads
from sparse_expansion.algorithms.masks import n_m_mask, saliency
from sparse_expansion.algorithms.quantization import dequantize, quantize


def default_decide(compiled: bool, is_cuda: bool) -> Callable[[Block], None]:
    """What decides a block's columns unless the caller says so."""
    if compiled:
        return decide_compiled
    return (triton_decide() if is_cuda else None) or decide_columns


def triton_decide() -> Callable[[Block], None] | None:
    """Triton's kernel, where Triton is installed."""
    try:
        from sparse_expansion.algorithms.kernels.triton_decide import decide
    except ImportError:
        return None
    return decide


def decide_compiled(block: Block) -> None:
    """Decide a block's columns in place by a compiled loop over tiles of rows, on a CPU."""
    num_experts, _, rows = block.W_KBO.shape
    scale = zero_point = np.zeros((0, 0, 0), dtype=np.float32)
    codes_KBO = torch.zeros((0, 0, 0), dtype=torch.uint8)
    max_code = 0
    if block.grid is not None:
        scale = block.grid.scale_KBO.contiguous().numpy()
        zero_point = block.grid.zero_point_KBO.contiguous().numpy()
        codes_KBO = torch.empty(block.W_KBO.shape, dtype=torch.uint8)
        max_code = block.grid.max_code
    work = partial(
        decide_kernels.decide_block,
        block.W_KBO.numpy(),
        block.U_KBB.contiguous().numpy(),
        block.mask_KBO.numpy().view(np.uint8),
        block.group,
        block.pruned,
        scale,
        zero_point,
        max_code,
        codes_KBO.numpy(),
        block.errors_KBO.numpy(),
    )
    tiles = -(-rows // decide_kernels.TILE_ROWS)
    threads.split(num_experts * tiles, 1, work, least=1)
    if block.grid is not None:
        block.grid.codes_KBO.copy_(codes_KBO)


def decide_columns(block: Block) -> None:
    """Decide a block's columns in place, by PyTorch's own operations."""
    W_KBO, U_KBB, grid = block.W_KBO, block.U_KBB, block.grid
    count = W_KBO.shape[1]
    diagonal_KB = U_KBB.diagonal(dim1=1, dim2=2)
    for j in range(count):
        if block.group and j % block.group == 0:
            end = min(j + block.group, count)
            block.mask_KBO[:, j:end] = n_m_mask(
                saliency(W_KBO[:, j:end], diagonal_KB[:, j:end]),
                (end - j) * block.pruned // block.group,
            )
        w_KO = q_KO = W_KBO[:, j]
        if grid is not None:
            scale_KO, zero_KO = grid.scale_KBO[:, j], grid.zero_point_KBO[:, j]
            code = quantize(w_KO, scale_KO, zero_KO, grid.max_code)
            grid.codes_KBO[:, j] = code.to(torch.uint8)
            q_KO = dequantize(code, scale_KO, zero_KO)
        q_KO = q_KO.masked_fill(block.mask_KBO[:, j], 0)
        error = (w_KO - q_KO) / diagonal_KB[:, j, None]
        if j + 1 < count:
            W_KBO[:, j + 1 :].sub_(U_KBB[:, j, j + 1 :, None] * error[:, None])
        block.errors_KBO[:, j] = error
        W_KBO[:, j] = q_KO
