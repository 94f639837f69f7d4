"""Ray against the local executor, on small clusters, with actors, nodes and drivers lost."""

import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from sparse_expansion.config import ExecutionOptions
from sparse_expansion.execution.local import LocalExecutor
from sparse_expansion.execution.ray.actor import FILES, SIGNS
from sparse_expansion.execution.ray.executor import RayExecutor, sized_pool
from sparse_expansion.execution.ray.graph_run import Call, GraphRun
from sparse_expansion.execution.ray.wire import from_wire, to_wire
from sparse_expansion.jobs.evaluate import evaluate
from sparse_expansion.jobs.prepare import evaluation_tokens
from sparse_expansion.model.sources import resolve_name
from sparse_expansion.types import CompressionError, HessianSum
from sparse_expansion.work.spec import WorkerSpec
from tests.execution import preforked, ray_helpers
from tests.execution.ray_helpers import Run, config
from tests.jobs import processes
from tests.tiny import digests

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def reference(tmp_path_factory, neox_folder, text_folder):
    """What one local worker makes, by schedule."""
    folder = tmp_path_factory.mktemp("reference")
    return {
        schedule: Run(neox_folder, text_folder, folder / schedule, config(schedule)).local()
        for schedule in ("compressed", "sequential", "dense", "finetune")
    }


@pytest.fixture(scope="module")
def cluster(worker_program):
    """A head without GPU and two nodes with one logical GPU each."""
    with preforked.starting_workers(worker_program), small_cluster(nodes=2) as made:
        yield made


class small_cluster:
    def __init__(self, nodes):
        self.num_nodes = nodes

    def __enter__(self):
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "object_store_memory": ray_helpers.STORE_BYTES,
                "include_dashboard": False,
                "_system_config": ray_helpers.FAST_HEARTBEATS,
            },
        )
        self.nodes = [self.add() for _ in range(self.num_nodes)]
        ray.init(address=self.cluster.address, log_to_driver=False)
        return self

    def add(self):
        return self.cluster.add_node(
            num_cpus=1, num_gpus=1, object_store_memory=ray_helpers.STORE_BYTES
        )

    def __exit__(self, *exc):
        ray.shutdown()
        self.cluster.shutdown()


@pytest.mark.parametrize(
    ("schedule", "workers"),
    [
        ("compressed", 1),
        ("compressed", 2),
        ("sequential", 2),
        ("dense", 1),
        ("dense", 2),
        ("finetune", 2),
    ],
)
def test_any_number_of_workers_gives_the_local_bytes(
    schedule, workers, cluster, tmp_path, neox_folder, text_folder, reference
):
    run = Run(neox_folder, text_folder, tmp_path / "o", config(schedule))
    executor = run.on_ray(num_workers=workers, gpus_per_worker=1)
    assert run.digests() == reference[schedule]
    assert executor.pool.num_lost == 0
    used = {progress.worker for progress in run.seen}
    assert len(used) == workers


def test_fractional_gpus_share_a_card(cluster, tmp_path, neox_folder, text_folder, reference):
    run = Run(neox_folder, text_folder, tmp_path / "o", config())

    def wait_for_all(executor, progress):
        """The little work could be over before the last of them has come up."""
        deadline = time.monotonic() + 30
        handles = executor.pool.handles.values()
        while time.monotonic() < deadline and not all(
            ray.wait([handle.ping], timeout=0)[0] for handle in handles
        ):
            time.sleep(0.1)

    run.on_ray(num_workers=4, gpus_per_worker=0.5, cpus_per_worker=0.5, observe=wait_for_all)
    assert run.digests() == reference["compressed"]
    assert len({progress.worker for progress in run.seen}) == 4


@pytest.mark.parametrize(
    ("workers", "gpus", "shares", "each"),
    [(2, 1, True, 0.5), (3, 1, True, 0.3333), (3, 2, True, 0.5), (2, 2, True, 1), (2, 1, False, 1)],
)
def test_gpus_are_shared_on_a_machine_of_our_own(workers, gpus, shares, each):
    spec = WorkerSpec(store="o", source=resolve_name("m"))
    options = ExecutionOptions(executor="ray", num_workers=workers)
    pool = sized_pool(spec, options, {"GPU": gpus, "CPU": 8}, shares_gpus=shares)
    assert pool.room.startswith(f"{each:g} GPU")
    own = ExecutionOptions(executor="ray", num_workers=workers, gpus_per_worker=0.25)
    assert sized_pool(spec, own, {"GPU": 1}, shares_gpus=shares).room.startswith("0.25 GPU")


