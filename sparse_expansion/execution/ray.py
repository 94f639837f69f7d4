"""Units over Ray actors: the only home of Ray beside ``ray_jobs/``.

The driver holds the plan and references; tensors go from actor to actor through the object store,
weights and results through the store. Actors are never restarted by Ray (a restarted actor would
answer a call that the driver has given up): a lost actor's unit is queued again and a new actor
asked for, which is also what makes an autoscaler act.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch
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
from ray.util.metrics import Counter, Gauge

from sparse_expansion.config import RunConfig
from sparse_expansion.execution.base import Observer, Progress, Schedule
from sparse_expansion.execution.dispatch import VALUE_SHARE, Dispatcher
from sparse_expansion.stages import Worker, WorkerSpec
from sparse_expansion.types import CompressionError, HessianSum
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
CONNECT_SECONDS = 10.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """How to use a Ray cluster."""

    address: str | None = None
    """None starts Ray on this machine; ``auto``, ``host:port`` or ``ray://host:port`` joins one."""
    num_workers: int | None = None
    """Actors; None takes one per GPU (or share of one), without GPUs one per ``cpus``."""
    gpus_per_worker: float | None = None
    """GPUs, or a share of one, per actor; None is 1 where the cluster has GPUs, else 0."""
    cpus_per_worker: float | None = None
    """CPUs per actor; None is its threads."""
    max_attempts: int = 3
    """Times a unit is tried before it counts as failed."""
    worker_timeout: float = 1800.0
    """Seconds without any live worker before the run is given up."""
    object_store_bytes: int | None = None
    """Object store of a Ray started here; None leaves it to Ray."""


class UnitActor:
    """A worker in a process of its own."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Libraries are quietened here as in the driver: their bars would garble its terminal."""
        warnings.filterwarnings("ignore")
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.worker = Worker(spec)

    def ready(self) -> tuple[str, str]:
        """Node id and host name: the first call, answered once the actor is placed."""
        return ray.get_runtime_context().get_node_id(), os.uname().nodename

    def run(self, unit: Unit, config: RunConfig, first_open_layer: int, *inputs: Any) -> Any:
        """Do a unit; the report and each output are objects of their own."""
        self.worker.forget_before(first_open_layer)
        report, outputs = self.worker.run(unit, config, [from_wire(value) for value in inputs])
        if not unit.outputs:
            return report
        return (report, *(to_wire(outputs[name]) for name in unit.outputs))


def to_wire(value: Any) -> Any:
    """Tensors as NumPy arrays, which the object store holds and maps without copies."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            return ("bfloat16", tensor.view(torch.uint16).numpy())
        return tensor.numpy()
    if isinstance(value, HessianSum):
        sums = to_wire(value.sum_DD), to_wire(value.cross_DD)
        return ("HessianSum", *sums, value.num_tokens, value.fourth)
    if isinstance(value, list):
        return [to_wire(part) for part in value]
    return value


def from_wire(value: Any) -> Any:
    """Inverse of ``to_wire``; arrays stay mapped and must not be written to."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, list):
        return [from_wire(part) for part in value]
    if isinstance(value, tuple):
        kind, *parts = value
        if kind == "bfloat16":
            return torch.from_numpy(parts[0]).view(torch.bfloat16)
        assert kind == "HessianSum"
        sum_DD, cross_DD = (from_wire(part) for part in parts[:2])
        return HessianSum(sum_DD, parts[2], cross_DD, parts[3])
    return value


@dataclass
class _Handle:
    """An actor as the driver sees it."""

    name: str
    actor: Any
    ping: Any
    node: str | None = None
    host: str = ""
    busy: bool = False

    @property
    def is_up(self) -> bool:
        return self.node is not None


@dataclass
class _Call:
    """A unit on its way."""

    unit: Unit
    handle: _Handle
    refs: tuple[Any, ...]
    started: float


