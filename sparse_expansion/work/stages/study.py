"""Stages that look closer: at every neuron, at numbers of clusters, at single pruned neurons."""

from __future__ import annotations

from dataclasses import replace

import torch

from sparse_expansion.algorithms import neurons as measures
from sparse_expansion.algorithms.centring import InputMeans
from sparse_expansion.algorithms.compress import compress_linears
from sparse_expansion.algorithms.hessian import permuted
from sparse_expansion.algorithms.shrinkage import Regulariser
from sparse_expansion.config import CLUSTERINGS
from sparse_expansion.data.transfers import to_device
from sparse_expansion.model.expansion import ExpandedLinear
from sparse_expansion.run_files import clusters_file, neurons_file, pruned_file, pruned_name
from sparse_expansion.types import HessianSum, in_columns
from sparse_expansion.work.context import WorkContext
from sparse_expansion.work.passes import captured_inputs, rows_of
from sparse_expansion.work.registry import Done, stage
from sparse_expansion.work.routers import columns_of
from sparse_expansion.work.sums import (
    CHUNK_TOKENS,
    cluster_moments,
    evenly_spaced,
    fit_router,
    route_all,
    shuffled,
    sum_hessians,
)


@stage(is_final=True)
def neurons(
    context: WorkContext, *, layer: int, group: str, models: dict[str, str], seed: int
) -> Done:
    """Describe every neuron of a group; write a table of tensors, one row per neuron.

    Args:
        context: of the worker.
        layer: number of the block.
        group: name of the linear group.
        models: names and folders of expanded models, whose outputs on the same inputs are compared
            with the dense ones.
        seed: of the pairs of tokens for the mapping difficulty.
    """
    X_TD = to_device(captured_inputs(context, layer, 0)[group], context.device)
    dense = context.shell().load_block(layer)
    others = {name: context.shell(folder).load_block(layer) for name, folder in models.items()}
    linears = context.group(layer, group).linears
    labels: dict[str, torch.Tensor] = {}
    for name, block in others.items():
        first = block.get_submodule(linears[0])
        assert isinstance(first, ExpandedLinear)
        router = first.group_router.router()
        labels[name] = route_all(X_TD, router, context.device)
    tensors: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for linear in linears:
            Y_TO = dense.get_submodule(linear)(X_TD)
            columns = measures.describe(X_TD, Y_TO, seed=seed)
            for name, block in others.items():
                found = measures.compare(Y_TO, block.get_submodule(linear)(X_TD), labels[name])
                columns |= {f"{key}.{name}": value for key, value in found.items()}
            tensors |= {f"{linear}.{key}": value.cpu() for key, value in columns.items()}
    for folder in models.values():
        context.shell(folder).expert_cache.clear()
    files = context.write(neurons_file(layer, group), tensors)
    return Done(stats={"tokens": X_TD.shape[0]}, files=files)


@stage()
def clusters(
    context: WorkContext,
    *,
    layer: int,
    linear: str,
    group: str,
    num_clusters: int,
    calibration_tokens: int,
    neurons_kept: list[int],
    seed: int,
    clusterings: list[str] = list(CLUSTERINGS),  # noqa: B006 - it is only read
) -> Done:
    """Experts of one linear for one K, on their own clusters or on random tokens.

    Writes what ``neurons.compare`` finds on the tokens that were not calibrated on, per clustering,
    and the outputs of the neurons asked for.
    """
    config, device = context.config, context.device
    X_TD = captured_inputs(context, layer, 0)[group]
    X_cal, X_held = X_TD[:calibration_tokens], to_device(X_TD[calibration_tokens:], device)
    sample = rows_of(X_cal, evenly_spaced(len(X_cal), config.routing.fit_tokens))
    routing = replace(config.routing, num_clusters=num_clusters)
    router, gram, _ = fit_router(
        [sample],
        routing,
        device=device,
        seed=seed,
    )
    if config.compression.expert_biases:
        gram = cluster_moments([sample], router, device).about_means(gram)
    module = context.shell().load_block(layer).get_submodule(linear)
    W_OD = context.dense_weight(layer, linear)
    columns_D = columns_of(context, layer, group, gram)
    with torch.no_grad():
        dense_TO = module(X_held).float()
    tensors = {f"dense.{o}": dense_TO[:, o].cpu().clone() for o in neurons_kept}
    energy = dense_TO.double().square().sum().cpu()
    for clustering in clusterings:
        labels_T = route_all(X_cal, router, device)
        held_T = route_all(X_held, router, device)
        if clustering == "random":
            labels_T = shuffled(labels_T, f"{seed}/calibration")
            held_T = shuffled(held_T, f"{seed}/held-out")
        change_TO = _change_of_outputs(
            context, W_OD, gram, (X_cal, labels_T), (X_held, held_T), num_clusters, columns_D
        )
        other_TO = dense_TO + change_TO
        found = measures.compare(dense_TO, other_TO, held_T)
        tensors |= {f"{clustering}.{name}": value.cpu() for name, value in found.items()}
        lost = change_TO.double().square().sum().cpu()
        tensors[f"{clustering}.relative_error"] = lost / energy
        tensors |= {f"{clustering}.{o}": other_TO[:, o].cpu().clone() for o in neurons_kept}
    return Done(files=context.write(clusters_file(layer, linear, num_clusters), tensors))


