"""ADMM, the alternating direction method of multipliers: mask and weights, found together.

V. Boza, "Fast and Effective Weight Update for Pruned Large Language Models" (arXiv 2401.02938). The
one-pass sweep decides a weight once and for all; here all weights are solved for, projected on the
allowed zeros, and solved for again, while the share of zeros rises to what was asked. With a grid
the column sweep then rounds what is kept.

Shapes: K experts, D input and O output features; weights are transposed, ``[K, D, O]``.
"""

from __future__ import annotations

import torch

from sparse_expansion.algorithms.masks import n_m_masks, smallest
from sparse_expansion.algorithms.pruners import sparsegpt
from sparse_expansion.algorithms.pruners.base import Problem, Pruner, Solution
from sparse_expansion.algorithms.sweep import sweep
from sparse_expansion.config import CompressionConfig, SparsityPattern

PENALTY = 1.0
"""Weight of staying close to the projection, where every input feature has unit energy."""
LAST_SHARE = 5
"""One of so many iterations comes after the mask is fixed."""


def solve(problem: Problem) -> Solution:
    """Solve for mask and weights; with a grid, sweep over the solution to round it."""
    config = problem.config
    weight_KDO, kept_KDO = solve_under_zeros(
        problem.target_KDO,
        problem.H_KDD,
        pattern=config.sparsity,
        num_pruned=problem.num_pruned,
        damping_fraction=config.damping_fraction,
        iterations=config.solver_iterations,
    )
    codes_KDO = None
    if problem.grid is not None:
        assert problem.factor is not None
        _, codes_KDO, _, _ = sweep(
            weight_KDO,
            problem.factor.factor_KDD,
            pattern=config.sparsity,
            grid=problem.grid,
            block_size=config.block_size,
            columns_KD=problem.columns_KD,
            kept_KDO=kept_KDO,
            compiled=problem.compiled,
        )
    # A sweep's loss is against what the solver found: what was lost of the target is found later.
    return Solution(
        weight_KDO=weight_KDO,
        kept_KDO=kept_KDO,
        codes_KDO=codes_KDO,
        damping_fraction=config.damping_fraction,
    )


def solve_under_zeros(
    W_KDO: torch.Tensor,
    H_KDD: torch.Tensor,
    *,
    pattern: SparsityPattern,
    num_pruned: int,
    damping_fraction: float,
    iterations: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimise ``tr((W - V) H (W - V)^T)`` over the ``V`` with the wanted zeros, approximately.

    With inputs scaled to unit energy, ``A = H + damping`` and ``rho = 1``, repeat

        V = (A + rho)^-1 (A W + rho (Z - U)),   Z = project(V + U),   U = U + V - Z

    where ``project`` keeps the largest entries. Their number falls along a cubic to what is asked;
    then the mask stays, and the last iterations bring the kept weights closer to the least squares
    under it. The inverse is made once.

    Args:
        W_KDO: float32, one matrix per expert; zero for features that no token used.
        H_KDD: finite float32 Hessian sums; not modified.
        pattern: unstructured or N:M.
        num_pruned: exact number of zeros of a matrix, where the pattern is unstructured.
        damping_fraction: share of every feature's own energy that is added to it.
        iterations: at least 1.

    Returns:
        The weights, exactly zero where pruned, and the mask of kept ones (bool).
    """
    energy_KD = H_KDD.diagonal(dim1=1, dim2=2)
    norm_KD1 = torch.where(energy_KD > 0, energy_KD, 1.0).sqrt()[:, :, None]
    A_KDD = (H_KDD / norm_KD1).div_(norm_KD1.mT)
    A_KDD.diagonal(dim1=1, dim2=2).fill_(1 + damping_fraction)
    V_KDO = W_KDO * norm_KD1
    B_KDO = A_KDD @ V_KDO
    A_KDD.diagonal(dim1=1, dim2=2).add_(PENALTY)
    for A_DD in A_KDD:
        A_DD.copy_(torch.cholesky_inverse(torch.linalg.cholesky(A_DD)))
    U_KDO = torch.zeros_like(V_KDO)
    pruned_KDO = torch.zeros_like(V_KDO, dtype=torch.bool)
    choosing = iterations - iterations // LAST_SHARE
    for iteration in range(iterations):
        V_KDO.add_(U_KDO)
        if iteration < choosing:
            share = 1 - (1 - (iteration + 1) / choosing) ** 3
            pruned_KDO = _smallest_allowed(V_KDO, pattern, num_pruned, share)
        # What the projection takes away is U; what it leaves, Z, is the rest.
        torch.mul(V_KDO, pruned_KDO, out=U_KDO)
        if iteration + 1 < iterations:
            V_KDO = A_KDD @ V_KDO.sub_(U_KDO, alpha=2).mul_(PENALTY).add_(B_KDO)
    return V_KDO.masked_fill_(pruned_KDO, 0).div_(norm_KD1), ~pruned_KDO


def _smallest_allowed(
    V_KDO: torch.Tensor, pattern: SparsityPattern, num_pruned: int, share: float
) -> torch.Tensor:
    """True where zero: a share of the zeros that are asked for, the smallest entries first."""
    if pattern.group is None:
        return smallest(V_KDO, round(share * num_pruned))
    allowed_KDO = torch.stack([n_m_masks(V_DO.abs(), pattern) for V_DO in V_KDO])
    if share == 1:
        return allowed_KDO
    count = round(share * int(allowed_KDO[0].sum()))
    return smallest(V_KDO.masked_fill(~allowed_KDO, torch.inf), count)


def needs_factor(config: CompressionConfig) -> bool:
    """Only the sweep that rounds needs it; the solver has an inverse of its own."""
    return config.bits is not None


def flops(rows: int, width: int, config: CompressionConfig) -> float:
    """An inverse takes ``D^3`` operations, and a product with it per iteration ``2 O D^2``.

    So do the target and what is lost of it; the last iteration has no product. With a grid the
    operations of the sweep that rounds come on top.
    """
    rounding = sparsegpt.flops(rows, width, config) if needs_factor(config) else 0.0
    products = config.solver_iterations - 1 + 2
    return rounding + width**3 + 2 * rows * width**2 * products


def extra_bytes(width: int, largest_weights: int) -> int:
    """The inverse; scaled weights, their target, what is projected away, and a product."""
    return 4 * width**2 + 4 * 4 * largest_weights


PRUNER = Pruner(
    solve=solve,
    updates_weights=True,
    needs_factor=needs_factor,
    flops=flops,
    extra_bytes=extra_bytes,
)
