"""The parser of all subcommands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from sparse_expansion.cli.allocate import ALLOCATE
from sparse_expansion.cli.analyze import ANALYZE
from sparse_expansion.cli.compare import COMPARE
from sparse_expansion.cli.evaluate import EVALUATE
from sparse_expansion.cli.export import EXPORT
from sparse_expansion.cli.flags import HelpFormatter, fill_in, normalise_flags
from sparse_expansion.cli.plan import PLAN
from sparse_expansion.cli.prune_neurons import PRUNE_NEURONS
from sparse_expansion.cli.report import REPORT
from sparse_expansion.cli.run import EXPAND, RUN
from sparse_expansion.cli.shared_flags import add_output_of_all
from sparse_expansion.cli.sweep_clusters import SWEEP_CLUSTERS

EXIT_BAD_INPUT = 2
COMMANDS = {
    command.name: command
    for command in (
        RUN,
        EXPAND,
        EVALUATE,
        PLAN,
        ANALYZE,
        EXPORT,
        REPORT,
        COMPARE,
        SWEEP_CLUSTERS,
        PRUNE_NEURONS,
        ALLOCATE,
    )
}
"""All subcommands by name."""


class _Parser(argparse.ArgumentParser):
    """One line and exit code 2 for a wrong flag, as for every other bad input."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def command_parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the whole command line, and those of its subcommands by name."""
    try:
        release = version("sparse-expansion")
    except PackageNotFoundError:
        release = "unknown"
    parser = _Parser(
        prog="sparse-expansion",
        description="Turn a language model's MLP linears into routed, pruned and quantized "
        "experts (arXiv 2405.15756), save the result, and measure its perplexity.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=release)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    found: dict[str, argparse.ArgumentParser] = {}
    for command in COMMANDS.values():
        sub = subparsers.add_parser(
            command.name,
            help=command.help,
            description=command.help,
            epilog=f"examples:\n{command.examples}",
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        command.add_flags(sub)
        add_output_of_all(sub)
        found[command.name] = sub
    return parser, found


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parsed flags, and the values of those that were not given.

    Raises:
        SystemExit: help was asked for, or a flag is wrong.
    """
    parser, _ = command_parsers()
    return fill_in(parser.parse_args(normalise_flags(arguments)))
