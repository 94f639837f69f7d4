"""What all units of one block share: its settings, its shards, and its ranges of experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from sparse_expansion.config import CalibrationConfig, RunConfig
from sparse_expansion.planning.costs import shard_tokens
from sparse_expansion.planning.partition import expert_ranges
from sparse_expansion.planning.shapes import ModelShape
from sparse_expansion.run_files import ExpertRange


@dataclass(frozen=True)
class BlockPlan:
    """A block of a run."""

    config: RunConfig
    """Settings of this block (``RunConfig.at``)."""
    shape: ModelShape
    """Shape of the dense model."""
    layer: int
    """Number of the block, from 0."""

    @property
    def calibration(self) -> CalibrationConfig:
        """Settings of the calibration windows and of the schedule."""
        return self.config.calibration

    @property
    def is_last(self) -> bool:
        """Whether no block comes behind this one."""
        return self.layer + 1 == self.shape.num_layers

    @cached_property
    def ranges(self) -> list[ExpertRange]:
        """First and last expert of every unit that makes experts."""
        return expert_ranges(self.config.routing.num_clusters, self.config.experts_per_unit)

    @property
    def shards(self) -> range:
        """Numbers of the shards of the calibration windows."""
        return range(self.calibration.num_shards)

    @cached_property
    def shard_tokens(self) -> float:
        """Tokens of one shard, on average."""
        return shard_tokens(self.calibration)

    @cached_property
    def fit_tokens(self) -> int:
        """Tokens of all shards together on which routers are fitted."""
        return min(self.calibration.num_tokens, self.config.routing.fit_tokens)

    @cached_property
    def hidden_bytes(self) -> int:
        """Bytes of one shard's hidden states."""
        return int(self.shard_tokens * self.shape.hidden_size * self.shape.item_bytes)

    @cached_property
    def shard_flops(self) -> float:
        """Operations to take one shard through the dense block."""
        return self.shard_tokens * self.shape.block_flops(self.calibration.seqlen)

    def sample_bytes(self, width: int) -> int:
        """Bytes of the sample of inputs of this width that one shard hands on to fit routers."""
        return int(self.fit_tokens / len(self.shards) * width * self.shape.item_bytes)
