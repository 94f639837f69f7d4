"""What jobs check before their work, and what they open."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sparse_expansion.api.listener import Listener
from sparse_expansion.api.models import ModelRequest, Origin
from sparse_expansion.config.checks import require_text
from sparse_expansion.config.execution import ExecutionOptions
from sparse_expansion.config.kinds import of_kind
from sparse_expansion.data.names import check_text
from sparse_expansion.run_files import RUN_FILE, foreign_output

if TYPE_CHECKING:
    from sparse_expansion.config.run import RunConfig
    from sparse_expansion.data.texts import TextRequest
    from sparse_expansion.execution.base import Executor
    from sparse_expansion.jobs.measurements import Measurements


def check_devices(executor: str, device: str, kmeans: str | None = None) -> None:
    """See that what is asked for is there.

    Args:
        executor: a name of ``config.execution.EXECUTORS``.
        device: to compute on.
        kmeans: what is to run KMeans; None where none runs.

    Raises:
        ValueError: the device is unknown, or this machine has none, or not what is to run KMeans.
    """
    # On a cluster the workers have the devices, and this process may have none.
    if executor != "local":
        return
    if device.startswith("cuda") and _lacks_driver():
        raise ValueError(
            f"--device {device}: this machine has no driver of a GPU: use --device cpu, or install "
            "the driver and PyTorch's CUDA build"
        )
    from sparse_expansion.algorithms.kmeans import check_backend
    from sparse_expansion.work.spec import check_device

    check_device(device)
    if kmeans is not None:
        check_backend(kmeans)


def _lacks_driver() -> bool:
    """Whether it is certain, before PyTorch is loaded, that it will see no GPU.

    Its CUDA build opens NVIDIA's library by this name, its ROCm build AMD's device.
    """
    if sys.platform != "linux" or Path("/dev/kfd").exists():
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return False


class Job(Protocol):
    """What every job says of its model and its text."""

    @property
    def model(self) -> ModelRequest:
        """The model that is asked for."""

    @property
    def dataset(self) -> Any:
        """See ``TextRequest``."""

    @property
    def values(self) -> Mapping[str, Any]:
        """Settings by name, ``text_column`` among them."""

    @property
    def options(self) -> ExecutionOptions:
        """Where and with what its units run."""


@contextmanager
def opened(
    job: Job, listener: Listener, *, kmeans: str | None = None
) -> Iterator[tuple[Origin, TextRequest]]:
    """Where a job's model is read from, and its text, once it is certain that both can be had.

    Args:
        job: that is about to begin.
        listener: is told that it begins.
        kmeans: see ``check_devices``.

    Raises:
        ValueError: the text, the device or the model is not there.
    """
    # Before libraries are loaded, which takes seconds.
    listener.doing("looking for the text and the model")
    check_text(job.dataset, job.values["text_column"])
    job.model.check()
    listener.doing("loading libraries")
    check_devices(job.options.executor, job.options.device, kmeans)
    from sparse_expansion.data.texts import TextRequest

    text = TextRequest(
        dataset=job.dataset,
        cache_dir=job.model.cache_dir,
        column=job.values["text_column"],
    )
    listener.opens()
    with job.model.opened(job.options.scratch) as origin:
        yield origin, text


def window_length(seqlen: int | None, model_config: Any) -> int:
    """Tokens in a window: what was asked for, or what is usual for the model's family.

    Raises:
        ValueError: the model has fewer positions, or it is less than 2.
    """
    from sparse_expansion.model.families import check_seqlen, default_seqlen

    found = default_seqlen(model_config) if seqlen is None else int(seqlen)
    check_seqlen(found, model_config)
    return found


def open_executor(
    origin: Origin, options: ExecutionOptions, *, store: str, listener: Listener
) -> Executor:
    """The executor that was asked for.

    Args:
        origin: of the dense model.
        options: where and with what units run.
        store: folder or URL of the run.
        listener: is told when Ray was joined.
    """
    from sparse_expansion.work.spec import WorkerSpec

    spec = WorkerSpec(
        store=store,
        source=origin.source,
        cache_dir=origin.cache_dir,
        revision=origin.revision,
        device=options.device,
        threads=options.threads,
        activation_bytes=options.activation_bytes,
        device_bytes=options.device_bytes,
        scratch=options.scratch,
    )
    if options.executor == "local":
        from sparse_expansion.execution.local import LocalExecutor

        local = LocalExecutor(spec)
        listener.executes(local)
        return local
    listener.doing("starting or joining Ray")
    from sparse_expansion.execution.ray.executor import RayExecutor

    executor = RayExecutor(spec, options)
    listener.joined()
    listener.executes(executor)
    return executor


def profile_worker(
    options: ExecutionOptions,
    executor: Executor,
    config: RunConfig,
    measured: Measurements,
    listener: Listener,
) -> None:
    """Where a profile is asked for, have a worker measured before it begins."""
    if not options.profile:
        return
    from sparse_expansion.jobs.measurements import measure_ceilings

    step = "measuring the ceilings of a worker"
    listener.say(step)
    listener.doing(step)
    measure_ceilings(executor, config, measured)


def check_output(output: str) -> None:
    """Answer a folder that cannot be made as bad input, and not as a failure after an hour.

    Raises:
        ValueError: it is empty, cannot be made, holds something else than a run, or is a URL that
            needs a package that is not there.
    """
    require_text("--output", output)
    if "://" in output:
        from sparse_expansion.store import Store

        Store(output)
        return
    path = Path(output).expanduser().resolve()
    if path.exists() and not path.is_dir():
        raise ValueError(f"--output {output} is a file: choose a folder")
    if path.is_dir() and not (path / RUN_FILE).exists() and any(map(Path.is_file, path.iterdir())):
        raise foreign_output(output)
    parent = _nearest_folder(path)
    if not os.access(parent, os.W_OK):
        raise ValueError(f"--output {output}: {parent} is not writable")


def check_room(output: str, needed: int) -> None:
    """Answer a disk that has no room for a run before it begins, and not after hours.

    Args:
        output: folder or URL of the run; what it holds already is counted.
        needed: bytes of the finished folder, and of what is there besides until then.

    Raises:
        ValueError: there is no room.
    """
    if "://" in output:
        return
    from sparse_expansion.report.formatting import format_bytes

    path = Path(output).expanduser().resolve()
    held = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    free = shutil.disk_usage(_nearest_folder(path)).free
    if needed > held + free:
        raise ValueError(
            f"--output {output} needs {format_bytes(needed - held)} more, its disk has "
            f"{format_bytes(free)}: free some, or choose another folder"
        )


def _nearest_folder(path: Path) -> Path:
    """The folder itself, or the one above it that is there."""
    while not path.exists():
        path = path.parent
    return path


def check_eval_windows(count: int | None) -> None:
    """Answer a number of windows on which nothing can be measured.

    Raises:
        ValueError: it is no whole number, or less than 1.
    """
    if count is not None and of_kind(int, "eval_windows", count) < 1:
        raise ValueError(f"--eval-windows {count} must be at least 1")
