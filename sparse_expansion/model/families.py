"""What differs between architectures, in one place: where the blocks are, and their MLP linears.

A new family is one ``Family`` entry in ``FAMILIES``: the module path of its block list and, for
each set of MLP linears that read the same input, their names inside a block, and its attention's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class LinearGroup:
    """Linears of a block that share one input, hence one router and one Hessian."""

    linears: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name in unit keys and file names: the first linear's, and the others' last parts."""
        first, *rest = self.linears
        return "+".join([first, *(name.rsplit(".", 1)[-1] for name in rest)])


@dataclass(frozen=True)
class Family:
    """One architecture's adapter."""

    model_types: tuple[str, ...]
    """``config.model_type`` values it serves."""
    blocks: str
    """Module path of the list of decoder blocks."""
    attention: str
    """A block's attention, which comes before its MLP."""
    groups: tuple[LinearGroup, ...]
    """The MLP's linear groups, in the order in which data passes through them."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Pairs of name prefixes that files and transformers versions use for one module."""


_GATED_MLP = (
    LinearGroup(("mlp.gate_proj", "mlp.up_proj")),
    LinearGroup(("mlp.down_proj",)),
)

FAMILIES: tuple[Family, ...] = (
    Family(
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        attention="attention",
        groups=(LinearGroup(("mlp.dense_h_to_4h",)), LinearGroup(("mlp.dense_4h_to_h",))),
        aliases=(("embed_out.", "lm_head."),),
    ),
    Family(
        model_types=("llama", "mistral", "qwen2", "qwen3"),
        blocks="model.layers",
        attention="self_attn",
        groups=_GATED_MLP,
    ),
    Family(
        model_types=("opt",),
        blocks="model.decoder.layers",
        attention="self_attn",
        groups=(LinearGroup(("fc1",)), LinearGroup(("fc2",))),
    ),
)


def family_of(model_type: str) -> Family:
    """The adapter for ``config.model_type``.

    Raises:
        ValueError: no adapter; the message says what to add.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise ValueError(
        f"architecture {model_type!r} is not supported (known: {known}): add a Family with its "
        "block list and its MLP linears to sparse_expansion/model/families.py, see "
        "docs/how-to.md"
    )


def block_list(model: nn.Module, family: Family) -> nn.ModuleList:
    """The model's list of decoder blocks.

    Raises:
        ValueError: the module path does not lead to a list of blocks.
    """
    try:
        blocks = model.get_submodule(family.blocks)
    except AttributeError:
        blocks = None
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(
            f"{type(model).__name__} has no block list {family.blocks!r}: the family's entry in "
            "sparse_expansion/model/families.py does not fit this transformers version"
        )
    return blocks


def linear_shape(block: nn.Module, name: str) -> tuple[int, int]:
    """``(O, D)`` of a block's linear, dense or expanded.

    Raises:
        ValueError: the block has no such linear.
    """
    try:
        linear: Any = block.get_submodule(name)
        return int(linear.out_features), int(linear.in_features)
    except AttributeError:
        raise ValueError(
            f"block {type(block).__name__} has no linear {name!r}: a variant (fused or "
            "mixture-of-experts MLP) that sparse_expansion/model/families.py does not describe"
        ) from None


def dense_linear(block: nn.Module, name: str) -> nn.Linear:
    """A block's dense linear."""
    linear = block.get_submodule(name)
    if not isinstance(linear, nn.Linear) or not isinstance(linear.weight, torch.Tensor):
        raise ValueError(f"{name} is {type(linear).__name__}, not a dense nn.Linear")
    return linear
