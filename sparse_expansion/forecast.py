"""What a run will take: units, operations, memory, bytes, hours and cost, from a config alone.

The byte counts of the checkpoint are exact (they follow from exact weight counts). Memory is a sum
of the arrays that are alive at once, stage by stage; hours come from the real graph and dispatcher
on a simulated cluster.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from sparse_expansion.algorithms.clustering import takes_subspace_iteration
from sparse_expansion.algorithms.packing import PackedLayout, grid_bytes, router_bytes
from sparse_expansion.allocation import gap_units_of, window_counts
from sparse_expansion.config import MEASURED, RunConfig
from sparse_expansion.execution.dispatch import VALUE_SHARE
from sparse_expansion.execution.simulation import simulate
from sparse_expansion.model.families import block_list, family_of, linear_shape
from sparse_expansion.model.refinement import STEP_TOKENS
from sparse_expansion.model.streaming import TOKENS_PER_FORWARD
from sparse_expansion.plan import (
    REDUCE_FAN_IN,
    GroupShape,
    ModelShape,
    captured_width,
    expansion_units,
    expert_ranges,
    gathered_bytes,
    gathered_ranges,
    group_shape,
    hands_on_sums,
)
from sparse_expansion.process_memory import FREED_BYTES_KEPT
from sparse_expansion.stages import CHUNK_TOKENS, TRUNK_SHARD_BYTES, captured_bytes
from sparse_expansion.units import Unit

FLOAT32_BYTES = 4
OBJECT_STORE_SHARE = 0.3
"""Share of a machine's memory that Ray gives to its object store."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines that a plan is made for: equal workers."""

    num_workers: int = 1
    gpu_bytes: int | None = None
    """Memory of a worker's GPU; None computes on the CPU."""
    host_bytes: int | None = None
    """Memory of a worker's machine; None leaves it out of the verdict."""
    flops_per_second: float = 15e12
    """Float32 products of one worker."""
    bytes_per_second: float = 1e9
    """Between workers, and to storage."""
    seconds_per_unit: float = 0.05
    """What every unit costs beside its work."""
    price_per_hour: float | None = None
    """Of one worker."""


@dataclass(frozen=True)
class _Sizes:
    """What the model's shape says, in numbers."""

    item: int
    parameters: int
    dense_mlp: int
    block_parameters: int
    vocabulary_parameters: int
    intermediate: int


def forecast(
    config: RunConfig,
    model_config: Any,
    cluster: Cluster | None = None,
    *,
    activation_bytes: int = 2 << 30,
) -> dict[str, Any]:
    """Units, FLOPs by stage, bytes of the checkpoint and of memory, hours, cost, a verdict.

    Raises:
        ValueError: the architecture is not supported.
    """
    cluster = cluster or Cluster()
    shape, sizes, experts, routers = _measure(config, model_config)
    units = expansion_units(config, shape)
    measuring: list[Unit] = []
    if config.compression.layer_sparsity == MEASURED:
        measuring = gap_units_of(config, shape, cluster.num_workers)
    flops: Counter[str] = Counter()
    for unit in (*measuring, *units):
        flops[unit.stage] += int(unit.cost)
    trunk = sizes.parameters - shape.num_layers * sizes.dense_mlp
    tokens = config.calibration.dataset_size * config.calibration.seqlen
    memory = worker_memory(config, shape, sizes, cluster, activation_bytes=activation_bytes)
    result = {
        "model_type": model_config.model_type,
        "num_layers": shape.num_layers,
        "groups": [
            {"name": group.name, "width": group.width, "rows": group.rows} for group in shape.groups
        ],
        "parameters": sizes.parameters,
        "units": dict(Counter(unit.stage for unit in (*measuring, *units))),
        "calibration_tokens": tokens,
        "flops": dict(flops),
        "checkpoint_bytes": sizes.item * trunk + experts + routers,
        "dense_checkpoint_bytes": sizes.item * sizes.parameters,
        "expert_bytes": experts,
        "router_bytes": routers,
        "memory_bytes": memory,
        "value_bytes_per_block": _value_bytes(units),
        "captured_bytes_per_block": sum(unit.cache_bytes for unit in units if unit.layer == 0),
        "config": config.to_dict(),
    }
    result |= _time(config, measuring, units, cluster, sizes, captured_bytes(activation_bytes))
    result["verdict"] = _verdict(config, shape, sizes, cluster, result, activation_bytes)
    return result