@pytest.mark.parametrize("token", ["hf_given", ""])
def test_workers_of_a_cluster_get_the_hubs_token(token, cluster, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", token)
    spec = WorkerSpec(store=str(tmp_path), source=resolve_name("m"), threads=1)
    executor = RayExecutor(spec, ExecutionOptions(executor="ray", num_workers=1))
    try:
        executor.pool.ask_for(1)
        (handle,) = executor.pool.handles.values()
        asked = handle.actor.__ray_call__.remote(lambda _: os.environ.get("HF_TOKEN"))
        # Without a token Ray's own environment stays: here that of a cluster that has none.
        assert ray.get(asked, timeout=60) == (token or None)
    finally:
        executor.close()


def test_evaluation_equals_the_local_one(cluster, tmp_path, neox_folder, text_folder):
    run = Run(neox_folder, text_folder, tmp_path / "o", config())
    local = LocalExecutor(run.spec)
    run.expand(local)
    tokens = evaluation_tokens(run.prepared.texts, seqlen=48, max_windows=7, vocabulary=512)

    def perplexity(model, executor, **split):
        found = evaluate(
            model,
            tokens,
            run.settings,
            run.prepared.shell,
            executor,
            lambda progress: None,
            run.measured,
            **split,
        )
        assert len(found.per_window) == 7 and found.nll.num_tokens == 7 * 47
        return found.nll.perplexity

    wanted = {model: perplexity(model, local) for model in ("dense", "expanded")}
    assert wanted["dense"] != wanted["expanded"]
    executor = RayExecutor(
        run.spec, ExecutionOptions(executor="ray", num_workers=2, gpus_per_worker=1)
    )
    try:
        for shards, ranges in ((1, 1), (2, 1), (2, 3)):
            for model in wanted:
                found = perplexity(model, executor, num_shards=shards, num_ranges=ranges)
                assert found == pytest.approx(wanted[model], rel=1e-6)
    finally:
        executor.close()


def test_an_actor_killed_in_mid_run(cluster, tmp_path, neox_folder, text_folder, reference):
    run = Run(neox_folder, text_folder, tmp_path / "o", config())
    killed = []

    def kill(executor, progress):
        if progress.unit.layer == 1 and progress.unit.stage == "gather" and not killed:
            name = progress.worker.split("@")[0]
            killed.append(name)
            ray.kill(executor.pool.handles[name].actor)

    executor = run.on_ray(num_workers=2, gpus_per_worker=1, observe=kill)
    assert killed and executor.pool.num_lost >= 1
    assert run.digests() == reference["compressed"]


def test_a_worker_that_is_stopped_loses_its_unit(
    cluster, tmp_path, neox_folder, text_folder, reference, caplog
):
    """It would answer never, and Ray would wait for it for ever."""
    run = Run(neox_folder, text_folder, tmp_path / "o", config())
    stopped = []

    def stop(executor, progress):
        if progress.unit.layer == 1 and progress.unit.stage == "gather" and not stopped:
            handle = executor.pool.handles[progress.worker.split("@")[0]]
            stopped.append(handle.process)
            os.kill(handle.process, signal.SIGSTOP)

    try:
        executor = run.on_ray(num_workers=2, gpus_per_worker=1, stall_timeout=10, observe=stop)
    finally:
        os.kill(stopped[0], signal.SIGKILL)
    assert executor.pool.num_lost == 1
    assert run.digests() == reference["compressed"]
    assert f"process {stopped[0]} on {os.uname().nodename} shows no sign of life" in caplog.text


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("schedule", ["compressed", "dense"])
def test_a_node_removed_in_mid_run(
    schedule, replace, cluster, tmp_path, neox_folder, text_folder, reference
):
    """Spot preemption: the node's actor, cache and objects are gone at once."""
    run = Run(neox_folder, text_folder, tmp_path / "o", config(schedule))
    removed = []

    def remove(executor, progress):
        if progress.unit.layer == 1 and progress.unit.stage == "router" and not removed:
            removed.append(1)
            cluster.cluster.remove_node(cluster.nodes.pop(), allow_graceful=False)
            if replace:
                cluster.nodes.append(cluster.add())

    try:
        executor = run.on_ray(num_workers=2, gpus_per_worker=1, observe=remove)
    finally:
        if not replace and removed:
            cluster.nodes.append(cluster.add())
    assert removed and executor.pool.num_lost >= 1
    assert run.digests() == reference[schedule]


def test_a_poison_unit_is_named_and_does_not_take_the_others_down(
    cluster, tmp_path, neox_folder, text_folder
):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "m"
    shutil.copytree(neox_folder, folder)
    state = load_file(folder / "model.safetensors")
    state["gpt_neox.layers.2.mlp.dense_4h_to_h.weight"][0, 0] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    run = Run(folder, text_folder, tmp_path / "o", config("dense"))
    with pytest.raises(CompressionError, match=r"layer-002/mlp.dense_4h_to_h/experts-00.*NaN"):
        run.on_ray(num_workers=2, gpus_per_worker=1, max_attempts=2)
    done = {key for key in run.store.records() if "/experts-" in key}
    assert len(done) == 3 * 2 * 2 - 2
    assert not [key for key in done if key.startswith("layer-002/mlp.dense_4h_to_h")]


def test_a_unit_that_kills_its_worker_every_time_is_given_up(
    cluster, tmp_path, neox_folder, text_folder, monkeypatch
):
    """An out-of-memory kill that would repeat for ever."""
    run = Run(neox_folder, text_folder, tmp_path / "o", config())
    marker = tmp_path / "attempts"
    units = run.prepared.units
    index = next(i for i, unit in enumerate(units) if unit.stage == "trunk")
    from dataclasses import replace

    units[index] = replace(units[index], params={"marker": str(marker)})
    monkeypatch.setattr("sparse_expansion.execution.ray.pool.UnitActor", SuicidalActor)
    with pytest.raises(CompressionError, match="trunk: its worker was lost"):
        run.on_ray(num_workers=1, gpus_per_worker=1, max_attempts=1)
    assert marker.read_text() == "xx"


@pytest.mark.parametrize(
    ("files_first", "is_computing", "blamed"),
    [
        # The unit that was computed is to blame, in whatever order the losses come.
        (True, True, ["trunk"]),
        (False, True, ["trunk"]),
        # Where there was none, one of those that were written is.
        (True, False, ["embed-0"]),
    ],
)
def test_a_lost_worker_is_blamed_on_one_unit(files_first, is_computing, blamed):
    handle = SimpleNamespace(name="worker-0", busy=is_computing)
    pool = SimpleNamespace(handles={"worker-0": handle}, num_lost=0)
    pool.drop = lambda lost: pool.handles.pop(lost.name, None)
    run, found, returned = GraphRun.__new__(GraphRun), [], []
    run.pool, run.options = pool, SimpleNamespace(max_attempts=1)
    run.metrics = SimpleNamespace(lost=SimpleNamespace(inc=lambda *labels: None))
    run.dispatcher = SimpleNamespace(remove_worker=lambda name: None)
    run._put_back = lambda unit: returned.append(unit.key)
    run._forget_values_of_dead_nodes = lambda: None
    run._count_attempt = lambda unit, message, limit: found.append(unit.key)

    def call(key, is_computed):
        unit = SimpleNamespace(key=key, stage=key)
        return Call(unit, handle, (), 0.0, is_computed=is_computed)

    calls = [call("embed-0", True), call("embed-1", True)]
    if is_computing:
        calls.insert(len(calls) if files_first else 0, call("trunk", False))
    for one in calls:
        # As when the end of a unit is noticed.
        handle.busy = handle.busy and one.is_computed
        run._worker_lost(one, "")
    assert found == blamed and pool.num_lost == 1
    assert sorted(returned) == sorted(one.unit.key for one in calls)


class SuicidalActor:
    """An actor whose process ends when it gets the poison."""

    def __init__(self, spec):
        from sparse_expansion.execution.ray.actor import UnitActor

        self.inner = UnitActor(spec)

    def ready(self):
        return self.inner.ready()

    @ray.method(concurrency_group=SIGNS)
    def alive(self):
        pass

    def run(self, unit, *inputs):
        if "marker" in unit.params:
            with open(unit.params["marker"], "a") as stream:
                stream.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return self.inner.run(unit, *inputs)

    @ray.method(concurrency_group=FILES)
    def written(self, key):
        return self.inner.written(key)


def test_a_worker_that_joins_later_gets_work(
    tmp_path_factory, cluster, tmp_path, neox_folder, text_folder, reference
):
    """Two workers wanted, room for one at first."""
    cluster.cluster.remove_node(cluster.nodes.pop(), allow_graceful=False)
    run = Run(neox_folder, text_folder, tmp_path / "o", config())
    added = []

    def add(executor, progress):
        if not added:
            added.append(1)
            cluster.nodes.append(cluster.add())
        if progress.unit.layer == 0:
            # Give the second actor time to start before the little work is over.
            deadline = time.monotonic() + 20
            while (
                time.monotonic() < deadline
                and len(
                    [h for h in executor.pool.handles.values() if ray.wait([h.ping], timeout=0)[0]]
                )
                < 2
            ):
                time.sleep(0.1)

    run.on_ray(num_workers=2, gpus_per_worker=1, observe=add)
    assert len({progress.worker for progress in run.seen}) == 2
    assert run.digests() == reference["compressed"]


def test_no_room_for_a_worker_ends_in_a_clear_error(
    cluster, tmp_path, neox_folder, text_folder, caplog
):
    run = Run(neox_folder, text_folder, tmp_path / "o", config())
    with pytest.raises(CompressionError, match="no worker came up .* 5 GPU and 1 CPU"):
        run.on_ray(num_workers=1, gpus_per_worker=5, worker_timeout=6)
    # It has said so before, with what it asks for and what there is.
    (record,) = [one for one in caplog.records if "waiting for workers" in one.message]
    assert "1 asked for, each with 5 GPU and 1 CPU" in record.message
    assert "the cluster has 2 GPU (2 free) and 2 CPU (2 free)" in record.message


def test_wire_format():
    values = [
        torch.randn(2, 3),
        torch.randn(4).bfloat16(),
        HessianSum(torch.eye(2), 3),
        HessianSum(torch.eye(2), 3, cross_OD=torch.ones(2, 2), residual_energy=3.5),
        [HessianSum(torch.zeros(1, 1), 0)],
        5,
    ]
    for value in values:
        back = from_wire(to_wire(value))
        assert type(back) is type(value)
    assert torch.equal(from_wire(to_wire(values[1])), values[1])
    assert from_wire(to_wire(values[2])).num_tokens == 3
    assert from_wire(to_wire(values[2])).cross_OD is None
    back = from_wire(to_wire(values[3]))
    assert torch.equal(back.cross_OD, torch.ones(2, 2))
    assert back.residual_energy == 3.5 and back.sum_D is None


def command(model: Path, text: Path, output: Path, *flags: str) -> list[str]:
    return [
        *processes.arguments(model, text, output),
        "--preset",
        "paper",
        "--executor",
        "ray",
        *flags,
    ]


def test_driver_killed_and_resumed_with_another_number_of_workers(
    tmp_path, neox_folder, text_folder, reference, worker_program
):
    """Through the command line, which starts (and ends) a Ray of its own."""
    output, log = tmp_path / "o", tmp_path / "log"
    one = command(neox_folder, text_folder, output, "--num-workers", "1")
    process = processes.start(one, log, worker_program)
    marker = output / "run" / "units" / "layer-001" / "mlp.dense_h_to_4h" / "router.json"
    processes.wait_for(marker.exists, process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (output / "config.json").exists()
    two = command(neox_folder, text_folder, output, "--num-workers", "2", "--resume")
    process = processes.start(two, log, worker_program)
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert "worker-001@" in log.read_text() or "worker-000@" in log.read_text()
    assert digests(output) == reference["compressed"]


@pytest.mark.parametrize(
    ("program", "name"),
    [("raylet", "this machine's raylet"), ("gcs_server", "the head of the Ray cluster")],
)
def test_a_cluster_that_ends_ends_the_run(
    program, name, tmp_path, neox_folder, text_folder, worker_program
):
    output, log = tmp_path / "o", tmp_path / "log"
    # Long enough not to be over first.
    long = ["--num-workers", "1", "--dataset-size", "8000"]
    flags = command(neox_folder, text_folder, output, *long)
    sooner = {"sparse_expansion.execution.ray.liveness.HEAD_SECONDS": 8}
    process = processes.start(flags, log, worker_program, sooner)
    processes.wait_for((output / "run" / "units").exists, process)
    (part,) = children(process.pid, program)
    os.kill(part, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == 1
    message = log.read_text().strip().splitlines()[-1]
    assert f"error: {name}" in message and "continue with --resume" in message


def children(parent, program):
    """Ids of the processes that a process has started with a program."""
    found = subprocess.run(
        ["ps", "--ppid", str(parent), "-o", "pid=,comm="], capture_output=True, text=True
    )
    rows = [line.split() for line in found.stdout.splitlines()]
    return [int(number) for number, name in rows if name == program]


def test_unreachable_cluster_is_bad_input(tmp_path, neox_folder, text_folder, worker_program):
    log = tmp_path / "log"
    flags = command(neox_folder, text_folder, tmp_path / "o", "--ray-address", "127.0.0.1:1")
    process = processes.start(flags, log, worker_program)
    process.join()
    assert process.exitcode == 2
    last = log.read_text().strip().splitlines()[-1]
    assert "Ray at 127.0.0.1:1 cannot be reached" in last and "--ray-address" in last
