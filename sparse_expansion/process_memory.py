"""What this process asks of the C library and of the kernel about its own memory."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

FREED_BYTES_KEPT = 256 << 20
"""Bytes of freed memory that the process keeps for what comes next."""


def keep_freed_memory() -> None:
    """Ask glibc to reuse freed activations instead of returning them to the system.

    A worker frees and allocates the same tens of megabytes for every unit; returned pages come
    back one fault and one clearing at a time, which was a fifth of an actor's time.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        library.mallopt(trim_threshold, FREED_BYTES_KEPT)
        library.mallopt(mmap_threshold, 32 << 20)  # the largest that it takes


class _AllocatorState(ctypes.Structure):
    """``struct mallinfo2`` of glibc 2.33 and later."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def return_excess_memory() -> None:
    """Give back freed memory beyond ``FREED_BYTES_KEPT``.

    By itself glibc returns only what is free at the end of the heap: small things that outlive the
    large ones around them leave holes, which would grow with the number of units.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallinfo2") and hasattr(library, "malloc_trim"):
        library.mallinfo2.restype = _AllocatorState
        if library.mallinfo2().fordblks > FREED_BYTES_KEPT:
            library.malloc_trim(0)


def peak_memory_bytes() -> int:
    """Peak resident memory of this process, without the object store that it shares with others.

    Linux keeps ``ru_maxrss`` over ``exec``: a command started by a large process, a notebook say,
    would report that one's peak. ``VmHWM`` is of this program alone.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in fields:
            shared = fields.get("RssShmem", "0 kB")
            return 1024 * (int(fields["VmHWM"].split()[0]) - int(shared.split()[0]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
