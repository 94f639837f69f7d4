"""Which neurons bear pruning: perplexity with nothing but a ranking's first neurons pruned.

"Wasserstein Distances, Neuronal Entanglement, and Sparsity" (arXiv 2405.15756), sections 3 to 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparse_expansion.config import RunConfig
from sparse_expansion.execution.base import Executor, Observer
from sparse_expansion.jobs.evaluate import evaluate
from sparse_expansion.jobs.measurements import Measurements
from sparse_expansion.model.streaming import ModelShell
from sparse_expansion.planning.shapes import model_shape
from sparse_expansion.planning.studies import pruning_units
from sparse_expansion.run_files import HIDDEN, pruned_name
from sparse_expansion.run_folder import write_windows
from sparse_expansion.store import Store
from sparse_expansion.types import NllSum


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
        shell: the dense model.
        windows: token ids ``[N, L]`` to calibrate on.
        evaluation: token ids ``[M, L]`` to score.
        rankings: names from ``config.RANKINGS``.
        shares: shares of the neurons of every linear, 0 to 1.
        config: settings with these windows as their calibration (``dense`` inputs, one shard).
        store: folder for hidden states and results; shared by all workers.
        executor: does the units.
        observer: is told of every finished unit.
    """
    write_windows(store, windows, config.calibration.num_shards)
    units = pruning_units(config, model_shape(shell), rankings=rankings, shares=shares)
    executor.run(units, config, observer)
    store.delete_folder(HIDDEN.rstrip("/"))

    def score(pruned: str | None) -> NllSum:
        return evaluate(
            "dense",
            evaluation,
            config,
            shell,
            executor,
            observer,
            Measurements(),
            pruned=pruned,
        ).nll

    dense = score(None)
    rows = [
        {
            "ranking": ranking,
            "share": share,
            "perplexity": score(pruned_name(ranking, share)).perplexity,
        }
        for ranking in rankings
        for share in shares
    ]
    return PrunedNeurons(dense.perplexity, dense.num_tokens, rows)
