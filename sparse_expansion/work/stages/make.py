"""Stages that make what is stored: experts, their training, and everything else of the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, cast

import torch

from sparse_expansion.algorithms.centring import InputMeans
from sparse_expansion.algorithms.compress import ExpertWeights
from sparse_expansion.algorithms.expert_shares import compress_by_share
from sparse_expansion.algorithms.hessian import merge_hessians, permuted
from sparse_expansion.algorithms.output_weights import sensitivity_weights
from sparse_expansion.algorithms.packing.experts import pack_expert
from sparse_expansion.algorithms.packing.layout import PackedLayout
from sparse_expansion.algorithms.shrinkage import Regulariser
from sparse_expansion.data.transfers import to_device
from sparse_expansion.model.expansion import guard_tensors
from sparse_expansion.model.refinement import STEP_TOKENS, Batch, refine, trainable_block
from sparse_expansion.run_files import ExpertRange, experts_file, trunk_file
from sparse_expansion.types import HessianSum, in_columns
from sparse_expansion.work.blocks import expanded_block
from sparse_expansion.work.context import WorkContext
from sparse_expansion.work.passes import rows_of
from sparse_expansion.work.registry import Done, stage
from sparse_expansion.work.routers import read_grids, read_router, read_shares
from sparse_expansion.work.sums import added_up, joined, sum_hessians, sum_to_device

TRUNK_SHARD_BYTES = 4 << 30
"""Bytes after which a file of the model's other tensors is full."""


@stage(is_final=True)
def experts(
    context: WorkContext,
    gram: HessianSum,
    *shards: list[torch.Tensor | HessianSum],
    layer: int,
    group: str,
    experts: ExpertRange,
    weighed: int = 0,
    corrected: bool = False,
) -> Done:
    """Sum the Hessians in shard order, compress, and write the experts' file.

    The first of the shards' inputs, as many as ``weighed``, are how much the block depends on the
    outputs of all clusters' experts, linear by linear, see ``weigh``. Where it is ``corrected``,
    how the linear makes up for the blocks before stands in front of them.
    """
    correction, shards = shards[:corrected], shards[corrected:]
    squares = added_up(cast("tuple[list[torch.Tensor], ...]", shards[:weighed]), context.device)
    shards = shards[weighed:]
    compression = context.compression(layer)
    width = gram.sum_DD.shape[0]
    columns_D = read_router(context, layer, group).columns_D
    here = slice(experts[0], experts[1] + 1)
    shares = read_shares(context, layer, group)[here]
    H_KDD, cross_KOD, means, stats = _expert_hessians(context, gram, shards, columns_D)
    weights = {
        name: in_columns(context.dense_weight(layer, name), columns_D)
        for name in context.group(layer, group).linears
    }
    # A linear that loses nothing is the dense one.
    if corrected and compression.changes_weights:
        parts = cast("list[torch.Tensor]", correction[0])
        added_OD, lacking_KO = (to_device(part, context.device) for part in parts)
        weights, means = _corrected(
            weights, means, in_columns(added_OD, columns_D), lacking_KO[here]
        )
    grids = read_grids(context, layer, group, width)
    made = compress_by_share(
        shares,
        weights,
        H_KDD,
        compression,
        grids,
        cross_KOD=cross_KOD,
        means=means,
        output_weights={
            name: sensitivity_weights(squares_KO[here], squares_KO.sum(dim=0))
            # Behind the linears' sums are the clusters' tokens.
            for name, squares_KO in zip(weights, squares[:-1], strict=bool(squares))
        },
        products=context.config.products,
    )
    stats["sparsity"] = compression.sparsity.fraction
    if shares:
        stats["shares"] = list(shares)
    stats["relative_error"] = {name: list(each.relative_error_K) for name, each in made.items()}
    for result in made.values():
        # What is told of the inputs is alike for all of them.
        stats["damping_fraction"] = list(result.damping_fraction_K)
        stats["damping_attempts"] = list(result.damping_attempts_K)
        stats["dead_features"] = list(result.num_dead_K)
    tensors = _tensors(context, layer, made, shares, experts[0])
    file = experts_file(layer, group, experts, is_draft=context.config.refines)
    # Read again by who runs the compressed block, or trains it.
    is_read = context.config.calibration.follows_compression or context.config.refines
    return Done(stats, files=context.write(file, tensors, read_in=layer if is_read else None))


def _corrected(
    weights: dict[str, torch.Tensor],
    means: InputMeans | None,
    added_OD: torch.Tensor,
    lacking_KO: torch.Tensor,
) -> tuple[dict[str, torch.Tensor], InputMeans | None]:
    """The dense weight that makes up for the blocks before, and means for its experts' biases."""
    weights = {name: W_OD.float() + added_OD for name, W_OD in weights.items()}
    # The mean over its tokens is the expert's own, whatever the weight makes of it.
    return weights, None if means is None else means.lacking(lacking_KO, added_OD)


