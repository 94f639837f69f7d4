"""Stages that measure: losses of whole models, and of models with one block pruned."""

from __future__ import annotations

import torch
from torch import nn

from sparse_expansion.algorithms.compress import compress_linears
from sparse_expansion.algorithms.hessian import merge_hessians
from sparse_expansion.config import CompressionConfig
from sparse_expansion.data.activations import GroupInputs
from sparse_expansion.data.transfers import to_device
from sparse_expansion.model.routed_tokens import counted_tokens
from sparse_expansion.run_files import block_key, pruned_file
from sparse_expansion.types import CompressionError, HessianSum
from sparse_expansion.work.blocks import set_weight
from sparse_expansion.work.context import WorkContext
from sparse_expansion.work.passes import embed_windows, own_copy, pass_through, score_windows
from sparse_expansion.work.registry import Done, stage
from sparse_expansion.work.sums import sum_hessians


@stage()
def evaluate(
    context: WorkContext,
    hidden: torch.Tensor | None = None,
    *,
    model: str,
    tokens: list[list[int]],
    layers: tuple[int, int],
    pruned: str | None = None,
) -> Done:
    """Pass windows through a range of blocks; the last range scores them.

    Args:
        context: of the worker.
        hidden: what the range before put out, None for the first.
        model: ``dense`` for the source, ``expanded`` for the store's finished folder.
        tokens: the windows.
        layers: first and last block.
        pruned: name of the pruned neurons to put in place of the dense ones.
    """
    shell = context.shell(model)
    routed: dict[str, list[int]] = {}
    windows = torch.tensor(tokens, dtype=torch.int64)
    hidden = embed_windows(context, windows, model) if hidden is None else own_copy(context, hidden)
    is_last = layers[1] + 1 == shell.num_blocks
    # Scoring counts as a block.
    steps = layers[1] + 1 - layers[0] + is_last
    with torch.no_grad():
        for layer in range(layers[0], layers[1] + 1):
            context.place = (layer, (layer - layers[0]) / steps)
            block = shell.load_block(layer)
            if pruned is not None:
                _put_pruned(context, block, layer, pruned)
            with counted_tokens(block) as counts:
                pass_through(context, layer, block, windows, hidden, model)
            routed |= {f"{layer}.{name}": tokens.tolist() for name, tokens in counts.items()}
            del block
            if shell.expansion is not None:
                shell.expert_cache.clear()
    if not is_last:
        return Done(outputs={"hidden": hidden}, stats={"tokens_by_expert": routed})
    context.place = (layers[1], 1 - 1 / steps)
    nll = score_windows(context, windows, hidden, model)
    losses = [(part.total, part.num_tokens) for part in nll]
    return Done(stats={"nll": losses, "tokens_by_expert": routed})


def _put_pruned(context: WorkContext, block: nn.Module, layer: int, pruned: str) -> None:
    """Replace a dense block's rows by those that the stage ``prune_neurons`` wrote."""
    for group in context.shell().groups(layer):
        tensors = context.store.read_tensors(pruned_file(layer, group.name))
        for linear in group.linears:
            module = block.get_submodule(linear)
            # A copy: what was read may be the file itself, mapped.
            weight = module.get_parameter("weight").detach().clone()
            rows = tensors[f"{linear}.{pruned}.rows"].to(weight.device)
            weight[rows] = tensors[f"{linear}.{pruned}.weight"].to(weight)
            set_weight(module, weight)


@stage()
def block_gaps(
    context: WorkContext,
    *,
    pruned: list[list[int]],
    scored: list[list[int]],
    layers: tuple[int, int],
) -> Done:
    """Loss of the dense model, and of it with one block pruned, for each of a range of blocks.

    All variants go through the blocks together, so every block is read once.

    Args:
        context: of the worker.
        pruned: windows whose Hessians the blocks are pruned with, by a sweep.
        scored: windows whose loss is measured.
        layers: first and last block to prune.
    """
    shell = context.shell()
    to_prune, to_score = (torch.tensor(part, dtype=torch.int64) for part in (pruned, scored))
    calibration, dense = embed_windows(context, to_prune), embed_windows(context, to_score)
    streams: list[torch.Tensor] = []
    with torch.no_grad():
        for layer in range(shell.num_blocks):
            context.place = (layer, layer / shell.num_blocks)
            block = shell.load_block(layer)
            for hidden in streams:
                pass_through(context, layer, block, to_score, hidden)
            if layers[0] <= layer <= layers[1]:
                try:
                    other = _pruned_block(context, layer, block, to_prune, calibration)
                except CompressionError as error:
                    raise CompressionError(f"{block_key(layer)}: {error}") from error
                streams.append(own_copy(context, dense))
                pass_through(context, layer, other, to_score, streams[-1])
                del other
            elif layer < layers[0]:
                pass_through(context, layer, block, to_prune, calibration)
            pass_through(context, layer, block, to_score, dense)
    losses = [
        sum(nll.total for nll in score_windows(context, to_score, hidden))
        for hidden in (dense, *streams)
    ]
    count = to_score.shape[0] * (to_score.shape[1] - 1)
    return Done(stats={"dense": losses[0], "pruned": losses[1:], "num_tokens": count})


def _pruned_block(
    context: WorkContext,
    layer: int,
    block: nn.Module,
    windows: torch.Tensor,
    hidden: torch.Tensor,
) -> nn.Module:
    """A copy whose MLP is swept on the windows, which also go through the dense block."""
    shell = context.shell()
    sums: dict[str, HessianSum] = {}
    groups = shell.groups(layer)
    with GroupInputs(block, groups) as seen:
        for part in shell.batches(windows):
            call = shell.call(layer, windows[part])
            hidden[part] = call.run(block, to_device(hidden[part], context.device))
            for name, X_TD in seen.take().items():
                found = [sums[name]] if name in sums else []
                sums[name] = merge_hessians([*found, sum_hessians(X_TD, context.device)])
    # The block's own share is found by this: a plain sweep tells which blocks are sensitive.
    compression = context.config.compression
    plain = CompressionConfig(sparsity=compression.sparsity, block_size=compression.block_size)
    other = shell.load_block(layer)
    for group in groups:
        if group.name not in sums:
            # An expert of a mixture that none of these tokens go through says nothing here.
            continue
        weights = {name: context.dense_weight(layer, name) for name in group.linears}
        H_KDD = sums[group.name].sum_DD[None]
        made = compress_linears(
            weights, H_KDD, plain, dict.fromkeys(weights), products=context.config.products
        )
        for name, result in made.items():
            set_weight(other.get_submodule(name), result.weight_KOD[0].to(shell.dtype))
    return other
