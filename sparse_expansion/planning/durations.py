"""How long units take on the machines of a plan: modelled from operations and moved bytes.

On a CPU, and on a GPU of which only ``--tflops`` is known, everything is done at the rate of
float32 products. Of a GPU that is known by name, tensor cores do some things many times as fast,
and others do not come near the rate of products at all. What share of the published rates they
reach was measured on an H200 with two blocks of Llama 2 13B's shape (``docs/performance.md``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from sparse_expansion.algorithms.pruners import sparsegpt
from sparse_expansion.algorithms.pruners.registry import pruner_of
from sparse_expansion.config import Cluster, RunConfig
from sparse_expansion.config.cluster import GPUS
from sparse_expansion.planning.costs import experts_flops
from sparse_expansion.planning.shapes import ModelShape
from sparse_expansion.units import Unit
from sparse_expansion.work.registry import stage_of

PASSES = {"embed", "capture", "recapture", "advance", "weigh", "gather", "block_gaps"}
"""Stages that take tokens through dense or expanded linears, in the model's own dtype."""
PASS_SHARE = 0.16
"""Share of a GPU's published half-precision rate that passes in half precision reach."""
PARTS_SHARE = 0.086
"""Share of it that the solver reaches, whose float32 products are three of bfloat16 parts; Hessian
sums are taken to be as fast."""
SWEEP_SHARE = 0.22
"""Share of the published float32 rate that factoring and sweeping over columns reach."""
ROUTER_SHARE = 0.3
"""Share of the published float32 rate that PCA and KMeans reach."""


def durations(
    units: Sequence[Unit],
    config: RunConfig,
    shape: ModelShape,
    cluster: Cluster,
    block_bytes: int,
) -> Callable[[Unit], float]:
    """Modelled seconds of every unit: a fixed cost, operations, and bytes that are moved.

    Args:
        units: of the expansion.
        config: of the run.
        shape: of the dense model.
        cluster: the machines.
        block_bytes: of a dense block's weights.
    """
    value_bytes = {unit.key: unit.output_bytes / max(1, len(unit.outputs)) for unit in units}
    loads = Counter((unit.stage, unit.layer) for unit in units)
    rates = stage_rates(config, shape, cluster)

    def seconds(unit: Unit) -> float:
        moved = sum(value_bytes[key] for key, _ in unit.inputs) if cluster.num_workers > 1 else 0.0
        if stage_of(unit.stage).loads_block:
            # On a GPU a worker keeps a block for the other units of it.
            is_kept = cluster.gpu_memory_bytes is not None
            of_block = loads[unit.stage, unit.layer]
            moved += block_bytes * (min(1.0, cluster.num_workers / of_block) if is_kept else 1)
        return (
            cluster.seconds_per_unit
            + unit.cost / rates.get(unit.stage, cluster.product_rate)
            + moved / cluster.bytes_per_second
        )

    return seconds


def stage_rates(config: RunConfig, shape: ModelShape, cluster: Cluster) -> dict[str, float]:
    """Operations per second of the stages whose rate is not that of float32 products.

    A rate of products that is given with ``--tflops`` scales them all.

    Args:
        config: of the run.
        shape: of the dense model.
        cluster: the machines.
    """
    if cluster.gpu is None:
        return {}
    gpu = GPUS[cluster.gpu]
    scale = cluster.product_rate / gpu.product_rate
    passing = gpu.product_rate if shape.item_bytes > 2 else PASS_SHARE * gpu.half_rate
    rates = dict.fromkeys(PASSES, passing)
    rates["router"] = ROUTER_SHARE * gpu.float32_rate
    # By the last block's settings: what differs between blocks is how many zeros they have.
    compression = config.at(shape.num_layers - 1).compression
    pruner = pruner_of(compression.pruner)
    total = swept = 0.0
    for group in shape.at(shape.num_layers - 1).groups:
        tokens = group.tokens_share * config.calibration.num_tokens / config.routing.num_clusters
        total += experts_flops(group, compression, tokens)
        if pruner.needs_factor(compression):
            swept += sparsegpt.flops(group.rows, group.width, compression)
    seconds = swept / (SWEEP_SHARE * gpu.float32_rate)
    seconds += (total - swept) / (PARTS_SHARE * gpu.half_rate)
    rates["experts"] = total / seconds
    return {stage: scale * rate for stage, rate in rates.items()}
