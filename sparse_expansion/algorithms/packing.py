"""Compact storage of an expert: which weights are kept, and their values or codes.

Where weights are kept is a bitmask (unstructured) or, for N:M up to M = 16, the index of every
group's pattern among all patterns with as many ones. All bit streams are little-endian: bit ``i``
of a stream is bit ``i % 8`` of byte ``i // 8``. Weights are taken row by row.
``docs/format.md`` is the specification.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from sparse_expansion.algorithms.kernels import (
    LANES,
    MIN_SLICE,
    Array,
    can_spread,
    compact,
    count_ones,
    decode_pairs,
    decode_patterns,
    dequantize,
    dequantize_vectors,
    encode_pairs,
    encode_patterns,
    pack_fields,
    round_to_bfloat16,
    scatter,
    scatter_vectors,
    split,
    unpack_fields,
)
from sparse_expansion.algorithms.quantization import AffineGrid
from sparse_expansion.algorithms.quantization import dequantize as dequantize_tensor
from sparse_expansion.config import CompressionConfig, RoutingConfig

MAX_PATTERN_GROUP = 16
TILE_WEIGHTS = 1 << 18
"""Weights that are dequantized at a time: more than it takes to start on them, and in a cache."""
_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}


@dataclass(frozen=True)
class PackedLayout:
    """Which streams an expert of ``rows`` x ``columns`` weights has, and how long they are."""

    rows: int
    columns: int
    num_kept: int
    bits: int | None
    """Bits of a code, None when values are stored."""
    is_sparse: bool
    group: int | None = None
    """M where patterns are stored, else None (a bitmask)."""
    group_kept: int = 0
    """Ones of a full group."""
    rest_kept: int = 0
    """Ones of a row's last, shorter group."""

    @classmethod
    def of(cls, rows: int, columns: int, config: CompressionConfig) -> PackedLayout:
        """The layout that a configuration gives."""
        pattern = config.sparsity
        kept = pattern.num_kept(rows, columns, config.block_size)
        is_sparse = pattern.fraction > 0
        if pattern.group is None or pattern.pruned is None or pattern.group > MAX_PATTERN_GROUP:
            return cls(rows, columns, kept, config.bits, is_sparse)
        rest = columns % pattern.group
        return cls(
            rows,
            columns,
            kept,
            config.bits,
            is_sparse,
            group=pattern.group,
            group_kept=pattern.group - pattern.pruned,
            rest_kept=rest - rest * pattern.pruned // pattern.group,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Of the dense weight."""
        return self.rows, self.columns

    @property
    def groups_per_row(self) -> int:
        """Pattern fields of a row."""
        assert self.group is not None
        return -(-self.columns // self.group)

    @property
    def pattern_bits(self) -> int:
        """Bits of a pattern's index."""
        assert self.group is not None
        return (math.comb(self.group, self.group_kept) - 1).bit_length()

    def streams(self) -> dict[str, tuple[str, int]]:
        """Name -> (``uint8`` or ``value``, number of elements) of every stored tensor."""
        found: dict[str, tuple[str, int]] = {}
        if self.is_sparse and self.group is None:
            found["bitmask"] = ("uint8", packed_bytes(self.rows * self.columns, 1))
        elif self.is_sparse:
            fields = self.rows * self.groups_per_row
            found["patterns"] = ("uint8", packed_bytes(fields, self.pattern_bits))
        if self.bits is None:
            found["values"] = ("value", self.num_kept)
        else:
            found["codes"] = ("uint8", packed_bytes(self.num_kept, self.bits))
        return found

    def num_bytes(self, item_bytes: int) -> int:
        """Stored bytes of one expert with values of ``item_bytes``."""
        return sum(
            count * (1 if kind == "uint8" else item_bytes)
            for kind, count in self.streams().values()
        )

    def bare_bits(self, item_bytes: int) -> float:
        """Bits that the same information needs: mask or pattern, and values or codes."""
        mask = 0.0
        if self.is_sparse and self.group is None:
            mask = self.rows * self.columns
        elif self.is_sparse:
            assert self.group is not None
            full, rest = divmod(self.columns, self.group)
            mask = self.rows * (
                full * math.log2(math.comb(self.group, self.group_kept))
                + math.log2(math.comb(rest, self.rest_kept))
            )
        return mask + self.num_kept * (8 * item_bytes if self.bits is None else self.bits)


def grid_bytes(rows: int, columns: int, config: CompressionConfig) -> int:
    """Stored bytes of a linear's scales and zero points (float32), 0 when not quantized."""
    if config.bits is None:
        return 0
    size = columns if config.group_size is None else min(config.group_size, columns)
    return 2 * 4 * rows * -(-columns // size)


def router_bytes(width: int, config: RoutingConfig) -> int:
    """Stored bytes of a linear group's router (float32)."""
    features = config.num_components(width)
    components = 0 if config.pca_reduction_factor is None else features * width
    return 4 * (width + components + config.num_clusters * features)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` fields of ``bits`` bits."""
    return -(-count * bits // 8)


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Bool tensor -> uint8 stream of ``ceil(numel / 8)`` bytes; unused bits are zero."""
    flat = np.ascontiguousarray(mask.cpu().numpy()).reshape(-1)
    out = np.empty(packed_bytes(len(flat), 1), dtype=np.uint8)

    def work(first: int, last: int) -> None:
        out[first // 8 : packed_bytes(last, 1)] = np.packbits(flat[first:last], bitorder="little")

    split(len(flat), 8, work)
    return torch.from_numpy(out)


def unpack_mask(stream: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Inverse of ``pack_mask``.

    Raises:
        ValueError: the stream's length does not fit the shape.
    """
    count = math.prod(shape)
    _check_length(stream, packed_bytes(count, 1))
    bits = np.unpackbits(stream.cpu().numpy(), count=count, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).reshape(shape)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes below ``2^bits`` -> dense stream of ``bits``-bit fields."""
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
    """Inverse of ``pack_codes`` (flat).

    Raises:
        ValueError: the stream's length does not fit the count.
    """
    _check_length(stream, packed_bytes(count, bits))
    data = stream.cpu().numpy()
    out = torch.zeros(count, dtype=dtype)
    flat = out.numpy()

    def work(first: int, last: int) -> None:
        unpack_fields(data[first * bits // 8 : packed_bytes(last, bits)], bits, flat[first:last])

    if bits:
        split(count, 8, work)
    return out


@functools.cache
def _patterns(group: int, kept: int) -> Array:
    """All ``group``-bit numbers with ``kept`` ones, rising."""
    found = [
        sum(1 << place for place in places) for places in itertools.combinations(range(group), kept)
    ]
    return np.array(sorted(found), dtype=np.uint16)


@functools.cache
def _index_of(group: int, kept: int) -> Array:
    """Pattern -> its index in ``_patterns``, 65535 where it is not among them."""
    index = np.full(1 << group, 65535, dtype=np.uint16)
    index[_patterns(group, kept)] = np.arange(math.comb(group, kept), dtype=np.uint16)
    return index


def _check_length(stream: torch.Tensor, expected: int) -> None:
    if stream.numel() != expected:
        raise ValueError(f"packed stream has {stream.numel()} bytes, {expected} expected")


def pack_expert(
    weight_OD: torch.Tensor,
    kept_OD: torch.Tensor,
    codes_OD: torch.Tensor | None,
    *,
    layout: PackedLayout,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """The named streams of one expert (``PackedLayout.streams``).

    Args:
        weight_OD: the compressed weight.
        kept_OD: bool, which weights are kept.
        codes_OD: uint8 codes where quantized.
        layout: of the expert.
        dtype: of stored values.

    Raises:
        ValueError: the mask does not fit the layout.
    """
    tensors: dict[str, torch.Tensor] = {}
    mask = pack_mask(kept_OD)
    if layout.is_sparse:
        _check_kept(mask, layout)
        if layout.group is None:
            tensors["bitmask"] = mask
        else:
            tensors["patterns"] = _pack_patterns(mask, layout)
    if layout.bits is None:
        tensors["values"] = _compact(weight_OD.to(dtype).cpu().contiguous(), mask, layout)
    else:
        assert codes_OD is not None
        codes = _compact(codes_OD.cpu().contiguous(), mask, layout)
        tensors["codes"] = pack_codes(codes, layout.bits)
    return tensors


def _check_kept(mask: torch.Tensor, layout: PackedLayout) -> None:
    found = count_ones(mask.numpy())
    if found != layout.num_kept:
        raise ValueError(f"mask keeps {found} weights, {layout.num_kept} expected")


def _over_rows(layout: PackedLayout, work: Callable[[slice, slice], None]) -> None:
    """Call ``work(rows, bytes of the mask)``; eight rows fill whole bytes of any stream."""

    def part(first: int, last: int) -> None:
        columns = layout.columns
        work(slice(first, last), slice(first * columns // 8, packed_bytes(last * columns, 1)))

    split(layout.rows, 8, part, least=-(-MIN_SLICE // layout.columns))


def _has_pairs(layout: PackedLayout) -> bool:
    """Whether every mask byte is two groups of four, and whole words of them fill the stream."""
    return (
        layout.group == 4
        and layout.pattern_bits > 0
        and layout.columns % 4 == 0
        and layout.rows * layout.columns % 32 == 0
    )


@functools.cache
def _pairs(kept: int) -> tuple[Array, Array]:
    """Index of two groups of four -> mask byte (256: none), and mask byte -> index (255: none)."""
    patterns = _patterns(4, kept)
    bits = (len(patterns) - 1).bit_length()
    pairs = np.full(1 << 2 * bits, 256, dtype=np.uint16)
    for high, pattern in enumerate(patterns):
        for low, other in enumerate(patterns):
            pairs[high << bits | low] = pattern << 4 | other
    index_of = np.full(256, 255, dtype=np.uint8)
    known = np.flatnonzero(pairs < 256)
    index_of[pairs[known]] = known
    return pairs, index_of


def _pack_pairs(mask: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    bits, stream = layout.pattern_bits, mask.numpy()
    index_of = _pairs(layout.group_kept)[1]
    out = np.empty(len(stream) // 4 * bits, dtype=np.uint8)
    bad: list[int] = []

    def work(first: int, last: int) -> None:
        part = out[first // 4 * bits : last // 4 * bits]
        bad.append(encode_pairs(stream[first:last], bits, index_of, part))

    split(len(stream), 4, work)
    if sum(bad):
        raise ValueError(f"{sum(bad)} pairs of groups of 4 do not keep {layout.group_kept} weights")
    return torch.from_numpy(out)


def _unpack_pairs(patterns: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    bits, stream = layout.pattern_bits, patterns.cpu().numpy()
    pairs = _pairs(layout.group_kept)[0]
    out = np.empty(layout.rows * layout.columns // 8, dtype=np.uint8)
    bad: list[int] = []

    def work(first: int, last: int) -> None:
        part = stream[first // 4 * bits : last // 4 * bits]
        bad.append(decode_pairs(part, bits, pairs, out[first:last]))

    split(len(out), 4, work)
    if sum(bad):
        raise ValueError(f"{sum(bad)} pattern indices are out of range")
    return torch.from_numpy(out)


def _pack_patterns(mask: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    assert layout.group is not None
    if _has_pairs(layout):
        return _pack_pairs(mask, layout)
    group, columns = layout.group, layout.columns
    rest = columns % group
    fields = np.empty((layout.rows, layout.groups_per_row), dtype=np.uint16)
    full_index = _index_of(group, layout.group_kept)
    rest_index = _index_of(rest, layout.rest_kept)
    stream = mask.numpy()
    bad: list[int] = []

    def work(rows: slice, part: slice) -> None:
        bad.append(
            encode_patterns(stream[part], columns, group, full_index, rest_index, fields[rows])
        )

    _over_rows(layout, work)
    if sum(bad):
        raise ValueError(f"{sum(bad)} groups of {group} do not keep {layout.group_kept} weights")
    return pack_codes(torch.from_numpy(fields), layout.pattern_bits)


def _compact(tensor: torch.Tensor, mask: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    if not layout.is_sparse:
        return tensor.reshape(-1)
    unsigned = _UNSIGNED[tensor.element_size()]
    source = tensor.view(unsigned).numpy().reshape(-1)
    out = torch.empty(layout.num_kept, dtype=tensor.dtype)
    target = out.view(unsigned).numpy()
    stream = mask.numpy()
    starts = _Starts(stream, layout.num_kept)

    def work(first: int, last: int) -> None:
        part = stream[first // 8 : packed_bytes(last, 1)]
        compact(source[first:last], part, target[starts[first] : starts[last]])

    split(len(source), 8, work)
    return out


class _Starts:
    """Kept weights before a position."""

    def __init__(self, stream: Array, total: int) -> None:
        self.stream = stream
        self.total = total

    def __getitem__(self, position: int) -> int:
        if position >= 8 * len(self.stream) - 7:
            return self.total
        return int(count_ones(self.stream[: position // 8]))


def unpack_kept(tensors: dict[str, torch.Tensor], layout: PackedLayout) -> torch.Tensor:
    """Which weights are kept, ``[O, D]`` (bool).

    Raises:
        ValueError: a stream is too long, too short, or keeps another number of weights.
    """
    if not layout.is_sparse:
        return torch.ones(layout.shape, dtype=torch.bool)
    return unpack_mask(bitmask(tensors, layout), layout.shape)


def bitmask(tensors: dict[str, torch.Tensor], layout: PackedLayout) -> torch.Tensor:
    """Which weights are kept, as a stream of bits; raises as ``unpack_kept``."""
    if layout.group is None:
        mask = tensors["bitmask"].cpu()
        _check_length(mask, packed_bytes(layout.rows * layout.columns, 1))
    else:
        mask = _unpack_patterns(tensors["patterns"], layout)
    if layout.rows * layout.columns % 8 and int(mask[-1]) >> layout.rows * layout.columns % 8:
        raise ValueError("bits after the last weight of the mask are set")
    _check_kept(mask, layout)
    return mask


def _unpack_patterns(patterns: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    assert layout.group is not None
    group, columns = layout.group, layout.columns
    rest = columns % group
    count = layout.rows * layout.groups_per_row
    _check_length(patterns, packed_bytes(count, layout.pattern_bits))
    if _has_pairs(layout):
        return _unpack_pairs(patterns, layout)
    fields = unpack_codes(patterns, count, layout.pattern_bits, torch.uint16)
    index = fields.numpy().reshape(layout.rows, -1)
    full, short = _patterns(group, layout.group_kept), _patterns(rest, layout.rest_kept)
    stream = np.zeros(packed_bytes(layout.rows * columns, 1), dtype=np.uint8)
    bad: list[int] = []

    def work(rows: slice, part: slice) -> None:
        bad.append(decode_patterns(index[rows], columns, group, full, short, stream[part]))

    _over_rows(layout, work)
    if sum(bad):
        raise ValueError(f"{sum(bad)} pattern indices are out of range")
    return torch.from_numpy(stream)


def unpack_expert(
    tensors: dict[str, torch.Tensor],
    *,
    layout: PackedLayout,
    grid: AffineGrid | None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The dense weight ``[O, D]`` of one expert in ``dtype``: the inverse of ``pack_expert``.

    Args:
        tensors: as ``pack_expert`` named them.
        layout: of the expert.
        grid: the linear's grid when the expert is quantized.
        dtype: of the result.
        device: of the result.

    Raises:
        ValueError: a stream's length does not fit the layout, or mask and values disagree.
    """
    on_cpu = torch.device(device).type == "cpu"
    if grid is None:
        values = tensors["values"]
        if values.numel() != layout.num_kept:
            raise ValueError(f"{values.numel()} values, {layout.num_kept} expected")
        if not layout.is_sparse:
            return values.to(device=device, dtype=dtype).reshape(layout.shape).clone()
        if on_cpu:
            return _scatter(values.to(dtype), bitmask(tensors, layout), layout)
        kept = unpack_kept(tensors, layout).to(device)
        dense = torch.zeros(layout.shape, dtype=dtype, device=device)
        return dense.masked_scatter_(kept, values.to(device=device, dtype=dtype))
    codes = unpack_codes(tensors["codes"], layout.num_kept, grid.bits)
    if not on_cpu:
        return _dequantize_on_device(codes, unpack_kept(tensors, layout), grid, device).to(dtype)
    if not layout.is_sparse:
        mask = torch.full((packed_bytes(layout.num_kept, 1),), 255, dtype=torch.uint8)
    else:
        mask = bitmask(tensors, layout)
    return _dequantize(codes, mask, grid, layout, dtype)


def _scatter(values: torch.Tensor, mask: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    if not values.numel():
        return torch.zeros(layout.shape, dtype=values.dtype)
    out = torch.empty(layout.shape, dtype=values.dtype)
    unsigned = _UNSIGNED[values.element_size()]
    source = values.contiguous().view(unsigned).numpy()
    target = out.view(unsigned).numpy().reshape(-1)
    stream = mask.numpy()
    starts = _Starts(stream, layout.num_kept)
    fill = scatter_vectors if can_spread() and len(target) % LANES == 0 else scatter

    def work(first: int, last: int) -> None:
        # The first value is read even where none is kept.
        begin = min(starts[first], len(source) - 1)
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
    out = torch.empty(layout.shape, dtype=dtype)
    source, stream = codes.numpy(), mask.numpy()
    scale = grid.scale_OG.float().cpu().contiguous().numpy()
    zero = grid.zero_point_OG.float().cpu().contiguous().numpy()
    starts = _Starts(stream, layout.num_kept)
    by_vectors = (
        can_spread()
        and layout.columns % LANES == 0
        and grid.group_size % LANES == 0
        and bool(((zero >= 0) & (zero <= 255) & (zero == np.rint(zero))).all())
    )
    fill = dequantize_vectors if by_vectors else dequantize
    few = max(8, TILE_WEIGHTS // layout.columns // 8 * 8)

    def work(rows: slice, part: slice) -> None:
        begin = starts[8 * part.start]
        # A few rows at a time: float32 in a cache, before they are rounded to the dtype.
        for first in range(rows.start, rows.stop, few):
            last = min(first + few, rows.stop)
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

    _over_rows(layout, work)
    return out


def _dequantize_on_device(
    codes: torch.Tensor, kept: torch.Tensor, grid: AffineGrid, device: torch.device | str
) -> torch.Tensor:
    """The same by PyTorch's own operations, for a GPU."""
    mask = kept.to(device)
    full = torch.zeros(mask.shape, dtype=torch.uint8, device=device)
    full.masked_scatter_(mask, codes.to(device))
    scale_DO, zero_DO = grid.columns(torch.arange(mask.shape[1], device=grid.scale_OG.device))
    dense = dequantize_tensor(full.float(), scale_DO.T.to(device), zero_DO.T.to(device))
    return dense.masked_fill_(~mask, 0)
