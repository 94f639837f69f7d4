"""A Ray that the executor starts for itself."""

import socket

import pytest
import ray
from ray._private import ray_constants, services

from sparse_expansion.config import ExecutionOptions
from sparse_expansion.execution.ray.executor import RayExecutor
from sparse_expansion.model.sources import resolve_name
from sparse_expansion.work.spec import WorkerSpec

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(
    ("named", "running", "joins"),
    [
        ("10.0.0.1:6379", None, True),
        ("auto", None, True),
        ("local", "10.0.0.1:6379", False),
        ("", "10.0.0.1:6379", True),
        (None, None, False),
    ],
)
def test_a_ray_that_runs_is_joined_as_it_is(named, running, joins, monkeypatch, tmp_path):
    """A job's driver has to be found under its machine's own address, and shares no GPUs."""
    if named is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", named)
    seen = {}

    def init(**options):
        seen["is for one machine"] = not ray_constants.ENABLE_RAY_CLUSTER

    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: running)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    machine = {"Alive": True, "Resources": {"GPU": 1.0, "CPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [machine])
    monkeypatch.setenv("HF_TOKEN", "hf_given")
    spec = WorkerSpec(store=str(tmp_path), source=resolve_name("m"))
    executor = RayExecutor(spec, ExecutionOptions(executor="ray", num_workers=2))
    # Workers of a Ray that was started here have this process's environment anyway.
    assert ("runtime_env" in executor.pool.options) == joins
    assert seen == {"is for one machine": not joins}
    assert executor.pool.room.startswith("1 GPU" if joins else "0.5 GPU")


@pytest.mark.parametrize(
    ("address", "message"),
    [(None, "cannot be started on this machine.*--executor local"), ("auto", "auto cannot be")],
)
def test_a_ray_that_does_not_come_up_is_one_line(address, message, monkeypatch, tmp_path):
    def init(**options):
        raise Exception("The current node timed out during startup.\nSee its logs.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    spec = WorkerSpec(store=str(tmp_path), source=resolve_name("m"))
    with pytest.raises(ValueError, match=f"Ray.*{message}") as caught:
        RayExecutor(spec, ExecutionOptions(executor="ray", ray_address=address))
    assert "timed out during startup" in str(caught.value) and "\n" not in str(caught.value)


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
