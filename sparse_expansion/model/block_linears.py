"""A block's linears, found by its family's entry: their names, their shapes, and the modules."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sparse_expansion.model.families import Family, LinearGroup


def block_list(model: nn.Module, family: Family) -> nn.ModuleList:
    """The model's list of decoder blocks.

    Raises:
        ValueError: the module path does not lead to a list of blocks.
    """
    # A model without a head is what stands under this name in one that has a head.
    base = f"{getattr(model, 'base_model_prefix', '')}."
    blocks: nn.Module | None = None
    for path in (family.blocks, family.blocks.removeprefix(base)):
        with contextlib.suppress(AttributeError):
            blocks = blocks or model.get_submodule(path)
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(
            f"{type(model).__name__} has no block list {family.blocks!r}: the family's entry in "
            "sparse_expansion/model/families.py does not fit this transformers version"
        )
    return blocks


def numbered_groups(
    block: nn.Module, family: Family, groups: tuple[LinearGroup, ...]
) -> tuple[LinearGroup, ...]:
    """Those of a family's groups that a block has, and experts' groups once for every expert.

    Args:
        block: of the form that ``plain_blocks`` gives it.
        family: of the model; without a mixture its blocks have all groups.
        groups: as of the family's entry.

    Returns:
        The groups by level; an entry's order among those of one level, experts by number.
    """
    if family.mixture is None:
        return groups
    found: list[LinearGroup] = []
    for group in groups:
        each = [group]
        if group.is_routed:
            experts: Any = ()
            with contextlib.suppress(AttributeError):
                experts = block.get_submodule(family.mixture.experts)
            each = [
                replace(group, linears=tuple(name.replace("*", str(e)) for name in group.linears))
                for e in range(len(experts))
            ]
        found += [one for one in each if _has_module(block, one.linears[0])]
    return tuple(sorted(found, key=lambda group: group.level))


def block_groups(block: nn.Module, family: Family) -> tuple[LinearGroup, ...]:
    """The linear groups of a block's MLP, by level: the inputs of later levels pass earlier ones.

    Raises:
        ValueError: the block has none of its family's groups.
    """
    found = numbered_groups(block, family, family.groups)
    if not found:
        linear_shape(block, family.groups[0].linears[0])
    return found


def _has_module(block: nn.Module, name: str) -> bool:
    try:
        block.get_submodule(name)
    except AttributeError:
        return False
    return True


def linear_shape(block: nn.Module, name: str) -> tuple[int, int]:
    """Output and input width ``(O, D)`` of a block's linear, dense or expanded.

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
    """A block's dense linear.

    Raises:
        ValueError: the linear is of another kind, for example expanded.
    """
    linear = block.get_submodule(name)
    if not isinstance(linear, nn.Linear) or not isinstance(linear.weight, torch.Tensor):
        raise ValueError(f"{name} is {type(linear).__name__}, not a dense nn.Linear")
    return linear
