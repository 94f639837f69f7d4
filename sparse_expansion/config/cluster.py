"""The machines that a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_expansion.config.checks import require
from sparse_expansion.config.fields import setting
from sparse_expansion.config.kinds import check_kinds
from sparse_expansion.config.sizes import format_size, parse_size

_TERA = 1e12
_GIGA = 10**9
DEFAULT_RATE = 15 * _TERA
"""Float32 operations per second of a worker that nothing is known of."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as its maker publishes it."""

    memory_bytes: int
    float32_rate: float
    """Float32 operations per second, without sparse or reduced-precision products."""
    half_rate: float
    """Bfloat16 or float16 operations per second of tensor cores, without sparsity."""

    @property
    def product_rate(self) -> float:
        """Float32 operations per second that matrix products reach."""
        return PRODUCT_SHARE * self.float32_rate


PRODUCT_SHARE = 0.7
"""Share of the published rate that float32 matrix products reach: measured on an H100."""
GPUS = {
    "h100": Gpu(80 * _GIGA, 67 * _TERA, 989 * _TERA),
    "h200": Gpu(141 * _GIGA, 67 * _TERA, 989 * _TERA),
    "a100": Gpu(80 * _GIGA, 19.5 * _TERA, 312 * _TERA),
    "l40s": Gpu(48 * _GIGA, 91.6 * _TERA, 362 * _TERA),
}
"""NVIDIA's data sheets: H100 SXM, H200 SXM, A100 80GB, L40S."""


def parse_teraflops(text: str) -> float:
    """TFLOP/s -> floating-point operations per second.

    Raises:
        ValueError: not a number.
    """
    try:
        return float(text) * _TERA
    except ValueError:
        raise ValueError(f"--tflops {text!r} is not a number of TFLOP/s such as 15") from None


def _show_teraflops(flops_per_second: float) -> str:
    return f"{flops_per_second / _TERA:g}"


def _parse_bandwidth(text: str) -> float:
    return float(parse_size(text))


def _show_bandwidth(bytes_per_second: float) -> str:
    return format_size(int(bytes_per_second))


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines that a plan is made for: equal workers."""

    num_workers: int = setting(1, "Equal workers.", metavar="N", group="cluster")
    gpu: str | None = setting(
        None,
        "A worker's GPU, whose published memory and rate are taken.",
        choices=tuple(GPUS),
        meanings={None: "what --gpu-memory and --tflops say"},
        group="cluster",
    )
    gpu_bytes: int | None = setting(
        None,
        "Memory of a worker's GPU, such as 48GB.",
        flag="--gpu-memory",
        metavar="SIZE",
        parse=parse_size,
        show=format_size,
        meanings={None: "that of --gpu; without, the CPU computes"},
        group="cluster",
    )
    gpu_share: float = setting(
        1.0,
        "Share of a GPU that a worker has, where several work on one.",
        flag="--gpus-per-worker",
        metavar="GPUS",
        group="cluster",
    )
    host_bytes: int | None = setting(
        None,
        "Memory of a worker's machine, such as 128GB.",
        flag="--host-memory",
        metavar="SIZE",
        parse=parse_size,
        show=format_size,
        meanings={None: "left out of the verdict"},
        group="cluster",
    )
    flops_per_second: float | None = setting(
        None,
        "Float32 operations per second of one worker in matrix products, in TFLOP/s.",
        flag="--tflops",
        metavar="TFLOPS",
        parse=parse_teraflops,
        show=_show_teraflops,
        meanings={None: f"{PRODUCT_SHARE:g} of what --gpu's maker publishes; without, 15"},
        group="cluster",
    )
    bytes_per_second: float = setting(
        1e9,
        "Bytes per second between workers, and between a worker and storage.",
        flag="--bandwidth",
        metavar="SIZE",
        parse=_parse_bandwidth,
        show=_show_bandwidth,
        group="cluster",
    )
    seconds_per_unit: float = setting(
        0.05, "Seconds that every unit costs beside its work.", flag=""
    )
    price_per_hour: float | None = setting(
        None,
        "Price of one worker for an hour.",
        flag="--price",
        metavar="PRICE",
        meanings={None: "no cost is stated"},
        group="cluster",
    )

    def __post_init__(self) -> None:
        """Check kinds and bounds."""
        check_kinds(self)
        require(self.num_workers >= 1, f"--num-workers {self.num_workers} must be at least 1")
        require(
            0 < self.gpu_share <= 1,
            f"--gpus-per-worker {self.gpu_share:g} is outside 0 to 1: a worker uses one GPU",
        )
        require(
            self.product_rate > 0,
            f"--tflops {_show_teraflops(self.product_rate)} must be more than 0, e.g. 15",
        )
        if self.price_per_hour is not None:
            price = self.price_per_hour
            require(price >= 0, f"--price {price:g} must not be negative")
        require(
            self.bytes_per_second >= 1,
            f"--bandwidth {self.bytes_per_second:g} must be more than 0, e.g. 1GB",
        )

    @property
    def product_rate(self) -> float:
        """Float32 operations per second of one worker in matrix products."""
        if self.flops_per_second is not None:
            return self.flops_per_second
        return DEFAULT_RATE if self.gpu is None else self.gpu_share * GPUS[self.gpu].product_rate

    @property
    def gpu_memory_bytes(self) -> int | None:
        """Memory of a worker's GPU, or of its share of one; None where the CPU computes."""
        size = self.gpu_bytes
        if size is None and self.gpu is not None:
            size = GPUS[self.gpu].memory_bytes
        return None if size is None else int(self.gpu_share * size)
