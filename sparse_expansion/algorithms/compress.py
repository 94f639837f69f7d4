"""Experts of dense weights: the pruner is asked, its features put back in order, its loss told.

Shapes: K experts, D input features, O output features. Weights are ``[O, D]`` or ``[K, O, D]``
outside, and ``[K, D, O]`` where a pruner works on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise

import torch

from sparse_expansion.algorithms.centring import InputMeans
from sparse_expansion.algorithms.hessian import (
    HessianFactor,
    check_hessians,
    gram_into,
    upper_cholesky_factor,
)
from sparse_expansion.algorithms.products import product
from sparse_expansion.algorithms.pruners.base import Problem, Pruner, Solution
from sparse_expansion.algorithms.pruners.registry import pruner_of
from sparse_expansion.algorithms.quantization import AffineGrid
from sparse_expansion.config import AUTO_PRODUCTS, CompressionConfig

ROWS_PER_SUM = 64
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
    """The damping that every expert's factorization took, 0 where nothing was factored."""
    damping_attempts_K: tuple[int, ...]
    """Factorizations tried for every expert, 0 where nothing was factored."""
    num_dead_K: tuple[int, ...]
    """Features that none of the expert's tokens used."""
    relative_error_K: tuple[float, ...]
    """``tr(E H E^T) / tr(W H W^T)`` with ``E = W - W_k``: the share of the outputs' energy that is
    lost on the expert's calibration tokens (whose energy is estimated, see ``_sketch``), outputs
    weighed if they are. An expert with a bias loses nothing of their mean's."""
    bias_KO: torch.Tensor | None = None
    """float32, what is to be added to the linear's own bias; None where means are not given."""

    @classmethod
    def joined(cls, parts: Sequence[ExpertWeights]) -> ExpertWeights:
        """Experts of one linear that were made one after another."""

        def tensors(found: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
            given = [tensor for tensor in found if tensor is not None]
            return torch.cat(given) if given else None

        return cls(
            weight_KOD=torch.cat([part.weight_KOD for part in parts]),
            kept_KOD=torch.cat([part.kept_KOD for part in parts]),
            codes_KOD=tensors([part.codes_KOD for part in parts]),
            damping_fraction_K=sum((part.damping_fraction_K for part in parts), ()),
            damping_attempts_K=sum((part.damping_attempts_K for part in parts), ()),
            num_dead_K=sum((part.num_dead_K for part in parts), ()),
            relative_error_K=sum((part.relative_error_K for part in parts), ()),
            bias_KO=tensors([part.bias_KO for part in parts]),
        )

    def with_biases(self, means: InputMeans, W_OD: torch.Tensor) -> ExpertWeights:
        """The same with the best biases for copies of ``W_OD``."""
        return replace(self, bias_KO=means.biases(W_OD, self.weight_KOD))


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
        config: pruner, sparsity, quantization, block size, damping.
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
    cross_KOD: torch.Tensor | None = None,
    means: InputMeans | None = None,
    output_weights: Mapping[str, torch.Tensor] | None = None,
    products: str = AUTO_PRODUCTS,
    compiled: bool | None = None,
) -> dict[str, ExpertWeights]:
    """``compress_experts`` for several linears that share their inputs, factored once.

    Without zeros and grids the experts are the dense weights, whatever the pruner.

    Args:
        weights: dense weights ``[O, D]`` by name; O may differ, D may not.
        H_KDD: float32 Hessian sums, one per expert.
        config: pruner, sparsity, quantization, block size, damping.
        grids: a grid, or None, for every name.
        cross_KOD: ``sum r x^T`` of every expert, where ``W x + r`` is what its outputs are to be
            (those of all linears, in their order), None where that is ``W x``: see
            ``compensated_target``. A pruner that does not update weights has no use for it.
        means: where experts have biases, with Hessians and cross sums about these means.
        output_weights: by name what errors of experts' outputs ``[K, O]`` are multiplied with
            before they are compared, see ``output_weights``; those of other linears are 1.
        products: how large products are taken, see the module ``products``.
        compiled: whether sweeps take their compiled loops; by default on a CPU.

    Raises:
        CompressionError: a Hessian is not finite or cannot be factored.
    """
    if not config.changes_weights:
        check_hessians(H_KDD)
        has_biases = means is not None
        return {name: _unchanged(W, H_KDD, has_biases=has_biases) for name, W in weights.items()}
    pruner = pruner_of(config.pruner)
    if not pruner.updates_weights:
        cross_KOD = None
    order_KD = _column_order(H_KDD) if config.act_order else None
    ordered_KDD = H_KDD if order_KD is None else _reordered(H_KDD, order_KD)
    factor: HessianFactor | None = None
    if pruner.needs_factor(config) or cross_KOD is not None:
        factor = upper_cholesky_factor(ordered_KDD, damping_fraction=config.damping_fraction)
    else:
        check_hessians(ordered_KDD)
    dead_KD = ordered_KDD.diagonal(dim1=1, dim2=2) == 0

    def solved(
        W_OD: torch.Tensor, cross: torch.Tensor | None, grid: AffineGrid | None, chosen: slice
    ) -> ExpertWeights:
        part = None if factor is None else factor.of(chosen)
        order = None if order_KD is None else order_KD[chosen]
        problem = Problem(
            weight_OD=W_OD,
            target_KDO=_target(W_OD, pruner, dead_KD[chosen], order, cross, part),
            H_KDD=ordered_KDD[chosen],
            factor=part,
            grid=grid,
            columns_KD=order,
            config=config,
            products=products,
            compiled=compiled,
        )
        common = None if means is None else means.energies(W_OD, chosen)
        return _experts(problem, pruner.solve(problem), H_KDD[chosen], dead_KD[chosen], common)

    made = {}
    for (name, W_OD), rows in zip(weights.items(), _rows_of(weights.values()), strict=True):
        scale_KO = (output_weights or {}).get(name)
        cross = None if cross_KOD is None else cross_KOD[:, rows]
        if scale_KO is None:
            made[name] = solved(W_OD, cross, grids[name], slice(None))
        else:
            made[name] = _weighed(W_OD, cross, grids[name], scale_KO, solved)
        if means is not None:
            made[name] = made[name].with_biases(means.of_rows(rows), W_OD)
    return made


