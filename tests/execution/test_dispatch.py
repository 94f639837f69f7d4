"""The schedule and the dispatcher, without Ray: order, losses, bounds, a simulated cluster."""

import itertools

import pytest

from sparse_expansion.config import CalibrationConfig, RoutingConfig, RunConfig
from sparse_expansion.execution.base import Schedule
from sparse_expansion.execution.dispatch import Dispatcher
from sparse_expansion.execution.ray.attempts import Attempts
from sparse_expansion.execution.simulation import simulate
from sparse_expansion.planning.expansion import expansion_units
from sparse_expansion.planning.shapes import GroupShape, ModelShape
from sparse_expansion.types import CompressionError
from sparse_expansion.units import Unit


def units(schedule="dense", layers=4, shards=3, clusters=8):
    config = RunConfig(
        routing=RoutingConfig(num_clusters=clusters),
        calibration=CalibrationConfig(
            calibration_inputs=schedule, data_shards=shards, dataset_size=8, seqlen=64
        ),
        experts_per_unit=2,
    )
    shape = ModelShape(
        layers, 64, (GroupShape("up", 64, 512), GroupShape("down", 256, 64, level=1))
    )
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


@pytest.mark.parametrize("schedule", ["compressed", "sequential", "cumulative", "dense"])
@pytest.mark.parametrize("workers", [1, 2, 7])
def test_every_unit_is_done_once_and_in_order(schedule, workers):
    all_units = units(schedule)
    found = run(all_units, workers, captures_first=schedule == "dense", captured_bytes=1e9)
    assert len(found.starts) == len(all_units)
    assert found.work == pytest.approx(sum(unit.cost for unit in all_units))
    assert found.makespan <= found.work <= workers * found.makespan * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("schedule", ["compressed", "sequential", "cumulative", "dense"])
def test_lost_workers_and_their_values(schedule, seed):
    all_units = units(schedule)
    found = run(all_units, 3, loss_probability=0.1, seed=seed)
    assert len(found.starts) > len(all_units)


def test_a_worker_that_joins_later_gets_work():
    found = run(units(), 1, joins=[(1e6, "late")])
    assert any(worker == "late" for worker, _ in found.starts)


def test_the_cache_is_used_where_it_is():
    where: dict[str, set[str]] = {}
    for worker, unit in run(units("compressed"), 2, captured_bytes=1e9).starts:
        if unit.affinity:
            where.setdefault(unit.affinity, set()).add(worker)
    moved = sum(len(found) > 1 for found in where.values())
    assert moved <= len(where) // 4


def test_values_between_units_are_bounded():
    all_units = units("dense", layers=8, shards=8, clusters=32)
    budget = 1.5 * sum(unit.output_bytes for unit in all_units if unit.layer == 0)
    assert run(all_units, 8, captures_first=True).peak_value_bytes > budget
    bounded = run(all_units, 8, captures_first=True, value_budget=budget)
    assert bounded.peak_value_bytes <= budget


def test_one_worker_keeps_to_one_block():
    """Running ahead would only fill memory: nobody else waits for the next block."""
    all_units = units("dense", layers=8)
    found = run(all_units, 1, captures_first=True)
    layers = [unit.layer for _, unit in found.starts if unit.layer >= 0]
    for first, later in itertools.pairwise(layers):
        assert later >= first - 1
    block = sum(unit.output_bytes for unit in all_units if unit.layer == 0)
    assert found.peak_value_bytes <= 1.5 * block


@pytest.mark.parametrize("workers", [2, 4])
def test_captures_run_ahead_as_far_as_workers_need(workers):
    ahead, done = 0, set()
    for _, unit in run(units("dense", layers=16), workers, captures_first=True).starts:
        if unit.stage == "capture":
            ahead = max(ahead, unit.layer - len(done))
        if unit.stage == "experts" and unit.layer > 0:
            done.add(unit.layer - 1)
    assert 0 < ahead <= workers + 2


@pytest.mark.parametrize(("workers", "slower"), [(2, 1.25), (4, 1.25), (8, 1.4)])
def test_a_small_budget_is_kept_and_costs_little(workers, slower):
    """Half-made values of many consumers must not take the room of the one that is next."""
    all_units = units("dense", layers=4, shards=16, clusters=64)
    first = next(unit for unit in all_units if unit.key.startswith("layer-000/down/experts-000"))
    needed = 16 * next(u for u in all_units if u.key == first.inputs[1][0]).output_bytes
    free = run(all_units, workers, captures_first=True)
    tight = run(all_units, workers, captures_first=True, value_budget=2.0 * needed)
    assert tight.peak_value_bytes <= 2.0 * needed < free.peak_value_bytes
    assert tight.makespan < slower * free.makespan


def test_a_value_larger_than_the_budget_does_not_stop_the_run():
    all_units = units("dense", shards=8, clusters=32)
    block = sum(unit.output_bytes for unit in all_units if unit.layer == 0)
    for workers in (1, 8):
        found = run(all_units, workers, captures_first=True, value_budget=1.0)
        assert found.peak_value_bytes <= block


def test_decisions_do_not_slow_down_with_waiting_units_and_idle_workers(monkeypatch):
    """No timing: the number of queue entries that are looked at, per unit."""
    looked = 0
    peek = Dispatcher._peek

    def counting(self, heap, worker):
        nonlocal looked
        looked += 1
        return peek(self, heap, worker)

    monkeypatch.setattr(Dispatcher, "_peek", counting)
    per_unit = []
    for layers in (4, 16):
        all_units = units("dense", layers=layers, shards=16)
        looked = 0
        run(all_units, 16, captures_first=True)
        per_unit.append(looked / len(all_units))
    assert per_unit[1] < 1.5 * per_unit[0]


def test_dense_captures_do_not_run_far_ahead():
    all_units = units("dense", layers=30, shards=2)
    block = sum(unit.cache_bytes for unit in all_units if unit.layer == 0)
    found = run(all_units, 8, captures_first=True, captured_bytes=block)
    position = {unit.key: i for i, (_, unit) in enumerate(found.starts)}
    for layer in range(8, 30):
        first = min(position[u.key] for u in all_units if u.layer == layer)
        before = [u for u in all_units if u.layer == layer - 8 and u.stage == "gather"]
        assert all(position[u.key] < first for u in before)
    assert any(  # but ahead they do run
        position[u.key] < position["layer-000/down/experts-006-007"]
        for u in all_units
        if u.layer == 4
    )


@pytest.mark.parametrize("schedule", ["dense", "compressed"])
def test_two_workers_are_nearly_twice_as_fast(schedule):
    """No timing: the simulated clock."""
    all_units = units(schedule, layers=8, shards=4)
    options = {"captures_first": schedule == "dense", "captured_bytes": 1e9}
    found = run(all_units, 2, **options)
    assert found.work / (2 * found.makespan) > 0.75


def test_a_unit_is_given_up_at_its_last_try_and_the_first_error_counts():
    attempts = Attempts()
    assert not attempts.failed("a", "a broke", limit=2)
    attempts.raise_first()
    assert attempts.failed("a", "a broke", limit=2)
    assert attempts.failed("b", "b broke", limit=1)
    with pytest.raises(CompressionError, match=r"^a broke \(and 1 more units\)$"):
        attempts.raise_first()
    full = OSError(28, "No space left on device")
    attempts.failed("c", "c broke", limit=1, error=full)
    with pytest.raises(OSError, match="No space left"):
        attempts.raise_first()
