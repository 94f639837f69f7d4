"""Whether workers and the cluster still live: Ray itself waits for them without end or a word."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Sequence

import ray

from sparse_expansion.execution.ray.actor import ActorHandle
from sparse_expansion.execution.ray.pool import WorkerPool
from sparse_expansion.types import CompressionError

ASK_SECONDS = 5.0
"""Seconds between two questions to a busy worker whether it is alive."""
LOOK_SECONDS = 2.0
"""Seconds between two looks at the cluster."""
LOOK_PATIENCE = 2.0
"""Seconds that a part of the cluster has for taking a connection."""
FIRST_WORD_SECONDS = 4.0
"""Seconds without a worker, or an answer of the cluster, after which the run says so."""
NEXT_WORD_SECONDS = 30.0
"""Seconds after which it says again what it waits for."""
NODE_SECONDS = 8.0
"""Seconds without an answer of this machine's raylet, which never comes back, before the end."""
HEAD_SECONDS = 40.0
"""Seconds without an answer of the head before the end: one with a database may come back.

Ray ends the driver's process without a chance to say a word after 60.
"""
KINDS = ("GPU", "CPU")
"""Ray's names of what workers take."""
_log = logging.getLogger(__name__)


def stalled_workers(handles: Sequence[ActorHandle], patience: float) -> list[ActorHandle]:
    """Busy workers that have not answered for so many seconds; the others are asked again.

    A worker answers in a thread of its own while it computes, so that a long unit is no silence.
    """
    now = time.monotonic()
    asked = {handle.sign: handle for handle in handles if handle.sign is not None}
    if asked:
        # Errors count as answers: a worker that is lost is told by the call of its unit.
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0, fetch_local=False)
        for sign in done:
            asked[sign].sign = None
    for handle in handles:
        if handle.is_at_work and handle.sign is None and now - handle.asked > ASK_SECONDS:
            handle.sign, handle.asked = handle.actor.alive.remote(), now
    return [
        handle
        for handle in handles
        if handle.is_at_work and handle.sign is not None and now - handle.asked > patience
    ]


class ClusterWatch:
    """Looks whether the cluster's head and this machine's part of it take connections."""

    def __init__(self) -> None:
        """Learn their addresses from the Ray that this process is connected to."""
        self._places: dict[str, tuple[str, float]] = {}
        self._silent_since: dict[str, float] = {}
        self._warned: set[str] = set()
        self._looked = time.monotonic()
        if ray.util.client.ray.is_connected():
            # Through a proxy, whose own connection fails with an error; the rest is out of reach.
            return
        context = ray.get_runtime_context()
        self._places["the head of the Ray cluster"] = (context.gcs_address, HEAD_SECONDS)
        for node in ray.nodes():
            if node["NodeID"] == context.get_node_id():
                address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
                self._places["this machine's raylet"] = (address, NODE_SECONDS)

    def look(self) -> None:
        """Look again if it is time to.

        Raises:
            CompressionError: a part of the cluster has not answered for too long.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        for name, (address, patience) in self._places.items():
            if _takes_connections(address):
                self._silent_since.pop(name, None)
                self._warned.discard(name)
                continue
            silent = now - self._silent_since.setdefault(name, now)
            if silent > patience:
                raise CompressionError(
                    f"{name} ({address}) has not answered for {silent:.0f} s: finished units are "
                    "kept, continue with --resume"
                )
            if silent > FIRST_WORD_SECONDS and name not in self._warned:
                self._warned.add(name)
                _log.warning("%s (%s) does not answer", name, address)


def try_connection(address: str, seconds: float) -> None:
    """Connect to ``host:port``, and leave again.

    Raises:
        OSError: nobody takes the connection in time.
        ValueError: the port is no number.
    """
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()


def _takes_connections(address: str) -> bool:
    try:
        try_connection(address, LOOK_PATIENCE)
    except OSError:
        return False
    return True


class Vigil:
    """Says so while nobody is there to work, and gives up in the end."""

    def __init__(self, timeout: float) -> None:
        """Begin to wait.

        Args:
            timeout: seconds without any worker after which the run is given up.
        """
        self._timeout = timeout
        self._last_alive = time.monotonic()
        self._last_warned: float | None = None

    def somebody_is_there(self) -> None:
        """Begin again."""
        self._last_alive, self._last_warned = time.monotonic(), None

    def wait_on(self, pool: WorkerPool) -> None:
        """Say what is waited for, now and then.

        Raises:
            CompressionError: it has been waited for too long.
        """
        now = time.monotonic()
        waited = now - self._last_alive
        if waited > self._timeout:
            raise CompressionError(
                f"no worker came up in {waited:.0f} s: the cluster has no room for "
                f"{pool.room} (--gpus-per-worker, --threads), or raise --worker-timeout"
            )
        patience = FIRST_WORD_SECONDS if self._last_warned is None else NEXT_WORD_SECONDS
        if now - (self._last_warned or self._last_alive) > patience:
            self._last_warned = now
            _log.warning(
                "waiting for workers (%.0f s): %d asked for, each with %s; the cluster has %s",
                waited,
                len(pool.handles),
                pool.room,
                describe_resources(ray.cluster_resources(), ray.available_resources()),
            )


def describe_resources(total: dict[str, float], free: dict[str, float]) -> str:
    """A cluster's GPUs and CPUs, and how many of them are free, for people."""
    parts = [f"{total.get(kind, 0):g} {kind} ({free.get(kind, 0):g} free)" for kind in KINDS]
    return " and ".join(parts)
