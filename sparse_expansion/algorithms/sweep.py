"""The column sweep: SparseGPT is the sweep with a mask, GPTQ with a grid, both at once joint.

Shapes: K experts, D input features, O output features, B columns of a block, S columns of several
blocks. ``sweep`` is PyTorch on any device and holds weights transposed, ``[K, D, O]``, so that a
column is contiguous; what it does inside a block of columns is compiled on a CPU, and Triton's on a
GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from sparse_expansion.algorithms.block import Block, BlockGrid
from sparse_expansion.algorithms.decide import default_decide
from sparse_expansion.algorithms.masks import saliency, smallest_compiled, unstructured_mask
from sparse_expansion.algorithms.products import LeftFactor
from sparse_expansion.algorithms.quantization import AffineGrid
from sparse_expansion.config import AUTO_PRODUCTS, SparsityPattern

GATHERED_COLUMNS = 512
"""Columns that gather the changes of earlier ones in one product."""


class SweepResult(NamedTuple):
    """What a sweep found beside the weights, which it writes in place."""

    kept_KDO: torch.Tensor
    """bool, which weights are kept."""
    codes_KDO: torch.Tensor | None
    """uint8 codes of the grid, None without one."""
    loss_K: torch.Tensor
    """``sum_j |e_j|^2`` of every expert, which is ``tr(E (H + damping) E^T)`` exactly, where ``E``
    is what was changed."""
    change_K: torch.Tensor
    """``|E|^2`` of every expert."""


def sweep(
    W_KDO: torch.Tensor,
    V_KDD: torch.Tensor,
    *,
    pattern: SparsityPattern,
    grid: AffineGrid | None,
    block_size: int,
    columns_KD: torch.Tensor | None = None,
    kept_KDO: torch.Tensor | None = None,
    products: str = AUTO_PRODUCTS,
    compiled: bool | None = None,
    decide: Callable[[Block], None] | None = None,
) -> SweepResult:
    """One pass over the columns, in place: mask, round, and push the error onward.

    For column ``j`` of a block: ``q_j`` is ``w_j`` masked and rounded,
    ``e_j = (w_j - q_j) / U_jj``, and every later column ``i`` of the block becomes
    ``w_i - e_j U_ji``. arXiv 2301.00774, Algorithm 1; arXiv 2210.17323, Algorithm 1.

    There, a block's errors are pushed onto all columns after it, which takes the whole of ``U``.
    Here a block gathers what the columns before it lost when its turn comes: with ``H = V V^T``
    and ``d`` the changes so far, the best it can do is ``w + (d V) U``, where ``V`` is the factor
    from all earlier columns to the block's, and ``U`` the inverse of its block on the diagonal.
    The numbers are the same, and ``V`` need not be inverted.

    Args:
        W_KDO: float32 weights, transposed; overwritten with the result.
        V_KDD: upper factors of the damped Hessians, ``H = V V^T``.
        pattern: zeros per block of ``block_size`` columns over all rows (exact count), or N:M.
        grid: rounding grid of the dense weight, None to prune only.
        block_size: columns per block; the last block may be shorter.
        columns_KD: original index of every (reordered) column, None when in order.
        kept_KDO: the mask where it is given: weights are only rounded then.
        products: how wide products are taken, see the module ``products``.
        compiled: whether masks and columns are decided by compiled loops; by default on a CPU.
        decide: what decides a block's columns; by default the compiled loop, Triton's kernel on a
            GPU that has Triton, else ``decide_columns``.

    Returns:
        The mask of kept weights, the codes, and what was lost and changed.
    """
    num_experts, width, rows = W_KDO.shape
    kept = torch.ones_like(W_KDO, dtype=torch.bool) if kept_KDO is None else kept_KDO
    codes = None if grid is None else torch.zeros_like(W_KDO, dtype=torch.uint8)
    if grid is None and pattern.num_kept(rows, width, block_size) == rows * width:
        return SweepResult(kept, None, W_KDO.new_zeros(num_experts), W_KDO.new_zeros(num_experts))
    loss_K = W_KDO.new_zeros(num_experts, dtype=torch.float64)
    change_K = torch.zeros_like(loss_K)
    n_m = pattern.group is not None and kept_KDO is None
    group, pruned = (pattern.group or 0, pattern.pruned or 0) if n_m else (0, 0)
    if compiled is None:
        compiled = not W_KDO.is_cuda
    decide = decide or default_decide(compiled, W_KDO.is_cuda)
    eye = torch.eye(min(block_size, width), device=W_KDO.device)
    changes = _Changes(V_KDD, torch.empty_like(W_KDO), block_size, products)
    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        count = stop - start
        # A copy: it is decided in place, and the difference to the original is kept.
        W1 = W_KDO[:, start:stop].clone(memory_format=torch.contiguous_format)
        U1 = torch.linalg.solve_triangular(
            V_KDD[:, start:stop, start:stop], eye[:count, :count], upper=True
        )
        changes.compensate(W1, U1, start, stop)
        if kept_KDO is not None:
            mask = ~kept_KDO[:, start:stop]
        else:
            mask = _block_mask(W1, U1, 0 if n_m else pattern.num_pruned(count * rows), compiled)
        block_grid = _block_grid(grid, codes, columns_KD, start, stop)
        errors = torch.empty_like(W1)
        decide(Block(W1, U1, mask, errors, group, pruned, block_grid))
        kept[:, start:stop] = ~mask
        loss_K += _energies(errors)
        change_K += _energies(changes.record(W_KDO, W1, start, stop))
        W_KDO[:, start:stop] = W1
    return SweepResult(kept, codes, loss_K, change_K)


class _Changes:
    """What the columns decided so far lost, and what a later block makes up for."""

    def __init__(
        self, V_KDD: torch.Tensor, change_KDO: torch.Tensor, block_size: int, products: str
    ) -> None:
        self.V_KDD = V_KDD
        self.products = products
        self.change_KDO = change_KDO
        """Original minus result, written up to the columns decided so far."""
        self.stride = block_size * max(1, GATHERED_COLUMNS // block_size)
        self.base = 0
        self.gathered_KSO = change_KDO

    def compensate(self, W_KBO: torch.Tensor, U_KBB: torch.Tensor, start: int, stop: int) -> None:
        """Add to the block of columns ``start .. stop`` what makes up for those before it."""
        V_KDD, change_KDO = self.V_KDD, self.change_KDO
        # Several blocks gather together from all columns before them, and each for itself from
        # those between: wide products are faster.
        if start % self.stride == 0:
            self.base, end = start, min(start + self.stride, V_KDD.shape[1])
            earlier_KSD = V_KDD[:, :start, start:end].transpose(1, 2)
            self.gathered_KSO = LeftFactor(earlier_KSD, self.products).times(change_KDO[:, :start])
        if start:
            lost_KBO = self.gathered_KSO[:, start - self.base : stop - self.base]
            V_near = V_KDD[:, self.base : start, start:stop].transpose(1, 2)
            lost_KBO.baddbmm_(V_near, change_KDO[:, self.base : start])
            W_KBO.baddbmm_(U_KBB.transpose(1, 2), lost_KBO)

    def record(
        self, W_KDO: torch.Tensor, result_KBO: torch.Tensor, start: int, stop: int
    ) -> torch.Tensor:
        """Keep, and return, what was taken from the block of columns ``start .. stop``."""
        change_KBO = self.change_KDO[:, start:stop]
        torch.sub(W_KDO[:, start:stop], result_KBO, out=change_KBO)
        return change_KBO


def _block_mask(
    W_KBO: torch.Tensor, U_KBB: torch.Tensor, num_pruned: int, compiled: bool
) -> torch.Tensor:
    """The mask of a block (True where pruned) by its saliencies; empty for who decides N:M."""
    diagonal_KB = U_KBB.diagonal(dim1=1, dim2=2)
    if num_pruned and not compiled:
        return unstructured_mask(saliency(W_KBO, diagonal_KB), num_pruned)
    mask = torch.zeros_like(W_KBO, dtype=torch.bool)
    if num_pruned:
        smallest_compiled(W_KBO, diagonal_KB, num_pruned, mask)
    return mask


def _block_grid(
    grid: AffineGrid | None,
    codes_KDO: torch.Tensor | None,
    columns_KD: torch.Tensor | None,
    start: int,
    stop: int,
) -> BlockGrid | None:
    """The grid of the columns ``start .. stop``, which are looked up by their original index."""
    if grid is None or codes_KDO is None:
        return None
    if columns_KD is None:
        columns = torch.arange(start, stop, device=codes_KDO.device).expand(len(codes_KDO), -1)
    else:
        columns = columns_KD[:, start:stop]
    return BlockGrid(*grid.columns(columns), codes_KDO[:, start:stop], grid.max_code)


def _energies(A_KBO: torch.Tensor) -> torch.Tensor:
    """Sums of squares of every expert's (contiguous) part."""
    return torch.stack([torch.dot(A_BO.reshape(-1), A_BO.reshape(-1)) for A_BO in A_KBO])
