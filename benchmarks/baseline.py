"""This package's expansion against the published way of doing it, on a real model.

    python -m benchmarks.baseline MODEL_FOLDER TEXT_FOLDER

The baseline is written from the papers (SparseGPT, arXiv 2301.00774, Algorithm 1; Sparse Expansion,
arXiv 2405.15756) in the way research code does it: every activation of a group held at once, five
passes of the calibration text through each block (two per group of linears, one to go on), a router
from a full eigendecomposition and KMeans on all tokens with 100 restarts, Hessians per linear (gate
and up do not share theirs), one expert at a time, per expert a Cholesky factorization, an inverse
and a second Cholesky factorization, and a Python loop over columns with a rank-1 update of the rest
of the block for each. The arithmetic is float32 on both sides, KMeans is scikit-learn's, and
`--restarts` sets how often the baseline's starts; what its restarts took is reported apart.

Also timed: what no implementation can avoid, namely two passes through every block, the products
for each expert's Hessian, one factorization per expert, and the products that carry the errors of
earlier columns to later ones. All in one process with the same number
of threads; the package runs in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.packing import median_seconds
from benchmarks.synthetic import command
from sparse_expansion.algorithms.clustering import fit_kmeans
from sparse_expansion.config import RoutingConfig
from sparse_expansion.data.corpora import calibration_windows, load_corpus
from sparse_expansion.data.tokenization import encoder, load_tokenizer
from sparse_expansion.model.families import LinearGroup, dense_linear
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
        self.H = torch.zeros(clusters, width, width)
        self.tokens = [0] * clusters

    def add(self, assign: Any, _index: int, X: torch.Tensor) -> None:
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

    def __init__(self, assign: Any, experts: list[torch.Tensor], bias: Any) -> None:
        super().__init__()
        self.assign, self.experts, self.linear_bias = assign, experts, bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Each expert in turn on its tokens."""
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


def baseline(
    shell: ModelShell, windows: torch.Tensor, clusters: int, sparsity: float, restarts: int
) -> dict[str, float]:
    """Seconds to expand all blocks, each calibrated on what the one before puts out."""
    hidden = torch.cat([shell.embed(windows[part]) for part in shell.batches(windows)])
    found = {"routers": 0.0, "experts": 0.0}
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
                replace(block, name, RoutedLinear(assign, experts, linear.bias))
            found["experts"] += time.perf_counter() - pruning
        hidden = walk(shell, block, layer, windows, hidden)
        print(f"  baseline: block {layer + 1}, {time.perf_counter() - start:.0f} s", flush=True)
    seconds = time.perf_counter() - start
    return {"all": seconds, **found, "passes, Hessians": seconds - sum(found.values())}


def unavoidable(shell: ModelShell, windows: torch.Tensor, clusters: int) -> dict[str, float]:
    """Seconds for all blocks of the work that any implementation has to do."""
    block = shell.load_block(0)
    batches = shell.batches(windows)
    hidden = torch.cat([shell.embed(windows[part]) for part in batches])

    def one_pass() -> None:
        with torch.no_grad():
            for part in batches:
                shell.call(0, windows[part]).run(block, hidden[part])

    found = {"passes": 2 * median_seconds(one_pass)}
    tokens = windows.numel()
    for group in shell.family.groups:
        for name, value in group_work(group, block, tokens, clusters).items():
            found[name] = found.get(name, 0.0) + value
    return {name: shell.num_blocks * value for name, value in found.items()}


def group_work(
    group: LinearGroup, block: nn.Module, tokens: int, clusters: int
) -> dict[str, float]:
    """Seconds of one group's products and factorizations; clusters of equal size."""
    weights = [dense_linear(block, name).weight.float() for name in group.linears]
    rows, width = sum(len(weight) for weight in weights), weights[0].shape[1]
    X = torch.randn(tokens // clusters, width)
    A = X.T @ X + width * torch.eye(width)
    errors, rest = torch.randn(rows, BLOCK), torch.randn(BLOCK, width)

    def pushes() -> None:
        for start in range(0, width, BLOCK):
            errors.matmul(rest[:, start + BLOCK :])

    return {
        "hessians": clusters * median_seconds(lambda: X.T @ X),
        "factorizations": clusters * median_seconds(lambda: torch.linalg.cholesky(A)),
        "error products": clusters * median_seconds(pushes),
    }


def shortened(model: Path, layers: int, folder: Path) -> Path:
    """The model with its first blocks only."""
    short = folder / "model"
    short.mkdir()
    for path in model.iterdir():
        if path.name != "config.json":
            (short / path.name).symlink_to(path)
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = layers
    for name in [name for name, value in config.items() if isinstance(value, list)]:
        if len(config[name]) > layers and name == "layer_types":
            config[name] = config[name][:layers]
    (short / "config.json").write_text(json.dumps(config))
    return short


def main() -> None:
    """Print the times, the two ratios, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("dataset")
    parser.add_argument("--layers", type=int, help="only the first blocks; default all")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--clusters", type=int, default=16)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--restarts", type=int, default=100, help="of the baseline's KMeans")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = args.model.resolve()
        if args.layers is not None:
            model = shortened(model, args.layers, Path(folder))
        shell = ModelShell(model, dtype="float32")
        windows = calibration_windows(
            load_corpus(args.dataset).calibration,
            encoder(load_tokenizer(model)),
            num_windows=args.windows,
            seqlen=args.seqlen,
            seed=0,
        )
        flags = f"--dataset-size {args.windows} --seqlen {args.seqlen} --dtype float32 "
        flags += f"--preset paper --num_clusters {args.clusters} --sparsity {args.sparsity} "
        flags += f"--threads {args.threads} --calibration-inputs compressed"
        where = ["--model", model, "--dataset", args.dataset, "--output", f"{folder}/out"]
        ours = command("expand", *where, *flags.split())
        shutil.rmtree(f"{folder}/out")
        least = unavoidable(shell, windows, args.clusters)
        parts = baseline(shell, windows, args.clusters, args.sparsity, args.restarts)
    seconds = ours["seconds"]["expand"]
    theirs = parts.pop("all")
    bare = sum(least.values())
    print(f"blocks                 {shell.num_blocks}")
    print(f"baseline               {theirs:8.1f} s")
    for name, value in parts.items():
        print(f"  {name:<20} {value:8.1f} s")
    print(f"sparse-expansion       {seconds:8.1f} s   {theirs / seconds:.2f} times as fast")
    print(f"unavoidable            {bare:8.1f} s   ours is {seconds / bare:.2f} of it")
    for name, value in least.items():
        print(f"  {name:<20} {value:8.1f} s")
    for stage, value in sorted(ours["unit_seconds"].items()):
        print(f"  ours: {stage:<14} {value:8.1f} s")
    print(
        json.dumps(
            {
                "baseline_seconds": theirs,
                "baseline_parts": parts,
                "restarts": args.restarts,
                "expand_seconds": seconds,
                "unavoidable_seconds": least,
                "unit_seconds": ours["unit_seconds"],
                "speedup": theirs / seconds,
                "of_unavoidable": seconds / bare,
            }
        )
    )


if __name__ == "__main__":
    main()
