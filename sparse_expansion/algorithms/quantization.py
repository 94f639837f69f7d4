"""Affine grids: fit, quantize, dequantize.

Shapes: O output features, D input features, G groups of input columns (1 when the grid is per
output channel).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class AffineGrid:
    """``value = scale * (code - zero_point)`` with codes in ``0 .. 2^bits - 1``."""

    scale_OG: torch.Tensor
    """float32, positive."""
    zero_point_OG: torch.Tensor
    """float32 whole numbers inside the code range, so that 0 is always on the grid."""
    bits: int
    """Bits of a code."""
    group_size: int
    """Input columns that share a scale and a zero point."""

    @property
    def max_code(self) -> int:
        """Largest code."""
        return 2**self.bits - 1

    def scaled(self, scale_O: torch.Tensor) -> AffineGrid:
        """The grid of rows that are multiplied with positive numbers: codes stay the same."""
        return replace(self, scale_OG=self.scale_OG * scale_O[:, None])

    def columns(self, columns_D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point ``[D, O]`` of the given input columns (transposed)."""
        groups = torch.div(columns_D, self.group_size, rounding_mode="floor")
        return self.scale_OG.T[groups], self.zero_point_OG.T[groups]


def fit_grid(
    W_OD: torch.Tensor, *, bits: int, symmetric: bool, group_size: int | None
) -> AffineGrid:
    """Min-max grid of the dense weight, per output channel or per group of its columns.

    Asymmetric: ``scale = (max - min) / (2^bits - 1)``, ``zero = round(-min / scale)`` with
    ``min <= 0 <= max``. Symmetric: the range is ``+- max |w|`` and the zero point ``2^(bits-1)``
    (arXiv 2210.17323, section 4, and its reference quantizer).
    """
    rows, width = W_OD.shape
    size = width if group_size is None else min(group_size, width)
    num_groups = -(-width // size)
    padded = torch.zeros(rows, num_groups * size, dtype=torch.float32, device=W_OD.device)
    padded[:, :width] = W_OD
    W_OGS = padded.reshape(rows, num_groups, size)
    low = W_OGS.amin(dim=2).clamp_(max=0)
    high = W_OGS.amax(dim=2).clamp_(min=0)
    max_code = 2**bits - 1
    if symmetric:
        bound = torch.maximum(-low, high)
        low, high = -bound, bound
    scale = (high - low) / max_code
    # An all-zero row has no range: any scale represents it exactly.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if symmetric:
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        zero = torch.round(-low / scale)
    return AffineGrid(scale, zero, bits, size)


def quantize(
    w: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, max_code: int
) -> torch.Tensor:
    """Nearest code, clamped to the grid; float32 whole numbers."""
    return torch.clamp(torch.round(w / scale) + zero_point, 0, max_code)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """``scale * (code - zero_point)``."""
    return scale * (codes - zero_point)
