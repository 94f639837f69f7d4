"""``run`` and ``expand``: make an expanded model, and measure it."""

from __future__ import annotations

import argparse

from sparse_expansion.api.expansion import ExpansionJob, run_expansion
from sparse_expansion.cli.command import Command
from sparse_expansion.cli.flags import add_settings
from sparse_expansion.cli.opening import model_request, print_result
from sparse_expansion.cli.shared_flags import (
    add_config,
    add_eval_windows,
    add_execution,
    add_model,
    add_no_pca,
    add_preset,
    add_quantize,
)
from sparse_expansion.config.presets import DEFAULT_PRESET
from sparse_expansion.config.text import TextOptions
from sparse_expansion.config.values import RUN_SECTIONS

_RUN_EXAMPLES = """\
  # a local or hub model, 16 experts at 50 %, offline text
  sparse-expansion run --model ./SmolLM2-135M --dataset pydoc --sparsity 0.5 \\
      --num_clusters 16 --dataset-size 32 --seqlen 512 --output ./expanded
  # the paper's settings
  sparse-expansion run --preset paper --model pythia --model_size 12B --sparsity 0.5 \\
      --dataset wikitext2 --dataset-size 128 --num_clusters 16 --PCA_reduction_factor 32 \\
      --output ./pythia-12b-16
  # 2:4 sparse and 4 bits
  sparse-expansion run --model llama --model_size 7B --sparsity "(2, 4)" --quantize --bits 4 \\
      --dataset wikitext2 --dataset-size 128 --num_clusters 16 --PCA_reduction_factor 32
  # go on after a crash
  sparse-expansion run ... --output ./expanded --resume
"""
_EXPAND_EXAMPLES = """\
  sparse-expansion expand --model ./SmolLM2-135M --dataset ./wikitext2 \\
      --sparsity 2:4 --num_clusters 8 --dataset-size 64 --seqlen 512 --output ./expanded
"""


_COMMON = (
    *("model", "config", "preset", "sparsity", "quantize", "num_clusters", "dataset"),
    *("dataset_size", "seqlen", "eval_windows", "executor", "output", "resume", "json"),
)
"""What people give most often."""


def add_run_settings(parser: argparse.ArgumentParser, *, without: tuple[str, ...] = ()) -> None:
    """The settings of a run, which `plan` has too.

    Args:
        parser: of the command.
        without: names of fields that the command has no flag of.
    """
    add_model(parser)
    add_config(parser)
    add_preset(parser)
    groups = add_settings(
        parser,
        *RUN_SECTIONS,
        TextOptions,
        without=without,
        defaults={"seqlen": None},
        preset=DEFAULT_PRESET,
    )
    add_quantize(groups["quantization"])
    add_no_pca(groups["experts"])


def _add_run(parser: argparse.ArgumentParser) -> None:
    add_run_settings(parser)
    add_execution(parser)
    add_eval_windows(parser)
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="Folder (or URL) for the expanded model; without it the model is measured and thrown "
        "away.",
    )
    _add_resume(parser)


def _add_expand(parser: argparse.ArgumentParser) -> None:
    add_run_settings(parser)
    add_execution(parser)
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="Folder (or URL) for the expanded model."
    )
    _add_resume(parser)


def _add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", action="store_true", help="Continue an interrupted run.")


def run(args: argparse.Namespace) -> int:
    """Make an expanded model; `run` measures it too, and the dense one."""
    job = ExpansionJob(
        model=model_request(args),
        dataset=args.dataset,
        values=vars(args),
        command=args.line,
        output=args.output,
        resume=args.resume,
        measures=args.command == "run",
        eval_windows=getattr(args, "eval_windows", None),
    )
    metrics = run_expansion(job, args.progress)
    from sparse_expansion.report.tables import run_table

    print_result(args, metrics, run_table(metrics, args.output), sort_keys=True)
    return 0


RUN = Command(
    name="run",
    help="Expand a model and measure its perplexity.",
    examples=_RUN_EXAMPLES,
    add_flags=_add_run,
    run=run,
    common=_COMMON,
)
EXPAND = Command(
    name="expand",
    help="Make an expanded model and save it.",
    examples=_EXPAND_EXAMPLES,
    add_flags=_add_expand,
    run=run,
    common=_COMMON,
)
