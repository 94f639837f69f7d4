"""Experiments on a dense model: how many clusters a linear needs, and which neurons bear pruning.

"Wasserstein Distances, Neuronal Entanglement, and Sparsity" (arXiv 2405.15756, sections 3 to 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sparse_expansion.config import CLUSTERINGS, RunConfig
from sparse_expansion.execution.base import Executor, Observer
from sparse_expansion.jobs import Measurements, evaluate, model_shape
from sparse_expansion.model.families import linear_shape
from sparse_expansion.model.streaming import ModelShell
from sparse_expansion.plan import cluster_units, pruning_units
from sparse_expansion.run_files import clusters_file, pruned_name
from sparse_expansion.store import Store, write_windows


def mlp_linears(shell: ModelShell, layer: int, asked: str | None, neuron: int | None) -> list[str]:
    """The linears to try, checked before any work.

    Raises:
        ValueError: there is no such block, linear or neuron.
    """
    if not 0 <= layer < shell.num_blocks:
        raise ValueError(f"--layer {layer} is outside 0 to {shell.num_blocks - 1}")
    known = [linear for group in shell.family.groups for linear in group.linears]
    if asked is not None and asked not in known:
        raise ValueError(f"--linear {asked} is none of {', '.join(known)}")
    linears = known if asked is None else [asked]
    if neuron is not None:
        for linear in linears:
            rows, _ = linear_shape(shell.meta_block(layer), linear)
            if not 0 <= neuron < rows:
                raise ValueError(f"--neuron {neuron} is outside 0 to {rows - 1} of {linear}")
    return linears


@dataclass
class ClusterSweep:
    """What numbers of clusters do to the linears of a block, on text they were not made on."""

    rows: list[dict[str, Any]]
    """By linear, clustering and number of clusters: ``error`` (lost output energy),
    ``neuron_error`` and ``wasserstein_clusters`` (of the neuron asked for, or medians)."""
    distributions: dict[str, dict[str, np.ndarray[Any, Any]]] = field(default_factory=dict)
    """By linear: the neuron's outputs, ``dense`` and for every number of clusters."""


def sweep_clusters(
    shell: ModelShell,
    windows: torch.Tensor,
    num_calibration: int,
    *,
    layer: int,
    linears: Sequence[str],
    clusters: Sequence[int],
    neuron: int | None,
    config: RunConfig,
    store: Store,
    executor: Executor,
    observer: Observer,
) -> ClusterSweep:
    """Experts for every number of clusters, on their clusters and on random tokens (the control).

    Args:
        shell: of the dense model.
        windows: ``[N, L]``, those to calibrate on first.
        num_calibration: how many these are.
        layer: of the block.
        linears: of the block.
        clusters: numbers of clusters.
        neuron: whose outputs are kept, None for none.
        config: with these windows as its calibration (``dense`` inputs, one shard).
        store: for hidden states and results; shared by all workers.
        executor: does the units.
        observer: is told of every finished unit.
    """
    write_windows(store, windows, config.calibration.num_shards)
    groups = {name: group.name for group in shell.family.groups for name in group.linears}
    units = cluster_units(
        config,
        model_shape(shell),
        layers=[layer],
        linears={linear: groups[linear] for linear in linears},
        clusters=clusters,
        calibration_tokens=num_calibration * windows.shape[1],
        neurons=[] if neuron is None else [neuron],
    )
    executor.run(units, config, observer)
    store.delete_folder("run/hidden")
    found = ClusterSweep([])
    for linear in linears:
        for count in clusters:
            tensors = store.read_tensors(clusters_file(layer, linear, count))
            for clustering in CLUSTERINGS:
                error = tensors[f"{clustering}.error"].double()
                distance = tensors[f"{clustering}.wasserstein_clusters"].double()
                chosen = slice(None) if neuron is None else slice(neuron, neuron + 1)
                found.rows.append(
                    {
                        "layer": layer,
                        "linear": linear,
                        "clustering": clustering,
                        "num_clusters": count,
                        "error": float(tensors[f"{clustering}.relative_error"]),
                        "neuron_error": float(np.median(error[chosen].numpy())),
                        "wasserstein_clusters": float(np.median(distance[chosen].numpy())),
                    }
                )
            if neuron is not None:
                outputs = found.distributions.setdefault(linear, {})
                outputs["dense"] = tensors[f"dense.{neuron}"].numpy()
                label = "1 cluster (sparse)" if count == 1 else f"{count} clusters"
                outputs[label] = tensors[f"{CLUSTERINGS[0]}.{neuron}"].numpy()
    return found


@dataclass
class PrunedNeurons:
    """Perplexities after pruning nothing but the neurons that a ranking puts first."""

    perplexity_dense: float
    num_eval_tokens: int
    rows: list[dict[str, Any]]
    """By ranking and share: ``perplexity``."""


def prune_neurons(
    shell: ModelShell,
    windows: torch.Tensor,
    evaluation: torch.Tensor,
    *,
    rankings: Sequence[str],
    shares: Sequence[float],
    config: RunConfig,
    store: Store,
    executor: Executor,
    observer: Observer,
) -> PrunedNeurons:
    """Prune the first neurons of every MLP linear by every ranking, and measure the perplexity.

    Args:
        shell: of the dense model.
        windows: ``[N, L]`` to calibrate on.
        evaluation: ``[M, L]`` to score.
        rankings: of ``neurons.RANKINGS``.
        shares: of the neurons of every linear, 0 to 1.
        config: with these windows as its calibration (``dense`` inputs, one shard).
        store: for hidden states and results; shared by all workers.
        executor: does the units.
        observer: is told of every finished unit.
    """
    write_windows(store, windows, config.calibration.num_shards)
    units = pruning_units(config, model_shape(shell), rankings=rankings, shares=shares)
    executor.run(units, config, observer)
    store.delete_folder("run/hidden")

    def score(pruned: str | None) -> tuple[float, int]:
        nll, _ = evaluate(
            "dense",
            evaluation,
            config,
            shell,
            executor,
            observer,
            Measurements(),
            num_shards=executor.num_workers,
            pruned=pruned,
        )
        return nll.perplexity, nll.num_tokens

    dense, tokens = score(None)
    rows = [
        {
            "ranking": ranking,
            "share": share,
            "perplexity": score(pruned_name(ranking, share))[0],
        }
        for ranking in rankings
        for share in shares
    ]
    return PrunedNeurons(dense, tokens, rows)
