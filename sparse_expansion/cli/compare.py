"""``compare``: finished runs beside each other."""

from __future__ import annotations

import argparse

from sparse_expansion.cli.command import Command
from sparse_expansion.cli.opening import check_run, check_table, open_run, print_result
from sparse_expansion.cli.shared_flags import add_plots, add_table

_EXAMPLES = """\
  sparse-expansion compare ./k1 ./k4 ./k16 ./k16-random
  sparse-expansion compare ./k1 ./k16 --plots plots --table runs.parquet
"""


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", metavar="DIR", nargs="+", help="The --output folders (or URLs) of finished runs."
    )
    add_table(parser)
    add_plots(parser)


def run(args: argparse.Namespace) -> int:
    """Compare perplexity and cost."""
    check_table(args.table)
    check_run(*args.folders)
    args.progress.doing("reading the runs")
    from sparse_expansion.report.comparison import comparison, comparison_table
    from sparse_expansion.report.figures.canvas import save
    from sparse_expansion.report.figures.comparison import perplexity_against_cost
    from sparse_expansion.report.parquet import columns_of, write_table

    rows = comparison([open_run(folder) for folder in args.folders])
    if args.table:
        write_table(columns_of(rows), args.table)
    if args.plots:
        save({"perplexity-cost": perplexity_against_cost(rows)}, args.plots)
    print_result(args, rows, comparison_table(rows), sort_keys=True)
    return 0


COMPARE = Command(
    name="compare",
    help="Put perplexity and cost of finished runs beside each other.",
    examples=_EXAMPLES,
    add_flags=_add_flags,
    run=run,
)