def _rows_of(weights: Iterable[torch.Tensor]) -> list[slice]:
    """Where the outputs of every linear stand among those of all."""
    ends = list(accumulate((len(W_OD) for W_OD in weights), initial=0))
    return [slice(first, end) for first, end in pairwise(ends)]


def _weighed(
    W_OD: torch.Tensor,
    cross_KOD: torch.Tensor | None,
    grid: AffineGrid | None,
    scale_KO: torch.Tensor,
    solved: Callable[..., ExpertWeights],
) -> ExpertWeights:
    """Experts each of which has rows in units of its own: what is compared is compared weighed."""
    found = []
    for k, scale_O in enumerate(scale_KO):
        scaled, chosen = None if grid is None else grid.scaled(scale_O), slice(k, k + 1)
        cross = None if cross_KOD is None else cross_KOD[chosen] * scale_O[:, None]
        made = solved(W_OD.float() * scale_O[:, None], cross, scaled, chosen)
        found.append(replace(made, weight_KOD=made.weight_KOD / scale_O[:, None]))
    return ExpertWeights.joined(found)


def _unchanged(W_OD: torch.Tensor, H_KDD: torch.Tensor, *, has_biases: bool) -> ExpertWeights:
    """Experts that are the dense weight: nothing is to be dropped and nothing to be rounded."""
    num_experts = len(H_KDD)
    weight_KOD = W_OD.float().expand(num_experts, -1, -1).clone()
    dead_KD = H_KDD.diagonal(dim1=1, dim2=2) == 0
    return ExpertWeights(
        weight_KOD=weight_KOD,
        kept_KOD=torch.ones_like(weight_KOD, dtype=torch.bool),
        codes_KOD=None,
        damping_fraction_K=(0.0,) * num_experts,
        damping_attempts_K=(0,) * num_experts,
        num_dead_K=tuple(int(n) for n in dead_KD.sum(dim=1)),
        relative_error_K=(0.0,) * num_experts,
        bias_KO=weight_KOD.new_zeros(weight_KOD.shape[:2]) if has_biases else None,
    )


