"""A group's router and grids as they are stored: names of their tensors, made and read back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparse_expansion.algorithms.channels import channel_permutation
from sparse_expansion.algorithms.quantization import AffineGrid
from sparse_expansion.data.transfers import to_device
from sparse_expansion.run_files import router_file, shares_file
from sparse_expansion.types import SHARE_DIGITS, HessianSum, Router
from sparse_expansion.work.context import WorkContext


def router_owner(context: WorkContext, layer: int, group: str) -> str:
    """Prefix of the router's tensors: the group's first linear owns it."""
    prefix = context.shell().block_prefix(layer)
    return f"{prefix}{context.group(layer, group).linears[0]}.router"


def columns_of(
    context: WorkContext, layer: int, group: str, gram: HessianSum
) -> torch.Tensor | None:
    """The order in which a group's experts take features, see ``types.Router``; None without one.

    Args:
        context: of the worker.
        layer: number of the block.
        group: name of the group.
        gram: Hessian sum of its inputs.
    """
    compression = context.config.compression
    if not compression.permutes:
        return None
    linears = context.group(layer, group).linears
    weights = [context.dense_weight(layer, linear) for linear in linears]
    return channel_permutation(weights, gram.sum_DD.diagonal(), compression.sparsity)


def router_tensors(router: Router, owner: str) -> dict[str, torch.Tensor]:
    """A router's tensors by the names that they are stored under."""
    tensors = {
        f"{owner}.mean": router.mean_D,
        f"{owner}.centroids": router.centroids_KP,
    }
    if router.components_PD is not None:
        tensors[f"{owner}.components"] = router.components_PD
    if router.columns_D is not None:
        tensors[f"{owner}.columns"] = router.columns_D
    return tensors


def grid_tensors(grid: AffineGrid, linear: str) -> dict[str, torch.Tensor]:
    """A grid's tensors by the names that they are stored under; ``linear`` is its full name."""
    return {f"{linear}.grid.scale": grid.scale_OG, f"{linear}.grid.zero_point": grid.zero_point_OG}


def read_router(context: WorkContext, layer: int, group: str) -> Router:
    """A group's router, on the worker's device."""
    stored = context.read(router_file(layer, group))
    owner = router_owner(context, layer, group)
    here = {key: to_device(tensor, context.device) for key, tensor in stored.items()}
    return Router(
        here[f"{owner}.mean"],
        here.get(f"{owner}.components"),
        here[f"{owner}.centroids"],
        here.get(f"{owner}.columns"),
    )


def shares_tensors(shares: Sequence[float], owner: str) -> dict[str, torch.Tensor]:
    """Experts' shares of zeros by the name that they are stored under."""
    return {f"{owner}.sparsity": torch.tensor(shares)}


def read_shares(context: WorkContext, layer: int, group: str) -> tuple[float, ...]:
    """Every expert's share of zeros, as it is counted by; empty where all have the same."""
    is_routed = context.group(layer, group).is_routed
    if not context.config.compression.shares_out(is_routed=is_routed):
        return ()
    stored = context.read(shares_file(layer, group))
    shares_K = stored[f"{router_owner(context, layer, group)}.sparsity"]
    return tuple(round(share, SHARE_DIGITS) for share in shares_K.tolist())


def read_grids(
    context: WorkContext, layer: int, group: str, width: int
) -> dict[str, AffineGrid | None]:
    """The grid of every linear of a group by name, on the worker's device; None when pruning only.

    Args:
        context: of the worker.
        layer: number of the block.
        group: name of the group.
        width: input features of its linears.
    """
    compression = context.compression(layer)
    linears = context.group(layer, group).linears
    if compression.bits is None:
        return dict.fromkeys(linears)
    stored = context.read(router_file(layer, group))
    prefix = context.shell().block_prefix(layer)
    size = min(compression.group_size or width, width)
    return {
        name: AffineGrid(
            to_device(stored[f"{prefix}{name}.grid.scale"], context.device),
            to_device(stored[f"{prefix}{name}.grid.zero_point"], context.device),
            compression.bits,
            size,
        )
        for name in linears
    }
