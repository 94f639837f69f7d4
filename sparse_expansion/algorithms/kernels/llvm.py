"""Vectors of sixteen lanes in LLVM, which Numba has no words for."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from sparse_expansion.algorithms.kernels.jit import LANES

# Types of single lanes.
F32, I8, I16, I32, I64 = ir.FloatType(), *(ir.IntType(size) for size in (8, 16, 32, 64))


def vector_of(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    """The type of so many lanes of an element."""
    return ir.VectorType(element, lanes)


def splat(element: ir.Type, value: float) -> ir.Constant:
    """A constant in every lane."""
    return ir.Constant(vector_of(element), [value] * LANES)


def data_pointer(context: Any, builder: ir.IRBuilder, array_type: Any, array: Any) -> Any:
    """Pointer to an array's first element."""
    return context.make_array(array_type)(context, builder, array).data


def load_at(builder: ir.IRBuilder, base: Any, position: Any, kind: ir.Type) -> Any:
    """A vector (or wider integer) from an array of smaller elements, however aligned."""
    place = builder.bitcast(builder.gep(base, [position]), ir.PointerType(kind))
    return builder.load(place, align=1)


def in_all_lanes(builder: ir.IRBuilder, scalar: Any, vector: ir.VectorType) -> Any:
    """A scalar in every lane of a vector of this type."""
    nothing = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(nothing, scalar, I32(0))
    return builder.shuffle_vector(one, nothing, ir.Constant(vector_of(I32), [0] * LANES))


def add_product(builder: ir.IRBuilder, total: Any, a: Any, b: Any) -> None:
    """``total += a b``, lane by lane."""
    vector = vector_of(F32)
    fma = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{LANES}f32"
    )
    builder.store(builder.call(fma, [a, b, builder.load(total)]), total)


def sum_of_lanes(builder: ir.IRBuilder, total: Any) -> Any:
    """The sum of a stored total's lanes, in any order."""
    add = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(F32, [F32, vector_of(F32)]),
        f"llvm.vector.reduce.fadd.v{LANES}f32",
    )
    zero = ir.Constant(F32, -0.0)
    return builder.call(add, [zero, builder.load(total)], fastmath=("reassoc",))


def name_suffix(vector: ir.VectorType) -> str:
    """How LLVM's names of operations on a vector type end."""
    return f"v{vector.count}{'f32' if vector.element == F32 else vector.element}"
