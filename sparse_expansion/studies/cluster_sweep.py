"""How many clusters a linear needs: errors on held-out text over the number of clusters.

"Wasserstein Distances, Neuronal Entanglement, and Sparsity" (arXiv 2405.15756), sections 3 to 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sparse_expansion.config import CLUSTERINGS, RunConfig
from sparse_expansion.execution.base import Executor, Observer
from sparse_expansion.model.block_linears import linear_shape
from sparse_expansion.model.streaming import ModelShell
from sparse_expansion.planning.shapes import model_shape
from sparse_expansion.planning.studies import cluster_units
from sparse_expansion.run_files import HIDDEN, clusters_file
from sparse_expansion.run_folder import write_windows
from sparse_expansion.store import Store


def mlp_linears(shell: ModelShell, layer: int, asked: str | None, neuron: int | None) -> list[str]:
    """The linears to try, checked before any work.

    Args:
        shell: the dense model.
        layer: number of the block.
        asked: the one linear that was asked for, None for all of the block's MLP.
        neuron: the neuron that was asked for, which each of them must have; None for none.

    Raises:
        ValueError: there is no such block, linear or neuron.
    """
    if not 0 <= layer < shell.num_blocks:
        raise ValueError(f"--layer {layer} is outside 0 to {shell.num_blocks - 1}")
    known = [linear for group in shell.groups(layer) for linear in group.linears]
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

    rows: list[dict[str, Any]] = field(default_factory=list)
    """By linear, clustering and number of clusters: ``error`` (lost output energy),
    ``neuron_error`` and ``wasserstein_clusters`` (of the neuron asked for, or medians)."""
    distributions: dict[str, dict[str, np.ndarray[Any, Any]]] = field(default_factory=dict)
    """By linear: the neuron's outputs, ``dense`` and for every number of clusters."""

    def add(
        self,
        place: tuple[int, str],
        num_clusters: int,
        tensors: dict[str, torch.Tensor],
        neuron: int | None,
    ) -> None:
        """Account for one number of clusters.

        Args:
            place: the block and the linear.
            num_clusters: the number.
            tensors: what a worker found, by clustering.
            neuron: the neuron to look at, None for medians over all.
        """
        layer, linear = place
        chosen = slice(None) if neuron is None else slice(neuron, neuron + 1)
        for clustering in CLUSTERINGS:
            errors = tensors[f"{clustering}.error"].double()
            distances = tensors[f"{clustering}.wasserstein_clusters"].double()
            self.rows.append(
                {
                    "layer": layer,
                    "linear": linear,
                    "clustering": clustering,
                    "num_clusters": num_clusters,
                    "error": float(tensors[f"{clustering}.relative_error"]),
                    "neuron_error": float(np.median(errors[chosen].numpy())),
                    "wasserstein_clusters": float(np.median(distances[chosen].numpy())),
                }
            )
        if neuron is not None:
            outputs = self.distributions.setdefault(linear, {})
            outputs["dense"] = tensors[f"dense.{neuron}"].numpy()
            label = "1 cluster (sparse)" if num_clusters == 1 else f"{num_clusters} clusters"
            outputs[label] = tensors[f"{CLUSTERINGS[0]}.{neuron}"].numpy()


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
        shell: the dense model.
        windows: token ids ``[N, L]``, those to calibrate on first.
        num_calibration: number of windows to calibrate on.
        layer: number of the block.
        linears: linears of the block.
        clusters: numbers of clusters.
        neuron: the neuron whose outputs are kept, None for none.
        config: settings with these windows as their calibration (``dense`` inputs, one shard).
        store: folder for hidden states and results; shared by all workers.
        executor: does the units.
        observer: is told of every finished unit.
    """
    write_windows(store, windows, config.calibration.num_shards)
    groups = {name: group.name for group in shell.groups(layer) for name in group.linears}
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
    store.delete_folder(HIDDEN.rstrip("/"))
    found = ClusterSweep()
    for linear in linears:
        for count in clusters:
            tensors = store.read_tensors(clusters_file(layer, linear, count))
            found.add((layer, linear), count, tensors, neuron)
    return found