def _measure(config: RunConfig, model_config: Any) -> tuple[ModelShape, _Sizes, int, int]:
    """Shape, sizes, and stored bytes of all experts, and of all routers and grids."""
    family = family_of(model_config.model_type)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(model_config)
    block = block_list(model, family)[0]
    num_layers = len(block_list(model, family))
    config.check_layers(num_layers)
    dtype = config.dtype if config.dtype != "auto" else getattr(model_config, "dtype", None)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    item = torch.empty(0, dtype=dtype).element_size()
    groups: list[GroupShape] = []
    expert_bytes = dense_mlp = routing_bytes = 0
    for group in family.groups:
        shapes = [linear_shape(block, name) for name in group.linears]
        width = shapes[0][1]
        groups.append(group_shape(block, group))
        for rows, _ in shapes:
            for layer in range(num_layers):
                here = config.at(layer)
                layout = PackedLayout.of(rows, width, here.compression)
                expert_bytes += here.routing.num_clusters * layout.num_bytes(item)
            dense_mlp += rows * width
            routing_bytes += num_layers * grid_bytes(rows, width, config.compression)
        routing_bytes += sum(
            router_bytes(width, config.routing.at(layer)) for layer in range(num_layers)
        )
    parameters = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    if getattr(model_config, "tie_word_embeddings", False) and head is not None:
        # On the meta device the tie is not made, but a checkpoint holds the tensor once.
        if head.weight is not model.get_input_embeddings().weight:
            parameters -= head.weight.numel()
    block_parameters = sum(p.numel() for p in block.parameters())
    sizes = _Sizes(
        item=item,
        parameters=parameters,
        dense_mlp=dense_mlp,
        block_parameters=block_parameters,
        vocabulary_parameters=parameters - num_layers * block_parameters,
        intermediate=max(group.width for group in groups),
    )
    shape = ModelShape(num_layers, int(model_config.hidden_size), tuple(groups), item)
    return shape, sizes, expert_bytes, routing_bytes


