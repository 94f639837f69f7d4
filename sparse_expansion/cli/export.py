"""``export``: a one-expert model for other tools."""

from __future__ import annotations

import argparse

from sparse_expansion.api.opening import check_output
from sparse_expansion.cli.command import Command
from sparse_expansion.cli.opening import open_run, print_result
from sparse_expansion.cli.progress import silence_transformers
from sparse_expansion.cli.shared_flags import add_run_folder
from sparse_expansion.jobs.export_formats import DENSE, FORMATS

_EXAMPLES = """\
  sparse-expansion export ./sparse-gpt --output ./plain
  sparse-expansion export ./sparse-gpt-4bit --format pack-quantized --output ./packed
"""


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_run_folder(parser)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=DENSE,
        help="Format of the weights: dense is plain tensors, pack-quantized is the format of "
        "compressed-tensors for quantized experts.",
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="New folder (or URL).")


def run(args: argparse.Namespace) -> int:
    """Write a plain or compressed-tensors folder."""
    folder = open_run(args.folder).local_path()
    check_output(args.output)
    silence_transformers(args.verbose)
    args.progress.doing("writing the exported model")
    from sparse_expansion.jobs.export import export

    result = export(folder, args.output, args.format)
    text = f"{result['format']} model of {result['bytes']:,} bytes in {args.output}"
    print_result(args, result, text, sort_keys=True)
    return 0


EXPORT = Command(
    name="export",
    help="Write a one-expert model as a folder for other tools.",
    examples=_EXAMPLES,
    add_flags=_add_flags,
    run=run,
)
