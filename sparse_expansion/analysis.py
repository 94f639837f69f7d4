"""What every neuron of a model does on a text, dense and expanded: one table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from sparse_expansion.config import RunConfig
from sparse_expansion.execution.base import Executor, Observer
from sparse_expansion.jobs import model_shape
from sparse_expansion.model.families import Family
from sparse_expansion.model.streaming import ModelShell
from sparse_expansion.plan import analysis_units
from sparse_expansion.run_files import neurons_file
from sparse_expansion.store import Store, write_windows

EXPANDED, ONE_CLUSTER = "expanded", "one_cluster"
Columns = dict[str, list[Any]]


@dataclass
class NeuronTable:
    """Columns of equal length, one entry per neuron."""

    columns: Columns
    num_tokens: int

    def summary(self) -> list[dict[str, Any]]:
        """Medians of every linear of every block."""
        layers, linears = np.array(self.columns["layer"]), np.array(self.columns["linear"])
        numbers = [name for name in self.columns if name not in ("layer", "linear", "neuron")]
        rows = []
        for layer, linear in dict.fromkeys(
            zip(self.columns["layer"], self.columns["linear"], strict=True)
        ):
            chosen = (layers == layer) & (linears == linear)
            row = {"layer": layer, "linear": linear, "neurons": int(chosen.sum())}
            for name in numbers:
                row[name] = float(np.median(np.array(self.columns[name])[chosen]))
            rows.append(row)
        return rows

    def correlations(self) -> dict[str, float]:
        """Spearman's rank correlation of the distance to the normal with the other findings.

        Within each linear of each block, whose levels differ; the median over them.
        """
        layers, linears = np.array(self.columns["layer"]), np.array(self.columns["linear"])
        distance = np.array(self.columns["wasserstein"])
        groups = [
            np.flatnonzero((layers == layer) & (linears == linear))
            for layer, linear in dict.fromkeys(zip(layers.tolist(), linears.tolist(), strict=True))
        ]
        found = {}
        for name in ("difficulty", f"error.{EXPANDED}", f"error.{ONE_CLUSTER}", "improvement"):
            if name in self.columns:
                values = np.array(self.columns[name])
                each = [
                    spearmanr(distance[rows], values[rows]).statistic
                    for rows in groups
                    if len(rows) > 1
                ]
                if each:
                    found[name] = float(np.median(each))
        return found


def describe_neurons(
    shell: ModelShell,
    windows: torch.Tensor,
    models: dict[str, Path],
    config: RunConfig,
    store: Store,
    executor: Executor,
    observer: Observer,
) -> NeuronTable:
    """One pass over the dense model; every group of linears is a unit.

    Args:
        shell: of the dense model.
        windows: ``[N, L]``.
        models: folders of expanded models to compare with, ``expanded`` and ``one_cluster``.
        config: with these windows as its calibration (``dense`` inputs, one shard).
        store: for hidden states and tables; shared by all workers.
        executor: does the units.
        observer: is told of every finished unit.
    """
    write_windows(store, windows, config.calibration.num_shards)
    folders = {name: str(folder) for name, folder in models.items()}
    executor.run(analysis_units(config, model_shape(shell), folders), config, observer)
    store.delete_folder("run/hidden")
    return NeuronTable(_read(store, shell.num_blocks, shell.family), windows.numel())


def _read(store: Store, num_layers: int, family: Family) -> Columns:
    columns: Columns = {"layer": [], "linear": [], "neuron": []}
    for layer in range(num_layers):
        for group in family.groups:
            tensors = store.read_tensors(neurons_file(layer, group.name))
            for linear in group.linears:
                prefix = f"{linear}."
                found = {
                    key.removeprefix(prefix): value.tolist()
                    for key, value in tensors.items()
                    if key.startswith(prefix)
                }
                count = len(found["mean"])
                columns["layer"] += [layer] * count
                columns["linear"] += [linear] * count
                columns["neuron"] += range(count)
                for name, values in found.items():
                    columns.setdefault(name, []).extend(values)
    errors = (f"error.{EXPANDED}", f"error.{ONE_CLUSTER}")
    if all(name in columns for name in errors):
        columns["improvement"] = [
            1 - many / one if one > 0 else 0.0
            for many, one in zip(*(columns[name] for name in errors), strict=True)
        ]
    return columns
