"""The figure of runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparse_expansion.report.figures.canvas import label_axes, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def perplexity_against_cost(rows: Sequence[dict[str, Any]]) -> Figure:
    """Perplexity of runs over operations per token and over bytes of the checkpoint.

    Args:
        rows: the rows of ``comparison.comparison``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    label_axes(left, "MLP operations per token (share of dense)", "perplexity")
    label_axes(right, "weight files (share of dense)", "")
    for row in rows:
        for axes, key in ((left, "cost"), (right, "bytes")):
            axes.plot(
                row[key], row["perplexity"], marker="o", linestyle="", label=plain(row["name"])
            )
    dense = {row["perplexity_dense"] for row in rows}
    for value in dense:
        for axes in (left, right):
            axes.axhline(value, color="0.5", linestyle=":", label="dense")
    handles, labels = right.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), frameon=False, loc="outside lower center", ncols=3)
    return figure
