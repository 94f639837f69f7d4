"""The settings of a run: frozen, checked on construction, and digested for resuming.

Only the standard library is imported here, so that a bad flag is answered before PyTorch is even
loaded.
"""

from sparse_expansion.config.calibration import (
    ALL_WINDOWS,
    CALIBRATION_INPUTS,
    SHARD_TOKENS,
    CalibrationConfig,
)
from sparse_expansion.config.cluster import Cluster
from sparse_expansion.config.compression import (
    ALLOCATIONS,
    MEASURED,
    QUANTIZED_BITS,
    UNIFORM,
    CompressionConfig,
)
from sparse_expansion.config.execution import ExecutionOptions
from sparse_expansion.config.neurons import RANKINGS
from sparse_expansion.config.presets import DEFAULT_PRESET, PRESETS
from sparse_expansion.config.pruners import PRUNERS, PrunerTraits
from sparse_expansion.config.routing import CLUSTERINGS, RoutingConfig
from sparse_expansion.config.run import (
    AUTO_PRODUCTS,
    BFLOAT16X3,
    DTYPES,
    FLOAT32,
    PRODUCTS,
    RefinementConfig,
    RunConfig,
    digest,
)
from sparse_expansion.config.sizes import format_size, parse_size
from sparse_expansion.config.sparsity import SparsityPattern
from sparse_expansion.config.text import TextOptions

__all__ = [
    "ALLOCATIONS",
    "ALL_WINDOWS",
    "AUTO_PRODUCTS",
    "BFLOAT16X3",
    "CALIBRATION_INPUTS",
    "CLUSTERINGS",
    "DEFAULT_PRESET",
    "DTYPES",
    "FLOAT32",
    "MEASURED",
    "PRESETS",
    "PRODUCTS",
    "PRUNERS",
    "QUANTIZED_BITS",
    "RANKINGS",
    "SHARD_TOKENS",
    "UNIFORM",
    "CalibrationConfig",
    "Cluster",
    "CompressionConfig",
    "ExecutionOptions",
    "PrunerTraits",
    "RefinementConfig",
    "RoutingConfig",
    "RunConfig",
    "SparsityPattern",
    "TextOptions",
    "digest",
    "format_size",
    "parse_size",
]
