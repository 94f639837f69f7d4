"""Streams of N:M: every group's pattern, as its index among all patterns with as many ones."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import torch

from sparse_expansion.algorithms.kernels.bits import (
    decode_pairs,
    decode_patterns,
    encode_pairs,
    encode_patterns,
)
from sparse_expansion.algorithms.kernels.jit import Array
from sparse_expansion.algorithms.kernels.threads import split
from sparse_expansion.algorithms.packing.layout import PackedLayout, packed_bytes
from sparse_expansion.algorithms.packing.streams import (
    check_length,
    over_rows,
    pack_codes,
    unpack_codes,
)


@functools.cache
def group_patterns(group: int, kept: int) -> Array:
    """All ``group``-bit numbers with ``kept`` ones, rising."""
    found = [
        sum(1 << place for place in places) for places in itertools.combinations(range(group), kept)
    ]
    return np.array(sorted(found), dtype=np.uint16)


@functools.cache
def pattern_index(group: int, kept: int) -> Array:
    """The index in ``group_patterns`` of every pattern, 65535 where it is not among them."""
    index = np.full(1 << group, 65535, dtype=np.uint16)
    index[group_patterns(group, kept)] = np.arange(math.comb(group, kept), dtype=np.uint16)
    return index


def pack_patterns(mask: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """The stream of a mask's patterns.

    Args:
        mask: the bits of all weights, as ``pack_mask`` gives them.
        layout: the expert's layout, of N:M.

    Raises:
        ValueError: a group keeps another number of weights than the layout's.
    """
    assert layout.group is not None
    if _has_pairs(layout):
        return _pack_pairs(mask, layout)
    group, columns = layout.group, layout.columns
    rest = columns % group
    fields = np.empty((layout.rows, layout.groups_per_row), dtype=np.uint16)
    full_index = pattern_index(group, layout.group_kept)
    rest_index = pattern_index(rest, layout.rest_kept)
    stream = mask.numpy()
    bad: list[int] = []

    def work(rows: slice, part: slice) -> None:
        bad.append(
            encode_patterns(stream[part], columns, group, full_index, rest_index, fields[rows])
        )

    over_rows(layout, work)
    if sum(bad):
        raise ValueError(f"{sum(bad)} groups of {group} do not keep {layout.group_kept} weights")
    return pack_codes(torch.from_numpy(fields), layout.pattern_bits)


def unpack_patterns(patterns: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """The bits of all weights of a stream of patterns: the inverse of ``pack_patterns``.

    Raises:
        ValueError: the stream's length does not fit the layout, or an index is out of range.
    """
    assert layout.group is not None
    group, columns = layout.group, layout.columns
    rest = columns % group
    count = layout.rows * layout.groups_per_row
    check_length(patterns, packed_bytes(count, layout.pattern_bits))
    if _has_pairs(layout):
        return _unpack_pairs(patterns, layout)
    fields = unpack_codes(patterns, count, layout.pattern_bits, torch.uint16)
    index = fields.numpy().reshape(layout.rows, -1)
    full, short = group_patterns(group, layout.group_kept), group_patterns(rest, layout.rest_kept)
    stream = np.zeros(packed_bytes(layout.rows * columns, 1), dtype=np.uint8)
    bad: list[int] = []

    def work(rows: slice, part: slice) -> None:
        bad.append(decode_patterns(index[rows], columns, group, full, short, stream[part]))

    over_rows(layout, work)
    if sum(bad):
        raise ValueError(f"{sum(bad)} pattern indices are out of range")
    return torch.from_numpy(stream)


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
    """Mask byte of every index of two groups of four (256: none), and index of every byte (255)."""
    patterns = group_patterns(4, kept)
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
    """``pack_patterns`` where ``_has_pairs``: the same stream, made faster."""
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
    """``unpack_patterns`` where ``_has_pairs``."""
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
