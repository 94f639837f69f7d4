"""What the steps of a run took: seconds, operations, bytes and memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

from sparse_expansion.config import RunConfig
from sparse_expansion.execution.base import Executor
from sparse_expansion.units import Unit, UnitReport
from sparse_expansion.work.hardware import versions
from sparse_expansion.work.stages import device


@dataclass
class StageWork:
    """What one stage's units came to, summed over units and workers."""

    units: int = 0
    """Number of finished units."""
    seconds: float = 0.0
    """Seconds of work, of all workers together."""
    flops: float = 0.0
    """Floating-point operations, as estimated in ``Unit.cost``."""
    traffic_bytes: float = 0.0
    """Bytes read and written, as estimated in ``Unit.traffic_bytes``."""


@dataclass
class Measurements:
    """What is collected over the steps of a run."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Wall-clock seconds by step of the run."""
    stages: dict[str, StageWork] = field(default_factory=lambda: defaultdict(StageWork))
    """Work by name of the stage."""
    peak_memory_bytes: int = 0
    """Largest resident memory of any worker."""
    devices: set[str] = field(default_factory=set)
    """Names of the GPUs or CPUs that did units."""
    device_peak_memory_bytes: int = 0
    """Largest memory that any worker has had allocated on a GPU; 0 on CPUs."""
    ceilings: dict[str, float] | None = None
    """What a worker's device can do, where that was measured."""

    def add(self, reports: Iterable[UnitReport], units: dict[str, Unit]) -> None:
        """Account for finished units.

        Args:
            reports: what the units told.
            units: the units by key.
        """
        for report in reports:
            unit = units[report.key]
            work = self.stages[unit.stage]
            work.units += 1
            work.seconds += report.seconds
            work.flops += unit.cost
            work.traffic_bytes += unit.traffic_bytes
            self.peak_memory_bytes = max(self.peak_memory_bytes, report.peak_memory_bytes)
            if report.device:
                self.devices.add(report.device)
            self.device_peak_memory_bytes = max(
                self.device_peak_memory_bytes, report.device_peak_memory_bytes
            )

    def machine(self) -> dict[str, Any]:
        """What the units were done on and with, and when the last of them was."""
        return {
            "devices": sorted(self.devices),
            "device_peak_memory_bytes": self.device_peak_memory_bytes,
            "versions": versions(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }

    def profile(self) -> dict[str, Any] | None:
        """Every stage's work and its shares of the ceilings; None where those were not measured."""
        if self.ceilings is None:
            return None
        flops = self.ceilings["matmul_flops_per_second"]
        copies = self.ceilings["copy_bytes_per_second"]
        stages = {
            name: {
                **asdict(work),
                "matmul_share": work.flops / (flops * work.seconds),
                "copy_share": work.traffic_bytes / (copies * work.seconds),
            }
            for name, work in sorted(self.stages.items())
        }
        return {"ceilings": self.ceilings, "stages": stages}


def measure_ceilings(executor: Executor, config: RunConfig, measured: Measurements) -> None:
    """Have a worker find out what its device can do; takes a few seconds."""
    unit = device.ceilings.unit(key="ceilings")
    measured.ceilings = executor.run([unit], config, lambda progress: None)[unit.key].stats
