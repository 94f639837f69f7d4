"""What planning knows of a model: the shapes of its blocks, and their operations per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from sparse_expansion.model.families import LinearGroup, linear_shape

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
    """The MLP's linear groups, in the order in which data passes through them."""
    item_bytes: int = 4
    """Bytes of one activation."""
    attention_weights: int | None = None
    """Number of weights of one block's attention; None counts four square projections."""

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
        return self.attention_flops(seqlen) + 2.0 * self.mlp_weights


def group_shape(block: nn.Module, group: LinearGroup) -> GroupShape:
    """The shape of a linear group, read off a block (on the meta device too).

    Raises:
        ValueError: the block lacks one of the linears, or they differ in their input width.
    """
    shapes = [linear_shape(block, name) for name in group.linears]
    if len({width for _, width in shapes}) != 1:
        raise ValueError(f"linears {', '.join(group.linears)} do not share one input width")
    rows = sum(rows for rows, _ in shapes)
    return GroupShape(group.name, shapes[0][1], rows, num_linears=len(shapes))


def model_shape(shell: ModelShell) -> ModelShape:
    """The shape of a model, read off its blocks on the meta device.

    Raises:
        ValueError: the blocks differ in the shapes of their MLPs.
    """
    shapes = [
        tuple(group_shape(shell.meta_block(layer), group) for group in shell.family.groups)
        for layer in range(shell.num_blocks)
    ]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("the model's blocks differ in their MLP shapes, which is not supported")
    return ModelShape(
        shell.num_blocks,
        int(shell.config.hidden_size),
        shapes[0],
        shell.dtype.itemsize,
        shell.family.attention_weights(shell.config),
    )
