"""Steps of making experts on a GPU, each beside what it stands in the place of.

    python -m benchmarks.steps
    python -m benchmarks.steps --rows 13824 --columns 5120 --experts 4 --profile sweep solver

Milliseconds of the device and host together, medians of `--repeat`, after one to compile. A row is
one step of the `experts` or `router` stage at the size of a linear. `--profile` prints the kernels
that some steps are made of.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.packing import mask_of
from benchmarks.serve import seconds
from sparse_expansion.algorithms.clustering import fit_pca
from sparse_expansion.algorithms.compress import compress_linears
from sparse_expansion.algorithms.hessian import hessian_sum, merge_hessians, upper_cholesky_factor
from sparse_expansion.algorithms.kmeans import fit_kmeans
from sparse_expansion.algorithms.masks import unstructured_mask
from sparse_expansion.algorithms.packing.experts import pack_expert, unpack_expert
from sparse_expansion.algorithms.packing.layout import PackedLayout
from sparse_expansion.algorithms.products import LeftFactor
from sparse_expansion.algorithms.quantization import fit_grid
from sparse_expansion.algorithms.sweep import sweep
from sparse_expansion.config import BFLOAT16X3, CompressionConfig, SparsityPattern
from sparse_expansion.store import Store

TOKENS = 8192
Step = tuple[str, str, Callable[[], object]]
"""What it does, by which way, and the work."""


def main(arguments: list[str] | None = None) -> int:
    """Measure every step; print a table and JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=13824)
    parser.add_argument("--columns", type=int, default=5120)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.set_defaults(device="cuda")
    parser.add_argument("--only", nargs="+", default=[], help="steps whose name has one of these")
    parser.add_argument("--profile", nargs="+", default=[], help="steps whose kernels are printed")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here")
    torch.manual_seed(0)
    rows = []
    print("| step | way | ms |\n|---|---|---|")
    for name, way, work in steps(args):
        if args.only and not any(word in name for word in args.only):
            continue
        taken = 1e3 * seconds(work, args)
        print(f"| {name} | {way} | {taken:.3f} |", flush=True)
        rows.append({"step": name, "way": way, "ms": taken})
        if any(word in name for word in args.profile):
            print_kernels(work)
    for row in rows:
        print(json.dumps(row | {"device": torch.cuda.get_device_name()}))
    return 0


