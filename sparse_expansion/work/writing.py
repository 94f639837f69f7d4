"""Write-behind: files are hashed and written by a thread while the worker does its next unit."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from sparse_expansion.data.transfers import HostCopies
from sparse_expansion.store import Store


class WriteBehind:
    """Writes files and then their unit's marker, in threads of its own.

    What is written is whole or not there, as ever; a marker comes after the last of its files.
    """

    def __init__(self, store: Store, max_bytes: int, threads: int = 1) -> None:
        """Nothing waits yet.

        Args:
            store: that files and markers are written to.
            max_bytes: bytes that wait at most; who brings more waits too.
            threads: files that are hashed and written at a time.
        """
        self.store = store
        self.max_bytes = max_bytes
        self.waiting_bytes = 0
        """Bytes of tensors that are not written yet."""
        self._room = threading.Condition()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="sparse-expansion-files")

    def write(self, name: str, tensors: Mapping[str, torch.Tensor]) -> Future[dict[str, Any]]:
        """Have a file written; its record comes when it is whole, or the error if it cannot be.

        The tensors must not be written to any more.
        """
        copies = HostCopies(tensors)
        size = copies.num_bytes
        with self._room:
            self._room.wait_for(
                lambda: not self.waiting_bytes or self.waiting_bytes + size <= self.max_bytes
            )
            self.waiting_bytes += size
        record = self._threads.submit(self._write, name, copies)
        if size > self.max_bytes:
            # More than may wait: nothing is held beside the next unit's arrays.
            wait([record])
        return record

    def commit(
        self, key: str, facts: dict[str, Any], files: Mapping[str, Future[dict[str, Any]]]
    ) -> Future[None]:
        """Have a unit's marker written once all of its files are; an error of theirs is its own.

        Args:
            key: of the unit.
            facts: what the marker says beside the files' records.
            files: the unit's files, from ``write``.
        """
        return self._threads.submit(self._commit, key, facts, files)

    def _write(self, name: str, copies: HostCopies) -> dict[str, Any]:
        try:
            return self.store.write_tensors(name, copies.wait())
        finally:
            with self._room:
                self.waiting_bytes -= copies.num_bytes
                self._room.notify()

    def _commit(
        self, key: str, facts: dict[str, Any], files: Mapping[str, Future[dict[str, Any]]]
    ) -> None:
        # Files are begun in the order of the calls: all of these have been, and wait for nothing.
        records = {name: record.result() for name, record in files.items()}
        self.store.commit(key, {"files": records, **facts})
