"""How the time of an expansion grows with layers, tokens and experts.

    python -m benchmarks.curves

Llama models with random weights (hidden size 512, MLP 1408), 50 %, `compressed`, two threads. One
quantity changes at a time. The last column is the time per layer, per token or per expert relative
to the row before: 1 is linear growth, less is better.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from benchmarks.synthetic import command, save_model

LAYERS, WINDOWS, SEQLEN, CLUSTERS = 4, 32, 512, 8


def seconds(folder: Path, layers: int, windows: int, clusters: int) -> dict[str, float]:
    """Worker seconds by stage of one expansion."""
    model = folder / f"layers-{layers}"
    if not model.exists():
        save_model(
            model,
            "llama",
            torch.float32,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=layers,
            num_attention_heads=8,
            max_position_embeddings=SEQLEN,
        )
    with tempfile.TemporaryDirectory(dir=folder) as output:
        flags = (
            f"--preset paper --dataset-size {windows} --seqlen {SEQLEN} --num_clusters {clusters} "
        )
        flags += "--threads 2 --min-tokens-per-expert 0"
        where = ["--model", model, "--dataset", "pydoc", "--output", output]
        found = command("expand", *where, *flags.split())
    return {"expand": found["seconds"]["expand"], **found["unit_seconds"]}


def main() -> None:
    """Print a table and one JSON line per row."""
    print(f"{'layers':>6} {'tokens':>7} {'experts':>7} {'seconds':>8} {'per unit, relative':>19}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for axis, values in (
            ("layers", (2, 4, 8, 16)),
            ("windows", (16, 32, 64, 128)),
            ("clusters", (1, 2, 4, 8, 16, 32)),
        ):
            before = None
            for value in values:
                size = {"layers": LAYERS, "windows": WINDOWS, "clusters": CLUSTERS, axis: value}
                found = seconds(folder, **size)
                each = found["expand"] / value
                relative = "" if before is None else f"{each / before:.2f}"
                before = each
                print(
                    f"{size['layers']:>6} {size['windows'] * SEQLEN:>7} {size['clusters']:>7} "
                    f"{found['expand']:>8.1f} {relative:>19}"
                )
                print(json.dumps(size | {"seconds": found}), flush=True)


if __name__ == "__main__":
    main()