def _change_of_outputs(
    context: WorkContext,
    W_OD: torch.Tensor,
    gram: HessianSum,
    calibration: tuple[torch.Tensor, torch.Tensor],
    held_out: tuple[torch.Tensor, torch.Tensor],
    num_clusters: int,
    columns_D: torch.Tensor | None,
) -> torch.Tensor:
    """What experts change of a linear's outputs ``[T, O]`` on held-out tokens.

    Args:
        context: of the worker.
        W_OD: the dense weight.
        gram: Hessian sum of the whole group.
        calibration: inputs and their clusters, to make experts on.
        held_out: inputs and their clusters, to apply them to.
        num_clusters: number of experts.
        columns_D: the order of their columns, see ``types.Router``.
    """
    compression, device = context.config.compression, context.device
    regulariser = Regulariser(gram, compression)
    (X_cal, labels_T), (X_held, held_T) = calibration, held_out
    W_OD = in_columns(W_OD, columns_D)
    change_TO = torch.empty(X_held.shape[0], W_OD.shape[0], device=device)
    for k in range(num_clusters):
        H = sum_hessians(rows_of(X_cal, torch.nonzero(labels_T == k).flatten()), device)
        H = permuted(regulariser.regularise(H)[0], columns_D)
        made = compress_linears(
            {"": W_OD},
            H.sum_DD[None],
            compression,
            {"": None},
            means=InputMeans.of(H) if compression.expert_biases else None,
            products=context.config.products,
        )[""]
        chosen = torch.nonzero(held_T == k).flatten()
        delta_OD = made.weight_KOD[0] - W_OD.float()
        change_TO[chosen] = in_columns(X_held[chosen], columns_D).float() @ delta_OD.T
        if made.bias_KO is not None:
            change_TO[chosen] += made.bias_KO[0]
    return change_TO


@stage()
def prune_neurons(
    context: WorkContext,
    *,
    layer: int,
    group: str,
    rankings: list[str],
    shares: list[float],
    seed: int,
) -> Done:
    """Prune the first neurons of every ranking, and nothing else: rows to put in their place.

    For every linear of the group, ranking and share: the neurons' indices, and their weights after
    a sweep over these rows alone.
    """
    X_TD = captured_inputs(context, layer, 0)[group]
    block = context.shell().load_block(layer)
    H_KDD = sum_hessians(X_TD, context.device).sum_DD[None]
    chosen: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for number, linear in enumerate(context.group(layer, group).linears):
        W_OD = context.dense_weight(layer, linear)
        with torch.no_grad():
            parts = X_TD.split(CHUNK_TOKENS)
            module = block.get_submodule(linear)
            Y_TO = torch.cat([module(to_device(part, context.device)) for part in parts])
        for ranking in rankings:
            order = measures.rank(ranking, W_OD, Y_TO, seed=seed + number)
            for share in shares:
                name = f"{linear}.{pruned_name(ranking, share)}"
                chosen[name] = order[: max(1, round(share * len(order)))].clone()
                weights[name] = W_OD[chosen[name]]
    compression = context.config.compression
    made = compress_linears(
        weights, H_KDD, compression, dict.fromkeys(weights), products=context.config.products
    )
    tensors = {f"{name}.rows": rows.cpu() for name, rows in chosen.items()}
    for name, result in made.items():
        tensors[f"{name}.weight"] = result.weight_KOD[0].to(context.shell().dtype).cpu()
    return Done(files=context.write(pruned_file(layer, group), tensors))
