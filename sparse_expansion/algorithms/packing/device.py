"""Packing and unpacking where the tensors are, by PyTorch's own operations: for GPUs.

The streams are those of ``experts``, byte for byte, which a CPU makes and reads by compiled loops.
"""

from __future__ import annotations

import torch

from sparse_expansion.algorithms.packing.layout import PackedLayout, packed_bytes
from sparse_expansion.algorithms.packing.patterns import group_patterns, pattern_index
from sparse_expansion.algorithms.packing.streams import check_kept, check_length, check_tail
from sparse_expansion.algorithms.quantization import AffineGrid
from sparse_expansion.algorithms.quantization import dequantize as dequantize_tensor

CHUNK_FIELDS = 1 << 22
"""Fields that are taken apart into bits at a time; a multiple of eight, which fill whole bytes."""


def pack_kept(kept_OD: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """The stream of which weights are kept: a bitmask, or patterns.

    Raises:
        ValueError: the mask does not fit the layout.
    """
    check_kept(int(kept_OD.sum()), layout)
    if layout.group is None:
        return pack_fields(kept_OD, 1)
    return pack_fields(_pattern_fields(kept_OD, layout), layout.pattern_bits)


def unpack(
    tensors: dict[str, torch.Tensor],
    *,
    layout: PackedLayout,
    grid: AffineGrid | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See ``experts.unpack_expert``, which has checked the streams' form.

    Raises:
        ValueError: mask and values disagree.
    """
    stored = next(iter(tensors.values()))
    if layout.is_sparse:
        kept_OD = unpack_kept(tensors, layout)
    else:
        kept_OD = torch.ones(layout.shape, dtype=torch.bool, device=stored.device)
    if grid is None:
        values = tensors["values"]
        dense_OD = torch.zeros(layout.shape, dtype=dtype, device=stored.device)
        return dense_OD.masked_scatter_(kept_OD, values.to(dtype))
    codes = unpack_fields(tensors["codes"], layout.num_kept, grid.bits)
    codes_OD = torch.zeros(layout.shape, dtype=torch.uint8, device=stored.device)
    codes_OD.masked_scatter_(kept_OD, codes)
    places = torch.arange(layout.columns, device=grid.scale_OG.device)
    scale_DO, zero_DO = (part.to(stored.device) for part in grid.columns(places))
    weight_OD = dequantize_tensor(codes_OD.float(), scale_DO.T, zero_DO.T)
    return weight_OD.masked_fill_(~kept_OD, 0).to(dtype)


def unpack_kept(tensors: dict[str, torch.Tensor], layout: PackedLayout) -> torch.Tensor:
    """Which weights are kept, ``[O, D]`` (bool), of an expert that has zeros.

    Raises:
        ValueError: a stream is too long, too short, or keeps another number of weights.
    """
    if layout.group is None:
        stream, count = tensors["bitmask"], layout.rows * layout.columns
        kept_OD = unpack_fields(stream, count, 1).bool().view(layout.shape)
        check_tail(stream, layout)
    else:
        kept_OD = _kept_of_patterns(tensors["patterns"], layout)
    check_kept(int(kept_OD.sum()), layout)
    return kept_OD


def pack_fields(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """The stream of fields of ``bits`` bits, 0 to 16, the first in the first byte's lowest bits."""
    flat = fields.flatten()
    streams = [flat.new_empty(0, dtype=torch.uint8)]
    for part in flat.split(CHUNK_FIELDS) if bits else ():
        if 8 % bits:
            part = _bits_of(part.to(torch.int32), bits).flatten()
        step = bits if 8 % bits == 0 else 1
        each = 8 // step
        padded = part.new_zeros(packed_bytes(len(part), step) * each, dtype=torch.uint8)
        padded[: len(part)] = part
        places = torch.arange(0, 8, step, dtype=torch.uint8, device=part.device)
        streams.append((padded.view(-1, each) << places).sum(dim=1, dtype=torch.uint8))
    return torch.cat(streams)


def unpack_fields(stream: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """Do the inverse of ``pack_fields``: flat, uint8 for up to 8 bits, else int32.

    Raises:
        ValueError: the stream's length does not fit the count.
    """
    check_length(stream, packed_bytes(count, bits))
    dtype = torch.uint8 if bits <= 8 else torch.int32
    fields = stream.new_zeros(count, dtype=dtype)
    for start in range(0, count if bits else 0, CHUNK_FIELDS):
        size = min(CHUNK_FIELDS, count - start)
        part = stream[start * bits // 8 :][: packed_bytes(size, bits)]
        if 8 % bits == 0:
            places = torch.arange(0, 8, bits, dtype=torch.uint8, device=part.device)
            found = part[:, None] >> places & (1 << bits) - 1
        else:
            single = _bits_of(part, 8).flatten()[: size * bits].view(size, bits)
            powers = torch.arange(bits, dtype=torch.int32, device=part.device)
            found = (single.to(torch.int32) << powers).sum(dim=1, dtype=torch.int32)
        fields[start : start + size] = found.flatten()[:size]
    return fields


def _bits_of(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """The lowest bits of every number, ``[N, count]`` (uint8), the lowest first."""
    places = torch.arange(count, dtype=numbers.dtype, device=numbers.device)
    return (numbers[:, None] >> places & 1).to(torch.uint8)


def _pattern_fields(kept_OD: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """Index of the pattern of every group, ``[O, groups]`` (int32).

    Raises:
        ValueError: a group keeps another number of weights than the layout's.
    """
    assert layout.group is not None
    found, num_bad = [], 0
    for size, kept, part in _groups(kept_OD, layout):
        places = torch.arange(size, dtype=torch.int32, device=kept_OD.device)
        numbers = (part.to(torch.int32) << places).sum(dim=2, dtype=torch.int32)
        table = torch.from_numpy(pattern_index(size, kept).astype("int32")).to(kept_OD.device)
        found.append(table[numbers])
        num_bad += int((found[-1] == 65535).sum())
    if num_bad:
        group, kept = layout.group, layout.group_kept
        raise ValueError(f"{num_bad} groups of {group} do not keep {kept} weights")
    return torch.cat(found, dim=1)


def _kept_of_patterns(stream: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """Do the inverse of ``_pattern_fields``, of the stream.

    Raises:
        ValueError: the stream's length does not fit the layout, or an index is out of range.
    """
    count = layout.rows * layout.groups_per_row
    fields = unpack_fields(stream, count, layout.pattern_bits).view(layout.rows, -1)
    kept_OD = torch.empty(layout.shape, dtype=torch.bool, device=stream.device)
    begin = num_bad = 0
    for size, kept, part in _groups(kept_OD, layout):
        table = torch.from_numpy(group_patterns(size, kept).astype("int32")).to(stream.device)
        index = fields[:, begin : begin + part.shape[1]].long()
        num_bad += int((index >= len(table)).sum())
        numbers = table[index.clamp_(max=len(table) - 1)]
        places = torch.arange(size, dtype=torch.int32, device=stream.device)
        part.copy_((numbers[:, :, None] >> places & 1).bool())
        begin += part.shape[1]
    if num_bad:
        raise ValueError(f"{num_bad} pattern indices are out of range")
    return kept_OD


def _groups(kept_OD: torch.Tensor, layout: PackedLayout) -> list[tuple[int, int, torch.Tensor]]:
    """Size and kept weights of a row's full groups, and a view ``[O, groups, size]`` of them.

    Then the same of the last, shorter group, where there is one.
    """
    assert layout.group is not None
    full = layout.columns // layout.group * layout.group
    found = []
    if full:
        found.append(
            (layout.group, layout.group_kept, kept_OD[:, :full].unflatten(1, (-1, layout.group)))
        )
    if full < layout.columns:
        found.append((layout.columns - full, layout.rest_kept, kept_OD[:, None, full:]))
    return found
