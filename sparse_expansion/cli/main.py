"""Entry point of the command line: parses without PyTorch, and turns errors into exit codes."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, TextIO

from sparse_expansion.cli.network import spare_retries
from sparse_expansion.cli.parser import COMMANDS, EXIT_BAD_INPUT, parse_arguments
from sparse_expansion.cli.progress import ProgressLine
from sparse_expansion.cli.signals import end_cleanly, exit_code
from sparse_expansion.messages import printable

EXIT_FAILED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: 0 done, 1 failed at work, 2 bad input, 130 interrupted, 143 terminated."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        args = parse_arguments(given)
    except SystemExit as stop:
        return int(stop.code or 0)
    args.line = shlex.join(["sparse-expansion", *given])
    _quieten(args.verbose)
    end_cleanly()
    args.progress = ProgressLine(verbose=args.verbose)
    try:
        with closing(args.progress):
            spare_retries(getattr(args, "dataset", None))
            return COMMANDS[args.command].run(args)
    except BaseException as error:
        code = exit_code(error)
        return _answer(error, args) if code is None else code


def _answer(error: BaseException, args: argparse.Namespace) -> int:
    """Exit code of an error, after it was told in a line; raised again where it is a defect."""
    if isinstance(error, BrokenPipeError):
        # The reader of our output (a pager, `head`) has gone: not an error of ours.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - closed by the interpreter
        return EXIT_FAILED
    if isinstance(error, OSError):
        _complain(_os_error_text(error))
        return EXIT_FAILED
    if isinstance(error, ValueError):
        return _answer_value_error(error, args)
    raise error


def _os_error_text(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" writing {error.filename}" if error.filename else ""
        return (
            f"no space left on the disk{where}: free some, then continue with --resume "
            "(finished units are kept)"
        )
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"


def _answer_value_error(error: ValueError, args: argparse.Namespace) -> int:
    if args.verbose:
        logging.exception("the error in full")
    _complain(" ".join(str(error).split()))
    return EXIT_FAILED if _is_work_failure(error) else EXIT_BAD_INPUT


def _is_work_failure(error: ValueError) -> bool:
    # Where no work has begun the module is not loaded, and loading it would load PyTorch.
    if "sparse_expansion.types" not in sys.modules:
        return False
    from sparse_expansion.types import CompressionError

    return isinstance(error, CompressionError)


def _complain(message: str) -> None:
    print(f"sparse-expansion: error: {printable(message)}", file=sys.stderr)


class _PrintableFormatter(logging.Formatter):
    """Messages in which names from files are shown as they are."""

    def format(self, record: logging.LogRecord) -> str:
        """The message without control characters."""
        return printable(super().format(record))


if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:
    # Python 3.10 has no types of what the class writes to.
    _StreamHandler = logging.StreamHandler


class _StderrHandler(_StreamHandler):
    """Writes to what ``sys.stderr`` is at the moment: above the bar, where there is one."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """Standard error."""
        return sys.stderr


def _quieten(verbose: bool) -> None:
    """Keep libraries' own bars and advice from hiding ours."""
    handler = _StderrHandler()
    handler.setFormatter(_PrintableFormatter("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, handlers=[handler])
    # What this package warns of is said: that a worker was lost, or what a run waits for.
    logging.getLogger("sparse_expansion").setLevel(logging.INFO if verbose else logging.WARNING)
    if not verbose:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        # It tells every try of a download, twice.
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import warnings

        warnings.filterwarnings("ignore")
