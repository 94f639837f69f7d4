"""What units of work cost: estimated operations and bytes, from settings and shapes alone.

A multiplication and an addition count as two operations.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from sparse_expansion.algorithms.channels import permutation_flops
from sparse_expansion.algorithms.clustering import OVERSAMPLING, takes_subspace_iteration
from sparse_expansion.algorithms.expert_shares import MAX_ROWS
from sparse_expansion.algorithms.packing.layout import PackedLayout
from sparse_expansion.algorithms.pruners.registry import pruner_of
from sparse_expansion.config import CalibrationConfig, CompressionConfig, RunConfig
from sparse_expansion.planning.shapes import GroupShape, ModelShape

FLOAT32_BYTES, FLOAT64_BYTES = 4, 8
REDUCE_FAN_IN = 8
"""Hessian sums that one ``reduce`` unit adds up at most."""
SUBSPACE_ITERATIONS = 15.0
"""Iterations of a PCA by subspace iteration, as seen on SmolLM2's layers."""
LLOYD_ITERATIONS = 20.0
"""Iterations of one KMeans restart, as seen on SmolLM2's layers."""
SORT_FLOPS = 200.0
"""Operations of matrix products that take as long as sorting and describing one output."""


def shard_tokens(calibration: CalibrationConfig) -> float:
    """Tokens of one shard of the calibration windows, on average."""
    return calibration.num_tokens / calibration.num_shards


def makes_up_for_all(config: RunConfig, shape: ModelShape) -> bool:
    """Whether blocks make up for all before them, so that the dense model's states are followed."""
    return config.makes_up_for_all and shape.output_scale is not None


def is_corrected(config: RunConfig, shape: ModelShape, group: GroupShape) -> bool:
    """Whether a group's linears make up for the blocks before, where there are any."""
    return config.calibration.is_paired(group.level) and makes_up_for_all(config, shape)


def captured_width(config: RunConfig, shape: ModelShape) -> int:
    """Activations that a block's capture keeps of one token.

    They are the inputs of the MLP's linear groups, and attention's outputs where the block runs
    again with compressed linears.
    """
    attention = shape.hidden_size if config.calibration.follows_compression else 0
    routed = sum(group.width * group.tokens_share for group in shape.groups)
    return math.ceil(routed) + attention


# Gathered inputs


@dataclass(frozen=True)
class GatheredInputs:
    """What one shard hands on for one expert of a linear group."""

    is_summed: bool
    """Whether it is a Hessian sum; else it is the rows behind that sum."""
    num_bytes: int


def hands_on_sums(
    config: RunConfig, width: int, item_bytes: int, tokens_share: float = 1.0
) -> bool:
    """Whether shards hand on Hessian sums instead of the rows behind them.

    Rows are smaller for few tokens and leave the products to whichever worker is free, but grow
    with the tokens; sums (``D x D``, added up ``REDUCE_FAN_IN`` at a time) do not. An expert's rows
    of all shards may take four times as much as ``REDUCE_FAN_IN`` sums.

    Args:
        config: of the block.
        width: input features D of the linear group.
        item_bytes: bytes of one activation.
        tokens_share: share of the tokens that pass through the group.
    """
    rows = tokens_share * config.calibration.num_tokens / config.routing.num_clusters
    return rows * item_bytes > REDUCE_FAN_IN * FLOAT32_BYTES * 4.0 * width


def gathered_inputs(
    config: RunConfig,
    width: int,
    item_bytes: int,
    *,
    residuals: int = 0,
    tokens_share: float = 1.0,
) -> GatheredInputs:
    """What one shard hands on for one expert.

    Args:
        config: of the block.
        width: input features D of the linear group.
        item_bytes: bytes of one activation.
        residuals: numbers of what its outputs lack that come with a token's inputs.
        tokens_share: share of the tokens that pass through the group.
    """
    if hands_on_sums(config, width, item_bytes, tokens_share):
        return GatheredInputs(True, FLOAT32_BYTES * width * (width + residuals))
    rows = tokens_share * shard_tokens(config.calibration) / config.routing.num_clusters
    return GatheredInputs(False, int(rows * item_bytes * (width + residuals)))


# Routers


def router_flops(config: RunConfig, width: int, tokens: float, rows: int) -> float:
    """Operations to fit a router on so many tokens: Gram matrix (half of it), PCA, KMeans.

    Where the inputs of linears with so many rows in all are permuted, it is done with it.
    """
    routing = config.routing
    features = routing.num_components(width)
    pca = 0.0
    if routing.pca_reduction_factor is not None:
        if takes_subspace_iteration(width, features):
            pca = SUBSPACE_ITERATIONS * 2.0 * width**2 * (features + OVERSAMPLING)
        else:
            # Tridiagonal form (4/3 D^3) and the wanted vectors back (2 D^2 P).
            pca = 4 / 3 * width**3 + 2.0 * width**2 * features
    kmeans = 2.0 * tokens * features * routing.num_clusters * routing.restarts * LLOYD_ITERATIONS
    permuting = 0.0
    if config.compression.permutes:
        permuting = permutation_flops(rows, width, config.compression.sparsity)
    return tokens * width * (width + 2.0 * features) + pca + kmeans + permuting


