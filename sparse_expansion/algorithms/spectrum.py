"""The largest eigenvalues of a symmetric matrix and their vectors, by products alone.

Shapes: D rows and columns, P eigenvectors.
"""

from __future__ import annotations

import torch

OVERSAMPLING = 16
"""Vectors that subspace iteration carries beyond those that are wanted."""
MAX_SUBSPACE_ITERATIONS = 40
"""Iterations after which the subspace is taken as it is."""
SUBSPACE_TOLERANCE = 1e-5
"""Relative growth of the eigenvalues' sum at which the iteration ends."""


def takes_subspace_iteration(width: int, num_vectors: int) -> bool:
    """Whether so few vectors are wanted that subspace iteration is the cheaper way."""
    return 4 * (num_vectors + OVERSAMPLING) <= width


def leading_vectors(A_DD: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest eigenvalues ``[P]`` and their eigenvectors ``[D, P]``, by rising eigenvalue.

    Subspace iteration from a fixed start: products in place of a full decomposition, which is
    bound by memory for wide layers (Halko et al., arXiv 0909.4061, section 4.5). It ends when the
    eigenvalues' sum no longer grows. A narrow matrix is decomposed.

    Args:
        A_DD: symmetric, with no negative eigenvalues.
        count: how many; at least 1.
    """
    width = A_DD.shape[0]
    if not takes_subspace_iteration(width, count):
        values, vectors = torch.linalg.eigh(A_DD)
        return values[-count:], vectors[:, -count:]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(width, count + OVERSAMPLING, generator=generator, dtype=A_DD.dtype)
    basis = torch.linalg.qr(A_DD @ start.to(A_DD.device)).Q
    captured = 0.0
    for _ in range(MAX_SUBSPACE_ITERATIONS):
        image = A_DD @ basis
        values, rotation = torch.linalg.eigh(basis.T @ image)
        before, captured = captured, float(values[-count:].sum())
        if captured - before <= SUBSPACE_TOLERANCE * captured:
            break
        basis = torch.linalg.qr(image).Q
    else:
        values, rotation = torch.linalg.eigh(basis.T @ (A_DD @ basis))
    return values[-count:], basis @ rotation[:, -count:]
