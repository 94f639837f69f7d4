"""Forecast of a run from its settings alone: units, operations, memory, bytes, hours and cost.

The byte counts of the checkpoint are exact (they follow from exact weight counts). Memory is a sum
of the arrays that are alive at once, stage by stage; hours come from the real graph and dispatcher
on a simulated cluster.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparse_expansion.algorithms.packing.layout import PackedLayout, grid_bytes, router_bytes
from sparse_expansion.config import MEASURED, Cluster, RunConfig
from sparse_expansion.execution.dispatch import VALUE_SHARE
from sparse_expansion.execution.simulation import simulate
from sparse_expansion.model.block_linears import block_groups, linear_shape
from sparse_expansion.model.families import family_of
from sparse_expansion.model.fit import build_without_weights
from sparse_expansion.model.plain_blocks import plain_blocks
from sparse_expansion.planning.allocation import gap_units_of
from sparse_expansion.planning.durations import durations
from sparse_expansion.planning.expansion import expansion_units
from sparse_expansion.planning.memory import WorkerRoom, worker_memory
from sparse_expansion.planning.shapes import ModelShape, shape_of_blocks
from sparse_expansion.planning.stage_memory import ParameterCounts
from sparse_expansion.units import Unit
from sparse_expansion.work.spec import captured_bytes

OBJECT_STORE_SHARE = 0.3
"""Share of a machine's memory that Ray gives to its object store."""
LEAST_ACTIVATION_BYTES = 64 << 20
"""Smallest ``--activation-memory`` that a verdict recommends."""


@dataclass(frozen=True)
class _Model:
    """A dense model, and the stored bytes of its expansion."""

    shape: ModelShape
    parameters: ParameterCounts
    expert_bytes: int
    """Stored bytes of all experts."""
    router_bytes: int
    """Stored bytes of all routers and grids."""

    @property
    def trunk_bytes(self) -> int:
        """Stored bytes of what is neither expert nor router."""
        weights = self.parameters.total - self.shape.all_mlp_weights
        return weights * self.shape.item_bytes

    @property
    def checkpoint_bytes(self) -> int:
        """Stored bytes of the whole expanded model."""
        return self.trunk_bytes + self.expert_bytes + self.router_bytes


@dataclass(frozen=True)
class _Graph:
    """The units of a run."""

    measuring: list[Unit]
    """Units that measure blocks' gaps first; empty where sparsities are given."""
    expanding: list[Unit]

    @property
    def units(self) -> list[Unit]:
        """All units, in order."""
        return [*self.measuring, *self.expanding]


def forecast(
    config: RunConfig,
    model_config: Any,
    cluster: Cluster | None = None,
    *,
    activation_bytes: int = 2 << 30,
    device_bytes: int | None = None,
) -> dict[str, Any]:
    """Units, FLOPs by stage, bytes of the checkpoint and of memory, hours, cost, a verdict.

    Args:
        config: of the run.
        model_config: the dense model's transformers configuration.
        cluster: the machines; one worker without limits if None.
        activation_bytes: captured activations that a worker keeps in memory.
        device_bytes: what a worker keeps on its GPU; None for the default share.

    Raises:
        ValueError: the architecture is not supported.
    """
    cluster = cluster or Cluster()
    room = WorkerRoom(
        activation_bytes=activation_bytes,
        gpu_bytes=cluster.gpu_memory_bytes,
        device_bytes=device_bytes,
    )
    model = _describe(config, model_config)
    shape = model.shape
    measuring = []
    if config.compression.layer_sparsity == MEASURED:
        measuring = gap_units_of(config, shape, cluster.num_workers)
    graph = _Graph(measuring, expansion_units(config, shape))
    flops: Counter[str] = Counter()
    for unit in graph.units:
        flops[unit.stage] += int(unit.cost)
    blocks: dict[int, list[Unit]] = {layer: [] for layer in range(shape.num_layers)}
    for unit in graph.expanding:
        blocks.get(unit.layer, []).append(unit)
    largest = max(shape.kinds, key=lambda kind: kind.mlp_weights)
    result = {
        "model_type": model_config.model_type,
        "num_layers": shape.num_layers,
        "groups": [
            {"name": group.name, "width": group.width, "rows": group.rows}
            for group in largest.groups
        ],
        "parameters": model.parameters.total,
        "units": dict(Counter(unit.stage for unit in graph.units)),
        "calibration_tokens": config.calibration.num_tokens,
        "flops": dict(flops),
        "checkpoint_bytes": model.checkpoint_bytes,
        "dense_checkpoint_bytes": shape.item_bytes * model.parameters.total,
        "disk_bytes": _disk_bytes(config, model),
        "expert_bytes": model.expert_bytes,
        "router_bytes": model.router_bytes,
        "memory_bytes": _memory(config, model, cluster, room),
        "value_bytes_per_block": max(map(_value_bytes, blocks.values())),
        "captured_bytes_per_block": max(
            sum(unit.cache_bytes for unit in units) for units in blocks.values()
        ),
        "config": config.to_dict(),
    }
    result |= _time(config, graph, cluster, model, captured_bytes(activation_bytes))
    problems = [
        *_memory_problems(config, model, cluster, result["memory_bytes"], room),
        *_value_problems(cluster, result["value_bytes_per_block"]),
    ]
    result["verdict"] = {
        "fits": not problems,
        "text": "fits" if not problems else "does not fit: " + "; and ".join(problems),
    }
    return result


