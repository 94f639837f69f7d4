"""Figures: of a run, of its neurons, of experiments, and of runs beside each other.

Every function returns a matplotlib figure; ``save`` writes it as SVG and PNG, ``svg`` as markup.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_expansion.report import LinearFacts, linear_facts
from sparse_expansion.store import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PNG_DPI = 150
SCATTERED = 20_000
"""Neurons that a scatter plot shows, evenly spaced; more make a file of tens of megabytes."""
GAP_SHARE = 0.002
"""Units of one stage on one worker that are closer than this share of the run are one bar."""


def figure_and_axes(x: str, y: str, *, height: float = 3.4) -> tuple[Figure, Axes]:
    """An empty plot, made without pyplot: no display and no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.add_subplot()
    _label(axes, x, y)
    return figure, axes


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)


def svg(figure: Figure) -> str:
    """The figure as an SVG element, without the XML header; the same bytes every time."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "sparse-expansion", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    found = text.getvalue()
    return found[found.index("<svg") :]


def save(figures: dict[str, Figure], folder: str | Path) -> list[Path]:
    """Write ``NAME.svg`` and ``NAME.png`` of every figure; returns the paths."""
    where = Path(folder)
    paths = []
    for name, figure in figures.items():
        vector, pixels = where / f"{name}.svg", where / f"{name}.png"
        write_file(vector, svg(figure).encode())
        image = io.BytesIO()
        figure.savefig(image, dpi=PNG_DPI, format="png")
        write_file(pixels, image.getvalue())
        paths += [vector, pixels]
    return paths


# -- a run ---------------------------------------------------------------------------------------


def _by_linear(facts: list[LinearFacts]) -> dict[str, list[LinearFacts]]:
    found: dict[str, list[LinearFacts]] = defaultdict(list)
    for one in sorted(facts, key=lambda one: one.layer):
        found[one.linear].append(one)
    return found


def errors_by_block(facts: list[LinearFacts]) -> Figure:
    """Lost output energy of every linear over the blocks."""
    figure, axes = figure_and_axes("block", "lost output energy")
    for linear, found in _by_linear(facts).items():
        layers, errors = [one.layer for one in found], [one.error for one in found]
        axes.plot(layers, errors, marker="o", ms=3, label=linear)
    axes.legend(frameon=False)
    _whole_numbers(axes)
    return figure


def shares_by_block(facts: list[LinearFacts]) -> Figure:
    """Share of the tokens in the largest and the smallest cluster over the blocks."""
    figure, axes = figure_and_axes("block", "share of tokens")
    for number, (linear, found) in enumerate(_by_linear(facts).items()):
        layers, color = [one.layer for one in found], f"C{number}"
        axes.plot(layers, [one.largest for one in found], color=color, label=linear)
        axes.plot(layers, [one.smallest for one in found], color=color, linestyle=":")
    axes.legend(frameon=False, title="largest (line), smallest (dots)")
    _whole_numbers(axes)
    return figure


def cluster_sizes(rows: list[dict[str, Any]]) -> Figure:
    """Every cluster's share of its linear's tokens, as a map: blocks by clusters, largest first.

    Args:
        rows: of ``report.expert_rows``.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    tokens: dict[str, dict[int, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        tokens[row["group"]][row["layer"]][row["expert"]] = row["tokens"]
    figure = Figure(figsize=(8, 0.8 + 1.8 * len(tokens)), layout="constrained")
    grid = figure.subplots(len(tokens), 1, squeeze=False, sharex=True)
    for axes, (group, layers) in zip(grid[:, 0], tokens.items(), strict=True):
        shares = np.array(
            [sorted(layers[layer].values(), reverse=True) for layer in sorted(layers)], dtype=float
        )
        shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1)
        image = axes.imshow(shares.T, aspect="auto", cmap="viridis", vmin=0)
        axes.set_ylabel("cluster")
        axes.set_title(group, fontsize="medium", loc="left")
        figure.colorbar(image, ax=axes, label="share of tokens")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    grid[-1, 0].set_xlabel("block")
    return figure


def _bars(spans: list[tuple[float, float]], gap: float) -> list[tuple[float, float]]:
    """Spans (start, length) in order, with those closer than the gap made one."""
    merged: list[tuple[float, float]] = []
    for start, length in sorted(spans):
        if merged and start - sum(merged[-1]) <= gap:
            first = merged[-1][0]
            merged[-1] = (first, max(sum(merged[-1]), start + length) - first)
        else:
            merged.append((start, length))
    return merged


def timeline(rows: list[dict[str, Any]]) -> Figure:
    """What every worker did when: a bar per stretch of one stage.

    Args:
        rows: of ``run/timeline.json``.
    """
    begin = min(row["started"] for row in rows)
    whole = max(row["started"] + row["seconds"] for row in rows) - begin
    workers = sorted({row["worker"] for row in rows})
    stages = list(dict.fromkeys(row["stage"] for row in sorted(rows, key=lambda r: r["started"])))
    figure, axes = figure_and_axes("seconds", "", height=1.6 + 0.35 * len(workers))
    for number, stage in enumerate(stages):
        seen = False
        for place, worker in enumerate(workers):
            spans = [
                (row["started"] - begin, row["seconds"])
                for row in rows
                if row["stage"] == stage and row["worker"] == worker
            ]
            bars = _bars(spans, GAP_SHARE * whole)
            if bars:
                label = None if seen else stage
                axes.broken_barh(bars, (place - 0.4, 0.8), color=f"C{number}", label=label)
                seen = True
    axes.set_yticks(range(len(workers)), workers)
    axes.invert_yaxis()
    axes.legend(frameon=False, ncols=len(stages), loc="upper center", bbox_to_anchor=(0.5, 1.35))
    return figure


def run_figures(
    rows: list[dict[str, Any]],
    timeline_rows: Sequence[dict[str, Any]] = (),
    allocation_rows: Sequence[dict[str, Any]] = (),
) -> dict[str, Figure]:
    """Every figure that a run, finished or not, has data for.

    Args:
        rows: of ``report.expert_rows``.
        timeline_rows: of ``run/timeline.json``.
        allocation_rows: of ``run/allocation.json``.
    """
    figures = {}
    if rows:
        facts = linear_facts(rows)
        figures = {
            "errors": errors_by_block(facts),
            "cluster-shares": shares_by_block(facts),
            "cluster-sizes": cluster_sizes(rows),
        }
    if timeline_rows:
        figures["timeline"] = timeline(list(timeline_rows))
    if allocation_rows:
        figures["allocation"] = allocation(list(allocation_rows))
    return figures


# -- neurons and experiments ---------------------------------------------------------------------


def neuron_scatter(columns: dict[str, list[Any]], y: str, label: str) -> Figure:
    """A column of the neurons' table over their distance to the normal, a colour per linear."""
    figure, axes = figure_and_axes("Wasserstein distance of the outputs to a normal", label)
    linears = np.array(columns["linear"])
    x_all, y_all = np.array(columns["wasserstein"]), np.array(columns[y])
    step = max(1, len(linears) // SCATTERED)
    for linear in dict.fromkeys(columns["linear"]):
        chosen = np.flatnonzero(linears == linear)[::step]
        axes.scatter(x_all[chosen], y_all[chosen], s=4, alpha=0.4, label=linear, rasterized=True)
    axes.set_xscale("log")
    if (y_all > 0).all():
        axes.set_yscale("log")
    axes.legend(frameon=False, markerscale=3)
    return figure


def neuron_figures(columns: dict[str, list[Any]]) -> dict[str, Figure]:
    """What the table of ``analyze --dataset`` has figures for."""
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

    figure = Figure(figsize=(8, 0.6 + 1.5 * len(others)), layout="constrained")
    grid = figure.subplots(len(others), 1, squeeze=False, sharex=True)
    low, high = np.quantile(dense, [0.001, 0.999])
    edges = np.linspace(low, high, 81)
    for axes, (name, outputs) in zip(grid[:, 0], others.items(), strict=True):
        axes.hist(dense, edges, density=True, color="0.75", label="dense")
        axes.hist(outputs, edges, density=True, histtype="step", color="C3", label=name)
        axes.set_yticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)
        # Beside the panel: a distribution can be anywhere inside.
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    grid[0, 0].set_title(title, fontsize="medium", loc="left")
    grid[-1, 0].set_xlabel("output before the activation function")
    return figure


def errors_over_clusters(rows: list[dict[str, Any]], *, title: str) -> Figure:
    """Error on held-out text over the number of clusters, one line per clustering."""
    figure, axes = figure_and_axes("clusters", "error on held-out text")
    for clustering in dict.fromkeys(row["clustering"] for row in rows):
        found = [row for row in rows if row["clustering"] == clustering]
        counts = [row["num_clusters"] for row in found]
        axes.plot(counts, [row["error"] for row in found], marker="o", label=clustering)
    counts = sorted({row["num_clusters"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize="medium", loc="left")
    axes.legend(frameon=False)
    return figure


def sweep_figures(
    rows: list[dict[str, Any]],
    distributions: dict[str, dict[str, np.ndarray[Any, Any]]],
    neuron: int | None,
) -> dict[str, Figure]:
    """Of ``sweep-clusters``: errors of every linear, and a neuron's distributions."""
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
        axes.plot(shares, [row["perplexity"] for row in found], marker="o", label=ranking)
    axes.legend(frameon=False)
    return figure


def allocation(rows: list[dict[str, Any]]) -> Figure:
    """Of ``allocate``: what each block alone loses, and the zeros and experts that it gets."""
    from matplotlib.figure import Figure

    bars = [("gap", "gap when it\nalone is pruned", "C3"), ("sparsity", "share of zeros", "C0")]
    if "num_clusters" in rows[0]:
        bars.append(("num_clusters", "experts", "C2"))
    figure = Figure(figsize=(6, 2.2 * len(bars)), layout="constrained")
    panels = figure.subplots(len(bars), 1, sharex=True)
    layers = [row["layer"] for row in rows]
    for axes, (name, text, colour) in zip(panels, bars, strict=True):
        axes.bar(layers, [row[name] for row in rows], color=colour)
        _label(axes, "", text)
        if name == "sparsity":
            axes.set_ylim(0, 1)
    panels[-1].set_xlabel("block")
    _whole_numbers(panels[-1])
    return figure


# -- runs beside each other ----------------------------------------------------------------------


def perplexity_against_cost(rows: Sequence[dict[str, Any]]) -> Figure:
    """Perplexity of runs over operations per token and over bytes of the checkpoint.

    Args:
        rows: of ``report.comparison``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _label(left, "MLP operations per token (share of dense)", "perplexity")
    _label(right, "weight files (share of dense)", "")
    for row in rows:
        for axes, key in ((left, "cost"), (right, "bytes")):
            axes.plot(row[key], row["perplexity"], marker="o", linestyle="", label=row["name"])
    dense = {row["perplexity_dense"] for row in rows}
    for value in dense:
        for axes in (left, right):
            axes.axhline(value, color="0.5", linestyle=":", label="dense")
    handles, labels = right.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), frameon=False, loc="outside lower center", ncols=3)
    return figure
