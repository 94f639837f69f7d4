"""All units in this process, one after another, while the files of earlier ones are written."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import wait

from sparse_expansion.config import RunConfig
from sparse_expansion.execution.base import (
    Observer,
    Progress,
    Schedule,
    Working,
    failure_text,
    unit_order,
)
from sparse_expansion.types import CompressionError
from sparse_expansion.units import Unit, UnitReport
from sparse_expansion.work.spec import WorkerSpec
from sparse_expansion.work.worker import Computed, Worker


class LocalExecutor:
    """One worker, here."""

    num_workers = 1

    def __init__(self, spec: WorkerSpec) -> None:
        """The worker keeps its caches between graphs."""
        self.worker = Worker(spec)
        self._graph: _LocalRun | None = None

    @property
    def uses_gpus(self) -> bool:
        """Whether this process computes on a GPU."""
        return self.worker.context.device != "cpu"

    def working(self) -> list[Working]:
        """See ``Executor.working``."""
        graph = self._graph
        unit = None if graph is None else graph.current
        if graph is None or unit is None:
            return []
        layer, share = self.worker.context.place
        return [Working(unit, unit.cost / (graph.cost_total or 1.0), layer, share)]

    def run(
        self, units: Sequence[Unit], config: RunConfig, observer: Observer
    ) -> dict[str, UnitReport]:
        """See ``Executor.run``."""
        self._graph = _LocalRun(self.worker, units, config, observer)
        try:
            return self._graph.loop()
        finally:
            self._graph = None

    def close(self) -> None:
        """Nothing to release."""


class _LocalRun:
    """One graph on its way."""

    def __init__(
        self, worker: Worker, units: Sequence[Unit], config: RunConfig, observer: Observer
    ) -> None:
        self.worker = worker
        self.config = config
        self.observer = observer
        self.schedule = Schedule(units)
        self.reports: dict[str, UnitReport] = {}
        self.writing: deque[tuple[Unit, Computed, float]] = deque()
        """Units whose files are being written, in order, and when they were started."""
        self.cost_total = sum(unit.cost for unit in units)
        self.cost_done = 0.0
        self.current: Unit | None = None
        """The unit that is computed, or whose files are waited for."""

    def loop(self) -> dict[str, UnitReport]:
        """Do all units; returns their reports by key."""
        try:
            while not self.schedule.is_finished:
                while self.writing and (self._has_to_wait() or self._is_written()):
                    self._finish(*self.writing.popleft())
                if not self.schedule.is_finished:
                    self._compute()
        finally:
            # Whatever ends the run, what was computed before is kept.
            wait([each.written for _, each, _ in self.writing if each.written is not None])
        return self.reports

    def _next(self) -> Unit | None:
        """The first of the ready units."""
        ready = (self.schedule.units[key] for key in self.schedule.ready)
        return min(ready, key=unit_order, default=None)

    def _has_to_wait(self) -> bool:
        """Whether nothing is left to do but for what needs the files, or later blocks' work.

        A block is not begun before: its activations would stand beside those of the one before.
        """
        unit = self._next()
        return unit is None or unit.layer > self.writing[0][0].layer

    def _is_written(self) -> bool:
        written = self.writing[0][1].written
        return written is None or written.done()

    def _compute(self) -> None:
        unit = self._next()
        if unit is None:
            raise AssertionError("the graph of units has a cycle")
        self.worker.forget_before(self.schedule.first_open_layer)
        started = time.time()
        self.current = unit
        try:
            computed = self.worker.run(unit, self.config, self.schedule.start(unit.key))
        except (OSError, ValueError):
            raise
        except Exception as error:
            # Some settings of a model's config are only found to be wrong by its own code.
            raise CompressionError(failure_text(unit, error)) from error
        if computed.written is None:
            self._finish(unit, computed, started)
        else:
            self.writing.append((unit, computed, started))

    def _finish(self, unit: Unit, computed: Computed, started: float) -> None:
        """Count a unit as done, once its files and its marker are whole."""
        if computed.written is not None:
            self.current = unit
            computed.written.result()
        self.schedule.finish(unit.key, computed.outputs)
        self.reports[unit.key] = computed.report
        self.cost_done += unit.cost
        self.observer(
            Progress(
                computed.report,
                unit,
                len(self.schedule.done),
                len(self.schedule.units),
                self.cost_done,
                self.cost_total,
                started=started,
            )
        )
