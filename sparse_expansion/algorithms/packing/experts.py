"""All streams of an expert, and the dense weight that they hold."""

from __future__ import annotations

import numpy as np
import torch

from sparse_expansion.algorithms.kernels.bits import (
    compact,
    count_ones,
    dequantize,
    round_to_bfloat16,
    scatter,
)
from sparse_expansion.algorithms.kernels.jit import HAVE_NUMBA, LANES, Array
from sparse_expansion.algorithms.kernels.threads import split
from sparse_expansion.algorithms.packing import device
from sparse_expansion.algorithms.packing.layout import PackedLayout, packed_bytes
from sparse_expansion.algorithms.packing.patterns import pack_patterns, unpack_patterns
from sparse_expansion.algorithms.packing.streams import (
    check_kept,
    check_streams,
    check_tail,
    over_rows,
    pack_codes,
    pack_mask,
    unpack_codes,
    unpack_mask,
)
from sparse_expansion.algorithms.quantization import AffineGrid

TILE_WEIGHTS = 1 << 18
"""Weights that are dequantized at a time: they outweigh a call's own time, and fit in a cache."""
_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}
"""Values are moved as the unsigned integers of their size in bytes."""


def pack_expert(
    weight_OD: torch.Tensor,
    kept_OD: torch.Tensor,
    codes_OD: torch.Tensor | None,
    bias_O: torch.Tensor | None = None,
    *,
    layout: PackedLayout,
    dtype: torch.dtype,
    compiled: bool | None = None,
) -> dict[str, torch.Tensor]:
    """The named streams of one expert (``PackedLayout.streams``), on the weight's device.

    Args:
        weight_OD: the compressed weight.
        kept_OD: bool, which weights are kept.
        codes_OD: uint8 codes where quantized.
        bias_O: the expert's bias, where the layout has one.
        layout: the expert's layout.
        dtype: the dtype of stored values, and of the bias.
        compiled: whether by compiled loops; by default on a CPU.

    Raises:
        ValueError: the mask does not fit the layout.
    """
    compiled = _takes_loops(weight_OD, compiled)
    source = weight_OD.to(dtype) if layout.bits is None else codes_OD
    assert source is not None
    tensors: dict[str, torch.Tensor] = {}
    if not layout.is_sparse:
        kept = source.reshape(-1)
    else:
        name = "bitmask" if layout.group is None else "patterns"
        if compiled:
            mask = pack_mask(kept_OD)
            check_kept(count_ones(mask.numpy()), layout)
            tensors[name] = mask if layout.group is None else pack_patterns(mask, layout)
            kept = _compact(source.contiguous(), mask, layout)
        else:
            tensors[name] = device.pack_kept(kept_OD, layout)
            kept = source[kept_OD]
    if layout.bits is None:
        tensors["values"] = kept
    else:
        tensors["codes"] = (pack_codes if compiled else device.pack_fields)(kept, layout.bits)
    if layout.has_bias:
        assert bias_O is not None
        tensors["bias"] = bias_O.to(dtype)
    return tensors


def _takes_loops(tensor: torch.Tensor, compiled: bool | None) -> bool:
    """Whether compiled loops do the work: by default on a CPU, where there is a compiler."""
    return not tensor.is_cuda and HAVE_NUMBA if compiled is None else compiled


