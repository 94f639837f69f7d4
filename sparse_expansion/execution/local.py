"""All units in this process, one after another."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sparse_expansion.config import RunConfig
from sparse_expansion.execution.base import Observer, Progress, Schedule, unit_order
from sparse_expansion.units import Unit, UnitReport
from sparse_expansion.work.spec import WorkerSpec
from sparse_expansion.work.worker import Worker


class LocalExecutor:
    """One worker, here."""

    num_workers = 1

    def __init__(self, spec: WorkerSpec) -> None:
        """The worker keeps its caches between graphs."""
        self.worker = Worker(spec)

    def run(
        self, units: Sequence[Unit], config: RunConfig, observer: Observer
    ) -> dict[str, UnitReport]:
        """See ``Executor.run``."""
        schedule = Schedule(units)
        reports: dict[str, UnitReport] = {}
        cost_total = sum(unit.cost for unit in units)
        cost_done = 0.0
        while not schedule.is_finished:
            if not schedule.ready:
                raise AssertionError("the graph of units has a cycle")
            unit = min((schedule.units[key] for key in schedule.ready), key=unit_order)
            self.worker.forget_before(schedule.first_open_layer)
            started = time.time()
            report, outputs = self.worker.run(unit, config, schedule.start(unit.key))
            schedule.finish(unit.key, outputs)
            reports[unit.key] = report
            cost_done += unit.cost
            observer(
                Progress(
                    report,
                    unit,
                    len(schedule.done),
                    len(units),
                    cost_done,
                    cost_total,
                    started=started,
                )
            )
        return reports

    def close(self) -> None:
        """Nothing to release."""