def worker_memory(
    config: RunConfig,
    shape: ModelShape,
    sizes: _Sizes,
    cluster: Cluster,
    *,
    activation_bytes: int,
) -> dict[str, int]:
    """Bytes of one worker by stage, what it holds throughout, and the peak.

    ``held`` are the libraries, the embedding and head, captured activations and (with one worker)
    the values between units; a stage's bytes come on top. With a GPU, ``gpu_peak`` is the largest
    stage's arrays on the card.
    """
    # The block with the most experts decides.
    routing = replace(config.routing, num_clusters=config.routing.most_clusters, layer_clusters=())
    config = replace(config, routing=routing)
    calibration = config.calibration
    tokens = calibration.dataset_size * calibration.seqlen
    shard_tokens = math.ceil(tokens / calibration.num_shards)
    item, hidden = sizes.item, shape.hidden_size
    widths = sum(group.width for group in shape.groups)
    fit = min(tokens, config.routing.fit_tokens)
    ranges = expert_ranges(config.routing.num_clusters, config.experts_per_unit)
    per_unit = min(config.experts_per_unit, config.routing.num_clusters)
    batch = max(TOKENS_PER_FORWARD, calibration.seqlen)
    # A shard's hidden states in and out, a block, and a batch inside it: attention in and out,
    # the MLP's gate, up and their product.
    forward = (
        2 * shard_tokens * hidden * item
        + sizes.block_parameters * item
        + batch * (6 * hidden + 3 * sizes.intermediate) * item
    )
    stages = {"capture": forward, "trunk": _trunk_bytes(shape, sizes)}
    if config.compression.layer_sparsity == MEASURED:
        pruned, scored = window_counts(calibration.dataset_size, calibration.seqlen)
        streams = 1 + math.ceil(shape.num_layers / cluster.num_workers)
        kept = (pruned + streams * max(1, scored)) * calibration.seqlen * hidden * item
        # A second block, its Hessians, and a sweep as of one expert.
        swept = max(_experts_bytes(config, group, 1, item, paired=True) for group in shape.groups)
        sums = sum(FLOAT32_BYTES * group.width**2 for group in shape.groups)
        passing = forward - 2 * shard_tokens * hidden * item + sizes.block_parameters * item
        stages["block_gaps"] = kept + passing + sums + swept
    for g, group in enumerate(shape.groups):
        paired = calibration.is_paired(g)
        width = group.width
        features = config.routing.num_components(width)
        # Gram matrices being added; the float64 covariance; for a full decomposition its copy, the
        # vectors and the solver's work space.
        router = 3 * width**2 * FLOAT32_BYTES + 2 * CHUNK_TOKENS * width * FLOAT32_BYTES
        if config.routing.pca_reduction_factor is not None:
            full = not takes_subspace_iteration(width, features)
            router += (4 if full else 1) * width**2 * 8
        router += 4 * fit * features * FLOAT32_BYTES
        stages["router"] = max(stages.get("router", 0), router)
        of_expert = gathered_bytes(config, width, item, paired=paired)
        count = len(gathered_ranges(ranges, of_expert, calibration.num_shards)[0])
        rows = per_unit * count * of_expert
        stages["gather"] = max(stages.get("gather", 0), 2 * rows)
        stages["experts"] = max(
            stages.get("experts", 0),
            _experts_bytes(config, group, per_unit, item, paired=paired)
            # What inputs lack, times inputs; the target, and a triangular solve on its way to it.
            + (per_unit * FLOAT32_BYTES * width * (width + 3 * group.rows) if paired else 0),
        )
    packed = sum(
        PackedLayout.of(group.rows, group.width, config.compression).num_bytes(item)
        for group in shape.groups
    )
    if calibration.follows_compression:
        dense = sizes.dense_mlp * config.routing.num_clusters * item
        stages["advance"] = forward + config.routing.num_clusters * packed + dense
    if config.refines:
        # Float32 weights, their gradients, Adam's two moments and the best so far; masks; what a
        # step keeps of every token for the way back; the dense block beside the expanded one.
        trained = sizes.dense_mlp * config.routing.num_clusters * (5 * FLOAT32_BYTES + 1)
        step = max(STEP_TOKENS, calibration.seqlen)
        kept = step * (12 * hidden + 8 * sizes.intermediate) * FLOAT32_BYTES
        stages["refine"] = forward + trained + kept + config.routing.num_clusters * packed
    kept_widths = captured_width(config, shape)
    if calibration.is_sequential:
        # Later groups' inputs are held as they are in the dense block too.
        kept_widths += sum(group.width for group in shape.groups[1:])
    captured = tokens * kept_widths * item
    share = (
        1.0 if cluster.num_workers == 1 else 1 / min(cluster.num_workers, calibration.num_shards)
    )
    held = {
        "libraries": 700 << 20,
        "embedding_and_head": sizes.vocabulary_parameters * item,
        "captured": int(min(captured * share, captured_bytes(activation_bytes))),
    }
    if cluster.num_workers == 1:
        # Samples for the routers, then one group's gathered inputs: in the worker's own memory.
        gathered = max(
            _gathered_bytes(config, group.width, item, paired=calibration.is_paired(g))
            for g, group in enumerate(shape.groups)
        )
        held["values"] = max(fit * widths * item, gathered)
    # Whatever is freed is kept for what comes next, which needs it in other sizes.
    ever = max(stages.values()) + held.get("values", 0) + min(held["captured"], activation_bytes)
    held["freed"] = min(FREED_BYTES_KEPT, ever)
    # Blocks are measured before anything is captured.
    before = held["libraries"] + held["embedding_and_head"] + held["freed"]
    peak = max(
        before + stages.get("block_gaps", 0),
        sum(held.values()) + max(value for name, value in stages.items() if name != "block_gaps"),
    )
    memory = {
        **{f"held: {name}": value for name, value in held.items()},
        **{f"stage: {name}": value for name, value in stages.items()},
        "peak": peak,
    }
    if cluster.gpu_bytes is not None:
        # Samples and rows visit the card in chunks; weights and factors stay for the unit.
        on_card = {name: value for name, value in stages.items() if name not in ("gather", "trunk")}
        on_card["capture"] -= 2 * shard_tokens * hidden * item
        memory["gpu_peak"] = max(on_card.values()) + sizes.vocabulary_parameters * item
    return memory


