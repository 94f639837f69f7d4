"""Serving a dense model, one with plain sparse weights, and expanded ones: speed and memory.

    python -m benchmarks.serve dense=MODEL sparse=DIR expanded=DIR --device cpu
    python -m benchmarks.serve dense=MODEL expanded=DIR --device cuda --static

Each is loaded in a process of its own, in bfloat16 unless `--dtype` says otherwise. Tokens a second
are of `generate`, greedily, after a prompt of 32 tokens, at each size of a batch; prefill is one
forward of so many tokens in windows of at most `--window`, with the logits of the last alone; the
first token's seconds are those of the longest prefill and one more step. Medians of `--repeat`.
Prints one table, and a JSON line for each model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import sparse_expansion  # noqa: F401 - registers the checkpoint format
from benchmarks.models import named_folders
from sparse_expansion.process_memory import peak_memory_bytes

PROMPT_TOKENS = 32


def main(arguments: list[str] | None = None) -> int:
    """Measure every model in a process of its own; print a table and JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="[NAME=]MODEL")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prefill", type=int, nargs="+", default=[512, 8192])
    parser.add_argument("--window", type=int, default=2048, help="longest sequence of a prefill")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--static", action="store_true", help="compile, with a static cache")
    parser.add_argument("--resident", action="store_true", help="keep experts unpacked")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(given)
    if args.inside:
        print(json.dumps(measure(args.models[0], args)))
        return 0
    try:
        folders = named_folders(args.models)
    except ValueError as error:
        parser.error(str(error))
    flags = [word for word in given if word not in args.models]
    rows = {}
    for name, folder in folders.items():
        line = [sys.executable, "-m", "benchmarks.serve", str(folder), *flags, "--inside"]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
        rows[name] = json.loads(done.stdout.splitlines()[-1])
    print_table(rows)
    for name, row in rows.items():
        print(json.dumps({"name": name, "device": args.device, **row}))
    return 0


def measure(folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model, in this process."""
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype))
    model = model.to(args.device).eval()
    found: dict[str, Any] = {"load_seconds": time.perf_counter() - started}
    if args.resident and hasattr(model, "expert_cache"):
        model.expert_cache.max_bytes = None
    generator = torch.Generator().manual_seed(0)

    def ids(batch: int, length: int) -> torch.Tensor:
        size = (batch, length)
        tokens = torch.randint(3, model.config.vocab_size, size, generator=generator)
        return tokens.to(args.device)

    settings = {
        "max_new_tokens": args.new_tokens,
        "min_new_tokens": args.new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    if args.static:
        settings["cache_implementation"] = "static"
    for batch in args.batches:
        prompt = ids(batch, PROMPT_TOKENS)
        taken = seconds(lambda prompt=prompt: model.generate(prompt, **settings), args)
        found[f"tokens_per_second_{batch}"] = batch * args.new_tokens / taken
    with torch.no_grad():
        for count in args.prefill:
            windows = ids(max(1, count // args.window), min(count, args.window))
            taken = seconds(lambda windows=windows: model(windows, logits_to_keep=1), args)
            found[f"prefill_seconds_{count}"] = taken
    first = {**settings, "max_new_tokens": 1, "min_new_tokens": 1}
    prompt = ids(1, min(max(args.prefill), args.window))
    found["first_token_seconds"] = seconds(lambda: model.generate(prompt, **first), args)
    found["memory_bytes"] = (
        torch.cuda.max_memory_allocated() if args.device == "cuda" else peak_memory_bytes()
    )
    if args.device == "cuda":
        found["card"] = torch.cuda.get_device_name()
    return found


def seconds(work: Callable[[], object], args: argparse.Namespace) -> float:
    """Median seconds of a call, after one to warm up."""
    times = []
    for _ in range(args.repeat + 1):
        start = time.perf_counter()
        work()
        if args.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    """One line for each figure, one column for each model, and what it is of the first's."""
    names = list(rows)
    first = rows[names[0]]
    print("| | " + " | ".join(names) + " |")
    print("|---|" + "---|" * len(names))
    for key in (key for key in first if key != "card"):
        cells = []
        for row in rows.values():
            value = row[key] / 2**20 if key == "memory_bytes" else row[key]
            cells.append(f"{value:.4g} ({row[key] / first[key]:.2f})")
        label = "memory MiB" if key == "memory_bytes" else key.replace("_", " ")
        print(f"| {label} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.exit(main())
