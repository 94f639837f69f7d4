"""``prune-neurons``: the perplexity where only the first neurons of a ranking are pruned."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from sparse_expansion.cli.command import Command
from sparse_expansion.cli.experiment import (
    add_experiment,
    check_experiment,
    experiment_windows,
    open_dense_model,
)
from sparse_expansion.cli.opening import present
from sparse_expansion.cli.settings import experiment_config, numbers
from sparse_expansion.cli.workplace import passing_workplace
from sparse_expansion.config.neurons import RANKINGS

_EXAMPLES = """\
  sparse-expansion prune-neurons --model ./SmolLM2-135M --dataset ./wikitext2 \\
      --sparsity 0.9 --shares 0.01,0.03,0.1 --rankings wasserstein,random --dataset-size 32 \\
      --seqlen 512 --eval-windows 16 --plots plots
"""


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser, clusters=False)
    parser.add_argument(
        "--rankings",
        default=",".join(RANKINGS),
        metavar="R,R,...",
        help="Orders in which neurons are pruned, comma-separated.",
    )
    parser.add_argument(
        "--shares",
        default="0.01,0.03,0.1",
        metavar="P,P,...",
        help="Shares of every linear's neurons that are pruned.",
    )


def rankings_and_shares(args: argparse.Namespace) -> tuple[list[str], list[float]]:
    """What is tried.

    Raises:
        ValueError: a ranking is unknown, or a share out of bounds.
    """
    rankings = list(dict.fromkeys(args.rankings.split(",")))
    unknown = [name for name in rankings if name not in RANKINGS]
    if unknown:
        raise ValueError(f"--rankings {unknown[0]!r} is none of {', '.join(RANKINGS)}")
    shares = numbers(args.shares, "--shares", float)
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"--shares {share:g} is outside 0 to 1, e.g. 0.03")
    return rankings, shares


def run(args: argparse.Namespace) -> int:
    """Prune the first neurons of several rankings, and measure."""
    options, _ = check_experiment(args)
    rankings, shares = rankings_and_shares(args)
    dense = open_dense_model(args)
    from sparse_expansion.report.figures.studies import perplexity_over_share
    from sparse_expansion.report.parquet import columns_of
    from sparse_expansion.report.study_tables import pruned_table
    from sparse_expansion.studies.pruned_neurons import prune_neurons

    calibration, held_out = experiment_windows(args, dense)
    with passing_workplace(args, options, dense.origin, dense.shell.num_blocks) as place:
        found = prune_neurons(
            dense.shell,
            calibration,
            held_out,
            rankings=rankings,
            shares=shares,
            config=experiment_config(args, len(calibration), dense.seqlen),
            store=place.store,
            executor=place.executor,
            observer=place.observer,
        )
    perplexity = found.perplexity_dense
    present(
        args,
        asdict(found),
        pruned_table(found.rows, perplexity, found.num_eval_tokens),
        columns=lambda: columns_of(found.rows),
        figures=lambda: {"pruned-neurons": perplexity_over_share(found.rows, perplexity)},
    )
    return 0


PRUNE_NEURONS = Command(
    name="prune-neurons",
    help="Prune only the first neurons of several rankings, and measure the perplexity.",
    examples=_EXAMPLES,
    add_flags=_add_flags,
    run=run,
)