def _gathered_bytes(config: RunConfig, width: int, item: int, *, paired: bool) -> int:
    """What all shards together hand on for a group at a time."""
    clusters, shards = config.routing.num_clusters, config.calibration.num_shards
    if hands_on_sums(config, width, item):
        # Added up as soon as there are enough: one level of the tree, and the one above it.
        shards = min(shards, 2 * REDUCE_FAN_IN)
    return clusters * shards * gathered_bytes(config, width, item, paired=paired)


def _trunk_bytes(shape: ModelShape, sizes: _Sizes) -> int:
    trunk = (sizes.parameters - shape.num_layers * sizes.dense_mlp) * sizes.item
    # The tensors, and the file's bytes made from them.
    return 2 * min(trunk, TRUNK_SHARD_BYTES)


def _experts_bytes(
    config: RunConfig, group: GroupShape, per_unit: int, item: int, *, paired: bool
) -> int:
    """Hessians, factors and weights that a unit of experts holds at once."""
    square = group.width**2 * FLOAT32_BYTES
    weights = group.rows * group.width
    quantized = config.compression.bits is not None
    # The sums, and the sample's. Their factors: to sweep, or to make up for what inputs lack.
    is_swept = config.compression.pruner == "sparsegpt" or quantized
    hessians = (per_unit + 1 + (per_unit if is_swept or paired else 0)) * square
    # For one expert at a time its reversed Hessian, its Cholesky factor and that reversed; all of
    # them are gone before a weight is swept.
    factoring = 3 * square
    # All linears of the group: weights (float32), masks and codes. One of them: the same
    # transposed, and its changes.
    each = FLOAT32_BYTES + 1 + (1 if quantized else 0)
    swept = per_unit * weights * each
    largest = weights // group.num_linears
    swept += per_unit * largest * (each + FLOAT32_BYTES)
    swept += 2 * FLOAT32_BYTES * weights
    if config.compression.pruner == "admm":
        # The inverses; scaled weights, their target, what is projected away, and a product.
        swept += per_unit * (square + 4 * FLOAT32_BYTES * largest)
    packed = per_unit * PackedLayout.of(group.rows, group.width, config.compression).num_bytes(item)
    return hessians + weights * item + max(factoring, swept + 2 * packed)


def _value_bytes(units: list[Unit]) -> int:
    """Bytes of values between units that one block needs at once."""
    return max(
        (
            sum(unit.output_bytes for unit in units if unit.layer == 0 and unit.stage == stage)
            for stage in ("capture", "gather")
        ),
        default=0,
    )


