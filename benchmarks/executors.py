"""The Ray executor against the local one, and two actors against one, on a real model.

    python benchmarks/executors.py MODEL_FOLDER TEXT_FOLDER

Every command is run as a user would run it, in turns, so that a slow minute of the machine falls
on all of them. Reported: medians of the whole command's wall clock and of its `expand` stage.
The folders that come out are compared byte by byte where the number of threads is the same.
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
    """Of all weight files, in order."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        found.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def main() -> None:
    """Print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("dataset")
    parser.add_argument("--flags", default="--dataset-size 16 --seqlen 512 --num_clusters 4")
    parser.add_argument("--calibration-inputs", default="dense")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--pair", type=int, choices=(0, 1), help="only this comparison")
    args = parser.parse_args()
    pairs = SAME if args.pair is None else [SAME[args.pair]]
    variants = {name: VARIANTS[name] for pair in pairs for name in pair}
    wall: dict[str, list[float]] = {name: [] for name in variants}
    expand: dict[str, list[float]] = {name: [] for name in variants}
    digests: dict[str, set[str]] = {name: set() for name in variants}
    for _ in range(args.repeat):
        for name, flags in variants.items():
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "sparse_expansion.cli", "expand", "--json"]
                command += ["--model", args.model, "--dataset", args.dataset, "--output", folder]
                command += ["--calibration-inputs", args.calibration_inputs]
                command += [*args.flags.split(), *flags.split()]
                start = time.perf_counter()
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                wall[name].append(time.perf_counter() - start)
                expand[name].append(json.loads(out)["seconds"]["expand"])
                digests[name].add(digest(Path(folder)))
    print(f"{'':<28} {'command s':>10} {'expand s':>10}")
    for name in variants:
        print(
            f"{name:<28} {statistics.median(wall[name]):>10.1f} "
            f"{statistics.median(expand[name]):>10.1f}"
        )
    ratios = {}
    for first, second in pairs:
        assert digests[first] == digests[second] and len(digests[first]) == 1, (first, second)
        ratios[f"{second} / {first}"] = {
            "command": statistics.median(wall[second]) / statistics.median(wall[first]),
            "expand": statistics.median(expand[second]) / statistics.median(expand[first]),
        }
        print(f"{second} / {first}: {ratios[f'{second} / {first}']['command']:.3f} of the command")
    print(json.dumps({"command_seconds": wall, "expand_seconds": expand, "ratios": ratios}))


if __name__ == "__main__":
    main()
