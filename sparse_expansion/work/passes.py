"""Windows through single blocks: hidden states in and out, and what is captured on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from sparse_expansion.algorithms.hessian import map_tensors
from sparse_expansion.algorithms.perplexity import window_nll
from sparse_expansion.data.activations import (
    AllInputsSeenError,
    AttentionOutputs,
    CapturedRows,
    GroupInputs,
    copy_outside_heap,
)
from sparse_expansion.data.sensitivities import OutputSensitivities
from sparse_expansion.data.transfers import put, settle, to_device
from sparse_expansion.model.block_linears import linear_shape
from sparse_expansion.model.families import LinearGroup
from sparse_expansion.run_files import ExpertRange
from sparse_expansion.types import HessianSum, NllSum
from sparse_expansion.work.blocks import expanded_before
from sparse_expansion.work.captures import ATTENTION, LACKING, UPSTREAM
from sparse_expansion.work.context import DENSE, WorkContext
from sparse_expansion.work.routers import read_router
from sparse_expansion.work.sums import CHUNK_TOKENS, evenly_spaced, route_all, shuffled


def embed_windows(context: WorkContext, windows: torch.Tensor, model: str = DENSE) -> torch.Tensor:
    """Hidden states ``[N, L, D]`` that enter the first block, on the device if they may stay."""
    shell = context.shell(model)
    hidden: torch.Tensor | None = None
    for part in shell.batches(windows):
        found = shell.embed(windows[part])
        if hidden is None:
            hidden = context.buffers.empty((*windows.shape, found.shape[-1]), found.dtype)
        hidden[part] = found
    assert hidden is not None
    return hidden


def own_copy(context: WorkContext, hidden: torch.Tensor) -> torch.Tensor:
    """A copy of hidden states to write to, on the device if it may stay there."""
    return context.buffers.empty(tuple(hidden.shape), hidden.dtype).copy_(hidden)


def pass_through(
    context: WorkContext,
    layer: int,
    block: nn.Module,
    windows: torch.Tensor,
    hidden: torch.Tensor,
    model: str = DENSE,
) -> None:
    """Run a block on the hidden states of windows, in place."""
    shell = context.shell(model)
    for part in shell.batches(windows):
        call = shell.call(layer, windows[part])
        hidden[part] = call.run(block, to_device(hidden[part], context.device))


def score_windows(
    context: WorkContext, windows: torch.Tensor, hidden: torch.Tensor, model: str = DENSE
) -> list[NllSum]:
    """Loss of every window, from what the last block put out."""
    nll: list[NllSum] = []
    for index in range(len(windows)):
        # One window at a time: the logits of a batch are larger than anything before them.
        part = slice(index, index + 1)
        logits = context.shell(model).head(windows[part], hidden[part])
        nll += window_nll(logits, windows[part].to(logits.device))
    return nll


def capture_block(context: WorkContext, layer: int, shard: int) -> torch.Tensor | None:
    """Run the dense block on a shard and keep its groups' inputs.

    Returns:
        Its output on the device, unless the next block gets the compressed block's. Attention's
        outputs are kept for that one then.
    """
    context.captures.make_room(layer)
    shell = context.shell()
    stop = context.config.calibration.follows_compression
    out, found = run_block(
        context, layer, shard, context.dense_block(layer), shell.groups(layer), stop=stop
    )
    context.captures.keep(layer, shard, found)
    return out


def run_block(
    context: WorkContext,
    layer: int,
    shard: int,
    block: nn.Module,
    groups: tuple[LinearGroup, ...] = (),
    *,
    stop: bool = False,
    sensitivities: OutputSensitivities | None = None,
    hidden: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """A block's output on a shard's hidden states, on the device, and the inputs of groups in it.

    Attention's outputs are taken from the shard's captured activations (but for other states than
    these are of), or are among what is returned where the run stops.

    Args:
        context: of the worker.
        layer: number of the block.
        shard: of the windows.
        block: dense, or with compressed linears.
        groups: whose inputs are wanted.
        stop: before the last of these groups; there is no output then.
        sensitivities: of the block, which are added up and stop it; there is no output then.
        hidden: states to run on in place of those that the run's blocks are calibrated on.
    """
    shell, tokens = context.shell(), context.shard_tokens(shard)
    kept_TD: torch.Tensor | None = None
    if hidden is None:
        hidden = context.read_hidden(layer, shard)
        kept_TD = (context.captures.get(layer, shard) or {}).get(ATTENTION)
    is_stopped = stop or sensitivities is not None
    out = None if is_stopped else torch.empty_like(hidden, device=context.device)
    captured = CapturedRows(context.buffers, tokens.numel())
    routed = {group.name for group in groups if group.is_routed}
    row = 0
    with (
        torch.no_grad(),
        sensitivities or contextlib.nullcontext(),
        GroupInputs(block, groups, stop=stop) as seen,
        AttentionOutputs(
            block,
            shell.family.attention,
            form=shell.family.attention_output,
            replays=kept_TD is not None,
        ) as attention,
    ):
        for part in shell.batches(tokens):
            call = shell.call(layer, tokens[part])
            count = tokens[part].numel()
            rows = slice(row, row + count)
            if kept_TD is not None:
                kept_here = to_device(kept_TD[rows], context.device)
                attention.output = kept_here.view(hidden[part].shape)
            with contextlib.suppress(AllInputsSeenError):
                found = call.run(block, to_device(hidden[part], context.device))
                if out is not None:
                    out[part] = found
            if sensitivities is not None:
                sensitivities.add_up(rows)
            made = seen.take()
            if stop and kept_TD is None:
                assert attention.output is not None
                made[ATTENTION] = attention.output.flatten(0, 1)
            for name, X_TD in made.items():
                captured.put(name, X_TD, None if name in routed else rows)
            row += count
    settle(context.device)
    found_rows = captured.take()
    for group in groups:
        # An expert of a mixture may have got no token at all.
        if group.name not in found_rows:
            width = linear_shape(block, group.linears[0])[1]
            found_rows[group.name] = context.buffers.allocate((0, width), hidden.dtype)
    return out, found_rows


def captured_inputs(
    context: WorkContext,
    layer: int,
    shard: int,
    level: int = 0,
    recaptured: Sequence[ExpertRange] | None = None,
) -> dict[str, torch.Tensor]:
    """Inputs ``[T, D]`` by group, captured again where this worker does not have them.

    With ranges of experts the inputs of a level's groups are those behind the compressed groups of
    earlier levels. Under their names and ``LACKING`` is then what the outputs of the dense linears
    for these inputs lack, ``[T, O]`` over all linears of the group: they have other ones in the
    dense block. Where blocks make up for all before them, there is under ``UPSTREAM`` what the
    block's output lacks of the dense model's besides, ``[S, O]`` for a sample of the tokens.
    """
    if context.captures.get(layer, shard) is None:
        capture_block(context, layer, shard)
    captured = context.captures.get(layer, shard)
    assert captured is not None
    groups = tuple(group for group in context.shell().groups(layer) if group.level == level)
    if recaptured is not None and groups[0].name + LACKING not in captured:
        block = expanded_before(context, layer, level, recaptured)
        # Nothing comes before the first block.
        scale = context.output_scale if layer else None
        out, found = run_block(context, layer, shard, block, groups, stop=scale is None)
        for group in groups:
            dense_TD = captured[group.name]
            lacking_TO = _lacking(context, layer, group, dense_TD, found[group.name])
            context.buffers.release(dense_TD)
            found[group.name + LACKING] = lacking_TO
            if out is not None and scale is not None:
                upstream_SO = _upstream(context, layer, shard, out, scale, lacking_TO)
                found[group.name + UPSTREAM] = upstream_SO
        captured |= found
    return captured


def _lacking(
    context: WorkContext,
    layer: int,
    group: LinearGroup,
    dense_TD: torch.Tensor,
    X_TD: torch.Tensor,
) -> torch.Tensor:
    """What dense linears put out for the dense block's inputs, less that for these."""
    weights = [context.dense_weight(layer, name).to(X_TD.dtype) for name in group.linears]
    rows = sum(map(len, weights))
    lacking_TO = context.buffers.allocate((len(X_TD), rows), X_TD.dtype)
    parts = (tensor.split(CHUNK_TOKENS) for tensor in (lacking_TO, dense_TD, X_TD))
    for lacking, dense, here in zip(*parts, strict=True):
        # The two may be in different memories: one fits the budget, the other is over it.
        change = to_device(dense, context.device) - to_device(here, context.device)
        put(lacking, torch.cat([change @ weight.T for weight in weights], dim=1))
    settle(context.device)
    return lacking_TO


