"""``allocate``: shares of zeros, and numbers of experts, by what blocks lose."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_expansion.cli.command import Command
from sparse_expansion.cli.experiment import (
    DenseModel,
    add_cluster_counts,
    add_experiment,
    check_experiment,
    experiment_windows,
    open_dense_model,
)
from sparse_expansion.cli.opening import present
from sparse_expansion.cli.settings import cluster_counts, experiment_config
from sparse_expansion.cli.workplace import Workplace, passing_workplace
from sparse_expansion.config.execution import ExecutionOptions
from sparse_expansion.config.routing import RoutingConfig
from sparse_expansion.config.run import RunConfig

if TYPE_CHECKING:
    import torch

    from sparse_expansion.jobs.allocation import Allocation

_EXAMPLES = """\
  sparse-expansion allocate --model ./SmolLM2-135M --dataset ./wikitext2 --sparsity 0.7 \\
      --dataset-size 16 --eval-windows 8 --seqlen 512 --output shares.json
  sparse-expansion run --model ./SmolLM2-135M --dataset ./wikitext2 --sparsity 0.7 \\
      --layer-sparsity shares.json --dataset-size 64 --seqlen 512 --output ./expanded
"""


def _add_flags(parser: argparse.ArgumentParser) -> None:
    groups = add_experiment(parser, clusters=True)
    add_cluster_counts(
        groups["experts"],
        "Also try these numbers of experts in every block, such as 4,8,32, and share out "
        "experts by what they gain.",
    )
    groups["experts"].add_argument(
        "--mean-clusters",
        type=int,
        default=RoutingConfig.num_clusters,
        metavar="K",
        help="Experts of a block on average.",
    )
    parser.add_argument(
        "--output",
        metavar="FILE.json",
        help="Also write the result to a file, for run --layer-sparsity.",
    )


def _check(args: argparse.Namespace) -> tuple[ExecutionOptions, list[int]]:
    """Where units run, and the numbers of clusters to try."""
    options, compression = check_experiment(args)
    if args.output and not Path(args.output).parent.is_dir():
        raise ValueError(f"--output {args.output}: {Path(args.output).parent} is no folder")
    if compression.sparsity.group is not None:
        raise ValueError(
            f"--sparsity {compression.sparsity}: only a share of zeros can differ by block, "
            "e.g. 0.7"
        )
    clusters = cluster_counts(args)
    if clusters and min(clusters) > args.mean_clusters:
        raise ValueError(
            f"--mean-clusters {args.mean_clusters} is below all of --num_clusters "
            f"{args.cluster_counts}: try smaller ones too"
        )
    return options, clusters


def run(args: argparse.Namespace) -> int:
    """Measure what blocks lose, and share out the zeros."""
    options, clusters = _check(args)
    dense = open_dense_model(args)
    from sparse_expansion.report.figures.allocation import allocation
    from sparse_expansion.report.parquet import columns_of
    from sparse_expansion.report.study_tables import allocation_table
    from sparse_expansion.store import write_file

    calibration, held_out = experiment_windows(args, dense, hold_out_of_calibration=True)
    # Held-out text passes through the dense model as calibration text does.
    num_windows = len(calibration) + (len(held_out) if clusters else 0)
    config = experiment_config(args, num_windows, dense.seqlen)
    with passing_workplace(args, options, dense.origin, dense.shell.num_blocks) as place:
        found = _measure(config, dense, place, calibration, held_out, clusters, args.mean_clusters)
    rows = found.rows()
    result: dict[str, Any] = {
        "layer_sparsity": found.layer_sparsity,
        **({"layer_clusters": found.layer_clusters} if clusters else {}),
        "num_eval_tokens": found.num_eval_tokens,
        "rows": rows,
    }
    if args.output:
        write_file(args.output, (json.dumps(result, indent=1, sort_keys=True) + "\n").encode())
    present(
        args,
        result,
        allocation_table(rows),
        columns=lambda: columns_of(rows),
        figures=lambda: {"allocation": allocation(rows)},
    )
    return 0


def _measure(
    config: RunConfig,
    dense: DenseModel,
    place: Workplace,
    calibration: torch.Tensor,
    held_out: torch.Tensor,
    clusters: list[int],
    mean_clusters: int,
) -> Allocation:
    import torch

    from sparse_expansion.algorithms.allocation import clusters_by_error
    from sparse_expansion.jobs.allocation import measure, measure_clusters
    from sparse_expansion.planning.shapes import model_shape
    from sparse_expansion.planning.studies import check_no_mixture

    shape = model_shape(dense.shell)
    if clusters:
        check_no_mixture(shape)
    found = measure(
        config,
        shape,
        calibration,
        held_out,
        executor=place.executor,
        observer=place.observer,
    )
    if clusters:
        groups = dense.shell.groups(0)
        found.errors = measure_clusters(
            config,
            shape,
            {name: group.name for group in groups for name in group.linears},
            torch.cat([calibration, held_out]),
            len(calibration),
            clusters=clusters,
            store=place.store,
            executor=place.executor,
            observer=place.observer,
        )
        found.layer_clusters = clusters_by_error(found.gaps, found.errors, mean_clusters)
    return found


ALLOCATE = Command(
    name="allocate",
    help="Measure what every block loses when it alone is pruned, and share out the zeros.",
    examples=_EXAMPLES,
    add_flags=_add_flags,
    run=run,
)
