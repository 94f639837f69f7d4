"""Settings made from parsed flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from sparse_expansion.config.calibration import ALL_WINDOWS, CalibrationConfig
from sparse_expansion.config.cluster import Cluster
from sparse_expansion.config.compression import QUANTIZED_BITS, UNIFORM, CompressionConfig
from sparse_expansion.config.execution import ExecutionOptions
from sparse_expansion.config.fields import settings_of
from sparse_expansion.config.routing import RoutingConfig
from sparse_expansion.config.run import RefinementConfig, RunConfig

STARVED = ("min_tokens_per_expert", "shrink_hessians")
"""Settings of experts that have few tokens of their own."""


def field_values(section: type, args: argparse.Namespace) -> dict[str, Any]:
    """Values of the fields that the command has flags of, by name.

    Raises:
        ValueError: a text does not parse.
    """
    found = {}
    for name, spec in settings_of(section).items():
        if spec.flag and name in args:
            value = getattr(args, name)
            is_text = spec.parse is not None and isinstance(value, str)
            found[name] = spec.parse(value) if spec.parse and is_text else value
    return found


def run_config(args: argparse.Namespace, seqlen: int) -> RunConfig:
    """Settings of a run.

    Args:
        args: of `run`, `expand` or `plan`.
        seqlen: tokens in a window, where the default of the flag depends on the model.

    Raises:
        ValueError: a value is out of bounds, or flags contradict each other.
    """
    compression = field_values(CompressionConfig, args)
    if args.bits is not None and not args.quantize:
        raise ValueError(f"--bits {args.bits} needs --quantize: add it, or drop --bits")
    for name in ("group_size", "symmetric"):
        if compression[name] and not args.quantize:
            flag = settings_of(CompressionConfig)[name].flag
            raise ValueError(f"{flag} needs --quantize: add it, or drop {flag}")
    if args.quantize and args.bits is None:
        compression["bits"] = QUANTIZED_BITS
    if compression["sparsity"].group is not None and isinstance(compression["layer_sparsity"], str):
        # N:M leaves no choice, so that nothing is measured.
        compression["layer_sparsity"] = UNIFORM
    calibration = field_values(CalibrationConfig, args)
    calibration |= {"seqlen": seqlen, "whole_text": calibration["dataset_size"] == ALL_WINDOWS}
    if calibration["whole_text"]:
        # Known once the text is read.
        calibration["dataset_size"] = 1
    return RunConfig(
        compression=CompressionConfig(**compression),
        routing=_routing(args),
        calibration=CalibrationConfig(**calibration),
        refinement=RefinementConfig(**field_values(RefinementConfig, args)),
        **field_values(RunConfig, args),
    )


def _routing(args: argparse.Namespace, **changes: Any) -> RoutingConfig:
    values = field_values(RoutingConfig, args) | changes
    values["fit_tokens"] = max(values["fit_tokens"], 1)
    if args.no_pca:
        values["pca_reduction_factor"] = None
    return RoutingConfig(**values)


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
    compression = field_values(CompressionConfig, args)
    routing = RoutingConfig()
    counts = cluster_counts(args)
    if counts:
        routing = _routing(args, num_clusters=max(counts))
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
        **field_values(RunConfig, args),
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
    size = field_values(CalibrationConfig, args)["dataset_size"]
    if size == ALL_WINDOWS:
        raise ValueError(f"--dataset-size {ALL_WINDOWS}: give the number of windows")
    return int(size)


def execution_options(args: argparse.Namespace) -> ExecutionOptions:
    """Where and with what the units of a command run.

    Raises:
        ValueError: a value is out of bounds, or flags contradict each other.
    """
    return ExecutionOptions(**field_values(ExecutionOptions, args))


def planned_cluster(args: argparse.Namespace) -> Cluster:
    """The machines that `plan` is asked about.

    Raises:
        ValueError: a value is out of bounds.
    """
    return Cluster(**field_values(Cluster, args))


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
