"""A run folder as one HTML page: no scripts, nothing from the network, readable on a phone."""

from __future__ import annotations

from collections import defaultdict
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from sparse_expansion import plots
from sparse_expansion.model.manifest import MANIFEST_NAME
from sparse_expansion.report import (
    LinearFacts,
    describe_clusters,
    describe_weights,
    linear_facts,
    size,
    summary_rows,
)
from sparse_expansion.store import Store, read_allocation, read_timeline

_PARTS = {"trunk": "shared by all experts", "experts": "experts", "router": "routers and grids"}


def report_page(
    store: Store, result: dict[str, Any], *, price_per_hour: float | None = None
) -> str:
    """The page of a finished or unfinished run.

    Args:
        store: the run's folder.
        result: what ``run_report`` found in it.
        price_per_hour: of one worker, to state a cost.
    """
    config = result["config"]
    metrics = result.get("metrics")
    rows = result.get("experts", [])
    facts = linear_facts(rows)
    timeline = read_timeline(store)
    shares = read_allocation(store)
    name = result["model"].rstrip("/").rpartition("/")[2] or result["model"]
    asked = (
        f"{describe_clusters(config['routing'])}, "
        f"{describe_weights(config)}, "
        f"{config['calibration']['calibration_inputs']} inputs"
    )
    # Text from files is escaped; the plots are the only markup that is not the template's.
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    source = files("sparse_expansion").joinpath("templates/report.html").read_text("utf-8")
    return environment.from_string(source).render(
        name=name,
        asked=asked,
        finished=result["is_finished"],
        finished_units=result["finished_units"],
        cards=[] if metrics is None else _cards(metrics, price_per_hour),
        error_plot=plots.svg(plots.errors_by_block(facts)) if facts else "",
        worst=_worst(facts) if facts else "",
        share_plot=plots.svg(plots.shares_by_block(facts)) if facts else "",
        clusters=_clusters(rows) if rows else "",
        timeline_plot=plots.svg(plots.timeline(timeline)) if timeline else "",
        stages=[] if metrics is None else _stages(metrics),
        parts=_parts(store) if store.exists(MANIFEST_NAME) else [],
        linears=summary_rows(facts) if facts else [],
        allocation_plot=plots.svg(plots.allocation(shares)) if shares else "",
        settings=sorted(_flat(config)),
        command=result.get("command"),
    )


def _cards(metrics: dict[str, Any], price_per_hour: float | None) -> list[dict[str, str]]:
    cards = []
    if "perplexity_dense" in metrics:
        dense, expanded = metrics["perplexity_dense"], metrics["perplexity_expanded"]
        cards += [
            {"value": f"{expanded:.3f}", "label": "perplexity per token, expanded"},
            {"value": f"{dense:.3f}", "label": "perplexity per token, dense"},
        ]
    seconds = sum(metrics["seconds"].values())
    cards += [
        {"value": size(metrics["checkpoint_bytes"]), "label": "weight files"},
        {"value": size(metrics["dense_checkpoint_bytes"]), "label": "dense weight files"},
        {"value": f"{seconds / 60:.1f} min", "label": "wall clock"},
        {"value": size(metrics["peak_memory_bytes"]), "label": "peak memory of a worker"},
    ]
    if price_per_hour is not None:
        hours = sum(metrics["unit_seconds"].values()) / 3600
        cards.append({"value": f"{hours * price_per_hour:.2f}", "label": "cost of worker time"})
    return cards


def _stages(metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    if "profile" not in metrics:
        found = sorted(metrics["unit_seconds"].items(), key=lambda item: -item[1])
        return [("stage", "seconds"), *((name, f"{seconds:.1f}") for name, seconds in found)]
    rows: list[tuple[str, ...]] = [("stage", "units", "seconds", "of matmul", "of copy")]
    for name, work in metrics["profile"]["stages"].items():
        shares = (f"{work['matmul_share']:.0%}", f"{work['copy_share']:.0%}")
        rows.append((name, str(work["units"]), f"{work['seconds']:.1f}", *shares))
    return rows


def _parts(store: Store) -> list[tuple[str, str]]:
    found: dict[str, int] = defaultdict(int)
    for tensor in store.read_json(MANIFEST_NAME)["tensors"].values():
        found[tensor["file"].partition("-")[0]] += tensor["bytes"]
    return [(label, size(found[part])) for part, label in _PARTS.items() if part in found]


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, item in value.items():
        if isinstance(item, dict):
            rows += _flat(item, f"{prefix}{key}.")
        elif item is not None:
            rows.append((prefix + key, str(item)))
    return rows


def _worst(facts: list[LinearFacts]) -> str:
    worst = max(facts, key=lambda one: one.error)
    return f"Most of it in {worst.linear} of block {worst.layer}: {worst.error:.1%}."


def _clusters(rows: list[dict[str, Any]]) -> str:
    # Linears of a group share their inputs and so their clusters: counted once, as in metrics.json.
    experts = {(row["layer"], row["group"], row["expert"]): row for row in rows}
    starved = sum(row["is_starved"] for row in experts.values())
    raised = sum(row["damping_attempts"] > 1 for row in experts.values())
    return (
        f"Share of the calibration tokens in the largest and the smallest cluster of every linear. "
        f"{starved} of {len(experts)} experts had too few tokens and use their whole group's "
        f"Hessian; {raised} needed more than the asked damping."
    )
