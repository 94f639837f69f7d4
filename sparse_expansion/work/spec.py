"""What a worker is set up with, wherever it runs."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from sparse_expansion.model.sources import ModelSource

CAPTURED_SHARE = 4
"""Captured activations that are kept at all, as a multiple of those kept in memory."""
RESIDENT_SHARE = 0.5
"""Share of a GPU's free memory that is for what stays there; units compute in the rest."""
DEVICE_CONTEXT_BYTES = 600 << 20
"""Bytes of a GPU that a process takes before its first tensor; an estimate, not measured."""
WAITING_BYTES = 256 << 20
"""Bytes of files that wait to be written while a CPU goes on."""
WAITING_BYTES_OF_DEVICE = 2 << 30
"""The same where a device goes on, which makes the files of a unit in a fraction of the time."""
FILES_OF_DEVICE = 4
"""Files that are written at a time where a device goes on."""


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
    device_bytes: int | None = None
    """Bytes of activations, values and files that stay on a GPU; None for a share of it."""
    device_share: float = 1.0
    """Share of its GPU that the worker has: others work on the rest."""
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


def resident_bytes(spec: WorkerSpec, device: str) -> int:
    """Bytes that a worker keeps on its device; 0 for a CPU, where all is in one memory."""
    if device == "cpu":
        return 0
    if spec.device_bytes is not None:
        return spec.device_bytes
    free, total = torch.cuda.mem_get_info(device)
    return int(RESIDENT_SHARE * min(free, spec.device_share * total))


def bound_device_memory(spec: WorkerSpec, device: str) -> None:
    """Have a worker that shares its GPU fail by itself where it would take others' memory."""
    if device == "cpu" or spec.device_share >= 1:
        return
    _, total = torch.cuda.mem_get_info(device)
    share = spec.device_share - DEVICE_CONTEXT_BYTES / total
    # PyTorch wants a number here, where other calls take "cuda" for the current one.
    index = torch.device(device).index
    index = torch.cuda.current_device() if index is None else index
    torch.cuda.set_per_process_memory_fraction(max(share, 0.01), index)


def waiting_bytes(device: str) -> int:
    """Bytes of files that wait to be written while a worker on this device goes on."""
    return WAITING_BYTES if device == "cpu" else WAITING_BYTES_OF_DEVICE


def writing_threads(device: str) -> int:
    """Files that are hashed and written at a time while a worker on this device goes on.

    A GPU makes more bytes than one thread hashes; a CPU does not, and its cores have work.
    """
    return 1 if device == "cpu" else min(FILES_OF_DEVICE, torch.get_num_threads())


def captured_bytes(activation_bytes: int) -> int:
    """Bytes of captured activations that a worker keeps, scratch files included."""
    return CAPTURED_SHARE * activation_bytes
