"""The column sweep: SparseGPT is the sweep with a mask, GPTQ with a grid, both at once joint.

Shapes: K experts, D input features, O output features, B columns of a block. Inside the sweep a
weight is held transposed, ``[K, D, O]``, so that a column is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparse_expansion.algorithms.hessian import inverse_cholesky_factor
from sparse_expansion.algorithms.pruning import n_m_mask, saliency, unstructured_mask
from sparse_expansion.algorithms.quantization import AffineGrid, dequantize, quantize
from sparse_expansion.config import CompressionConfig, SparsityPattern


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
    lost on the expert's calibration tokens."""


def sweep(
    W_KDO: torch.Tensor,
    U_KDD: torch.Tensor,
    *,
    pattern: SparsityPattern,
    grid: AffineGrid | None,
    block_size: int,
    columns_KD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """One pass over the columns, in place: mask, round, and push the error onward.

    For column ``j`` of a block: ``q_j`` is ``w_j`` masked and rounded,
    ``e_j = (w_j - q_j) / U_jj``, and every later column ``i`` of the block becomes
    ``w_i - e_j U_ji``; the columns after the block get all of its errors in one product
    ("lazy batch updates"). arXiv 2301.00774, Algorithm 1; arXiv 2210.17323, Algorithm 1.

    Args:
        W_KDO: float32 weights, transposed; overwritten with the result.
        U_KDD: upper factors of the inverse damped Hessians.
        pattern: zeros per block of ``block_size`` columns over all rows (exact count), or N:M.
        grid: rounding grid of the dense weight, None to prune only.
        block_size: columns per block; the last block may be shorter.
        columns_KD: original index of every (reordered) column, None when in order.

    Returns:
        The mask of kept weights ``[K, D, O]`` (bool), the codes (uint8, or None), and each
        expert's loss ``sum_j |e_j|^2``, which is ``tr(E (H + damping) E^T)`` exactly.
    """
    num_experts, width, rows = W_KDO.shape
    kept = torch.ones_like(W_KDO, dtype=torch.bool)
    codes = None if grid is None else torch.zeros_like(W_KDO, dtype=torch.uint8)
    if grid is None and pattern.num_kept(rows, width, block_size) == rows * width:
        return kept, None, W_KDO.new_zeros(num_experts)
    loss_K = W_KDO.new_zeros(num_experts, dtype=torch.float64)
    n_m = pattern.group is not None
    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        count = stop - start
        W1 = W_KDO[:, start:stop]
        U1 = U_KDD[:, start:stop, start:stop]
        diagonal_KB = U1.diagonal(dim1=1, dim2=2)
        errors = torch.empty_like(W1)
        mask = torch.zeros_like(W1, dtype=torch.bool)
        if not n_m:
            mask = unstructured_mask(saliency(W1, diagonal_KB), pattern.num_pruned(count * rows))
        if grid is not None:
            columns = torch.arange(start, stop, device=W_KDO.device).expand(num_experts, -1)
            if columns_KD is not None:
                columns = columns_KD[:, start:stop]
            scale_KBO, zero_KBO = grid.columns(columns)
        for j in range(count):
            if n_m and pattern.group and pattern.pruned is not None and j % pattern.group == 0:
                end = min(j + pattern.group, count)
                mask[:, j:end] = n_m_mask(
                    saliency(W1[:, j:end], diagonal_KB[:, j:end]),
                    (end - j) * pattern.pruned // pattern.group,
                )
            w_KO = W1[:, j]
            if grid is None:
                q_KO = w_KO.masked_fill(mask[:, j], 0)
            else:
                assert codes is not None
                code = quantize(w_KO, scale_KBO[:, j], zero_KBO[:, j], grid.max_code)
                codes[:, start + j] = code.to(torch.uint8)
                q_KO = dequantize(code, scale_KBO[:, j], zero_KBO[:, j])
                q_KO = q_KO.masked_fill(mask[:, j], 0)
            error = (w_KO - q_KO) / diagonal_KB[:, j, None]
            if j + 1 < count:
                W1[:, j + 1 :].sub_(U1[:, j, j + 1 :, None] * error[:, None])
            errors[:, j] = error
            W1[:, j] = q_KO
        kept[:, start:stop] = ~mask
        loss_K += errors.square().sum(dim=(1, 2), dtype=torch.float64)
        if stop < width:
            W_KDO[:, stop:].baddbmm_(U_KDD[:, start:stop, stop:].transpose(1, 2), errors, alpha=-1)
    return kept, codes, loss_K


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
) -> dict[str, ExpertWeights]:
    """``compress_experts`` for several linears that share their inputs, factored once.

    Args:
        weights: dense weights ``[O, D]`` by name; O may differ, D may not.
        H_KDD: as in ``compress_experts``.
        config: as in ``compress_experts``.
        grids: a grid, or None, for every name.
    """
    num_experts = H_KDD.shape[0]
    H_original_KDD = H_KDD
    dead_KD = H_KDD.diagonal(dim1=1, dim2=2) == 0
    order_KD: torch.Tensor | None = None
    if config.act_order:
        diagonal = H_KDD.diagonal(dim1=1, dim2=2)
        order_KD = torch.argsort(diagonal, dim=1, descending=True, stable=True)
        H_KDD = torch.stack([H[order][:, order] for H, order in zip(H_KDD, order_KD, strict=True)])
    inverse = inverse_cholesky_factor(H_KDD, damping_fraction=config.damping_fraction)
    result = {}
    for name, W_OD in weights.items():
        W_KDO = W_OD.float().T.contiguous().expand(num_experts, -1, -1).clone()
        if order_KD is not None:
            W_KDO = W_KDO.gather(1, order_KD[:, :, None].expand_as(W_KDO))
        W_KDO.masked_fill_(inverse.dead_KD[:, :, None], 0)
        kept, codes, loss_K = sweep(
            W_KDO,
            inverse.factor_KDD,
            pattern=config.sparsity,
            grid=grids[name],
            block_size=config.block_size,
            columns_KD=order_KD,
        )
        if order_KD is not None:
            back = torch.argsort(order_KD, dim=1)[:, :, None].expand_as(W_KDO)
            W_KDO, kept = W_KDO.gather(1, back), kept.gather(1, back)
            codes = None if codes is None else codes.gather(1, back)
        weight_KOD = W_KDO.transpose(1, 2)
        result[name] = ExpertWeights(
            weight_KOD=weight_KOD,
            kept_KOD=kept.transpose(1, 2),
            codes_KOD=None if codes is None else codes.transpose(1, 2),
            damping_fraction_K=inverse.damping_fraction_K,
            damping_attempts_K=inverse.attempts_K,
            num_dead_K=tuple(int(n) for n in inverse.dead_KD.sum(dim=1)),
            relative_error_K=_relative_errors(
                W_OD.float(), weight_KOD, H_original_KDD, dead_KD, inverse.damping_K, loss_K
            ),
        )
    return result


def _relative_errors(
    W_OD: torch.Tensor,
    experts_KOD: torch.Tensor,
    H_KDD: torch.Tensor,
    dead_KD: torch.Tensor,
    damping_K: torch.Tensor,
    loss_K: torch.Tensor,
) -> tuple[float, ...]:
    """Relative output errors from the sweep's loss, at O(K D^2) instead of O(K O D^2).

    The loss counts the damping as if it were data: ``tr(E H E^T) = loss - damping |E|^2``, without
    the dead columns, which reach no output. ``tr(W H W^T) = <W^T W, H>`` shares one product.
    """
    gram_DD = W_OD.T @ W_OD
    errors = []
    for k, expert_OD in enumerate(experts_KOD):
        energy = float((gram_DD * H_KDD[k]).sum(dtype=torch.float64))
        delta = (W_OD - expert_OD).masked_fill_(dead_KD[k], 0)
        norm = float(delta.square().sum(dtype=torch.float64))
        lost = max(0.0, float(loss_K[k]) - float(damping_K[k]) * norm)
        errors.append(lost / energy if energy > 0 else 0.0)
    return tuple(errors)