def _expert_hessians(
    context: WorkContext,
    gram: HessianSum,
    shards: tuple[list[torch.Tensor | HessianSum], ...],
    columns_D: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, InputMeans | None, dict[str, Any]]:
    """Of a range of experts: Hessians ``[K, D, D]``, their cross sums, means, marker's facts.

    Features are in the order of ``columns_D``.
    """
    compression = context.config.compression
    width = gram.sum_DD.shape[0]
    floor = compression.min_tokens(width)
    H_KDD = torch.empty(len(shards[0]), width, width, device=context.device)
    cross_KOD: torch.Tensor | None = None
    regulariser = Regulariser(gram, compression)
    means: list[InputMeans] = []
    stats: dict[str, Any] = {"tokens": [], "starved": [], "group_share": []}
    for k, parts in enumerate(zip(*shards, strict=True)):
        # All shards hand on sums, or all hand on rows: one product of many rows is faster.
        sums = [part for part in parts if isinstance(part, HessianSum)]
        rows = [part for part in parts if torch.is_tensor(part)]
        merged = (
            merge_hessians(sum_to_device(part, context.device) for part in sums)
            if sums
            else sum_hessians(joined(rows, context.device), context.device, width)
        )
        stats["tokens"].append(merged.num_tokens)
        stats["starved"].append(merged.num_tokens < floor or not gram.num_tokens)
        merged, weight = regulariser.regularise(merged)
        stats["group_share"].append(weight)
        merged = permuted(merged, columns_D)
        H_KDD[k] = merged.sum_DD
        means.append(InputMeans.of(merged))
        if merged.cross_OD is not None:
            if cross_KOD is None:
                cross_KOD = merged.cross_OD.new_empty(len(H_KDD), *merged.cross_OD.shape)
            cross_KOD[k] = merged.cross_OD
        # Before the next one is made: for a wide layer each is gigabytes.
        del merged, sums, rows, parts
    all_means = InputMeans.joined(means) if compression.expert_biases else None
    return H_KDD, cross_KOD, all_means, stats


def _tensors(
    context: WorkContext,
    layer: int,
    made: dict[str, ExpertWeights],
    shares: Sequence[float],
    first: int,
) -> dict[str, torch.Tensor]:
    """The packed streams of experts, the first of which has a number, by name."""
    shell, compression = context.shell(), context.compression(layer)
    tensors: dict[str, torch.Tensor] = {}
    for name, result in made.items():
        num_experts, rows, columns = result.weight_KOD.shape
        layouts = PackedLayout.of_experts(rows, columns, compression, shares, num_experts)
        for k, layout in enumerate(layouts):
            packed = pack_expert(
                result.weight_KOD[k],
                result.kept_KOD[k],
                None if result.codes_KOD is None else result.codes_KOD[k],
                None if result.bias_KO is None else result.bias_KO[k],
                layout=layout,
                dtype=shell.dtype,
            )
            where = f"{shell.block_prefix(layer)}{name}.experts.{first + k}"
            tensors |= {f"{where}.{part}": value for part, value in packed.items()}
    return tensors


@stage(name="refine", is_final=True, replaces="experts", loads_block=True)
def refine_block(
    context: WorkContext, *, layer: int, experts: list[ExpertRange], seed: int
) -> Done:
    """Train a block's kept weights against the dense block; write its experts' final files."""
    shell = context.shell()
    groups, prefix = shell.groups(layer), shell.block_prefix(layer)
    block, linears = trainable_block(expanded_block(context, layer, experts, groups))
    calibration, settings = context.config.calibration, context.config.refinement
    windows = [calibration.windows_of(shard) for shard in range(calibration.num_shards)]
    size = max(1, STEP_TOKENS // calibration.seqlen)
    held = [held_windows(count) for count in windows]

    def batches(epoch: int | None) -> Iterator[Batch]:
        # One shard's hidden states at a time. Held out is what a shard ends with.
        generator = torch.Generator().manual_seed(seed + (epoch or 0))
        for shard in torch.randperm(len(windows), generator=generator).tolist():
            cut = windows[shard] - held[shard]
            order = torch.randperm(cut, generator=generator)
            if epoch is None:
                order = torch.arange(cut, windows[shard])
            hidden, tokens = context.read_hidden(layer, shard), context.shard_tokens(shard)
            for chosen in order.split(size) if len(order) else ():
                call = shell.call(layer, tokens[chosen])
                yield Batch(to_device(rows_of(hidden, chosen), context.device), call)

    per_epoch = sum(math.ceil((all_ - out) / size) for all_, out in zip(windows, held, strict=True))
    found = refine(
        block,
        linears,
        shell.load_block(layer),
        batches=batches,
        held_out=lambda: batches(None),
        num_steps=settings.finetune * per_epoch,
        epochs=settings.finetune,
        learning_rate=settings.finetune_rate,
    )
    files: dict[str, Any] = {}
    for group in groups:
        for part in experts:
            tensors = {
                f"{prefix}{name}.experts.{k}.{stream}": value
                for name in group.linears
                for k in range(part[0], part[1] + 1)
                for stream, value in linears[name].packed(k, shell.dtype).items()
            }
            name = experts_file(layer, group.name, part)
            files |= context.write(name, tensors, read_in=layer)
    return Done(stats=asdict(found), files=files)


def held_windows(count: int) -> int:
    """How many of a shard's windows are not trained on: an eighth, none of a single one."""
    return max(1, count // 8) if count > 1 else 0


@stage(is_final=True)
def trunk(context: WorkContext) -> Done:
    """Copy everything but the dense MLP weights, in files of a few gigabytes.

    The first of them has the guards in place of those weights, see ``guard_tensors``.
    """
    shell = context.shell()
    done = Done()
    expanded = shell.expanded_names()
    pending = {
        shell.stored_name(name): guard
        for name, guard in guard_tensors(expanded, shell.dtype).items()
    }
    size = 0
    names = shell.trunk_names()
    for number, name in enumerate(names):
        tensor = shell.read(name)
        pending[shell.stored_name(name)] = tensor
        size += tensor.numel() * tensor.element_size()
        if size >= TRUNK_SHARD_BYTES or number + 1 == len(names):
            done.files |= context.write(trunk_file(len(done.files)), pending)
            pending, size = {}, 0
    return done
