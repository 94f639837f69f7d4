"""The parser of all subcommands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from sparse_expansion.cli.allocate import ALLOCATE
from sparse_expansion.cli.analyze import ANALYZE
from sparse_expansion.cli.compare import COMPARE
from sparse_expansion.cli.config_file import config_path, names_in_files, use_config
from sparse_expansion.cli.evaluate import EVALUATE
from sparse_expansion.cli.export import EXPORT
from sparse_expansion.cli.flags import HelpFormatter, fill_in, normalise_flags
from sparse_expansion.cli.plan import PLAN
from sparse_expansion.cli.prune_neurons import PRUNE_NEURONS
from sparse_expansion.cli.report import REPORT
from sparse_expansion.cli.run import EXPAND, RUN
from sparse_expansion.cli.shared_flags import add_output_of_all
from sparse_expansion.cli.sweep_clusters import SWEEP_CLUSTERS
from sparse_expansion.cli.write_text import WRITE_TEXT
from sparse_expansion.config.nearest import did_you_mean
from sparse_expansion.messages import printable

EXIT_BAD_INPUT = 2
_WITH_RUN_SETTINGS = ("run", "expand", "plan", "evaluate")
"""Commands whose settings one file may have together."""
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
        WRITE_TEXT,
    )
}
"""All subcommands by name."""


class _Parser(argparse.ArgumentParser):
    """One line and exit code 2 for a wrong flag, as for every other bad input."""

    common: Collection[str] = ()
    """Names of the flags that the short help shows; empty where there is no short help."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and end."""
        text = printable(" ".join(message.split()))
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {text} (see {self.prog} --help)\n")

    def print_help(self, file: Any = None) -> None:
        """Print the short help where there is one, else the whole."""
        text = self._short_help() if self.common else self.format_help()
        self._print_message(text, file or sys.stdout)

    def _short_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage("%(prog)s --model MODEL [flags]", [], [])
        formatter.add_text(self.description)
        for group in self._action_groups:
            formatter.start_section(group.title)
            formatter.add_arguments(
                [action for action in group._group_actions if action.dest in self.common]
            )
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            hint = did_you_mean(str(value), [str(choice) for choice in action.choices or ()])
            raise argparse.ArgumentError(action, f"{error.message}{hint}") from None


class _HelpAll(argparse.Action):
    """Prints the whole help, and ends."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> NoReturn:
        parser._print_message(parser.format_help(), sys.stdout)
        parser.exit()


def command_parsers() -> tuple[argparse.ArgumentParser, dict[str, _Parser]]:
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
    found: dict[str, _Parser] = {}
    for command in COMMANDS.values():
        sub = subparsers.add_parser(
            command.name,
            help=command.help,
            description=command.help,
            epilog=f"examples:\n{command.examples}",
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        if command.common:
            sub.common = ("help", "help_all", *command.common)
            sub.add_argument(
                "--help-all", action=_HelpAll, nargs=0, help="Show all flags, and exit."
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
    parser, commands = command_parsers()
    given = normalise_flags(arguments)
    name = next((word for word in given if not word.startswith("-")), "")
    command = commands.get(name)
    path = config_path(given)
    if command is not None and name in _WITH_RUN_SETTINGS and path is not None:
        names = set().union(*(names_in_files(commands[other]) for other in _WITH_RUN_SETTINGS))
        try:
            use_config(command, path, given, names)
        except ValueError as error:
            command.error(str(error))
    args, unknown = parser.parse_known_args(given)
    if unknown:
        _refuse(command or parser, unknown)
    return fill_in(args)


def _refuse(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> NoReturn:
    """Answer what no flag takes, with the flag that was meant."""
    flag = next((word for word in unknown if word.startswith("-")), "").partition("=")[0]
    options = [option for action in parser._actions for option in action.option_strings]
    hint = did_you_mean(flag, options) if flag else ""
    parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
