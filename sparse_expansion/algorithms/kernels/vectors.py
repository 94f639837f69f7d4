"""Loops over kept values by vectors: unpacking, and products with one vector.

LLVM has instructions that put packed values into the lanes of a mask, which Numba cannot express:
they are emitted here by hand.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from sparse_expansion.algorithms.kernels.bits import BEFORE
from sparse_expansion.algorithms.kernels.jit import LANES, Array, jit
from sparse_expansion.algorithms.kernels.llvm import (
    F32,
    I8,
    I16,
    I32,
    I64,
    add_product,
    data_pointer,
    in_all_lanes,
    load_at,
    name_suffix,
    splat,
    sum_of_lanes,
    vector_of,
)


@functools.cache
def _has(*names: str) -> bool:
    """Whether this CPU has all of these features."""
    features = llvmlite.binding.get_host_cpu_features()
    return all(features.get(name) for name in names)


def can_expand() -> bool:
    """Whether one instruction of this CPU expands packed values of any size (AVX-512 VBMI2)."""
    return _has("avx512f", "avx512vbmi2")


def can_spread() -> bool:
    """Whether this CPU puts packed values into masked lanes fast: AVX-512 VBMI2, or AVX2."""
    return can_expand() or _has("avx2", "fma")


def _to_float32(builder: ir.IRBuilder, vector: Any, element: ir.Type) -> Any:
    """Lanes as float32: of bfloat16 (its bits are a float32's upper half) or of small integers."""
    if element == I16:
        wide = builder.zext(vector, vector_of(I32))
        return builder.bitcast(builder.shl(wide, splat(I32, 16)), vector_of(F32))
    if element == I8:
        return builder.uitofp(vector, vector_of(F32))
    return vector


def _spread(builder: ir.IRBuilder, base: Any, start: Any, size: Any, bits: Any, others: Any) -> Any:
    """The values from ``start`` on, in order, in the lanes whose bit is set; else ``others``.

    Sixteen are loaded and then spread, which some CPUs do several times faster than both at once;
    near the end only those are loaded that there are. Where ``others`` are zeros of float32 and the
    values are not, these are converted first: CPUs spread 32 bits faster than 16 or 8.
    """
    vector, stored = others.type, vector_of(base.type.pointee)
    converted = stored.element != vector.element
    mask = builder.bitcast(bits, vector_of(ir.IntType(1)))
    at_load = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(stored, [base.type, mask.type, stored]),
        f"llvm.masked.expandload.{name_suffix(stored)}",
    )
    missing = splat(stored.element, 0) if converted else others

    def as_wanted(values: Any) -> Any:
        return _to_float32(builder, values, stored.element) if converted else values

    kept = cgutils.alloca_once(builder, vector)
    has_room = builder.icmp_signed("<=", builder.add(start, I64(LANES)), size)
    with builder.if_else(has_room) as (whole, rest):
        with whole:
            if can_expand():
                in_register = cgutils.get_or_insert_function(
                    builder.module,
                    ir.FunctionType(vector, [vector, vector, mask.type]),
                    f"llvm.x86.avx512.mask.expand.{name_suffix(vector)}",
                )
                loaded = as_wanted(load_at(builder, base, start, stored))
                spread = builder.call(in_register, [loaded, others, mask])
            else:
                halves = _spread_halves(builder, base, start, bits, stored.element)
                spread = as_wanted(builder.select(mask, halves, missing))
            builder.store(spread, kept)
        with rest:
            place = builder.gep(base, [start])
            builder.store(as_wanted(builder.call(at_load, [place, mask, missing])), kept)
    return builder.load(kept)


def _spread_halves(builder: ir.IRBuilder, base: Any, start: Any, bits: Any, element: Any) -> Any:
    """``_spread`` by AVX2, eight lanes at a time, with anything where the bit is not set."""
    half = LANES // 2
    table = cgutils.global_constant(
        builder.module,
        "before",
        ir.Constant(ir.ArrayType(I8, BEFORE.size), bytearray(BEFORE.tobytes())),
    )
    order_at = builder.bitcast(table, ir.PointerType(I8))
    low = builder.and_(bits, I16(255))
    after_low = builder.add(start, builder.zext(_count_ones(builder, low), I64))
    found = []
    for byte, position in ((low, start), (builder.lshr(bits, I16(8)), after_low)):
        row = builder.mul(builder.zext(byte, I64), I64(half))
        order = load_at(builder, order_at, row, vector_of(I8, half))
        loaded = load_at(builder, base, position, vector_of(element, half))
        found.append(_permute(builder, loaded, order))
    lanes = ir.Constant(vector_of(I32), list(range(LANES)))
    return builder.shuffle_vector(*found, lanes)


