"""Sparsities and numbers of experts by block, from what units of work measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparse_expansion.algorithms.allocation import shares_by_gap
from sparse_expansion.config import CalibrationConfig, RunConfig
from sparse_expansion.execution.base import Executor, Observer
from sparse_expansion.planning.allocation import window_counts
from sparse_expansion.planning.evaluation import block_gap_units
from sparse_expansion.planning.shapes import ModelShape
from sparse_expansion.planning.studies import cluster_units
from sparse_expansion.run_files import ALLOCATION_FILE, HIDDEN, clusters_file
from sparse_expansion.run_folder import read_shares, read_windows, write_windows
from sparse_expansion.store import Store
from sparse_expansion.types import CompressionError


@dataclass
class Allocation:
    """Sparsities of all blocks with a given mean, and maybe numbers of experts."""

    layer_sparsity: list[float]
    """Share of zeros of every block."""
    gaps: list[float]
    """Rise of log-perplexity over the dense model's with one block alone pruned, for every
    block."""
    num_eval_tokens: int
    """Tokens on which the gaps were measured."""
    errors: list[dict[int, float]] = field(default_factory=list)
    """Lost energy of the linears' outputs by number of experts, for every block: as a share of
    what one expert loses, on average over the linears."""
    layer_clusters: list[int] = field(default_factory=list)
    """Number of experts of every block; empty where it was not asked for."""

    def rows(self) -> list[dict[str, Any]]:
        """A row per block, for tables and files."""
        found: list[dict[str, Any]] = [
            {"layer": layer, "gap": gap, "sparsity": share}
            for layer, (gap, share) in enumerate(zip(self.gaps, self.layer_sparsity, strict=True))
        ]
        for row, errors, count in zip(found, self.errors, self.layer_clusters, strict=False):
            row |= {f"error_{tried}": error for tried, error in errors.items()}
            row["num_clusters"] = count
        return found


def split_windows(
    store: Store, calibration: CalibrationConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first of a run's calibration windows ``[N, L]``: to prune on, and others to score.

    A single window has to serve for both.
    """
    pruned, scored = window_counts(calibration.dataset_size, calibration.seqlen)
    parts: list[torch.Tensor] = []
    while sum(len(part) for part in parts) < pruned + scored:
        parts.append(read_windows(store, len(parts)))
    windows = torch.cat(parts)
    return windows[:pruned], windows[pruned : pruned + scored] if scored else windows[:1]


def measure(
    config: RunConfig,
    shape: ModelShape,
    pruned: torch.Tensor,
    scored: torch.Tensor,
    *,
    executor: Executor,
    observer: Observer,
) -> Allocation:
    """Prune every block by itself, score the model, and give sensitive blocks fewer zeros.

    Blocks are pruned by one sweep without clusters, to the sparsity that all have on average.

    Args:
        config: of the run.
        shape: of the dense model.
        pruned: ``[N, L]`` windows to prune on.
        scored: ``[M, L]`` windows of the same text, to measure on.
        executor: does the units, one per worker.
        observer: is told of every finished unit.

    Raises:
        CompressionError: a loss is not finite.
    """
    units = block_gap_units(
        config,
        shape,
        pruned.tolist(),
        scored.tolist(),
        num_ranges=executor.num_workers,
    )
    reports = executor.run(units, config, observer)
    found = [reports[unit.key].stats for unit in units]
    tokens = int(found[0]["num_tokens"])
    losses = [loss for part in found for loss in (part["dense"], *part["pruned"])]
    if not all(map(math.isfinite, losses)):
        raise CompressionError(
            "the loss of the dense model, or of it with one block pruned, is not finite (NaN or "
            "infinity): its weights are damaged, or overflow in its dtype"
        )
    gaps = [(loss - part["dense"]) / tokens for part in found for loss in part["pruned"]]
    return Allocation(shares_by_gap(gaps, config.compression.sparsity.fraction), gaps, tokens)


def measure_clusters(
    config: RunConfig,
    shape: ModelShape,
    linears: dict[str, str],
    windows: torch.Tensor,
    num_calibration: int,
    *,
    clusters: Sequence[int],
    store: Store,
    executor: Executor,
    observer: Observer,
) -> list[dict[int, float]]:
    """Errors of numbers of experts, as shares of the error that one expert makes.

    Args:
        config: with all windows as its calibration (``dense`` inputs, one shard).
        shape: of the dense model.
        linears: names of a block's linears, with the linear group of each.
        windows: ``[N, L]``, those to calibrate on first; errors are of the others.
        num_calibration: number of windows to calibrate on.
        clusters: numbers of experts to try.
        store: for hidden states and results; shared by all workers.
        executor: does the units.
        observer: is told of every finished unit.

    Returns:
        Error by number of experts, for every block, on average over its linears.
    """
    write_windows(store, windows, config.calibration.num_shards)
    layers = range(shape.num_layers)
    units = cluster_units(
        config,
        shape,
        layers=layers,
        linears=linears,
        clusters=sorted({1, *clusters}),
        calibration_tokens=num_calibration * windows.shape[1],
        clusterings=["kmeans"],
    )
    executor.run(units, config, observer)
    store.delete_folder(HIDDEN.rstrip("/"))

    def error(layer: int, linear: str, count: int) -> float:
        tensors = store.read_tensors(clusters_file(layer, linear, count))
        return float(tensors["kmeans.relative_error"])

    def relative_errors(layer: int) -> dict[int, float]:
        # A linear that loses nothing with one expert has nothing to gain.
        alone = {linear: error(layer, linear, 1) or 1.0 for linear in linears}
        return {
            count: sum(error(layer, linear, count) / alone[linear] for linear in linears)
            / len(linears)
            for count in clusters
        }

    return [relative_errors(layer) for layer in layers]


def shares_of(
    store: Store,
    config: RunConfig,
    shape: ModelShape,
    *,
    executor: Executor,
    observer: Observer,
) -> tuple[float, ...]:
    """Sparsities of a run's blocks: measured once, then read from its folder."""
    if not store.exists(ALLOCATION_FILE):
        pruned, scored = split_windows(store, config.calibration)
        found = measure(config, shape, pruned, scored, executor=executor, observer=observer)
        store.write_sealed(
            ALLOCATION_FILE, {"layer_sparsity": found.layer_sparsity, "rows": found.rows()}
        )
    return tuple(read_shares(store)["layer_sparsity"])
