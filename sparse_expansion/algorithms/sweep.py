"""The column sweep: SparseGPT is the sweep with a mask, GPTQ with a grid, both at once joint.

Shapes: K experts, D input features, O output features, B columns of a block. ``sweep`` is PyTorch
on any device and holds weights transposed, ``[K, D, O]``, so that a column is contiguous; what it
does inside a block of columns is compiled on a CPU, and Triton's on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from sparse_expansion.algorithms import admm, kernels
from sparse_expansion.algorithms.hessian import (
    HessianFactor,
    check_hessians,
    gram_into,
    upper_cholesky_factor,
)
from sparse_expansion.algorithms.pruning import (
    n_m_mask,
    saliency,
    score,
    score_mask,
    smallest_compiled,
    unstructured_mask,
)
from sparse_expansion.algorithms.quantization import AffineGrid, dequantize, quantize
from sparse_expansion.config import CompressionConfig, SparsityPattern

GATHERED_COLUMNS = 512
"""Columns that gather the changes of earlier ones in one product."""
FEW = 64
"""Rows that are summed in float32 at once, and then in float64; larger temporaries cost more."""
SKETCH_ROWS = 256
"""Rows that a weight's output energy is computed from where it has more."""


@dataclass(frozen=True)
class ExpertWeights:
    """K compressed copies of one dense weight."""

    weight_KOD: torch.Tensor
    """float32; exactly zero where not kept."""
    kept_KOD: torch.Tensor
    """bool; a kept weight may itself be zero (a dead feature, or a code on the zero point)."""
    codes_KOD: torch.Tensor | None
    """uint8 grid codes, None when not quantized; meaningless where not kept."""
    damping_fraction_K: tuple[float, ...]
    damping_attempts_K: tuple[int, ...]
    num_dead_K: tuple[int, ...]
    relative_error_K: tuple[float, ...]
    """``tr(E H E^T) / tr(W H W^T)`` with ``E = W - W_k``: the share of the outputs' energy that is
    lost on the expert's calibration tokens (whose energy is estimated, see ``_sketch``)."""


@dataclass(frozen=True)
class BlockGrid:
    """The rounding grid of a block's columns."""

    scale_KBO: torch.Tensor
    zero_point_KBO: torch.Tensor
    codes_KBO: torch.Tensor
    """uint8, a view like the weights; written."""
    max_code: int


@dataclass(frozen=True)
class Block:
    """A block of columns, transposed, as the sweep decides it."""

    W_KBO: torch.Tensor
    """float32, contiguous; overwritten with the result."""
    U_KBB: torch.Tensor
    """float32, upper: the block of the inverse Hessian's factor on the diagonal."""
    mask_KBO: torch.Tensor
    """bool, contiguous, True where pruned; filled by who decides for N:M."""
    errors_KBO: torch.Tensor
    """float32, contiguous; written."""
    group: int
    """M of N:M, 0 when the mask is given."""
    pruned: int
    """N of N:M."""
    grid: BlockGrid | None


