"""The executor: joins or starts Ray, sizes the pool of actors, and runs graphs on it."""

from __future__ import annotations

import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import ray
from ray._private import ray_constants, services
from ray.util import accelerators

from sparse_expansion.config import ExecutionOptions, RunConfig
from sparse_expansion.config.nearest import did_you_mean
from sparse_expansion.execution.base import Observer, Working
from sparse_expansion.execution.ray.graph_run import GraphRun
from sparse_expansion.execution.ray.liveness import try_connection
from sparse_expansion.execution.ray.metrics import RunMetrics
from sparse_expansion.execution.ray.pool import WorkerPool
from sparse_expansion.messages import first_line
from sparse_expansion.units import Unit, UnitReport
from sparse_expansion.work.spec import WorkerSpec

CONNECT_SECONDS = 10.0
"""Seconds after which an address that does not answer is taken for wrong."""
_LABEL = "accelerator_type:"
"""Beginning of the name of the resource by which Ray knows a node's type of accelerator."""
_HANDED_ON = ("HF_TOKEN",)
"""Variables that workers which this process did not start need as it has them."""


class RayExecutor:
    """Runs graphs of units on actors of a Ray cluster."""

    def __init__(self, spec: WorkerSpec, options: ExecutionOptions) -> None:
        """Join or start Ray; actors are asked for when a graph is run.

        Raises:
            ValueError: the cluster cannot be reached, or has no workers and no number is given, or
                nobody knows the accelerator type.
        """
        self.options = options
        # Without this an actor that asks for no GPU sees all of them.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
        self._owns_ray = not ray.is_initialized()
        starts_ray = self._owns_ray and options.ray_address is None and not _is_in_cluster()
        if self._owns_ray:
            self._connect(starts_ray)
        # A cluster that others started may grow, and its workers wait for GPUs of their own.
        self.pool = sized_pool(
            spec,
            options,
            resources_of(ray.nodes(), options.accelerator_type),
            shares_gpus=starts_ray,
            environment={} if starts_ray else _handed_on(),
        )
        self._metrics = RunMetrics()
        self._graph: GraphRun | None = None

    @property
    def num_workers(self) -> int:
        """Workers that do units at the same time, once all have come up."""
        return self.pool.num_workers

    @property
    def uses_gpus(self) -> bool:
        """Whether every worker gets a GPU, or a share of one."""
        return bool(self.pool.options["num_gpus"]) and self.pool.spec.device != "cpu"

    def working(self) -> list[Working]:
        """See ``Executor.working``."""
        graph = self._graph
        return [] if graph is None else graph.working()

    def _connect(self, starts_ray: bool) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.options.ray_address is None:
            options["include_dashboard"] = False
            if self.options.object_store_bytes is not None:
                options["object_store_memory"] = self.options.object_store_bytes
        else:
            _check_reachable(self.options.ray_address)
            options["address"] = self.options.ray_address
        try:
            with _on_loopback() if starts_ray else nullcontext():
                ray.init(**options)
        # Ray raises the bare class where its processes are not up in time.
        except Exception as error:
            line = first_line(error)
            if starts_ray:
                raise ValueError(
                    f"Ray cannot be started on this machine ({line}): see that it has memory and "
                    "processors to spare, or use --executor local"
                ) from None
            raise ValueError(
                f"Ray at {self.options.ray_address or 'this machine'} cannot be reached ({line}): "
                "check --ray-address, and RAY_AUTH_MODE and its token on both sides"
            ) from None

    def run(
        self, units: Sequence[Unit], config: RunConfig, observer: Observer
    ) -> dict[str, UnitReport]:
        """See ``Executor.run``."""
        self._graph = GraphRun(
            self.pool, self.options, self._metrics, units=units, config=config, observer=observer
        )
        try:
            return self._graph.loop()
        finally:
            self._graph = None

    def close(self) -> None:
        """Give the workers back, and Ray too if it was started here."""
        self.pool.close()
        if self._owns_ray:
            ray.shutdown()


