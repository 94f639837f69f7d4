"""One token through an expanded linear, against the dense linear and a plain sparse one.

    python -m benchmarks.decode

A Llama 2 7B up projection (11008 x 4096) with a router and 4 experts of random weights; each call
has another token, so experts change. "plain sparse" is PyTorch's CSR product with one pruned
weight (in float32: it has no other on a CPU). Medians of 31 calls of each alone, two threads; and
of the expanded linear in turns with the dense one: PyTorch's threads wait busily for some
milliseconds after a product, and take a core from what comes next.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.packing import mask_of
from sparse_expansion.algorithms.packing.experts import pack_expert
from sparse_expansion.algorithms.packing.layout import PackedLayout
from sparse_expansion.config import CompressionConfig, RoutingConfig, SparsityPattern
from sparse_expansion.config.compression import AUTO_GROUP_SIZE
from sparse_expansion.model.expansion import ExpandedLinear
from sparse_expansion.model.expert_cache import ExpertCache

ROWS, COLUMNS, EXPERTS = 11008, 4096, 4


def expanded_linear(config: CompressionConfig, dtype: torch.dtype) -> ExpandedLinear:
    """Random experts, random router."""
    linear = ExpandedLinear(
        COLUMNS,
        ROWS,
        bias=False,
        compression=config,
        routing=RoutingConfig(num_clusters=EXPERTS),
        shares=(),
        first=None,
        cache=ExpertCache(),
        dtype=dtype,
    )
    layout = PackedLayout.of(ROWS, COLUMNS, config)
    state = {
        name: torch.randn(tensor.shape, dtype=torch.float32) / 64
        for name, tensor in linear.state_dict().items()
        if not name.startswith("experts.")
    }
    for k in range(EXPERTS):
        kept = mask_of(layout)
        codes = torch.randint(0, 2 ** (config.bits or 1), layout.shape).to(torch.uint8)
        weight = (torch.randn(layout.shape) / 64 * kept).to(dtype)
        for name, tensor in pack_expert(weight, kept, codes, layout=layout, dtype=dtype).items():
            state[f"experts.{k}.{name}"] = tensor
    linear.load_state_dict(state, assign=True)
    return linear.requires_grad_(False)


def medians(works: dict[str, Callable[[torch.Tensor], object]], dtype: torch.dtype) -> dict:
    """Milliseconds of each, in turns, on tokens of their own."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for call in range(34):
        token = torch.randn(1, COLUMNS).to(dtype)
        for name, work in works.items():
            start = time.perf_counter()
            work(token)
            if call >= 3:
                found[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    """Print a table and one JSON line per row."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    print(
        f"{'sparsity':<9} {'bits':<5} {'group':<6} {'dtype':<9} "
        f"{'dense ms':>9} {'plain sparse ms':>16} "
        f"{'expanded ms':>12} {'in turns ms':>12} {'speedup':>8}"
    )
    for dtype in (torch.float32, torch.bfloat16):
        dense = (torch.randn(ROWS, COLUMNS) / 64).to(dtype)
        for sparsity, bits, group_size in (
            ("0.5", None, None),
            ("0.7", None, None),
            ("0.9", None, None),
            ("2:4", None, None),
            ("0", 4, None),
            ("0.5", 4, None),
            ("2:4", 4, None),
            ("0", 4, AUTO_GROUP_SIZE),
            ("0.5", 4, AUTO_GROUP_SIZE),
            ("2:4", 4, AUTO_GROUP_SIZE),
        ):
            config = CompressionConfig(
                sparsity=SparsityPattern.parse(sparsity), bits=bits, group_size=group_size
            )
            linear = expanded_linear(config, dtype)
            works: dict[str, Callable[[torch.Tensor], object]] = {
                "dense": lambda x, dense=dense: torch.nn.functional.linear(x, dense),
                "expanded": linear,
            }
            if sparsity != "0":
                csr = linear.unpack(0, torch.float32).to_sparse_csr()
                works["plain sparse"] = lambda x, csr=csr: csr @ x[0].float()
            row = {
                "sparsity": sparsity,
                "bits": bits,
                "group_size": group_size,
                "dtype": str(dtype).removeprefix("torch."),
            }
            with torch.no_grad():
                turns = medians({name: works[name] for name in ("dense", "expanded")}, dtype)
                times = {}
                for name, work in works.items():
                    times |= medians({name: work}, dtype)
                times["in turns"] = turns["expanded"]
            plain = times.get("plain sparse", float("nan"))
            print(
                f"{sparsity:<9} {bits or '-':<5} {group_size or '-':<6} {row['dtype']:<9} "
                f"{times['dense']:>9.2f} "
                f"{plain:>16.2f} {times['expanded']:>12.2f} {times['in turns']:>12.2f} "
                f"{times['dense'] / times['expanded']:>8.2f}"
            )
            print(json.dumps(row | {f"{name}_ms": value for name, value in times.items()}))


if __name__ == "__main__":
    main()