def _permute(builder: ir.IRBuilder, values: Any, order: Any) -> Any:
    """Lane j of the result is lane ``order[j]`` of eight values (AVX2 has it for 32 and 8 bits)."""
    kind = values.type
    if kind.element in (F32, I32):
        wide = vector_of(I32, kind.count)
        permd = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(wide, [wide, wide]), "llvm.x86.avx2.permd"
        )
        whole = builder.call(permd, [builder.bitcast(values, wide), builder.zext(order, wide)])
        return builder.bitcast(whole, kind)
    pair = vector_of(I16, kind.count)
    bytes16 = vector_of(I8, 2 * kind.count)
    shuffle = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(bytes16, [bytes16] * 2), "llvm.x86.ssse3.pshuf.b.128"
    )
    # As 16-bit lanes: the bytes 2 i and 2 i + 1 of lane i.
    twice = ir.Constant(pair, [0x0202] * kind.count)
    second = ir.Constant(pair, [0x0100] * kind.count)
    wide_values = values if kind.element == I16 else builder.zext(values, pair)
    places = builder.add(builder.mul(builder.zext(order, pair), twice), second)
    found = builder.call(
        shuffle, [builder.bitcast(wide_values, bytes16), builder.bitcast(places, bytes16)]
    )
    found = builder.bitcast(found, pair)
    return found if kind.element == I16 else builder.trunc(found, kind)


def _count_ones(builder: ir.IRBuilder, bits: Any) -> Any:
    """How many of sixteen bits are set."""
    ones = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(I16, [I16]), "llvm.ctpop.i16"
    )
    return builder.call(ones, [bits])


@contextlib.contextmanager
def _chunks(
    context: Any, builder: ir.IRBuilder, kinds: Any, arguments: Any, others: Any, count: Any
) -> Iterator[tuple[Any, Any, Any, Any]]:
    """A loop over ``count`` times 16 places; the body is what the caller emits inside.

    The first four arguments are the stream of bits, the byte to begin with, the kept values, and
    the first of them. Yields the chunk's number, its mask, its values spread to their lanes, and a
    pointer to the position after the last value taken.
    """
    bits_at = data_pointer(context, builder, kinds[0], arguments[0])
    values = context.make_array(kinds[2])(context, builder, arguments[2])
    position = cgutils.alloca_once_value(builder, arguments[3])
    with cgutils.for_range(builder, count) as loop:
        place = builder.add(arguments[1], builder.mul(loop.index, I64(2)))
        bits = load_at(builder, bits_at, place, I16)
        mask = builder.bitcast(bits, vector_of(ir.IntType(1)))
        start = builder.load(position)
        spread = _spread(builder, values.data, start, values.nitems, bits, others)
        yield loop.index, mask, spread, position
        step = builder.zext(_count_ones(builder, bits), I64)
        builder.store(builder.add(start, step), position)


@intrinsic
def _kept_dot(
    _typing: Any, stream: Any, byte: Any, values: Any, first: Any, x: Any, at: Any, n: Any
) -> Any:
    """Over ``16 n`` columns: the dot product of x with the kept values, and the sum of x there.

    Vectors of x are read from position ``at``, bits from byte ``byte``, values from ``first`` on.
    The sum is of use, and made, for codes only.
    """
    signature = types.containers.UniTuple(types.float32, 2)(stream, byte, values, first, x, at, n)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x_at = data_pointer(context, builder, signature.args[4], arguments[4])
        element = context.get_data_type(signature.args[2].dtype)
        dot = cgutils.alloca_once_value(builder, splat(F32, 0.0))
        here = cgutils.alloca_once_value(builder, splat(F32, 0.0))
        zeros = splat(F32, 0)
        with _chunks(context, builder, signature.args, arguments, zeros, arguments[6]) as chunk:
            number, mask, kept, _ = chunk
            column = builder.add(arguments[5], builder.mul(number, I64(LANES)))
            part = load_at(builder, x_at, column, vector_of(F32))
            add_product(builder, dot, kept, part)
            if element == I8:
                seen = builder.select(mask, part, splat(F32, 0.0))
                builder.store(builder.fadd(builder.load(here), seen), here)
        both = [sum_of_lanes(builder, dot), sum_of_lanes(builder, here)]
        return context.make_tuple(builder, signature.return_type, both)

    return signature, codegen


@intrinsic
def _spread_to(
    _typing: Any,
    stream: Any,
    byte: Any,
    values: Any,
    first: Any,
    other: Any,
    out: Any,
    at: Any,
    n: Any,
) -> Any:
    """Write ``16 n`` places of ``out``: kept values in order, ``other`` where the bit is not set.

    Returns the position after the last value taken.
    """
    signature = types.int64(stream, byte, values, first, values.dtype, out, at, n)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out_at = data_pointer(context, builder, signature.args[5], arguments[5])
        vector = vector_of(context.get_data_type(signature.args[2].dtype))
        others = in_all_lanes(builder, arguments[4], vector)
        with _chunks(context, builder, signature.args, arguments, others, arguments[7]) as chunk:
            number, _, spread, position = chunk
            column = builder.add(arguments[6], builder.mul(number, I64(LANES)))
            target = builder.bitcast(builder.gep(out_at, [column]), ir.PointerType(vector))
            builder.store(spread, target, align=1)
        return builder.load(position)

    return signature, codegen


