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
from sparse_expansion.model.streaming import ModelShell
from sparse_expansion.planning.shapes import model_shape
from sparse_expansion.planning.studies import analysis_units
from sparse_expansion.run_files import HIDDEN, neurons_file
from sparse_expansion.run_folder import write_windows
from sparse_expansion.store import Store

EXPANDED, ONE_CLUSTER = "expanded", "one_cluster"
_PLACE = ("layer", "linear", "neuron")
Columns = dict[str, list[Any]]


@dataclass
class NeuronTable:
    """Columns of equal length, one entry per neuron."""

    columns: Columns
    num_tokens: int
    """Tokens that the neurons were seen on."""

    def _rows_of_linears(self) -> dict[tuple[int, str], np.ndarray[Any, Any]]:
        """The rows of every linear of every block, in the table's order."""
        layers, linears = np.array(self.columns["layer"]), np.array(self.columns["linear"])
        places = dict.fromkeys(zip(self.columns["layer"], self.columns["linear"], strict=True))
        return {
            (layer, linear): np.flatnonzero((layers == layer) & (linears == linear))
            for layer, linear in places
        }

    def summary(self) -> list[dict[str, Any]]:
        """Medians over the neurons of every linear of every block."""
        numbers = {
            name: np.array(values) for name, values in self.columns.items() if name not in _PLACE
        }
        return [
            {
                "layer": layer,
                "linear": linear,
                "neurons": len(rows),
                **{name: float(np.median(values[rows])) for name, values in numbers.items()},
            }
            for (layer, linear), rows in self._rows_of_linears().items()
        ]

    def correlations(self) -> dict[str, float]:
        """Spearman's rank correlation of the distance to the normal with the other findings.

        It is taken within each linear of each block, whose levels differ; the result is the median
        over them.
        """
        distance = np.array(self.columns["wasserstein"])
        linears = [rows for rows in self._rows_of_linears().values() if len(rows) > 1]
        found = {}
        for name in ("difficulty", f"error.{EXPANDED}", f"error.{ONE_CLUSTER}", "improvement"):
            if name in self.columns and linears:
                values = np.array(self.columns[name])
                each = [spearmanr(distance[rows], values[rows]).statistic for rows in linears]
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
    """Describe all neurons in one pass over the dense model; every group of linears is a unit.

    Args:
        shell: the dense model.
        windows: token ids ``[N, L]``.
        models: folders of expanded models to compare with, ``expanded`` and ``one_cluster``.
        config: settings with these windows as their calibration (``dense`` inputs, one shard).
        store: folder for hidden states and tables; shared by all workers.
        executor: does the units.
        observer: is told of every finished unit.
    """
    write_windows(store, windows, config.calibration.num_shards)
    folders = {name: str(folder) for name, folder in models.items()}
    executor.run(analysis_units(config, model_shape(shell), folders), config, observer)
    store.delete_folder(HIDDEN.rstrip("/"))
    return NeuronTable(_read_columns(store, shell), windows.numel())


def _read_columns(store: Store, shell: ModelShell) -> Columns:
    """The workers' tables as one, with the improvement over one cluster where both are known."""
    columns: Columns = {name: [] for name in _PLACE}
    for layer in range(shell.num_blocks):
        for group in shell.groups(layer):
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
