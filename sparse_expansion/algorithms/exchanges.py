"""Exchanges of zeros with kept weights, by which a mask that was found gets better.

A solver that goes on from one projection to the next ends where none of its steps changes the mask
any more; the error of the best weights under a mask still falls by a few percent where a kept
weight and a zero of its row change places. Such local searches are known from best subset selection
(H. Hazimeh and R. Mazumder, "Fast Best Subset Selection", Operations Research 2020) and with
weights left as they are from pruning (M. Zimmer et al., "SparseSwaps", arXiv 2512.10922). Here
weights follow: what an exchange is worth is estimated by a curvature that all rows share, several
exchanges of every row are made at once, its kept weights are fitted again by conjugate gradients,
and rows of which the error did not fall are put back.

Shapes: K experts, D input and O output features, C candidates, P eigenvectors, G groups of M
columns; weights are transposed, ``[K, D, O]``, so that a row of the weight is a column here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparse_expansion.algorithms.products import LeftFactor
from sparse_expansion.algorithms.spectrum import leading_vectors
from sparse_expansion.config import SparsityPattern

AT_ONCE = 8
"""Exchanges of a row that are tried together; where that fails, half as many in the next round."""
COLUMNS_PER_EXCHANGE = 64
"""A wide row tries one for so many columns, where those are more than ``AT_ONCE``."""
STEPS = 3
"""Steps of conjugate gradients by which a row's kept weights are fitted again."""
NUM_VECTORS = 16
"""Leading eigenvectors that the steps are freed of; without them it takes about twice as many."""
LEAST_GAIN = 1 / 16
"""An exchange is tried where it is worth more than this share of a column's part of the error."""


LEAST_CURVATURE = 1e-5
"""Of a feature's unit energy: what curvatures, and the small eigenvalues' mean, are at least."""


@dataclass(frozen=True)
class Candidates:
    """Exchanges of every row by falling worth, at most one for a column."""

    gain_KCO: torch.Tensor
    """By how much the row's error is estimated to fall."""
    out_KCO: torch.Tensor
    """Column of the kept weight that is to be zero."""
    in_KCO: torch.Tensor
    """Column of the zero that is to be kept."""
    value_KCO: torch.Tensor
    """What it is to be, until weights are fitted again."""


@dataclass
class Fit:
    """Weights under a mask, and what is left of the target."""

    weight_KDO: torch.Tensor
    """Zero where not kept."""
    kept_KDO: torch.Tensor
    """bool."""
    residual_KDO: torch.Tensor
    """``A (W - V)``: half of the slope that the error falls with."""
    error_KO: torch.Tensor
    """``(w - v)^T A (w - v)`` of every row."""

    def where(self, chosen_KO: torch.Tensor, other: Fit) -> Fit:
        """This one's rows where they are chosen, the other's elsewhere."""
        chosen_K1O = chosen_KO[:, None]
        return Fit(
            torch.where(chosen_K1O, self.weight_KDO, other.weight_KDO),
            torch.where(chosen_K1O, self.kept_KDO, other.kept_KDO),
            torch.where(chosen_K1O, self.residual_KDO, other.residual_KDO),
            torch.where(chosen_KO, self.error_KO, other.error_KO),
        )


