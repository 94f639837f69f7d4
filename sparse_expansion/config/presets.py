"""Settings under one name, and in which order a setting's sources count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_expansion.config.calibration import AUTO_INPUTS
from sparse_expansion.config.compression import AUTO, MEASURED
from sparse_expansion.config.pruners import PRUNERS

PRESETS: dict[str, dict[str, Any]] = {
    # The defaults of the fields are the paper's.
    "paper": {},
    "best": {
        "pruner": "admm",
        "damping_fraction": 0.2,
        "shrink_hessians": True,
        "expert_biases": True,
        "weigh_outputs": True,
        "layer_sparsity": MEASURED,
        "expert_sparsity": MEASURED,
        "calibration_inputs": AUTO_INPUTS,
        "group_size": AUTO,
        "permute_channels": True,
    },
}
"""By name of the preset: values of fields that differ from the fields' defaults."""
DEFAULT_PRESET = "best"


def not_given(name: str, default: Any, preset: Mapping[str, Any], pruner: str) -> Any:
    """The value of a field that no flag gives: the preset's, the pruner's, or the default.

    Args:
        name: of the field.
        default: of the command, or of the field.
        preset: values of the preset.
        pruner: name of the pruner in use.
    """
    for source in (preset, PRUNERS[pruner].defaults):
        if name in source:
            return source[name]
    return default
