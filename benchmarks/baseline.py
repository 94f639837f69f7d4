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

That both do the same work is measured too: the share of zeros in their experts, and how far the
hidden states behind the last block are from the dense model's.

Also timed: what no implementation can avoid, namely two passes through every block, the products
for each expert's Hessian, one factorization per expert, and the products that carry the errors of
earlier columns to later ones. All in one process with the same number
of threads; the package runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import published
from benchmarks.packing import median_seconds
from benchmarks.synthetic import command
from sparse_expansion.api.models import named_origin
from sparse_expansion.data.corpora import load_corpus
from sparse_expansion.data.tokenization import encoder, load_tokenizer
from sparse_expansion.data.windows import calibration_windows
from sparse_expansion.model.block_linears import dense_linear
from sparse_expansion.model.expansion import ExpandedLinear
from sparse_expansion.model.families import LinearGroup
from sparse_expansion.model.streaming import ModelShell


def final_hidden(shell: ModelShell, windows: torch.Tensor) -> torch.Tensor:
    """Hidden states ``[N, L, D]`` of the windows behind the last block of a model."""
    hidden = torch.cat([shell.embed(windows[part]) for part in shell.batches(windows)])
    for layer in range(shell.num_blocks):
        hidden = published.walk(shell, shell.load_block(layer), layer, windows, hidden)
    return hidden


def zeros_of(shell: ModelShell) -> float:
    """Share of zeros in all experts of an expanded model."""
    zeros = weights = 0
    for layer in range(shell.num_blocks):
        for module in shell.load_block(layer).modules():
            if isinstance(module, ExpandedLinear):
                for expert in range(len(module.experts)):
                    weight = module.unpack(expert, torch.float32)
                    zeros += int((weight == 0).sum())
                    weights += weight.numel()
    return zeros / weights


def relative_error(hidden: torch.Tensor, dense: torch.Tensor) -> float:
    """Energy of the difference as a share of the dense hidden states' energy."""
    return float((hidden - dense).square().sum() / dense.square().sum())


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
    """Seconds that one group's products and factorizations take, with clusters of equal size."""
    weights = [dense_linear(block, name).weight.float() for name in group.linears]
    rows, width = sum(len(weight) for weight in weights), weights[0].shape[1]
    X = torch.randn(tokens // clusters, width)
    A = X.T @ X + width * torch.eye(width)
    errors, rest = torch.randn(rows, published.BLOCK), torch.randn(published.BLOCK, width)

    def pushes() -> None:
        for start in range(0, width, published.BLOCK):
            errors.matmul(rest[:, start + published.BLOCK :])

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


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run both sides in the folder; returns their seconds, zeros and errors."""
    model = args.model.resolve()
    if args.layers is not None:
        model = shortened(model, args.layers, folder)
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
    where = ["--model", model, "--dataset", args.dataset, "--output", folder / "out"]
    ours = command("expand", *where, *flags.split())
    expanded = ModelShell(folder / "out", dtype="float32")
    ours_hidden, ours_zeros = final_hidden(expanded, windows), zeros_of(expanded)
    shutil.rmtree(folder / "out")
    least = unavoidable(shell, windows, args.clusters)
    theirs = published.expand(shell, windows, args.clusters, args.sparsity, args.restarts)
    dense_hidden = final_hidden(shell, windows)
    baseline_seconds, expand_seconds = sum(theirs.seconds.values()), ours["seconds"]["expand"]
    return {
        "blocks": shell.num_blocks,
        "baseline_seconds": baseline_seconds,
        "baseline_parts": theirs.seconds,
        "baseline_zeros": theirs.zeros,
        "baseline_error": relative_error(theirs.hidden, dense_hidden),
        "restarts": args.restarts,
        "expand_seconds": expand_seconds,
        "expand_zeros": ours_zeros,
        "expand_error": relative_error(ours_hidden, dense_hidden),
        "unavoidable_seconds": least,
        "unit_seconds": ours["unit_seconds"],
        "speedup": baseline_seconds / expand_seconds,
        "of_unavoidable": expand_seconds / sum(least.values()),
    }


def print_result(result: dict[str, Any]) -> None:
    """Print the times, the two ratios, the two errors, and one JSON object."""
    rows = [
        ("baseline", result["baseline_seconds"], ""),
        *((f"  {name}", value, "") for name, value in result["baseline_parts"].items()),
        ("sparse-expansion", result["expand_seconds"], f"{result['speedup']:.2f} times as fast"),
        (
            "unavoidable",
            sum(result["unavoidable_seconds"].values()),
            f"ours is {result['of_unavoidable']:.2f} of it",
        ),
        *((f"  {name}", value, "") for name, value in result["unavoidable_seconds"].items()),
        *((f"  ours: {name}", value, "") for name, value in sorted(result["unit_seconds"].items())),
    ]
    print(f"blocks                 {result['blocks']}")
    for name, seconds, note in rows:
        print(f"{name:<22} {seconds:8.1f} s   {note}".rstrip())
    for side in ("baseline", "expand"):
        zeros, error = result[f"{side}_zeros"], result[f"{side}_error"]
        print(f"{side:<22} {zeros:.1%} zeros, error behind the last block {error:.5f}")
    print(json.dumps(result))


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare both sides, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("dataset")
    parser.add_argument("--layers", type=int, help="only the first blocks; default all")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--clusters", type=int, default=16)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--restarts", type=int, default=100, help="starts of the baseline's KMeans")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    try:
        args.model = named_origin(args.model).fetch()
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        print_result(compare(args, Path(folder)))


if __name__ == "__main__":
    main()
