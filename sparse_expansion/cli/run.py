"""``run`` and ``expand``: make an expanded model, and measure it."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_expansion.cli.command import Command
from sparse_expansion.cli.flags import add_settings
from sparse_expansion.cli.opening import (
    begin_work,
    check_eval_windows,
    check_output,
    check_room,
    open_executor,
    print_result,
    window_length,
)
from sparse_expansion.cli.progress import ProgressLine
from sparse_expansion.cli.settings import execution_options, run_config
from sparse_expansion.cli.shared_flags import (
    add_eval_windows,
    add_execution,
    add_model,
    add_no_pca,
    add_preset,
    add_quantize,
)
from sparse_expansion.config.calibration import CalibrationConfig
from sparse_expansion.config.compression import CompressionConfig
from sparse_expansion.config.execution import ExecutionOptions
from sparse_expansion.config.presets import DEFAULT_PRESET
from sparse_expansion.config.routing import RoutingConfig
from sparse_expansion.config.run import RefinementConfig, RunConfig

if TYPE_CHECKING:
    import torch

    from sparse_expansion.execution.base import Executor
    from sparse_expansion.jobs.measurements import Measurements
    from sparse_expansion.jobs.prepare import Prepared
    from sparse_expansion.model.sources import ModelSource
    from sparse_expansion.store import Store

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


def add_run_settings(parser: argparse.ArgumentParser, *, without: tuple[str, ...] = ()) -> None:
    """The settings of a run, which `plan` has too.

    Args:
        parser: of the command.
        without: names of fields that the command has no flag of.
    """
    add_model(parser)
    add_preset(parser)
    groups = add_settings(
        parser,
        CompressionConfig,
        RoutingConfig,
        CalibrationConfig,
        RefinementConfig,
        RunConfig,
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
    options = _check(args)
    from sparse_expansion.data.corpora import check_dataset
    from sparse_expansion.model.sources import resolve_name

    check_dataset(args.dataset)
    source = resolve_name(args.model, args.model_size)
    begin_work(args)
    from sparse_expansion.jobs.forecast import disk_bytes
    from sparse_expansion.jobs.measurements import Measurements
    from sparse_expansion.jobs.metrics import mixed_threads
    from sparse_expansion.jobs.prepare import claim
    from sparse_expansion.report.tables import run_table
    from sparse_expansion.run_files import COMMAND_FILE
    from sparse_expansion.run_folder import alone_in
    from sparse_expansion.store import Store

    with closing(ProgressLine()) as line:
        prepared, windows = _prepare(args, source, line)
        tokens = _evaluation_tokens(args, prepared) if args.command == "run" else None
        with _output_folder(args.output) as output:
            check_room(output, disk_bytes(prepared.config, prepared.shell.config))
            store = Store(output)
            with alone_in(store):
                claim(store, prepared, windows, resume=args.resume)
                del windows
                if advice := mixed_threads(store, options.threads):
                    line.say(advice)
                store.write_sealed(COMMAND_FILE, {"command": args.line})
                where = output if "://" in output else str(Path(output).expanduser().resolve())
                measured = Measurements()
                with closing(open_executor(args, options, store=where, source=source)) as executor:
                    metrics = _expand(args, options, prepared, store, executor, line, measured)
                    if tokens is not None:
                        _evaluate(options, prepared, tokens, executor, line, measured, metrics)
                    metrics = _finish(store, source, metrics, measured)
    print_result(args, metrics, run_table(metrics, args.output), sort_keys=True)
    return 0


def _check(args: argparse.Namespace) -> ExecutionOptions:
    """Check the flags first, before anything slow is imported or read."""
    run_config(args, args.seqlen or CalibrationConfig.seqlen)
    options = execution_options(args)
    if args.command == "run":
        check_eval_windows(args.eval_windows)
    if args.output is not None:
        check_output(args.output)
    elif args.resume:
        raise ValueError("--resume needs the --output folder of the run to continue")
    return options


def _prepare(
    args: argparse.Namespace, source: ModelSource, line: ProgressLine
) -> tuple[Prepared, torch.Tensor]:
    from sparse_expansion.jobs.prepare import prepare, slow_dtype
    from sparse_expansion.model.checkpoint import load_config
    from sparse_expansion.model.sources import fetch_model

    line.say(f"model {source.location}")
    folder = fetch_model(source, cache_dir=args.cache_dir, revision=args.model_revision)
    prepared, windows = prepare(
        run_config(args, window_length(args, load_config(folder))),
        folder,
        dataset=args.dataset,
        cache_dir=args.cache_dir,
        model_name=source.location,
    )
    if advice := slow_dtype(prepared.shell.dtype):
        line.say(advice)
    return prepared, windows


def _evaluation_tokens(args: argparse.Namespace, prepared: Prepared) -> torch.Tensor:
    from sparse_expansion.jobs.prepare import evaluation_tokens

    return evaluation_tokens(
        prepared.evaluation_text,
        prepared.encode,
        seqlen=prepared.config.calibration.seqlen,
        max_windows=args.eval_windows,
        vocabulary=int(prepared.shell.config.vocab_size),
    )


@contextmanager
def _output_folder(asked: str | None) -> Iterator[str]:
    """The folder that was asked for, or one that is thrown away."""
    if asked is not None:
        yield asked
        return
    with tempfile.TemporaryDirectory(prefix="sparse-expansion-") as folder:
        yield folder


def _expand(
    args: argparse.Namespace,
    options: ExecutionOptions,
    prepared: Prepared,
    store: Store,
    executor: Executor,
    line: ProgressLine,
    measured: Measurements,
) -> dict[str, Any]:
    """Metrics of the expanded model."""
    from sparse_expansion.jobs.expand import expand
    from sparse_expansion.jobs.measurements import measure_ceilings
    from sparse_expansion.jobs.metrics import expansion_metrics

    if options.profile:
        line.say("measuring the ceilings of a worker")
        measure_ceilings(executor, prepared.config, measured)
    line.start("expand", prepared.shell.num_blocks)
    expand(prepared, store, executor, line.update, measured)
    metrics = expansion_metrics(prepared, store, options.executor)
    metrics["command"] = args.line
    return metrics


def _evaluate(
    options: ExecutionOptions,
    prepared: Prepared,
    tokens: torch.Tensor,
    executor: Executor,
    line: ProgressLine,
    measured: Measurements,
    metrics: dict[str, Any],
) -> None:
    """Add the perplexities of the dense and the expanded model to the metrics."""
    from sparse_expansion.jobs.evaluate import evaluate

    for kind in ("dense", "expanded"):
        prefix = "dense_" if kind == "dense" else ""
        line.start(f"evaluate {kind}", prepared.shell.num_blocks)
        nll, _ = evaluate(
            kind,
            tokens,
            prepared.config,
            prepared.shell,
            executor,
            line.update,
            measured,
            model_bytes=metrics[f"{prefix}checkpoint_bytes"],
            num_shards=executor.num_workers,
            num_ranges=options.eval_pipeline,
        )
        line.say(f"{kind} perplexity {nll.perplexity:.3f}")
        metrics[f"perplexity_{kind}"] = nll.perplexity
        metrics["num_eval_tokens"] = nll.num_tokens


def _finish(
    store: Store, source: ModelSource, metrics: dict[str, Any], measured: Measurements
) -> dict[str, Any]:
    """Write the metrics and the model card."""
    from sparse_expansion.jobs.metrics import finish_metrics
    from sparse_expansion.report.card import model_card
    from sparse_expansion.run_files import METRICS_FILE

    metrics = finish_metrics(metrics, measured)
    store.write_sealed(METRICS_FILE, metrics)
    card = model_card(metrics, source.location, is_hub_id=source.kind == "hub")
    store.write_bytes("README.md", card.encode())
    return metrics


RUN = Command(
    name="run",
    help="Expand a model and measure its perplexity.",
    examples=_RUN_EXAMPLES,
    add_flags=_add_run,
    run=run,
)
EXPAND = Command(
    name="expand",
    help="Make an expanded model and save it.",
    examples=_EXPAND_EXAMPLES,
    add_flags=_add_expand,
    run=run,
)
