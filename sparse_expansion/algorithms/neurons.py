"""What a neuron (an output row of a linear) does on given inputs.

Shapes: T tokens, D input features, O neurons. Statistics are in float64, a few neurons at a time.
Definitions: "Wasserstein Distances, Neuronal Entanglement, and Sparsity" (arXiv 2405.15756,
section 3).
"""

from __future__ import annotations

import math

import torch

from sparse_expansion.config import RANKINGS
from sparse_expansion.types import CompressionError

NEURONS_AT_A_TIME = 256
"""Neurons whose outputs are held in float64 at once."""
_ROOT_2PI = math.sqrt(2 * math.pi)


def _density(z: torch.Tensor) -> torch.Tensor:
    """Density of N(0, 1)."""
    return torch.exp(-0.5 * z.square()) / _ROOT_2PI


def _standardise(Y_TO: torch.Tensor) -> torch.Tensor:
    """Columns with mean 0 and variance 1; constant columns become 0."""
    Y = Y_TO.double()
    centred = Y - Y.mean(dim=0)
    deviation = centred.square().mean(dim=0).sqrt()
    return centred / torch.where(deviation > 0, deviation, 1)


def wasserstein_to_normal(Y_TO: torch.Tensor) -> torch.Tensor:
    """``W_1`` between each neuron's standardised outputs and N(0, 1), ``[O]`` (float64).

    Exact for the empirical distribution: ``integral |F^-1(u) - Phi^-1(u)| du``, piece by piece over
    the intervals of u on which ``F^-1`` is one output. On each, the integral of ``Phi^-1`` is a
    difference of normal densities.

    Raises:
        CompressionError: there are no tokens.
    """
    count = Y_TO.shape[0]
    if count == 0:
        raise CompressionError("no tokens to describe neurons on")
    x = _standardise(Y_TO).sort(dim=0).values
    u = torch.linspace(0, 1, count + 1, dtype=torch.float64, device=x.device)
    edges = torch.special.ndtri(u)
    density = _density(edges)
    low, high = edges[:-1, None], edges[1:, None]
    # Where the quantile function crosses the output inside the interval; at an end if it does not.
    cut = torch.minimum(torch.maximum(x, low), high)
    at_cut = _density(cut)
    share = torch.special.ndtr(cut)
    below = x * (share - u[:-1, None]) - (density[:-1, None] - at_cut)
    above = (at_cut - density[1:, None]) - x * (u[1:, None] - share)
    return (below + above).sum(dim=0)


def wasserstein_between(A_TO: torch.Tensor, B_TO: torch.Tensor) -> torch.Tensor:
    """``W_1`` between two samples of every neuron with equally many tokens, ``[O]`` (float64)."""
    if A_TO.shape != B_TO.shape:
        raise ValueError(f"outputs {tuple(A_TO.shape)} and {tuple(B_TO.shape)} differ in shape")
    A, B = (part.double().sort(dim=0).values for part in (A_TO, B_TO))
    return (A - B).abs().mean(dim=0)


