"""The schedule and the dispatcher, without Ray: order, losses, bounds, a simulated cluster."""

import pytest

from sparse_expansion.config import CalibrationConfig, RoutingConfig, RunConfig
from sparse_expansion.execution.base import Schedule
from sparse_expansion.execution.simulation import simulate
from sparse_expansion.plan import GroupShape, ModelShape, expansion_units
from sparse_expansion.stages import Unit


def units(schedule="dense", layers=4, shards=3, clusters=8):
    config = RunConfig(
        routing=RoutingConfig(num_clusters=clusters),
        calibration=CalibrationConfig(
            calibration_inputs=schedule, data_shards=shards, dataset_size=8, seqlen=64
        ),
        experts_per_unit=2,
    )
    shape = ModelShape(layers, 64, (GroupShape("up", 64, 512), GroupShape("down", 256, 64)))
    return expansion_units(config, shape)


def chain():
    return [
        Unit(key="a", stage="x", outputs=("v",)),
        Unit(key="b", stage="x", inputs=(("a", "v"),), outputs=("v",)),
        Unit(key="c", stage="x", inputs=(("a", "v"), ("b", "v")), after=("b", "long-done")),
    ]


def test_values_live_as_long_as_someone_needs_them():
    schedule = Schedule(chain())
    assert schedule.ready == {"a"}
    assert schedule.start("a") == []
    schedule.finish("a", {"v": "A"})
    assert schedule.start("b") == ["A"]
    schedule.finish("b", {"v": "B"})
    assert schedule.values == {("a", "v"): "A", ("b", "v"): "B"}
    assert schedule.start("c") == ["A", "B"]
    schedule.finish("c", {})
    assert schedule.values == {} and schedule.is_finished


def test_a_lost_value_is_made_again_with_all_that_it_needs():
    schedule = Schedule(chain())
    for key in ("a", "b"):
        schedule.start(key)
        schedule.finish(key, {"v": key.upper()})
    assert schedule.ready == {"c"}
    schedule.lose_value(("a", "v"))
    schedule.lose_value(("b", "v"))
    assert schedule.ready == {"a"} and set(schedule.waiting) == {"b", "c"}
    for key in ("a", "b", "c"):
        schedule.start(key)
        schedule.finish(key, {"v": key.upper()} if key != "c" else {})
    assert schedule.is_finished


def test_requeue():
    schedule = Schedule(chain())
    schedule.start("a")
    schedule.requeue("a")
    assert schedule.ready == {"a"} and not schedule.running


def run(all_units, num_workers, **options):
    """Simulate, and check what must hold for every run."""
    found = simulate(all_units, num_workers, seconds=lambda unit: unit.cost, **options)
    place = {}
    for position, (_, unit) in enumerate(found.starts):
        place.setdefault(unit.key, position)
        for source in [key for key, _ in unit.inputs] + list(unit.after):
            assert place[source] < position, f"{unit.key} started before {source}"
    assert set(place) == {unit.key for unit in all_units}
    return found


@pytest.mark.parametrize("schedule", ["compressed", "dense"])
@pytest.mark.parametrize("workers", [1, 2, 7])
def test_every_unit_is_done_once_and_in_order(schedule, workers):
    all_units = units(schedule)
    found = run(all_units, workers, captures_first=schedule == "dense", num_shards=3)
    assert len(found.starts) == len(all_units)
    assert found.work == pytest.approx(sum(unit.cost for unit in all_units))
    assert found.makespan <= found.work <= workers * found.makespan * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("schedule", ["compressed", "dense"])
def test_lost_workers_and_their_values(schedule, seed):
    all_units = units(schedule)
    found = run(all_units, 3, loss_probability=0.1, seed=seed)
    assert len(found.starts) > len(all_units)


def test_a_worker_that_joins_later_gets_work():
    found = run(units(), 1, joins=[(1e6, "late")])
    assert any(worker == "late" for worker, _ in found.starts)


def test_the_cache_is_used_where_it_is():
    where: dict[str, set[str]] = {}
    for worker, unit in run(units("compressed"), 2, num_shards=3).starts:
        if unit.affinity:
            where.setdefault(unit.affinity, set()).add(worker)
    moved = sum(len(found) > 1 for found in where.values())
    assert moved <= len(where) // 4


def test_values_between_units_are_bounded():
    all_units = units("compressed", shards=8, clusters=32)
    largest = max(unit.output_bytes for unit in all_units)
    # One range of all shards is 8 of the largest; their moments and Grams are the rest.
    budget = 16 * largest
    assert run(all_units, 8, num_shards=8).peak_value_bytes > budget
    bounded = run(all_units, 8, value_budget=budget, num_shards=8)
    assert bounded.peak_value_bytes <= budget + largest


def test_dense_captures_do_not_run_far_ahead():
    all_units = units("dense", layers=30, shards=2)
    found = run(all_units, 2, captures_first=True, num_shards=2)
    position = {unit.key: i for i, (_, unit) in enumerate(found.starts)}
    last_of_first_block = max(position[u.key] for u in all_units if u.layer == 0)
    first_of_far_block = min(position[u.key] for u in all_units if u.layer == 10)
    assert first_of_far_block > last_of_first_block


@pytest.mark.parametrize("schedule", ["dense", "compressed"])
def test_two_workers_are_nearly_twice_as_fast(schedule):
    """No timing: the simulated clock."""
    all_units = units(schedule, layers=8, shards=4)
    options = {"captures_first": schedule == "dense", "num_shards": 4}
    found = run(all_units, 2, **options)
    assert found.work / (2 * found.makespan) > 0.75
