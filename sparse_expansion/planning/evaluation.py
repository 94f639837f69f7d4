"""Units that score windows: of a whole model, or with one block pruned at a time."""

from __future__ import annotations

from typing import Any

from sparse_expansion.config import RunConfig
from sparse_expansion.planning.costs import block_gap_flops
from sparse_expansion.planning.partition import even_parts
from sparse_expansion.planning.shapes import ModelShape
from sparse_expansion.run_files import block_gaps_key, evaluate_affinity, evaluate_key
from sparse_expansion.units import Unit
from sparse_expansion.work.stages import score


def evaluation_units(
    model: str,
    windows: list[list[int]],
    *,
    num_layers: int,
    num_shards: int = 1,
    together: int = 1,
    num_ranges: int = 1,
    flops_per_token: float = 1.0,
    model_bytes: float = 0.0,
    pruned: str | None = None,
) -> list[Unit]:
    """Units that score windows: shards of windows, each through ranges of blocks in turn.

    One range is data-parallel evaluation; several are a pipeline for a model that no worker
    should read whole.

    Args:
        model: ``dense`` or ``expanded``.
        windows: token ids of N windows.
        num_layers: blocks of the model.
        num_shards: shards of the windows, N at most.
        together: windows that are not parted: those that pass through a block together.
        num_ranges: ranges of blocks, ``num_layers`` at most.
        flops_per_token: operations that one token takes through the whole model.
        model_bytes: bytes of the model's weight files.
        pruned: name of the pruned neurons to put in place of the dense ones.
    """
    name = model if pruned is None else f"{model}-{pruned}"
    blocks = even_parts(num_layers, num_ranges)
    units = []
    for shard, (start, end) in enumerate(even_parts(-(-len(windows) // together), num_shards)):
        part = windows[together * start : together * end]
        for position, (first, stop) in enumerate(blocks):
            params: dict[str, Any] = {"model": model, "tokens": part, "layers": (first, stop - 1)}
            if pruned is not None:
                params["pruned"] = pruned
            hidden = ((evaluate_key(name, shard, position - 1), "hidden"),)
            units.append(
                score.evaluate.unit(
                    key=evaluate_key(name, shard, position),
                    params=params,
                    inputs=() if position == 0 else hidden,
                    outputs=() if position + 1 == len(blocks) else ("hidden",),
                    affinity=evaluate_affinity(name, position) if len(blocks) > 1 else None,
                    layer=shard,
                    rank=position,
                    cost=flops_per_token * sum(map(len, part)) / len(blocks),
                    tokens=sum(map(len, part)) / len(blocks),
                    traffic_bytes=int(model_bytes / len(blocks)),
                )
            )
    return units


def block_gap_units(
    config: RunConfig,
    shape: ModelShape,
    pruned: list[list[int]],
    scored: list[list[int]],
    *,
    num_ranges: int,
) -> list[Unit]:
    """Units that score windows with one block pruned at a time, for a range of blocks each.

    Args:
        config: of the windows and of pruning.
        shape: of the dense model.
        pruned: token ids of the windows to prune on.
        scored: token ids of the windows to score.
        num_ranges: ranges of blocks, as many as there are blocks at most.
    """
    units = []
    for position, (first, stop) in enumerate(even_parts(shape.num_layers, num_ranges)):
        layers = (first, stop - 1)
        units.append(
            score.block_gaps.unit(
                key=block_gaps_key(layers),
                params={"pruned": pruned, "scored": scored, "layers": layers},
                rank=position,
                cost=block_gap_flops(config, shape, layers, len(pruned), len(scored)),
            )
        )
    return units
