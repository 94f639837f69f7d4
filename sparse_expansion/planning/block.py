"""What all units of one block share: its settings, its shards, and its ranges of experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from sparse_expansion.config import CalibrationConfig, RunConfig
from sparse_expansion.planning.costs import FLOAT32_BYTES, is_corrected, shard_tokens
from sparse_expansion.planning.partition import expert_ranges
from sparse_expansion.planning.shapes import GroupShape, ModelShape
from sparse_expansion.run_files import ExpertRange, recapture_key


@dataclass(frozen=True)
class BlockPlan:
    """A block of a run."""

    config: RunConfig
    """Settings of this block (``RunConfig.at``)."""
    shape: ModelShape
    """Shape of the dense model, with this block's groups (``ModelShape.at``)."""
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

    @cached_property
    def positions(self) -> dict[int, list[int]]:
        """The places of every level's groups among the block's, by rising level."""
        found: dict[int, list[int]] = {level: [] for level in self.shape.levels}
        for place, group in enumerate(self.shape.groups):
            found[group.level].append(place)
        return found

    def level_groups(self, level: int) -> tuple[GroupShape, ...]:
        """The groups of one level."""
        return tuple(self.shape.groups[place] for place in self.positions[level])

    def recapture_key(self, level: int, shard: int) -> str:
        """Key of the unit that captures a level's inputs behind compressed linears."""
        first = self.shape.groups[self.positions[level][0]]
        return recapture_key(self.layer, first.name, shard)

    def fit_tokens_of(self, group: GroupShape) -> float:
        """Tokens of all shards together on which a group's router is fitted."""
        # Whatever experts of a mixture get, there may be few of them.
        return min(self.fit_tokens, self.calibration.num_tokens * group.tokens_share)

    def sample_bytes(self, groups: Iterable[GroupShape]) -> int:
        """Bytes of the samples of groups' inputs that one shard hands on to fit routers."""
        found = 0.0
        for group in groups:
            found += self.fit_tokens_of(group) * group.width * self.shape.item_bytes
            if self.is_corrected(group):
                found += self.fit_tokens_of(group) * group.rows * FLOAT32_BYTES
        return int(found / len(self.shards))

    def is_corrected(self, group: GroupShape) -> bool:
        """Whether a group's linears make up for the blocks before."""
        return self.layer > 0 and is_corrected(self.config, self.shape, group)
