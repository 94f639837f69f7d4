"""A block of columns as the sweep decides it.

Shapes: K experts, O output features, B columns of a block. Weights are held transposed
(``[K, B, O]``), so that a column is contiguous. What decides a block is a function of a ``Block``:
see the module ``decide``, and ``kernels.triton_decide`` for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BlockGrid:
    """The rounding grid of a block's columns."""

    scale_KBO: torch.Tensor
    """float32 scale of every weight's code."""
    zero_point_KBO: torch.Tensor
    """float32 code that stands for zero."""
    codes_KBO: torch.Tensor
    """uint8, a view like the weights; written."""
    max_code: int
    """Largest code."""


@dataclass(frozen=True)
class Block:
    """A block of columns, transposed, as the sweep decides it."""

    W_KBO: torch.Tensor
    """float32, contiguous; overwritten with the result."""
    U_KBB: torch.Tensor
    """float32, upper: the block of the inverse Hessian's factor on the diagonal."""
    mask_KBO: torch.Tensor
    """bool, contiguous, True where pruned; filled by who decides for N:M."""
    errors_KBO: torch.Tensor
    """float32, contiguous; written."""
    group: int
    """M of N:M, 0 when the mask is given."""
    pruned: int
    """N of N:M."""
    grid: BlockGrid | None
    """Where weights are rounded to, None to prune only."""
