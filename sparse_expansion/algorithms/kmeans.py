"""KMeans by PyTorch on any device, by scikit-learn on a CPU, or by cuML, whose only home this is.

Shapes: T tokens, P router features, K clusters, R restarts, N candidates.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from sparse_expansion.types import CompressionError

CHUNK_SCORES = 1 << 25
"""Distances that are held at a time: 128 MiB."""
TOLERANCE = 1e-4
"""Squared movement of all centroids, as a share of a feature's mean variance, at which it ends."""
MAX_WEIGHT = 1 << 31
"""Largest whole-number weight that a token is drawn with: sums of 2^31 tokens' fit in an int64."""


def check_backend(backend: str) -> None:
    """Answer a backend that this machine does not have, before any work.

    Raises:
        ValueError: cuML is asked for, and it or a GPU is not there.
    """
    if backend != "cuml":
        return
    if find_spec("cuml") is None:
        raise ValueError(
            "--kmeans cuml: cuML is not installed here: pip install 'sparse-expansion[cuml-cu12]' "
            "(or cuml-cu13), or use --kmeans torch"
        )
    if not torch.cuda.is_available():
        raise ValueError("--kmeans cuml: PyTorch sees no CUDA device here: use --kmeans torch")


def fit_kmeans(
    Z_TP: torch.Tensor,
    *,
    num_clusters: int,
    restarts: int,
    max_iterations: int,
    seed: int,
    backend: str = "auto",
) -> torch.Tensor:
    """KMeans centroids ``[K, P]`` (float32), the best of ``restarts`` by inertia.

    Equal seeds give equal bytes on the same kind of device, but for cuML's.

    Args:
        Z_TP: projected inputs.
        num_clusters: K.
        restarts: runs from different starts, at least 1.
        max_iterations: Lloyd iterations of a run at most.
        seed: of all starts.
        backend: ``torch``, ``sklearn``, ``cuml``, or ``auto``: PyTorch on a GPU, where
            scikit-learn would work on the host, and scikit-learn on a CPU, where PyTorch's bytes
            depend on the number of threads.

    Raises:
        CompressionError: fewer tokens than clusters, or tokens that are not finite.
    """
    num_tokens = Z_TP.shape[0]
    if num_tokens < num_clusters:
        raise CompressionError(
            f"{num_tokens} calibration tokens cannot fill {num_clusters} clusters: use more "
            f"windows (--dataset-size) or --num_clusters {max(1, num_tokens)}"
        )
    if num_clusters == 1:
        return Z_TP.double().mean(dim=0, keepdim=True).float()
    if not bool(torch.isfinite(Z_TP).all()):
        raise CompressionError("router inputs are not finite (NaN or infinity)")
    if backend == "auto":
        backend = "torch" if Z_TP.is_cuda else "sklearn"
    if backend == "cuml":
        return _by_cuml(Z_TP, num_clusters, restarts, max_iterations, seed)
    states = np.random.SeedSequence(seed).generate_state(restarts).tolist()
    if backend == "sklearn":
        return _by_sklearn(Z_TP, num_clusters, states, max_iterations)
    return _by_torch(Z_TP.float(), num_clusters, states, max_iterations)


def _by_sklearn(
    Z_TP: torch.Tensor, num_clusters: int, states: list[int], max_iterations: int
) -> torch.Tensor:
    """One CPU thread per restart, and restarts beside each other.

    scikit-learn adds partial sums in the order in which its threads finish, and equal seeds must
    give equal bytes.
    """
    # Loaded when needed: who only routes tokens need not wait for it.
    from sklearn.cluster import KMeans

    Z = Z_TP.float().cpu().numpy()

    def restart(state: int) -> KMeans:
        # OpenMP's limit belongs to the thread that sets it.
        with threadpool_limits(limits=1, user_api="openmp"):
            return KMeans(
                n_clusters=num_clusters,
                n_init=1,
                max_iter=max_iterations,
                random_state=state,
                algorithm="lloyd",
            ).fit(Z)

    threads = min(len(states), torch.get_num_threads())
    with threadpool_limits(limits=1), ThreadPoolExecutor(threads) as pool:
        fitted = min(pool.map(restart, states), key=lambda model: float(model.inertia_))
    return torch.from_numpy(fitted.cluster_centers_).float().to(Z_TP.device)


def _by_cuml(
    Z_TP: torch.Tensor, num_clusters: int, restarts: int, max_iterations: int, seed: int
) -> torch.Tensor:
    """Its sums are added in another order at every call: the same seed gives other bytes."""
    import cuml.cluster

    model = cuml.cluster.KMeans(
        n_clusters=num_clusters, n_init=restarts, max_iter=max_iterations, random_state=seed
    )
    model.fit(Z_TP.contiguous())
    return torch.as_tensor(model.cluster_centers_, device=Z_TP.device).float()


def _by_torch(
    Z_TP: torch.Tensor, num_clusters: int, states: list[int], max_iterations: int
) -> torch.Tensor:
    """All restarts at once: Lloyd's iterations from k-means++ starts, by products of matrices.

    Arthur and Vassilvitskii, k-means++: the advantages of careful seeding, 2007. A cluster that
    empties takes the farthest token. Tokens are centred first, so that float32 distances are not
    differences of large numbers.
    """
    mean_P = Z_TP.double().mean(dim=0)
    Z_TP = (Z_TP.double() - mean_P).float()
    norms_T = Z_TP.square().sum(dim=1)
    enough = TOLERANCE * float(norms_T.double().mean()) / Z_TP.shape[1]
    centroids_RKP = _starts(Z_TP, norms_T, num_clusters, states)
    for _ in range(max_iterations):
        labels_RT, distances_RT = _assign(Z_TP, norms_T, centroids_RKP)
        moved_RKP = _means(Z_TP, labels_RT, distances_RT, num_clusters)
        shifts_R = (moved_RKP - centroids_RKP).square().sum(dim=(1, 2))
        centroids_RKP = moved_RKP
        if float(shifts_R.max()) <= enough:
            break
    _, distances_RT = _assign(Z_TP, norms_T, centroids_RKP)
    best = int(distances_RT.double().sum(dim=1).argmin())
    return (centroids_RKP[best].double() + mean_P).float()


