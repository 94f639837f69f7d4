"""``sweep-clusters``: numbers of clusters on the linears of one block."""

from __future__ import annotations

import argparse

from sparse_expansion.cli.command import Command
from sparse_expansion.cli.experiment import (
    add_cluster_counts,
    add_experiment,
    check_experiment,
    experiment_windows,
    open_dense_model,
)
from sparse_expansion.cli.opening import present
from sparse_expansion.cli.settings import cluster_counts, experiment_config
from sparse_expansion.cli.workplace import passing_workplace

_EXAMPLES = """\
  # how the error of a linear's outputs on other text falls with K, and with random clusters
  sparse-expansion sweep-clusters --model ./SmolLM2-135M --dataset ./wikitext2 --layer 10 \\
      --dataset-size 32 --seqlen 512 --sparsity 0.8
  # one neuron's distribution, dense and for every K
  sparse-expansion sweep-clusters --model ./SmolLM2-135M --dataset ./wikitext2 --layer 10 \\
      --linear mlp.up_proj --neuron 17 --dataset-size 32 --seqlen 512 --sparsity 0.8 --plots plots
"""


def _add_flags(parser: argparse.ArgumentParser) -> None:
    groups = add_experiment(parser, clusters=True)
    add_cluster_counts(groups["experts"], "Numbers of clusters to try.", default="1,2,4,8,16")
    parser.add_argument("--layer", type=int, required=True, metavar="N", help="Block, from 0.")
    parser.add_argument(
        "--linear", metavar="NAME", help="Linear to try, such as mlp.up_proj; all without it."
    )
    parser.add_argument(
        "--neuron", type=int, metavar="N", help="Output of the linear to look at, from 0."
    )


def run(args: argparse.Namespace) -> int:
    """Try numbers of clusters, with random clusters as a control."""
    options, _ = check_experiment(args)
    clusters = cluster_counts(args)
    dense = open_dense_model(args)
    import torch

    from sparse_expansion.report.figures.studies import sweep_figures
    from sparse_expansion.report.parquet import columns_of
    from sparse_expansion.report.study_tables import sweep_table
    from sparse_expansion.studies.cluster_sweep import mlp_linears, sweep_clusters

    linears = mlp_linears(dense.shell, args.layer, args.linear, args.neuron)
    calibration, held_out = experiment_windows(args, dense)
    # Held-out text passes through the dense model as calibration text does.
    windows = torch.cat([calibration, held_out])
    with passing_workplace(args, options, dense.origin, dense.shell.num_blocks) as place:
        found = sweep_clusters(
            dense.shell,
            windows,
            len(calibration),
            layer=args.layer,
            linears=linears,
            clusters=clusters,
            neuron=args.neuron,
            config=experiment_config(args, len(windows), dense.seqlen),
            store=place.store,
            executor=place.executor,
            observer=place.observer,
        )
    present(
        args,
        {"rows": found.rows},
        sweep_table(found.rows, args.neuron),
        columns=lambda: columns_of(found.rows),
        figures=lambda: sweep_figures(found.rows, found.distributions, args.neuron),
    )
    return 0


SWEEP_CLUSTERS = Command(
    name="sweep-clusters",
    help="Try numbers of clusters on the linears of one block, with random clusters as a control.",
    examples=_EXAMPLES,
    add_flags=_add_flags,
    run=run,
)
