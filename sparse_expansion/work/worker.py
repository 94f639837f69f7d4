"""The worker: looks a unit's stage up, runs it, and vouches for the files that it wrote.

A worker is stateless as far as results go: whatever it caches (a captured block's inputs, a model
without its blocks) it can make again, with the same bytes, from the store and the source model.
That is what lets any worker do any unit, and a lost worker's units be done elsewhere.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from sparse_expansion.config import RunConfig
from sparse_expansion.messages import first_line
from sparse_expansion.process_memory import (
    keep_freed_memory,
    peak_memory_bytes,
    return_excess_memory,
)
from sparse_expansion.types import CompressionError
from sparse_expansion.units import Unit, UnitReport
from sparse_expansion.work.context import WorkContext
from sparse_expansion.work.hardware import device_name, device_peak_memory_bytes
from sparse_expansion.work.registry import Done, Stage, stage_of
from sparse_expansion.work.spec import WorkerSpec, bound_device_memory

UNITS_PER_TRIM = 8
"""Units between looks at the heap's holes: after each they made a run a fifth slower, after eight a
thirtieth."""


@dataclass
class Computed:
    """A unit that has been computed, and whose files may still be on their way to disk."""

    report: UnitReport
    outputs: dict[str, Any]
    """Values that are handed on, by name."""
    written: Future[None] | None
    """Ends when all files and the marker are whole, or with the error; None without files. The unit
    is done then, and not before."""


class Worker:
    """Does units. One per process (or per Ray actor)."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Set threads and device."""
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        self.context = WorkContext(spec)
        bound_device_memory(spec, self.context.device)
        self._num_units = 0
        keep_freed_memory()

    def run(self, unit: Unit, config: RunConfig, inputs: list[Any]) -> Computed:
        """Compute a unit of a graph with these settings, and have its files written.

        Raises:
            CompressionError: the unit cannot be done; the message starts with its key.
        """
        start = time.perf_counter()
        stage = stage_of(unit.stage)
        self.context.use(config)
        self.context.place = (None, 0.0)
        if not stage.keeps_expanded_block:
            # Unpacked experts are as large as any stage's arrays: the next stage has its own.
            self.context.kept_block = None
        try:
            done = self._compute(stage, unit, inputs)
        except CompressionError as error:
            raise CompressionError(f"{unit.key}: {error}") from error
        except torch.OutOfMemoryError as error:
            raise CompressionError(
                f"{unit.key}: out of device memory ({first_line(error)}): use a smaller "
                "--experts-per-unit, or more memory per worker"
            ) from error
        finally:
            self.context.buffers.evict_mapped_pages()
            self._num_units += 1
            if self._num_units % UNITS_PER_TRIM == 0:
                return_excess_memory()
        written = None
        if unit.is_persistent:
            # Sums are shared out among threads: another number adds up in another order.
            facts = {"stats": done.stats, "threads": torch.get_num_threads()}
            written = self.context.files.commit(unit.key, facts, done.files)
        seconds = time.perf_counter() - start
        report = UnitReport(
            unit.key,
            seconds,
            peak_memory_bytes(),
            done.stats,
            device=device_name(self.context.device),
            device_peak_memory_bytes=device_peak_memory_bytes(self.context.device),
        )
        return Computed(report, done.outputs, written)

    def _compute(self, stage: Stage, unit: Unit, inputs: list[Any]) -> Done:
        """Run a unit's stage; once more where what is kept on the device left it no room."""
        try:
            return stage.function(self.context, *inputs, **unit.params)
        except torch.OutOfMemoryError:
            if not self.context.buffers.device_bytes:
                raise
        # Outside the handler: the error's frames hold the arrays that it ran out with.
        self.context.make_room()
        return stage.function(self.context, *inputs, **unit.params)

    def forget_before(self, layer: int) -> None:
        """Free what is kept of earlier blocks: nothing reads it any more."""
        self.context.forget_before(layer)
