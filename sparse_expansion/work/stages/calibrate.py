"""Stages up to what experts are made on: hidden states, captured inputs, routers, sums."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sparse_expansion.algorithms.expert_shares import cluster_means, expert_shares
from sparse_expansion.algorithms.hessian import check_finite, map_tensors, merge_hessians
from sparse_expansion.algorithms.quantization import fit_grid
from sparse_expansion.data.transfers import to_device
from sparse_expansion.run_files import ExpertRange, range_name, router_file, shares_file
from sparse_expansion.types import HessianSum, in_columns
from sparse_expansion.work.blocks import expanded_before
from sparse_expansion.work.captures import LACKING, UPSTREAM
from sparse_expansion.work.context import WorkContext
from sparse_expansion.work.passes import (
    capture_block,
    captured_inputs,
    embed_windows,
    held,
    held_sum,
    rows_of,
    run_block,
    sample_rows,
    shard_labels,
    shard_sensitivities,
)
from sparse_expansion.work.registry import Done, stage
from sparse_expansion.work.routers import (
    columns_of,
    grid_tensors,
    router_owner,
    router_tensors,
    shares_tensors,
)
from sparse_expansion.work.sums import (
    added_up,
    cluster_moments,
    fit_correction,
    fit_router,
    sum_hessians,
    sum_to_device,
)


@stage()
def embed(context: WorkContext, *, shard: int) -> Done:
    """Write the hidden states that enter the first block, for one shard of windows."""
    hidden = embed_windows(context, context.shard_tokens(shard))
    return Done(files=context.write_hidden(0, shard, hidden))


@stage(makes_captures=True, loads_block=True)
def capture(context: WorkContext, *, layer: int, shard: int) -> Done:
    """Run the dense block on one shard; keep its groups' inputs; hand on a sample of them.

    Where blocks make up for all before them, the dense model's own hidden states pass through too.
    """
    calibration = context.config.calibration
    done = Done(stats={"tokens": calibration.windows_of(shard) * calibration.seqlen})
    hidden = capture_block(context, layer, shard)
    if hidden is not None and layer + 1 < context.shell().num_blocks:
        done.files = context.write_hidden(layer + 1, shard, hidden)
    if context.output_scale is not None:
        dense = context.read_dense_hidden(layer, shard)
        out, _ = run_block(context, layer, shard, context.dense_block(layer), hidden=dense)
        assert out is not None
        done.files |= context.write_dense_hidden(layer + 1, shard, out)
    captured = captured_inputs(context, layer, shard)
    for X_TD in captured.values():
        check_finite(X_TD)
    for group in context.shell().groups(layer):
        # Later groups' routers wait for the inputs that they will have.
        if not calibration.is_paired(group.level):
            done.outputs[group.name] = sample_rows(context, shard, captured[group.name])
    return done


@stage(keeps_expanded_block=True, loads_block=True)
def recapture(
    context: WorkContext, *, layer: int, shard: int, level: int, experts: list[ExpertRange]
) -> Done:
    """Capture a level's inputs behind the compressed groups before it; hand on samples of them."""
    captured = captured_inputs(context, layer, shard, level, experts)
    done = Done()
    for group in context.shell().groups(layer):
        if group.level == level:
            check_finite(captured[group.name])
            sample = sample_rows(context, shard, captured[group.name])
            upstream_SO = captured.get(group.name + UPSTREAM)
            done.outputs[group.name] = (
                sample if upstream_SO is None else [sample, held(context, upstream_SO)]
            )
    return done


@stage(is_final=True)
def router(
    context: WorkContext,
    *inputs: torch.Tensor | list[torch.Tensor],
    layer: int,
    group: str,
    seed: int,
) -> Done:
    """Fit PCA and KMeans on all shards' samples; write the router and the dense weights' grids.

    The order of the experts' columns is chosen here too, where they have one of their own. What
    their shares of zeros are found by is handed on, and how a linear makes up for the blocks before
    where what these have changed comes with the samples.
    """
    samples = [part if torch.is_tensor(part) else part[0] for part in inputs]
    upstream = [part[1] for part in inputs if not torch.is_tensor(part)]
    linears, compression = context.group(layer, group), context.config.compression
    found, gram, fit_tokens = fit_router(
        samples,
        context.config.routing.at(layer),
        device=context.device,
        seed=seed,
        is_routed=linears.is_routed,
    )
    shares_out = compression.shares_out(is_routed=linears.is_routed)
    if compression.expert_biases or shares_out:
        clusters = cluster_moments(samples, found, context.device)
    if compression.expert_biases:
        gram = clusters.about_means(gram)
    prefix = context.shell().block_prefix(layer)
    stats: dict[str, Any] = {"fit_tokens": fit_tokens}
    found = replace(found, columns_D=columns_of(context, layer, group, gram))
    tensors = router_tensors(found, router_owner(context, layer, group))
    if compression.bits is not None:
        for linear in linears.linears:
            grid = fit_grid(
                in_columns(context.dense_weight(layer, linear), found.columns_D).float(),
                bits=compression.bits,
                symmetric=compression.symmetric,
                group_size=compression.group_size,
            )
            tensors |= grid_tensors(grid, prefix + linear)
    outputs: dict[str, Any] = {"gram": map_tensors(gram, context.buffers.hold)}
    if upstream:
        correction = fit_correction(
            samples,
            upstream,
            found,
            gram,
            clusters if compression.expert_biases else None,
            damping=compression.damping_fraction,
            device=context.device,
        )
        outputs["correction"] = [held(context, tensor) for tensor in correction.tensors]
        stats["upstream"] = correction.facts
    if shares_out:
        outputs["clusters"] = [
            held(context, clusters.variance_KD),
            held(context, clusters.counts_K),
        ]
    return Done(
        stats=stats,
        outputs=outputs,
        files=context.write(router_file(layer, group), tensors, read_in=layer),
    )


