"""One expanded linear on a GPU against the dense one, by the number of tokens.

    python -m benchmarks.linear
    python -m benchmarks.linear --rows 13824 --columns 5120 --experts 8 --tokens 1 16 256 4096

Milliseconds of the device, from calls that are captured in a CUDA graph and replayed, each with
other tokens and, for one token, another expert; "call" is one without a graph, the host's work
included. Dense weights are several too, so that no cache holds them. Experts stay packed unless
`--resident`. Prints a table and one JSON line a row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import decode
from sparse_expansion.config import CompressionConfig, SparsityPattern
from sparse_expansion.config.compression import AUTO_GROUP_SIZE
from sparse_expansion.model.expansion import ExpandedLinear

CALLS = 16
"""Calls of a graph, each with tokens of its own."""
DENSE_COPIES = 4
MODES: dict[str, tuple[str, int | None, Any]] = {
    "50 %": ("0.5", None, None),
    "70 %": ("0.7", None, None),
    "2:4": ("2:4", None, None),
    "50 %, 4 bits": ("0.5", 4, None),
    "2:4, 4 bits": ("2:4", 4, None),
    "2:4, 4 bits, groups": ("2:4", 4, AUTO_GROUP_SIZE),
    "4 bits, groups": ("0", 4, AUTO_GROUP_SIZE),
}
"""Sparsity, bits and columns to a scale, by what a table calls them."""


def main(arguments: list[str] | None = None) -> int:
    """Measure every mode; print a table and JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=13824)
    parser.add_argument("--columns", type=int, default=5120)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 4096])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--resident", action="store_true", help="keep experts unpacked")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here: benchmarks.decode measures on a CPU")
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    decode.ROWS, decode.COLUMNS, decode.EXPERTS = args.rows, args.columns, args.experts
    dense = [
        torch.randn(args.rows, args.columns, device="cuda", dtype=dtype) / 64
        for _ in range(DENSE_COPIES)
    ]
    print("| mode | tokens | dense ms | expanded ms | of dense | call ms | dense call ms |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for mode in args.modes:
        linear = expanded(mode, dtype, args)
        for tokens in args.tokens:
            inputs = [
                torch.randn(tokens, args.columns, device="cuda", dtype=dtype) for _ in range(CALLS)
            ]
            found = {
                "dense": times(
                    lambda x, i: torch.nn.functional.linear(x, dense[i % DENSE_COPIES]),
                    inputs,
                    args.repeat,
                ),
                "expanded": times(lambda x, i, linear=linear: linear(x), inputs, args.repeat),
            }
            row = {"mode": mode, "tokens": tokens, "device": torch.cuda.get_device_name()}
            for name, (graph, call) in found.items():
                row |= {f"{name}_ms": graph, f"{name}_call_ms": call}
            rows.append(row)
            print(
                f"| {mode} | {tokens} | {row['dense_ms']:.4f} | {row['expanded_ms']:.4f} | "
                f"{row['expanded_ms'] / row['dense_ms']:.2f} | {row['expanded_call_ms']:.4f} | "
                f"{row['dense_call_ms']:.4f} |",
                flush=True,
            )
        torch.cuda.empty_cache()
    for row in rows:
        print(json.dumps(row))
    return 0


def expanded(mode: str, dtype: torch.dtype, args: argparse.Namespace) -> ExpandedLinear:
    """A linear with random experts, on the device."""
    sparsity, bits, group_size = MODES[mode]
    config = CompressionConfig(
        sparsity=SparsityPattern.parse(sparsity), bits=bits, group_size=group_size
    )
    with torch.device("cuda"):
        linear = decode.expanded_linear(config, dtype)
    if args.resident:
        linear.cache.max_bytes = None
    return linear


@torch.no_grad()
def times(
    work: Callable[[torch.Tensor, int], torch.Tensor], inputs: list[torch.Tensor], repeat: int
) -> tuple[float, float]:
    """Median milliseconds of a call in a graph's replay, and of one by itself."""

    def all_calls() -> None:
        for number, x in enumerate(inputs):
            work(x, number)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        all_calls()
        all_calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_calls()
    replays, calls = [], []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        replays.append(begin.elapsed_time(end) / len(inputs))
        start = time.perf_counter()
        all_calls()
        torch.cuda.synchronize()
        calls.append(1e3 * (time.perf_counter() - start) / len(inputs))
    return statistics.median(replays), statistics.median(calls)


if __name__ == "__main__":
    sys.exit(main())
