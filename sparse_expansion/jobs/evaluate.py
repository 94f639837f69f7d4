"""Perplexity of a dense, an expanded or a partly pruned model, as units of work."""

from __future__ import annotations

import math
import time

import torch

from sparse_expansion.config import RunConfig
from sparse_expansion.execution.base import Executor, Observer
from sparse_expansion.jobs.measurements import Measurements
from sparse_expansion.model.streaming import ModelShell
from sparse_expansion.planning.evaluation import evaluation_units
from sparse_expansion.planning.shapes import model_shape
from sparse_expansion.types import CompressionError, NllSum


def evaluate(
    model: str,
    windows: torch.Tensor,
    config: RunConfig,
    shell: ModelShell,
    executor: Executor,
    observer: Observer,
    measured: Measurements,
    *,
    num_shards: int = 1,
    num_ranges: int = 1,
    model_bytes: float = 0.0,
    pruned: str | None = None,
) -> tuple[NllSum, list[NllSum]]:
    """Perplexity of ``dense`` (the source) or ``expanded`` (the store's folder).

    Args:
        model: which of the two.
        windows: ``[N, L]`` token ids.
        config: the settings, of which the dtype to compute in counts.
        shell: the shell of either model, for its shape.
        executor: does the units.
        observer: is told of every finished unit.
        measured: is added to.
        num_shards: shards of the windows.
        num_ranges: ranges of blocks that the model is cut into.
        model_bytes: bytes of the model's weight files, for a profile.
        pruned: name of the pruned neurons to put in place of the dense ones.

    Returns:
        The sum over all windows, and each window's.

    Raises:
        CompressionError: a window's loss is not finite.
    """
    start = time.perf_counter()
    shape = model_shape(shell)
    head_flops = 2.0 * shape.hidden_size * int(shell.config.vocab_size)
    units = evaluation_units(
        model,
        windows.tolist(),
        num_layers=shape.num_layers,
        num_shards=num_shards,
        num_ranges=num_ranges,
        flops_per_token=shape.all_block_flops(windows.shape[1]) + head_flops,
        model_bytes=model_bytes,
        pruned=pruned,
    )
    reports = executor.run(units, config, observer)
    measured.add(reports.values(), {unit.key: unit for unit in units})
    measured.seconds[f"evaluate_{model}"] += time.perf_counter() - start
    per_window = [
        NllSum(total, count)
        for unit in units
        for total, count in reports[unit.key].stats.get("nll", [])
    ]
    broken = sum(not math.isfinite(part.total) for part in per_window)
    if broken:
        raise CompressionError(
            f"the {model} model's loss is not finite (NaN or infinity) on {broken} of "
            f"{len(per_window)} windows: its weights are damaged, or overflow in "
            f"{str(shell.dtype).removeprefix('torch.')}"
        )
    return sum(per_window, NllSum(0.0, 0)), per_window
