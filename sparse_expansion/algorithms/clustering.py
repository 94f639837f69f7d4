"""The router: PCA from streamed sums, clusters made alike in size, the one routing function.

Shapes: T tokens, D input features, P PCA components, K clusters.
"""

from __future__ import annotations

import numpy as np
import torch

from sparse_expansion.types import CompressionError, HessianSum, Router

OVERSAMPLING = 16
"""Vectors that subspace iteration carries beyond the components that are wanted."""
MAX_SUBSPACE_ITERATIONS = 40
"""Iterations after which the subspace is taken as it is."""
SUBSPACE_TOLERANCE = 1e-5
"""Relative growth of the captured variance at which the iteration ends."""


def fit_pca(moments: HessianSum, *, num_components: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading principal components from ``sum x``, ``sum x x^T`` and the count.

    The covariance ``sum x x^T / T - mean mean^T`` is formed in float64, so that the tokens never
    have to be in memory at once, and diagonalised in float64, or iterated on in float32. Signs are
    fixed (largest entry positive).

    Returns:
        ``mean_D`` and ``components_PD`` in float32, by falling variance.

    Raises:
        CompressionError: there are no tokens.
    """
    assert moments.sum_D is not None
    count = moments.num_tokens
    if count == 0:
        raise CompressionError("no calibration tokens to fit a router on")
    width = moments.sum_D.shape[0]
    mean_D = moments.sum_D / count
    # In place: for a wide layer each float64 copy is gigabytes.
    covariance = moments.sum_DD.double().div_(count).addr_(mean_D, mean_D, alpha=-1)
    first = max(0, width - num_components)
    if takes_subspace_iteration(width, num_components):
        vectors = _leading_vectors(covariance.float(), num_components)
    elif covariance.is_cuda:
        vectors = torch.linalg.eigh(covariance).eigenvectors[:, first:]
    else:
        # Loaded when needed: who only routes tokens need not wait for it. It has to be there before
        # its threads are limited.
        import scipy.linalg
        from threadpoolctl import threadpool_limits

        # SciPy's LAPACK has threads of its own; as many as PyTorch has, so that a worker that was
        # given one thread computes the same bytes wherever it runs.
        with threadpool_limits(limits=torch.get_num_threads(), user_api="blas"):
            _, found = scipy.linalg.eigh(
                covariance.numpy(), subset_by_index=[first, width - 1], check_finite=False
            )
        vectors = torch.from_numpy(np.ascontiguousarray(found))
    components_PD = vectors.flip(1).T.contiguous()
    peak = components_PD.abs().argmax(dim=1, keepdim=True)
    components_PD *= torch.sign(components_PD.gather(1, peak))
    return mean_D.float(), components_PD.float()


def takes_subspace_iteration(width: int, num_components: int) -> bool:
    """Whether so few components are wanted that subspace iteration is the cheaper way."""
    return 4 * (num_components + OVERSAMPLING) <= width


def _leading_vectors(A_DD: torch.Tensor, count: int) -> torch.Tensor:
    """Eigenvectors ``[D, count]`` of the largest eigenvalues, by rising eigenvalue.

    Subspace iteration from a fixed start: products in place of a full decomposition, which is
    bound by memory for wide layers (Halko et al., arXiv 0909.4061, section 4.5). It ends when the
    variance that is captured no longer grows.
    """
    width = A_DD.shape[0]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(width, count + OVERSAMPLING, generator=generator, dtype=A_DD.dtype)
    basis = torch.linalg.qr(A_DD @ start.to(A_DD.device)).Q
    captured = 0.0
    for _ in range(MAX_SUBSPACE_ITERATIONS):
        image = A_DD @ basis
        values, rotation = torch.linalg.eigh(basis.T @ image)
        before, captured = captured, float(values[-count:].sum())
        if captured - before <= SUBSPACE_TOLERANCE * captured:
            return basis @ rotation[:, -count:]
        basis = torch.linalg.qr(image).Q
    return basis @ torch.linalg.eigh(basis.T @ (A_DD @ basis)).eigenvectors[:, -count:]


def project(
    X_TD: torch.Tensor, mean_D: torch.Tensor, components_PD: torch.Tensor | None
) -> torch.Tensor:
    """``(x - mean) components^T`` in float32; without components, ``x - mean``."""
    X = X_TD.float()
    if components_PD is None:
        return X - mean_D
    return torch.addmm(-(components_PD @ mean_D), X, components_PD.T)


def route(X_TD: torch.Tensor, router: Router) -> torch.Tensor:
    """Expert of every token, ``argmin_k ||project(x) - centroid_k||^2`` (int64).

    The same function labels tokens in calibration and routes them at inference, so the two cannot
    disagree. On equal distances the lowest k wins. ``||z||^2`` is the same for every k and left
    out; with few clusters one product of ``x`` with K vectors is all that remains.
    """
    if router.num_clusters == 1:
        return torch.zeros(X_TD.shape[0], dtype=torch.int64, device=X_TD.device)
    matrix, offset_K = router.scores
    inputs = X_TD.float()
    if not router.is_folded:
        inputs = project(X_TD, router.mean_D, router.components_PD)
    return torch.addmm(offset_K, inputs, matrix.T, alpha=-2).argmin(dim=1)


def cluster_sums(rows_TF: torch.Tensor, labels_T: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Sums of every cluster's rows ``[K, F]``, in the rows' dtype.

    A product, for additions by index are made in any order on a GPU.
    """
    is_in_TK = torch.nn.functional.one_hot(labels_T, num_clusters)
    return is_in_TK.T.to(rows_TF) @ rows_TF


def few_centroids(Z_TP: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Centroids ``[K, P]`` for fewer tokens than clusters: each token, and the first one again.

    What is there again gets no token: on equal distances the lowest number wins. Without any token
    all are at the origin, and the first gets whatever comes.

    Args:
        Z_TP: projected inputs, fewer than ``num_clusters``.
        num_clusters: K.
    """
    first_P = Z_TP[0] if len(Z_TP) else Z_TP.new_zeros(Z_TP.shape[1])
    again = first_P.expand(num_clusters - len(Z_TP), -1)
    return torch.cat([Z_TP.float(), again.float()])


def balance_clusters(
    Z_TP: torch.Tensor, centroids_KP: torch.Tensor, *, least: float
) -> torch.Tensor:
    """Centroids for which no cluster of the tokens is much smaller than the others.

    The smallest cluster's centroid is given up, so that its tokens go to their neighbours, and the
    largest cluster is cut in two: at the median along its principal direction, each half's mean a
    centroid. This is done again until the smallest is large enough, or no longer grows.

    Args:
        Z_TP: projected inputs.
        centroids_KP: the centroids that ``fit_kmeans`` found.
        least: tokens that the smallest cluster is to have, as a share of ``T / K``.

    Returns:
        Centroids ``[K, P]``, whose smallest cluster is at least as large as before.
    """
    num_clusters = centroids_KP.shape[0]
    wanted = least * Z_TP.shape[0] / num_clusters

    def labels_and_sizes(centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        labels_T = torch.cdist(Z_TP, centroids).argmin(dim=1)
        return labels_T, torch.bincount(labels_T, minlength=num_clusters)

    found = best = centroids_KP
    labels_T, sizes_K = labels_and_sizes(found)
    best_size = int(sizes_K.min())
    for _ in range(4 * num_clusters):
        if num_clusters == 1 or int(sizes_K.min()) >= wanted:
            break
        smallest, largest = int(sizes_K.argmin()), int(sizes_K.argmax())
        own_TP = Z_TP[labels_T == largest]
        centred = own_TP - own_TP.mean(dim=0)
        along_T = centred @ torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
        is_above = along_T > along_T.median()
        if not bool(is_above.any()):
            break
        found = found.clone()
        found[smallest], found[largest] = own_TP[is_above].mean(0), own_TP[~is_above].mean(0)
        labels_T, sizes_K = labels_and_sizes(found)
        if int(sizes_K.min()) > best_size:
            best, best_size = found, int(sizes_K.min())
    return best
