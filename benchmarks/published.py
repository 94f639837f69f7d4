"""The published way of expanding a model, in the manner of research code.

Written from the papers: SparseGPT (arXiv 2301.00774, Algorithm 1) and Sparse Expansion (arXiv
2405.15756). `benchmarks.baseline` measures the package against it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sparse_expansion.algorithms.kmeans import fit_kmeans
from sparse_expansion.config import RoutingConfig
from sparse_expansion.model.block_linears import dense_linear
from sparse_expansion.model.streaming import ModelShell

BLOCK = 128
DAMPING = 0.01


def prune(weight: torch.Tensor, H: torch.Tensor, sparsity: float) -> torch.Tensor:
    """SparseGPT, Algorithm 1, column by column."""
    W = weight.float().clone()
    H = H.clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    columns = W.shape[1]
    diagonal = torch.arange(columns)
    H[diagonal, diagonal] += DAMPING * torch.mean(torch.diag(H))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    U = torch.linalg.cholesky(inverse, upper=True)
    losses = torch.zeros(W.shape[0])
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        part, factor = W[:, start:end].clone(), U[start:end, start:end]
        done, errors = torch.zeros_like(part), torch.zeros_like(part)
        saliency = part**2 / torch.diag(factor).reshape(1, -1) ** 2
        order = torch.sort(saliency.flatten())[1]
        mask = torch.zeros(saliency.numel(), dtype=torch.bool)
        mask[order[: int(saliency.numel() * sparsity)]] = True
        mask = mask.reshape(saliency.shape)
        for i in range(end - start):
            column, pivot = part[:, i], factor[i, i]
            kept = column.clone()
            kept[mask[:, i]] = 0
            done[:, i] = kept
            losses += (column - kept) ** 2 / pivot**2
            error = (column - kept) / pivot
            part[:, i:] -= error.unsqueeze(1).matmul(factor[i, i:].unsqueeze(0))
            errors[:, i] = error
        W[:, start:end] = done
        W[:, end:] -= errors.matmul(U[start:end, end:])
    return W


Assignment = Callable[[torch.Tensor], torch.Tensor]


def fit_router(X: torch.Tensor, clusters: int, restarts: int, seed: int) -> Assignment:
    """PCA by a full eigendecomposition and KMeans on all tokens; returns the assignment."""
    routing = RoutingConfig(num_clusters=clusters)
    mean = X.mean(dim=0)
    covariance = (X - mean).T @ (X - mean) / len(X)
    vectors = torch.linalg.eigh(covariance).eigenvectors
    components = vectors[:, -routing.num_components(X.shape[1]) :].T
    centroids = fit_kmeans(
        (X - mean) @ components.T,
        num_clusters=clusters,
        restarts=restarts,
        max_iterations=routing.max_iterations,
        seed=seed,
    )
    return lambda rows: torch.cdist((rows - mean) @ components.T, centroids).argmin(dim=1)


class Hessians:
    """One linear's running Hessians, by cluster, updated window by window."""

    def __init__(self, width: int, clusters: int) -> None:
        """Begin with zeros for every cluster."""
        self.H = torch.zeros(clusters, width, width)
        self.tokens = [0] * clusters

    def add(self, assign: Assignment, _index: int, X: torch.Tensor) -> None:
        """Account for one window's rows."""
        labels = assign(X)
        for k in range(len(self.tokens)):
            rows = X[labels == k]
            if not len(rows):
                continue
            self.H[k] *= self.tokens[k] / (self.tokens[k] + len(rows))
            self.tokens[k] += len(rows)
            scaled = (2 / self.tokens[k]) ** 0.5 * rows.T
            self.H[k] += scaled.matmul(scaled.T)