class Curvatures:
    """How fast a row's error rises with a weight, while its other kept weights follow.

    What follows differs from row to row. It is taken to be all other features under a penalty: the
    solver's own inverse ``(A + penalty)^-1`` has the answer for every column and every pair of
    columns. So half of the features, without one, come out about alike.
    """

    def __init__(self, inverse_KDD: torch.Tensor, penalty: float, pattern: SparsityPattern) -> None:
        """Take what is needed of ``(A + penalty)^-1``; it is not kept."""
        self.size = pattern.group
        diagonal_KD = inverse_KDD.diagonal(dim1=1, dim2=2)
        if self.size is None:
            self._single_KD1 = (1 / diagonal_KD - penalty).clamp_min_(LEAST_CURVATURE)[:, :, None]
            return
        groups = inverse_KDD.shape[1] // self.size
        columns_GM = torch.arange(groups * self.size, device=inverse_KDD.device).view(
            groups, self.size
        )
        both_KGMM = inverse_KDD[:, columns_GM[:, :, None], columns_GM[:, None, :]]
        own_KGM = diagonal_KD[:, columns_GM]
        first_KGMM, second_KGMM = own_KGM[:, :, :, None], own_KGM[:, :, None, :]
        determinant_KGMM = first_KGMM * second_KGMM - both_KGMM.square()
        # A column is no pair with itself.
        determinant_KGMM.diagonal(dim1=2, dim2=3).fill_(1)
        self._first_KGMM = second_KGMM / determinant_KGMM - penalty
        self._second_KGMM = (first_KGMM / determinant_KGMM - penalty).clamp_min_(LEAST_CURVATURE)
        self._mixed_KGMM = both_KGMM.neg_().div_(determinant_KGMM)

    def candidates(self, fit: Fit, count: int) -> Candidates:
        """So many exchanges of every row, or fewer: anywhere in it, or within groups of N:M."""
        if self.size is None:
            return self._anywhere(fit, count)
        return self._within_groups(fit, self.size, count)

    def _anywhere(self, fit: Fit, count: int) -> Candidates:
        """The kept weights that cost the least against the zeros that gain the most."""
        V, r = fit.weight_KDO, fit.residual_KDO
        count = min(count, V.shape[1] // 2)
        cost_KDO = (V * self._single_KD1).add_(r, alpha=2).mul_(V)
        cost_KDO.masked_fill_(~fit.kept_KDO, torch.inf)
        cost_KCO, out_KCO = largest(cost_KDO.neg_(), count)
        gain_KDO = r.square().div_(self._single_KD1).masked_fill_(fit.kept_KDO, -torch.inf)
        gain_KCO, in_KCO = largest(gain_KDO, count)
        value_KDO = r / self._single_KD1
        # Where a row has no more kept weights, or no more zeros, what is lost is infinite.
        return Candidates(gain_KCO + cost_KCO, out_KCO, in_KCO, value_KDO.gather(1, in_KCO))

    def _within_groups(self, fit: Fit, size: int, count: int) -> Candidates:
        """The best pair of every group; of these the best groups."""
        num_experts, _, rows = fit.weight_KDO.shape
        groups = self._first_KGMM.shape[1]

        def grouped(each_KDO: torch.Tensor) -> torch.Tensor:
            return each_KDO[:, : groups * size].view(num_experts, groups, size, rows)

        V, r, kept = map(grouped, (fit.weight_KDO, fit.residual_KDO, fit.kept_KDO))
        gain_KGO = V.new_zeros(num_experts, groups, rows)
        value_KGO = torch.zeros_like(gain_KGO)
        pair_KGO = torch.zeros_like(gain_KGO, dtype=torch.int64)
        for first in range(size):
            leaving_KGO = V[:, :, first]
            for second in range(size):
                if first == second:
                    continue
                own, other, mixed = (
                    curvature[:, :, first, second, None]
                    for curvature in (self._first_KGMM, self._second_KGMM, self._mixed_KGMM)
                )
                slope_KGO = torch.addcmul(r[:, :, second], leaving_KGO, mixed)
                here_KGO = (leaving_KGO * own).add_(r[:, :, first], alpha=2).mul_(leaving_KGO)
                here_KGO = (slope_KGO.square() / other).sub_(here_KGO)
                here_KGO *= kept[:, :, first] & ~kept[:, :, second]
                better_KGO = here_KGO > gain_KGO
                gain_KGO = torch.where(better_KGO, here_KGO, gain_KGO)
                value_KGO = torch.where(better_KGO, slope_KGO / other, value_KGO)
                pair_KGO.masked_fill_(better_KGO, first * size + second)
        gain_KCO, chosen_KCO = largest(gain_KGO, min(count, groups))
        pair_KCO = pair_KGO.gather(1, chosen_KCO)
        return Candidates(
            gain_KCO,
            chosen_KCO * size + pair_KCO // size,
            chosen_KCO * size + pair_KCO % size,
            value_KGO.gather(1, chosen_KCO),
        )


class LeastSquares:
    """Weights that follow a mask: conjugate gradients on every row's kept weights.

    ``A`` has a few large eigenvalues and many small ones. What the large ones do on a row's kept
    features is taken out by a small matrix of the row's own (Woodbury's identity); the rest is
    nearly a multiple of the identity, and few steps are enough.
    """

    def __init__(self, A_KDD: torch.Tensor, products: str) -> None:
        """``A`` is the scaled and damped Hessian; not modified."""
        self._A = LeftFactor(A_KDD.clone(), products)
        width = A_KDD.shape[1]
        count = max(1, min(NUM_VECTORS, width // 8))
        pairs = [leading_vectors(A_DD, count) for A_DD in A_KDD]
        values_KP = torch.stack([values for values, _ in pairs])
        self._vectors_KDP = torch.stack([vectors for _, vectors in pairs])
        rest_K1 = A_KDD.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) - values_KP.sum(1, True)
        # Where there is nothing else, a small number stands for it: no row may divide by nothing.
        rest_K1 = (rest_K1 / max(1, width - count)).clamp_min_(LEAST_CURVATURE)
        # An eigenvalue like the others leaves nothing to take out.
        beyond_KP = torch.maximum(values_KP - rest_K1, 1e-3 * rest_K1)
        self._core_KPP = torch.diag_embed(rest_K1 / beyond_KP)
        above = torch.triu_indices(count, count, device=A_KDD.device)
        self._products_KSD = (
            self._vectors_KDP[:, :, above[0]] * self._vectors_KDP[:, :, above[1]]
        ).mT.contiguous()
        self._places_PP = torch.zeros(count, count, dtype=torch.int64, device=A_KDD.device)
        self._places_PP[above[0], above[1]] = torch.arange(above.shape[1], device=A_KDD.device)
        self._places_PP = torch.maximum(self._places_PP, self._places_PP.T)

    def settle(self, fit: Fit, W_KDO: torch.Tensor) -> None:
        """Take slopes and errors anew where rough products have lost their last digits."""
        if self._A.by_parts:
            exact = self.start(fit.weight_KDO, fit.kept_KDO, W_KDO)
            fit.residual_KDO, fit.error_KO = exact.residual_KDO, exact.error_KO

    def start(self, weight_KDO: torch.Tensor, kept_KDO: torch.Tensor, W_KDO: torch.Tensor) -> Fit:
        """Weights under a mask as they are."""
        missing_KDO = W_KDO - weight_KDO
        residual_KDO = self._A.times(missing_KDO)
        error_KO = (missing_KDO * residual_KDO).sum(dim=1)
        return Fit(weight_KDO, kept_KDO, residual_KDO, error_KO)

    def changed(self, fit: Fit, weight_KDO: torch.Tensor, kept_KDO: torch.Tensor) -> Fit:
        """Other weights under another mask."""
        change_KDO = weight_KDO - fit.weight_KDO
        residual_KDO = fit.residual_KDO - self._A.times(change_KDO, is_rough=True)
        fall_KO = change_KDO.mul_(fit.residual_KDO + residual_KDO).sum(dim=1)
        return Fit(weight_KDO, kept_KDO, residual_KDO, fit.error_KO - fall_KO)

    def improve(self, fit: Fit) -> None:
        """A few steps towards the least squares under the mask, in place."""
        lower_KOPP = self._factors(fit.kept_KDO)
        V, r = fit.weight_KDO, fit.residual_KDO
        direction_KDO, size_KO = self._freed(r, fit.kept_KDO, lower_KOPP)
        for step in range(STEPS):
            image_KDO = self._A.times(direction_KDO, is_rough=True)
            bend_KO = (direction_KDO * image_KDO).sum(dim=1)
            length_KO = torch.where(bend_KO > 0, size_KO / bend_KO, 0.0)
            V.addcmul_(direction_KDO, length_KO[:, None])
            r.addcmul_(image_KDO, length_KO[:, None], value=-1)
            fit.error_KO -= length_KO * size_KO
            if step + 1 == STEPS:
                break
            before_KO = size_KO
            freed_KDO, size_KO = self._freed(r, fit.kept_KDO, lower_KOPP)
            share_KO = torch.where(before_KO > 0, size_KO / before_KO, 0.0)
            direction_KDO = freed_KDO.addcmul_(direction_KDO, share_KO[:, None])

    def _factors(self, kept_KDO: torch.Tensor) -> torch.Tensor:
        """Cholesky factors of every row's small matrix, ``[K, O, P, P]``."""
        sums_KSO = self._products_KSD @ kept_KDO.to(self._products_KSD.dtype)
        own_KOPP = sums_KSO.mT[:, :, self._places_PP]
        return torch.linalg.cholesky(own_KOPP.add_(self._core_KPP[:, None]))

    def _freed(
        self, r_KDO: torch.Tensor, kept_KDO: torch.Tensor, lower_KOPP: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A direction for the kept weights, and how much of the slope it has ``[K, O]``."""
        slope_KDO = r_KDO * kept_KDO
        parts_KOP1 = (self._vectors_KDP.mT @ slope_KDO).mT[..., None]
        parts_KOP1 = torch.cholesky_solve(parts_KOP1, lower_KOPP)
        found_KDO = torch.baddbmm(slope_KDO, self._vectors_KDP, parts_KOP1[..., 0].mT, alpha=-1)
        found_KDO *= kept_KDO
        return found_KDO, slope_KDO.mul_(found_KDO).sum(dim=1)


def exchange_zeros(
    weight_KDO: torch.Tensor,
    kept_KDO: torch.Tensor,
    W_KDO: torch.Tensor,
    *,
    squares: LeastSquares,
    curvatures: Curvatures,
    rounds: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower ``(w - v)^T A (w - v)`` of every row by exchanges; rows keep their numbers of zeros.

    Args:
        weight_KDO: zero where not kept; overwritten.
        kept_KDO: bool; not modified.
        W_KDO: the target.
        squares: with the ``A`` of the inputs' energies, where every feature has about unit energy.
        curvatures: what exchanges are estimated by.
        rounds: how often exchanges are tried.

    Returns:
        The weights, exactly zero where pruned, and the mask of kept ones. No row's error is larger
        than it was.
    """
    width = W_KDO.shape[1]
    count = max(AT_ONCE, width // COLUMNS_PER_EXCHANGE)
    fit = squares.start(weight_KDO, kept_KDO, W_KDO)
    squares.improve(fit)
    squares.settle(fit, W_KDO)
    allowed_KO = torch.full_like(fit.error_KO, count, dtype=torch.int64)
    for _ in range(rounds):
        found = curvatures.candidates(fit, count)
        ranks_C1 = torch.arange(found.gain_KCO.shape[1], device=W_KDO.device)[:, None]
        least_KO = fit.error_KO.clamp_min(0) * (LEAST_GAIN / width)
        taken_KCO = (ranks_C1 < allowed_KO[:, None]) & (found.gain_KCO > least_KO[:, None])
        changed = squares.changed(fit, *_exchanged(fit, found, taken_KCO))
        squares.improve(changed)
        squares.settle(changed, W_KDO)
        is_better_KO = changed.error_KO < fit.error_KO
        fit = changed.where(is_better_KO, fit)
        allowed_KO = torch.where(is_better_KO, allowed_KO, allowed_KO // 2)
    return fit.weight_KDO, fit.kept_KDO


def _exchanged(
    fit: Fit, found: Candidates, taken_KCO: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and mask with the exchanges that are taken."""
    weight_KDO, kept_KDO = fit.weight_KDO.clone(), fit.kept_KDO.clone()
    leaving_KCO = weight_KDO.gather(1, found.out_KCO).masked_fill_(taken_KCO, 0)
    weight_KDO.scatter_(1, found.out_KCO, leaving_KCO)
    coming_KCO = torch.where(taken_KCO, found.value_KCO, weight_KDO.gather(1, found.in_KCO))
    weight_KDO.scatter_(1, found.in_KCO, coming_KCO)
    kept_KDO.scatter_(1, found.out_KCO, kept_KDO.gather(1, found.out_KCO) & ~taken_KCO)
    kept_KDO.scatter_(1, found.in_KCO, kept_KDO.gather(1, found.in_KCO) | taken_KCO)
    return weight_KDO, kept_KDO


def largest(values_KNO: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of every row and their places ``[K, C, O]``, by falling value."""
    found = values_KNO.mT.contiguous().topk(count, dim=2)
    return found.values.mT, found.indices.mT


def exchange_products(rounds: int) -> int:
    """Products of ``A`` with weights that ``exchange_zeros`` takes."""
    return (1 + STEPS) * (1 + rounds) if rounds else 0