def resources_of(nodes: list[dict[str, Any]], accelerator_type: str | None) -> dict[str, float]:
    """What the nodes of a cluster have together, or those of one type of accelerator.

    Args:
        nodes: as Ray lists them.
        accelerator_type: one of Ray's names, or one that a node has as a label; None for any.

    Raises:
        ValueError: it is neither.
    """
    known = {value for name, value in vars(accelerators).items() if name.isupper()}
    found: dict[str, float] = defaultdict(float)
    for node in nodes:
        resources = node["Resources"] if node["Alive"] else {}
        labels = {name.removeprefix(_LABEL) for name in resources if name.startswith(_LABEL)}
        known |= labels
        if accelerator_type is None or accelerator_type in labels:
            for name, amount in resources.items():
                found[name] += amount
    if accelerator_type is not None and accelerator_type not in known:
        raise ValueError(
            f"--accelerator-type {accelerator_type}: neither Ray nor this cluster knows it"
            f"{did_you_mean(accelerator_type, sorted(known)) or ', e.g. H100'}"
        )
    return dict(found)


def sized_pool(
    spec: WorkerSpec,
    options: ExecutionOptions,
    resources: dict[str, float],
    *,
    shares_gpus: bool = False,
    environment: dict[str, str] | None = None,
) -> WorkerPool:
    """A pool as large as the cluster has room for, unless the options say otherwise.

    Args:
        spec: what workers are set up with.
        options: how many workers there are to be, and what each is to have.
        resources: what the cluster has.
        shares_gpus: whether more workers than GPUs get equal shares of them.
        environment: variables that workers get beside those of their machines.

    Raises:
        ValueError: the cluster has no workers and no number is given.
    """
    cluster_gpus, cluster_cpus = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
    if options.num_workers is None and not cluster_cpus and not cluster_gpus:
        kind = f" with {options.accelerator_type}" if options.accelerator_type else ""
        raise ValueError(
            f"the cluster has no workers{kind} yet: say how many to ask for, e.g. --num-workers 4 "
            "--gpus-per-worker 1"
        )
    gpus = options.gpus_per_worker
    if gpus is None:
        # Machines of a type that is asked for may still have to come.
        wants_gpus = cluster_gpus >= 1 or options.accelerator_type is not None
        gpus = 1.0 if spec.device != "cpu" and wants_gpus else 0.0
        if gpus and shares_gpus and cluster_gpus and options.num_workers is not None:
            # As many workers on every GPU; Ray counts shares in ten-thousandths.
            on_each = math.ceil(options.num_workers / cluster_gpus)
            gpus = math.floor(10_000 / on_each) / 10_000
    cpus = options.cpus_per_worker
    count = options.num_workers
    if count is None and gpus > 0:
        count = max(1, int(cluster_gpus / gpus))
    elif count is None:
        count = max(1, int(resources.get("CPU", 1) // (cpus or spec.threads or 1)))
    threads = spec.threads
    if threads is None:
        threads = max(1, int(cpus or resources.get("CPU", 1) // count))
    return WorkerPool(
        # Ray sets one OpenMP thread in an actor with one CPU or none: threads are set explicitly.
        replace(spec, threads=threads, device_share=min(gpus, 1.0) or 1.0),
        num_workers=count,
        num_gpus=gpus,
        num_cpus=threads if cpus is None else cpus,
        accelerator_type=options.accelerator_type,
        environment=environment or {},
    )


def _handed_on() -> dict[str, str]:
    """What workers need of this process's environment, to download the same model."""
    return {name: os.environ[name] for name in _HANDED_ON if os.environ.get(name)}


def _is_in_cluster() -> bool:
    """Whether Ray, given no address, joins one that runs: a job's, or this machine's latest."""
    named = os.environ.get(ray_constants.RAY_ADDRESS_ENVIRONMENT_VARIABLE)
    if named:
        return named != "local"
    return services.find_bootstrap_address(None) is not None


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have a Ray that is started here listen on loopback, and not on all of a machine's addresses.

    Ray does so where it is for one machine alone, as on other systems than Linux. A constant of its
    import decides that, and for the processes that it starts their environment.
    """
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before, set_before = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(name)
    ray_constants.ENABLE_RAY_CLUSTER, os.environ[name] = False, "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[name]
        if set_before is not None:
            os.environ[name] = set_before


def _check_reachable(address: str) -> None:
    """Answer a wrong address in seconds: Ray's own client tries for many minutes.

    Raises:
        ValueError: nobody listens at host:port.
    """
    place = address.removeprefix("ray://")
    if ":" not in place:
        return
    try:
        try_connection(place, CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Ray at {address} cannot be reached ({error}): check --ray-address"
        ) from None
