"""What every executor shares: the state of a graph of units, and the protocol."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sparse_expansion.config import RunConfig
from sparse_expansion.messages import first_line
from sparse_expansion.types import CompressionError
from sparse_expansion.units import Unit, UnitReport

Observer = Callable[["Progress"], None]


@dataclass(frozen=True)
class Progress:
    """A unit has just ended: what an observer is told."""

    report: UnitReport
    unit: Unit
    num_done: int
    num_total: int
    cost_done: float
    cost_total: float
    worker: str = "local"
    started: float = 0.0
    """Wall-clock second (time.time()) at which the unit started."""


@dataclass(frozen=True)
class Working:
    """A unit that is being done."""

    unit: Unit
    weight: float
    """Share of its graph's cost that it is."""
    layer: int | None = None
    """Block that it has come to, where it says so."""
    share: float = 0.0
    """Share of it that is done, as far as is known."""


class Executor(Protocol):
    """Runs graphs of units."""

    @property
    def num_workers(self) -> int:
        """Workers that do units at the same time."""
        ...

    @property
    def uses_gpus(self) -> bool:
        """Whether workers compute on GPUs."""
        ...

    def working(self) -> list[Working]:
        """The units that are being done, in their order; may be asked by any thread."""
        ...

    def run(
        self, units: Sequence[Unit], config: RunConfig, observer: Observer
    ) -> dict[str, UnitReport]:
        """Do all units in an order that their needs allow; returns their reports by key.

        Args:
            units: a graph.
            config: what all of its units are done with; travels with every unit.
            observer: is told of every finished unit.

        Raises:
            CompressionError: a unit failed for a reason of its own.
        """
        ...

    def close(self) -> None:
        """Release workers."""
        ...


class Schedule:
    """Which units wait, may start, run or are done, and which values are still needed.

    Knows nothing of how units are run, so a simulation can drive it as well as a cluster.
    Values are opaque handles (tensors here, object references on a cluster).
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        """Units in ``inputs`` must be among ``units``; those in ``after`` may be long done."""
        self.units = {unit.key: unit for unit in units}
        self.waiting: dict[str, set[str]] = {}
        self.ready: set[str] = set()
        self.running: set[str] = set()
        self.done: set[str] = set()
        self.values: dict[tuple[str, str], Any] = {}
        self.became_ready: list[str] = []
        """Keys in order of becoming ready; whoever keeps a queue takes them from here."""
        self.first_open_layer = 0
        """No unfinished unit reads the captured activations of an earlier block."""
        self._readers_left: dict[int, int] = defaultdict(int)
        self._dependents: dict[str, list[str]] = {key: [] for key in self.units}
        self._consumers: dict[tuple[str, str], set[str]] = {}
        for unit in units:
            if reads_captured(unit):
                self._readers_left[unit.layer] += 1
            for value in unit.inputs:
                self._consumers.setdefault(value, set()).add(unit.key)
            for source in self._sources(unit):
                self._dependents[source].append(unit.key)
        self._last_layer = max(self._readers_left, default=-1)
        self._skip_closed_layers()
        for unit in units:
            self._enqueue(unit.key)

    def _skip_closed_layers(self) -> None:
        while (
            self.first_open_layer <= self._last_layer
            and not self._readers_left[self.first_open_layer]
        ):
            self.first_open_layer += 1

    def _sources(self, unit: Unit) -> set[str]:
        sources = {key for key, _ in unit.inputs}
        return sources | {key for key in unit.after if key in self.units}

    def _enqueue(self, key: str) -> None:
        open_needs = {
            source for source in self._sources(self.units[key]) if source not in self.done
        }
        if open_needs:
            self.waiting[key] = open_needs
        else:
            self._make_ready(key)

    def _make_ready(self, key: str) -> None:
        self.ready.add(key)
        self.became_ready.append(key)

    @property
    def is_finished(self) -> bool:
        """Whether every unit is done."""
        return len(self.done) == len(self.units)

    def start(self, key: str) -> list[Any]:
        """Mark a ready unit as running; returns the handles of its inputs."""
        self.ready.remove(key)
        self.running.add(key)
        return [self.values[value] for value in self.units[key].inputs]

    def finish(self, key: str, outputs: dict[str, Any]) -> None:
        """Mark a running unit as done, keep its outputs while needed, free what no one needs."""
        self.running.remove(key)
        self.done.add(key)
        for name, value in outputs.items():
            if self._is_wanted((key, name)):
                self.values[key, name] = value
        for value in self.units[key].inputs:
            if not self._is_wanted(value):
                self.values.pop(value, None)
        for dependent in self._dependents[key]:
            needs = self.waiting.get(dependent)
            if needs is not None:
                needs.discard(key)
                if not needs:
                    del self.waiting[dependent]
                    self._make_ready(dependent)
        self._count_reader(key, -1)

    def _count_reader(self, key: str, change: int) -> None:
        unit = self.units[key]
        if reads_captured(unit):
            self._readers_left[unit.layer] += change
            if change > 0:
                self.first_open_layer = min(self.first_open_layer, unit.layer)
            self._skip_closed_layers()

    def _is_wanted(self, value: tuple[str, str]) -> bool:
        return any(key not in self.done for key in self._consumers.get(value, ()))

    def requeue(self, key: str) -> None:
        """Put a running unit back: its worker was lost."""
        self.running.remove(key)
        self._enqueue(key)

    def set_aside(self, key: str) -> None:
        """Take a unit out for good: it failed, and what needs it will never start."""
        self.ready.discard(key)
        self.waiting.pop(key, None)
        self.waiting[key] = {key}

    def lose_value(self, value: tuple[str, str]) -> None:
        """A handed-on value is gone: its unit has to be done again, with all that this needs."""
        self.values.pop(value, None)
        key = value[0]
        if key not in self.done:
            return
        self.done.remove(key)
        self._count_reader(key, 1)
        for source in self.units[key].inputs:
            if source not in self.values:
                self.lose_value(source)
        self._enqueue(key)
        for dependent in self._dependents[key]:
            if dependent in self.ready:
                self.ready.remove(dependent)
                self._enqueue(dependent)
            elif dependent in self.waiting:
                self.waiting[dependent].add(key)


def failure_text(unit: Unit, error: Exception) -> str:
    """What a user is told of a unit that failed: an error that was meant for users, or its kind."""
    if isinstance(error, CompressionError):
        return str(error)
    return f"{unit.key}: {type(error).__name__}: {first_line(error)}"


def reads_captured(unit: Unit) -> bool:
    """Whether the unit makes or reads a worker's captured activations."""
    return bool(unit.affinity) and (unit.cache_bytes > 0 or unit.move_cost > 0)


def unit_order(unit: Unit) -> tuple[int, int, float, str]:
    """Blocks in order, stages in order, the largest first."""
    return (unit.layer, unit.rank, -unit.cost, unit.key)
