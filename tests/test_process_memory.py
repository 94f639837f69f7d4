"""What the process says of its memory, and what it gives back."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from sparse_expansion import process_memory


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or later")
def test_holes_in_the_heap_are_given_back(monkeypatch):
    monkeypatch.setattr(process_memory, "FREED_BYTES_KEPT", 64 << 20)
    process_memory.keep_freed_memory()

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    # Large things that go, and between them small ones that stay.
    large, small = [], []
    for _ in range(40):
        large.append(torch.ones(1 << 20))
        small.append(torch.ones(64))
    full = resident()
    del large
    kept = resident()
    process_memory.return_excess_memory()
    assert resident() < full - (100 << 20)
    assert resident() <= kept and len(small) == 40


def test_peak_memory_is_not_that_of_the_process_which_started_this_one():
    """Linux hands the largest resident size on to a program that is started by vfork and exec."""
    ask = "from sparse_expansion.process_memory import peak_memory_bytes as peak; print(peak())"
    start = f"import subprocess; subprocess.run([{sys.executable!r}, '-c', {ask!r}])"
    large = f"held = b'1' * 2_000_000_000; {start}"
    found = subprocess.run([sys.executable, "-c", large], check=True, capture_output=True)
    assert 10_000_000 < int(found.stdout) < 1_500_000_000
