"""Which free worker gets which ready unit: pure bookkeeping, driven by a cluster or a simulation.

Rules, in order:

1. A unit whose affinity (a captured block's shard) is cached by a live worker goes to that worker.
2. Free workers pull the other ready units: earlier blocks first, then earlier stages, then the
   largest. With ``dense`` calibration, captures come first, since every other block waits for
   them, but at most ``window`` blocks beyond the first unfinished one, so that captured
   activations stay bounded.
3. A worker with nothing to do takes over a whole affinity of a busy worker, if the work queued
   there is more than making the cache again.
4. Values handed on are bounded: a unit that would exceed ``value_budget`` bytes waits, unless
   nothing is running.
"""

from __future__ import annotations

import heapq
from collections import defaultdict

from sparse_expansion.execution.base import Schedule, unit_order
from sparse_expansion.stages import CAPTURED_SHARDS, Unit

Order = tuple[float, ...]


class Dispatcher:
    """Assigns a schedule's ready units to workers."""

    def __init__(
        self,
        schedule: Schedule,
        *,
        num_workers: int,
        captures_first: bool = False,
        num_shards: int = 1,
        value_budget: float = float("inf"),
    ) -> None:
        """Workers are named by strings and may come and go."""
        self.schedule = schedule
        self.captures_first = captures_first
        # As many blocks as the workers' caches hold.
        self.window = max(2, CAPTURED_SHARDS * num_workers // max(1, num_shards))
        self.value_budget = value_budget
        self.value_bytes = 0
        self.owner: dict[str, str] = {}
        self.workers: set[str] = set()
        self._held: dict[str, int] = {}
        self._queued: set[str] = set()
        self._shared: list[tuple[Order, str]] = []
        self._owned: dict[str, list[tuple[Order, str]]] = defaultdict(list)
        self._layer_left: dict[int, int] = defaultdict(int)
        self._first_layer = 0
        for unit in schedule.units.values():
            if unit.layer >= 0:
                self._layer_left[unit.layer] += 1
        self._last_layer = max(self._layer_left, default=-1)
        self._seen: set[str] = set()

    def add_worker(self, worker: str) -> None:
        """A worker has come up."""
        self.workers.add(worker)

    def remove_worker(self, worker: str) -> None:
        """A worker is gone: what it cached belongs to no one."""
        self.workers.discard(worker)
        for affinity in [name for name, owner in self.owner.items() if owner == worker]:
            del self.owner[affinity]
        for entry in self._owned.pop(worker, []):
            self._queued.discard(entry[1])

    def _order(self, unit: Unit) -> Order:
        layer, rank, cost, _ = unit_order(unit)
        if self.captures_first and unit.stage == "capture":
            return (0, layer, rank, cost)
        return (1, layer, rank, cost)

    def _enqueue_ready(self) -> None:
        for key in self.schedule.ready - self._queued:
            unit = self.schedule.units[key]
            owner = self.owner.get(unit.affinity) if unit.affinity else None
            entry = (self._order(unit), key)
            heapq.heappush(self._shared if owner is None else self._owned[owner], entry)
            self._queued.add(key)

    def _peek(self, queue: list[tuple[Order, str]]) -> Unit | None:
        """The first unit of a queue that may start now."""
        set_aside = []
        found = None
        while queue:
            entry = heapq.heappop(queue)
            unit = self.schedule.units[entry[1]]
            if entry[1] not in self.schedule.ready:
                self._queued.discard(entry[1])
                continue
            set_aside.append(entry)
            if self._may_start(unit):
                found = unit
                break
        for entry in set_aside:
            heapq.heappush(queue, entry)
        return found

    def _may_start(self, unit: Unit) -> bool:
        if unit.stage == "capture" and unit.layer >= self._first_layer + self.window:
            return False
        return (
            not unit.output_bytes
            or self.value_bytes + unit.output_bytes <= self.value_budget
            or not self.schedule.running
        )

    def next_unit(self, worker: str) -> Unit | None:
        """The unit that this free worker should start, or None; it is then to be started."""
        self._enqueue_ready()
        own = self._peek(self._owned[worker])
        shared = self._peek(self._shared)
        candidates = [unit for unit in (own, shared) if unit is not None]
        if candidates:
            # On equal terms its own work first: only this worker has the cache for it.
            unit = min(candidates, key=lambda u: (self._order(u), u is not own))
        else:
            self._steal(worker)
            stolen = self._peek(self._owned[worker])
            if stolen is None:
                return None
            unit = stolen
        if unit.affinity:
            self.owner.setdefault(unit.affinity, worker)
        # A unit whose values were lost may still be accounted for.
        self.value_bytes += unit.output_bytes - self._held.pop(unit.key, 0)
        self._held[unit.key] = unit.output_bytes
        return unit

    def _steal(self, thief: str) -> None:
        groups: dict[tuple[str, str], list[tuple[Order, str]]] = defaultdict(list)
        for victim, queue in self._owned.items():
            if victim == thief:
                continue
            for entry in queue:
                unit = self.schedule.units[entry[1]]
                if unit.affinity and entry[1] in self.schedule.ready:
                    groups[victim, unit.affinity].append(entry)
        best, best_gain = None, 0.0
        for name, entries in groups.items():
            units = [self.schedule.units[key] for _, key in entries]
            gain = sum(unit.cost for unit in units) - max(unit.move_cost for unit in units)
            if gain > best_gain:
                best, best_gain = name, gain
        if best is None:
            return
        victim, affinity = best
        moved = set(groups[best])
        self._owned[victim] = [entry for entry in self._owned[victim] if entry not in moved]
        heapq.heapify(self._owned[victim])
        for entry in moved:
            heapq.heappush(self._owned[thief], entry)
        self.owner[affinity] = thief

    def finished(self, unit: Unit) -> None:
        """A unit is done (its values may be free already)."""
        self._queued.discard(unit.key)
        if unit.layer >= 0 and unit.key not in self._seen:
            self._seen.add(unit.key)
            self._layer_left[unit.layer] -= 1
            while self._first_layer <= self._last_layer and not self._layer_left[self._first_layer]:
                self._first_layer += 1
        self._release()

    def returned(self, unit: Unit) -> None:
        """A started unit was not done: it is waiting or ready again."""
        self._queued.discard(unit.key)
        self.value_bytes -= self._held.pop(unit.key, 0)

    def _release(self) -> None:
        alive = {key for key, _ in self.schedule.values} | self.schedule.running
        for key in [key for key in self._held if key not in alive]:
            self.value_bytes -= self._held.pop(key)
