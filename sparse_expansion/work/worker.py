"""The worker: looks a unit's stage up, runs it, and vouches for the files that it wrote.

A worker is stateless as far as results go: whatever it caches (a captured block's inputs, a model
without its blocks) it can make again, with the same bytes, from the store and the source model.
That is what lets any worker do any unit, and a lost worker's units be done elsewhere.
"""

from __future__ import annotations

import time
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
from sparse_expansion.work.registry import stage_of
from sparse_expansion.work.spec import WorkerSpec

UNITS_PER_TRIM = 8
"""Units between looks at the heap's holes: after each they made a run a fifth slower, after eight a
thirtieth."""


class Worker:
    """Does units. One per process (or per Ray actor)."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Set threads and device."""
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        self.context = WorkContext(spec)
        self._num_units = 0
        keep_freed_memory()

    def run(
        self, unit: Unit, config: RunConfig, inputs: list[Any]
    ) -> tuple[UnitReport, dict[str, Any]]:
        """Do a unit of a graph with these settings; returns its report and its outputs by name.

        Raises:
            CompressionError: the unit cannot be done; the message starts with its key.
        """
        start = time.perf_counter()
        stage = stage_of(unit.stage)
        self.context.use(config)
        if not stage.keeps_expanded_block:
            # Unpacked experts are as large as any stage's arrays: the next stage has its own.
            self.context.kept_block = None
        try:
            done = stage.function(self.context, *inputs, **unit.params)
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
        if unit.is_persistent:
            record = {
                "files": done.files,
                "stats": done.stats,
                # Sums are shared out among threads: another number adds up in another order.
                "threads": torch.get_num_threads(),
            }
            self.context.store.commit(unit.key, record)
        seconds = time.perf_counter() - start
        report = UnitReport(
            unit.key,
            seconds,
            peak_memory_bytes(),
            done.stats,
            device=device_name(self.context.device),
            device_peak_memory_bytes=device_peak_memory_bytes(self.context.device),
        )
        return report, done.outputs

    def forget_before(self, layer: int) -> None:
        """Free the captured activations of earlier blocks: nothing reads them any more."""
        self.context.captures.forget_before(layer)
