"""``report``: a summary of a run."""

from __future__ import annotations

import argparse

from sparse_expansion.cli.command import Command
from sparse_expansion.cli.flags import add_settings
from sparse_expansion.cli.opening import open_run, print_result
from sparse_expansion.cli.shared_flags import add_plots, add_run_folder
from sparse_expansion.config.cluster import Cluster

_EXAMPLES = """\
  sparse-expansion report ./expanded
  sparse-expansion report ./expanded --html report.html --price 1.2 --plots plots
  sparse-expansion report ./expanded --json
"""


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_run_folder(parser)
    add_plots(parser)
    parser.add_argument(
        "--html", metavar="FILE.html", help="Also write the report as one HTML page."
    )
    add_settings(parser, Cluster, names=("price_per_hour",))


def run(args: argparse.Namespace) -> int:
    """Summarise a finished or unfinished run."""
    from sparse_expansion.report.facts import read_facts
    from sparse_expansion.report.tables import report_text

    args.progress.doing("reading the run")
    facts = read_facts(open_run(args.folder))
    if args.html is not None:
        args.progress.doing("drawing the page")
        from sparse_expansion.report.page import report_page
        from sparse_expansion.store import write_file

        write_file(args.html, report_page(facts, price_per_hour=args.price_per_hour).encode())
    if args.plots:
        args.progress.doing("drawing the figures")
        from sparse_expansion.report.figures.canvas import save
        from sparse_expansion.report.figures.run import run_figures

        save(run_figures(facts), args.plots)
    print_result(args, facts.to_dict(), report_text(facts), sort_keys=True)
    return 0


REPORT = Command(
    name="report",
    help="Summarise a finished or unfinished run folder.",
    examples=_EXAMPLES,
    add_flags=_add_flags,
    run=run,
)
