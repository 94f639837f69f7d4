"""Scores of models on tasks that need no network, and what they write, beside each other.

    python -m benchmarks.tasks MODEL expanded=DIR --output DIR
    python -m benchmarks.tasks MODEL expanded=DIR --output DIR --dataset ./mine.txt --items 400

The tasks are made from the evaluation text of a data set (`pydoc` by default) and run by
lm-evaluation-harness: the last word of a passage, how a passage goes on (one of four), which of two
orders of neighbouring passages is the text's, and sums of two numbers up to 20 after five that are
done. Printed are every model's scores with standard errors, the differences to the first model's
with theirs (of the differences item by item), and greedy continuations of fixed prompts.
Log-perplexity is in nats per last word. DIR gets `results.json`, and the tasks in `tasks/`, which
`sparse-expansion evaluate --tasks cloze --task-path DIR/tasks` runs too.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.models import named_folders
from benchmarks.tasks.items import METRICS, make_items, write_tasks
from sparse_expansion.data.corpora import load_corpus
from sparse_expansion.jobs.harness import check_tasks, evaluate_tasks
from sparse_expansion.jobs.sample import continued
from sparse_expansion.jobs.whole_model import load_whole
from sparse_expansion.report.formatting import table
from sparse_expansion.store import Store

PROMPTS = (
    "The capital of France is",
    "Water boils when it is heated because",
    "def mean(values):\n",
)
Values = dict[tuple[str, str], np.ndarray]
"""What every item of a task is given, by task and metric."""


def values_of(samples: dict[str, list[dict[str, Any]]]) -> Values:
    """Every item's score: 0 or 1, or the negative log-likelihood of its answer.

    Args:
        samples: the harness's, by task.
    """
    found = {}
    for task, metrics in METRICS.items():
        rows = sorted(samples[task], key=lambda row: int(row["doc_id"]))
        for metric in metrics:
            values = np.array([row[metric] for row in rows], dtype=np.float64)
            is_perplexity = metric == "perplexity"
            found[task, "log-perplexity" if is_perplexity else metric] = (
                -values if is_perplexity else values
            )
    return found


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def score_rows(values: dict[str, Values]) -> list[dict[str, Any]]:
    """A row for every task, metric and model; differences are to the first model, item by item."""
    first = next(iter(values.values()))
    found = []
    for task, metric in first:
        for name, each in values.items():
            score, error = mean_and_error(each[task, metric])
            row = {"task": task, "metric": metric, "model": name}
            row |= {"items": len(each[task, metric]), "score": score, "error": error}
            if each is not first:
                change = mean_and_error(each[task, metric] - first[task, metric])
                row |= dict(zip(("difference", "difference_error"), change, strict=True))
            if metric == "log-perplexity":
                row["perplexity"] = math.exp(score)
            found.append(row)
    return found


def score_table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    head = "task", "metric", "model", "items", "score", "error", "less the first", "error"
    cells: list[tuple[str, ...]] = [head]
    for row in rows:
        change = ("", "")
        if "difference" in row:
            change = f"{row['difference']:+.3f}", f"{row['difference_error']:.3f}"
        score = f"{row['score']:.3f}", f"{row['error']:.3f}"
        cells.append((row["task"], row["metric"], row["model"], str(row["items"]), *score, *change))
    return table(cells, header=True)


def measure(folder: Path, manager: Any, args: argparse.Namespace) -> tuple[Values, dict[str, str]]:
    """A model's score on every item, and its continuations by prompt."""
    model, tokenizer = load_whole(folder, device=args.device, dtype=args.dtype, verify=False)
    if args.resident and hasattr(model, "expert_cache"):
        model.expert_cache.max_bytes = None
    found = evaluate_tasks(
        model,
        tokenizer,
        list(METRICS),
        manager,
        batch_size=args.batch_size,
        log_samples=True,
        # The standard errors are worked out here, of differences too.
        bootstrap_iters=0,
    )
    written = {prompt: continued(model, tokenizer, prompt, args.tokens) for prompt in PROMPTS}
    return values_of(found["samples"]), written


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, and what it was given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="[NAME=]MODEL")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dataset", default="pydoc", help="its evaluation text is used")
    parser.add_argument("--items", type=int, default=200, help="most items of a task")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of items")
    parser.add_argument("--tokens", type=int, default=24, help="of a continuation")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--resident", action="store_true", help="keep experts unpacked")
    args = parser.parse_args(arguments)
    for flag, least in (("items", 2), ("tokens", 1), ("batch_size", 1), ("threads", 1)):
        value = getattr(args, flag)
        if value is not None and value < least:
            parser.error(f"--{flag.replace('_', '-')} {value} must be at least {least}")
    return parser, args


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the tasks, run every model on them, print and write what comes out."""
    parser, args = parse(arguments)
    tasks = args.output / "tasks"
    try:
        folders = named_folders(args.models)
        text = load_corpus(args.dataset).evaluation
        if not isinstance(text, str):
            raise ValueError(f"--dataset {args.dataset} is token ids: give one with text")
        write_tasks(make_items(text, args.items, args.seed), tasks)
        manager = check_tasks(list(METRICS), str(tasks), include_defaults=False)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    values: dict[str, Values] = {}
    samples: dict[str, dict[str, str]] = {prompt: {} for prompt in PROMPTS}
    for name, folder in folders.items():
        values[name], written = measure(folder, manager, args)
        for prompt, text in written.items():
            samples[prompt][name] = text
        found = {"scores": score_rows(values), "continuations": samples}
        # After every model, so that an interruption costs one.
        asked = {"dataset": args.dataset, "seed": args.seed, "models": list(map(str, args.models))}
        Store(args.output).write_json("results.json", {**asked, **found})
    print(score_table(score_rows(values)))
    for prompt, each in samples.items():
        print(f"\n{prompt!r}")
        print(table([(name, repr(text)) for name, text in each.items()]))


if __name__ == "__main__":
    main()