def _target(
    W_OD: torch.Tensor,
    pruner: Pruner,
    dead_KD: torch.Tensor,
    order_KD: torch.Tensor | None,
    cross_KOD: torch.Tensor | None,
    factor: HessianFactor | None,
) -> torch.Tensor:
    """``Problem.target_KDO``: what every expert is to approximate."""
    num_experts = len(dead_KD)
    if not pruner.updates_weights:
        return W_OD.float().T.expand(num_experts, -1, -1)
    W_KDO = W_OD.float().T.contiguous().expand(num_experts, -1, -1).clone()
    if order_KD is not None:
        W_KDO = W_KDO.gather(1, order_KD[:, :, None].expand_as(W_KDO))
    if bool(dead_KD.any()):
        W_KDO.masked_fill_(dead_KD[:, :, None], 0)
    if cross_KOD is None:
        return W_KDO
    if order_KD is not None:
        cross_KOD = cross_KOD.gather(2, order_KD[:, None].expand_as(cross_KOD))
    assert factor is not None
    return compensated_target(W_KDO, cross_KOD, factor)


def _experts(
    problem: Problem,
    solution: Solution,
    H_KDD: torch.Tensor,
    dead_KD: torch.Tensor,
    common: Sequence[float] | None,
) -> ExpertWeights:
    """The experts of a solution, features in their original order, which is that of ``H_KDD``.

    Outputs' energies are those by ``H_KDD``, and in common with the mean what is given.
    """
    num_experts = len(H_KDD)
    weight_KOD, kept_KOD = (
        found.transpose(1, 2).contiguous() for found in (solution.weight_KDO, solution.kept_KDO)
    )
    codes_KOD = None
    if solution.codes_KDO is not None:
        codes_KOD = solution.codes_KDO.transpose(1, 2).contiguous()
    if problem.columns_KD is not None:
        back = torch.argsort(problem.columns_KD, dim=1)[:, None].expand_as(weight_KOD)
        weight_KOD, kept_KOD = weight_KOD.gather(2, back), kept_KOD.gather(2, back)
        codes_KOD = None if codes_KOD is None else codes_KOD.gather(2, back)
    lost_K = solution.lost_K
    if lost_K is None:
        lost_K = _lost_energies(problem, solution)
    if problem.factor is not None:
        fractions, attempts = problem.factor.damping_fraction_K, problem.factor.attempts_K
    elif solution.damping_fraction is not None:
        fractions, attempts = (solution.damping_fraction,) * num_experts, (1,) * num_experts
    else:
        fractions, attempts = (0.0,) * num_experts, (0,) * num_experts
    return ExpertWeights(
        weight_KOD=weight_KOD,
        kept_KOD=kept_KOD,
        codes_KOD=codes_KOD,
        damping_fraction_K=fractions,
        damping_attempts_K=attempts,
        num_dead_K=tuple(int(n) for n in dead_KD.sum(dim=1)),
        relative_error_K=_relative_errors(
            problem.weight_OD.float(), H_KDD, lost_K, common or [0.0] * num_experts
        ),
    )


def _column_order(H_KDD: torch.Tensor) -> torch.Tensor:
    """Columns by falling diagonal, ``[K, D]``."""
    diagonal = H_KDD.diagonal(dim1=1, dim2=2)
    return torch.argsort(diagonal, dim=1, descending=True, stable=True)


def _reordered(H_KDD: torch.Tensor, order_KD: torch.Tensor) -> torch.Tensor:
    """Rows and columns of every matrix in an order of its own."""
    return torch.stack([H[order][:, order] for H, order in zip(H_KDD, order_KD, strict=True)])


