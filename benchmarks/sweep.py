"""The column sweep against the published loop over columns, at the shapes of Llama 2 13B.

    python -m benchmarks.sweep

Two experts each of 5120 x 5120 (attention's shape, square) and of 13824 x 5120 (gate or up), random
float32 weights, Hessians of 8,192 random tokens. Both sides start from the Hessians: damping,
factorization, sweep. Two threads, in turns; the loop is ``benchmarks.baseline.prune``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.published import DAMPING, prune
from sparse_expansion.algorithms.compress import compress_linears
from sparse_expansion.config import CompressionConfig, SparsityPattern

EXPERTS, TOKENS = 2, 8192


def timed(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """The result of one call, and its seconds."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def measure(weight: torch.Tensor, H: torch.Tensor, sparsity: float, repeat: int) -> dict[str, Any]:
    """Medians of both ways, and the share of weights that both keep or both drop."""
    config = CompressionConfig(
        sparsity=SparsityPattern(fraction=sparsity), damping_fraction=DAMPING
    )

    def loop() -> torch.Tensor:
        return torch.stack([prune(weight, A, sparsity) for A in H])

    def sweep() -> torch.Tensor:
        return compress_linears({"W": weight}, H, config, {"W": None})["W"].weight_KOD

    seconds: dict[str, list[float]] = {"loop": [], "sweep": []}
    for _ in range(repeat):
        theirs, first = timed(loop)
        ours, second = timed(sweep)
        seconds["loop"].append(first)
        seconds["sweep"].append(second)
    ratios = [a / b for a, b in zip(seconds["loop"], seconds["sweep"], strict=True)]
    return {
        "rows": weight.shape[0],
        "columns": weight.shape[1],
        "experts": len(H),
        "loop_seconds": statistics.median(seconds["loop"]),
        "sweep_seconds": statistics.median(seconds["sweep"]),
        "ratio": statistics.median(ratios),
        "same_mask": float(((theirs != 0) == (ours != 0)).float().mean()),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print a table and one JSON line per row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=5120)
    parser.add_argument("--rows", type=int, nargs="+", default=[5120, 13824])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    measure(torch.randn(64, 64), torch.eye(64)[None], args.sparsity, 1)  # compiles
    H = torch.stack([X.T @ X for X in torch.randn(EXPERTS, TOKENS, args.width)])
    print(f"{'rows':>6} {'columns':>8} {'loop s':>8} {'sweep s':>8} {'ratio':>6} {'same mask':>10}")
    for rows in args.rows:
        weight = torch.randn(rows, args.width) / args.width**0.5
        row = measure(weight, H, args.sparsity, args.repeat)
        print(
            f"{rows:>6} {args.width:>8} {row['loop_seconds']:>8.1f} {row['sweep_seconds']:>8.1f} "
            f"{row['ratio']:>6.2f} {row['same_mask']:>10.5f}"
        )
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
