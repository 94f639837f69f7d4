"""Figures of one run: errors and clusters by block, and what every worker did when."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_expansion.report.experts import ExpertRow, LinearFacts, linear_facts
from sparse_expansion.report.facts import RunFacts
from sparse_expansion.report.figures.allocation import allocation
from sparse_expansion.report.figures.canvas import count_from_zero, figure_and_axes, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_SHOWN = 40
"""Workers, stages, linears or groups that a figure shows: more take minutes, unread."""
GAP_SHARE = 0.002
"""Units of one stage on one worker that are closer than this share of the run are one bar."""


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
    for linear, found in _by_linear(facts).items():
        layers, errors = [one.layer for one in found], [one.error for one in found]
        axes.plot(layers, errors, marker="o", ms=3, label=plain(linear))
    axes.legend(frameon=False)
    count_from_zero(axes)
    return figure


def shares_by_block(facts: Iterable[LinearFacts]) -> Figure:
    """Share of the tokens in the largest and the smallest cluster over the blocks."""
    figure, axes = figure_and_axes("block", "share of tokens")
    for number, (linear, found) in enumerate(_by_linear(facts).items()):
        layers, color = [one.layer for one in found], f"C{number}"
        axes.plot(layers, [one.largest_share for one in found], color=color, label=plain(linear))
        axes.plot(layers, [one.smallest_share for one in found], color=color, linestyle=":")
    axes.legend(frameon=False, title="largest (line), smallest (dots)")
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
    figure = Figure(figsize=(8, 0.8 + 1.8 * len(shown)), layout="constrained")
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
    figure, axes = figure_and_axes("seconds", "", height=1.6 + 0.35 * len(workers))
    for number, stage in enumerate(stages):
        seen = False
        for place, worker in enumerate(workers):
            bars = merged_spans(spans[stage].get(worker, ()), GAP_SHARE * whole)
            if bars:
                label = None if seen else plain(stage)
                axes.broken_barh(bars, (place - 0.4, 0.8), color=f"C{number}", label=label)
                seen = True
    axes.set_yticks(range(len(workers)), [plain(worker) for worker in workers])
    if len(worked) > len(workers):
        axes.set_xlabel(f"seconds; those {len(workers)} of {len(worked)} workers that worked most")
    axes.invert_yaxis()
    axes.legend(
        frameon=False, ncols=min(8, len(stages)), loc="upper center", bbox_to_anchor=(0.5, 1.35)
    )
    return figure
