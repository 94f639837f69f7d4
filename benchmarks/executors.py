"""The Ray executor against the local one, and two actors against one, on a real model.

    python benchmarks/executors.py MODEL_FOLDER TEXT_FOLDER

Every command is run as a user would run it, in turns, so that a slow minute of the machine falls
on all of them. Reported: the medians of the ratios of the whole commands' wall clocks. The folders
that come out must be equal byte by byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VARIANTS = {
    "local, 2 threads": "--executor local --threads 2",
    "ray, 1 actor of 2 threads": "--executor ray --num-workers 1 --threads 2",
    "ray, 1 actor of 1 thread": "--executor ray --num-workers 1 --threads 1",
    "ray, 2 actors of 1 thread": "--executor ray --num-workers 2 --threads 1",
}
SAME = [
    ("local, 2 threads", "ray, 1 actor of 2 threads"),
    ("ray, 1 actor of 1 thread", "ray, 2 actors of 1 thread"),
]


def digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's weight files, in order."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        found.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def run_once(command: str, where: list[str], flags: str) -> dict[str, Any]:
    """Run the command as a user would; its metrics, seconds and the digest of its weights."""
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "sparse_expansion.cli", command, "--json", *where]
        start = time.perf_counter()
        out = subprocess.run(
            [*line, "--output", folder, *flags.split()],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        seconds = time.perf_counter() - start
        metrics = json.loads(out)
        return {
            "command_seconds": seconds,
            "expand_seconds": metrics["seconds"]["expand"],
            "digest": digest(Path(folder)),
            **{
                name: metrics[name]
                for name in metrics
                if name.startswith(("perplexity", "peak", "checkpoint", "dense_checkpoint"))
            },
        }


def main() -> None:
    """Print a JSON line per run, and the medians of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("dataset")
    parser.add_argument(
        "--flags",
        action="append",
        help="flags of all commands; given several times, each is run with all executors",
    )
    parser.add_argument("--command", choices=("run", "expand"), default="expand")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--pair", type=int, choices=(0, 1), help="only this comparison")
    args = parser.parse_args()
    pairs = SAME if args.pair is None else [SAME[args.pair]]
    settings = args.flags or ["--preset paper --dataset-size 16 --seqlen 512 --num_clusters 4"]
    where = ["--model", args.model, "--dataset", args.dataset]
    ratios: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    for _ in range(args.repeat):
        for flags in settings:
            found = {}
            for name in dict.fromkeys(name for pair in pairs for name in pair):
                found[name] = run_once(args.command, where, f"{flags} {VARIANTS[name]}")
                print(json.dumps({"flags": flags, "variant": name, **found[name]}), flush=True)
            for first, second in pairs:
                assert found[first]["digest"] == found[second]["digest"], (first, second)
                ratios[first, second].append(
                    found[second]["command_seconds"] / found[first]["command_seconds"]
                )
    for (first, second), values in ratios.items():
        each = ", ".join(f"{value:.3f}" for value in values)
        print(f"{second} / {first}: median {statistics.median(values):.3f} of {each}")


if __name__ == "__main__":
    main()