def _time(
    config: RunConfig,
    measuring: list[Unit],
    units: list[Unit],
    cluster: Cluster,
    sizes: _Sizes,
    kept_bytes: int,
) -> dict[str, Any]:
    handed = {unit.key: unit.output_bytes / max(1, len(unit.outputs)) for unit in units}

    def seconds(unit: Unit) -> float:
        moved = sum(handed[key] for key, _ in unit.inputs) if cluster.num_workers > 1 else 0.0
        if unit.stage in ("capture", "recapture", "refine", "advance"):
            moved += sizes.block_parameters * sizes.item
        return (
            cluster.seconds_per_unit
            + unit.cost / cluster.flops_per_second
            + moved / cluster.bytes_per_second
        )

    budget = float("inf")
    if cluster.host_bytes is not None and cluster.num_workers > 1:
        budget = OBJECT_STORE_SHARE * VALUE_SHARE * cluster.host_bytes * cluster.num_workers
    found = simulate(
        units,
        cluster.num_workers,
        seconds=seconds,
        move_seconds=lambda unit: unit.move_cost / cluster.flops_per_second,
        captures_first=config.calibration.calibration_inputs == "dense",
        captured_bytes=kept_bytes,
        value_budget=budget,
    )
    by_stage: Counter[str] = Counter()
    for unit in (*measuring, *units):
        by_stage[unit.stage] += seconds(unit)  # type: ignore[assignment]
    # Each worker measures its range of blocks; then the run's graph starts.
    makespan = found.makespan + max(map(seconds, measuring), default=0.0)
    work = found.work + sum(map(seconds, measuring))
    hours = makespan / 3600
    price = cluster.price_per_hour
    return {
        "num_workers": cluster.num_workers,
        "hours": hours,
        "worker_seconds": {name: float(value) for name, value in by_stage.items()},
        "utilisation": work / (cluster.num_workers * makespan),
        "cost": None if price is None else price * hours * cluster.num_workers,
    }


def _verdict(
    config: RunConfig,
    shape: ModelShape,
    sizes: _Sizes,
    cluster: Cluster,
    result: dict[str, Any],
    activation_bytes: int,
) -> dict[str, Any]:
    """Whether it can be done, and what to change where it cannot."""
    problems: list[str] = []

    def memory_with(**changes: int) -> dict[str, int]:
        return worker_memory(
            replace(config, experts_per_unit=changes.get("experts_per_unit", per_unit)),
            shape,
            sizes,
            cluster,
            activation_bytes=changes.get("activation_bytes", activation_bytes),
        )

    per_unit = config.experts_per_unit
    memory = result["memory_bytes"]
    limits = (("gpu_peak", cluster.gpu_bytes, "GPU"), ("peak", cluster.host_bytes, "machine"))
    for peak, limit, what in limits:
        if limit is None or memory[peak] <= limit:
            continue
        need = f"a worker needs {_gb(memory[peak])} and its {what} has {_gb(limit)}"
        fewer = [
            count
            for count in range(per_unit - 1, 0, -1)
            if memory_with(experts_per_unit=count)[peak] <= limit
        ]
        smallest = memory_with(experts_per_unit=1, activation_bytes=64 << 20)
        if fewer:
            problems.append(f"{need}; use --experts-per-unit {fewer[0]}")
        elif smallest[peak] <= limit:
            problems.append(f"{need}; use --experts-per-unit 1 --activation-memory 64MiB")
        else:
            problems.append(f"{need}; at the least settings it needs {_gb(smallest[peak])}")
    if cluster.host_bytes is not None and cluster.num_workers > 1:
        store = OBJECT_STORE_SHARE * VALUE_SHARE * cluster.host_bytes * cluster.num_workers
        wanted = result["value_bytes_per_block"]
        if wanted > store:
            workers = math.ceil(wanted / (OBJECT_STORE_SHARE * VALUE_SHARE * cluster.host_bytes))
            problems.append(
                f"one block hands on {_gb(wanted)} and the object stores take {_gb(store)}; use "
                f"--num-workers {workers}, or fewer --dataset-size windows (it runs, but spills "
                "to disk)"
            )
    return {
        "fits": not problems,
        "text": "fits" if not problems else "does not fit: " + "; and ".join(problems),
    }


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
