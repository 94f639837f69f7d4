"""Speed of packing and unpacking experts, in bytes of dense weights per second.

    python benchmarks/packing.py

Medians of seven; two threads. "plain" is the same result by PyTorch's boolean indexing.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch

from sparse_expansion.algorithms.packing.experts import pack_expert, unpack_expert
from sparse_expansion.algorithms.packing.layout import PackedLayout
from sparse_expansion.algorithms.quantization import AffineGrid
from sparse_expansion.config import CompressionConfig, SparsityPattern

ROWS, COLUMNS = 4096, 4096


def median_seconds(work: Callable[[], object]) -> float:
    """Of seven runs, after one to compile."""
    work()
    found = []
    for _ in range(7):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def mask_of(layout: PackedLayout) -> torch.Tensor:
    """Random kept weights that fit the layout."""
    if layout.group is None:
        kept = torch.zeros(layout.rows * layout.columns, dtype=torch.bool)
        kept[torch.randperm(kept.numel())[: layout.num_kept]] = True
        return kept.reshape(layout.shape)
    grouped = torch.rand(layout.shape).reshape(layout.rows, -1, layout.group)
    chosen = grouped.argsort(dim=2)[:, :, : layout.group_kept]
    return (
        torch.zeros(grouped.shape, dtype=torch.bool).scatter_(2, chosen, True).reshape(layout.shape)
    )


def main() -> None:
    """Print a table and one JSON line per row."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    print(
        f"{'sparsity':<9} {'bits':<5} {'dtype':<9} {'pack GB/s':>9} {'unpack GB/s':>11} "
        f"{'plain':>6}"
    )
    for sparsity, bits in (("0.5", None), ("0.7", None), ("2:4", None), ("0.5", 4), ("2:4", 4)):
        for dtype in (torch.float32, torch.bfloat16):
            config = CompressionConfig(sparsity=SparsityPattern.parse(sparsity), bits=bits)
            layout = PackedLayout.of(ROWS, COLUMNS, config)
            kept = mask_of(layout)
            codes = torch.randint(0, 16, layout.shape).to(torch.uint8)
            grid = None
            if bits is not None:
                grid = AffineGrid(torch.rand(ROWS, 1) + 0.1, torch.ones(ROWS, 1), bits, COLUMNS)
            weight = (torch.randn(layout.shape) * kept).to(dtype)

            def pack(weight=weight, kept=kept, codes=codes, layout=layout, dtype=dtype) -> dict:
                return pack_expert(weight, kept, codes, layout=layout, dtype=dtype)

            packed = pack()

            def unpack(packed=packed, layout=layout, grid=grid, dtype=dtype) -> torch.Tensor:
                return unpack_expert(packed, layout=layout, grid=grid, dtype=dtype)

            def plain(weight=weight, kept=kept) -> None:
                out = torch.zeros_like(weight)
                out[kept] = weight[kept]

            size = weight.numel() * weight.element_size()
            row = {
                "sparsity": sparsity,
                "bits": bits,
                "dtype": str(dtype).removeprefix("torch."),
                "pack_bytes_per_second": size / median_seconds(pack),
                "unpack_bytes_per_second": size / median_seconds(unpack),
                "plain_bytes_per_second": size / median_seconds(plain),
            }
            print(
                f"{sparsity:<9} {bits or '-':<5} {row['dtype']:<9} "
                f"{row['pack_bytes_per_second'] / 1e9:>9.2f} "
                f"{row['unpack_bytes_per_second'] / 1e9:>11.2f} "
                f"{row['plain_bytes_per_second'] / 1e9:>6.2f}"
            )
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