def sweep(
    W_KDO: torch.Tensor,
    V_KDD: torch.Tensor,
    *,
    pattern: SparsityPattern,
    grid: AffineGrid | None,
    block_size: int,
    columns_KD: torch.Tensor | None = None,
    kept_KDO: torch.Tensor | None = None,
    compiled: bool | None = None,
    decide: Callable[[Block], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
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
        compiled: whether masks and columns are decided by compiled loops; by default on a CPU.
        decide: what decides a block's columns; by default the compiled loop, Triton's kernel on a
            GPU that has Triton, else ``decide_columns``.

    Returns:
        The mask of kept weights ``[K, D, O]`` (bool), the codes (uint8, or None), each expert's
        loss ``sum_j |e_j|^2``, which is ``tr(E (H + damping) E^T)`` exactly, and ``|E|^2``, where
        ``E`` is what was changed.
    """
    num_experts, width, rows = W_KDO.shape
    kept = torch.ones_like(W_KDO, dtype=torch.bool) if kept_KDO is None else kept_KDO
    codes = None if grid is None else torch.zeros_like(W_KDO, dtype=torch.uint8)
    if grid is None and pattern.num_kept(rows, width, block_size) == rows * width:
        return kept, None, W_KDO.new_zeros(num_experts), W_KDO.new_zeros(num_experts)
    loss_K = W_KDO.new_zeros(num_experts, dtype=torch.float64)
    change_K = torch.zeros_like(loss_K)
    n_m = pattern.group is not None and kept_KDO is None
    if compiled is None:
        compiled = not W_KDO.is_cuda
    if decide is None and compiled:
        decide = decide_compiled
    decide = decide or (_triton_decide() if W_KDO.is_cuda else None) or decide_columns
    eye = torch.eye(min(block_size, width), device=W_KDO.device)
    change_KDO = torch.empty_like(W_KDO)
    stride = block_size * max(1, GATHERED_COLUMNS // block_size)
    gathered_KSO = change_KDO
    base = 0
    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        count = stop - start
        # A copy: it is decided in place, and the difference to the original is kept.
        W1 = W_KDO[:, start:stop].clone(memory_format=torch.contiguous_format)
        U1 = torch.linalg.solve_triangular(
            V_KDD[:, start:stop, start:stop], eye[:count, :count], upper=True
        )
        # Several blocks gather together from all columns before them, and each for itself from
        # those between: wide products are faster.
        if start % stride == 0:
            base, end = start, min(start + stride, width)
            gathered_KSO = V_KDD[:, :base, base:end].transpose(1, 2) @ change_KDO[:, :base]
        if start:
            lost_KBO = gathered_KSO[:, start - base : stop - base]
            V_near = V_KDD[:, base:start, start:stop].transpose(1, 2)
            lost_KBO.baddbmm_(V_near, change_KDO[:, base:start])
            W1.baddbmm_(U1.transpose(1, 2), lost_KBO)
        diagonal_KB = U1.diagonal(dim1=1, dim2=2)
        errors = torch.empty_like(W1)
        mask = torch.zeros_like(W1, dtype=torch.bool)
        num_pruned = 0 if n_m else pattern.num_pruned(count * rows)
        if kept_KDO is not None:
            mask = ~kept_KDO[:, start:stop]
        elif num_pruned and compiled:
            smallest_compiled(W1, diagonal_KB, num_pruned, mask)
        elif num_pruned:
            mask = unstructured_mask(saliency(W1, diagonal_KB), num_pruned)
        block_grid = None
        if grid is not None:
            assert codes is not None
            columns = torch.arange(start, stop, device=W_KDO.device).expand(num_experts, -1)
            if columns_KD is not None:
                columns = columns_KD[:, start:stop]
            block_grid = BlockGrid(*grid.columns(columns), codes[:, start:stop], grid.max_code)
        group, pruned = (pattern.group or 0, pattern.pruned or 0) if n_m else (0, 0)
        decide(Block(W1, U1, mask, errors, group, pruned, block_grid))
        kept[:, start:stop] = ~mask
        loss_K += _energies(errors)
        torch.sub(W_KDO[:, start:stop], W1, out=change_KDO[:, start:stop])
        change_K += _energies(change_KDO[:, start:stop])
        W_KDO[:, start:stop] = W1
    return kept, codes, loss_K, change_K


def _energies(A_KBO: torch.Tensor) -> torch.Tensor:
    """Sums of squares of every expert's (contiguous) part."""
    return torch.stack([torch.dot(A_BO.reshape(-1), A_BO.reshape(-1)) for A_BO in A_KBO])


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


def _triton_decide() -> Callable[[Block], None] | None:
    """Triton's kernel, where Triton is installed."""
    try:
        from sparse_expansion.algorithms.triton_kernels import decide
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
        kernels.decide_block,
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
    tiles = -(-rows // kernels.TILE_ROWS)
    kernels.split(num_experts * tiles, 1, work, least=1)
    if block.grid is not None:
        block.grid.codes_KBO.copy_(codes_KBO)


def compress_experts(
    W_OD: torch.Tensor,
    H_KDD: torch.Tensor,
    config: CompressionConfig,
    grid: AffineGrid | None,
) -> ExpertWeights:
    """Make one expert of ``W_OD`` for each Hessian of ``H_KDD``.

    Args:
        W_OD: the dense weight, any floating dtype.
        H_KDD: float32 Hessian sums, one per expert.
        config: sparsity, quantization, block size, damping.
        grid: the dense weight's grid when quantizing, else None.

    Raises:
        CompressionError: a Hessian is not finite or cannot be factored.
    """
    return compress_linears({"": W_OD}, H_KDD, config, {"": grid})[""]


def compress_linears(
    weights: dict[str, torch.Tensor],
    H_KDD: torch.Tensor,
    config: CompressionConfig,
    grids: dict[str, AffineGrid | None],
    *,
    cross_KDD: torch.Tensor | None = None,
    compiled: bool | None = None,
) -> dict[str, ExpertWeights]:
    """``compress_experts`` for several linears that share their inputs, factored once.

    Args:
        weights: dense weights ``[O, D]`` by name; O may differ, D may not.
        H_KDD: as in ``compress_experts``.
        config: as in ``compress_experts``.
        grids: a grid, or None, for every name.
        cross_KDD: ``sum d x^T`` of every expert, where ``W (x + d)`` is what its outputs are to
            be, None where that is ``W x``: see ``_made_up``.
        compiled: as in ``sweep``.
    """
    if config.pruner in ("wanda", "magnitude"):
        return {
            name: _pruned_by_score(W_OD.float(), H_KDD, config) for name, W_OD in weights.items()
        }
    num_experts = H_KDD.shape[0]
    H_original_KDD = H_KDD
    order_KD: torch.Tensor | None = None
    if config.act_order:
        diagonal = H_KDD.diagonal(dim1=1, dim2=2)
        order_KD = torch.argsort(diagonal, dim=1, descending=True, stable=True)
        H_KDD = _reordered(H_KDD, order_KD)
        cross_KDD = None if cross_KDD is None else _reordered(cross_KDD, order_KD)
    factor: HessianFactor | None = None
    if config.pruner == "sparsegpt" or config.bits is not None or cross_KDD is not None:
        factor = upper_cholesky_factor(H_KDD, damping_fraction=config.damping_fraction)
    else:
        check_hessians(H_KDD)
    dead_KD = H_KDD.diagonal(dim1=1, dim2=2) == 0
    dead_K = tuple(int(n) for n in dead_KD.sum(dim=1))
    result = {}
    for name, W_OD in weights.items():
        rows, width = W_OD.shape
        W_KDO = W_OD.float().T.contiguous().expand(num_experts, -1, -1).clone()
        if order_KD is not None:
            W_KDO = W_KDO.gather(1, order_KD[:, :, None].expand_as(W_KDO))
        if any(dead_K):
            W_KDO.masked_fill_(dead_KD[:, :, None], 0)
        kept_KDO = codes_KDO = lost_K = None
        if cross_KDD is not None:
            assert factor is not None
            W_KDO = _made_up(W_KDO, cross_KDD, factor)
        # Of use to the solver alone, which makes new weights; the sweep works in place.
        target_KDO = W_KDO
        if config.pruner == "admm":
            W_KDO, kept_KDO = admm.solve(
                W_KDO,
                H_KDD,
                pattern=config.sparsity,
                num_pruned=rows * width - config.sparsity.num_kept(rows, width, config.block_size),
                damping_fraction=config.damping_fraction,
                iterations=config.solver_iterations,
            )
        if config.pruner == "sparsegpt" or grids[name] is not None:
            assert factor is not None
            kept_KDO, codes_KDO, loss_K, change_K = sweep(
                W_KDO,
                factor.factor_KDD,
                pattern=config.sparsity,
                grid=grids[name],
                block_size=config.block_size,
                columns_KD=order_KD,
                kept_KDO=kept_KDO,
                compiled=compiled,
            )
            lost_K = loss_K - factor.damping_K * change_K
        assert kept_KDO is not None
        W_KOD, kept = W_KDO.transpose(1, 2).contiguous(), kept_KDO.transpose(1, 2).contiguous()
        codes = None if codes_KDO is None else codes_KDO.transpose(1, 2).contiguous()
        if order_KD is not None:
            back = torch.argsort(order_KD, dim=1)[:, None].expand_as(W_KOD)
            W_KOD, kept = W_KOD.gather(2, back), kept.gather(2, back)
            codes = None if codes is None else codes.gather(2, back)
        if config.pruner == "admm":
            # The sweep's loss is against what the solver found, not against its target.
            lost_K = _lost(target_KDO.mT, W_KDO.mT, H_KDD)
        assert lost_K is not None
        result[name] = ExpertWeights(
            weight_KOD=W_KOD,
            kept_KOD=kept,
            codes_KOD=codes,
            damping_fraction_K=(config.damping_fraction,) * num_experts
            if factor is None
            else factor.damping_fraction_K,
            damping_attempts_K=(1,) * num_experts if factor is None else factor.attempts_K,
            num_dead_K=dead_K,
            relative_error_K=_relative_errors(W_OD.float(), H_original_KDD, lost_K),
        )
    return result


def _pruned_by_score(
    W_OD: torch.Tensor, H_KDD: torch.Tensor, config: CompressionConfig
) -> ExpertWeights:
    """Experts whose kept weights are the dense ones; nothing is factored."""
    num_experts = H_KDD.shape[0]
    kept = torch.stack(
        [
            ~score_mask(
                score(config.pruner, W_OD, H_DD),
                config.sparsity,
                config.block_size,
                by_row=config.pruner == "wanda",
            )
            for H_DD in H_KDD
        ]
    )
    weight_KOD = W_OD * kept
    dead_K = (H_KDD.diagonal(dim1=1, dim2=2) == 0).sum(dim=1)
    return ExpertWeights(
        weight_KOD=weight_KOD,
        kept_KOD=kept,
        codes_KOD=None,
        damping_fraction_K=(0.0,) * num_experts,
        damping_attempts_K=(0,) * num_experts,
        num_dead_K=tuple(int(n) for n in dead_K),
        relative_error_K=_relative_errors(
            W_OD, H_KDD, _lost(W_OD.expand_as(weight_KOD), weight_KOD, H_KDD)
        ),
    )


def _reordered(H_KDD: torch.Tensor, order_KD: torch.Tensor) -> torch.Tensor:
    return torch.stack([H[order][:, order] for H, order in zip(H_KDD, order_KD, strict=True)])


def _made_up(W_KDO: torch.Tensor, cross_KDD: torch.Tensor, factor: HessianFactor) -> torch.Tensor:
    """The dense weight that does best on inputs which differ from the dense block's.

    Least squares of ``|W (x + d) - V x|^2`` with a pull towards ``W``, the factor's damping:
    ``V = W + W (sum d x^T) (H + damping)^-1``. What no weight can do is the same for all of them:
    compressing ``V`` on ``H`` is compressing ``W`` on both.
    """
    wanted_KDO = cross_KDD.mT @ W_KDO
    half_KDO = torch.linalg.solve_triangular(factor.factor_KDD, wanted_KDO, upper=True)
    return W_KDO + torch.linalg.solve_triangular(factor.factor_KDD.mT, half_KDO, upper=False)


def _lost(target_KOD: torch.Tensor, weight_KOD: torch.Tensor, H_KDD: torch.Tensor) -> torch.Tensor:
    """``tr(E H E^T)`` of every expert, by its product."""
    found = []
    for target_OD, weight_OD, H_DD in zip(target_KOD, weight_KOD, H_KDD, strict=True):
        E_OD = target_OD - weight_OD
        found.append(((E_OD @ H_DD) * E_OD).sum(dtype=torch.float64))
    return torch.stack(found)


def _relative_errors(
    W_OD: torch.Tensor, H_KDD: torch.Tensor, lost_K: torch.Tensor
) -> tuple[float, ...]:
    """``tr(E H E^T) / tr(W H W^T)``; the energies take O(K D^2) operations instead of O(K O D^2).

    ``tr(W H W^T) = <W^T W, H>`` shares one product, of a sketch of W where it has many rows: see
    ``_sketch``.

    Args:
        W_OD: the dense weight, float32.
        H_KDD: Hessian sums.
        lost_K: ``tr(E H E^T)``. The sweep's loss counts the damping as if it were data: it is its
            loss less ``damping |E|^2``, without dead columns, which reach no output.
    """
    gram_DD = W_OD.new_empty(W_OD.shape[1], W_OD.shape[1])
    gram_into(_sketch(W_OD), gram_DD)
    errors = []
    for H_DD, lost in zip(H_KDD, lost_K.tolist(), strict=True):
        energy = sum(
            _dot(gram, H) for gram, H in zip(gram_DD.split(FEW), H_DD.split(FEW), strict=True)
        )
        errors.append(max(0.0, lost) / energy if energy > 0 else 0.0)
    return tuple(errors)


def _dot(A: torch.Tensor, B: torch.Tensor) -> float:
    """``sum A B`` of a few rows, in float32."""
    return float(torch.dot(A.reshape(-1), B.reshape(-1)))


def _sketch(W_OD: torch.Tensor) -> torch.Tensor:
    """At most ``SKETCH_ROWS`` rows V with ``tr(V H V^T)`` close to ``tr(W H W^T)`` for any H.

    Random signed sums of all rows (Hutchinson's estimator). Every row's own energy counts in full,
    so a few rows with most of the energy do no harm; the standard deviation comes from products of
    different rows alone and is at most ``sqrt(2 / SKETCH_ROWS)`` of the trace, 9 %: all rows equal.
    """
    rows = W_OD.shape[0]
    if rows <= SKETCH_ROWS:
        return W_OD
    generator = torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(0, 2, (SKETCH_ROWS, rows), generator=generator) - 1
    return (signs.to(W_OD) / SKETCH_ROWS**0.5) @ W_OD
