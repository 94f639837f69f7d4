"""``plan``: what a run will do and need."""

from __future__ import annotations

import argparse

from sparse_expansion.api.opening import window_length
from sparse_expansion.cli.command import Command
from sparse_expansion.cli.flags import add_settings
from sparse_expansion.cli.opening import origin, print_result
from sparse_expansion.cli.progress import silence_transformers
from sparse_expansion.cli.run import add_run_settings
from sparse_expansion.cli.settings import planned_cluster, run_config
from sparse_expansion.config.calibration import ALL_WINDOWS, CalibrationConfig
from sparse_expansion.config.cluster import Cluster
from sparse_expansion.config.execution import ExecutionOptions
from sparse_expansion.config.values import field_values

_EXAMPLES = """\
  sparse-expansion plan --model ./llama-2-13b --calibration-inputs dense --data-shards 64 \\
      --num-workers 16 --gpu-memory 48GB --host-memory 128GB --price 1.9
  sparse-expansion plan --model ./SmolLM2-135M --sparsity 0.5 --num_clusters 16 \\
      --dataset-size 32 --seqlen 512
  sparse-expansion plan --model ./config-only-folder --json
"""


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_run_settings(parser, without=("dataset", "text_column"))
    add_settings(parser, Cluster)
    add_settings(parser, ExecutionOptions, names=("activation_bytes", "device_bytes"))


def run(args: argparse.Namespace) -> int:
    """Forecast a run from the model's config alone."""
    if run_config(args, args.seqlen or CalibrationConfig.seqlen).calibration.whole_text:
        raise ValueError(
            f"--dataset-size {ALL_WINDOWS}: plan reads no text, give the number of windows"
        )
    cluster = planned_cluster(args)
    from sparse_expansion.model.sources import fetch_config

    source = origin(args, args.model, args.model_size).source
    args.progress.doing("reading the model's config")
    silence_transformers(args.verbose)
    from sparse_expansion.jobs.forecast import forecast
    from sparse_expansion.report.tables import plan_table

    model_config = fetch_config(source, cache_dir=args.cache_dir, revision=args.model_revision)
    args.progress.doing("planning the units")
    options = field_values(ExecutionOptions, vars(args))
    result = forecast(
        run_config(args, window_length(args.seqlen, model_config)),
        model_config,
        cluster,
        activation_bytes=options["activation_bytes"],
        device_bytes=options["device_bytes"],
    )
    print_result(args, result, plan_table(result), sort_keys=True)
    return 0


PLAN = Command(
    name="plan",
    help="Say what a run will do and need, from the model's config alone.",
    examples=_EXAMPLES,
    add_flags=_add_flags,
    run=run,
)
