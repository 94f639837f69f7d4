"""Ray's own autoscaler with the node types of the shipped cluster.yaml, on fake nodes."""

import json
import socket
import time
from pathlib import Path

import pytest
import ray
import yaml

from sparse_expansion.cli import main
from sparse_expansion.config import ExecutionOptions
from sparse_expansion.execution.ray.executor import RayExecutor
from sparse_expansion.work.spec import WorkerSpec
from tests.execution.ray_helpers import free_port, ray_head
from tests.jobs import processes
from tests.tiny import SMALL_RUN, digests

pytestmark = pytest.mark.ray(group="ray commands")
ROOT = Path(__file__).resolve().parent.parent
HEAD_TYPE = "ray.head.default"
HEAD_ID = "f" * 51 + "00000"


@pytest.fixture
def cluster(short_home, worker_program):
    """Address of a head without workers, whose autoscaler starts processes in place of machines."""
    shipped = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    port = free_port()
    types = {
        HEAD_TYPE if name == shipped["head_node_type"] else name: {**declared, "node_config": {}}
        for name, declared in shipped["available_node_types"].items()
    }
    config = {
        **shipped,
        **{key: [] for key in shipped if key.endswith("_commands")},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "cluster_synced_files": [],
        "idle_timeout_minutes": 0.05,
        "head_node_type": HEAD_TYPE,
        "available_node_types": types,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
        },
    }
    home = short_home
    (home / "autoscaling.json").write_text(json.dumps(config))

    def is_up():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    flags = [
        f"--autoscaling-config={home}/autoscaling.json",
        "--num-cpus=0",
        "--num-gpus=0",
        "--node-ip-address=127.0.0.1",
        "--include-dashboard=false",
        "--object-store-memory=100000000",
    ]
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    }
    with ray_head(home, port, flags, is_up, worker_program, **environment):
        yield f"127.0.0.1:{port}"


def alive():
    return [node for node in ray.nodes() if node["Alive"]]


def test_from_zero_up_and_back(cluster, tmp_path, neox_folder, text_folder):
    here, there = tmp_path / "local", tmp_path / "cluster"
    common = ["--model", str(neox_folder), "--dataset", str(text_folder), *SMALL_RUN]
    assert main(["expand", *common, "--threads", "1", "--output", str(here)]) == 0
    ray.init(address=cluster, log_to_driver=False)
    try:
        assert len(alive()) == 1 and ray.cluster_resources().get("GPU", 0) == 0
        with pytest.raises(ValueError, match="--num-workers"):
            RayExecutor(WorkerSpec(store="", source=None), ExecutionOptions(executor="ray"))
        command = ["expand", *common, "--output", str(there), "--executor", "ray"]
        command += ["--ray-address", cluster, "--num-workers", "2", "--gpus-per-worker", "1"]
        log = tmp_path / "log"
        job = processes.start([*command, "--threads", "1", "--device", "cpu"], log)
        most = 0
        deadline = time.monotonic() + 150
        while job.is_alive():
            most = max(most, len(alive()))
            assert time.monotonic() < deadline, "the job did not end"
            time.sleep(0.5)
        assert job.exitcode == 0, log.read_text()
        assert most == 3
        while len(alive()) > 1:
            assert time.monotonic() < deadline, "idle nodes were kept"
            time.sleep(0.5)
    finally:
        ray.shutdown()
    assert digests(there) == digests(here)
