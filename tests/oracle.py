"""A slow float64 oracle, written from the papers' equations, one weight at a time.

SparseGPT (arXiv 2301.00774): after column j is decided, the remaining columns F of every row take
the optimal update  w_F -= (w_j - q_j) / [H_F^-1]_jj * [H_F^-1]_{j,F}  with the inverse of the
*remaining* submatrix H_F (equation 4), recomputed from scratch for every column. No Cholesky.
"""

from __future__ import annotations

import numpy as np


def damped(H: np.ndarray, fraction: float) -> np.ndarray:
    H = H.astype(np.float64).copy()
    dead = np.diag(H) == 0
    mean = np.diag(H).mean() or 1.0
    H[np.diag_indices_from(H)] += fraction * mean
    H[dead, dead] += mean
    return H


def grid_round(w: float, scale: float, zero: float, bits: int) -> float:
    # The quotient in float32: a row's largest weight lies exactly between two codes of a symmetric
    # grid, and which of the two it gets is decided by the rounding of this one division.
    code = min(max(float(np.round(np.float32(w) / np.float32(scale))) + zero, 0), 2**bits - 1)
    return scale * (code - zero)


def compress(
    W: np.ndarray,
    H: np.ndarray,
    *,
    fraction: float | None = None,
    n_m: tuple[int, int] | None = None,
    block: int = 128,
    damping: float = 0.01,
    grid: tuple[np.ndarray, np.ndarray, int, int] | None = None,
    order: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The compressed weight and the mask of kept weights."""
    W = W.astype(np.float64).copy()
    rows, width = W.shape
    dead = np.diag(H) == 0
    order = np.arange(width) if order is None else order
    W, H, dead = W[:, order], H[np.ix_(order, order)], dead[order]
    W[:, dead] = 0
    H = damped(H, damping)
    kept = np.ones_like(W, dtype=bool)
    # [H_F^-1]_jj for F = {j, j+1, ...}
    pivots = np.array([np.linalg.inv(H[j:, j:])[0, 0] for j in range(width)])
    for start in range(0, width, block):
        stop = min(start + block, width)
        if fraction is not None:
            saliency = W[:, start:stop] ** 2 / pivots[start:stop]
            count = int(np.floor(fraction * saliency.size + 0.5))
            # The product walks columns first, so ties go by column, then row.
            flat = np.argsort(saliency.T.reshape(-1), kind="stable")[:count]
            block_kept = np.ones(saliency.size, dtype=bool)
            block_kept[flat] = False
            kept[:, start:stop] = block_kept.reshape(stop - start, rows).T
        for j in range(start, stop):
            if n_m is not None and (j - start) % n_m[1] == 0:
                end = min(j + n_m[1], stop)
                count = (end - j) * n_m[0] // n_m[1]
                for row in range(rows):
                    saliency = W[row, j:end] ** 2 / pivots[j:end]
                    kept[row, j + np.argsort(saliency, kind="stable")[:count]] = False
            inverse = np.linalg.inv(H[j:, j:])
            for row in range(rows):
                w = W[row, j]
                q = w
                if grid is not None:
                    scale, zero, bits, size = grid
                    group = order[j] // size
                    q = grid_round(w, scale[row, group], zero[row, group], bits)
                if not kept[row, j]:
                    q = 0.0
                W[row, j:] -= (w - q) / inverse[0, 0] * inverse[0]
                W[row, j] = q
    back = np.argsort(order)
    return W[:, back], kept[:, back]
