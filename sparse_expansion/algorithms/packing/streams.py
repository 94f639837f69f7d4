"""Bit streams of masks and of codes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from sparse_expansion.algorithms.kernels.bits import pack_fields, unpack_fields
from sparse_expansion.algorithms.kernels.threads import MIN_SLICE, split
from sparse_expansion.algorithms.packing.layout import PackedLayout, packed_bytes
from sparse_expansion.algorithms.quantization import AffineGrid
from sparse_expansion.types import MODEL_DTYPES


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """The stream of ``ceil(numel / 8)`` bytes of a bool tensor; unused bits are zero."""
    flat = np.ascontiguousarray(mask.cpu().numpy()).reshape(-1)
    out = np.empty(packed_bytes(len(flat), 1), dtype=np.uint8)

    def work(first: int, last: int) -> None:
        out[first // 8 : packed_bytes(last, 1)] = np.packbits(flat[first:last], bitorder="little")

    split(len(flat), 8, work)
    return torch.from_numpy(out)


def unpack_mask(stream: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The bool tensor of a mask's stream: the inverse of ``pack_mask``.

    Raises:
        ValueError: the stream's length does not fit the shape.
    """
    count = math.prod(shape)
    check_length(stream, packed_bytes(count, 1))
    bits = np.unpackbits(stream.cpu().numpy(), count=count, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).reshape(shape)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The stream of ``bits``-bit fields of unsigned codes below ``2^bits``."""
    flat = np.ascontiguousarray(codes.cpu().numpy().reshape(-1))
    out = np.zeros(packed_bytes(len(flat), bits), dtype=np.uint8)

    def work(first: int, last: int) -> None:
        pack_fields(flat[first:last], bits, out[first * bits // 8 : packed_bytes(last, bits)])

    if bits:
        split(len(flat), 8, work)
    return torch.from_numpy(out)


def unpack_codes(
    stream: torch.Tensor, count: int, bits: int, dtype: torch.dtype = torch.uint8
) -> torch.Tensor:
    """The codes of a stream, flat: the inverse of ``pack_codes``.

    Raises:
        ValueError: the stream's length does not fit the count.
    """
    check_length(stream, packed_bytes(count, bits))
    data = stream.cpu().numpy()
    out = torch.zeros(count, dtype=dtype)
    flat = out.numpy()

    def work(first: int, last: int) -> None:
        unpack_fields(data[first * bits // 8 : packed_bytes(last, bits)], bits, flat[first:last])

    if bits:
        split(count, 8, work)
    return out


def check_streams(
    tensors: dict[str, torch.Tensor], layout: PackedLayout, grid: AffineGrid | None
) -> None:
    """Refuse streams that are not an expert's, before a compiled loop trusts them.

    What a stream holds is checked where it is read: bits that are set, and indices of patterns.

    Raises:
        ValueError: a stream is missing, of another type or length, or the grid has another shape.
    """
    for name, (kind, count) in layout.streams().items():
        stream = tensors.get(name)
        if stream is None:
            raise ValueError(f"an expert has no {name}")
        allowed = (torch.uint8,) if kind == "uint8" else MODEL_DTYPES
        if stream.dtype not in allowed:
            raise ValueError(f"{name} of an expert: {stream.dtype}, {allowed[0]} expected")
        if stream.dim() != 1 or stream.numel() != count:
            what = "bytes" if kind == "uint8" else "values"
            raise ValueError(f"{name} of an expert: {stream.numel()} {what}, {count} expected")
    if grid is not None:
        shape = (layout.rows, -(-layout.columns // grid.group_size))
        for part in (grid.scale_OG, grid.zero_point_OG):
            if tuple(part.shape) != shape:
                raise ValueError(f"a grid has shape {tuple(part.shape)}, {shape} expected")


def check_kept(found: int, layout: PackedLayout) -> None:
    """Refuse a mask that keeps another number of weights than the layout's.

    Raises:
        ValueError: the number is another.
    """
    if found != layout.num_kept:
        raise ValueError(f"mask keeps {found} weights, {layout.num_kept} expected")


def check_tail(mask: torch.Tensor, layout: PackedLayout) -> None:
    """Refuse a mask's stream that goes on after the last weight.

    Raises:
        ValueError: one of the bits that fill the last byte is set.
    """
    count = layout.rows * layout.columns
    if count % 8 and int(mask[-1]) >> count % 8:
        raise ValueError("bits after the last weight of the mask are set")


def check_length(stream: torch.Tensor, expected: int) -> None:
    """Refuse a stream that has not so many bytes.

    Raises:
        ValueError: the length is another.
    """
    if stream.numel() != expected:
        raise ValueError(f"packed stream has {stream.numel()} bytes, {expected} expected")


def over_rows(layout: PackedLayout, work: Callable[[slice, slice], None]) -> None:
    """Call ``work(rows, bytes of the mask)`` for parts of the rows, on all threads.

    Parts begin at multiples of eight rows, which fill whole bytes of any stream.
    """

    def part(first: int, last: int) -> None:
        columns = layout.columns
        work(slice(first, last), slice(first * columns // 8, packed_bytes(last * columns, 1)))

    split(layout.rows, 8, part, least=-(-MIN_SLICE // layout.columns))