def correction_flops(group: GroupShape, tokens: float) -> float:
    """Operations to find how a linear makes up for the blocks before, on so many tokens."""
    width, rows = float(group.width), float(group.rows)
    # Their sums, a factor and its inverse, and two triangular solves.
    return 2 * tokens * width * rows + 2 / 3 * width**3 + 2 * rows * width**2


def routing_flops(config: RunConfig, width: int) -> float:
    """Operations to route one token, see ``clustering.route``."""
    clusters, features = config.routing.num_clusters, config.routing.num_components(width)
    if clusters == 1:
        return 0.0
    if config.routing.pca_reduction_factor is None or clusters <= features:
        return 2.0 * width * clusters
    return 2.0 * features * (width + clusters)


def shares_flops(group: GroupShape) -> float:
    """Operations to rank what an expert's weights are worth: products of some of them, a sort."""
    count = float(min(group.rows, MAX_ROWS) * group.width)
    return count * (2 + math.log2(count))


# Experts


def hessian_flops(width: float, tokens: float, *, residuals: float = 0) -> float:
    """Operations of a Hessian sum ``[D, D]`` over so many tokens, of which half is computed.

    Where outputs lack something, the sum of these residuals times the inputs comes on top.
    """
    return tokens * width * (width + 2 * residuals)


def experts_flops(
    group: GroupShape, compression: CompressionConfig, tokens: float, *, paired: bool = False
) -> float:
    """Operations to make one expert of all linears of a group: its Hessian sum, and its pruner.

    A Hessian that is drawn towards its group's takes two triangular solves of its own size.

    Args:
        group: of the linears.
        compression: of the block.
        tokens: tokens that are still to be summed; 0 where sums are handed on.
        paired: whether what the outputs lack comes with the inputs: the compensated target takes
            two triangular solves more.
    """
    width, rows = float(group.width), float(group.rows)
    found = hessian_flops(width, tokens, residuals=rows if paired else 0)
    found += pruner_of(compression.pruner).flops(group.rows, group.width, compression)
    if paired:
        found += 2 * rows * width**2
    if compression.shrink_hessians:
        found += 2 * width**3
    return found


def packed_bytes(config: RunConfig, group: GroupShape, item_bytes: int) -> int:
    """Bytes of one stored expert of all linears of a group."""
    return PackedLayout.of(group.rows, group.width, config.compression).num_bytes(item_bytes)


def block_packed_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Bytes of all stored experts of a block."""
    return config.routing.num_clusters * sum(
        packed_bytes(config, group, shape.item_bytes) for group in shape.groups
    )


def expert_bytes(config: RunConfig, group: GroupShape) -> int:
    """Bytes that making one expert reads and writes at least: Hessian, factor, weights."""
    arrays = FLOAT32_BYTES * (2 * group.width**2 + 2 * group.rows * group.width)
    return arrays + packed_bytes(config, group, FLOAT32_BYTES)


# Blocks and models


def refine_flops(config: RunConfig, shape: ModelShape) -> float:
    """Operations to train a block: the dense one forward, the expanded one forward and back."""
    calibration = config.calibration
    passes = 4.0 * config.refinement.finetune
    return passes * calibration.num_tokens * shape.block_flops(calibration.seqlen)


def block_gap_flops(
    config: RunConfig, shape: ModelShape, layers: tuple[int, int], pruned: int, scored: int
) -> float:
    """Operations to score a model with one block pruned at a time.

    Args:
        config: of the windows and of pruning.
        shape: of the dense model.
        layers: first and last block.
        pruned: number of windows to prune on.
        scored: number of windows to score.
    """
    seqlen = config.calibration.seqlen
    first, last = layers
    # The dense stream passes all blocks, and every pruned block's stream those from it on.
    passes = shape.num_layers + sum(shape.num_layers - layer for layer in range(first, last + 1))
    windows = scored * passes + pruned * (last + 1)
    pruned_tokens = float(pruned * seqlen)
    # Whatever the run's pruner, gaps are measured with a plain sweep.
    plain = dataclasses.replace(config.compression, pruner="sparsegpt", bits=None)
    sweeps = sum(
        experts_flops(group, plain, pruned_tokens * group.tokens_share)
        for layer in range(first, last + 1)
        for group in shape.at(layer).groups
    )
    block_flops = shape.all_block_flops(seqlen) / shape.num_layers
    return windows * seqlen * block_flops + sweeps


def mlp_flops_per_token(config: RunConfig, shape: ModelShape) -> dict[str, float]:
    """Operations of all MLP linears on one token: dense, with kept weights alone, and routers."""
    found = {"dense": 0.0, "experts": 0.0, "router": 0.0}
    for layer in range(shape.num_layers):
        here = config.at(layer)
        for group in shape.at(layer).groups:
            share = group.tokens_share
            found["dense"] += 2.0 * group.used_weights
            layout = PackedLayout.of(group.rows, group.width, here.compression)
            found["experts"] += 2.0 * layout.num_kept * share
            found["router"] += routing_flops(here, group.width) * share
    return found
