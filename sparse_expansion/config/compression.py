"""How one expert's weight is pruned and quantized."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from sparse_expansion.config.by_block import read_by_block
from sparse_expansion.config.checks import require, require_layers
from sparse_expansion.config.fields import setting
from sparse_expansion.config.kinds import check_kinds
from sparse_expansion.config.pruners import PRUNERS
from sparse_expansion.config.sparsity import SparsityPattern

UNIFORM, MEASURED = "uniform", "measured"
ALLOCATIONS = (UNIFORM, MEASURED)
"""Ways to share out zeros over the blocks, beside a list of shares."""
QUANTIZED_BITS = 4
"""Bits of a quantized weight where none are asked for."""
ROW, AUTO = "row", "auto"
AUTO_GROUP_SIZE = 128
"""Input columns that share a scale where that is left to the program and weights are quantized."""


def read_layer_sparsity(text: str) -> str | tuple[float, ...]:
    """How zeros are shared out: a way's name, or from a JSON file the share of every block.

    The file holds a list, or an object that has it as ``layer_sparsity``.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    if text in ALLOCATIONS:
        return text
    return tuple(map(float, read_by_block(text, "layer_sparsity", int | float, "[0.6, 0.8]")))


def read_group_size(text: str) -> int | str | None:
    """How many input columns share a scale: a number, None for whole rows, or ``auto``.

    Raises:
        ValueError: it is something else.
    """
    if text == AUTO:
        return AUTO
    if text == ROW:
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"group_size {text!r} is no whole number, {ROW} or {AUTO}, e.g. {AUTO_GROUP_SIZE}"
        ) from None


