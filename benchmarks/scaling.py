"""Scheduler efficiency on simulated actors, for Llama 2 13B (published sizes).

    python benchmarks/scaling.py

The graph, schedule and dispatcher are the real ones; a unit takes its estimated operations at a
modelled rate plus the transfer of its inputs and a fixed cost, times a seeded spread of +-20 %.
Efficiency is (sum of work) / (actors x makespan); a cache that was made again is no work. The
critical path (the longest chain of units that need each other, at full parallelism) bounds what
any scheduler could do.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from sparse_expansion.config import CalibrationConfig, RoutingConfig, RunConfig
from sparse_expansion.execution.simulation import simulate
from sparse_expansion.planning.expansion import expansion_units
from sparse_expansion.planning.shapes import GroupShape, ModelShape
from sparse_expansion.units import Unit

LLAMA_2_13B = ModelShape(
    40,
    5120,
    (
        GroupShape("mlp.gate_proj+up_proj", 5120, 2 * 13824, num_linears=2),
        GroupShape("mlp.down_proj", 13824, 5120, level=1),
    ),
    item_bytes=2,
)
# Modelled, not measured: a data-centre GPU in float32 products without TF32, 25 Gb/s of network.
FLOPS_PER_SECOND = 15e12
BYTES_PER_SECOND = 3e9
SECONDS_PER_UNIT = 0.02
CAPTURED_BYTES = 8 << 30
OBJECT_STORE_BYTES = 20e9


def durations(units: list[Unit]) -> Callable[[Unit], float]:
    """Modelled seconds of every unit."""
    chance = random.Random(0)
    moved = {unit.key: unit.output_bytes / max(1, len(unit.outputs)) for unit in units}
    seconds = {
        unit.key: (
            SECONDS_PER_UNIT
            + unit.cost / FLOPS_PER_SECOND
            + sum(moved[key] for key, _ in unit.inputs) / BYTES_PER_SECOND
        )
        * chance.uniform(0.8, 1.2)
        for unit in units
    }
    return lambda unit: seconds[unit.key]


def critical_path(units: list[Unit], seconds: Callable[[Unit], float]) -> float:
    """Seconds of the longest chain; units come after what they need."""
    end: dict[str, float] = {}
    for unit in units:
        needs = {key for key, _ in unit.inputs} | set(unit.after)
        end[unit.key] = seconds(unit) + max((end[key] for key in needs), default=0.0)
    return max(end.values())


def main() -> None:
    """Print a table and one JSON line per row."""
    print(
        "schedule    windows  shards  actors  units  makespan s  critical path s  efficiency  "
        "busy  driver us/unit"
    )
    for schedule, windows, shards in (
        ("dense", 128, 64),
        ("dense", 512, 64),
        ("compressed", 128, 64),
        ("compressed", 512, 64),
    ):
        config = RunConfig(
            routing=RoutingConfig(num_clusters=16),
            calibration=CalibrationConfig(
                calibration_inputs=schedule, dataset_size=windows, seqlen=4096, data_shards=shards
            ),
            experts_per_unit=1,
        )
        units = expansion_units(config, LLAMA_2_13B)
        seconds = durations(units)
        ideal = sum(seconds(unit) for unit in units)
        longest = critical_path(units, seconds)
        for actors in (1, 2, 4, 8, 16, 32, 64):
            found = simulate(
                units,
                actors,
                seconds=seconds,
                move_seconds=lambda unit: unit.move_cost / FLOPS_PER_SECOND,
                captures_first=schedule == "dense",
                captured_bytes=CAPTURED_BYTES,
                value_budget=0.6 * OBJECT_STORE_BYTES * actors,
            )
            row = {
                "schedule": schedule,
                "windows": windows,
                "shards": shards,
                "actors": actors,
                "units": len(units),
                "makespan_seconds": found.makespan,
                "critical_path_seconds": longest,
                "efficiency": ideal / (actors * found.makespan),
                "busy": found.work / (actors * found.makespan),
                "peak_value_bytes_per_actor": found.peak_value_bytes / actors,
                "driver_microseconds_per_unit": 1e6 * found.driver_seconds / len(units),
            }
            print(
                f"{schedule:<11} {windows:>7} {shards:>7} {actors:>7} {len(units):>6} "
                f"{found.makespan:>11.0f} {longest:>16.0f} {row['efficiency']:>11.3f} "
                f"{row['busy']:>5.3f} {row['driver_microseconds_per_unit']:>15.0f}"
            )
            print(json.dumps(row, sort_keys=True), flush=True)


if __name__ == "__main__":
    main()
