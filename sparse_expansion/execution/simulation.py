"""A simulated cluster: the real schedule and dispatcher, with a clock in place of the work.

Used to measure the scheduler's efficiency at sizes that no test machine has, and to test it with
losses that are the same every time.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sparse_expansion.execution.base import Schedule
from sparse_expansion.execution.dispatch import Dispatcher
from sparse_expansion.units import Unit


@dataclass
class Simulated:
    """What a simulated run came to."""

    makespan: float = 0.0
    """Seconds from start to end, on the simulated clock."""
    work: float = 0.0
    """Seconds of work done, summed over workers, caches made again included."""
    driver_seconds: float = 0.0
    """Real seconds that the schedule and dispatcher took."""
    starts: list[tuple[str, Unit]] = field(default_factory=list)
    """(worker, unit) in order of starting."""
    peak_value_bytes: int = 0
    """Most bytes of values between units at any time."""


def simulate(
    units: Sequence[Unit],
    num_workers: int,
    *,
    seconds: Callable[[Unit], float],
    move_seconds: Callable[[Unit], float] = lambda unit: 0.0,
    captures_first: bool = False,
    captured_bytes: float = float("inf"),
    value_budget: float = float("inf"),
    loss_probability: float = 0.0,
    joins: Sequence[tuple[float, str]] = (),
    seed: int = 0,
) -> Simulated:
    """Run all units on simulated workers.

    Args:
        units: a graph of units.
        num_workers: workers at the start.
        seconds: duration of a unit.
        move_seconds: extra duration where a unit's cache has to be made again.
        captures_first: as for ``Dispatcher``.
        captured_bytes: as for ``Dispatcher``.
        value_budget: as for ``Dispatcher``.
        loss_probability: chance that a unit ends with the loss of its worker and its values; a
            new worker takes its place.
        joins: (second, name) of workers that come later.
        seed: of the losses.
    """
    chance = random.Random(seed)
    schedule = Schedule(units)
    dispatcher = Dispatcher(
        schedule,
        num_workers=num_workers,
        captures_first=captures_first,
        captured_bytes=captured_bytes,
        value_budget=value_budget,
    )
    result = Simulated()
    caches: dict[str, set[str]] = {}
    free = [f"worker-{number:03d}" for number in range(num_workers)]
    now = 0.0
    events: list[tuple[float, int, str, Unit | None]] = [
        (at, -1, worker, None) for at, worker in joins
    ]
    heapq.heapify(events)
    while not schedule.is_finished:
        begin = time.perf_counter()
        still_free = []
        for worker in free:
            unit = dispatcher.next_unit(worker)
            if unit is None:
                still_free.append(worker)
                continue
            schedule.start(unit.key)
            duration = seconds(unit)
            known = caches.setdefault(worker, set())
            if unit.affinity and unit.affinity not in known:
                known.add(unit.affinity)
                if unit.stage != "capture":
                    duration += move_seconds(unit)
            result.work += duration
            result.starts.append((worker, unit))
            result.peak_value_bytes = max(result.peak_value_bytes, dispatcher.value_bytes)
            heapq.heappush(events, (now + duration, len(result.starts), worker, unit))
        free = still_free
        if not events:
            raise AssertionError("nothing runs and nothing can start")
        result.driver_seconds += time.perf_counter() - begin
        now, _, worker, unit = heapq.heappop(events)
        begin = time.perf_counter()
        # Without a unit a worker has come up.
        if unit is not None and chance.random() < loss_probability:
            schedule.requeue(unit.key)
            dispatcher.returned(unit)
            dispatcher.remove_worker(worker)
            for value in [key for key, owner in schedule.values.items() if owner == worker]:
                schedule.lose_value(value)
            worker += "'"
        elif unit is not None:
            schedule.finish(unit.key, dict.fromkeys(unit.outputs, worker))
            dispatcher.finished(unit)
        free.append(worker)
        result.driver_seconds += time.perf_counter() - begin
    result.makespan = now
    return result
