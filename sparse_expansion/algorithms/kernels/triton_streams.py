"""What kernels on a GPU read of an expert's stored streams: which weights are kept, and values.

A unit is a few consecutive columns of a row whose mask one thread holds as the bits of a number.
``KIND`` says how masks are stored: 0 not at all (every weight is kept), 1 a bitmask, 2 patterns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

POINTEES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}
"""What kernels read at addresses, by the dtype of a stored tensor."""


@triton.jit
def unit_mask(  # type: ignore[no-untyped-def]
    stream,
    table,
    rest_table,
    row,
    unit,
    stream_bytes,
    O: tl.constexpr,  # noqa: E741 - the number of rows, as everywhere
    D: tl.constexpr,
    KIND: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    FIELD_BITS: tl.constexpr,
):
    """Bits of the kept columns of units, the lowest for the first; none outside of the weight.

    ``row`` (int64) and ``unit`` (int32) are broadcast with each other.
    """
    inside = (row < O) & (unit * UNIT < D)
    if KIND == 0:
        mask = tl.where(inside, (1 << UNIT) - 1, 0)
    elif KIND == 1:
        bit = row * D + unit * UNIT
        mask = tl.load(stream + (bit >> 3), mask=inside, other=0).to(tl.int32)
        if D % 8 != 0:
            # Rows begin within a byte: a unit's bits are in two of them.
            shift = (bit & 7).to(tl.int32)
            has_more = inside & (shift > 0) & ((bit >> 3) + 1 < stream_bytes)
            more = tl.load(stream + (bit >> 3) + 1, mask=has_more, other=0).to(tl.int32)
            mask = ((mask | (more << 8)) >> shift) & 255
    else:
        GROUPS: tl.constexpr = UNIT // GROUP
        bit = (row * ((D + GROUP - 1) // GROUP) + unit * GROUPS) * FIELD_BITS
        at = bit >> 3
        fields = tl.load(stream + at, mask=inside & (at < stream_bytes), other=0).to(tl.int32)
        for number in tl.static_range(1, (GROUPS * FIELD_BITS + 14) // 8):
            has_more = inside & (at + number < stream_bytes)
            more = tl.load(stream + at + number, mask=has_more, other=0).to(tl.int32)
            fields |= more << (8 * number)
        fields = fields >> (bit & 7).to(tl.int32)
        mask = tl.zeros_like(fields)
        for number in tl.static_range(GROUPS):
            field = (fields >> (number * FIELD_BITS)) & ((1 << FIELD_BITS) - 1)
            pattern = tl.load(table + field, mask=inside, other=0)
            if D % GROUP != 0:
                is_rest = unit * GROUPS + number == D // GROUP
                rest = tl.load(rest_table + field, mask=inside & is_rest, other=0)
                pattern = tl.where(is_rest, rest, pattern)
            mask |= pattern << (number * GROUP)
    if D % UNIT != 0:
        mask &= (1 << tl.minimum(tl.maximum(D - unit * UNIT, 0), UNIT)) - 1
    return tl.where(inside, mask, 0)


@triton.jit
def count_ones(mask):  # type: ignore[no-untyped-def]
    """How many of the lowest 16 bits are set."""
    pairs = mask - ((mask >> 1) & 0x5555)
    nibbles = (pairs & 0x3333) + ((pairs >> 2) & 0x3333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F
    return (octets + (octets >> 8)) & 31


@triton.jit
def kept_values(values, place, keep, CODE_BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stored values or codes (``CODE_BITS`` above 0) by their place among them, as float32."""
    if CODE_BITS == 0:
        found = tl.load(values + place, mask=keep, other=0.0).to(tl.float32)
    elif CODE_BITS == 8:
        found = tl.load(values + place, mask=keep, other=0).to(tl.float32)
    else:
        # Eight codes fill whole bytes; so no product is larger than the stream.
        bit = (place & 7) * CODE_BITS
        at = (place >> 3) * CODE_BITS + (bit >> 3)
        shift = bit & 7
        code = tl.load(values + at, mask=keep, other=0).to(tl.int32) >> shift
        if 8 % CODE_BITS != 0:
            has_more = keep & (shift + CODE_BITS > 8)
            more = tl.load(values + at + 1, mask=has_more, other=0).to(tl.int32)
            code |= more << (8 - shift)
        found = (code & ((1 << CODE_BITS) - 1)).to(tl.float32)
    return found


@triton.jit
def first_half(word, VALUE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first of two 16-bit values in a word (int32), as float32."""
    if VALUE == tl.bfloat16:
        found = (word << 16).to(tl.float32, bitcast=True)
    else:
        found = (word & 0xFFFF).to(tl.int16).to(VALUE, bitcast=True).to(tl.float32)
    return found


@triton.jit
def second_half(word, VALUE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The second of them."""
    if VALUE == tl.bfloat16:
        found = (word & -65536).to(tl.float32, bitcast=True)
    else:
        found = (word >> 16).to(tl.int16).to(VALUE, bitcast=True).to(tl.float32)
    return found