def print_kernels(work: Callable[[], object]) -> None:
    """What a step spends its time on, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    table = seen.key_averages().table(
        sort_by="cuda_time_total", row_limit=16, max_name_column_width=60
    )
    print(table, flush=True)


def steps(args: argparse.Namespace) -> Iterator[Step]:
    """Steps one after another, so that what one holds is gone before the next."""
    yield from selections(args)
    yield from products(args)
    yield from experts(args)
    yield from packings(args)
    yield from routers(args)


def selections(args: argparse.Namespace) -> Iterator[Step]:
    """The mask of a block of 128 columns, and of a whole weight."""
    for columns in (128, args.columns):
        name = f"half of {columns} columns, {args.experts} experts"
        values = torch.rand(args.experts, columns, args.rows, device="cuda")
        count = columns * args.rows // 2
        yield (
            name,
            "histograms",
            lambda values=values, count=count: unstructured_mask(values, count),
        )
        flat = values.flatten(1)
        if columns == 128:
            yield name, "kthvalue", lambda flat=flat, count=count: flat.kthvalue(count, 1).values
            yield name, "sort", lambda flat=flat: flat.sort(1)


def products(args: argparse.Namespace) -> Iterator[Step]:
    """Gram matrices, and wide products of the sweep and the solver."""
    X = torch.randn(TOKENS, args.columns, device="cuda")
    half = X.bfloat16()
    yield f"Gram of {TOKENS} tokens", "float32", lambda: X.T @ X
    yield f"Gram of {TOKENS} tokens", "hessian_sum, bfloat16", lambda: hessian_sum(half)
    A = torch.randn(1, args.columns, args.columns, device="cuda")
    B = torch.randn(1, args.columns, args.rows, device="cuda")
    parts = LeftFactor(A, BFLOAT16X3)
    yield "product D x D x O", "float32", lambda: A @ B
    yield "product D x D x O", "by parts", lambda: parts.times(B)
    H = hessian_of(args)
    damped = H[0] + torch.eye(len(H[0]), device="cuda")
    yield "Cholesky", "torch", lambda: torch.linalg.cholesky(damped)
    yield f"factors, {args.experts} experts", "damped", lambda: upper_cholesky_factor(H)
    yield "inverse", "torch", lambda: torch.cholesky_inverse(torch.linalg.cholesky(damped))


def hessian_of(args: argparse.Namespace) -> torch.Tensor:
    """Sums of the experts."""
    found = []
    for _ in range(args.experts):
        X = torch.randn(TOKENS, args.columns, device="cuda")
        found.append(X.T @ X)
    return torch.stack(found)


def experts(args: argparse.Namespace) -> Iterator[Step]:
    """The sweep and the solver."""
    H = hessian_of(args)
    W = torch.randn(args.rows, args.columns, device="cuda") / 70
    factor = upper_cholesky_factor(H)
    for sparsity, bits in (("0.5", None), ("2:4", None), ("0.5", 4), ("2:4", 4)):
        grid = None
        if bits is not None:
            grid = fit_grid(W, bits=bits, symmetric=False, group_size=None)
        target = W.T.contiguous().expand(args.experts, -1, -1)
        pattern = SparsityPattern.parse(sparsity)
        words = sparsity + (f", {bits} bits" if bits else "")

        def work(grid: Any = grid, target: Any = target, pattern: Any = pattern) -> object:
            return sweep(
                target.clone(), factor.factor_KDD, pattern=pattern, grid=grid, block_size=128
            )

        yield f"sweep {words}, {args.experts} experts", "", work
        for pruner in ("sparsegpt", "admm"):
            config = CompressionConfig(sparsity=pattern, bits=bits, pruner=pruner)
            label = "unit" if pruner == "sparsegpt" else "unit by the solver"
            yield (
                f"{label} {words}, {args.experts} experts",
                "compress_linears",
                lambda config=config, grid=grid: compress_linears({"a": W}, H, config, {"a": grid}),
            )


def packings(args: argparse.Namespace) -> Iterator[Step]:
    """One expert into its streams, the way down to a file, and back."""
    for sparsity, bits in (("0.5", None), ("2:4", None), ("0.5", 4), ("2:4", 4), ("0.5", 3)):
        config = CompressionConfig(sparsity=SparsityPattern.parse(sparsity), bits=bits)
        layout = PackedLayout.of(args.rows, args.columns, config)
        with torch.device("cuda"):
            kept = mask_of(layout)
        weight = torch.randn(layout.shape, device="cuda") * kept
        codes = torch.randint(0, 2 ** (bits or 1), layout.shape, device="cuda").to(torch.uint8)
        grid = None
        if bits is not None:
            grid = fit_grid(weight, bits=bits, symmetric=False, group_size=None)

        def pack(
            weight: Any = weight, kept: Any = kept, codes: Any = codes, layout: Any = layout
        ) -> dict[str, torch.Tensor]:
            return pack_expert(weight, kept, codes, layout=layout, dtype=torch.bfloat16)

        words = sparsity + (f", {bits} bits" if bits else "")
        yield f"pack {words}", "on the device", pack
        packed = pack()
        yield (
            f"unpack {words}",
            "PyTorch",
            lambda packed=packed, layout=layout, grid=grid: unpack_expert(
                packed, layout=layout, grid=grid, dtype=torch.bfloat16
            ),
        )
        size = sum(part.numel() * part.element_size() for part in packed.values()) / 1e6
        if sparsity == "0.5" and bits is None:
            with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
                store = Store(folder)
                yield (
                    f"{size:.0f} MB to a file in memory",
                    "write_tensors",
                    lambda packed=packed, store=store: store.write_tensors("a.safetensors", packed),
                )
                yield (
                    f"{size:.0f} MB to the host",
                    "pageable",
                    lambda packed=packed: {name: part.cpu() for name, part in packed.items()},
                )


def routers(args: argparse.Namespace) -> Iterator[Step]:
    """PCA and KMeans."""
    X = torch.randn(TOKENS, args.columns, device="cuda").bfloat16()
    moments = merge_hessians([hessian_sum(X)])
    count = args.columns // 32
    yield f"PCA, {count} components", "", lambda: fit_pca(moments, num_components=count)
    Z = torch.randn(65536, count, device="cuda")
    for backend in ("torch", "sklearn"):
        yield (
            f"KMeans 65536 x {count}, 16 clusters",
            backend,
            lambda backend=backend: fit_kmeans(
                Z, num_clusters=16, restarts=4, max_iterations=100, seed=0, backend=backend
            ),
        )


if __name__ == "__main__":
    sys.exit(main())
