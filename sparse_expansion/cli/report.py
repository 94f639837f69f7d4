"""``report``: a summary of a run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sparse_expansion.cli.command import Command
from sparse_expansion.cli.flags import add_settings
from sparse_expansion.cli.opening import begin_work, check_run, open_run, origin, print_result
from sparse_expansion.cli.shared_flags import add_downloads, add_plots, add_run_folder
from sparse_expansion.config.cluster import Cluster
from sparse_expansion.config.execution import ExecutionOptions

if TYPE_CHECKING:
    from sparse_expansion.report.facts import RunFacts
    from sparse_expansion.store import Store

_EXAMPLES = """\
  sparse-expansion report ./expanded
  sparse-expansion report ./expanded --html report.html --price 1.2 --plots plots
  sparse-expansion report ./expanded --json
  # against a run of one expert, and both models' continuation of a prompt side by side
  sparse-expansion report ./expanded --html report.html --baseline ./sparse-gpt \\
      --sample "The for statement is used to"
"""


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_run_folder(parser)
    add_plots(parser)
    parser.add_argument(
        "--html", metavar="FILE.html", help="Also write the report as one HTML page."
    )
    add_settings(parser, Cluster, names=("price_per_hour",))
    parser.add_argument(
        "--baseline",
        metavar="DIR",
        help="Finished run to compare with, such as one with one expert.",
    )
    group = parser.add_argument_group("sample of text (loads the dense and the expanded model)")
    group.add_argument(
        "--sample", metavar="PROMPT", help="Also have both models continue this prompt."
    )
    group.add_argument(
        "--sample-tokens", type=int, default=48, metavar="N", help="New tokens of each, at most."
    )
    group.add_argument(
        "--dense",
        metavar="MODEL",
        help="The dense model; without it, the one that the run was made of.",
    )
    add_downloads(parser)
    add_settings(parser, ExecutionOptions, names=("device",))


def run(args: argparse.Namespace) -> int:
    """Summarise a finished or unfinished run."""
    check_run(args.folder, args.baseline)
    if args.sample_tokens < 1:
        raise ValueError(f"--sample-tokens {args.sample_tokens} must be at least 1")
    args.progress.doing("reading the run")
    from sparse_expansion.report.comparison import (
        against_baseline,
        comparison,
        comparison_table,
    )
    from sparse_expansion.report.facts import read_facts
    from sparse_expansion.report.tables import report_text

    store = open_run(args.folder)
    facts = read_facts(store)
    compared = [] if args.baseline is None else comparison([open_run(args.baseline), store])
    sample = None if args.sample is None else _sample(args, store, facts)
    if args.html is not None:
        args.progress.doing("drawing the page")
        from sparse_expansion.report.page import report_page
        from sparse_expansion.store import write_file

        page = report_page(
            facts, price_per_hour=args.price_per_hour, compared=compared, sample=sample
        )
        write_file(args.html, page.encode())
    if args.plots:
        args.progress.doing("drawing the figures")
        from sparse_expansion.report.figures.canvas import save
        from sparse_expansion.report.figures.run import run_figures

        save(run_figures(facts), args.plots)
    result, text = facts.to_dict(), report_text(facts)
    if compared:
        result["compared"] = compared
        text += f"\n\n{comparison_table(compared)}\n{against_baseline(*compared)}"
    if sample is not None:
        result["sample"] = sample
        text += "".join(f"\n\n{name}: {said}" for name, said in sample.items())
    print_result(args, result, text, sort_keys=True)
    return 0


def _sample(args: argparse.Namespace, store: Store, facts: RunFacts) -> dict[str, str]:
    """The prompt, and what the dense and the expanded model make of it, one after the other.

    Raises:
        ValueError: the run is not finished, or a model is not there.
    """
    if not facts.is_finished:
        raise ValueError(f"{store.root} is not finished: --sample needs the expanded model")
    expanded = store.local_path()
    begin_work(args)
    from sparse_expansion.jobs.sample import continuation

    args.progress.doing("reading the dense model")
    dense = origin(args, args.dense or facts.model).fetch()
    found = {"prompt": args.sample}
    for name, folder in (("dense", dense), ("expanded", expanded)):
        args.progress.doing(f"continuing the prompt with the {name} model")
        found[name] = continuation(
            folder,
            args.sample,
            args.sample_tokens,
            device=args.device,
            dtype=facts.config.get("dtype", "auto"),
        )
    return found


REPORT = Command(
    name="report",
    help="Summarise a finished or unfinished run folder.",
    examples=_EXAMPLES,
    add_flags=_add_flags,
    run=run,
)