class RoutedLinear(nn.Module):
    """A linear of dense experts, each token through its own."""

    def __init__(self, assign: Assignment, experts: list[torch.Tensor], bias: Any) -> None:
        """Put dense experts ``[O, D]`` behind an assignment of rows to experts."""
        super().__init__()
        self.assign, self.experts, self.linear_bias = assign, experts, bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run each expert in turn on its tokens."""
        X = hidden.reshape(-1, hidden.shape[-1])
        labels = self.assign(X.float())
        out = X.new_zeros(len(X), self.experts[0].shape[0])
        for k, weight in enumerate(self.experts):
            chosen = labels == k
            out[chosen] = functional.linear(X[chosen], weight.to(X.dtype), self.linear_bias)
        return out.reshape(*hidden.shape[:-1], -1)


def walk(
    shell: ModelShell,
    block: nn.Module,
    layer: int,
    windows: torch.Tensor,
    hidden: torch.Tensor,
    hooks: dict[str, Callable[[int, torch.Tensor], None]] | None = None,
) -> torch.Tensor:
    """One pass of all windows through a block, one window at a time."""
    out = torch.empty_like(hidden)
    index = 0
    handles = [
        dense_linear(block, name).register_forward_hook(
            lambda _module, seen, _out, hook=hook: hook(
                index, seen[0].reshape(-1, seen[0].shape[-1]).float()
            )
        )
        for name, hook in (hooks or {}).items()
    ]
    with torch.no_grad():
        for index in range(len(windows)):
            part = slice(index, index + 1)
            out[part] = shell.call(layer, windows[part]).run(block, hidden[part])
    for handle in handles:
        handle.remove()
    return out


def replace(block: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of a block's linear."""
    parent, _, last = name.rpartition(".")
    setattr(block.get_submodule(parent) if parent else block, last, module)


@dataclass
class Expansion:
    """What one side made, and what it took."""

    seconds: dict[str, float]
    """Seconds by part of the work."""
    zeros: float
    """Share of zeros in all experts."""
    hidden: torch.Tensor
    """Hidden states ``[N, L, D]`` of the calibration windows behind the last block."""


def expand(
    shell: ModelShell, windows: torch.Tensor, clusters: int, sparsity: float, restarts: int
) -> Expansion:
    """Expand all blocks, each calibrated on what the one before puts out."""
    hidden = torch.cat([shell.embed(windows[part]) for part in shell.batches(windows)])
    found = {"routers": 0.0, "experts": 0.0}
    zeros = weights = 0
    start = time.perf_counter()
    for layer in range(shell.num_blocks):
        block = shell.load_block(layer)
        for number, group in enumerate(shell.family.groups):
            seen: dict[int, torch.Tensor] = {}
            walk(shell, block, layer, windows, hidden, {group.linears[0]: seen.__setitem__})
            fitting = time.perf_counter()
            assign = fit_router(
                torch.cat(list(seen.values())), clusters, restarts, 2 * layer + number
            )
            seen.clear()
            found["routers"] += time.perf_counter() - fitting
            linears = {name: dense_linear(block, name) for name in group.linears}
            sums = {
                name: Hessians(linear.weight.shape[1], clusters) for name, linear in linears.items()
            }
            hooks = {name: functools.partial(sums[name].add, assign) for name in linears}
            walk(shell, block, layer, windows, hidden, hooks)
            pruning = time.perf_counter()
            for name, linear in linears.items():
                experts = [prune(linear.weight, H, sparsity) for H in sums[name].H]
                zeros += sum(int((weight == 0).sum()) for weight in experts)
                weights += sum(weight.numel() for weight in experts)
                replace(block, name, RoutedLinear(assign, experts, linear.bias))
            found["experts"] += time.perf_counter() - pruning
        hidden = walk(shell, block, layer, windows, hidden)
        print(
            f"  published way: block {layer + 1}, {time.perf_counter() - start:.0f} s", flush=True
        )
    seconds = time.perf_counter() - start
    found["passes, Hessians"] = seconds - sum(found.values())
    return Expansion(found, zeros / weights, hidden)
