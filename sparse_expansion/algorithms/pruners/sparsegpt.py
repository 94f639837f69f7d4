"""SparseGPT: the column sweep chooses what is removed and corrects later columns for it.

E. Frantar and D. Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot" (arXiv 2301.00774). With a grid the same sweep rounds what it keeps, as GPTQ does
(arXiv 2210.17323).
"""

from __future__ import annotations

from sparse_expansion.algorithms.pruners.base import Problem, Pruner, Solution
from sparse_expansion.algorithms.sweep import sweep
from sparse_expansion.config import CompressionConfig


def solve(problem: Problem) -> Solution:
    """Sweep over the target in place; the sweep's loss gives what was lost."""
    assert problem.factor is not None
    weight_KDO = problem.target_KDO
    found = sweep(
        weight_KDO,
        problem.factor.factor_KDD,
        pattern=problem.config.sparsity,
        grid=problem.grid,
        block_size=problem.config.block_size,
        columns_KD=problem.columns_KD,
        products=problem.products,
        compiled=problem.compiled,
    )
    return Solution(
        weight_KDO=weight_KDO,
        kept_KDO=found.kept_KDO,
        codes_KDO=found.codes_KDO,
        # The sweep's loss counts the damping as if it were data.
        lost_K=found.loss_K - problem.factor.damping_K * found.change_K,
    )


def needs_factor(config: CompressionConfig) -> bool:
    """The sweep always needs it."""
    return True


def flops(rows: int, width: int, config: CompressionConfig) -> float:
    """A factorization takes ``D^3 / 3`` operations, the sweep ``O D (D + block size)``.

    Of the latter, errors of earlier blocks take ``O D^2``, and those inside blocks the rest.
    """
    return width**3 / 3 + rows * width * (width + config.block_size)


PRUNER = Pruner(solve=solve, updates_weights=True, needs_factor=needs_factor, flops=flops)