@stage(loads_block=True)
def weigh(context: WorkContext, *, layer: int, shard: int, group: str) -> Done:
    """Hand on how much the dense block depends on a group's outputs, cluster by cluster.

    It is a list of every linear's sums over tokens ``[K, O]``, and behind them the tokens ``[K]``.
    """
    sums = shard_sensitivities(context, layer, shard, group)
    labels_T = shard_labels(context, layer, shard, group)
    sums.append(torch.bincount(labels_T, minlength=len(sums[0])).double())
    return Done(outputs={"outputs": [held(context, total) for total in sums]})


@stage(is_final=True)
def shares(
    context: WorkContext,
    clusters: list[torch.Tensor],
    *shards: list[torch.Tensor],
    layer: int,
    group: str,
) -> Done:
    """Share out zeros over a group's experts; write every expert's share.

    The clusters are the variances of their inputs and their numbers of tokens, on the router's
    sample. With shards errors count by what the block makes of them, see ``weigh``.
    """
    variance_KD, tokens_K = (to_device(part, context.device) for part in clusters)
    linears = context.group(layer, group).linears
    sums = added_up(shards, context.device)
    found = expert_shares(
        [context.dense_weight(layer, linear) for linear in linears],
        variance_KD,
        tokens_K,
        context.compression(layer).sparsity.fraction,
        sensitivities=[cluster_means(total_KO, sums[-1]) for total_KO in sums[:-1]],
    )
    tensors = shares_tensors(found, router_owner(context, layer, group))
    return Done(
        stats={"sparsity": found},
        files=context.write(shares_file(layer, group), tensors, read_in=layer),
    )


@stage()
def gather(
    context: WorkContext,
    *,
    layer: int,
    shard: int,
    group: str,
    ranges: list[ExpertRange],
    summed: bool,
    recaptured: list[ExpertRange] | None = None,
) -> Done:
    """Hand on one shard's inputs of ranges of experts: their rows, or the rows' Hessian sums.

    Where the inputs were captured again (behind the ranges of experts given), every row is followed
    by what the outputs for it lack.
    """
    level = context.group(layer, group).level
    inputs = captured_inputs(context, layer, shard, level, recaptured)
    X_TD, lacking_TO = inputs[group], inputs.get(group + LACKING)
    labels_T = shard_labels(context, layer, shard, group)
    done = Done()

    def inputs_of(expert: int) -> torch.Tensor | HessianSum:
        chosen = torch.nonzero(labels_T == expert).flatten()
        part_TE = rows_of(X_TD, chosen)
        if lacking_TO is not None:
            # The two may be in different memories: one fits the budget, the other is over it.
            lacking_part_TO = rows_of(lacking_TO, chosen).to(part_TE.device)
            part_TE = torch.cat([part_TE, lacking_part_TO], dim=1)
        if not summed:
            return context.buffers.hold(part_TE)
        return held_sum(context, sum_hessians(part_TE, context.device, X_TD.shape[1]))

    for experts in ranges:
        chosen = range(experts[0], experts[1] + 1)
        done.outputs[range_name(experts)] = [inputs_of(k) for k in chosen]
    return done


@stage()
def reduce(context: WorkContext, *shards: list[HessianSum]) -> Done:
    """Add up several shards' Hessian sums, expert by expert, in shard order."""
    merged = (
        merge_hessians(sum_to_device(part, context.device) for part in parts)
        for parts in zip(*shards, strict=True)
    )
    return Done(outputs={"inputs": [held_sum(context, total) for total in merged]})


@stage(keeps_expanded_block=True, loads_block=True)
def advance(context: WorkContext, *, layer: int, shard: int, experts: list[ExpertRange]) -> Done:
    """Run the compressed block on one shard: what the next block is calibrated on."""
    block = expanded_before(context, layer, None, experts, is_draft=False)
    out, _ = run_block(context, layer, shard, block)
    assert out is not None
    return Done(files=context.write_hidden(layer + 1, shard, out))
