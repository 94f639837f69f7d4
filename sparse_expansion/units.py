"""Units of work: what planning makes, executors hand out, and workers do.

Nothing here knows of models or tensors: planning, scheduling and simulation need not load them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of work; equal units give equal bytes, wherever and however often they run."""

    key: str
    """Unique, readable, and a relative path: ``layer-003/mlp.down_proj/experts-000-003``."""
    stage: str
    """Name of the stage that does it."""
    params: dict[str, Any] = field(default_factory=dict)
    """Its keyword arguments."""
    inputs: tuple[tuple[str, str], ...] = ()
    """(unit key, output name) of the values it receives, in order."""
    after: tuple[str, ...] = ()
    """Units whose files must be there first."""
    outputs: tuple[str, ...] = ()
    """Names of the values it hands on."""
    makes_captures: bool = False
    """Whether it makes the captured activations that units of the same affinity read."""
    is_persistent: bool = False
    """Whether it writes files and a marker, and is skipped when they are there."""
    affinity: str | None = None
    """Units of the same affinity share a worker's cache."""
    layer: int = -1
    """Block it belongs to, for ordering and progress."""
    rank: int = 0
    """Order of stages inside a block."""
    cost: float = 0.0
    """Estimated floating-point operations."""
    move_cost: float = 0.0
    """Operations to make its affinity's cache again on another worker."""
    output_bytes: int = 0
    """Estimated bytes of the values it hands on."""
    cache_bytes: int = 0
    """Estimated bytes that its worker keeps for units of the same affinity."""
    tokens: float = 0.0
    """Tokens that it takes through the whole model; through a part of the blocks, so large a part
    of them."""
    traffic_bytes: int = 0
    """Estimated bytes of weights, activations, sums and files that it has to read and write."""


@dataclass
class UnitReport:
    """What a unit tells the driver: small, plain values."""

    key: str
    seconds: float
    peak_memory_bytes: int
    stats: dict[str, Any]
    device: str = ""
    """Name of the GPU or CPU that did it."""
    device_peak_memory_bytes: int = 0
    """Largest memory that its worker has had allocated on a GPU; 0 on a CPU."""