def _upstream(
    context: WorkContext,
    layer: int,
    shard: int,
    out: torch.Tensor,
    scale: float,
    lacking_TO: torch.Tensor,
) -> torch.Tensor:
    """What a block's output lacks of the dense model's because of the blocks before it.

    Args:
        context: of the worker.
        layer: number of the block.
        shard: of the windows.
        out: the block's output ``[N, L, D]`` with its last linear dense.
        scale: what that linear's output is multiplied with before it is added.
        lacking_TO: what that linear's output lacks because of the block's earlier ones.

    Returns:
        For the shard's sample of tokens, in units of the linear's output, float32.
    """
    wanted = context.read_dense_hidden(layer + 1, shard)
    chosen = sample_places(context, shard, len(lacking_TO))
    dense_SO, here_SO, lacking_SO = (
        to_device(rows_of(part, chosen), context.device).float()
        for part in (wanted.flatten(0, 1), out.flatten(0, 1), lacking_TO)
    )
    upstream_SO = (dense_SO - here_SO) / scale - lacking_SO
    kept_SO = context.buffers.allocate(tuple(upstream_SO.shape), upstream_SO.dtype)
    put(kept_SO, upstream_SO)
    settle(context.device)
    return kept_SO


def sample_rows(context: WorkContext, shard: int, X_TD: torch.Tensor) -> torch.Tensor:
    """The shard's share of the ``fit_tokens`` rows that routers are fitted on.

    Of an expert's rows in a mixture these are as many, or all where there are fewer.
    """
    return held(context, rows_of(X_TD, sample_places(context, shard, len(X_TD))))