class _Metrics:
    """Counters and gauges that Ray exports to its dashboard and to Prometheus."""

    def __init__(self) -> None:
        def counter(name: str, text: str) -> Any:
            return Counter(f"sparse_expansion_{name}", text, tag_keys=("stage",))

        self.units = counter("units_done", "Units of work finished")
        self.experts = counter("experts_done", "Experts finished")
        self.starved = counter("starved_clusters", "Experts with too few tokens of their own")
        self.damping = counter("damping_raised", "Experts whose Hessian needed more damping")
        self.lost = counter("workers_lost", "Workers lost")
        self.stored = Gauge("sparse_expansion_value_bytes", "Bytes of values between units")
        self.speed = Gauge("sparse_expansion_tokens_per_second", "Tokens captured per second")

    def finished(self, unit: Unit, report: UnitReport, value_bytes: float) -> None:
        tags = {"stage": unit.stage}
        self.units.inc(1, tags)
        self.stored.set(value_bytes)
        stats = report.stats
        if unit.stage == "experts":
            self.experts.inc(len(stats["tokens"]), tags)
            if sum(stats["starved"]):
                self.starved.inc(sum(stats["starved"]), tags)
            raised = sum(attempts > 1 for attempts in stats["damping_attempts"])
            if raised:
                self.damping.inc(raised, tags)
        if unit.stage == "capture" and report.seconds > 0:
            self.speed.set(stats.get("tokens", 0) / report.seconds)


