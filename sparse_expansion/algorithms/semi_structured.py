"""2:4 weights for a GPU's sparse tensor cores: the only home of ``torch.sparse``."""

from __future__ import annotations

import torch
from torch.sparse import to_sparse_semi_structured

from sparse_expansion.algorithms.packing.layout import PackedLayout

MIN_CAPABILITY = (8, 0)
"""First CUDA capability with sparse tensor cores (Ampere)."""
ROW_MULTIPLE, COLUMN_MULTIPLE = 32, 64
"""What both of PyTorch's back ends (CUTLASS, cuSPARSELt) take in half precision."""


def takes_semi_structured(
    layout: PackedLayout, dtype: torch.dtype, device: torch.device, capability: tuple[int, int]
) -> bool:
    """Whether such an expert can be multiplied by sparse tensor cores."""
    return (
        device.type == "cuda"
        and capability >= MIN_CAPABILITY
        and dtype in (torch.float16, torch.bfloat16)
        and (layout.group, layout.group_kept) == (4, 2)
        and layout.rows % ROW_MULTIPLE == 0
        and layout.columns % COLUMN_MULTIPLE == 0
    )


def for_matmul(weight_OD: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """The weight in the form that its device multiplies fastest; ``linear`` takes either."""
    device = weight_OD.device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if not takes_semi_structured(layout, weight_OD.dtype, device, capability):
        return weight_OD
    compressed: torch.Tensor = to_sparse_semi_structured(weight_OD)
    return compressed
