"""The schedule and the dispatcher, without Ray: order, losses, bounds, a simulated cluster."""

import heapq
import random

import pytest

from sparse_expansion.config import CalibrationConfig, RoutingConfig, RunConfig
from sparse_expansion.execution.base import Schedule
from sparse_expansion.execution.dispatch import Dispatcher
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


def simulate(
    all_units, num_workers, *, losses=0.0, seed=0, budget=float("inf"), joins=(), **options
):
    """Run on simulated workers; returns makespan, work done, and the order of starts."""
    rng = random.Random(seed)
    schedule = Schedule(all_units)
    dispatcher = Dispatcher(schedule, num_workers=num_workers, value_budget=budget, **options)
    now, work, order, peak = 0.0, 0.0, [], 0.0
    clock: list[tuple[float, int, str, Unit | None]] = []
    free = [f"w{i}" for i in range(num_workers)]
    for worker in free:
        dispatcher.add_worker(worker)
    ticket = 0
    for at, worker in joins:
        heapq.heappush(clock, (at, -1, worker, None))
    while not schedule.is_finished:
        for worker in list(free):
            unit = dispatcher.next_unit(worker)
            if unit is None:
                continue
            for source in [key for key, _ in unit.inputs] + list(unit.after):
                assert source in schedule.done or source not in schedule.units, unit.key
            schedule.start(unit.key)
            free.remove(worker)
            order.append((worker, unit))
            ticket += 1
            peak = max(peak, dispatcher.value_bytes)
            heapq.heappush(clock, (now + unit.cost, ticket, worker, unit))
        assert clock, "nothing runs and nothing can start"
        now, _, worker, unit = heapq.heappop(clock)
        if unit is None:
            dispatcher.add_worker(worker)
            free.append(worker)
            continue
        if rng.random() < losses:
            schedule.requeue(unit.key)
            dispatcher.returned(unit)
            dispatcher.remove_worker(worker)
            for value in list(schedule.values):
                if schedule.values[value] == worker:
                    schedule.lose_value(value)
            worker = worker + "'"
            dispatcher.add_worker(worker)
        else:
            work += unit.cost
            schedule.finish(unit.key, dict.fromkeys(unit.outputs, worker))
            dispatcher.finished(unit)
        free.append(worker)
    assert schedule.values == {} and dispatcher.value_bytes == 0
    return now, work, order, peak


@pytest.mark.parametrize("schedule", ["compressed", "dense"])
@pytest.mark.parametrize("workers", [1, 2, 7])
def test_every_unit_is_done_once_and_in_order(schedule, workers):
    all_units = units(schedule)
    _, _, order, _ = simulate(all_units, workers, captures_first=schedule == "dense", num_shards=3)
    assert sorted(unit.key for _, unit in order) == sorted(unit.key for unit in all_units)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("schedule", ["compressed", "dense"])
def test_lost_workers_and_their_values(schedule, seed):
    all_units = units(schedule)
    _, _, order, _ = simulate(all_units, 3, losses=0.1, seed=seed)
    assert {unit.key for _, unit in order} == {unit.key for unit in all_units}
    assert len(order) > len(all_units)


def test_a_worker_that_joins_later_gets_work():
    _, _, order, _ = simulate(units(), 1, joins=[(1e6, "late")])
    assert any(worker == "late" for worker, _ in order)


def test_the_cache_is_used_where_it_is():
    _, _, order, _ = simulate(units("compressed"), 2, num_shards=3)
    where: dict[str, set[str]] = {}
    for worker, unit in order:
        if unit.affinity:
            where.setdefault(unit.affinity, set()).add(worker)
    moved = sum(len(found) > 1 for found in where.values())
    assert moved <= len(where) // 4


def test_values_between_units_are_bounded():
    all_units = units("compressed", shards=8, clusters=32)
    largest = max(unit.output_bytes for unit in all_units)
    # One range of all shards is 8 of the largest; their moments and Grams are the rest.
    budget = 16 * largest
    _, _, _, unbounded = simulate(all_units, 8, num_shards=8)
    _, _, order, peak = simulate(all_units, 8, budget=budget, num_shards=8)
    assert unbounded > budget
    assert peak <= budget + largest
    assert len(order) == len(all_units)


def test_dense_captures_do_not_run_far_ahead():
    all_units = units("dense", layers=30, shards=2)
    _, _, order, _ = simulate(all_units, 2, captures_first=True, num_shards=2)
    position = {unit.key: i for i, (_, unit) in enumerate(order)}
    last_of_first_block = max(position[u.key] for u in all_units if u.layer == 0)
    first_of_far_block = min(position[u.key] for u in all_units if u.layer == 10)
    assert first_of_far_block > last_of_first_block
