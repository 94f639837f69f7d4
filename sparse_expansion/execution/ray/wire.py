"""Values between actors, as the object store holds and maps them without copies."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch

from sparse_expansion.types import HessianSum


def to_wire(value: Any) -> Any:
    """Tensors as NumPy arrays, which the object store holds and maps without copies."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            return ("bfloat16", tensor.view(torch.uint16).numpy())
        return tensor.numpy()
    if isinstance(value, HessianSum):
        return ("HessianSum", *(to_wire(getattr(value, field.name)) for field in fields(value)))
    if isinstance(value, list):
        return [to_wire(part) for part in value]
    return value


def from_wire(value: Any) -> Any:
    """Inverse of ``to_wire``; arrays stay mapped and must not be written to."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, list):
        return [from_wire(part) for part in value]
    if isinstance(value, tuple):
        kind, *parts = value
        if kind == "bfloat16":
            return torch.from_numpy(parts[0]).view(torch.bfloat16)
        assert kind == "HessianSum"
        return HessianSum(*map(from_wire, parts))
    return value