def _assign(
    Z_TP: torch.Tensor, norms_T: torch.Tensor, centroids_RKP: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each restart's nearest centroid of every token, the lowest on ties, and its squared distance.

    Returns:
        Labels ``[R, T]`` (int64) and distances ``[R, T]``.
    """
    restarts, num_clusters, width = centroids_RKP.shape
    flat = centroids_RKP.reshape(-1, width)
    offsets = flat.square().sum(dim=1)
    labels, distances = [], []
    step = max(1, CHUNK_SCORES // flat.shape[0])
    for part, norms in zip(Z_TP.split(step), norms_T.split(step), strict=True):
        scores = torch.addmm(offsets, part, flat.T, alpha=-2)
        found = scores.view(-1, restarts, num_clusters).min(dim=2)
        labels.append(found.indices.T)
        distances.append((found.values.T + norms).clamp_min_(0))
    return torch.cat(labels, dim=1), torch.cat(distances, dim=1)


def _means(
    Z_TP: torch.Tensor, labels_RT: torch.Tensor, distances_RT: torch.Tensor, num_clusters: int
) -> torch.Tensor:
    """Means of every cluster of every restart, ``[R, K, P]``, by a product with their members.

    A scattered sum would add in another order at every call.
    """
    restarts = labels_RT.shape[0]
    sums = Z_TP.new_zeros(restarts * num_clusters, Z_TP.shape[1])
    sizes = Z_TP.new_zeros(restarts * num_clusters)
    clusters = torch.arange(num_clusters, device=Z_TP.device)
    step = max(1, CHUNK_SCORES // (restarts * num_clusters))
    for part, labels in zip(Z_TP.split(step), labels_RT.split(step, dim=1), strict=True):
        members = (labels[:, None] == clusters[:, None]).float().flatten(0, 1)
        sums += members @ part
        sizes += members.sum(dim=1)
    means_RKP = (sums / sizes.clamp_min(1)[:, None]).view(restarts, num_clusters, -1)
    is_empty_RK = (sizes == 0).view(restarts, num_clusters)
    if bool(is_empty_RK.any()):
        count = int(is_empty_RK.sum(dim=1).max())
        farthest_RN = distances_RT.sort(dim=1, descending=True, stable=True).indices[:, :count]
        for restart in range(restarts):
            empty = torch.nonzero(is_empty_RK[restart]).flatten()
            means_RKP[restart, empty] = Z_TP[farthest_RN[restart, : len(empty)]]
    return means_RKP


def _starts(
    Z_TP: torch.Tensor, norms_T: torch.Tensor, num_clusters: int, states: list[int]
) -> torch.Tensor:
    """Starts ``[R, K, P]``: each token is drawn by its squared distance to those drawn before.

    Of a few candidates the one that leaves the least is taken, as scikit-learn does.
    """
    num_candidates = 2 + int(np.log(num_clusters))
    generators = [np.random.default_rng(state) for state in states]
    draws = np.stack([one.random((num_clusters, num_candidates)) for one in generators])
    draws_RKN = torch.from_numpy(draws).to(Z_TP.device)
    first_R = (draws_RKN[:, 0, 0] * Z_TP.shape[0]).long()
    chosen = [first_R]
    _, nearest_RT = _assign(Z_TP, norms_T, Z_TP[first_R][:, None])
    for k in range(1, num_clusters):
        candidates_RN = _drawn(nearest_RT, draws_RKN[:, k])
        flat = candidates_RN.flatten()
        _, distances = _assign(Z_TP, norms_T, Z_TP[flat][:, None])
        left_RNT = torch.minimum(distances.view(*candidates_RN.shape, -1), nearest_RT[:, None])
        best_R1 = left_RNT.double().sum(dim=2).argmin(dim=1, keepdim=True)
        chosen.append(candidates_RN.gather(1, best_R1)[:, 0])
        nearest_RT = left_RNT.gather(1, best_R1[:, :, None].expand(-1, 1, left_RNT.shape[2]))[:, 0]
    return Z_TP[torch.stack(chosen, dim=1)]


def _drawn(weights_RT: torch.Tensor, draws_RN: torch.Tensor) -> torch.Tensor:
    """Indices ``[R, N]`` drawn in proportion to the weights, by numbers from 0 to 1.

    Weights become whole numbers: their running sums are the same in whatever order a GPU adds.
    """
    peak_R1 = weights_RT.amax(dim=1, keepdim=True).double()
    # All tokens equal the chosen ones: any of them will do.
    shares_RT = torch.where(peak_R1 > 0, weights_RT.double() / peak_R1, 1.0)
    whole_RT = (shares_RT * MAX_WEIGHT).long()
    sums_RT = whole_RT.cumsum(dim=1)
    targets_RN = (draws_RN * sums_RT[:, -1:].double()).long()
    found = torch.searchsorted(sums_RT, targets_RN, right=True)
    return found.clamp_(max=weights_RT.shape[1] - 1)
