"""A Ray that the executor starts for itself."""

import socket

import pytest
import ray

from sparse_expansion.config import ExecutionOptions
from sparse_expansion.execution.ray.executor import RayExecutor
from sparse_expansion.model.sources import resolve_name
from sparse_expansion.work.spec import WorkerSpec

pytestmark = pytest.mark.ray


def test_it_listens_on_loopback_alone(tmp_path):
    spec = WorkerSpec(store=str(tmp_path), source=resolve_name("m"))
    executor = RayExecutor(spec, ExecutionOptions(executor="ray", num_workers=1))
    try:
        (node,) = ray.nodes()
        ports = [node["NodeManagerPort"], node["ObjectManagerPort"]]
        ports.append(int(ray.get_runtime_context().gcs_address.rpartition(":")[2]))
        for port in ports:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            # Another address of this machine, which is open where all of them are.
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.2", port), timeout=5)
    finally:
        executor.close()
