"""Perplexity of a dense, an expanded or a partly pruned model, as units of work."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass

import torch

from sparse_expansion.config import RunConfig
from sparse_expansion.execution.base import Executor, Observer
from sparse_expansion.jobs.measurements import Measurements
from sparse_expansion.model.streaming import ModelShell, windows_together
from sparse_expansion.planning.evaluation import evaluation_units
from sparse_expansion.planning.shapes import model_shape
from sparse_expansion.types import CompressionError, NllSum

SHARD_TOKENS = 16_384
"""Tokens of a worker's shard at least, where it gets several: each reads the whole model."""
SHARDS_OF_WORKER = 4
"""Shards of a worker at most."""


@dataclass(frozen=True)
class Scores:
    """How well a model foretells the tokens of windows."""

    nll: NllSum
    """The sum over all windows."""
    per_window: list[NllSum]
    """Each window's."""
    tokens_by_expert: dict[str, list[int]]
    """Tokens that every expert of a group was given, by block and first linear of the group."""


def evaluate(
    model: str,
    windows: torch.Tensor,
    config: RunConfig,
    shell: ModelShell,
    executor: Executor,
    observer: Observer,
    measured: Measurements,
    *,
    num_shards: int | None = None,
    num_ranges: int = 1,
    model_bytes: float = 0.0,
    pruned: str | None = None,
) -> Scores:
    """Perplexity of ``dense`` (the source) or ``expanded`` (the store's folder).

    Args:
        model: which of the two.
        windows: ``[N, L]`` token ids.
        config: the settings, of which the dtype to compute in counts.
        shell: the shell of either model, for its shape.
        executor: does the units.
        observer: is told of every finished unit.
        measured: is added to.
        num_shards: shards of the windows; None for as many as workers, and on CPUs for more, so
            that losses come in on the way.
        num_ranges: ranges of blocks that the model is cut into.
        model_bytes: bytes of the model's weight files, for a profile.
        pruned: name of the pruned neurons to put in place of the dense ones.

    Raises:
        CompressionError: a window's loss is not finite.
    """
    start = time.perf_counter()
    shape = model_shape(shell)
    seqlen = windows.shape[1]
    head_flops = 2.0 * shape.hidden_size * int(shell.config.vocab_size)
    units = evaluation_units(
        model,
        windows.tolist(),
        num_layers=shape.num_layers,
        num_shards=num_shards or _num_shards(windows, executor),
        # The same windows pass together in one shard as in several: with the same bits.
        together=1 if num_shards or executor.num_workers > 1 else windows_together(seqlen),
        num_ranges=num_ranges,
        flops_per_token=shape.all_block_flops(seqlen) + head_flops,
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
    tokens: dict[str, Counter[int]] = {}
    for unit in units:
        for name, counts in reports[unit.key].stats.get("tokens_by_expert", {}).items():
            tokens.setdefault(name, Counter()).update(dict(enumerate(counts)))
    return Scores(
        nll=sum(per_window, NllSum(0.0, 0)),
        per_window=per_window,
        tokens_by_expert={
            name: [counts[expert] for expert in sorted(counts)] for name, counts in tokens.items()
        },
    )


def _num_shards(windows: torch.Tensor, executor: Executor) -> int:
    """Shards of the windows ``[N, L]``: as many for every worker.

    A shard's losses are known when it has passed through all blocks. On a GPU reading the model
    takes as long as a shard does, so there every worker reads it once.
    """
    if executor.uses_gpus:
        return executor.num_workers
    each = windows.numel() // (executor.num_workers * SHARD_TOKENS)
    return executor.num_workers * max(1, min(SHARDS_OF_WORKER, each))
