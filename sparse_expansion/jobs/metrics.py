"""The metrics of a run: what the markers of its finished units add up to, and what it took."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sparse_expansion.jobs.assemble import bits_per_weight, checkpoint_bytes, dense_bytes
from sparse_expansion.jobs.measurements import Measurements
from sparse_expansion.jobs.prepare import Prepared
from sparse_expansion.planning.costs import mlp_flops_per_token
from sparse_expansion.planning.shapes import model_shape
from sparse_expansion.process_memory import peak_memory_bytes
from sparse_expansion.report.experts import count_experts, count_mixtures, expert_rows
from sparse_expansion.store import Store
from sparse_expansion.work.registry import Stage
from sparse_expansion.work.stages.make import experts, refine_block


def expansion_metrics(prepared: Prepared, store: Store, executor: str) -> dict[str, Any]:
    """What the markers of a finished expansion add up to.

    Args:
        prepared: the run.
        store: its folder.
        executor: name of the executor that did its units.
    """
    records = store.records()
    rows = expert_rows(_of_stage(prepared, records, experts))
    counts, mixtures = count_experts(rows), count_mixtures(rows)
    return {
        "config": prepared.config.to_dict(),
        "model": prepared.identity["model"],
        "calibration_inputs": prepared.config.calibration.calibration_inputs,
        "executor": executor,
        "unit_threads": unit_threads(records),
        "routers_reproducible": prepared.config.routing.is_reproducible,
        "num_experts": counts.experts,
        "mlp_flops_per_token": mlp_flops_per_token(prepared.config, model_shape(prepared.shell)),
        "starved_experts": counts.starved,
        **({"mixtures": asdict(mixtures)} if mixtures.experts else {}),
        **_refinement(_of_stage(prepared, records, refine_block)),
        "raised_damping": counts.raised,
        "checkpoint_bytes": checkpoint_bytes(store),
        "dense_checkpoint_bytes": dense_bytes(prepared.shell),
        "bits_per_weight": bits_per_weight(prepared, records),
    }


def unit_threads(records: dict[str, dict[str, Any]]) -> list[int]:
    """Numbers of CPU threads that units were done with, in order.

    With more than one the bytes can be told from those of a run with one number. Markers of
    earlier versions do not say.

    Args:
        records: the markers of finished units by key.
    """
    return sorted({record["threads"] for record in records.values() if "threads" in record})


def mixed_threads(store: Store, threads: int | None) -> str | None:
    """A line of advice where a run is to go on with another number of threads, else None.

    Args:
        store: the run's folder.
        threads: that workers are to have; None where only they know.
    """
    if threads is None:
        return None
    before = unit_threads(store.records())
    if set(before) <= {threads}:
        return None
    numbers = " and ".join(map(str, before))
    return (
        f"finished units were done with {numbers} threads, the others get {threads}: bytes may "
        f"differ from those of one number (--threads {before[0]} keeps it)"
    )


def _of_stage(
    prepared: Prepared, records: dict[str, dict[str, Any]], stage: Stage
) -> dict[str, dict[str, Any]]:
    """The markers of a stage's units by key, all of which are finished."""
    found = {}
    for unit in prepared.units:
        if unit.stage == stage.name:
            if unit.key not in records:
                raise AssertionError(f"unit {unit.key} is not finished")
            found[unit.key] = records[unit.key]
    return found


def _refinement(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What training came to, where there was any: losses on held-out windows, over all blocks."""
    stats = [record["stats"] for record in records.values()]
    if not stats:
        return {}
    found = {"trained_blocks": sum(each["epoch"] > 0 for each in stats)}
    for name in ("loss_before", "loss_after"):
        losses = [each[name] for each in stats]
        found[name] = None if None in losses else sum(losses) / len(losses)
    return {"refinement": found}


def finish_metrics(metrics: dict[str, Any], measured: Measurements) -> dict[str, Any]:
    """The metrics with times and memory, and with the profile where ceilings were measured."""
    profile = measured.profile()
    return {
        **metrics,
        **({} if profile is None else {"profile": profile}),
        "seconds": dict(measured.seconds),
        "unit_seconds": {name: work.seconds for name, work in measured.stages.items()},
        "peak_memory_bytes": max(measured.peak_memory_bytes, peak_memory_bytes()),
        **measured.machine(),
    }
