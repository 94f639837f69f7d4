"""What the experiments (`sweep-clusters`, `prune-neurons`, `allocate`) have in common."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparse_expansion.api.models import Origin
from sparse_expansion.api.opening import check_eval_windows, window_length
from sparse_expansion.cli.flags import add_settings
from sparse_expansion.cli.opening import begin_work, check_table, origin, text_request
from sparse_expansion.cli.settings import (
    STARVED,
    calibration_size,
    execution_options,
    experiment_config,
)
from sparse_expansion.cli.shared_flags import (
    add_eval_windows,
    add_execution,
    add_model,
    add_no_pca,
    add_plots,
    add_table,
)
from sparse_expansion.config.calibration import CalibrationConfig
from sparse_expansion.config.compression import CompressionConfig
from sparse_expansion.config.execution import ExecutionOptions
from sparse_expansion.config.routing import RoutingConfig
from sparse_expansion.config.run import RunConfig
from sparse_expansion.config.text import TextOptions
from sparse_expansion.data.names import check_text

if TYPE_CHECKING:
    import torch

    from sparse_expansion.model.streaming import ModelShell

CALIBRATION_WINDOWS = 32
HELD_OUT_WINDOWS = 16
_PRUNING = ("sparsity", "pruner", "solver_iterations", "block_size", "damping_fraction")
_CLUSTERING = ("pca_reduction_factor", "balance", "kmeans", "restarts", "fit_tokens")
_PRECISION = ("dtype", "tf32")


def add_experiment(
    parser: argparse.ArgumentParser, *, clusters: bool
) -> dict[str, argparse._ArgumentGroup]:
    """The flags of all experiments.

    Args:
        parser: of the command.
        clusters: whether the experiment makes experts.

    Returns:
        The groups of flags in the help by heading.
    """
    add_model(parser)
    groups = add_settings(
        parser,
        CompressionConfig,
        RoutingConfig,
        CalibrationConfig,
        RunConfig,
        TextOptions,
        names=(
            *_PRUNING,
            *(STARVED + _CLUSTERING if clusters else ()),
            *_PRECISION,
            "dataset",
            "text_column",
            "seqlen",
            "dataset_size",
            "seed",
        ),
        defaults={"dataset_size": CALIBRATION_WINDOWS, "seqlen": None},
    )
    if clusters:
        add_no_pca(groups["experts"])
    add_eval_windows(parser, HELD_OUT_WINDOWS)
    add_table(parser)
    add_plots(parser)
    add_execution(parser)
    return groups


def add_cluster_counts(
    group: argparse._ArgumentGroup, help: str, *, default: str | None = None
) -> None:
    """The flag of ``settings.cluster_counts``."""
    group.add_argument(
        "-nc",
        "--num-clusters",
        dest="cluster_counts",
        default=default,
        metavar="K,K,...",
        help=help,
    )


def check_experiment(args: argparse.Namespace) -> tuple[ExecutionOptions, CompressionConfig]:
    """Check the flags of an experiment, before anything slow is imported or read.

    Raises:
        ValueError: a value is out of bounds.
    """
    options = execution_options(args)
    check_eval_windows(args.eval_windows)
    check_table(args.table)
    calibration_size(args)
    config = experiment_config(args, 1, args.seqlen or CalibrationConfig.seqlen)
    return options, config.compression


@dataclass(frozen=True)
class DenseModel:
    """The model that an experiment is made on."""

    origin: Origin
    shell: ModelShell
    seqlen: int
    """Tokens in a window."""


def open_dense_model(args: argparse.Namespace) -> DenseModel:
    """The model that was asked for.

    Raises:
        ValueError: it is an expanded one, or the dataset or the model is unknown.
    """
    check_text(args.dataset, args.text_column)
    model = origin(args, args.model, args.model_size)
    begin_work(args)
    args.progress.doing("reading the model")
    shell = model.shell(args.dtype)
    if shell.expansion is not None:
        raise ValueError(f"{shell.folder} is an expanded model: experiments need the dense one")
    return DenseModel(model, shell, window_length(args.seqlen, shell.config))


def experiment_windows(
    args: argparse.Namespace, dense: DenseModel, *, hold_out_of_calibration: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to calibrate on ``[N, L]``, and to measure on ``[M, L]``.

    Args:
        args: of the command.
        dense: the model, whose tokenizer is used.
        hold_out_of_calibration: whether windows to measure on are of the calibration text too, as
            for a choice, which must not know the evaluation text.
    """
    from sparse_expansion.data.tokenization import load_tokenizer
    from sparse_expansion.jobs.prepare import check_vocabulary, evaluation_tokens

    args.progress.doing("reading the text")
    texts = text_request(args).load(load_tokenizer(dense.shell.folder))
    args.progress.doing("tokenizing the text")
    vocabulary = int(dense.shell.config.vocab_size)
    size = calibration_size(args)
    windows = texts.calibration(
        num_windows=size + hold_out_of_calibration * args.eval_windows,
        seqlen=dense.seqlen,
        seed=args.seed,
    )
    check_vocabulary(windows, vocabulary)
    if hold_out_of_calibration:
        calibration, held_out = windows.split((size, args.eval_windows))
        return calibration, held_out
    held_out = evaluation_tokens(
        texts, seqlen=dense.seqlen, max_windows=args.eval_windows, vocabulary=vocabulary
    )
    return windows, held_out
