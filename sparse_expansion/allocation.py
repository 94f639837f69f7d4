"""Which block gets how many zeros: measured block by block, shared out under a fixed total."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sparse_expansion.config import CalibrationConfig, RunConfig
from sparse_expansion.execution.base import Executor, Observer
from sparse_expansion.plan import ModelShape, block_gap_units, cluster_units
from sparse_expansion.run_files import ALLOCATION_FILE, clusters_file
from sparse_expansion.store import Store, read_windows, write_windows
from sparse_expansion.units import Unit

STEEPNESS = 7.0
"""Growth of a block's gap with its sparsity: ``exp(7 * 0.1)`` is twice the gap for a tenth more.
SmolLM2-135M's gap with one cluster grows fourfold from 50 to 70 %."""
LARGEST_CHANGE = 0.2
LARGEST_SHARE = 0.95
PRUNED_TOKENS = 8192
SCORED_TOKENS = 4096


@dataclass
class Allocation:
    """Sparsities of all blocks with a given mean, and maybe numbers of experts."""

    layer_sparsity: list[float]
    gaps: list[float]
    """By block: log-perplexity over the dense model's with this block alone pruned."""
    num_eval_tokens: int
    errors: list[dict[int, float]] = field(default_factory=list)
    """By block and number of experts: lost energy of the linears' outputs, as a share of what one
    expert loses, on average over the linears."""
    layer_clusters: list[int] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """By block."""
        found: list[dict[str, Any]] = [
            {"layer": layer, "gap": gap, "sparsity": share}
            for layer, (gap, share) in enumerate(zip(self.gaps, self.layer_sparsity, strict=True))
        ]
        for row, errors, count in zip(found, self.errors, self.layer_clusters, strict=False):
            row |= {f"error_{tried}": error for tried, error in errors.items()}
            row["num_clusters"] = count
        return found


def window_counts(count: int, seqlen: int) -> tuple[int, int]:
    """Of so many windows: how many to prune on, and how many others to score, maybe none."""
    pruned = min(math.ceil(PRUNED_TOKENS / seqlen), max(1, 2 * count // 3))
    return pruned, min(math.ceil(SCORED_TOKENS / seqlen), count - pruned)


def split_windows(
    store: Store, calibration: CalibrationConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a run's calibration windows ``[N, L]``: those to prune on, and others to score.

    A single window has to serve for both.
    """
    pruned, scored = window_counts(calibration.dataset_size, calibration.seqlen)
    parts: list[torch.Tensor] = []
    while sum(len(part) for part in parts) < pruned + scored:
        parts.append(read_windows(store, len(parts)))
    windows = torch.cat(parts)
    return windows[:pruned], windows[pruned : pruned + scored] if scored else windows[:1]


def gap_units_of(config: RunConfig, shape: ModelShape, num_workers: int) -> list[Unit]:
    """The units that ``measure`` would run, for a plan: their windows are empty."""
    pruned, scored = window_counts(config.calibration.dataset_size, config.calibration.seqlen)
    windows: list[list[int]] = [[]]
    return block_gap_units(
        config, shape, windows * pruned, windows * max(1, scored), num_ranges=num_workers
    )


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
    """What numbers of experts leave of the error that one expert makes, in every block.

    Args:
        config: with all windows as its calibration (``dense`` inputs, one shard).
        shape: of the dense model.
        linears: of a block, with the group of each.
        windows: ``[N, L]``, those to calibrate on first; errors are of the others.
        num_calibration: how many these are.
        clusters: numbers of experts.
        store: for hidden states and results; shared by all workers.
        executor: does the units.
        observer: is told of every finished unit.
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
    store.delete_folder("run/hidden")

    def error(layer: int, linear: str, count: int) -> float:
        tensors = store.read_tensors(clusters_file(layer, linear, count))
        return float(tensors["kmeans.relative_error"])

    def left(layer: int) -> dict[int, float]:
        # A linear that loses nothing with one expert has nothing to gain.
        alone = {linear: error(layer, linear, 1) or 1.0 for linear in linears}
        return {
            count: sum(error(layer, linear, count) / alone[linear] for linear in linears)
            / len(linears)
            for count in clusters
        }

    return [left(layer) for layer in layers]


def clusters_by_error(
    gaps: Sequence[float], errors: Sequence[dict[int, float]], mean: int
) -> list[int]:
    """Numbers of experts by block, with this mean at most, for which the summed gap is least.

    A block's gap is taken to be in proportion to the error of its linears' outputs. Every sum of
    numbers is tried once (dynamic programming over blocks).

    Args:
        gaps: by block, with one expert.
        errors: by block and number of experts, as shares of one expert's.
        mean: experts of a block on average.

    Raises:
        ValueError: every number that was tried is above the mean.
    """
    tried = sorted(errors[0])
    if tried[0] > mean:
        raise ValueError(
            f"--num_clusters {tried[0]} is the least to try, above --mean-clusters {mean}: try "
            "smaller ones too"
        )
    floor = max(max(gaps) / 1000, 1e-9)
    budget = mean * len(gaps)
    # best[b]: the least summed gap of the blocks so far with b experts at most, and the choice.
    best = np.zeros(budget + 1)
    choices = []
    for gap, error in zip(gaps, errors, strict=True):
        options = np.full((len(tried), budget + 1), np.inf)
        for number, count in enumerate(tried):
            if count <= budget:
                rest = best[: budget + 1 - count]
                options[number, count:] = rest + max(gap, floor) * error[count]
        choices.append(options.argmin(axis=0))
        best = options.min(axis=0)
    found = []
    for choice in reversed(choices):
        found.append(tried[int(choice[budget])])
        budget -= found[-1]
    return found[::-1]


def shares_of(
    store: Store,
    config: RunConfig,
    shape: ModelShape,
    *,
    executor: Executor,
    observer: Observer,
) -> tuple[float, ...]:
    """A run's sparsities by block: measured once, then read from its folder."""
    if not store.exists(ALLOCATION_FILE):
        pruned, scored = split_windows(store, config.calibration)
        found = measure(config, shape, pruned, scored, executor=executor, observer=observer)
        store.write_json(
            ALLOCATION_FILE, {"layer_sparsity": found.layer_sparsity, "rows": found.rows()}
        )
    return tuple(store.read_json(ALLOCATION_FILE)["layer_sparsity"])


def shares_by_gap(gaps: Sequence[float], sparsity: float) -> list[float]:
    """Sparsities by block, of this mean, for which the sum of the blocks' gaps is least.

    A block's gap is taken to grow as ``g_l exp(STEEPNESS (s_l - s))``: the sum is least where all
    are equal, ``s_l = s - log(g_l) / STEEPNESS + constant``. No share moves by more than
    ``LARGEST_CHANGE``, or above ``LARGEST_SHARE``; gaps below a thousandth of the largest are noise
    and count as that.
    """
    floor = max(max(gaps) / 1000, 1e-9)
    wanted = np.array([-math.log(max(gap, floor)) / STEEPNESS for gap in gaps])
    low = max(0.0, sparsity - LARGEST_CHANGE)
    high = max(sparsity, min(sparsity + LARGEST_CHANGE, LARGEST_SHARE))
    # The mean of the bounded shares grows with the constant: bisection finds it.
    below, above = low - wanted.max(), high - wanted.min()
    for _ in range(60):
        constant = (below + above) / 2
        if np.clip(wanted + constant, low, high).mean() < sparsity:
            below = constant
        else:
            above = constant
    return [round(float(share), 6) for share in np.clip(wanted + above, low, high)]
