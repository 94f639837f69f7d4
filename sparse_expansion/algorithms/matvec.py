"""One token through one expert, on a CPU, straight from the expert's stored streams.

A product with one vector is bound by the bytes of the matrix, and the stored bytes are fewer than
the dense ones: nothing is unpacked, and nothing dense is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from sparse_expansion.algorithms.kernels.bits import ONES
from sparse_expansion.algorithms.kernels.jit import HAVE_NUMBA, LANES, Array
from sparse_expansion.algorithms.kernels.threads import MIN_SLICE, split
from sparse_expansion.algorithms.packing.experts import bitmask
from sparse_expansion.algorithms.packing.layout import PackedLayout
from sparse_expansion.algorithms.packing.streams import check_streams, unpack_codes
from sparse_expansion.algorithms.quantization import AffineGrid

MIN_WEIGHTS = 1 << 21
"""Smallest expert that is multiplied as stored: smaller ones are as fast dense, from a cache."""
_AS_STORED = {torch.float32: np.float32, torch.bfloat16: np.uint16}
"""NumPy's dtype for stored values; bfloat16 is read by its bits."""


def takes_stored_form(
    layout: PackedLayout, grid: AffineGrid | None, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether ``StoredMatrix`` can multiply by such an expert, and is the faster way."""
    if device.type != "cpu" or layout.rows * layout.columns < MIN_WEIGHTS or not HAVE_NUMBA:
        return False
    from sparse_expansion.algorithms.kernels.vectors import can_spread

    if not layout.is_sparse:
        if grid is None or grid.bits != 4:
            return False
        sizes = (layout.columns, grid.group_size)
        return all(size % (2 * LANES) == 0 for size in sizes)
    if not can_spread() or layout.columns % LANES:
        return False
    if grid is None:
        return dtype in _AS_STORED
    return grid.group_size % LANES == 0


@dataclass
class StoredMatrix:
    """What a product needs of an expert: its streams, and where rows begin in them."""

    layout: PackedLayout
    grid: AffineGrid | None
    stream: Array
    """Bits of kept weights, or all codes of 4 bits where none is dropped."""
    values: Array
    """Kept values or codes; empty where none is dropped."""
    starts: Array
    """Kept values before every row, with a grid before every group of every row."""
    num_bytes: int
    """Bytes that are held in addition to the expert's own tensors."""

    @classmethod
    def of(
        cls, tensors: dict[str, torch.Tensor], layout: PackedLayout, grid: AffineGrid | None
    ) -> StoredMatrix:
        """Read an expert's named streams, of which ``takes_stored_form`` holds.

        Raises:
            ValueError: a stream does not fit the layout.
        """
        check_streams(tensors, layout, grid)
        if grid is not None:
            grid = AffineGrid(
                grid.scale_OG.float().contiguous(),
                grid.zero_point_OG.float().contiguous(),
                grid.bits,
                grid.group_size,
            )
        if not layout.is_sparse:
            empty = np.empty(0, np.int64)
            return cls(layout, grid, tensors["codes"].numpy(), empty, empty, 0)
        mask = bitmask(tensors, layout)
        held = 0 if layout.group is None else mask.numel()
        size = layout.columns if grid is None else grid.group_size
        starts = _starts(mask.numpy(), layout, size)
        if grid is None:
            stored = tensors["values"].detach()
            values = (stored.view(torch.uint16) if stored.element_size() == 2 else stored).numpy()
        else:
            values = unpack_codes(tensors["codes"], layout.num_kept, grid.bits).numpy()
            held += values.nbytes
        held += starts.nbytes
        return cls(layout, grid, mask.numpy(), values, starts, held)

    def matvec(self, x_D: torch.Tensor) -> torch.Tensor:
        """``W x`` (float32 sums) in the dtype of ``x_D``."""
        # Not before there is work: a model is loaded and used without Numba too.
        from sparse_expansion.algorithms.kernels.vectors import (
            kept_code_matvec,
            kept_matvec,
            nibble_matvec,
        )

        x = x_D.detach().float().contiguous().numpy()
        out = torch.empty(self.layout.rows)
        target = out.numpy()
        grid = self.grid
        if grid is None:
            work = partial(kept_matvec, self.stream, self.values, self.starts[:, 0], x, target)
        else:
            scale, zero, size = grid.scale_OG.numpy(), grid.zero_point_OG.numpy(), grid.group_size
            if self.layout.is_sparse:
                stored = (self.stream, self.values, self.starts)
                work = partial(kept_code_matvec, *stored, scale, zero, size, x, target)
            else:
                even, odd = x[0::2].copy(), x[1::2].copy()
                sums = np.add.reduceat(x, np.arange(0, len(x), size), dtype=np.float32)
                work = partial(
                    nibble_matvec, self.stream, scale, zero, size, even, odd, sums, target
                )
        split(self.layout.rows, 1, work, least=-(-MIN_SLICE // self.layout.columns))
        return out.to(x_D.dtype)


def _starts(stream: Array, layout: PackedLayout, size: int) -> Array:
    """How many weights are kept before every ``size`` columns of every row, ``[rows, groups]``."""
    width = layout.columns // 8
    ones = np.zeros(layout.rows * width + 1, dtype=np.int64)
    np.cumsum(ONES[stream], out=ones[1:])
    return ones[np.arange(layout.rows)[:, None] * width + np.arange(0, width, size // 8)]
