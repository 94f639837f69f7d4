"""Which free worker gets which ready unit: pure bookkeeping, driven by a cluster or a simulation.

Rules, in order:

1. A unit whose affinity (a captured block's shard) is cached by a live worker goes to that worker.
2. Free workers pull the other ready units: earlier blocks, earlier stages, the largest first.
   While fewer than two units per worker are ready that hand nothing on, those that do come before
   (others wait for them); beyond that they would only fill memory. With ``dense`` calibration and
   several workers, captures come before all, since every other block waits for them, but at most
   ``window`` blocks beyond the first unfinished one: as many as keep the workers busy, and fit.
3. A worker with nothing to do takes over a whole affinity of a busy worker, if the work queued
   there is more than making the cache again.
4. Values handed on are bounded: a unit that would exceed ``value_budget`` bytes waits, unless
   nothing runs and nothing else can start. What the next consumer (an expert unit) still waits
   for has the whole budget; what later ones wait for leaves room for it, or values that no one
   can use yet would fill the memory. Units that take in as much as they hand on never wait.

Every decision looks at the heads of a few heaps; nothing here grows with the number of waiting
units or of idle workers.
"""

from __future__ import annotations

import heapq
from collections import defaultdict

from sparse_expansion.execution.base import Schedule, unit_order
from sparse_expansion.units import Unit

VALUE_SHARE = 0.6
"""Share of the object store that values between units may fill."""

Order = tuple[float, ...]
Heap = list[tuple[Order, str]]


class _Queue:
    """Ready units by what may hold them back: a closed window, a full budget, or nothing."""

    def __init__(self) -> None:
        self.captures: Heap = []
        self.valued: Heap = []
        self.plain: Heap = []

    def heap_of(self, unit: Unit) -> Heap:
        if unit.makes_captures:
            return self.captures
        return self.valued if unit.output_bytes else self.plain


