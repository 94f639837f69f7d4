"""Peak memory of `expand` over layers and over calibration tokens, against `plan`.

    python -m benchmarks.memory
    python -m benchmarks.memory --tokens 1048576 4194304

Narrow Llama models with random weights. The number of tokens per shard is held constant, as it is
on a cluster; activations beyond 64 MiB go to scratch files.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.synthetic import command, save_model

SEQLEN = 512
SHARD_TOKENS = 16384


def flags(tokens: int) -> list[str]:
    """The flags of a run over so many tokens."""
    windows = tokens // SEQLEN
    found = f"--dataset-size {windows} --data-shards {max(1, tokens // SHARD_TOKENS)} "
    found += f"--preset paper --seqlen {SEQLEN} --num_clusters 8 --experts-per-unit 4 "
    found += "--calibration-inputs dense --activation-memory 64MiB"
    return found.split()


def measure(layers: int, scale: int, tokens: int) -> dict[str, Any]:
    """Plan and expand one model; returns what it is and both peaks.

    Args:
        layers: number of blocks.
        scale: width of the model, in steps of 128 features.
        tokens: calibration tokens.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(
            Path(folder) / "model",
            "llama",
            torch.float32,
            hidden_size=128 * scale,
            intermediate_size=352 * scale,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=SEQLEN,
        )
        plan = command("plan", "--model", model, *flags(tokens))
        where = ["--model", model, "--dataset", "pydoc", "--output", Path(folder) / "out"]
        found = command("expand", *where, "--threads", "2", *flags(tokens))
    return {
        "layers": layers,
        "hidden_size": 128 * scale,
        "tokens": tokens,
        "measured_bytes": found["peak_memory_bytes"],
        "plan_bytes": plan["memory_bytes"]["peak"],
        "seconds": found["seconds"]["expand"],
    }


def main() -> None:
    """Print a table and one JSON line per row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokens", type=int, nargs="+", help="only these numbers of tokens, with two layers"
    )
    args = parser.parse_args()
    print(
        f"{'layers':>6} {'width':>6} {'tokens':>8} {'measured MB':>12} {'plan MB':>8} {'ratio':>6}"
    )
    if args.tokens:
        cases = [(2, 1, tokens) for tokens in args.tokens]
    else:
        cases = [(layers, 1, 32768) for layers in (2, 8, 32)]
        cases += [(2, 1, tokens) for tokens in (10240, 102400, 1048576, 4194304)]
        cases += [(2, scale, 32768) for scale in (4, 8)]
    for layers, scale, tokens in cases:
        row = measure(layers, scale, tokens)
        ratio = row["measured_bytes"] / row["plan_bytes"]
        print(
            f"{layers:>6} {row['hidden_size']:>6} {tokens:>8} "
            f"{row['measured_bytes'] / 1e6:>12.0f} {row['plan_bytes'] / 1e6:>8.0f} {ratio:>6.2f}"
        )
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