def _compact(tensor: torch.Tensor, mask: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """The kept entries of a tensor, in order."""
    unsigned = _UNSIGNED[tensor.element_size()]
    source = tensor.view(unsigned).numpy().reshape(-1)
    out = torch.empty(layout.num_kept, dtype=tensor.dtype)
    target = out.view(unsigned).numpy()
    stream = mask.numpy()
    kept_before = _KeptBefore(stream, layout.num_kept)

    def work(first: int, last: int) -> None:
        part = stream[first // 8 : packed_bytes(last, 1)]
        compact(source[first:last], part, target[kept_before[first] : kept_before[last]])

    split(len(source), 8, work)
    return out


class _KeptBefore:
    """How many weights are kept before a position, which is a multiple of 8 or the end."""

    def __init__(self, stream: Array, total: int) -> None:
        self.stream = stream
        self.total = total

    def __getitem__(self, position: int) -> int:
        if position >= 8 * len(self.stream) - 7:
            return self.total
        return int(count_ones(self.stream[: position // 8]))


def unpack_kept(
    tensors: dict[str, torch.Tensor], layout: PackedLayout, *, compiled: bool | None = None
) -> torch.Tensor:
    """Which weights are kept, ``[O, D]`` (bool), on the streams' device.

    Args:
        tensors: as ``pack_expert`` named them.
        layout: the expert's layout.
        compiled: whether by compiled loops; by default on a CPU.

    Raises:
        ValueError: a stream is too long, too short, or keeps another number of weights.
    """
    check_streams(tensors, layout, None)
    stored = next(iter(tensors.values()))
    if not layout.is_sparse:
        return torch.ones(layout.shape, dtype=torch.bool, device=stored.device)
    if not _takes_loops(stored, compiled):
        return device.unpack_kept(tensors, layout)
    return unpack_mask(bitmask(tensors, layout), layout.shape)


def bitmask(tensors: dict[str, torch.Tensor], layout: PackedLayout) -> torch.Tensor:
    """Which weights are kept, as a stream of bits, of streams on a CPU whose form was checked.

    Raises:
        ValueError: the mask keeps another number of weights, or none of the layout's patterns.
    """
    if layout.group is None:
        mask = tensors["bitmask"]
    else:
        mask = unpack_patterns(tensors["patterns"], layout)
    check_tail(mask, layout)
    check_kept(count_ones(mask.numpy()), layout)
    return mask


def unpack_expert(
    tensors: dict[str, torch.Tensor],
    *,
    layout: PackedLayout,
    grid: AffineGrid | None,
    dtype: torch.dtype,
    compiled: bool | None = None,
) -> torch.Tensor:
    """The dense weight ``[O, D]`` of one expert in ``dtype``: the inverse of ``pack_expert``.

    It is on the streams' device.

    Args:
        tensors: as ``pack_expert`` named them.
        layout: the expert's layout.
        grid: the linear's grid when the expert is quantized.
        dtype: the dtype of the result.
        compiled: whether by compiled loops; by default on a CPU.

    Raises:
        ValueError: a stream's length does not fit the layout, or mask and values disagree.
    """
    check_streams(tensors, layout, grid)
    if not _takes_loops(next(iter(tensors.values())), compiled):
        return device.unpack(tensors, layout=layout, grid=grid, dtype=dtype)
    if grid is None:
        values = tensors["values"]
        if not layout.is_sparse:
            return values.to(dtype).reshape(layout.shape).clone()
        return _scatter(values.to(dtype), bitmask(tensors, layout), layout)
    codes = unpack_codes(tensors["codes"], layout.num_kept, grid.bits)
    if not layout.is_sparse:
        mask = torch.full((packed_bytes(layout.num_kept, 1),), 255, dtype=torch.uint8)
    else:
        mask = bitmask(tensors, layout)
    return _dequantize(codes, mask, grid, layout, dtype)


def _scatter(values: torch.Tensor, mask: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """The dense weight with kept values in their places, on a CPU."""
    from sparse_expansion.algorithms.kernels.vectors import can_spread, scatter_vectors

    if not values.numel():
        return torch.zeros(layout.shape, dtype=values.dtype)
    out = torch.empty(layout.shape, dtype=values.dtype)
    unsigned = _UNSIGNED[values.element_size()]
    source = values.contiguous().view(unsigned).numpy()
    target = out.view(unsigned).numpy().reshape(-1)
    stream = mask.numpy()
    kept_before = _KeptBefore(stream, layout.num_kept)
    fill = scatter_vectors if can_spread() and len(target) % LANES == 0 else scatter

    def work(first: int, last: int) -> None:
        # The first value is read even where none is kept.
        begin = min(kept_before[first], len(source) - 1)
        fill(source[begin:], stream[first // 8 : packed_bytes(last, 1)], target[first:last])

    split(len(target), LANES, work)
    return out


def _dequantize(
    codes: torch.Tensor,
    mask: torch.Tensor,
    grid: AffineGrid,
    layout: PackedLayout,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The dense weight of kept codes, on a CPU."""
    from sparse_expansion.algorithms.kernels.vectors import can_spread, dequantize_vectors

    out = torch.empty(layout.shape, dtype=dtype)
    source, stream = codes.numpy(), mask.numpy()
    scale = grid.scale_OG.float().cpu().contiguous().numpy()
    zero = grid.zero_point_OG.float().cpu().contiguous().numpy()
    kept_before = _KeptBefore(stream, layout.num_kept)
    by_vectors = (
        can_spread()
        and layout.columns % LANES == 0
        and grid.group_size % LANES == 0
        and bool(((zero >= 0) & (zero <= 255) & (zero == np.rint(zero))).all())
    )
    fill = dequantize_vectors if by_vectors else dequantize
    tile_rows = max(8, TILE_WEIGHTS // layout.columns // 8 * 8)

    def work(rows: slice, part: slice) -> None:
        begin = kept_before[8 * part.start]
        # A tile_rows rows at a time: float32 in a cache, before they are rounded to the dtype.
        for first in range(rows.start, rows.stop, tile_rows):
            last = min(first + tile_rows, rows.stop)
            bits = stream[first * layout.columns // 8 : packed_bytes(last * layout.columns, 1)]
            tile = out[first:last]
            if dtype != torch.float32:
                tile = torch.empty(last - first, layout.columns)
            fill(
                source[begin:],
                bits,
                scale[first:last],
                zero[first:last],
                grid.group_size,
                tile.numpy(),
            )
            if dtype == torch.bfloat16:
                rounded = out[first:last].view(torch.uint16).numpy()
                round_to_bfloat16(tile.view(torch.uint32).numpy(), rounded)
            elif dtype != torch.float32:
                out[first:last] = tile
            begin += int(count_ones(bits))

    over_rows(layout, work)
    return out
