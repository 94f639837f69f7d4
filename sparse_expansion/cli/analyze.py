"""``analyze``: facts of every expert of a run, or of every neuron of a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_expansion.api.models import Origin
from sparse_expansion.api.opening import window_length
from sparse_expansion.cli.command import Command
from sparse_expansion.cli.flags import add_settings
from sparse_expansion.cli.opening import (
    begin_work,
    check_run,
    check_table,
    evaluation_text_windows,
    open_run,
    origin,
    present,
)
from sparse_expansion.cli.settings import execution_options
from sparse_expansion.cli.shared_flags import (
    add_downloads,
    add_execution,
    add_plots,
    add_run_folder,
    add_table,
)
from sparse_expansion.cli.workplace import passing_workplace
from sparse_expansion.config.calibration import CalibrationConfig
from sparse_expansion.config.execution import ExecutionOptions
from sparse_expansion.config.run import RunConfig
from sparse_expansion.config.text import TextOptions
from sparse_expansion.data.names import check_text

if TYPE_CHECKING:
    from sparse_expansion.model.streaming import ModelShell
    from sparse_expansion.studies.neuron_table import NeuronTable

_EXAMPLES = """\
  sparse-expansion analyze ./expanded
  sparse-expansion analyze ./expanded --table experts.parquet
  # every neuron: distance to a normal, mapping difficulty, error against one cluster's
  sparse-expansion analyze ./expanded --dataset ./wikitext2 --seqlen 512 --windows 16 \\
      --one-cluster ./sparse-gpt --table neurons.parquet
  sparse-expansion analyze ./SmolLM2-135M --dataset pydoc --seqlen 512 --windows 8 --plots plots
"""


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_run_folder(parser)
    add_table(parser)
    add_plots(parser)
    add_settings(
        parser,
        CalibrationConfig,
        TextOptions,
        names=("dataset", "text_column", "seqlen", "seed"),
        defaults={"dataset": None, "seqlen": None},
    )
    group = parser.add_argument_group("neurons")
    group.add_argument(
        "--windows", type=int, default=8, metavar="N", help="Windows of the text to run on."
    )
    group.add_argument(
        "--one-cluster", metavar="DIR", help="Plain sparse model of one cluster to compare with."
    )
    group.add_argument(
        "--dense",
        metavar="MODEL",
        help="The dense model; without it, the one that the run was made of.",
    )
    add_downloads(parser)
    add_settings(parser, RunConfig, names=("dtype",))
    add_execution(parser)


def run(args: argparse.Namespace) -> int:
    """Describe experts, or with a text, neurons."""
    options = execution_options(args)
    check_table(args.table)
    if args.dataset is not None:
        return _describe_neurons(args, options)
    if args.one_cluster is not None or args.dense is not None:
        raise ValueError("--one-cluster and --dense need --dataset: the text to run on")
    check_run(args.folder)
    args.progress.doing("reading the experts' facts")
    from sparse_expansion.report.experts import finished_experts, linear_facts
    from sparse_expansion.report.figures.run import expert_figures
    from sparse_expansion.report.parquet import columns_of
    from sparse_expansion.report.tables import expert_summary

    experts = finished_experts(open_run(args.folder))
    rows = [expert.to_dict() for expert in experts]
    present(
        args,
        rows,
        expert_summary(linear_facts(experts)),
        columns=lambda: columns_of(rows),
        figures=lambda: expert_figures(experts),
    )
    return 0


def _describe_neurons(args: argparse.Namespace, options: ExecutionOptions) -> int:
    if args.windows < 1:
        raise ValueError(f"--windows {args.windows} must be at least 1")
    check_text(args.dataset, args.text_column)
    check_run(args.one_cluster)
    from sparse_expansion.report.figures.studies import neuron_figures
    from sparse_expansion.report.study_tables import neurons_table

    model, shell, models = _open_models(args)
    table = _neuron_table(args, options, model, shell, models)
    summary, correlations = table.summary(), table.correlations()
    result = {"tokens": table.num_tokens, "linears": summary, "correlations": correlations}
    present(
        args,
        result,
        neurons_table(summary, correlations, table.num_tokens),
        columns=lambda: table.columns,
        figures=lambda: neuron_figures(table.columns),
    )
    return 0


def _open_models(args: argparse.Namespace) -> tuple[Origin, ModelShell, dict[str, Path]]:
    """The dense model, and the folders of those to compare it with, by role."""
    from sparse_expansion.model.streaming import ModelShell
    from sparse_expansion.run_folder import read_identity
    from sparse_expansion.studies.neuron_table import EXPANDED, ONE_CLUSTER

    model = origin(args, args.folder)
    begin_work(args)
    args.progress.doing("reading the models")
    shell = model.shell(args.dtype)
    models = {}
    if shell.expansion is not None:
        models[EXPANDED] = shell.folder
        dense = args.dense
        if dense is None:
            dense = read_identity(open_run(str(shell.folder)))["model"]
        model = origin(args, dense)
        shell = model.shell(args.dtype)
    if args.one_cluster is not None:
        other = open_run(args.one_cluster).local_path().resolve()
        if ModelShell(other).expansion is None:
            raise ValueError(f"{other} is not an expanded model (--one-cluster)")
        models[ONE_CLUSTER] = other
    return model, shell, models


def _neuron_table(
    args: argparse.Namespace,
    options: ExecutionOptions,
    model: Origin,
    shell: ModelShell,
    models: dict[str, Path],
) -> NeuronTable:
    from sparse_expansion.studies.neuron_table import describe_neurons

    seqlen = window_length(args.seqlen, shell.config)
    windows = evaluation_text_windows(args, shell, seqlen, args.windows)
    calibration = CalibrationConfig(
        dataset=args.dataset,
        dataset_size=len(windows),
        seqlen=seqlen,
        seed=args.seed,
        calibration_inputs="dense",
        data_shards=1,
    )
    config = RunConfig(calibration=calibration, dtype=args.dtype)
    with passing_workplace(args, options, model, shell.num_blocks) as place:
        return describe_neurons(
            shell, windows, models, config, place.store, place.executor, place.observer
        )


ANALYZE = Command(
    name="analyze",
    help="Per-expert facts of a run (tokens, error, damping), or with --dataset what every neuron "
    "of a dense or expanded model does on a text.",
    examples=_EXAMPLES,
    add_flags=_add_flags,
    run=run,
)
