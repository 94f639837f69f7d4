"""What a worker is set up with, wherever it runs."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from sparse_expansion.model.sources import ModelSource

CAPTURED_SHARE = 4
"""Captured activations that are kept at all, as a multiple of those kept in memory."""


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """Where a worker finds its run and its model, and what it may use of its machine.

    What is to be computed is not here: settings travel with every unit.
    """

    store: str
    """Path or URL of the run's folder."""
    source: ModelSource
    """The dense model."""
    cache_dir: str | None = None
    """Folder for downloads and conversions; None for the default one."""
    revision: str | None = None
    """Revision of a model on the hub."""
    device: str = "auto"
    """``cpu``, ``cuda``, or ``auto``: CUDA where there is a GPU."""
    threads: int | None = None
    """CPU threads; None leaves PyTorch's own number."""
    activation_bytes: int = 2 << 30
    """Bytes of captured activations that are kept in memory; what is over goes to scratch files."""
    scratch: str | None = None
    """Folder for scratch files; None for the system's."""

    @property
    def captured_bytes(self) -> int:
        """Bytes of captured activations that are kept at all, in memory and in scratch files."""
        return captured_bytes(self.activation_bytes)


def check_device(name: str) -> None:
    """Answer a device that is not there, before any work.

    Raises:
        ValueError: the name is not ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, or there is no such
            device.
    """
    if name in ("auto", "cpu"):
        return
    if re.fullmatch(r"cuda(:\d+)?", name) is None:
        raise ValueError(f"--device {name} is none of auto, cpu and cuda")
    count = torch.cuda.device_count()
    if count == 0:
        raise ValueError(
            f"--device {name}: PyTorch {torch.__version__} sees no CUDA device here: use --device "
            "cpu, or install PyTorch's CUDA build and the driver"
        )
    if int(name.partition(":")[2] or 0) >= count:
        raise ValueError(f"--device {name}: this machine has {count} CUDA devices, from cuda:0 on")


def captured_bytes(activation_bytes: int) -> int:
    """Bytes of captured activations that a worker keeps, scratch files included."""
    return CAPTURED_SHARE * activation_bytes
