"""Figures of studies on a dense model: neurons, numbers of clusters, and pruned neurons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_expansion.report.figures.canvas import WIDTH, figure_and_axes, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCATTERED_NEURONS = 20_000
"""Neurons that a scatter plot shows, evenly spaced; more make a file of tens of megabytes."""


def neuron_scatter(columns: dict[str, list[Any]], y: str, label: str) -> Figure:
    """A column of the neurons' table over their distance to the normal, a colour per linear."""
    figure, axes = figure_and_axes("Wasserstein distance of the outputs to a normal", label)
    linears = np.array(columns["linear"])
    x_all, y_all = np.array(columns["wasserstein"]), np.array(columns[y])
    step = max(1, len(linears) // SCATTERED_NEURONS)
    for linear in dict.fromkeys(columns["linear"]):
        chosen = np.flatnonzero(linears == linear)[::step]
        axes.scatter(
            x_all[chosen], y_all[chosen], s=4, alpha=0.4, label=plain(linear), rasterized=True
        )
    axes.set_xscale("log")
    if (y_all > 0).all():
        axes.set_yscale("log")
    axes.legend(frameon=False, markerscale=3)
    return figure


def neuron_figures(columns: dict[str, list[Any]]) -> dict[str, Figure]:
    """The figures of ``analyze --dataset``, for the columns that its table has."""
    labels = {"difficulty": "mapping difficulty", "improvement": "improvement over one cluster"}
    return {
        f"wasserstein-{name}": neuron_scatter(columns, name, label)
        for name, label in labels.items()
        if name in columns
    }


def neuron_distributions(
    dense: np.ndarray[Any, Any], others: dict[str, np.ndarray[Any, Any]], *, title: str
) -> Figure:
    """One neuron's outputs on the same tokens: dense (filled) and each of the others."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.6 + 1.5 * len(others)), layout="constrained")
    grid = figure.subplots(len(others), 1, squeeze=False, sharex=True)
    low, high = np.quantile(dense, [0.001, 0.999])
    edges = np.linspace(low, high, 81)
    for axes, (name, outputs) in zip(grid[:, 0], others.items(), strict=True):
        axes.hist(dense, edges, density=True, color="0.75", label="dense")
        axes.hist(outputs, edges, density=True, histtype="step", color="C3", label=plain(name))
        axes.set_yticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)
        # Beside the panel: a distribution can be anywhere inside.
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    grid[0, 0].set_title(plain(title), fontsize="medium", loc="left")
    grid[-1, 0].set_xlabel("output before the activation function")
    return figure


def errors_over_clusters(rows: list[dict[str, Any]], *, title: str) -> Figure:
    """Error on held-out text over the number of clusters, one line per clustering."""
    figure, axes = figure_and_axes("clusters", "error on held-out text")
    for clustering in dict.fromkeys(row["clustering"] for row in rows):
        found = [row for row in rows if row["clustering"] == clustering]
        counts = [row["num_clusters"] for row in found]
        axes.plot(counts, [row["error"] for row in found], marker="o", label=plain(clustering))
    counts = sorted({row["num_clusters"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_ylim(bottom=0)
    axes.set_title(plain(title), fontsize="medium", loc="left")
    axes.legend(frameon=False)
    return figure


def sweep_figures(
    rows: list[dict[str, Any]],
    distributions: dict[str, dict[str, np.ndarray[Any, Any]]],
    neuron: int | None,
) -> dict[str, Figure]:
    """The figures of ``sweep-clusters``: errors of every linear, and a neuron's distributions.

    Args:
        rows: an error by linear, clustering and number of clusters.
        distributions: by linear, the neuron's outputs: ``dense`` and for each number of clusters.
        neuron: the neuron that was asked for.
    """
    figures = {}
    for linear in dict.fromkeys(row["linear"] for row in rows):
        found = [row for row in rows if row["linear"] == linear]
        title = f"{linear} of block {found[0]['layer']}"
        figures[f"clusters-{linear}"] = errors_over_clusters(found, title=title)
        if linear in distributions:
            others = dict(distributions[linear])
            dense = others.pop("dense")
            name = f"neuron {neuron} of {title}"
            figures[f"neuron-{neuron}-{linear}"] = neuron_distributions(dense, others, title=name)
    return figures


def perplexity_over_share(rows: list[dict[str, Any]], dense: float) -> Figure:
    """Perplexity over the share of neurons that were pruned, one line per ranking."""
    figure, axes = figure_and_axes("share of neurons pruned (%)", "perplexity")
    axes.axhline(dense, color="0.5", linestyle=":", label="dense")
    for ranking in dict.fromkeys(row["ranking"] for row in rows):
        found = sorted(
            (row for row in rows if row["ranking"] == ranking), key=lambda row: row["share"]
        )
        shares = [100 * row["share"] for row in found]
        axes.plot(shares, [row["perplexity"] for row in found], marker="o", label=plain(ranking))
    axes.legend(frameon=False)
    return figure
