"""The actor: a worker in a process of its own, and the driver's handle of it."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import ray

from sparse_expansion.config import RunConfig
from sparse_expansion.execution.ray.wire import from_wire, to_wire
from sparse_expansion.units import Unit, UnitReport
from sparse_expansion.work.spec import WorkerSpec
from sparse_expansion.work.worker import Worker

SIGNS = "signs"
"""Ray's group of calls that are answered in a thread of their own."""
FILES = "files"
"""The group of calls that wait, in another thread, until a unit's files are written."""


class UnitActor:
    """A worker in a process of its own."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Libraries are quietened here as in the driver: their bars would garble its terminal."""
        warnings.filterwarnings("ignore")
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.worker = Worker(spec)
        self._writing: dict[str, tuple[UnitReport, Future[None]]] = {}

    def ready(self) -> tuple[str, str, int]:
        """Node id, host name, process id: the first call, answered once the actor is placed."""
        return ray.get_runtime_context().get_node_id(), os.uname().nodename, os.getpid()

    @ray.method(concurrency_group=SIGNS)  # type: ignore[untyped-decorator]
    def alive(self) -> None:
        """Answer, also while a unit is done."""

    def run(self, unit: Unit, config: RunConfig, first_open_layer: int, *inputs: Any) -> Any:
        """Compute a unit; the report and each output are objects of their own.

        A persistent unit is done when ``written`` has returned for it too.
        """
        self.worker.forget_before(first_open_layer)
        computed = self.worker.run(unit, config, [from_wire(value) for value in inputs])
        if computed.written is not None:
            self._writing[unit.key] = computed.report, computed.written
        if not unit.outputs:
            return computed.report
        return (computed.report, *(to_wire(computed.outputs[name]) for name in unit.outputs))

    @ray.method(concurrency_group=FILES)  # type: ignore[untyped-decorator]
    def written(self, key: str) -> UnitReport:
        """A computed unit's report, once its files and its marker are whole.

        Raises what prevents that.
        """
        report, written = self._writing.pop(key)
        written.result()
        return report


@dataclass
class ActorHandle:
    """An actor as the driver sees it."""

    name: str
    actor: Any
    """Ray's handle."""
    ping: Any
    """Reference to the answer of its first call."""
    node: str | None = None
    """Id of the node that it runs on; None until it has come up."""
    host: str = ""
    """Name of that node's machine."""
    process: int = 0
    """Id of its process there."""
    busy: bool = False
    """Whether it computes a unit."""
    num_writing: int = 0
    """Units that it has computed and whose files it still writes."""
    sign: Any = None
    """Reference to the answer whether it is alive; None while it is not asked."""
    asked: float = 0.0
    """Monotonic second at which it was last asked, or given a unit."""

    @property
    def is_up(self) -> bool:
        """Whether it has answered its first call."""
        return self.node is not None

    @property
    def is_at_work(self) -> bool:
        """Whether it owes the end of a unit."""
        return self.busy or self.num_writing > 0
