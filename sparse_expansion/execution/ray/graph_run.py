"""One graph on its way: units out to actors, reports and losses back."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from sparse_expansion.config import ExecutionOptions, RunConfig
from sparse_expansion.execution.base import (
    Observer,
    Progress,
    Schedule,
    Working,
    failure_text,
    unit_order,
)
from sparse_expansion.execution.dispatch import VALUE_SHARE, Dispatcher
from sparse_expansion.execution.ray.actor import ActorHandle
from sparse_expansion.execution.ray.attempts import Attempts
from sparse_expansion.execution.ray.liveness import ClusterWatch, Vigil, stalled_workers
from sparse_expansion.execution.ray.metrics import RunMetrics
from sparse_expansion.execution.ray.pool import WorkerPool
from sparse_expansion.messages import first_line
from sparse_expansion.units import Unit, UnitReport

_LOST_WORKER = (
    ActorDiedError,
    ActorUnavailableError,
    RayActorError,
    NodeDiedError,
    WorkerCrashedError,
    OutOfMemoryError,
)
_LOST_VALUE = (ObjectLostError, OwnerDiedError)
_log = logging.getLogger(__name__)


@dataclass
class Call:
    """A unit that an actor does: first it is computed, then its files are written."""

    unit: Unit
    handle: ActorHandle
    refs: tuple[Any, ...]
    """References to its report and to each of its outputs."""
    started: float
    """Wall-clock second (time.time()) at which it was given to the actor."""
    is_computed: bool = False
    """Whether only its files are left to do."""


class GraphRun:
    """A graph of units while it is done by the actors of a pool."""

    def __init__(
        self,
        pool: WorkerPool,
        options: ExecutionOptions,
        metrics: RunMetrics,
        *,
        units: Sequence[Unit],
        config: RunConfig,
        observer: Observer,
    ) -> None:
        """Nothing is started yet.

        Args:
            pool: of actors.
            options: of the executor: attempts and timeouts.
            metrics: that Ray exports.
            units: the graph.
            config: what all of its units are done with.
            observer: is told of every finished unit.
        """
        self.pool = pool
        self.options = options
        self.metrics = metrics
        self.config = config
        self.observer = observer
        self.schedule = Schedule(units)
        store = ray.cluster_resources().get("object_store_memory", float("inf"))
        self.dispatcher = Dispatcher(
            self.schedule,
            num_workers=pool.num_workers,
            captures_first=config.calibration.calibration_inputs == "dense",
            captured_bytes=pool.spec.captured_bytes,
            value_budget=VALUE_SHARE * store,
        )
        for handle in pool.handles.values():
            handle.busy, handle.num_writing = False, 0
        self.calls: dict[Any, Call] = {}
        self.reports: dict[str, UnitReport] = {}
        self.attempts = Attempts()
        self.made_on: dict[tuple[str, str], str] = {}
        self.cost_total = sum(unit.cost for unit in units)
        self.cost_done = 0.0
        self.watch = ClusterWatch()
        self.vigil = Vigil(options.worker_timeout)

    def working(self) -> list[Working]:
        """The units that actors have, in their order."""
        # One step for Python's threads, of which another may ask.
        keys = list(self.schedule.running)
        units = sorted((self.schedule.units[key] for key in keys), key=unit_order)
        return [Working(unit, unit.cost / (self.cost_total or 1.0)) for unit in units]

    def loop(self) -> dict[str, UnitReport]:
        """Do all units; returns their reports by key.

        Raises:
            CompressionError: units failed, or no worker came up.
            OSError: a unit failed for that reason, a full disk say.
        """
        try:
            while not self.schedule.is_finished:
                open_units = len(self.schedule.ready) + len(self.schedule.running)
                self.pool.ask_for(max(1, open_units))
                self._assign()
                if not self.calls and self.attempts.given_up and not self._can_start_any():
                    break
                self._wait()
                self._watch()
        except BaseException:
            for call in list(self.calls.values()):
                self.pool.drop(call.handle)
            raise
        self.attempts.raise_first()
        return self.reports

    def _can_start_any(self) -> bool:
        return bool(self.schedule.ready - set(self.attempts.given_up))

    def _assign(self) -> None:
        for handle in list(self.pool.handles.values()):
            if not handle.is_up or handle.busy:
                continue
            unit = self.dispatcher.next_unit(handle.name)
            if unit is None:
                continue
            inputs = self.schedule.start(unit.key)
            method = handle.actor.run.options(num_returns=1 + len(unit.outputs), name=unit.key)
            refs = method.remote(unit, self.config, self.schedule.first_open_layer, *inputs)
            refs = tuple(refs) if isinstance(refs, list) else (refs,)
            handle.busy, handle.asked = True, time.monotonic()
            self.calls[refs[0]] = Call(unit, handle, refs, time.time())

    def _wait(self) -> None:
        pings = {handle.ping: handle for handle in self.pool.handles.values() if not handle.is_up}
        waiting = [*self.calls, *pings]
        done, _ = ray.wait(waiting, num_returns=1, timeout=1.0, fetch_local=False)
        if done:
            # Take all that is ready now, not one a turn.
            more, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=False)
            done = more or done
        for ref in done:
            if ref in pings:
                self._worker_up(pings[ref])
            elif ref in self.calls:
                self._ended(ref, self.calls.pop(ref))

    def _worker_up(self, handle: ActorHandle) -> None:
        try:
            handle.node, handle.host, handle.process = ray.get(handle.ping, timeout=30)
        except (*_LOST_WORKER, RayTaskError, GetTimeoutError) as error:
            _log.warning("%s did not come up: %s", handle.name, first_line(error))
            self.pool.drop(handle)
            return
        self.vigil.somebody_is_there()

    def _ended(self, ref: Any, call: Call) -> None:
        unit, handle = call.unit, call.handle
        if call.is_computed:
            handle.num_writing -= 1
        else:
            handle.busy = False
        try:
            report: UnitReport = ray.get(ref)
        except _LOST_WORKER as error:
            self._worker_lost(call, first_line(error))
            return
        except _LOST_VALUE:
            self._inputs_lost(call)
            return
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, _LOST_VALUE):
                self._inputs_lost(call)
            else:
                self._failed(call, cause if isinstance(cause, Exception) else error)
            return
        if unit.is_persistent and not call.is_computed:
            # The actor is free for another unit while a thread of it writes.
            handle.num_writing += 1
            self.calls[handle.actor.written.remote(unit.key)] = replace(call, is_computed=True)
            return
        outputs = dict(zip(unit.outputs, call.refs[1:], strict=True))
        for name in outputs:
            self.made_on[unit.key, name] = handle.node or ""
        self.schedule.finish(unit.key, outputs)
        self.dispatcher.finished(unit)
        if unit.key not in self.reports:
            self.cost_done += unit.cost
        self.reports[unit.key] = report
        self.metrics.finished(unit, report, self.dispatcher.value_bytes)
        self.observer(
            Progress(
                report,
                unit,
                len(self.schedule.done),
                len(self.schedule.units),
                self.cost_done,
                self.cost_total,
                worker=f"{handle.name}@{handle.host}",
                started=call.started,
            )
        )

    def _put_back(self, unit: Unit) -> None:
        self.schedule.requeue(unit.key)
        self.dispatcher.returned(unit)

    def _worker_lost(self, call: Call, reason: str) -> None:
        """A worker that owes a unit is gone: the unit is done again.

        What it was computing bears the blame. Where that was nothing, the first that is looked at
        of those whose files it was writing does.
        """
        is_news = call.handle.name in self.pool.handles
        is_to_blame = not call.is_computed or (is_news and not call.handle.busy)
        if is_news:
            self.pool.num_lost += 1
            self.metrics.lost.inc(1, {"stage": call.unit.stage})
        _log.warning("%s lost during %s: %s", call.handle.name, call.unit.key, reason)
        self.pool.drop(call.handle)
        self.dispatcher.remove_worker(call.handle.name)
        self._put_back(call.unit)
        self._forget_values_of_dead_nodes()
        if not is_to_blame:
            return
        self._count_attempt(
            call.unit,
            f"{call.unit.key}: its worker was lost {self.options.max_attempts} times "
            f"({reason}): out of memory? Use a smaller --experts-per-unit or more memory",
            limit=2 * self.options.max_attempts,
        )

    def _forget_values_of_dead_nodes(self) -> None:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for value in list(self.schedule.values):
            if self.made_on.get(value) not in alive:
                self.schedule.lose_value(value)

    def _inputs_lost(self, call: Call) -> None:
        """An input is gone: make it again first; if no dead node explains it, make all again."""
        self._put_back(call.unit)
        before = len(self.schedule.values)
        self._forget_values_of_dead_nodes()
        if len(self.schedule.values) == before:
            for value in call.unit.inputs:
                self.schedule.lose_value(value)
        self._count_attempt(
            call.unit,
            f"{call.unit.key}: its inputs were lost again and again: give the cluster a larger "
            "object store",
            limit=4 * self.options.max_attempts,
        )

    def _failed(self, call: Call, error: Exception) -> None:
        """The unit failed for its own reason: try again, in the end set it aside."""
        self._put_back(call.unit)
        _log.warning("%s failed on %s: %s", call.unit.key, call.handle.name, first_line(error))
        message = failure_text(call.unit, error)
        self._count_attempt(call.unit, message, limit=self.options.max_attempts, error=error)

    def _count_attempt(
        self, unit: Unit, message: str, *, limit: int, error: Exception | None = None
    ) -> None:
        if self.attempts.failed(unit.key, message, limit=limit, error=error):
            # Set aside: neither ready nor done, so that all that does not need it goes on.
            self.schedule.set_aside(unit.key)

    def _watch(self) -> None:
        """Notice what Ray would wait for without end or a word."""
        self.watch.look()
        self._replace_stalled()
        if self.calls or self.pool.has_live_worker:
            self.vigil.somebody_is_there()
        else:
            self.vigil.wait_on(self.pool)

    def _replace_stalled(self) -> None:
        """Give the units of workers that show no sign of life to others."""
        patience = self.options.stall_timeout
        stalled = stalled_workers(list(self.pool.handles.values()), patience)
        for ref, call in list(self.calls.items()):
            if call.handle in stalled:
                del self.calls[ref]
                where = f"process {call.handle.process} on {call.handle.host}"
                self._worker_lost(call, f"{where} shows no sign of life for {patience:g} s")
