"""Sums over tokens, in chunks of fixed size, so that it does not matter who sums."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from sparse_expansion.algorithms.centring import about_cluster_means
from sparse_expansion.algorithms.clustering import (
    balance_clusters,
    cluster_sums,
    few_centroids,
    fit_pca,
    project,
    route,
)
from sparse_expansion.algorithms.hessian import (
    energy_of,
    hessian_sum,
    map_tensors,
    merge_hessians,
)
from sparse_expansion.algorithms.kmeans import fit_kmeans
from sparse_expansion.algorithms.upstream import UpstreamCorrection, upstream_correction
from sparse_expansion.config import RoutingConfig
from sparse_expansion.data.transfers import is_on_device, to_device
from sparse_expansion.types import HessianSum, Router

CHUNK_TOKENS = 8192
"""Tokens that are summed, projected or routed at a time."""


def sum_hessians(X_TE: torch.Tensor, device: str, width: int | None = None) -> HessianSum:
    """Hessian sum of inputs ``[T, D]``.

    Args:
        X_TE: inputs, or with a ``width`` maybe each followed by what the outputs for it lack,
            ``[T, D + O]``.
        device: to sum on.
        width: input features D, where rows may be wider.
    """
    width = width or X_TE.shape[1]

    def summed(part_TE: torch.Tensor) -> HessianSum:
        residual_TO = part_TE[:, width:] if part_TE.shape[1] > width else None
        return hessian_sum(part_TE[:, :width], residual_TO)

    return merge_hessians(summed(to_device(part, device)) for part in X_TE.split(CHUNK_TOKENS))


def sum_to_device(part: HessianSum, device: str) -> HessianSum:
    """The sum on a device: itself where it is there."""
    return map_tensors(part, partial(to_device, device=device))


def joined(parts: Sequence[torch.Tensor], device: str) -> torch.Tensor:
    """Rows of several shards, one after another: on the device if any of them are there."""
    if any(map(is_on_device, parts)):
        return torch.cat([to_device(part, device) for part in parts])
    return torch.cat(list(parts))


def added_up(shards: Sequence[list[torch.Tensor]], device: str) -> list[torch.Tensor]:
    """Sums of the tensors that every shard has a list of, in shard order; none without shards."""
    totals = []
    for first, *others in zip(*shards, strict=True):
        total = to_device(first, device).clone()
        for part in others:
            total += to_device(part, device)
        totals.append(total)
    return totals


def fit_router(
    samples: Sequence[torch.Tensor],
    routing: RoutingConfig,
    *,
    device: str,
    seed: int,
    is_routed: bool = False,
) -> tuple[Router, HessianSum, int]:
    """PCA and KMeans on samples of a group's inputs.

    Args:
        samples: ``[T, D]`` each.
        routing: with the number of clusters that is wanted.
        device: to compute on.
        seed: of KMeans.
        is_routed: whether the inputs are those of an expert of a mixture, which may get fewer
            tokens than there are clusters, or none.

    Returns:
        The router, the samples' Hessian sum, and how many tokens they have.
    """
    router, moments = _fitted(samples, routing, device, seed, is_routed=is_routed)
    return router, moments, moments.num_tokens


@dataclass(frozen=True)
class ClusterMoments:
    """What is known of every cluster's tokens, float64."""

    counts_K: torch.Tensor
    """How many there are."""
    sums_KD: torch.Tensor
    """``sum x``."""
    squares_KD: torch.Tensor
    """``sum x^2``, feature by feature."""

    @property
    def variance_KD(self) -> torch.Tensor:
        """Variances about the cluster's mean."""
        divisor_K1 = self.counts_K.clamp(min=1)[:, None]
        mean_KD = self.sums_KD / divisor_K1
        return (self.squares_KD / divisor_K1 - mean_KD.square()).clamp_(min=0)

    def about_means(self, group: HessianSum) -> HessianSum:
        """The same tokens' sums over all clusters, over tokens less their cluster's mean."""
        return about_cluster_means(group, self.sums_KD, self.counts_K)