def _describe(config: RunConfig, model_config: Any) -> _Model:
    """The dense model on the meta device, and the stored bytes of its experts and routers."""
    family = family_of(model_config.model_type)
    model = build_without_weights(model_config)
    blocks = plain_blocks(model, family)
    config.check_layers(len(blocks))
    item = _item_bytes(config, model_config)
    shape = shape_of_blocks(blocks, family, model_config, item)
    expert_bytes = routing_bytes = 0
    for layer, block in enumerate(blocks):
        here = config.at(layer)
        for group in block_groups(block, family):
            for rows, width in (linear_shape(block, name) for name in group.linears):
                layout = PackedLayout.of(rows, width, here.compression)
                expert_bytes += here.routing.num_clusters * layout.num_bytes(item)
                routing_bytes += grid_bytes(rows, width, config.compression)
            routing_bytes += router_bytes(
                width, here.routing, here.compression, is_routed=group.is_routed
            )
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    return _Model(
        shape=shape,
        parameters=ParameterCounts(
            total=_count_parameters(model, model_config),
            block=max(sizes),
            all_blocks=sum(sizes),
        ),
        expert_bytes=expert_bytes,
        router_bytes=routing_bytes,
    )


def _item_bytes(config: RunConfig, model_config: Any) -> int:
    """Bytes of one stored value: of the run's dtype, else of the model's, else of float32."""
    dtype = config.dtype if config.dtype != "auto" else getattr(model_config, "dtype", None)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    return torch.empty(0, dtype=dtype).element_size()


def _count_parameters(model: Any, model_config: Any) -> int:
    """Parameters of a model on the meta device, as its checkpoint holds them."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings()
    if getattr(model_config, "tie_word_embeddings", False) and head is not None:
        # On the meta device the tie is not made, but a checkpoint holds the tensor once.
        if head.weight is not model.get_input_embeddings().weight:
            parameters -= head.weight.numel()
    return parameters


def _memory(config: RunConfig, model: _Model, cluster: Cluster, room: WorkerRoom) -> dict[str, int]:
    """Bytes of one of the cluster's workers."""
    return worker_memory(
        config,
        model.shape,
        model.parameters,
        num_workers=cluster.num_workers,
        room=room,
    )


def disk_bytes(config: RunConfig, model_config: Any) -> int:
    """Largest size of a run's folder, in bytes.

    Args:
        config: of the run.
        model_config: the dense model's transformers configuration.

    Raises:
        ValueError: the architecture is not supported.
    """
    return _disk_bytes(config, _describe(config, model_config))


def _disk_bytes(config: RunConfig, model: _Model) -> int:
    """Largest size of the run's folder: the checkpoint, and scratch files of two blocks.

    Those are the hidden states before a block, and the drafts of experts that are trained.
    """
    shape = model.shape
    scratch = config.calibration.num_tokens * shape.hidden_size * shape.item_bytes
    if config.refines:
        scratch += model.expert_bytes // shape.num_layers
    return model.checkpoint_bytes + 2 * scratch


