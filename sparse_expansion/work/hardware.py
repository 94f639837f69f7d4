"""What a worker runs on: its device's name and memory, and versions of what computes."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = ("triton", "transformers", "ray")


@cache
def device_name(device: str) -> str:
    """A GPU's name, or the CPU's as the kernel knows it."""
    if device != "cpu":
        return str(torch.cuda.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def device_peak_memory_bytes(device: str) -> int:
    """Largest memory that this process has had allocated on a GPU; 0 for a CPU."""
    return 0 if device == "cpu" else int(torch.cuda.max_memory_allocated(device))


def versions() -> dict[str, str]:
    """Versions by package, of those that are installed, with Python's and CUDA's."""
    # An installed torch's metadata do not say which build it is (+cpu, +cu130), torch itself does.
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found