def _check_layer_sparsity(given: str | tuple[float, ...], sparsity: SparsityPattern) -> None:
    require(
        sparsity.group is None,
        f"layer_sparsity gives shares of zeros, {sparsity} is N:M: drop one of the two",
    )
    if isinstance(given, str):
        require(
            given in ALLOCATIONS,
            f"layer_sparsity {given!r} is none of {', '.join(ALLOCATIONS)}",
        )
        return
    for share in given:
        require(0 <= share <= 1, f"layer_sparsity {share} is outside 0 to 1")
    mean = sum(given) / len(given)
    require(
        abs(mean - sparsity.fraction) < 1e-3,
        f"layer_sparsity has mean {mean:.4g}, sparsity is {sparsity}: use --sparsity {mean:.4g}",
    )


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """How one expert's weight is pruned and quantized."""

    sparsity: SparsityPattern = setting(
        SparsityPattern(fraction=0.5),
        "Share of the weights that are set to zero (such as 0.7), or N:M for N zeros in every M "
        "consecutive weights of a row (such as 2:4 or '(2, 4)').",
        short=("-s",),
        metavar="S",
        parse=SparsityPattern.parse,
        group="pruning",
    )
    layer_sparsity: str | tuple[float, ...] = setting(
        UNIFORM,
        "How zeros are shared out over the blocks, with the sparsity as their mean: uniform gives "
        "every block the same share, measured gives it a share by what the model loses when that "
        "block alone is pruned (N:M stays uniform), and a file names the share of every block "
        "(what the allocate command writes, or a JSON list).",
        metavar="HOW",
        parse=read_layer_sparsity,
        group="pruning",
    )
    expert_sparsity: str | tuple[dict[str, tuple[float, ...]], ...] = setting(
        UNIFORM,
        "How zeros are shared out over a linear's experts, with the block's share as the mean over "
        "tokens: uniform is the same for all, measured by what tokens lose (N:M stays uniform).",
        metavar="HOW",
        choices=(UNIFORM, MEASURED),
        group="pruning",
    )
    pruner: str = setting(
        "sparsegpt",
        "How weights are pruned: "
        + "; ".join(f"{name} {traits.help}" for name, traits in PRUNERS.items())
        + ".",
        choices=PRUNERS,
        group="pruning",
    )
    solver_iterations: int = setting(
        PRUNERS["admm"].defaults["solver_iterations"],
        "Iterations of the solver of the admm pruner.",
        metavar="N",
        group="pruning",
    )
    bits: int | None = setting(
        None,
        "Bits of every kept weight, 2 to 8.",
        short=("-b",),
        metavar="BITS",
        meanings={None: f"{QUANTIZED_BITS} with --quantize, else weights are not quantized"},
        group="quantization",
    )
    symmetric: bool = setting(
        False,
        "Quantize to a symmetric grid, with the zero point in its middle, in place of an "
        "asymmetric one.",
        group="quantization",
    )
    group_size: int | None = setting(
        None,
        f"Input columns that share a scale: a number; {ROW} is one scale for an output row, and "
        f"{AUTO} {AUTO_GROUP_SIZE} columns where weights are quantized.",
        metavar="COLUMNS",
        parse=read_group_size,
        meanings={None: ROW},
        group="quantization",
    )
    act_order: bool = setting(
        False,
        "Sweep columns by falling Hessian diagonal; groups of columns stay where they were.",
        group="quantization",
    )
    block_size: int = setting(
        128, "Columns in a lazy block of the sweep.", metavar="COLUMNS", group="pruning"
    )
    damping_fraction: float = setting(
        0.01,
        "Share of the mean Hessian diagonal that is added to the diagonal.",
        metavar="SHARE",
        group="pruning",
    )
    min_tokens_per_expert: int | None = setting(
        None,
        "An expert with fewer tokens than this uses the Hessian of its whole group.",
        metavar="TOKENS",
        meanings={None: "an eighth of the input width; 1 with --shrink-hessians"},
        group="experts",
    )
    shrink_hessians: bool = setting(
        False,
        "Draw the Hessian of every expert towards that of its group, by a Ledoit-Wolf estimate of "
        "what the expert's tokens leave uncertain.",
        group="experts",
    )
    weigh_outputs: bool = setting(
        False,
        "Let an error of a linear's output count for as much as the block's output depends on it, "
        "where zeros may lie anywhere.",
        group="pruning",
    )
    expert_biases: bool = setting(
        False,
        "Give every expert a bias, by which its outputs have the dense ones' mean on its tokens, "
        "and make its weights for how inputs differ from theirs; one expert alone has none.",
        group="experts",
    )
    permute_channels: bool = setting(
        False,
        "Where sparsity is N:M, take the inputs of every group of linears in an order by which the "
        "weights that matter do not share the same M columns.",
        group="pruning",
    )

    def __post_init__(self) -> None:
        """Check kinds and bounds."""
        check_kinds(self)
        as_given: Any = self.group_size
        if as_given == AUTO:
            size = None if self.bits is None else AUTO_GROUP_SIZE
            object.__setattr__(self, "group_size", size)
        require(
            self.bits is None or 2 <= self.bits <= 8,
            f"bits {self.bits} is outside 2 to 8: use --bits 4, or leave --quantize away",
        )
        require(self.block_size >= 1, f"block_size {self.block_size} must be at least 1, e.g. 128")
        require(
            math.isfinite(self.damping_fraction) and 0 < self.damping_fraction <= 10,
            f"damping_fraction {self.damping_fraction} is outside 0 to 10, e.g. 0.01",
        )
        require(
            self.group_size is None or self.group_size >= 1,
            f"group_size {self.group_size} must be at least 1, e.g. 128",
        )
        require(
            self.min_tokens_per_expert is None or self.min_tokens_per_expert >= 0,
            f"min_tokens_per_expert {self.min_tokens_per_expert} must not be negative",
        )
        require(
            PRUNERS[self.pruner].takes_grid or (self.bits is None and not self.act_order),
            f"pruner {self.pruner} leaves kept weights as they are: drop --quantize and "
            "--act-order, or use --pruner sparsegpt",
        )
        require(
            1 <= self.solver_iterations <= 1000,
            f"solver_iterations {self.solver_iterations} is outside 1 to 1000, e.g. 10",
        )
        group = self.sparsity.group
        if self.layer_sparsity != UNIFORM:
            _check_layer_sparsity(self.layer_sparsity, self.sparsity)
        if group is not None:
            require(
                self.block_size % group == 0,
                f"sparsity {self.sparsity}: M = {group} must divide block_size "
                f"{self.block_size}; use --block-size {max(1, self.block_size // group) * group}",
            )
            require(
                not self.act_order,
                f"act_order reorders columns, which N:M sparsity {self.sparsity} forbids: "
                "drop one of the two",
            )

    def check_layers(self, num_layers: int) -> None:
        """Answer a list of blocks' sparsities that is another model's.

        Raises:
            ValueError: it has another length.
        """
        require_layers("layer_sparsity", self.shares, num_layers)

    def at(self, layer: int) -> CompressionConfig:
        """The settings of one block, by its number from 0."""
        if not self.shares:
            return self
        pattern = SparsityPattern(fraction=self.shares[layer])
        return dataclasses.replace(self, sparsity=pattern, layer_sparsity=UNIFORM)

    def shares_of_experts(self, layer: int) -> dict[str, tuple[float, ...]]:
        """Share of zeros of every expert by a group's first linear, where they are not alike."""
        return {} if isinstance(self.expert_sparsity, str) else self.expert_sparsity[layer]

    def shares_out(self, *, is_routed: bool) -> bool:
        """Whether a group's experts get shares of zeros by what they lose, see ``weighs``."""
        return self.expert_sparsity == MEASURED and self._is_free and not is_routed

    @property
    def _is_free(self) -> bool:
        """Whether zeros may lie anywhere."""
        return self.sparsity.group is None and 0 < self.sparsity.fraction < 1

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of zeros of every block; empty where all are alike, or still to be measured."""
        return () if isinstance(self.layer_sparsity, str) else self.layer_sparsity

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CompressionConfig:
        """Read back what ``dataclasses.asdict`` gave, also through JSON."""
        given = dict(data)
        given["sparsity"] = SparsityPattern(**given["sparsity"])
        # Earlier runs had the way under a name of its own, and an empty list for no shares.
        way = given.pop("allocation", UNIFORM)
        shares = given.get("layer_sparsity", UNIFORM)
        given["layer_sparsity"] = shares if isinstance(shares, str) else tuple(shares) or way
        given["expert_sparsity"] = _with_tuples(given.get("expert_sparsity", UNIFORM))
        return cls(**given)

    def weighs(self, level: int, *, is_routed: bool) -> bool:
        """Whether outputs of a group's linears are weighed.

        Those behind others put out what the block does, and rows of N:M have equal shares of zeros
        anyway. Pruners that leave weights as they are, and take no grid, compare no errors. For
        the experts of a mixture the block would have to run once each.

        Args:
            level: of the group.
            is_routed: whether its linears are those of a mixture's experts.
        """
        compares = PRUNERS[self.pruner].takes_grid
        return self.weigh_outputs and compares and self._is_free and level == 0 and not is_routed

    @property
    def changes_weights(self) -> bool:
        """Whether any weight is removed or rounded."""
        return self.sparsity.fraction > 0 or self.bits is not None

    @property
    def permutes(self) -> bool:
        """Whether inputs are taken in an order of their own: where it makes a difference."""
        is_n_m = self.sparsity.group is not None
        return self.permute_channels and is_n_m and 0 < self.sparsity.fraction < 1

    def min_tokens(self, width: int) -> int:
        """Tokens below which an expert of ``width`` input features is starved."""
        if self.min_tokens_per_expert is not None:
            return self.min_tokens_per_expert
        return 1 if self.shrink_hessians else max(1, width // 8)


def _with_tuples(given: str | list[dict[str, list[float]]]) -> Any:
    """Shares of experts in the form that they have beside JSON."""
    if isinstance(given, str):
        return given
    return tuple({name: tuple(shares) for name, shares in groups.items()} for groups in given)