def _value_bytes(units: Sequence[Unit]) -> int:
    """Bytes of values between units that one block needs at once, from that block's units."""
    return max(
        sum(unit.output_bytes for unit in units if unit.stage == stage)
        for stage in ("capture", "gather")
    )


def _object_store_bytes(cluster: Cluster) -> float | None:
    """Bytes of values between units that one worker's machine takes; None where nothing says."""
    if cluster.host_bytes is None or cluster.num_workers == 1:
        return None
    return OBJECT_STORE_SHARE * VALUE_SHARE * cluster.host_bytes


def _time(
    config: RunConfig, graph: _Graph, cluster: Cluster, model: _Model, kept_bytes: int
) -> dict[str, Any]:
    """Hours, utilisation and cost on the simulated cluster, and every stage's worker seconds.

    Args:
        config: of the run.
        graph: its units.
        cluster: the machines.
        model: the dense model.
        kept_bytes: captured activations that a worker keeps in memory and in scratch files.
    """
    block_bytes = model.parameters.block * model.shape.item_bytes
    seconds = durations(graph.expanding, config, model.shape, cluster, block_bytes)
    store_bytes = _object_store_bytes(cluster)
    found = simulate(
        graph.expanding,
        cluster.num_workers,
        seconds=seconds,
        move_seconds=lambda unit: unit.move_cost / cluster.product_rate,
        captures_first=not config.calibration.follows_compression,
        captured_bytes=kept_bytes,
        value_budget=float("inf") if store_bytes is None else store_bytes * cluster.num_workers,
    )
    by_stage: dict[str, float] = {}
    for unit in graph.units:
        by_stage[unit.stage] = by_stage.get(unit.stage, 0.0) + seconds(unit)
    # Each worker measures its range of blocks; then the run's graph starts.
    makespan = found.makespan + max(map(seconds, graph.measuring), default=0.0)
    work = found.work + sum(map(seconds, graph.measuring))
    hours = makespan / 3600
    price = cluster.price_per_hour
    return {
        "num_workers": cluster.num_workers,
        "hours": hours,
        "worker_seconds": by_stage,
        "utilisation": work / (cluster.num_workers * makespan),
        "cost": None if price is None else price * hours * cluster.num_workers,
    }


def _memory_problems(
    config: RunConfig,
    model: _Model,
    cluster: Cluster,
    memory: dict[str, int],
    room: WorkerRoom,
) -> list[str]:
    """Where a worker needs more memory than it has, and which settings would do."""

    def needed(peak: str, experts_per_unit: int, activations: int) -> int:
        changed = replace(config, experts_per_unit=experts_per_unit)
        there = replace(room, activation_bytes=activations)
        return _memory(changed, model, cluster, there)[peak]

    problems = []
    limits = (
        ("gpu_peak", cluster.gpu_memory_bytes, "GPU"),
        ("peak", cluster.host_bytes, "machine"),
    )
    for peak, limit, what in limits:
        if limit is None or memory[peak] <= limit:
            continue
        need = f"a worker needs {_gigabytes(memory[peak])} and its {what} has {_gigabytes(limit)}"
        fewer = [
            count
            for count in range(config.experts_per_unit - 1, 0, -1)
            if needed(peak, count, room.activation_bytes) <= limit
        ]
        least = needed(peak, 1, LEAST_ACTIVATION_BYTES)
        if fewer:
            problems.append(f"{need}; use --experts-per-unit {fewer[0]}")
        elif least <= limit:
            problems.append(f"{need}; use --experts-per-unit 1 --activation-memory 64MiB")
        else:
            problems.append(f"{need}; at the least settings it needs {_gigabytes(least)}")
    return problems


def _value_problems(cluster: Cluster, value_bytes: int) -> list[str]:
    """Where a block hands on more than the object stores take, and what would do."""
    each = _object_store_bytes(cluster)
    if each is None or value_bytes <= each * cluster.num_workers:
        return []
    return [
        f"one block hands on {_gigabytes(value_bytes)} and the object stores take "
        f"{_gigabytes(each * cluster.num_workers)}; use --num-workers "
        f"{math.ceil(value_bytes / each)}, or fewer --dataset-size windows (it runs, but spills "
        "to disk)"
    ]


def _gigabytes(count: float) -> str:
    """A number of bytes in 10^9, with one decimal."""
    return f"{count / 1e9:.1f} GB"