class RayExecutor:
    """Runs graphs of units on a pool of actors that may grow, shrink and lose members."""

    def __init__(self, spec: WorkerSpec, options: RayOptions) -> None:
        """Join or start Ray; actors are asked for when a graph is run.

        Raises:
            ValueError: the cluster cannot be reached, or has no workers and no number is given.
        """
        self.options = options
        # Without this an actor that asks for no GPU sees all of them.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            self._connect()
        resources = ray.cluster_resources()
        if options.num_workers is None and not resources.get("CPU") and not resources.get("GPU"):
            raise ValueError(
                "the cluster has no workers yet: say how many to ask for, e.g. --num-workers 4 "
                "--gpus-per-worker 1"
            )
        gpus = options.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if spec.device != "cpu" and resources.get("GPU", 0) >= 1 else 0.0
        count = options.num_workers
        if count is None:
            if gpus > 0:
                count = max(1, int(resources.get("GPU", 0) / gpus))
            else:
                per_worker = options.cpus_per_worker or spec.threads or 1
                count = max(1, int(resources.get("CPU", 1) // per_worker))
        threads = spec.threads
        if threads is None:
            threads = max(1, int(options.cpus_per_worker or resources.get("CPU", 1) // count))
        self.num_workers = count
        # Ray sets one OpenMP thread in an actor with one CPU or none: threads are set explicitly.
        self.spec = replace(spec, threads=threads)
        cpus = options.cpus_per_worker
        self._resources = {"num_gpus": gpus, "num_cpus": threads if cpus is None else cpus}
        self._actor_class = ray.remote(UnitActor)
        self._handles: dict[str, _Handle] = {}
        self._made = 0
        self._metrics = _Metrics()
        self.lost_workers = 0

    def _connect(self) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.options.address is None:
            options["include_dashboard"] = False
            if self.options.object_store_bytes is not None:
                options["object_store_memory"] = self.options.object_store_bytes
        else:
            _check_reachable(self.options.address)
            options["address"] = self.options.address
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"Ray at {self.options.address or 'this machine'} cannot be reached ({line}): "
                "check --ray-address, and RAY_AUTH_MODE and its token on both sides"
            ) from None

    # -- workers -------------------------------------------------------------------------------

    def _ask_for_workers(self, wanted: int) -> None:
        while len(self._handles) < min(wanted, self.num_workers):
            name = f"worker-{self._made:03d}"
            self._made += 1
            actor = self._actor_class.options(
                name=f"sparse-expansion-{os.getpid()}-{name}",
                max_restarts=0,
                max_task_retries=0,
                **self._resources,
            ).remote(self.spec)
            self._handles[name] = _Handle(name, actor, actor.ready.remote())

    def _drop(self, handle: _Handle) -> None:
        self._handles.pop(handle.name, None)
        # After ActorUnavailableError the old call may still be running.
        ray.kill(handle.actor, no_restart=True)

    # -- the loop ------------------------------------------------------------------------------

    def run(
        self, units: Sequence[Unit], config: RunConfig, observer: Observer
    ) -> dict[str, UnitReport]:
        """See ``Executor.run``."""
        return _Run(self, units, config, observer).loop()

    def close(self) -> None:
        """Give the workers back, and Ray too if it was started here."""
        for handle in list(self._handles.values()):
            self._drop(handle)
        if self._owns_ray:
            ray.shutdown()


class _Run:
    """One graph on its way."""

    def __init__(
        self, executor: RayExecutor, units: Sequence[Unit], config: RunConfig, observer: Observer
    ) -> None:
        self.executor = executor
        self.config = config
        self.observer = observer
        self.schedule = Schedule(units)
        store = ray.cluster_resources().get("object_store_memory", float("inf"))
        self.dispatcher = Dispatcher(
            self.schedule,
            num_workers=executor.num_workers,
            captures_first=config.calibration.calibration_inputs == "dense",
            captured_bytes=executor.spec.captured_bytes,
            value_budget=VALUE_SHARE * store,
        )
        for handle in executor._handles.values():
            handle.busy = False
        self.calls: dict[Any, _Call] = {}
        self.reports: dict[str, UnitReport] = {}
        self.attempts: dict[str, int] = {}
        self.failures: dict[str, str] = {}
        self.failure: BaseException | None = None
        self.made_on: dict[tuple[str, str], str] = {}
        self.cost_total = sum(unit.cost for unit in units)
        self.cost_done = 0.0
        self.last_alive = time.monotonic()
        self.last_warned = self.last_alive

    def loop(self) -> dict[str, UnitReport]:
        try:
            while not self.schedule.is_finished:
                open_units = len(self.schedule.ready) + len(self.schedule.running)
                self.executor._ask_for_workers(max(1, open_units))
                self._assign()
                if not self.calls and self.failures and not self._can_start_any():
                    break
                self._wait()
                self._watch()
        except BaseException:
            for call in list(self.calls.values()):
                self.executor._drop(call.handle)
            raise
        if self.failures:
            first = next(iter(self.failures.values()))
            more = len(self.failures) - 1
            if isinstance(self.failure, OSError):
                raise self.failure
            raise CompressionError(f"{first}{f' (and {more} more units)' if more else ''}")
        return self.reports

    def _can_start_any(self) -> bool:
        return bool(self.schedule.ready - set(self.failures))

    def _assign(self) -> None:
        for handle in list(self.executor._handles.values()):
            if not handle.is_up or handle.busy:
                continue
            unit = self.dispatcher.next_unit(handle.name)
            if unit is None:
                continue
            inputs = self.schedule.start(unit.key)
            method = handle.actor.run.options(num_returns=1 + len(unit.outputs), name=unit.key)
            refs = method.remote(unit, self.config, self.schedule.first_open_layer, *inputs)
            refs = tuple(refs) if isinstance(refs, list) else (refs,)
            handle.busy = True
            self.calls[refs[0]] = _Call(unit, handle, refs, time.time())

    def _wait(self) -> None:
        pings = {
            handle.ping: handle for handle in self.executor._handles.values() if not handle.is_up
        }
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
                self._ended(self.calls.pop(ref))

    def _worker_up(self, handle: _Handle) -> None:
        try:
            handle.node, handle.host = ray.get(handle.ping, timeout=30)
        except (*_LOST_WORKER, RayTaskError, GetTimeoutError) as error:
            _log.warning("%s did not come up: %s", handle.name, _line(error))
            self.executor._drop(handle)
            return
        self.last_alive = time.monotonic()

    def _ended(self, call: _Call) -> None:
        unit, handle = call.unit, call.handle
        handle.busy = False
        try:
            report: UnitReport = ray.get(call.refs[0])
        except _LOST_WORKER as error:
            self._worker_lost(call, error)
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
        outputs = dict(zip(unit.outputs, call.refs[1:], strict=True))
        for name in outputs:
            self.made_on[unit.key, name] = handle.node or ""
        self.schedule.finish(unit.key, outputs)
        self.dispatcher.finished(unit)
        if unit.key not in self.reports:
            self.cost_done += unit.cost
        self.reports[unit.key] = report
        self.executor._metrics.finished(unit, report, self.dispatcher.value_bytes)
        self.last_alive = time.monotonic()
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

    def _worker_lost(self, call: _Call, error: BaseException) -> None:
        self.executor.lost_workers += 1
        self.executor._metrics.lost.inc(1, {"stage": call.unit.stage})
        _log.warning("%s lost during %s: %s", call.handle.name, call.unit.key, _line(error))
        self.executor._drop(call.handle)
        self.dispatcher.remove_worker(call.handle.name)
        self._put_back(call.unit)
        self._forget_values_of_dead_nodes()
        self._count_attempt(
            call.unit,
            f"{call.unit.key}: its worker was lost {self.executor.options.max_attempts} times "
            f"({_line(error)}): out of memory? Use a smaller --experts-per-unit or more memory",
            limit=2 * self.executor.options.max_attempts,
        )

    def _forget_values_of_dead_nodes(self) -> None:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for value in list(self.schedule.values):
            if self.made_on.get(value) not in alive:
                self.schedule.lose_value(value)

    def _inputs_lost(self, call: _Call) -> None:
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
            limit=4 * self.executor.options.max_attempts,
        )

    def _failed(self, call: _Call, error: Exception) -> None:
        """The unit failed for its own reason: try again, in the end set it aside."""
        self._put_back(call.unit)
        _log.warning("%s failed on %s: %s", call.unit.key, call.handle.name, _line(error))
        message = (
            str(error)
            if isinstance(error, CompressionError)
            else (f"{call.unit.key}: {type(error).__name__}: {_line(error)}")
        )
        if (
            self._count_attempt(call.unit, message, limit=self.executor.options.max_attempts)
            and self.failure is None
        ):
            self.failure = error

    def _count_attempt(self, unit: Unit, message: str, *, limit: int) -> bool:
        """Count a failed try; True when the unit is given up."""
        self.attempts[unit.key] = self.attempts.get(unit.key, 0) + 1
        if self.attempts[unit.key] < limit:
            return False
        self.failures[unit.key] = message
        # Set aside: neither ready nor done, so that all that does not need it goes on.
        self.schedule.set_aside(unit.key)
        return True

    def _watch(self) -> None:
        """Say so when nobody is there to work, and give up in the end."""
        now = time.monotonic()
        if self.calls or any(handle.is_up for handle in self.executor._handles.values()):
            self.last_alive = now
            return
        waited = now - self.last_alive
        if waited > self.executor.options.worker_timeout:
            raise CompressionError(
                f"no worker came up in {waited:.0f} s: the cluster has no room for "
                f"{self._room()} (--gpus-per-worker, --threads), or raise --worker-timeout"
            )
        if now - self.last_warned > 30:
            self.last_warned = now
            _log.warning("waiting for a worker with %s", self._room())

    def _room(self) -> str:
        needs = self.executor._resources
        return f"{needs['num_gpus']:g} GPU and {needs['num_cpus']:g} CPU"


def _check_reachable(address: str) -> None:
    """Answer a wrong address in seconds: Ray's own client tries for many minutes.

    Raises:
        ValueError: nobody listens at host:port.
    """
    place = address.removeprefix("ray://")
    host, colon, port = place.rpartition(":")
    if not colon:
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS):
            return
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Ray at {address} cannot be reached ({error}): check --ray-address"
        ) from None


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
