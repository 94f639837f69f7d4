"""What planning knows of a model: the shapes of its blocks, and their operations per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from sparse_expansion.model.block_linears import block_groups, linear_shape
from sparse_expansion.model.families import Family, LinearGroup
from sparse_expansion.model.plain_blocks import tokens_share

if TYPE_CHECKING:
    from sparse_expansion.model.streaming import ModelShell


@dataclass(frozen=True)
class GroupShape:
    """A linear group's name, its input width, and its linears' outputs and number."""

    name: str
    width: int
    """Input features, which all linears of the group share."""
    rows: int
    """Output features of all linears of the group together."""
    num_linears: int = 1
    level: int = 0
    """How many groups of the block its input has passed through."""
    tokens_share: float = 1.0
    """Share of the tokens that pass through it: less than 1 for the experts of a mixture."""
    is_routed: bool = False
    """Whether the linears are those of a mixture's experts."""

    @property
    def used_weights(self) -> float:
        """Number of weights that one token is multiplied with, on average."""
        return self.weights * self.tokens_share

    @property
    def weights(self) -> int:
        """Number of weights of all linears of the group together."""
        return self.width * self.rows


@dataclass(frozen=True)
class ModelShape:
    """What planning needs to know of a model."""

    num_layers: int
    hidden_size: int
    groups: tuple[GroupShape, ...]
    """The linear groups of a block's MLP, by level; where blocks differ, the first block's."""
    item_bytes: int = 4
    """Bytes of one activation."""
    attention_weights: int | None = None
    """Number of weights of one block's attention; None counts four square projections."""
    output_scale: float | None = None
    """``Family.output_scale``."""
    layer_groups: tuple[tuple[GroupShape, ...], ...] = ()
    """Every block's linear groups where blocks differ; none where they are alike."""

    def at(self, layer: int) -> ModelShape:
        """The same with one block's groups."""
        return replace(self, groups=self.layer_groups[layer]) if self.layer_groups else self

    @property
    def kinds(self) -> list[ModelShape]:
        """One shape for every kind of block that there is."""
        return [replace(self, groups=groups) for groups in dict.fromkeys(self.layer_groups)] or [
            self
        ]

    def groups_before(self, layer: int) -> int:
        """Number of linear groups in all blocks before one."""
        if not self.layer_groups:
            return layer * len(self.groups)
        return sum(map(len, self.layer_groups[:layer]))

    @property
    def levels(self) -> list[int]:
        """The levels of a block's groups, in order."""
        return sorted({group.level for group in self.groups})

    @property
    def mlp_weights(self) -> int:
        """Number of weights of one block's MLP."""
        return sum(group.weights for group in self.groups)

    @property
    def block_weights(self) -> int:
        """Number of weights of one block: of its MLP, and of its attention's projections."""
        return self.mlp_weights + self._projections

    @property
    def _projections(self) -> int:
        square = 4 * self.hidden_size**2
        return square if self.attention_weights is None else self.attention_weights

    def attention_flops(self, seqlen: int) -> float:
        """Operations that one token takes through a block's attention.

        They are those of the projections, and of scores and sums over half a window of ``seqlen``
        tokens.
        """
        return 2.0 * (self._projections + self.hidden_size * seqlen)

    def block_flops(self, seqlen: int) -> float:
        """Operations that one token takes through a block, in a window of ``seqlen`` tokens."""
        used = sum(group.used_weights for group in self.groups)
        return self.attention_flops(seqlen) + 2.0 * used

    def all_block_flops(self, seqlen: int) -> float:
        """Operations that one token takes through all blocks."""
        if not self.layer_groups:
            return self.num_layers * self.block_flops(seqlen)
        return sum(self.at(layer).block_flops(seqlen) for layer in range(self.num_layers))

    @property
    def all_mlp_weights(self) -> int:
        """Number of weights of all blocks' MLPs."""
        return sum(self.at(layer).mlp_weights for layer in range(self.num_layers))


def group_shape(block: nn.Module, group: LinearGroup, tokens_share: float = 1.0) -> GroupShape:
    """The shape of a linear group, read off a block (on the meta device too).

    Args:
        block: of the form that ``plain_blocks`` gives it.
        group: of its linears.
        tokens_share: share of the tokens that pass through an expert of a mixture.

    Raises:
        ValueError: the block lacks one of the linears, or they differ in their input width.
    """
    shapes = [linear_shape(block, name) for name in group.linears]
    if len({width for _, width in shapes}) != 1:
        raise ValueError(f"linears {', '.join(group.linears)} do not share one input width")
    rows = sum(rows for rows, _ in shapes)
    return GroupShape(
        group.name,
        shapes[0][1],
        rows,
        num_linears=len(shapes),
        level=group.level,
        tokens_share=tokens_share if group.is_routed else 1.0,
        is_routed=group.is_routed,
    )


def shape_of_blocks(
    blocks: Sequence[nn.Module], family: Family, config: Any, item_bytes: int
) -> ModelShape:
    """The shape of a model, read off its blocks on the meta device.

    Args:
        blocks: all of them, of the form that ``plain_blocks`` gives them.
        family: of the model.
        config: of transformers.
        item_bytes: bytes of one activation.

    Raises:
        ValueError: the blocks differ in the shapes of their MLPs, other than by their experts.
    """
    layers = []
    for block in blocks:
        share = tokens_share(block, family, config)
        groups = block_groups(block, family)
        layers.append(tuple(group_shape(block, group, share) for group in groups))
    are_alike = all(groups == layers[0] for groups in layers)
    if not are_alike and family.mixture is None:
        raise ValueError("the model's blocks differ in their MLP shapes, which is not supported")
    return ModelShape(
        len(blocks),
        int(config.hidden_size),
        layers[0],
        item_bytes,
        family.attention_weights(config),
        family.output_scale(config),
        () if are_alike else tuple(layers),
    )


def model_shape(shell: ModelShell) -> ModelShape:
    """The shape of an opened model, see ``shape_of_blocks``."""
    blocks = [shell.meta_block(layer) for layer in range(shell.num_blocks)]
    return shape_of_blocks(blocks, shell.family, shell.config, shell.dtype.itemsize)