class _Feeding:
    """Which units make values for which consumer, and which consumer is the next to be fed.

    A consumer hands nothing on: values end there. A unit that feeds several belongs to the first.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        units = schedule.units
        consumers = sorted(
            (unit for unit in units.values() if unit.inputs and not unit.output_bytes),
            key=unit_order,
        )
        self.place: dict[str, int] = {}
        """Unit -> position of the consumer that it feeds."""
        self.feeders: list[list[str]] = []
        for position, consumer in enumerate(consumers):
            found: list[str] = []
            pending = [source for source, _ in consumer.inputs]
            while pending:
                key = pending.pop()
                if key not in self.place:
                    self.place[key] = position
                    found.append(key)
                    pending += [source for source, _ in units[key].inputs]
            self.feeders.append(found)
        self.most_bytes = max(
            (sum(units[key].output_bytes for key in keys) for keys in self.feeders), default=0
        )
        self._next = 0
        self._left = list(self.feeders[0]) if self.feeders else []

    def is_ready(self, key: str) -> None:
        """A unit has become ready; where its values were lost, an earlier consumer is the next."""
        position = self.place.get(key, self._next)
        if position < self._next:
            self._next = position
            self._left = list(self.feeders[position])

    def is_next(self, unit: Unit) -> bool:
        """Whether the unit feeds the first consumer whose values are not all made."""
        while self._next < len(self.feeders):
            while self._left and self._left[-1] in self.schedule.done:
                self._left.pop()
            if self._left:
                break
            self._next += 1
            if self._next < len(self.feeders):
                self._left = list(self.feeders[self._next])
        return self.place.get(unit.key, 0) <= self._next


class Dispatcher:
    """Assigns a schedule's ready units to workers."""

    def __init__(
        self,
        schedule: Schedule,
        *,
        num_workers: int,
        captures_first: bool = False,
        captured_bytes: float = float("inf"),
        value_budget: float = float("inf"),
    ) -> None:
        """Workers are named by strings; whoever asks for a unit is one, until it is removed.

        Args:
            schedule: the units and their state.
            num_workers: workers expected.
            captures_first: start captures before all else, a bounded number of blocks ahead.
            captured_bytes: captured activations that one worker may keep.
            value_budget: bytes of values that may wait between units.
        """
        self.schedule = schedule
        self.captures_first = captures_first and num_workers > 1
        self.num_workers = num_workers
        block_bytes: dict[int, int] = defaultdict(int)
        for unit in schedule.units.values():
            block_bytes[unit.layer] += unit.cache_bytes
        largest = max(block_bytes.values(), default=0)
        fitting = captured_bytes * num_workers // largest if largest else float("inf")
        # Two at least, or nothing would overlap.
        self.window = max(2.0, min(num_workers + 1.0, fitting))
        self.value_budget = value_budget
        self.value_bytes = 0
        self._feeding = _Feeding(schedule)
        self.owner: dict[str, str] = {}
        self._held: dict[str, int] = {}
        self._shared = _Queue()
        self._owned: dict[str, _Queue] = defaultdict(_Queue)
        self._queued_of: dict[str, set[str]] = defaultdict(set)
        self._theft_is_useless = False

    def remove_worker(self, worker: str) -> None:
        """A worker is gone: what it cached belongs to no one."""
        for affinity in [name for name, owner in self.owner.items() if owner == worker]:
            del self.owner[affinity]
            for key in self._queued_of.pop(affinity, set()):
                self._enqueue(key)
        self._owned.pop(worker, None)

    def _urgency(self, unit: Unit) -> Order:
        """What comes first among the heads of the heaps."""
        layer, rank, cost, _ = unit_order(unit)
        if self.captures_first and unit.makes_captures:
            return (0, layer, rank, cost)
        is_starving = len(self._shared.plain) < 2 * self.num_workers
        return (1 if unit.output_bytes and is_starving else 2, layer, rank, cost)

    def _enqueue(self, key: str) -> None:
        if key not in self.schedule.ready:
            return
        unit = self.schedule.units[key]
        queue = self._shared
        if unit.affinity and unit.affinity in self.owner:
            queue = self._owned[self.owner[unit.affinity]]
            self._queued_of[unit.affinity].add(key)
            self._theft_is_useless = False
        heapq.heappush(queue.heap_of(unit), (unit_order(unit)[:3], key))

    def _peek(self, heap: Heap, worker: str | None) -> Unit | None:
        """The first unit of a heap, if it may start now; stale entries are dropped."""
        while heap:
            key = heap[0][1]
            unit = self.schedule.units[key]
            owner = self.owner.get(unit.affinity) if unit.affinity else None
            if key in self.schedule.ready and owner == worker:
                return unit if self._may_start(unit) else None
            heapq.heappop(heap)
            if key in self.schedule.ready:
                # A shared unit whose affinity has found an owner since.
                self._enqueue(key)
        return None

    def _may_start(self, unit: Unit) -> bool:
        if unit.makes_captures and unit.layer >= self.schedule.first_open_layer + self.window:
            return False
        if not unit.output_bytes:
            return True
        if 0 < unit.output_bytes <= sum(self._held.get(key, 0) for key, _ in unit.inputs):
            return True
        budget = self.value_budget
        if not self._feeding.is_next(unit):
            budget -= self._feeding.most_bytes
        return self.value_bytes + unit.output_bytes <= budget

    def _heads(self, queue: _Queue, worker: str | None) -> list[Unit]:
        heads = (self._peek(heap, worker) for heap in (queue.captures, queue.valued, queue.plain))
        return [unit for unit in heads if unit is not None]

    def next_unit(self, worker: str) -> Unit | None:
        """The unit that this free worker should start, or None; it is then to be started."""
        fresh, self.schedule.became_ready = self.schedule.became_ready, []
        for key in fresh:
            self._feeding.is_ready(key)
            self._enqueue(key)
        # On equal terms its own work first: only this worker has the cache for it.
        shared = self._heads(self._shared, None)
        candidates = self._heads(self._owned[worker], worker) + shared
        if not candidates and self._steal(worker):
            candidates = self._heads(self._owned[worker], worker)
        if candidates:
            unit = min(candidates, key=self._urgency)
        elif self.schedule.ready and not self.schedule.running:
            # The budget is less than one block needs: the only way on is over it.
            unit = min((self.schedule.units[key] for key in self.schedule.ready), key=unit_order)
        else:
            return None
        if unit.affinity:
            self.owner.setdefault(unit.affinity, worker)
            self._queued_of[unit.affinity].discard(unit.key)
        # A unit whose values were lost may still be accounted for.
        self.value_bytes += unit.output_bytes - self._held.pop(unit.key, 0)
        self._held[unit.key] = unit.output_bytes
        return unit

    def _steal(self, thief: str) -> bool:
        """Take over the affinity with the most to gain; False where there is none."""
        if self._theft_is_useless:
            return False
        best, best_gain = None, 0.0
        for affinity, keys in self._queued_of.items():
            units = [self.schedule.units[key] for key in keys if key in self.schedule.ready]
            if not units or self.owner.get(affinity) in (None, thief):
                continue
            gain = sum(unit.cost for unit in units) - max(unit.move_cost for unit in units)
            if gain > best_gain:
                best, best_gain = affinity, gain
        if best is None:
            # Until more units are queued it will not be any better for anyone.
            self._theft_is_useless = True
            return False
        self.owner[best] = thief
        for key in self._queued_of.pop(best):
            self._enqueue(key)
        return True

    def finished(self, unit: Unit) -> None:
        """A unit is done (its values may be free already)."""
        for key in {unit.key, *(source for source, _ in unit.inputs)}:
            made = self.schedule.units[key]
            if key not in self.schedule.running and not any(
                (key, name) in self.schedule.values for name in made.outputs
            ):
                self.value_bytes -= self._held.pop(key, 0)

    def returned(self, unit: Unit) -> None:
        """A started unit was not done: it is waiting or ready again."""
        self.value_bytes -= self._held.pop(unit.key, 0)
