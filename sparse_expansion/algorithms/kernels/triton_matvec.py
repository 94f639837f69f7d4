"""A few tokens through their experts on a GPU, straight from the stored streams.

``FORM`` says how a row is read: unit by unit, a value at a time (``UNITS``, whatever is stored), or
in one of two ways that take a third or less of the instructions, see the two functions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_expansion.algorithms.kernels.triton_streams import (
    count_ones,
    first_half,
    kept_values,
    second_half,
    unit_mask,
)

UNITS, PAIRS, WINDOWS = 0, 1, 2
"""Forms."""
TOKENS = 4
"""Tokens of one expert that its weights are read once for."""
PAIR_COLUMNS = 16
"""Columns that a thread has at a time, by pairs: four groups of 2:4."""
WINDOW_COLUMNS = 8
"""Columns that a thread has at a time, by windows: a byte of a bitmask."""
LANES = 32
"""Threads of a warp, each with its columns of a row."""


def tile_of(form: int, tokens: int, has_codes: bool) -> dict[str, int]:
    """Rows of a program and its warps, by what measured best: see docs/performance.md.

    A thread takes an input once for all rows of its warp; several warps would wait for each other.
    """
    if form == UNITS:
        return {"ROWS": 16, "num_warps": 4}
    # Of several tokens a thread holds sums of its own.
    is_heavy = form == PAIRS and (tokens > 1 or not has_codes)
    return {"ROWS": 2 if is_heavy else 4, "num_warps": 1}


@triton.jit
def multiply_stored(  # type: ignore[no-untyped-def]
    X,
    experts,
    out,
    masks,
    values,
    starts,
    scales,
    zero_points,
    biases,
    table,
    rest_table,
    tokens,
    num_experts,
    mask_bytes,
    VALUE: tl.constexpr,
    BIAS: tl.constexpr,
    O: tl.constexpr,  # noqa: E741 - the number of rows, as everywhere
    D: tl.constexpr,
    KIND: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_KEPT: tl.constexpr,
    ROW_KEPT: tl.constexpr,
    FIELD_BITS: tl.constexpr,
    CODE_BITS: tl.constexpr,
    GRID_SIZE: tl.constexpr,
    FORM: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """``W_k x`` of a tile of rows of one linear, for a token and the next ones of its expert.

    A program is started for every token, and does the work where no earlier token's program does.
    ``X`` is ``[tokens, D]``, ``experts [tokens]``, ``out [linears, tokens, O]``. ``masks``,
    ``values`` and ``biases`` (addresses by linear and expert), ``scales`` and ``zero_points``
    (addresses by linear) lead to the streams; ``starts [linears, experts, O]`` are the kept weights
    before every row of a bitmask. ``VALUE`` and ``BIAS`` are what is at the addresses.
    """
    token = tl.program_id(0)
    linear = tl.program_id(2)
    every = tl.arange(0, PADDED)
    expert = tl.load(experts + token)
    chosen = tl.load(experts + every, mask=every < tokens, other=-1)
    same = chosen == expert
    before = tl.sum((same & (every < token)).to(tl.int32), 0)
    if before % TOKENS != 0:
        return
    rank = tl.cumsum(same.to(tl.int32), 0) - 1
    count = tl.sum(same.to(tl.int32), 0) - before
    which = linear * num_experts + expert.to(tl.int32)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < O
    stored = tl.load(values + which).to(tl.pointer_type(VALUE))
    mask_stream = tl.load(masks + which).to(tl.pointer_type(tl.uint8))
    if KIND == 1:
        begin = tl.load(starts + which.to(tl.int64) * O + row, mask=inside, other=0)
    else:
        begin = row * ROW_KEPT
    # What is not quantized has addresses of something else there, which are not read.
    scale_of = tl.load(scales + linear).to(tl.pointer_type(tl.float32))
    zero_of = tl.load(zero_points + linear).to(tl.pointer_type(tl.float32))
    x0 = X + token.to(tl.int64) * D
    x1 = x0
    x2 = x0
    x3 = x0
    if TOKENS == 4:
        # Programs of tokens without a partner multiply another one's input in vain.
        x1 = X + _token_of(same, rank, every, before + 1, token) * D
        x2 = X + _token_of(same, rank, every, before + 2, token) * D
        x3 = X + _token_of(same, rank, every, before + 3, token) * D
    if FORM == 1:
        sum0, sum1, sum2, sum3 = _by_pairs(
            x0,
            x1,
            x2,
            x3,
            mask_stream,
            stored,
            scale_of,
            zero_of,
            row,
            VALUE,
            O,
            D,
            CODE_BITS,
            GRID_SIZE,
            TOKENS,
            ROWS,
            LANES,
        )
    elif FORM == 2:
        sum0, sum1, sum2, sum3 = _by_windows(
            x0, x1, x2, x3, mask_stream, stored, begin, row, VALUE, O, D, TOKENS, ROWS, LANES
        )
    else:
        sum0, sum1, sum2, sum3 = _by_units(
            x0,
            x1,
            x2,
            x3,
            mask_stream,
            table,
            rest_table,
            stored,
            scale_of,
            zero_of,
            begin,
            row,
            mask_bytes,
            O,
            D,
            KIND,
            UNIT,
            GROUP,
            GROUP_KEPT,
            FIELD_BITS,
            CODE_BITS,
            GRID_SIZE,
            TOKENS,
            ROWS,
            LANES,
        )
    bias = tl.zeros((ROWS,), tl.float32)
    if BIAS is not None:
        bias_of = tl.load(biases + which).to(tl.pointer_type(BIAS))
        bias = tl.load(bias_of + row, mask=inside, other=0.0).to(tl.float32)
    out += linear.to(tl.int64) * tokens * O + row
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(out + token.to(tl.int64) * O, (sum0 + bias).to(dtype), inside)
    if TOKENS == 4:
        if count > 1:
            target = out + _token_of(same, rank, every, before + 1, token) * O
            tl.store(target, (sum1 + bias).to(dtype), inside)
        if count > 2:
            target = out + _token_of(same, rank, every, before + 2, token) * O
            tl.store(target, (sum2 + bias).to(dtype), inside)
        if count > 3:
            target = out + _token_of(same, rank, every, before + 3, token) * O
            tl.store(target, (sum3 + bias).to(dtype), inside)


@triton.jit
def _by_units(  # type: ignore[no-untyped-def]
    x0,
    x1,
    x2,
    x3,
    mask_stream,
    table,
    rest_table,
    stored,
    scale_of,
    zero_of,
    begin,
    row,
    mask_bytes,
    O: tl.constexpr,  # noqa: E741 - the number of rows, as everywhere
    D: tl.constexpr,
    KIND: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_KEPT: tl.constexpr,
    FIELD_BITS: tl.constexpr,
    CODE_BITS: tl.constexpr,
    GRID_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sums ``[ROWS]`` of every token for whatever is stored: a column and its value at a time."""
    row_long = row.to(tl.int64)
    inside = row < O
    GRIDS: tl.constexpr = 1 if GRID_SIZE == 0 else (D + GRID_SIZE - 1) // GRID_SIZE
    scale = tl.zeros((ROWS, 1 if GRIDS == 1 else LANES), tl.float32)
    zero = scale
    grid_row = row[:, None] * GRIDS
    if CODE_BITS > 0 and GRIDS == 1:
        scale = tl.load(scale_of + grid_row, mask=inside[:, None], other=0.0)
        zero = tl.load(zero_of + grid_row, mask=inside[:, None], other=0.0)
    sum0 = tl.zeros((ROWS, LANES), tl.float32)
    sum1 = sum0
    sum2 = sum0
    sum3 = sum0
    for first in range(0, (D + UNIT - 1) // UNIT, LANES):
        unit = first + tl.arange(0, LANES)[None, :]
        mask = unit_mask(
            mask_stream,
            table,
            rest_table,
            row_long[:, None],
            unit,
            mask_bytes,
            O,
            D,
            KIND,
            UNIT,
            GROUP,
            FIELD_BITS,
        )
        if KIND == 1:
            ones = count_ones(mask)
            place = begin[:, None] + tl.cumsum(ones, 1) - ones
            begin += tl.sum(ones, 1)
        elif KIND == 2:
            place = begin[:, None] + unit * (UNIT // GROUP * GROUP_KEPT)
        else:
            place = begin[:, None] + unit * UNIT
        if CODE_BITS > 0 and GRIDS > 1 and GRID_SIZE % UNIT == 0:
            at = grid_row + unit * UNIT // GRID_SIZE
            has_grid = inside[:, None] & (unit * UNIT < D)
            scale = tl.load(scale_of + at, mask=has_grid, other=0.0)
            zero = tl.load(zero_of + at, mask=has_grid, other=0.0)
        # Without a sign an address takes one instruction less.
        place = place.to(tl.uint32)
        for j in tl.static_range(UNIT):
            column = unit * UNIT + j
            keep = (mask & (1 << j)) != 0
            w = kept_values(stored, place, keep, CODE_BITS)
            if CODE_BITS > 0:
                if GRIDS > 1 and GRID_SIZE % UNIT != 0:
                    at = grid_row + column // GRID_SIZE
                    has_grid = inside[:, None] & (column < D)
                    scale = tl.load(scale_of + at, mask=has_grid, other=0.0)
                    zero = tl.load(zero_of + at, mask=has_grid, other=0.0)
                w = tl.where(keep, scale * (w - zero), 0.0)
            place = tl.where(keep, place + 1, place)
            sum0 += w * tl.load(x0 + column, mask=column < D, other=0.0).to(tl.float32)
            if TOKENS == 4:
                sum1 += w * tl.load(x1 + column, mask=column < D, other=0.0).to(tl.float32)
                sum2 += w * tl.load(x2 + column, mask=column < D, other=0.0).to(tl.float32)
                sum3 += w * tl.load(x3 + column, mask=column < D, other=0.0).to(tl.float32)
    return tl.sum(sum0, 1), tl.sum(sum1, 1), tl.sum(sum2, 1), tl.sum(sum3, 1)


@triton.jit
def _by_pairs(  # type: ignore[no-untyped-def]
    x0,
    x1,
    x2,
    x3,
    patterns,
    stored,
    scale_of,
    zero_of,
    row,
    VALUE: tl.constexpr,
    O: tl.constexpr,  # noqa: E741 - the number of rows, as everywhere
    D: tl.constexpr,
    CODE_BITS: tl.constexpr,
    GRID_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sums ``[ROWS]`` of every token for 2:4 with values of 16 bits, or with codes of 4.

    A group's two values are where its number says. So its pattern chooses two of its four inputs,
    where every column would ask whether it is kept, and count how many were before it.
    """
    lane = tl.arange(0, LANES)
    UNITS: tl.constexpr = D // 16
    GRIDS: tl.constexpr = 1 if GRID_SIZE == 0 else D // GRID_SIZE
    words = stored.to(tl.pointer_type(tl.int32))
    sum0 = tl.zeros((ROWS, LANES), tl.float32)
    sum1 = sum0
    sum2 = sum0
    sum3 = sum0
    for first in range(0, UNITS, LANES):
        unit = first + lane
        has_unit = unit < UNITS
        inside = (row < O)[:, None] & has_unit[None, :]
        column = unit[:, None] * 16 + tl.arange(0, 16)[None, :]
        at = row[:, None].to(tl.int64) * UNITS + unit[None, :]
        # Twelve bits of patterns begin in a byte's middle at most, and end in the next.
        byte = (at * 12) >> 3
        field = tl.load(patterns + byte, mask=inside, other=0).to(tl.int32)
        field |= tl.load(patterns + byte + 1, mask=inside, other=0).to(tl.int32) << 8
        field = field >> ((at & 1) * 4).to(tl.int32)
        codes = field
        if CODE_BITS == 4:
            codes = tl.load(words + at, mask=inside, other=0)
        this0 = tl.zeros((ROWS, LANES), tl.float32)
        this1 = this0
        this2 = this0
        this3 = this0
        taken0 = this0
        taken1 = this0
        taken2 = this0
        taken3 = this0
        in0, in1, in2, in3 = _inputs(x0, x1, x2, x3, column, has_unit, TOKENS)
        for g in tl.static_range(4):
            # The six masks of four bits that have two, in the order of their numbers.
            mask = 0xCA9653 >> (((field >> (3 * g)) & 7) * 4)
            if CODE_BITS == 4:
                a = _code_as_float(codes, 8 * g)
                b = _code_as_float(codes, 8 * g + 4)
            else:
                word = tl.load(words + at * 4 + g, mask=inside, other=0)
                a, b = first_half(word, VALUE), second_half(word, VALUE)
            first_x, second_x = _two_of_four(mask, in0, g, LANES)
            this0 += a * first_x + b * second_x
            taken0 += first_x + second_x
            if TOKENS == 4:
                first_x, second_x = _two_of_four(mask, in1, g, LANES)
                this1 += a * first_x + b * second_x
                taken1 += first_x + second_x
                first_x, second_x = _two_of_four(mask, in2, g, LANES)
                this2 += a * first_x + b * second_x
                taken2 += first_x + second_x
                first_x, second_x = _two_of_four(mask, in3, g, LANES)
                this3 += a * first_x + b * second_x
                taken3 += first_x + second_x
        if CODE_BITS == 4:
            grid = row[:, None] * GRIDS + (unit * 16 // GRID_SIZE)[None, :]
            scale = tl.load(scale_of + grid, mask=inside, other=0.0)
            # scale (code - zero) by what stands for the code.
            zero = 16.0 + tl.load(zero_of + grid, mask=inside, other=0.0)
            this0 = scale * (16.0 * this0 - zero * taken0)
            this1 = scale * (16.0 * this1 - zero * taken1)
            this2 = scale * (16.0 * this2 - zero * taken2)
            this3 = scale * (16.0 * this3 - zero * taken3)
        sum0 += this0
        sum1 += this1
        sum2 += this2
        sum3 += this3
    return tl.sum(sum0, 1), tl.sum(sum1, 1), tl.sum(sum2, 1), tl.sum(sum3, 1)


@triton.jit
def _inputs(x0, x1, x2, x3, column, has_unit, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Every token's inputs of units ``[LANES, columns]``, float32; the first's for all if alone."""
    inside = has_unit[:, None]
    in0 = tl.load(x0 + column, mask=inside, other=0.0).to(tl.float32)
    in1 = in0
    in2 = in0
    in3 = in0
    if TOKENS == 4:
        in1 = tl.load(x1 + column, mask=inside, other=0.0).to(tl.float32)
        in2 = tl.load(x2 + column, mask=inside, other=0.0).to(tl.float32)
        in3 = tl.load(x3 + column, mask=inside, other=0.0).to(tl.float32)
    return in0, in1, in2, in3


@triton.jit
def _code_as_float(word, shift: tl.constexpr):  # type: ignore[no-untyped-def]
    """``1 + code / 16`` for the code of four bits at ``shift``: the first bits of the mantissa."""
    # Bits 19 to 22 of a float32 follow the exponent.
    moved = word << (19 - shift) if shift <= 19 else word >> (shift - 19)
    return ((moved & 0x780000) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _two_of_four(mask, inputs, g: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The inputs of a group's two kept columns, of ``inputs [LANES, 16]``."""
    x0 = _column(inputs, 4 * g, 16, LANES)
    x1 = _column(inputs, 4 * g + 1, 16, LANES)
    x2 = _column(inputs, 4 * g + 2, 16, LANES)
    x3 = _column(inputs, 4 * g + 3, 16, LANES)
    first = tl.where((mask & 1) != 0, x0, tl.where((mask & 2) != 0, x1, x2))
    second = tl.where((mask & 8) != 0, x3, tl.where((mask & 4) != 0, x2, x1))
    return first, second


@triton.jit
def _by_windows(  # type: ignore[no-untyped-def]
    x0,
    x1,
    x2,
    x3,
    bitmask,
    stored,
    begin,
    row,
    VALUE: tl.constexpr,
    O: tl.constexpr,  # noqa: E741 - the number of rows, as everywhere
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sums ``[ROWS]`` of every token for a bitmask with values of 16 bits.

    The values of eight columns, which are eight at most, are read as words of two; the first of
    them is the next kept column's, and then they move up by one. A word that ends behind the last
    value begins before its end, in memory that is there.
    """
    lane = tl.arange(0, LANES)
    UNITS: tl.constexpr = D // 8
    words = stored.to(tl.pointer_type(tl.int32))
    sum0 = tl.zeros((ROWS, LANES), tl.float32)
    sum1 = sum0
    sum2 = sum0
    sum3 = sum0
    for first in range(0, UNITS, LANES):
        unit = first + lane
        has_unit = unit < UNITS
        inside = (row < O)[:, None] & has_unit[None, :]
        column = unit[:, None] * 8 + tl.arange(0, 8)[None, :]
        at = row[:, None].to(tl.int64) * UNITS + unit[None, :]
        mask = tl.load(bitmask + at, mask=inside, other=0).to(tl.int32)
        ones = count_ones(mask)
        place = begin[:, None] + tl.cumsum(ones, 1) - ones
        begin += tl.sum(ones, 1)
        is_odd = (place & 1) != 0
        word = words + (place >> 1)
        needed = ones + (place & 1)
        w0 = tl.load(word, mask=needed > 0, other=0)
        w1 = tl.load(word + 1, mask=needed > 2, other=0)
        w2 = tl.load(word + 2, mask=needed > 4, other=0)
        w3 = tl.load(word + 3, mask=needed > 6, other=0)
        w4 = tl.load(word + 4, mask=needed > 8, other=0)
        w0 = tl.where(is_odd, _moved_up(w0, w1), w0)
        w1 = tl.where(is_odd, _moved_up(w1, w2), w1)
        w2 = tl.where(is_odd, _moved_up(w2, w3), w2)
        w3 = tl.where(is_odd, _moved_up(w3, w4), w3)
        in0, in1, in2, in3 = _inputs(x0, x1, x2, x3, column, has_unit, TOKENS)
        for j in tl.static_range(8):
            keep = (mask & (1 << j)) != 0
            w = first_half(tl.where(keep, w0, 0), VALUE)
            sum0 += w * _column(in0, j, 8, LANES)
            if TOKENS == 4:
                sum1 += w * _column(in1, j, 8, LANES)
                sum2 += w * _column(in2, j, 8, LANES)
                sum3 += w * _column(in3, j, 8, LANES)
            # Of later columns fewer are left.
            if j < 7:
                w0 = tl.where(keep, _moved_up(w0, w1), w0)
            if j < 5:
                w1 = tl.where(keep, _moved_up(w1, w2), w1)
            if j < 3:
                w2 = tl.where(keep, _moved_up(w2, w3), w2)
            if j < 1:
                w3 = tl.where(keep, _moved_up(w3, 0), w3)
    return tl.sum(sum0, 1), tl.sum(sum1, 1), tl.sum(sum2, 1), tl.sum(sum3, 1)


@triton.jit
def _moved_up(word, following):  # type: ignore[no-untyped-def]
    """A word's second half, and the first of the one that follows it."""
    return ((word >> 16) & 0xFFFF) | (following << 16)


@triton.jit
def _column(tile, number: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """One column of ``tile [LANES, WIDTH]`` as a row, ``[1, LANES]``; ``WIDTH`` is 8 or 16."""
    even, odd = tl.split(tl.reshape(tile, (LANES, WIDTH // 2, 2)))
    part = odd if number & 1 else even
    even, odd = tl.split(tl.reshape(part, (LANES, WIDTH // 4, 2)))
    part = odd if (number >> 1) & 1 else even
    if WIDTH == 16:
        even, odd = tl.split(tl.reshape(part, (LANES, 2, 2)))
        part = odd if (number >> 2) & 1 else even
        even, odd = tl.split(part)
        found = odd if (number >> 3) & 1 else even
    else:
        even, odd = tl.split(part)
        found = odd if (number >> 2) & 1 else even
    return found[None, :]


@triton.jit
def _token_of(same, rank, every, wanted, otherwise):  # type: ignore[no-untyped-def]
    """Index of the expert's token of that rank, or of ``otherwise`` where it has fewer (int64)."""
    hit = same & (rank == wanted)
    found = tl.sum(tl.where(hit, every, 0), 0)
    has_one = tl.sum(hit.to(tl.int32), 0) > 0
    return tl.where(has_one, found, otherwise).to(tl.int64)
