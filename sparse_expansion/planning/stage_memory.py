"""Memory that one unit of every stage takes on top of what its worker holds throughout."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparse_expansion.algorithms.channels import permutation_bytes
from sparse_expansion.algorithms.clustering import takes_subspace_iteration
from sparse_expansion.algorithms.pruners.registry import pruner_of
from sparse_expansion.config import MEASURED, RunConfig
from sparse_expansion.model.refinement import STEP_TOKENS
from sparse_expansion.model.streaming import TOKENS_PER_FORWARD
from sparse_expansion.planning.allocation import window_counts
from sparse_expansion.planning.costs import (
    FLOAT32_BYTES,
    FLOAT64_BYTES,
    block_packed_bytes,
    gathered_inputs,
    is_corrected,
    makes_up_for_all,
    packed_bytes,
    shard_tokens,
)
from sparse_expansion.planning.partition import expert_ranges, gathered_ranges
from sparse_expansion.planning.shapes import GroupShape, ModelShape
from sparse_expansion.work.stages.make import TRUNK_SHARD_BYTES
from sparse_expansion.work.sums import CHUNK_TOKENS


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of a dense model's parameters."""

    total: int
    """Parameters of the whole model; a tied head counts once."""
    block: int
    """Parameters of one block, the largest where they differ."""
    all_blocks: int | None = None
    """Parameters of all blocks; None where they are alike."""

    def outside(self, num_layers: int) -> int:
        """Parameters that are in no block."""
        blocks = num_layers * self.block if self.all_blocks is None else self.all_blocks
        return self.total - blocks


def fit_tokens(config: RunConfig, group: GroupShape) -> int:
    """Tokens on which a group's router is fitted, at most."""
    passing = math.ceil(config.calibration.num_tokens * group.tokens_share)
    return min(passing, config.routing.fit_tokens)


