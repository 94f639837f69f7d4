"""A model of published shape with random weights: made, expanded, and evaluated, at any depth.

    python -m benchmarks.full_size llama13 --work /dev/shm/full --device cuda
    python -m benchmarks.full_size llama13 --work /dev/shm/full --device cuda --seconds 500
    python -m benchmarks.full_size pythia12 --work ./full --layers 1 --windows 64 --seqlen 512

Further flags are those of `sparse-expansion run`; without, 16 experts at 2:4 with 4 bits by the
`paper` preset. `--seconds` ends a call after so long; the next call goes on where it ended.
Prints one JSON line: seconds by stage, bytes, memory, and a GPU's mean utilisation.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.synthetic import save_model

SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "llama7": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
        },
    ),
    "llama13": (
        "llama",
        {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
        },
    ),
    "pythia12": (
        "gpt_neox",
        {
            "hidden_size": 5120,
            "intermediate_size": 20480,
            "num_attention_heads": 40,
            "num_hidden_layers": 36,
        },
    ),
    "tiny": (
        "llama",
        {
            "hidden_size": 32,
            "intermediate_size": 72,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
        },
    ),
}
"""Published sizes (Llama 2 7B and 13B, Pythia 12B), and one to try the benchmark with."""
DEFAULTS = "--preset paper --num_clusters 16 --sparsity 2:4 --quantize --bits 4".split()
SAMPLE_SECONDS = 1.0
UNFINISHED = 75
"""Exit code of a call whose time was over before the run was: call again."""


def main(arguments: list[str] | None = None) -> int:
    """Make the model where it is not yet there, start or go on, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--work", type=Path, required=True, help="folder for model and result")
    parser.add_argument("--layers", type=int, help="blocks, by default as many as published")
    parser.add_argument("--windows", type=int, default=64, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--eval-windows", type=int, default=8)
    parser.add_argument("--dataset", default="pydoc")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, help="end this call after so long")
    args, flags = parser.parse_known_args(arguments)
    started = time.monotonic()
    model = _model(args)
    flags = flags or DEFAULTS
    output = args.work / "expanded"
    line = [sys.executable, "-m", "sparse_expansion.cli", "run", "--json", "--resume"]
    line += ["--model", str(model), "--output", str(output), "--dataset", args.dataset]
    line += ["--dataset-size", str(args.windows), "--seqlen", str(args.seqlen), *flags]
    line += ["--eval-windows", str(args.eval_windows), "--device", args.device]
    left = None if args.seconds is None else args.seconds - (time.monotonic() - started)
    code, out, usage = _run(line, left)
    if code in (128 + signal.SIGTERM, -signal.SIGTERM):
        done = len(list((output / "run" / "units").rglob("*.json")))
        print(json.dumps({"finished": False, "finished_units": done, "gpu_utilisation": usage}))
        return UNFINISHED
    if code:
        return code
    found = json.loads(out)
    wanted = ("perplexity_dense", "perplexity_expanded", "seconds", "unit_seconds", "devices")
    wanted += ("peak_memory_bytes", "device_peak_memory_bytes", "checkpoint_bytes", "versions")
    result = {"finished": True, "shape": args.shape, "layers": _layers(args)}
    result |= {"tokens": args.windows * args.seqlen, "gpu_utilisation": usage}
    print(json.dumps(result | {name: found[name] for name in wanted}))
    return 0


def _layers(args: argparse.Namespace) -> int:
    return int(args.layers or SHAPES[args.shape][1]["num_hidden_layers"])


def _model(args: argparse.Namespace) -> Path:
    """The model's folder, whole or not there: made on the device, where there is one."""
    folder: Path = args.work / f"{args.shape}-{_layers(args)}-{args.seqlen}"
    if folder.exists():
        return folder
    model_type, sizes = SHAPES[args.shape]
    scratch = folder.with_suffix(".making")
    shutil.rmtree(scratch, ignore_errors=True)
    has_gpu = torch.cuda.is_available() and args.device != "cpu"
    with torch.device("cuda" if has_gpu else "cpu"):
        save_model(
            scratch,
            model_type,
            torch.bfloat16,
            **{**sizes, "num_hidden_layers": _layers(args)},
            max_position_embeddings=args.seqlen,
        )
    os.replace(scratch, folder)
    return folder


def _run(line: list[str], seconds: float | None) -> tuple[int, str, float | None]:
    """Exit code and output of a command that is terminated after so long, and a GPU's mean use."""
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    started, samples = time.monotonic(), []
    while True:
        try:
            out, _ = process.communicate(timeout=SAMPLE_SECONDS)
            break
        except subprocess.TimeoutExpired:
            samples += _gpu_use()
        if seconds is not None and time.monotonic() - started > seconds:
            process.terminate()
            out, _ = process.communicate()
            break
    usage = sum(samples) / len(samples) if samples else None
    return process.returncode, out, usage


def _gpu_use() -> list[float]:
    """The first GPU's utilisation at this moment, 0 to 1; nothing where there is none."""
    if shutil.which("nvidia-smi") is None:
        return []
    line = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    answer: Any = subprocess.run(line, capture_output=True, text=True, check=False)
    return [float(answer.stdout.split()[0]) / 100] if answer.returncode == 0 else []


if __name__ == "__main__":
    sys.exit(main())
