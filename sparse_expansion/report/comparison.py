"""Finished runs beside each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sparse_expansion.report.describe import describe_settings
from sparse_expansion.report.facts import model_name
from sparse_expansion.report.formatting import table
from sparse_expansion.run_files import METRICS_FILE
from sparse_expansion.run_folder import read_metrics
from sparse_expansion.store import Store


def cost_of(metrics: dict[str, Any]) -> float:
    """Operations of MLPs and routers per token over the dense MLPs'."""
    flops = metrics["mlp_flops_per_token"]
    ratio: float = (flops["experts"] + flops["router"]) / flops["dense"]
    return ratio


def size_of(metrics: dict[str, Any]) -> float:
    """Bytes of the weight files over those of the dense model's."""
    ratio: float = metrics["checkpoint_bytes"] / metrics["dense_checkpoint_bytes"]
    return ratio


def gap_and_cost(metrics: dict[str, Any]) -> dict[str, float]:
    """Perplexities, ``gap`` and ``cost`` (see ``comparison``), by which a run is judged."""
    dense, expanded = metrics["perplexity_dense"], metrics["perplexity_expanded"]
    return {
        "perplexity_dense": dense,
        "perplexity": expanded,
        "gap": math.log(expanded / dense),
        "cost": cost_of(metrics),
    }


def comparison(stores: Sequence[Store]) -> list[dict[str, Any]]:
    """Finished runs beside each other: perplexity, and what a token and the files cost.

    ``gap`` is the difference to the dense model in log-perplexity (nats per token); ``cost`` the
    MLPs' and routers' operations per token, and ``bytes`` the weight files, as shares of the dense
    model's.

    Raises:
        ValueError: a folder has no finished `run` (with its evaluation).
    """
    rows = []
    for store in stores:
        if not store.exists(METRICS_FILE):
            raise ValueError(f"{store.root} holds no finished run: finish it with --resume")
        metrics = read_metrics(store)
        if "perplexity_dense" not in metrics:
            raise ValueError(f"{store.root} was not evaluated: compare the folders of `run`")
        rows.append(
            {
                "name": model_name(store.root),
                "setting": describe_settings(metrics["config"]),
                **gap_and_cost(metrics),
                "bytes": size_of(metrics),
            }
        )
    return rows


def comparison_cells(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The rows of ``comparison`` as cells, with a header."""
    cells: list[tuple[str, ...]] = [("run", "dense", "expanded", "gap", "operations", "bytes", "")]
    cells += [
        (
            row["name"],
            f"{row['perplexity_dense']:.3f}",
            f"{row['perplexity']:.3f}",
            f"{row['gap']:.4f}",
            f"{row['cost']:.1%}",
            f"{row['bytes']:.1%}",
            row["setting"],
        )
        for row in rows
    ]
    return cells


COMPARED = (
    "perplexities per token; gap in log-perplexity; operations of MLPs and routers per token and "
    "bytes of weight files as shares of the dense model's"
)
"""What the columns of a comparison are."""


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of ``comparison`` as text."""
    return f"{table(comparison_cells(rows), header=True)}\n\n{COMPARED}"


def against_baseline(baseline: dict[str, Any], row: dict[str, Any]) -> str:
    """How much of a baseline's gap to the dense model a run closes, in a sentence.

    Args:
        baseline: its row of ``comparison``.
        row: the run's.
    """
    if baseline["gap"] <= 0:
        return f"{baseline['name']} loses nothing that could be won back."
    closed = 1 - row["gap"] / baseline["gap"]
    change = f"closes {closed:.1%} of" if closed >= 0 else f"widens by {-closed:.1%}"
    return f"{row['name']} {change} the gap that {baseline['name']} has to the dense model."
