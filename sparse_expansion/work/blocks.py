"""Blocks with other linears than the dense ones: expanded, or with single weights replaced."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from sparse_expansion.model.expansion import expand_block
from sparse_expansion.model.expert_cache import ExpertCache
from sparse_expansion.model.families import LinearGroup
from sparse_expansion.run_files import ExpertRange, experts_file, router_file, shares_file
from sparse_expansion.work.context import WorkContext
from sparse_expansion.work.routers import read_shares


def expanded_block(
    context: WorkContext,
    layer: int,
    experts: Sequence[ExpertRange],
    groups: tuple[LinearGroup, ...],
    *,
    is_draft: bool = True,
) -> nn.Module:
    """A block with groups' experts as they were committed: the same modules that are served.

    Other linears are the dense ones.

    Args:
        context: of the worker.
        layer: number of the block.
        experts: all ranges of a group's experts.
        groups: those to take.
        is_draft: take them as they are before their training, where there is one.
    """
    shell = context.shell()
    block = copy.deepcopy(shell.meta_block(layer))
    shares = {group.linears[0]: read_shares(context, layer, group.name) for group in groups}
    expand_block(
        block,
        tuple(group.linears for group in groups),
        context.compression(layer),
        context.config.routing.at(layer),
        cache=ExpertCache(None),
        dtype=shell.dtype,
        shares=shares,
    )
    prefix = shell.block_prefix(layer)
    drafts = is_draft and context.config.refines
    state: dict[str, torch.Tensor] = {}
    for group in groups:
        names = [router_file(layer, group.name)]
        if shares[group.linears[0]]:
            names.append(shares_file(layer, group.name))
        names += [experts_file(layer, group.name, part, is_draft=drafts) for part in experts]
        for name in names:
            for key, tensor in context.read(name).items():
                state[key.removeprefix(prefix)] = tensor
    for name in block.state_dict():
        if name not in state:
            state[name] = context.dense_tensor(layer, name)
    block.load_state_dict(state, strict=True, assign=True)
    return block.to(context.device)


def expanded_before(
    context: WorkContext,
    layer: int,
    level: int | None,
    experts: Sequence[ExpertRange],
    *,
    is_draft: bool = True,
) -> nn.Module:
    """``expanded_block`` of the groups before a level (None: of all), kept for the next shard."""
    key = layer, level
    if context.kept_block is None or context.kept_block[0] != key:
        # The one before goes first: two of them may not fit.
        context.kept_block = None
        groups = tuple(
            group for group in context.shell().groups(layer) if level is None or group.level < level
        )
        block = expanded_block(context, layer, experts, groups, is_draft=is_draft)
        context.kept_block = key, block
    return context.kept_block[1]


def set_weight(linear: nn.Module, weight: torch.Tensor) -> None:
    """Give a dense linear another weight, as it is stored: never one that is mapped from a file."""
    linear.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