def cluster_moments(samples: Sequence[torch.Tensor], router: Router, device: str) -> ClusterMoments:
    """Moments of samples ``[T, D]`` by the router's clusters."""
    shape = router.num_clusters, len(router.mean_D)
    sums_KD, squares_KD = torch.zeros(2, *shape, dtype=torch.float64, device=device)
    counts_K = torch.zeros(shape[0], dtype=torch.float64, device=device)
    for X_TD in samples:
        for part in X_TD.split(CHUNK_TOKENS // 8):
            there_TD = to_device(part, device)
            labels_T = route(there_TD, router)
            there_TD = there_TD.double()
            sums_KD += cluster_sums(there_TD, labels_T, router.num_clusters)
            squares_KD += cluster_sums(there_TD.square(), labels_T, router.num_clusters)
            counts_K += torch.bincount(labels_T, minlength=router.num_clusters)
    return ClusterMoments(counts_K, sums_KD, squares_KD)


def fit_correction(
    samples: Sequence[torch.Tensor],
    upstream: Sequence[torch.Tensor],
    router: Router,
    gram: HessianSum,
    clusters: ClusterMoments | None,
    *,
    damping: float,
    device: str,
) -> UpstreamCorrection:
    """How a linear makes up for what the blocks before have changed, see ``algorithms.upstream``.

    Args:
        samples: inputs ``[S, D]``.
        upstream: what the outputs lack for them ``[S, O]``.
        router: of the inputs.
        gram: their Hessian sum; about clusters' means where these are given.
        clusters: what is known of them; None where means stay in.
        damping: share of the Hessian's mean diagonal that pulls towards nothing.
        device: to compute on.
    """
    rows = upstream[0].shape[1]
    lacks_KO = torch.zeros(router.num_clusters, rows, dtype=torch.float64, device=device)
    cross_OD = torch.zeros(rows, len(router.mean_D), device=device)
    energy = 0.0
    for X_SD, E_SO in zip(samples, upstream, strict=True):
        chunks = zip(X_SD.split(CHUNK_TOKENS), E_SO.split(CHUNK_TOKENS), strict=True)
        for X, E in ([to_device(part, device) for part in chunk] for chunk in chunks):
            cross_OD += E.T @ X.float()
            energy += energy_of(E)
            if clusters is not None:
                lacks_KO += cluster_sums(E.double(), route(X, router), router.num_clusters)
    mean_KO = lacks_KO
    if clusters is not None:
        mean_KO = lacks_KO / clusters.counts_K.clamp(min=1)[:, None]
        cross_OD -= (mean_KO.T @ clusters.sums_KD).to(cross_OD)
        energy = max(0.0, energy - float((mean_KO * lacks_KO).sum()))
    return upstream_correction(gram, cross_OD, mean_KO.float(), energy, damping)


def _fitted(
    samples: Sequence[torch.Tensor],
    routing: RoutingConfig,
    device: str,
    seed: int,
    *,
    is_routed: bool,
) -> tuple[Router, HessianSum]:
    """PCA and KMeans, and the samples' Hessian sum."""
    moments = merge_hessians(sum_hessians(X_TD, device) for X_TD in samples)
    assert moments.sum_D is not None
    num_tokens, width = moments.num_tokens, moments.sum_D.shape[0]
    components_PD = None
    if routing.pca_reduction_factor is None:
        mean_D = (moments.sum_D / (max(1, num_tokens) if is_routed else num_tokens)).float()
    elif is_routed and not num_tokens:
        mean_D = moments.sum_D.float()
        components_PD = torch.eye(routing.num_components(width), width, device=mean_D.device)
    else:
        mean_D, components_PD = fit_pca(moments, num_components=routing.num_components(width))
    Z_TP = torch.cat(
        [
            project(to_device(part, device), mean_D, components_PD)
            for X_TD in samples
            for part in X_TD.split(CHUNK_TOKENS)
        ]
    )
    if is_routed and num_tokens < routing.num_clusters:
        router = Router(mean_D, components_PD, few_centroids(Z_TP, routing.num_clusters))
        return router, moments
    centroids_KP = fit_kmeans(
        Z_TP,
        num_clusters=routing.num_clusters,
        restarts=routing.restarts,
        max_iterations=routing.max_iterations,
        seed=seed,
        backend=routing.kmeans,
    )
    if routing.balance:
        centroids_KP = balance_clusters(Z_TP, centroids_KP, least=routing.balance)
    return Router(mean_D, components_PD, centroids_KP), moments


def route_all(X_TD: torch.Tensor, router: Router, device: str) -> torch.Tensor:
    """Clusters of all tokens ``[T]``, on the device."""
    return torch.cat([route(to_device(part, device), router) for part in X_TD.split(CHUNK_TOKENS)])


def evenly_spaced(count: int, wanted: int) -> torch.Tensor:
    """Indices of at most so many of ``count`` rows, the first and the last among them."""
    share = min(count, wanted)
    return torch.linspace(0, count - 1, share, dtype=torch.float64).round().long()


def shuffled(labels_T: torch.Tensor, name: str) -> torch.Tensor:
    """The labels in a random order that the name alone decides: sizes stay, meaning goes."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    order = torch.randperm(labels_T.shape[0], generator=generator)
    return labels_T[order.to(labels_T.device)]