@jit
def scatter_vectors(values: Array, stream: Array, out: Array) -> None:
    """Do what ``bits.scatter`` does by vectors; ``out`` has a multiple of 16 places."""
    _spread_to(stream, 0, values, 0, values[0] & 0, out, 0, out.size // LANES)


@jit
def dequantize_vectors(
    codes: Array, stream: Array, scale: Array, zero_point: Array, group_size: int, out: Array
) -> None:
    """Do what ``bits.dequantize`` does by vectors.

    Zero points are whole and 0 to 255; columns and group size are multiples of 16.

    A dropped weight takes the zero point for its code, which is worth exactly zero.
    """
    rows, columns = out.shape
    spread = np.empty(columns, np.uint8)
    position = 0
    for row in range(rows):
        for first in range(0, columns, group_size):
            s = scale[row, first // group_size]
            z = zero_point[row, first // group_size]
            count = min(group_size, columns - first)
            place = (row * columns + first) // 8
            position = _spread_to(
                stream, place, codes, position, np.uint8(z), spread, first, count // LANES
            )
            for column in range(first, first + count):
                out[row, column] = s * (np.float32(spread[column]) - z)


@intrinsic
def _nibble_dot(_typing: Any, stream: Any, byte: Any, even: Any, odd: Any, at: Any, n: Any) -> Any:
    """Dot product of ``32 n`` codes of 4 bits with x, whose even and odd entries come apart."""
    signature = types.float32(stream, byte, even, odd, at, n)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        stream_at, even_at, odd_at = (
            data_pointer(context, builder, signature.args[i], arguments[i]) for i in (0, 2, 3)
        )
        total = cgutils.alloca_once_value(builder, splat(F32, 0.0))
        with cgutils.for_range(builder, arguments[5]) as loop:
            offset = builder.mul(loop.index, I64(LANES))
            codes = load_at(builder, stream_at, builder.add(arguments[1], offset), vector_of(I8))
            low = builder.and_(codes, splat(I8, 15))
            high = builder.lshr(codes, splat(I8, 4))
            for nibble, x_at in ((low, even_at), (high, odd_at)):
                part = load_at(builder, x_at, builder.add(arguments[4], offset), vector_of(F32))
                add_product(builder, total, builder.uitofp(nibble, vector_of(F32)), part)
        return sum_of_lanes(builder, total)

    return signature, codegen


@jit
def kept_matvec(
    stream: Array, values: Array, starts: Array, x: Array, out: Array, first: int, last: int
) -> None:
    """``out = W x`` for rows ``first .. last`` of packed kept values.

    Args:
        stream: bits of the kept weights.
        values: float32, or uint16 that hold bfloat16.
        starts: ``[rows]``, kept values before each row.
        x: float32 ``[D]``, D a multiple of 16.
        out: float32 ``[rows]``.
        first: the first row.
        last: the row after the last one.
    """
    width = x.size
    for row in range(first, last):
        out[row] = _kept_dot(stream, row * width // 8, values, starts[row], x, 0, width // LANES)[0]


@jit
def kept_code_matvec(
    stream: Array,
    codes: Array,
    starts: Array,
    scale: Array,
    zero_point: Array,
    group_size: int,
    x: Array,
    out: Array,
    first: int,
    last: int,
) -> None:
    """``kept_matvec`` for codes of a grid: ``sum s (sum c x - z sum x)`` over groups of columns.

    ``starts`` is ``[rows, groups]``; the group size is a multiple of 16, like D.
    """
    width = x.size
    for row in range(first, last):
        total = np.float32(0)
        for group in range(scale.shape[1]):
            at = group * group_size
            count = min(group_size, width - at) // LANES
            dot, here = _kept_dot(
                stream, (row * width + at) // 8, codes, starts[row, group], x, at, count
            )
            total += scale[row, group] * (dot - zero_point[row, group] * here)
        out[row] = total


@jit
def nibble_matvec(
    stream: Array,
    scale: Array,
    zero_point: Array,
    group_size: int,
    even: Array,
    odd: Array,
    sums: Array,
    out: Array,
    first: int,
    last: int,
) -> None:
    """``out = W x`` for dense codes of 4 bits.

    ``sums`` are the sums of x over each group; group size and D are multiples of 32.
    """
    half = even.size
    for row in range(first, last):
        total = np.float32(0)
        for group in range(scale.shape[1]):
            at = group * group_size // 2
            count = min(group_size // 2, half - at) // LANES
            dot = _nibble_dot(stream, row * half + at, even, odd, at, count)
            total += scale[row, group] * (dot - zero_point[row, group] * sums[group])
        out[row] = total
