"""A simulated cluster: the real schedule and dispatcher, with a clock in place of the work.

Used to measure the scheduler's efficiency at sizes that no test machine has, and to test it with
losses that are the same every time.
"""

from __future__ import annotations

import heapq
import random
import time
from collections import defaultdict
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
    schedule = Schedule(units)
    dispatcher = Dispatcher(
        schedule,
        num_workers=num_workers,
        captures_first=captures_first,
        captured_bytes=captured_bytes,
        value_budget=value_budget,
    )
    cluster = _SimulatedCluster(schedule, dispatcher, num_workers, joins)
    chance = random.Random(seed)
    while not schedule.is_finished:
        begin = time.perf_counter()
        cluster.start_ready(seconds, move_seconds)
        if not cluster.events:
            raise AssertionError("nothing runs and nothing can start")
        cluster.result.driver_seconds += time.perf_counter() - begin
        worker, unit = cluster.wait()
        begin = time.perf_counter()
        # Without a unit a worker has come up.
        if unit is not None and chance.random() < loss_probability:
            worker = cluster.lose(worker, unit)
        elif unit is not None:
            schedule.finish(unit.key, dict.fromkeys(unit.outputs, worker))
            dispatcher.finished(unit)
        cluster.free.append(worker)
        cluster.result.driver_seconds += time.perf_counter() - begin
    return cluster.result


class _SimulatedCluster:
    """Simulated workers, free or busy, and the clock."""

    def __init__(
        self,
        schedule: Schedule,
        dispatcher: Dispatcher,
        num_workers: int,
        joins: Sequence[tuple[float, str]],
    ) -> None:
        self.schedule, self.dispatcher = schedule, dispatcher
        self.result = Simulated()
        self.free = [f"worker-{number:03d}" for number in range(num_workers)]
        self.events: list[tuple[float, int, str, Unit | None]] = [
            (at, -1, worker, None) for at, worker in joins
        ]
        heapq.heapify(self.events)
        self._caches: dict[str, set[str]] = defaultdict(set)

    def start_ready(
        self, seconds: Callable[[Unit], float], move_seconds: Callable[[Unit], float]
    ) -> None:
        """Give every free worker a unit, as long as there is one that may start."""
        result, still_free = self.result, []
        for worker in self.free:
            unit = self.dispatcher.next_unit(worker)
            if unit is None:
                still_free.append(worker)
                continue
            self.schedule.start(unit.key)
            duration = seconds(unit)
            if unit.affinity and unit.affinity not in self._caches[worker]:
                self._caches[worker].add(unit.affinity)
                if not unit.makes_captures:
                    duration += move_seconds(unit)
            result.work += duration
            result.starts.append((worker, unit))
            result.peak_value_bytes = max(result.peak_value_bytes, self.dispatcher.value_bytes)
            ends = result.makespan + duration
            heapq.heappush(self.events, (ends, len(result.starts), worker, unit))
        self.free = still_free

    def wait(self) -> tuple[str, Unit | None]:
        """Set the clock to the next event: a worker and the unit that it has ended, if any."""
        self.result.makespan, _, worker, unit = heapq.heappop(self.events)
        return worker, unit

    def lose(self, worker: str, unit: Unit) -> str:
        """Lose a worker, its unit and its values; returns the name of the one in its place."""
        self.schedule.requeue(unit.key)
        self.dispatcher.returned(unit)
        self.dispatcher.remove_worker(worker)
        for value in [key for key, owner in self.schedule.values.items() if owner == worker]:
            self.schedule.lose_value(value)
        return worker + "'"
