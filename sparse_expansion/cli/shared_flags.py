"""Flags that several commands share and that are no settings of a run."""

from __future__ import annotations

import argparse

from sparse_expansion.cli.flags import add_settings
from sparse_expansion.config.calibration import CalibrationConfig
from sparse_expansion.config.compression import QUANTIZED_BITS
from sparse_expansion.config.execution import ExecutionOptions
from sparse_expansion.config.presets import DEFAULT_PRESET, PRESETS
from sparse_expansion.config.text import TextOptions


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model that a command opens."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m",
        "--model",
        required=True,
        metavar="MODEL",
        help="Model to open: pythia or llama (with --model-size), a hub id, a local folder, or a "
        ".gguf file.",
    )
    group.add_argument(
        "-ms", "--model-size", metavar="SIZE", help="Size of a pythia or llama model, such as 12B."
    )
    _add_downloads(group)


def add_downloads(parser: argparse.ArgumentParser) -> None:
    """How models and texts are downloaded, for a command without ``--model``."""
    _add_downloads(parser.add_argument_group("model"))


def _add_downloads(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model-revision", metavar="REV", help="Revision of the model on the hub.")
    group.add_argument(
        "-cd", "--cache-dir", metavar="DIR", help="Folder for downloads and conversions."
    )


def add_text(parser: argparse.ArgumentParser, *names: str) -> None:
    """The text that a command reads, and the length of its windows.

    Args:
        parser: of the command.
        names: of more fields of ``CalibrationConfig``.
    """
    add_settings(
        parser,
        CalibrationConfig,
        TextOptions,
        names=("dataset", "seqlen", "text_column", *names),
        defaults={"seqlen": None},
    )


def add_execution(parser: argparse.ArgumentParser) -> None:
    """Where and with what units of work run."""
    add_settings(parser, ExecutionOptions)


def add_config(parser: argparse.ArgumentParser) -> None:
    """A file of settings."""
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="Settings by name in a YAML file, such as the run.yaml of a run; flags override them.",
    )


def add_preset(parser: argparse.ArgumentParser) -> None:
    """A name for several settings."""
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default=DEFAULT_PRESET,
        help="Several settings under one name: best are those that measured best, paper are the "
        "published ones, which are two to three times as fast; explicit flags override the preset.",
    )


def add_quantize(group: argparse._ArgumentGroup) -> None:
    """Whether weights are quantized at all."""
    group.add_argument(
        "-q",
        "--quantize",
        action="store_true",
        help=f"Also quantize the kept weights (GPTQ), to {QUANTIZED_BITS} bits without --bits.",
    )


def add_no_pca(group: argparse._ArgumentGroup) -> None:
    """Routers without a PCA."""
    group.add_argument(
        "-npca", "--no-pca", action="store_true", help="Let routers see the full input, no PCA."
    )


def add_eval_windows(parser: argparse.ArgumentParser, default: int | None = None) -> None:
    """How much text is held out."""
    whole = "" if default else "; all of the text's without it"
    parser.add_argument(
        "--eval-windows",
        type=int,
        metavar="N",
        default=default,
        help=f"Windows to measure on{whole}.",
    )


def add_run_folder(parser: argparse.ArgumentParser) -> None:
    """A run to read."""
    parser.add_argument("folder", metavar="DIR", help="The --output folder (or URL) of a run.")


def add_table(parser: argparse.ArgumentParser) -> None:
    """Rows for other programs."""
    parser.add_argument("--table", metavar="FILE.parquet", help="Also write the rows as Parquet.")


def add_plots(parser: argparse.ArgumentParser) -> None:
    """Figures."""
    parser.add_argument("--plots", metavar="DIR", help="Also write figures, as SVG and PNG.")


def add_output_of_all(parser: argparse.ArgumentParser) -> None:
    """What every command has."""
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    parser.add_argument("-v", "--verbose", action="store_true", help="Say more on stderr.")
