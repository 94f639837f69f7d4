"""Where and with what a command's units of work run; none of it changes a result."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_expansion.config.checks import require
from sparse_expansion.config.fields import setting, settings_of
from sparse_expansion.config.kinds import check_kinds
from sparse_expansion.config.sizes import format_size, parse_size

EXECUTORS = ("local", "ray")
_AT_LEAST_ONE = ("threads", "num_workers", "max_attempts", "eval_pipeline")
_NOT_NEGATIVE = ("gpus_per_worker", "cpus_per_worker", "worker_timeout")
SHORTEST_STALL = 10.0
"""Seconds in which a worker is asked for a sign of life at least once."""
_RAY_ONLY = (
    "ray_address",
    "num_workers",
    "gpus_per_worker",
    "cpus_per_worker",
    "accelerator_type",
    "object_store_bytes",
)


@dataclass(frozen=True, kw_only=True)
class ExecutionOptions:
    """Where and with what a command's units of work run."""

    executor: str = setting(
        EXECUTORS[0],
        "What runs the units of work: local is this process, ray is the actors of a Ray cluster.",
        choices=EXECUTORS,
        group="execution",
    )
    device: str = setting(
        "auto",
        "Device that workers compute on: cpu, cuda, or auto for a GPU where there is one.",
        metavar="DEVICE",
        group="execution",
    )
    threads: int | None = setting(
        None,
        "CPU threads of a worker.",
        metavar="N",
        meanings={None: "all cores"},
        group="execution",
    )
    activation_bytes: int = setting(
        2 << 30,
        "Captured activations that a worker keeps in memory; what is over goes to scratch files.",
        flag="--activation-memory",
        metavar="SIZE",
        parse=parse_size,
        show=format_size,
        group="execution",
    )
    device_bytes: int | None = setting(
        None,
        "What a worker keeps on its GPU between units: hidden states, captured activations, "
        "experts and sums; what is over goes to the host's memory and to scratch files.",
        flag="--device-memory",
        metavar="SIZE",
        parse=parse_size,
        show=format_size,
        meanings={None: "half of what is free, or of a worker's share; nothing on a CPU"},
        group="execution",
    )
    scratch: str | None = setting(
        None,
        "Folder for scratch files.",
        metavar="DIR",
        meanings={None: "the system's folder for temporary files"},
        group="execution",
    )
    ray_address: str | None = setting(
        None,
        "Ray cluster to join: auto, host:port or ray://host:port.",
        metavar="ADDRESS",
        meanings={None: "the job's or this machine's where one runs; else Ray is started here"},
        group="execution",
    )
    num_workers: int | None = setting(
        None, "Ray actors.", metavar="N", meanings={None: "as many as fit"}, group="execution"
    )
    gpus_per_worker: float | None = setting(
        None,
        "GPUs, or a share of one, of a Ray actor.",
        metavar="GPUS",
        meanings={None: "1 where the cluster has GPUs; equal shares on one machine with too few"},
        group="execution",
    )
    cpus_per_worker: float | None = setting(
        None,
        "CPUs of a Ray actor.",
        metavar="CPUS",
        meanings={None: "as many as threads"},
        group="execution",
    )
    accelerator_type: str | None = setting(
        None,
        "Only machines with this GPU, by Ray's name for it: H100, A100, L40S.",
        metavar="NAME",
        meanings={None: "any"},
        group="execution",
    )
    max_attempts: int = setting(
        3,
        "Times that a unit is tried before it counts as failed.",
        metavar="N",
        group="execution",
    )
    worker_timeout: float = setting(
        1800.0,
        "Seconds without any live worker before the run is given up.",
        metavar="SECONDS",
        group="execution",
    )
    stall_timeout: float = setting(
        60.0,
        "Seconds without a sign of life from a busy Ray actor before its unit is given to another.",
        metavar="SECONDS",
        group="execution",
    )
    object_store_bytes: int | None = setting(
        None,
        "Object store of a Ray that is started here.",
        flag="--object-store-memory",
        metavar="SIZE",
        parse=parse_size,
        show=format_size,
        meanings={None: "Ray's own choice"},
        group="execution",
    )
    profile: bool = setting(
        False,
        "Also measure what the device of a worker can do, and give every stage's share of it.",
        group="execution",
    )
    eval_pipeline: int = setting(
        1,
        "Evaluate in so many ranges of blocks, each on a worker of its own.",
        metavar="P",
        meanings={1: "every worker streams all blocks over its share of the windows"},
        group="execution",
    )

    def __post_init__(self) -> None:
        """Check kinds and bounds."""
        check_kinds(self)
        known = settings_of(ExecutionOptions)
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            require(value is None or value >= 1, f"{known[name].flag} {value} must be at least 1")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            require(value is None or value >= 0, f"{known[name].flag} {value} must not be negative")
        require(
            self.stall_timeout >= SHORTEST_STALL,
            f"--stall-timeout {self.stall_timeout:g} must be at least {SHORTEST_STALL:g} seconds",
        )
        require(
            self.accelerator_type is None or self.device != "cpu",
            f"--accelerator-type {self.accelerator_type} is a GPU: drop it, or --device cpu",
        )
        for name in _RAY_ONLY:
            flag = known[name].flag
            require(
                self.executor == "ray" or getattr(self, name) is None,
                f"{flag} needs --executor ray: add it, or drop {flag}",
            )
