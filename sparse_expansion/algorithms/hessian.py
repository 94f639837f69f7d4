"""Hessian sums, bounded damping, and the factor that the sweep needs.

Shapes: T tokens, D input features, O output features, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch

from sparse_expansion.algorithms.products import exact_terms, has_float32_sums
from sparse_expansion.types import CompressionError, HessianSum, in_columns

MAX_DAMPING_ATTEMPTS = 6
"""Factorizations of one Hessian that are tried at most."""
DAMPING_GROWTH = 10.0
"""Factor of the damping from one attempt to the next."""
GRAM_BASE = 256
"""Columns up to which ``X^T X`` is one product."""


def hessian_sum(X_TD: torch.Tensor, residual_TO: torch.Tensor | None = None) -> HessianSum:
    """``sum x x^T`` over the rows of ``X_TD``, accumulated in float32, and ``sum x``.

    The sum is left unscaled: SparseGPT's ``H = 2/T sum x x^T`` (arXiv 2301.00774, section 3)
    differs by a factor that cancels in the sweep.

    Args:
        X_TD: inputs, any floating dtype.
        residual_TO: what the dense linear's outputs for these lack; ``sum r x^T`` and the like are
            added up too.

    Raises:
        CompressionError: an activation is NaN or infinite.
    """
    X = X_TD.float()
    is_exact = has_float32_sums(X_TD)
    if is_exact:
        sum_DD = exact_terms(X_TD.T, X_TD)
    else:
        sum_DD = X.new_empty(X.shape[1], X.shape[1])
        gram_into(X, sum_DD)
    check_finite(X, sum_DD.diagonal())
    total = HessianSum(sum_DD, X.shape[0], _column_sums(X))
    if residual_TO is None:
        return total
    cross_OD = exact_terms(residual_TO.T, X_TD) if is_exact else residual_TO.float().T @ X
    check_finite(residual_TO)
    norms_T = torch.linalg.vector_norm(residual_TO.float(), dim=1)
    return replace(
        total,
        cross_OD=cross_OD,
        residual_O=_column_sums(residual_TO.float()),
        residual_energy=float(norms_T.double().square().sum()),
    )


def _column_sums(X_TD: torch.Tensor) -> torch.Tensor:
    """In float32, as float64."""
    return X_TD.sum(dim=0).double()


def energy_of(A: torch.Tensor) -> float:
    """Sum of squares, added up in float64."""
    return float(torch.linalg.vector_norm(A, dtype=torch.float64)) ** 2


def gram_into(X_TD: torch.Tensor, out_DD: torch.Tensor) -> None:
    """Write ``X^T X``, by halves of the columns: the lower left block is the upper right's mirror.

    A little more than half of the products of a full multiplication.
    """
    width = X_TD.shape[1]
    if width <= GRAM_BASE:
        out_DD.copy_(X_TD.T @ X_TD)
        return
    half = width // 2
    left, right = X_TD[:, :half], X_TD[:, half:]
    gram_into(left, out_DD[:half, :half])
    gram_into(right, out_DD[half:, half:])
    out_DD[:half, half:] = left.T @ right
    out_DD[half:, :half] = out_DD[:half, half:].T


def check_finite(X_TD: torch.Tensor, squares_D: torch.Tensor | None = None) -> None:
    """Refuse activations that are NaN or infinite, or whose squares are.

    Args:
        X_TD: inputs.
        squares_D: sums of squares by feature, where the caller has them anyway.

    Raises:
        CompressionError: with the number of bad tokens.
    """
    if not X_TD.shape[0]:
        return
    # The extremes are finite only if every entry is: NaN counts as both. One look at the memory.
    found = torch.stack(torch.aminmax(X_TD)).float().square() if squares_D is None else squares_D
    if not bool(torch.isfinite(found).all()):
        bad = int((~torch.isfinite(X_TD)).any(dim=1).sum())
        raise CompressionError(
            f"activations are not finite ({bad} of {X_TD.shape[0]} tokens hold NaN or infinity, "
            "or their squares overflow float32): check the source weights or use --dtype float32"
        )


def merge_hessians(sums: Iterable[HessianSum]) -> HessianSum:
    """Add sums and counts in the given order (float addition is not associative).

    Raises:
        ValueError: ``sums`` is empty.
    """
    total: HessianSum | None = None
    for part in sums:
        if total is None:
            total = map_tensors(part, torch.Tensor.clone)
            continue
        total = HessianSum(
            total.sum_DD.add_(part.sum_DD),
            total.num_tokens + part.num_tokens,
            _added(total.sum_D, part.sum_D),
            _added(total.cross_OD, part.cross_OD),
            _added(total.residual_O, part.residual_O),
            total.residual_energy + part.residual_energy,
        )
    if total is None:
        raise ValueError("no Hessian sums to merge")
    return total


def _added(total: torch.Tensor | None, part: torch.Tensor | None) -> torch.Tensor | None:
    """``total``, which is written to, with ``part``: sums that are merged have the same parts."""
    return None if total is None or part is None else total.add_(part)


def map_tensors(total: HessianSum, change: Callable[[torch.Tensor], torch.Tensor]) -> HessianSum:
    """The same sums with a change of each tensor, such as its device."""
    found: dict[str, Any] = {
        field.name: change(value)
        for field in fields(total)
        if isinstance(value := getattr(total, field.name), torch.Tensor)
    }
    return replace(total, **found)


def check_hessians(H_KDD: torch.Tensor) -> None:
    """Refuse Hessians with NaN or infinite entries.

    Raises:
        CompressionError: with the index in the batch.
    """
    for k, H_DD in enumerate(H_KDD):
        # The extremes are finite only if every entry is: NaN counts as both.
        if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(H_DD)):
            raise CompressionError(f"Hessian {k} of the batch is not finite (NaN or infinity)")


@dataclass(frozen=True)
class HessianFactor:
    """Upper triangular ``V`` with ``H + damping = V V^T``, and how it was got."""

    factor_KDD: torch.Tensor
    dead_KD: torch.Tensor
    """Features that no token of the expert ever used (``H_jj = 0``)."""
    damping_fraction_K: tuple[float, ...]
    """The damping that sufficed, per expert, as a share of the mean diagonal."""
    damping_K: torch.Tensor
    """What was added to each diagonal."""
    attempts_K: tuple[int, ...]
    """Factorizations tried per expert, 1 when the first one held."""

    def of(self, chosen: slice) -> HessianFactor:
        """Those of some of the experts."""
        return HessianFactor(
            self.factor_KDD[chosen],
            self.dead_KD[chosen],
            self.damping_fraction_K[chosen],
            self.damping_K[chosen],
            self.attempts_K[chosen],
        )


def upper_cholesky_factor(
    H_KDD: torch.Tensor,
    *,
    damping_fraction: float = 0.01,
    max_attempts: int = MAX_DAMPING_ATTEMPTS,
) -> HessianFactor:
    """Upper triangular Cholesky factor of the damped Hessian, batched over experts.

    With the reversal ``J``: ``J H J = L L^T`` gives ``H = V V^T`` for the upper ``V = J L J``. Its
    inverse is the ``U`` of SparseGPT and GPTQ, ``H^-1 = U^T U``, of which the sweep needs only the
    blocks on the diagonal: one Cholesky (D^3/3 operations) where their reference takes two
    Choleskys and an inverse.

    An expert whose factorization fails is tried again with ten times the damping, at most
    ``max_attempts`` times in all; the other experts of the batch are left as they are.

    Args:
        H_KDD: Hessian sums; not modified.
        damping_fraction: share of ``mean(diag H)`` added to the diagonal.
        max_attempts: bound on the factorizations of one expert.

    Raises:
        CompressionError: a Hessian is not finite, or not positive definite even with the
            largest damping. The message gives the index in the batch.
    """
    num_experts, width, _ = H_KDD.shape
    diag_KD = H_KDD.diagonal(dim1=1, dim2=2)
    check_hessians(H_KDD)
    dead_KD = diag_KD == 0
    mean_K = diag_KD.mean(dim=1)
    scale_K = torch.where(mean_K > 0, mean_K, torch.ones_like(mean_K))
    # Cholesky factors come in columns; so are these kept, which the products do not mind.
    columns_KDD = torch.empty_like(H_KDD)
    attempts = [0] * num_experts
    fractions = [damping_fraction] * num_experts
    todo = list(range(num_experts))
    for attempt in range(max_attempts):
        fraction = damping_fraction * DAMPING_GROWTH**attempt
        failed: list[int] = []
        for k in todo:
            attempts[k] += 1
            fractions[k] = fraction
            flipped = _reversed(H_KDD[k])
            diagonal = flipped.diagonal()
            diagonal += fraction * scale_K[k]
            # A dead feature's row and column are zero: any positive pivot decouples it.
            diagonal += dead_KD[k].flip(0) * scale_K[k]
            lower, info = torch.linalg.cholesky_ex(flipped)
            if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
                columns_KDD[k] = _reversed(lower.mT)
            else:
                failed.append(k)
        todo = failed
        if not todo:
            break
    if todo:
        raise CompressionError(
            f"Hessian {todo[0]} of the batch is not positive definite even with damping "
            f"{fractions[todo[0]]:g} x mean diagonal ({max_attempts} attempts): calibrate on more "
            "or other text, or raise --damping-fraction"
        )
    damping_K = scale_K * torch.tensor(fractions, dtype=scale_K.dtype, device=scale_K.device)
    return HessianFactor(columns_KDD.mT, dead_KD, tuple(fractions), damping_K, tuple(attempts))


def permuted(part: HessianSum, columns_D: torch.Tensor | None) -> HessianSum:
    """The same sums with their features in an order, see ``types.Router``; None changes nothing."""
    if columns_D is None:
        return part

    ordered = partial(in_columns, columns_D=columns_D)
    return replace(
        part,
        sum_DD=ordered(part.sum_DD).index_select(0, columns_D),
        sum_D=None if part.sum_D is None else ordered(part.sum_D),
        cross_OD=None if part.cross_OD is None else ordered(part.cross_OD),
    )


def _reversed(A_DD: torch.Tensor) -> torch.Tensor:
    """Rows and columns in reverse: of what is stored in one piece, simply its numbers in reverse.

    Ten times as fast on a CPU as ``flip`` of both dimensions.
    """
    return A_DD.reshape(-1).flip(0).view(A_DD.shape)
