"""Figures of one run: errors and clusters by block, and what every worker did when."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_expansion.report.experts import ExpertRow, LinearFacts, linear_facts
from sparse_expansion.report.facts import RunFacts
from sparse_expansion.report.figures.allocation import allocation
from sparse_expansion.report.figures.canvas import (
    WIDTH,
    count_from_zero,
    figure_and_axes,
    legend_above,
    plain,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_SHOWN = 40
"""Workers, stages, linears or groups that a figure shows: more take minutes, unread."""
GAP_SHARE = 0.002
"""Units of one stage on one worker that are closer than this share of the run are one bar."""
MARKERS = "os^vDP"
"""Marks of lines that may lie upon each other, as errors of linears with the same inputs do."""
LEGEND_COLUMNS = 3
"""Linears or stages side by side in a legend."""


def run_figures(facts: RunFacts) -> dict[str, Figure]:
    """Every figure that a run, finished or not, has data for, by name."""
    figures = expert_figures(facts.experts)
    if facts.timeline:
        figures["timeline"] = timeline(facts.timeline)
    if facts.allocation:
        figures["allocation"] = allocation(facts.allocation)
    return figures


def expert_figures(experts: Sequence[ExpertRow]) -> dict[str, Figure]:
    """The figures of a run's experts by name, none where there are no experts."""
    if not experts:
        return {}
    linears = linear_facts(experts)
    return {
        "errors": errors_by_block(linears),
        "cluster-shares": shares_by_block(linears),
        "cluster-sizes": cluster_sizes(experts),
    }


def _by_linear(facts: Iterable[LinearFacts]) -> dict[str, list[LinearFacts]]:
    """The facts of every linear's blocks, in order of the blocks; of the first linears only."""
    found: dict[str, list[LinearFacts]] = defaultdict(list)
    for one in sorted(facts, key=lambda one: one.layer):
        found[one.linear].append(one)
    return dict(list(found.items())[:MOST_SHOWN])


def errors_by_block(facts: Iterable[LinearFacts]) -> Figure:
    """Lost output energy of every linear over the blocks."""
    figure, axes = figure_and_axes("block", "lost output energy")
    for number, (linear, found) in enumerate(_by_linear(facts).items()):
        layers, errors = [one.layer for one in found], [one.error for one in found]
        mark = MARKERS[number % len(MARKERS)]
        # The first are the largest: what lies upon them leaves their edge to see.
        size = max(3, 7 - 2 * number)
        axes.plot(layers, errors, marker=mark, ms=size, mfc="none", label=plain(linear))
    legend_above(figure, ncols=LEGEND_COLUMNS)
    count_from_zero(axes)
    return figure


def shares_by_block(facts: Iterable[LinearFacts]) -> Figure:
    """Share of the tokens in the largest and the smallest cluster over the blocks.

    Linears with the same inputs have the same clusters: one line with all of their names.
    """
    figure, axes = figure_and_axes("block", "share of tokens")
    names: dict[tuple[tuple[int, float, float], ...], list[str]] = defaultdict(list)
    for linear, found in _by_linear(facts).items():
        line = tuple((one.layer, one.largest_share, one.smallest_share) for one in found)
        names[line].append(linear)
    for number, (line, linears) in enumerate(names.items()):
        layers, largest, smallest = zip(*line, strict=True)
        color = f"C{number}"
        axes.plot(layers, largest, color=color, label=plain(", ".join(linears)))
        axes.plot(layers, smallest, color=color, linestyle=":")
    legend_above(figure, ncols=2, title="largest (line), smallest (dots)")
    count_from_zero(axes)
    return figure


def cluster_sizes(experts: Iterable[ExpertRow]) -> Figure:
    """Every cluster's share of its group's tokens, as a map: blocks by clusters, largest first."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    tokens: dict[str, dict[int, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
    for row in experts:
        tokens[row.group][row.layer][row.expert] = row.tokens
    shown = dict(list(tokens.items())[:MOST_SHOWN])
    figure = Figure(figsize=(WIDTH, 0.8 + 1.8 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), 1, squeeze=False, sharex=True)
    for axes, (group, layers) in zip(grid[:, 0], shown.items(), strict=True):
        shares = np.array(
            [sorted(layers[layer].values(), reverse=True) for layer in sorted(layers)], dtype=float
        )
        shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1)
        image = axes.imshow(shares.T, aspect="auto", cmap="viridis", vmin=0)
        axes.set_ylabel("cluster")
        axes.set_title(plain(group), fontsize="medium", loc="left")
        figure.colorbar(image, ax=axes, label="share of tokens")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    grid[-1, 0].set_xlabel("block")
    return figure


def merged_spans(spans: Iterable[tuple[float, float]], gap: float) -> list[tuple[float, float]]:
    """Spans (start, length) in order, with those that are at most the gap apart made one."""
    merged: list[tuple[float, float]] = []
    for start, length in sorted(spans):
        if merged and start - sum(merged[-1]) <= gap:
            first = merged[-1][0]
            merged[-1] = (first, max(sum(merged[-1]), start + length) - first)
        else:
            merged.append((start, length))
    return merged


def timeline(rows: Sequence[dict[str, Any]]) -> Figure:
    """What every worker did when: a bar per stretch of one stage.

    Args:
        rows: the rows of ``run/timeline.json``.
    """
    from matplotlib import colormaps

    begin = min(row["started"] for row in rows)
    whole = max(row["started"] + row["seconds"] for row in rows) - begin
    spans: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    worked: dict[str, float] = defaultdict(float)
    for row in sorted(rows, key=lambda row: row["started"]):
        span = row["started"] - begin, row["seconds"]
        spans[row["stage"]][row["worker"]].append(span)
        worked[row["worker"]] += row["seconds"]
    workers = sorted(sorted(worked, key=lambda name: (-worked[name], name))[:MOST_SHOWN])
    stages = list(spans)[:MOST_SHOWN]
    rows_of_legend = -(-len(stages) // LEGEND_COLUMNS)
    height = 1.2 + 0.22 * rows_of_legend + 0.35 * len(workers)
    figure, axes = figure_and_axes("seconds", "", height=height)
    colors = colormaps["tab20"]
    for number, stage in enumerate(stages):
        # The ten strong ones first, then their pale forms.
        color, seen = colors((2 * number + number // 10) % 20), False
        for place, worker in enumerate(workers):
            bars = merged_spans(spans[stage].get(worker, ()), GAP_SHARE * whole)
            if bars:
                label = None if seen else plain(stage)
                axes.broken_barh(bars, (place - 0.4, 0.8), color=color, label=label)
                seen = True
    axes.set_yticks(range(len(workers)), [plain(worker) for worker in workers])
    if len(worked) > len(workers):
        axes.set_xlabel(f"seconds; those {len(workers)} of {len(worked)} workers that worked most")
    axes.invert_yaxis()
    legend_above(figure, ncols=LEGEND_COLUMNS)
    return figure
