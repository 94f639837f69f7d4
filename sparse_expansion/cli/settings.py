"""Settings made from parsed flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from sparse_expansion.config import values
from sparse_expansion.config.calibration import ALL_WINDOWS, CalibrationConfig
from sparse_expansion.config.cluster import Cluster
from sparse_expansion.config.compression import CompressionConfig
from sparse_expansion.config.execution import ExecutionOptions
from sparse_expansion.config.routing import RoutingConfig
from sparse_expansion.config.run import RunConfig

STARVED = ("min_tokens_per_expert", "shrink_hessians")
"""Settings of experts that have few tokens of their own."""


def run_config(args: argparse.Namespace, seqlen: int) -> RunConfig:
    """Settings of a run.

    Args:
        args: of `run`, `expand` or `plan`.
        seqlen: tokens in a window, where the default of the flag depends on the model.

    Raises:
        ValueError: a value is out of bounds, or flags contradict each other.
    """
    return values.run_config(vars(args), seqlen)


def experiment_config(args: argparse.Namespace, num_windows: int, seqlen: int) -> RunConfig:
    """Settings of an experiment: all of its windows are one shard of dense inputs.

    Args:
        args: of `sweep-clusters`, `prune-neurons` or `allocate`.
        num_windows: of the calibration and, where they pass through the dense model too, of the
            held-out text.
        seqlen: tokens in a window.

    Raises:
        ValueError: a value is out of bounds.
    """
    compression = values.field_values(CompressionConfig, vars(args))
    routing = RoutingConfig()
    counts = cluster_counts(args)
    if counts:
        routing = values.routing_config(vars(args), num_clusters=max(counts))
    else:
        # Without clusters there is no group to be drawn towards.
        for name in STARVED:
            compression.pop(name, None)
    return RunConfig(
        compression=CompressionConfig(**compression),
        routing=routing,
        calibration=CalibrationConfig(
            dataset=args.dataset,
            dataset_size=num_windows,
            seqlen=seqlen,
            seed=args.seed,
            calibration_inputs="dense",
            data_shards=1,
        ),
        **values.field_values(RunConfig, vars(args)),
    )


def cluster_counts(args: argparse.Namespace) -> list[int]:
    """The numbers of clusters that an experiment tries; empty where it tries none.

    Raises:
        ValueError: it is not a list of numbers, or one is below 1.
    """
    asked = getattr(args, "cluster_counts", None)
    counts = [] if asked is None else numbers(asked, "--num_clusters", int)
    if counts and min(counts) < 1:
        raise ValueError(f"--num_clusters {min(counts)} must be at least 1")
    return counts


def calibration_size(args: argparse.Namespace) -> int:
    """Calibration windows of an experiment.

    Raises:
        ValueError: it is not a number.
    """
    size = values.field_values(CalibrationConfig, vars(args))["dataset_size"]
    if size == ALL_WINDOWS:
        raise ValueError(f"--dataset-size {ALL_WINDOWS}: give the number of windows")
    return int(size)


def execution_options(args: argparse.Namespace) -> ExecutionOptions:
    """Where and with what the units of a command run.

    Raises:
        ValueError: a value is out of bounds, or flags contradict each other.
    """
    return ExecutionOptions(**values.field_values(ExecutionOptions, vars(args)))


def planned_cluster(args: argparse.Namespace) -> Cluster:
    """The machines that `plan` is asked about.

    Raises:
        ValueError: a value is out of bounds.
    """
    return Cluster(**values.field_values(Cluster, vars(args)))


def numbers(text: str, flag: str, kind: Callable[[str], Any]) -> list[Any]:
    """A comma-separated list of numbers, without repetitions.

    Raises:
        ValueError: it is empty, or one of them is no number.
    """
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} {text!r} is not a list of numbers such as 1,2,4") from None
    return list(dict.fromkeys(found))