def compensated_target(
    W_KDO: torch.Tensor, cross_KOD: torch.Tensor, factor: HessianFactor
) -> torch.Tensor:
    """The weight that does best where the dense one's outputs lack something.

    Least squares of ``|W x + r - V x|^2`` with a pull towards ``W``, the factor's damping:
    ``V = W + (sum r x^T) (H + damping)^-1``. What no weight can do is the same for all of them:
    compressing ``V`` on ``H`` is compressing ``W`` on both.

    Args:
        W_KDO: dense weights, transposed.
        cross_KOD: ``sum r x^T`` of every expert.
        factor: of the damped Hessians.
    """
    half_KDO = torch.linalg.solve_triangular(factor.factor_KDD, cross_KOD.mT, upper=True)
    return W_KDO + torch.linalg.solve_triangular(factor.factor_KDD.mT, half_KDO, upper=False)


def _lost_energies(problem: Problem, solution: Solution) -> torch.Tensor:
    """``tr(E H E^T)`` of every expert, by its product, where ``E`` is target less weight."""
    found = []
    target_KOD, weight_KOD = problem.target_KDO.mT, solution.weight_KDO.mT
    for target_OD, weight_OD, H_DD in zip(target_KOD, weight_KOD, problem.H_KDD, strict=True):
        E_OD = target_OD - weight_OD
        changed_OD = product(E_OD, H_DD, problem.products)
        found.append((changed_OD * E_OD).sum(dtype=torch.float64))
    return torch.stack(found)


def _relative_errors(
    W_OD: torch.Tensor, H_KDD: torch.Tensor, lost_K: torch.Tensor, common: Sequence[float]
) -> tuple[float, ...]:
    """``tr(E H E^T) / tr(W H W^T)``; the energies take O(K D^2) operations instead of O(K O D^2).

    ``tr(W H W^T) = <W^T W, H>`` shares one product, of a sketch of W where it has many rows: see
    ``_sketch``.

    Args:
        W_OD: the dense weight, float32.
        H_KDD: Hessian sums.
        lost_K: ``tr(E H E^T)``. The sweep's loss counts the damping as if it were data: it is its
            loss less ``damping |E|^2``, without dead columns, which reach no output.
        common: of every expert what else its outputs' energy is.
    """
    gram_DD = W_OD.new_empty(W_OD.shape[1], W_OD.shape[1])
    gram_into(_sketch(W_OD), gram_DD)
    products_K = torch.stack([_inner_product(gram_DD, H_DD) for H_DD in H_KDD]).tolist()
    errors = []
    for inner, lost, rest in zip(products_K, lost_K.tolist(), common, strict=True):
        energy = rest + inner
        errors.append(max(0.0, lost) / energy if energy > 0 else 0.0)
    return tuple(errors)


def _inner_product(A_DD: torch.Tensor, B_DD: torch.Tensor) -> torch.Tensor:
    """``sum A B``, float64: of a few rows in float32 on a CPU, of single products on a GPU."""
    if A_DD.is_cuda:
        return (A_DD * B_DD).sum(dtype=torch.float64)
    pairs = zip(A_DD.split(ROWS_PER_SUM), B_DD.split(ROWS_PER_SUM), strict=True)
    sums = [float(torch.dot(A.reshape(-1), B.reshape(-1))) for A, B in pairs]
    return torch.tensor(sum(sums), dtype=torch.float64)


def _sketch(W_OD: torch.Tensor) -> torch.Tensor:
    """At most ``SKETCH_ROWS`` rows V with ``tr(V H V^T)`` close to ``tr(W H W^T)`` for any H.

    Random signed sums of all rows (Hutchinson's estimator). Every row's own energy counts in full,
    so a few rows with most of the energy do no harm; the standard deviation comes from products of
    different rows alone and is at most ``sqrt(2 / SKETCH_ROWS)`` of the trace, 9 %: all rows equal.
    """
    rows = W_OD.shape[0]
    if rows <= SKETCH_ROWS:
        return W_OD
    return (_signs(rows).to(W_OD.device, W_OD.dtype) / SKETCH_ROWS**0.5) @ W_OD


@lru_cache(maxsize=4)
def _signs(rows: int) -> torch.Tensor:
    """The random signs of every sum, always the same (int8): a model has few numbers of rows."""
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.randint(0, 2, (SKETCH_ROWS, rows), generator=generator) - 1).to(torch.int8)