def mapping_difficulty(X_TD: torch.Tensor, Y_TO: torch.Tensor, *, seed: int) -> torch.Tensor:
    """How far a neuron has to tear similar inputs apart, ``[O]`` (float64).

    Mean over random disjoint pairs of tokens of ``(|dy| / median |dy|) / (|dx| / max |dx|)``; pairs
    of equal inputs are left out. 0 for neurons whose median difference is 0.

    Args:
        X_TD: inputs.
        Y_TO: the neurons' outputs on them.
        seed: the seed of the random pairs.

    Raises:
        CompressionError: there is no pair of different inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(X_TD.shape[0], generator=generator).to(X_TD.device)
    pairs = order[: len(order) // 2 * 2].reshape(-1, 2)
    first, second = X_TD[pairs[:, 0]].double(), X_TD[pairs[:, 1]].double()
    dx = torch.linalg.vector_norm(first - second, dim=1)
    differs = dx > 0
    if not bool(differs.any()):
        raise CompressionError("no two inputs differ: give more text")
    pairs, dx = pairs[differs], dx[differs]
    dy = (Y_TO[pairs[:, 0]].double() - Y_TO[pairs[:, 1]].double()).abs()
    # The mean of the two middle ones where there is no middle, as everywhere but in PyTorch.
    median = dy.quantile(0.5, dim=0)
    ratio = (dy / torch.where(median > 0, median, 1)) / (dx / dx.max())[:, None]
    return torch.where(median > 0, ratio.mean(dim=0), 0)


def moments(Y_TO: torch.Tensor) -> dict[str, torch.Tensor]:
    """``mean``, ``variance``, ``kurtosis`` of every neuron (3 for a normal, 0 for a constant)."""
    Y = Y_TO.double()
    mean = Y.mean(dim=0)
    squares = (Y - mean).square()
    variance = squares.mean(dim=0)
    fourth = squares.square().mean(dim=0)
    safe = torch.where(variance > 0, variance, 1)
    return {"mean": mean, "variance": variance, "kurtosis": fourth / safe.square()}


def describe(X_TD: torch.Tensor, Y_TO: torch.Tensor, *, seed: int) -> dict[str, torch.Tensor]:
    """``mean``, ``variance``, ``kurtosis``, ``wasserstein`` (to the normal) and ``difficulty``.

    Args:
        X_TD: inputs.
        Y_TO: the neurons' outputs on them.
        seed: the seed of the random pairs for the difficulty.

    Returns:
        Each quantity by its name, ``[O]`` in float64.
    """
    parts = [
        moments(Y)
        | {
            "wasserstein": wasserstein_to_normal(Y),
            "difficulty": mapping_difficulty(X_TD, Y, seed=seed),
        }
        for Y in Y_TO.split(NEURONS_AT_A_TIME, dim=1)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def compare(
    dense_TO: torch.Tensor, other_TO: torch.Tensor, labels_T: torch.Tensor
) -> dict[str, torch.Tensor]:
    """How far another model's outputs are from the dense ones.

    Args:
        dense_TO: the dense neurons' outputs.
        other_TO: the other model's outputs on the same inputs.
        labels_T: the other model's cluster of every token.

    Returns:
        ``error`` (mean squared difference over the dense variance), ``distance`` (``W_1`` between
        the two distributions over the dense standard deviation), and ``wasserstein_clusters``
        (``W_1`` of the dense outputs to the normal inside each cluster, weighted by its tokens);
        ``[O]`` in float64.
    """
    found: dict[str, list[torch.Tensor]] = {
        "error": [],
        "distance": [],
        "wasserstein_clusters": [],
    }
    members = [torch.nonzero(labels_T == k).flatten() for k in torch.unique(labels_T)]
    for dense, other in zip(
        dense_TO.split(NEURONS_AT_A_TIME, dim=1),
        other_TO.split(NEURONS_AT_A_TIME, dim=1),
        strict=True,
    ):
        variance = dense.double().var(dim=0, correction=0)
        safe = torch.where(variance > 0, variance, 1)
        squares = (dense.double() - other.double()).square().mean(dim=0)
        found["error"].append(squares / safe)
        found["distance"].append(wasserstein_between(dense, other) / safe.sqrt())
        parts = [wasserstein_to_normal(dense[rows]) * len(rows) for rows in members]
        found["wasserstein_clusters"].append(torch.stack(parts).sum(dim=0) / len(labels_T))
    return {name: torch.cat(values) for name, values in found.items()}


def rank(ranking: str, W_OD: torch.Tensor, Y_TO: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Neurons in falling order of a quantity, ``[O]`` (int64); equal ones in index order.

    Args:
        ranking: ``wasserstein`` (of the outputs to a normal), ``mean`` (absolute, of the outputs),
            ``variance`` (of the outputs), ``magnitude`` (norm of the weights) or ``random``.
        W_OD: weights.
        Y_TO: the neurons' outputs on some text.
        seed: the seed of the ranking ``random``.

    Raises:
        ValueError: the ranking is none of these.
    """
    if ranking == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(W_OD.shape[0], generator=generator).to(W_OD.device)
    if ranking == "magnitude":
        value = torch.linalg.vector_norm(W_OD, dim=1, dtype=torch.float64)
    elif ranking == "wasserstein":
        parts = Y_TO.split(NEURONS_AT_A_TIME, dim=1)
        value = torch.cat([wasserstein_to_normal(Y) for Y in parts])
    elif ranking in ("mean", "variance"):
        parts = Y_TO.split(NEURONS_AT_A_TIME, dim=1)
        value = torch.cat([moments(Y)[ranking] for Y in parts]).abs()
    else:
        raise ValueError(f"ranking {ranking!r} is none of {', '.join(RANKINGS)}")
    return torch.sort(value, descending=True, stable=True).indices