def sample_places(context: WorkContext, shard: int, count: int) -> torch.Tensor:
    """Which of so many rows of a shard are its sample."""
    calibration = context.config.calibration
    tokens = calibration.windows_of(shard) * calibration.seqlen
    share = max(1, context.config.routing.fit_tokens * tokens // calibration.num_tokens)
    return evenly_spaced(count, share)


def shard_labels(context: WorkContext, layer: int, shard: int, group: str) -> torch.Tensor:
    """Cluster of every token of a shard ``[T]`` (int16), kept beside the captured activations.

    They are on the worker's device.
    """
    key = (layer, shard, group)
    labels = context.captures.labels
    if key not in labels:
        router = read_router(context, layer, group)
        X_TD = captured_inputs(context, layer, shard)[group]
        labels_T = route_all(X_TD, router, context.device)
        if context.config.routing.clustering == "random":
            name = f"{context.config.calibration.seed}/{layer}/{group}/{shard}"
            labels_T = shuffled(labels_T, name)
        # Those of all shards of a block are kept: small, there may be millions of tokens.
        labels[key] = labels_T.to(torch.int16)
    return labels[key]


def shard_sensitivities(
    context: WorkContext, layer: int, shard: int, group: str
) -> list[torch.Tensor]:
    """How much the dense block depends on the outputs of a group's linears, on a shard.

    Returns:
        Of every linear the sums over every cluster's tokens ``[K, O]``.
    """
    labels_T = shard_labels(context, layer, shard, group)
    behind = {}
    for other in context.shell().groups(layer):
        if other.level and not other.is_routed:
            weights = [context.dense_weight(layer, name).float() for name in other.linears]
            squares_D = torch.cat(weights).square().sum(dim=0)
            behind[other.linears[0]] = squares_D.sqrt().to(context.device)
    block = context.dense_block(layer)
    linears = context.group(layer, group).linears
    clusters = context.config.routing.at(layer).num_clusters
    found = OutputSensitivities(block, linears, behind, labels_T, clusters)
    run_block(context, layer, shard, block, sensitivities=found)
    return [found.squares_KO[name] for name in linears]


def rows_of(X_TD: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """A copy of some rows, in the memory where all of them are."""
    return X_TD[chosen.to(X_TD.device)]


def held(context: WorkContext, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is handed on, where it may stay until it is used."""
    return context.buffers.hold(copy_outside_heap(tensor))


def held_sum(context: WorkContext, total: HessianSum) -> HessianSum:
    """A Hessian sum that is handed on, where it may stay until it is used."""
    return map_tensors(total, partial(held, context))
