"""The figure of what every block loses and gets, of a run and of ``allocate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparse_expansion.report.figures.canvas import WIDTH, count_from_zero, label_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def allocation(rows: Sequence[dict[str, Any]]) -> Figure:
    """What each block alone loses, and the zeros and experts that it gets for it.

    Args:
        rows: a row per block, of ``run/allocation.json`` or ``allocate``.
    """
    from matplotlib.figure import Figure

    bars = [("gap", "gap when it\nalone is pruned", "C3"), ("sparsity", "share of zeros", "C0")]
    if "num_clusters" in rows[0]:
        bars.append(("num_clusters", "experts", "C2"))
    figure = Figure(figsize=(WIDTH, 2.0 * len(bars)), layout="constrained")
    panels = figure.subplots(len(bars), 1, sharex=True)
    layers = [row["layer"] for row in rows]
    for axes, (name, text, color) in zip(panels, bars, strict=True):
        axes.bar(layers, [row[name] for row in rows], color=color)
        label_axes(axes, "", text)
        if name == "sparsity":
            axes.set_ylim(0, 1)
    panels[-1].set_xlabel("block")
    count_from_zero(panels[-1])
    return figure
