"""Scheduler efficiency on simulated actors, for Llama 2 13B (published sizes).

    python benchmarks/scaling.py

The graph, schedule and dispatcher are the real ones; a unit takes its estimated operations at a
modelled rate, times a seeded spread of +-20 %. Efficiency is (sum of work) / (actors x makespan);
work that was done twice (a cache made again) counts as work in "busy" and not in "efficiency".
"""

from __future__ import annotations

import json
import random

from sparse_expansion.config import CalibrationConfig, RoutingConfig, RunConfig
from sparse_expansion.execution.simulation import simulate
from sparse_expansion.plan import GroupShape, ModelShape, expansion_units
from sparse_expansion.stages import Unit

LLAMA_2_13B = ModelShape(
    40,
    5120,
    (
        GroupShape("mlp.gate_proj+up_proj", 5120, 2 * 13824),
        GroupShape("mlp.down_proj", 13824, 5120),
    ),
)
# Modelled, not measured: a data-centre GPU in float32 products, and its slower factorizations.
FLOPS_PER_SECOND = 40e12
SECONDS_PER_UNIT = 0.05


def main() -> None:
    """Print a table and one JSON line per row."""
    print("schedule    shards  actors  units  makespan h  efficiency  busy   driver us/unit")
    for schedule, shards in (("dense", 8), ("compressed", 8), ("compressed", 64)):
        config = RunConfig(
            routing=RoutingConfig(num_clusters=16),
            calibration=CalibrationConfig(
                calibration_inputs=schedule, dataset_size=128, seqlen=4096, data_shards=shards
            ),
            experts_per_unit=1,
        )
        units = expansion_units(config, LLAMA_2_13B)
        chance = random.Random(0)
        spread = {unit.key: chance.uniform(0.8, 1.2) for unit in units}

        def seconds(unit: Unit, spread: dict[str, float] = spread) -> float:
            return (SECONDS_PER_UNIT + unit.cost / FLOPS_PER_SECOND) * spread[unit.key]

        ideal = sum(seconds(unit) for unit in units)
        for actors in (1, 2, 4, 8, 16, 32, 64):
            found = simulate(
                units,
                actors,
                seconds=seconds,
                move_seconds=lambda unit: unit.move_cost / FLOPS_PER_SECOND,
                captures_first=schedule == "dense",
                num_shards=shards,
            )
            row = {
                "schedule": schedule,
                "shards": shards,
                "actors": actors,
                "units": len(units),
                "makespan_hours": found.makespan / 3600,
                "efficiency": ideal / (actors * found.makespan),
                "busy": found.work / (actors * found.makespan),
                "driver_microseconds_per_unit": 1e6 * found.driver_seconds / len(units),
            }
            print(
                f"{schedule:<11} {shards:>6} {actors:>7} {len(units):>6} "
                f"{row['makespan_hours']:>11.3f} {row['efficiency']:>11.3f} {row['busy']:>5.3f} "
                f"{row['driver_microseconds_per_unit']:>12.0f}"
            )
            print(json.dumps(row, sort_keys=True), flush=True)


if __name__ == "__main__":
    main()
