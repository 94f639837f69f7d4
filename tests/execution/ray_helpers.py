"""What the Ray tests share: an isolated Ray, clusters, runs and their bytes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparse_expansion.config import (
    CalibrationConfig,
    CompressionConfig,
    ExecutionOptions,
    RefinementConfig,
    RoutingConfig,
    RunConfig,
)
from sparse_expansion.data.texts import TextRequest
from sparse_expansion.execution.local import LocalExecutor
from sparse_expansion.execution.ray.executor import RayExecutor
from sparse_expansion.jobs.expand import expand
from sparse_expansion.jobs.measurements import Measurements
from sparse_expansion.jobs.prepare import claim, prepare
from sparse_expansion.model.sources import resolve_name
from sparse_expansion.store import Store
from sparse_expansion.work.spec import WorkerSpec
from tests.tiny import digests

BIN = Path(sysconfig.get_path("scripts"))
"""Where console scripts are installed."""
STORE_BYTES = 80 * 1024 * 1024
FAST_HEARTBEATS = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill_all_with_home(home: Path) -> None:
    """Ray's processes leave their session and rename themselves; their environment stays."""
    marker = f"HOME={home}".encode()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            found = environ.read_bytes().split(b"\0")
        except OSError:  # it has just ended, or is another user's
            continue
        if marker in found:
            subprocess.run(["kill", "-KILL", environ.parent.name], check=False)


START_RAY = (
    "import sys; sys.executable = sys.argv.pop(1); import ray.scripts.scripts as r; r.main()"
)
"""The program `ray`, but that workers are started with the first argument."""


@contextmanager
def ray_head(
    home: Path,
    port: int,
    flags: Sequence[str],
    is_up: Callable[[], bool],
    worker_program: str,
    **environment: str,
) -> Iterator[None]:
    """`ray start --head` with a home of its own; all that it started ends with the block."""
    log = (home / "head.log").open("w")
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", START_RAY, worker_program),
            "start",
            "--head",
            "--block",
            f"--port={port}",
            f"--temp-dir={home}/ray",
            *flags,
        ],
        env={**os.environ, "HOME": str(home), **environment},
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not is_up():
            assert time.monotonic() < deadline and process.poll() is None, (
                home / "head.log"
            ).read_text()
            time.sleep(0.3)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        log.close()
        kill_all_with_home(home)


def config(schedule: str = "compressed", **changes: Any) -> RunConfig:
    """Of a schedule; ``finetune`` is the first one with training."""
    inputs = "compressed" if schedule == "finetune" else schedule
    calibration = {"dataset_size": 12, "seqlen": 48, "calibration_inputs": inputs, **changes}
    return RunConfig(
        compression=CompressionConfig(block_size=16),
        routing=RoutingConfig(num_clusters=4, pca_reduction_factor=4),
        calibration=CalibrationConfig(**calibration),
        refinement=RefinementConfig(finetune=2 if schedule == "finetune" else 0),
        experts_per_unit=2,
    )


class Run:
    """One expansion of a model folder."""

    def __init__(self, folder: Path, text: Path, output: Path, settings: RunConfig) -> None:
        self.store = Store(output)
        self.settings = settings
        self.prepared, self.windows = prepare(
            settings,
            folder,
            text=TextRequest(dataset=str(text)),
            model_name="m",
            doing=lambda step: None,
        )
        claim(self.store, self.prepared, self.windows, resume=True)
        self.spec = WorkerSpec(store=str(output), source=resolve_name(str(folder)), threads=1)
        self.measured = Measurements()
        self.seen: list[Any] = []

    def local(self) -> dict[str, str]:
        self.expand(LocalExecutor(self.spec))
        return self.digests()

    def on_ray(self, *, observe: Callable[..., None] | None = None, **options: Any) -> RayExecutor:
        executor = RayExecutor(self.spec, ExecutionOptions(executor="ray", **options))
        try:
            self.expand(executor, observe)
        finally:
            executor.close()
        return executor

    def digests(self) -> dict[str, str]:
        return digests(Path(self.store.base))

    def expand(self, executor: Any, observe: Callable[..., None] | None = None) -> None:
        def observer(progress: Any) -> None:
            self.seen.append(progress)
            if observe is not None:
                observe(executor, progress)

        expand(
            self.prepared, self.store, executor, observer, self.measured, begin=print, doing=print
        )