class StageMemory:
    """Bytes that a unit of each stage needs on top of what its worker holds."""

    def __init__(
        self, config: RunConfig, shape: ModelShape, parameters: ParameterCounts, num_workers: int
    ) -> None:
        """Blocks are alike; those with fewer experts have been replaced."""
        self.config = config
        self.shape = shape
        self.parameters = parameters
        self.num_workers = num_workers
        self.item = shape.item_bytes
        tokens = math.ceil(shard_tokens(config.calibration))
        states = 4 if makes_up_for_all(config, shape) else 2
        self.hidden_bytes = states * tokens * shape.hidden_size * self.item
        """Bytes of one shard's hidden states before a block and behind it; maybe the dense ones."""
        self.experts_per_unit = min(config.experts_per_unit, config.routing.num_clusters)
        self.block_bytes = parameters.block * self.item

    def all(self) -> dict[str, int]:
        """Bytes by name of the stage; of several linear groups the largest counts."""
        config = self.config
        stages = {"capture": self.forward(), "trunk": self.trunk()}
        if config.compression.layer_sparsity == MEASURED:
            stages["block_gaps"] = self.block_gaps()
        groups = [(group, config.calibration.is_paired(group.level)) for group in self.shape.groups]
        stages["router"] = max(self.router(group) for group, _ in groups)
        stages["weigh"] = max(self.weigh(group) for group, _ in groups)
        stages["gather"] = max(self.gather(group, paired=paired) for group, paired in groups)
        stages["experts"] = max(self.experts(group, paired=paired) for group, paired in groups)
        if config.calibration.follows_compression:
            stages["advance"] = self.advance()
        if config.refines:
            stages["refine"] = self.refine()
        return {name: size for name, size in stages.items() if size}

    def read_again_bytes(self) -> int:
        """Bytes of a block's weights and files that its own units read again.

        They are hidden states before it and behind it, the dense block, and its packed experts
        where the compressed block is run.
        """
        config = self.config
        shards = max(1, config.calibration.num_shards // self.num_workers)
        found = shards * self.hidden_bytes + self.block_bytes
        if config.calibration.follows_compression or config.refines:
            found += block_packed_bytes(config, self.shape)
        return found

    def forward(self) -> int:
        """Bytes to run one shard through a block: hidden states, the block, and a batch in it."""
        # A batch has attention's inputs and outputs, the MLP's gate, up and their product.
        batch = max(TOKENS_PER_FORWARD, self.config.calibration.seqlen)
        widest = max(group.width for group in self.shape.groups)
        activations = batch * (6 * self.shape.hidden_size + 3 * widest) * self.item
        return self.hidden_bytes + self.block_bytes + activations

    def trunk(self) -> int:
        """Bytes of what is neither expert nor router, one file at a time."""
        weights = self.parameters.total - self.shape.all_mlp_weights
        # The tensors, and the file's bytes made from them.
        return 2 * min(weights * self.item, TRUNK_SHARD_BYTES)

    def block_gaps(self) -> int:
        """Bytes to prune a range of blocks one at a time and score all of these models."""
        calibration, shape = self.config.calibration, self.shape
        pruned, scored = window_counts(calibration.dataset_size, calibration.seqlen)
        streams = 1 + math.ceil(shape.num_layers / self.num_workers)
        windows = pruned + streams * max(1, scored)
        kept = windows * calibration.seqlen * shape.hidden_size * self.item
        # A second block, its Hessians, and a sweep as of one expert.
        passing = self.forward() - self.hidden_bytes + self.block_bytes
        sums = sum(FLOAT32_BYTES * group.width**2 for group in shape.groups)
        swept = max(self._expert_arrays(group, 1, paired=True) for group in shape.groups)
        return kept + passing + sums + swept

    def router(self, group: GroupShape) -> int:
        """Bytes to fit a group's router."""
        routing, width = self.config.routing, group.width
        features = routing.num_components(width)
        # Gram matrices being added, and two chunks of inputs.
        found = 3 * width**2 * FLOAT32_BYTES + 2 * CHUNK_TOKENS * width * FLOAT32_BYTES
        if routing.pca_reduction_factor is not None:
            # The float64 covariance; for a full decomposition its copy, the vectors and the
            # solver's work space.
            is_full = not takes_subspace_iteration(width, features)
            found += (4 if is_full else 1) * width**2 * FLOAT64_BYTES
        found += 4 * fit_tokens(self.config, group) * features * FLOAT32_BYTES
        if self.config.compression.permutes:
            found = max(found, permutation_bytes(group.rows, width, self.item))
        if is_corrected(self.config, self.shape, group):
            # A factor, its inverse and what they are made from; sums of two kinds of rows.
            correction = FLOAT32_BYTES * (5 * width**2 + 3 * width * group.rows)
            found = max(found, correction)
        return found

    def gather(self, group: GroupShape, *, paired: bool) -> int:
        """Bytes of one shard's gathered inputs, of several ranges of experts, and their copy."""
        config = self.config
        gathered = gathered_inputs(
            config,
            group.width,
            self.item,
            residuals=group.rows if paired else 0,
            tokens_share=group.tokens_share,
        )
        ranges = expert_ranges(config.routing.num_clusters, config.experts_per_unit)
        spans = gathered_ranges(ranges, gathered.num_bytes, config.calibration.num_shards)
        return 2 * self.experts_per_unit * len(spans[0]) * gathered.num_bytes

    def weigh(self, group: GroupShape) -> int:
        """Bytes of a batch and its way back: gradients, and the squares of one linear's."""
        if not self.config.compression.weighs(group.level, is_routed=group.is_routed):
            return 0
        batch = max(TOKENS_PER_FORWARD, self.config.calibration.seqlen)
        squares = batch * group.rows * (self.item + FLOAT32_BYTES / group.num_linears)
        return self.forward() + int(squares)

    def experts(self, group: GroupShape, *, paired: bool) -> int:
        """Bytes to make a range of a group's experts."""
        found = self._expert_arrays(group, self.experts_per_unit, paired=paired)
        if paired:
            # What outputs lack times the inputs; the compensated target, and a triangular solve
            # on its way to it.
            targets = FLOAT32_BYTES * group.width * 4 * group.rows
            found += self.experts_per_unit * targets
        return found

    def advance(self) -> int:
        """Bytes to run one shard through a compressed block, its experts packed and dense."""
        dense = self.config.routing.num_clusters * self.shape.mlp_weights * self.item
        return self.forward() + block_packed_bytes(self.config, self.shape) + dense

    def refine(self) -> int:
        """Bytes to train a block's experts."""
        shape = self.shape
        weights = shape.mlp_weights * self.config.routing.num_clusters
        # Float32 weights, their gradients, Adam's two moments and the best so far; masks.
        trained = weights * (5 * FLOAT32_BYTES + 1)
        # What a step keeps of every token for the way back; the dense block beside the expanded.
        step = max(STEP_TOKENS, self.config.calibration.seqlen)
        widest = max(group.width for group in shape.groups)
        kept = step * (12 * shape.hidden_size + 8 * widest) * FLOAT32_BYTES
        return self.forward() + trained + kept + block_packed_bytes(self.config, shape)

    def _expert_arrays(self, group: GroupShape, count: int, *, paired: bool) -> int:
        """Bytes of Hessians, factors and weights that a unit of ``count`` experts holds at once."""
        compression = self.config.compression
        square = group.width**2 * FLOAT32_BYTES
        weights = group.rows * group.width
        cross = weights * FLOAT32_BYTES if paired else 0
        largest = weights // group.num_linears
        # The sums, and the sample's. Their factors: to sweep, or for the compensated target.
        pruner = pruner_of(compression.pruner)
        hessians = (count + 1 + count * (pruner.needs_factor(compression) or paired)) * square
        # For one expert at a time its reversed Hessian, its Cholesky factor and that reversed; all
        # of them are gone before a weight is swept.
        factoring = 3 * square
        if compression.shrink_hessians:
            # Of the group the mean, its factor and it whitened; of an expert sums, mean, and it
            # whitened, with its half.
            factoring = 6 * square + cross
        if compression.expert_biases:
            # An expert's sums as they come, beside those about its mean.
            factoring += square + cross
        # All linears of the group: weights (float32), masks and codes. One of them: the same
        # transposed, and its changes.
        each = FLOAT32_BYTES + 1 + (1 if compression.bits is not None else 0)
        made = count * weights * each
        # Experts with shares of their own are made one after another, and then put together.
        is_apart = compression.shares_out(is_routed=group.is_routed)
        at_once, copies = (1, 2) if is_apart else (count, 1)
        swept = made + 2 * FLOAT32_BYTES * weights + at_once * largest * (each + FLOAT32_BYTES)
        swept = max(copies * made, swept + at_once * pruner.extra_bytes(group.width, largest))
        packed = count * packed_bytes(self.config, group, self.item)
        return hessians + weights * self.item + max(factoring, swept + 2 * packed)
