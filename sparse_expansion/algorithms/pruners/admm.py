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
from sparse_expansion.algorithms.products import LeftFactor
from sparse_expansion.algorithms.pruners import sparsegpt
from sparse_expansion.algorithms.pruners.base import Problem, Pruner, Solution
from sparse_expansion.algorithms.sweep import sweep
from sparse_expansion.config import AUTO_PRODUCTS, CompressionConfig, SparsityPattern

PENALTY = 1.0
"""Weight of staying close to the projection, where every input feature has unit energy."""
RELAXATION = 1.8
"""How far a solution goes beyond the projection before it."""
RISE = 4
"""Degree of the curve along which zeros become as many as asked: most of them early."""
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
        products=problem.products,
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
            products=problem.products,
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
    products: str = AUTO_PRODUCTS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimise ``tr((W - V) H (W - V)^T)`` over the ``V`` with the wanted zeros, approximately.

    With inputs scaled to unit energy, ``A = H + damping`` and ``rho = 1``, repeat

        Z = project(V + U),   U = V + U - Z,   V = (A + rho)^-1 (A W + rho (Z - U))

    where ``project`` keeps the largest entries; the last of them is ``W + rho (A + rho)^-1 (Z - U -
    W)``, one product with an inverse that is made once. From then on ``a V + (1 - a) Z`` stands for
    ``V``: over-relaxation with ``a`` near 2, by which fewer iterations are enough (S.
    Boyd et al., Distributed Optimization and Statistical Learning via the Alternating Direction
    Method of Multipliers, 2011, section 3.4.3). The number of kept entries falls along a curve to
    what is asked; then the mask stays, and the last iterations bring the kept weights closer to the
    least squares under it.

    Args:
        W_KDO: float32, one matrix per expert; zero for features that no token used.
        H_KDD: finite float32 Hessian sums; not modified.
        pattern: unstructured or N:M.
        num_pruned: exact number of zeros of a matrix, where the pattern is unstructured.
        damping_fraction: share of every feature's own energy that is added to it.
        iterations: at least 1.
        products: how products are taken, see the module ``products``.

    Returns:
        The weights, exactly zero where pruned, and the mask of kept ones (bool).
    """
    energy_KD = H_KDD.diagonal(dim1=1, dim2=2)
    norm_KD1 = torch.where(energy_KD > 0, energy_KD, 1.0).sqrt()[:, :, None]
    A_KDD = (H_KDD / norm_KD1).div_(norm_KD1.mT)
    A_KDD.diagonal(dim1=1, dim2=2).fill_(1 + damping_fraction)
    A_KDD.diagonal(dim1=1, dim2=2).add_(PENALTY)
    for A_DD in A_KDD:
        A_DD.copy_(torch.cholesky_inverse(torch.linalg.cholesky(A_DD)))
    inverse_KDD = LeftFactor(A_KDD, products)
    # Only its parts are kept, where products are taken by parts.
    del A_KDD, A_DD
    V_KDO = W_KDO * norm_KD1
    U_KDO = torch.zeros_like(V_KDO)
    pruned_KDO = torch.zeros_like(V_KDO, dtype=torch.bool)
    choosing = iterations - iterations // LAST_SHARE
    for iteration in range(iterations):
        V_KDO.add_(U_KDO)
        if iteration < choosing:
            share = 1 - (1 - (iteration + 1) / choosing) ** RISE
            pruned_KDO = _smallest_allowed(V_KDO, pattern, num_pruned, share)
        if iteration + 1 == iterations:
            break
        # What the projection takes away is U; what it leaves is Z, in the place of V.
        torch.mul(V_KDO, pruned_KDO, out=U_KDO)
        V_KDO.sub_(U_KDO)
        step_KDO = (V_KDO - U_KDO).addcmul_(W_KDO, norm_KD1, value=-1)
        V_KDO.mul_(1 - RELAXATION).addcmul_(W_KDO, norm_KD1, value=RELAXATION)
        V_KDO.add_(inverse_KDD.times(step_KDO), alpha=RELAXATION * PENALTY)
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

    So does what is lost of the target; the last iteration has no product. With a grid the
    operations of the sweep that rounds come on top.
    """
    rounding = sparsegpt.flops(rows, width, config) if needs_factor(config) else 0.0
    products = config.solver_iterations - 1 + 1
    return rounding + width**3 + 2 * rows * width**2 * products


def extra_bytes(width: int, largest_weights: int) -> int:
    """The inverse; scaled weights, what is projected away, a step, and a product with it."""
    return 4 * width**2 + 4 * 4 * largest_weights


PRUNER = Pruner(
    solve=solve,
    updates_weights=True,
    needs_factor=needs_factor,
    flops=flops,
    extra_bytes=extra_bytes,
)
