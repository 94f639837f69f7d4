"""A run folder as one HTML page: no scripts, nothing from the network, readable on a phone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from sparse_expansion.messages import shown
from sparse_expansion.report.comparison import (
    COMPARED,
    against_baseline,
    comparison_cells,
    cost_of,
    gap_and_cost,
    size_of,
)
from sparse_expansion.report.describe import (
    describe_asked,
    describe_machine,
    describe_mixtures,
    describe_starved,
)
from sparse_expansion.report.experts import LinearFacts, count_experts, count_mixtures
from sparse_expansion.report.facts import RunFacts
from sparse_expansion.report.figures.allocation import allocation
from sparse_expansion.report.figures.canvas import svg
from sparse_expansion.report.figures.run import errors_by_block, shares_by_block, timeline
from sparse_expansion.report.formatting import format_bytes
from sparse_expansion.report.tables import summary_rows

_PARTS = {"trunk": "shared by all experts", "experts": "experts", "router": "routers and grids"}


def report_page(
    facts: RunFacts,
    *,
    price_per_hour: float | None = None,
    compared: Sequence[dict[str, Any]] = (),
    sample: Mapping[str, str] | None = None,
) -> str:
    """The page of a finished or unfinished run.

    Args:
        facts: what the run's folder holds.
        price_per_hour: what an hour of one worker costs, to state the run's cost; None for none.
        compared: rows of ``comparison``: a baseline's and the run's; none without a baseline.
        sample: ``prompt``, and how the ``dense`` and the ``expanded`` model continue it.
    """
    linears, metrics = facts.linears, facts.metrics
    # Text from files is escaped; the figures are the only markup that is not the template's.
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=shown)
    source = files("sparse_expansion.report").joinpath("templates/report.html").read_text("utf-8")
    return environment.from_string(source).render(
        name=facts.name,
        asked=describe_asked(facts.config),
        finished=facts.is_finished,
        finished_units=facts.finished_units,
        cards=[] if metrics is None else _cards(metrics, price_per_hour),
        error_plot=svg(errors_by_block(linears)) if linears else "",
        worst=_worst(linears) if linears else "",
        share_plot=svg(shares_by_block(linears)) if linears else "",
        clusters=_clusters(facts) if facts.experts else "",
        timeline_plot=svg(timeline(facts.timeline)) if facts.timeline else "",
        stages=[] if metrics is None else _stages(metrics),
        parts=[
            (label, format_bytes(facts.part_bytes[part]))
            for part, label in _PARTS.items()
            if part in facts.part_bytes
        ],
        linears=summary_rows(linears) if linears else [],
        allocation_plot=svg(allocation(facts.allocation)) if facts.allocation else "",
        settings=sorted(_flat(facts.config)),
        command=facts.command,
        machine="" if metrics is None else describe_machine(metrics),
        # What was asked of them is too wide for a phone's table.
        compared=[cells[:-1] for cells in comparison_cells(compared)] if compared else [],
        compared_settings=[(row["name"], row["setting"]) for row in compared],
        compared_note=f"{against_baseline(*compared)} Columns: {COMPARED}." if compared else "",
        sample=sample,
    )


def _cards(metrics: dict[str, Any], price_per_hour: float | None) -> list[dict[str, str]]:
    """The numbers at the page's top, each with its label."""
    cards = []
    if "perplexity_dense" in metrics:
        judged = gap_and_cost(metrics)
        dense, expanded = metrics["perplexity_dense"], metrics["perplexity_expanded"]
        cards += [
            {"value": f"{expanded:.3f}", "label": "perplexity per token, expanded"},
            {"value": f"{dense:.3f}", "label": "perplexity per token, dense"},
            {
                "value": f"{judged['gap']:.4f}",
                "label": f"gap, nats per token ({expanded / dense - 1:+.1%} perplexity)",
            },
        ]
    seconds = sum(metrics["seconds"].values())
    dense_size = format_bytes(metrics["dense_checkpoint_bytes"])
    peak_memory = format_bytes(metrics["peak_memory_bytes"])
    cards += [
        {"value": format_bytes(metrics["checkpoint_bytes"]), "label": "weight files"},
        {"value": dense_size, "label": "dense weight files"},
        {
            "value": f"{size_of(metrics):.2f} ×",
            "label": "weight files against the dense model's",
        },
        {
            "value": f"{cost_of(metrics):.3f} ×",
            "label": "operations of MLPs and routers per token against dense",
        },
        {"value": f"{seconds / 60:.1f} min", "label": "wall clock"},
        {"value": peak_memory, "label": "peak memory of a worker"},
    ]
    if price_per_hour is not None:
        hours = sum(metrics["unit_seconds"].values()) / 3600
        cards.append({"value": f"{hours * price_per_hour:.2f}", "label": "cost of worker time"})
    return cards


def _stages(metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    """Work by stage as cells, with a header; with shares of the ceilings where there are any."""
    if "profile" not in metrics:
        found = sorted(metrics["unit_seconds"].items(), key=lambda item: -item[1])
        return [("stage", "seconds"), *((name, f"{seconds:.1f}") for name, seconds in found)]
    rows: list[tuple[str, ...]] = [("stage", "units", "seconds", "of matmul", "of copy")]
    for name, work in metrics["profile"]["stages"].items():
        shares = (f"{work['matmul_share']:.0%}", f"{work['copy_share']:.0%}")
        rows.append((name, str(work["units"]), f"{work['seconds']:.1f}", *shares))
    return rows


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and values, without those that are not set."""
    rows = []
    for key, item in value.items():
        if isinstance(item, dict):
            rows += _flat(item, f"{prefix}{key}.")
        elif item is not None:
            rows.append((prefix + key, str(item)))
    return rows


def _worst(linears: Sequence[LinearFacts]) -> str:
    worst = max(linears, key=lambda one: one.error)
    return f"Most of it in {worst.linear} of block {worst.layer}: {worst.error:.1%}."


def _clusters(facts: RunFacts) -> str:
    counts = count_experts(facts.experts)
    return (
        "Share of the calibration tokens in the largest and the smallest cluster of every linear. "
        f"{describe_starved(counts)}; {counts.raised} needed more than the asked damping. "
        f"{describe_mixtures(count_mixtures(facts.experts))}"
    ).rstrip()
