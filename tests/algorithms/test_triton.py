"""The GPU's kernels: results in Triton's interpreter, and that they compile for GPUs."""

import os
import subprocess
import sys

import pytest
import torch

from sparse_expansion.algorithms import decide as deciders
from sparse_expansion.algorithms import sweep as sweeps
from sparse_expansion.algorithms.block import Block, BlockGrid
from sparse_expansion.algorithms.decide import decide_columns
from sparse_expansion.algorithms.quantization import AffineGrid
from sparse_expansion.config import SparsityPattern
from tests.tiny import KERNEL_DEVICE

triton_decide = pytest.importorskip("sparse_expansion.algorithms.kernels.triton_decide")

COMPILE = """
import re
import subprocess
import tempfile

import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from sparse_expansion.algorithms.kernels.triton_decide import ROWS as DECIDED_ROWS
from sparse_expansion.algorithms.kernels.triton_decide import decide_strip
from sparse_expansion.algorithms.kernels.triton_grouped import multiply_grouped
from sparse_expansion.algorithms.kernels.triton_matvec import LANES, PAIRS, UNITS, WINDOWS
from sparse_expansion.algorithms.kernels.triton_matvec import multiply_stored, tile_of
from sparse_expansion.algorithms.kernels.triton_select import BINS, TILE, choose_digit
from sparse_expansion.algorithms.kernels.triton_select import count_digits, count_ties
from sparse_expansion.algorithms.kernels.triton_select import mark_smallest
from sparse_expansion.algorithms.kernels.triton_unpack import count_kept, unpack_rows


def check(kernel, signature, constants, aligned=(), warps=4):
    signature = signature | dict.fromkeys(constants, "constexpr")
    order = {name: signature[name] for name in kernel.arg_names}
    # Tensors of their own begin at multiples of 16 bytes, as Triton finds out when it is called.
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=order, constexprs=constants, attrs=attributes)
    for capability in (80, 90):
        target = GPUTarget("cuda", capability, 32)
        compiled = compile(source, target=target, options={"num_warps": warps})
        cubin = compiled.asm["cubin"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            line = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            told = subprocess.run(line, capture_output=True, text=True, check=True)
        usage = re.search(r"STACK:([0-9]+).*?LOCAL:([0-9]+)", told.stdout + told.stderr)
        stack, local = map(int, usage.groups())
        assert (stack, local) == (0, 0), (capability, usage[0])


pointers = {"W": "*fp32", "U": "*fp32", "mask": "*i8", "scale": "*fp32", "zero_point": "*fp32"}
numbers = ["W_expert", "U_expert", "U_row", "mask_expert", "grid_expert", "codes_expert"]
numbers += ["errors_expert", "rows", "start", "columns"]
for group, pruned, quantized in ((0, 0, False), (0, 0, True), (4, 2, False), (16, 8, True)):
    constants = {"GROUP": group, "PRUNED": pruned, "IS_QUANTIZED": quantized}
    constants |= {"STRIP": 16, "ROWS": DECIDED_ROWS}
    signature = pointers | {"codes": "*u8" if quantized else "*fp32", "errors": "*fp32"}
    signature |= dict.fromkeys(numbers, "i32") | {"max_code": "fp32"}
    check(decide_strip, signature, constants, warps=1)
numbers = ["numbers", "prefix", "counts", "left", "threshold", "ties", "ties_until"]
numbers = dict.fromkeys(numbers, "*i32") | dict.fromkeys(["width", "shift", "row_stride"], "i32")
for kernel in (count_digits, choose_digit, count_ties, mark_smallest):
    names = set(kernel.arg_names)
    signature = {name: kind for name, kind in (numbers | {"mask": "*i8"}).items() if name in names}
    sizes = {"BINS": BINS, "TILE": TILE}
    check(kernel, signature, {name: size for name, size in sizes.items() if name in names})
experts = {"X": "*bf16", "experts": "*i64", "out": "*bf16", "masks": "*i64", "values": "*i64"}
experts |= {"starts": "*i32", "scales": "*i64", "zero_points": "*i64", "biases": "*i64"}
experts |= {"table": "*i32", "rest_table": "*i32"}
experts |= dict.fromkeys(["tokens", "num_experts", "mask_bytes"], "i32")
rows = {"sizes": "*i64", "scale_of": "*fp32", "zero_of": "*fp32"} | experts
# Kinds of masks, columns of a pattern and kept ones of them, bits of a field and of a code.
for kind, group, kept, field, bits, size, tokens, form in (
    (1, 1, 0, 0, 0, 0, 1, WINDOWS),
    (1, 1, 0, 0, 0, 0, 4, WINDOWS),
    (1, 1, 0, 0, 0, 0, 4, UNITS),
    (1, 1, 0, 0, 4, 5120, 1, UNITS),
    (2, 4, 2, 3, 0, 0, 1, PAIRS),
    (2, 4, 2, 3, 0, 0, 4, PAIRS),
    (2, 4, 2, 3, 4, 128, 1, PAIRS),
    (2, 4, 2, 3, 4, 128, 4, PAIRS),
    (2, 8, 4, 7, 3, 100, 1, UNITS),
    (0, 1, 0, 0, 8, 5120, 1, UNITS),
):
    unit = group * max(1, 8 // group)
    mask = {"O": 13824, "D": 5120, "KIND": kind, "UNIT": unit, "GROUP": group, "FIELD_BITS": field}
    value = {"VALUE": tl.uint8 if bits else tl.bfloat16, "ROW_KEPT": 5120 // group * kept}
    value |= {"CODE_BITS": bits, "GRID_SIZE": size}
    tile = {"BIAS": tl.bfloat16, "GROUP_KEPT": kept, "PADDED": 16, "TOKENS": tokens}
    tile |= tile_of(form, tokens, bits > 0) | {"FORM": form, "LANES": LANES}
    warps = tile.pop("num_warps")
    check(multiply_stored, experts, mask | value | tile, warps=warps)
    names = set(unpack_rows.arg_names)
    signature = {name: kind for name, kind in rows.items() if name in names}
    tile = {"SKIPS": True, "ROWS": 1, "UNITS": 128, "PADDED_UNIT": unit}
    check(unpack_rows, signature, mask | value | tile)
    if kind:
        signature = {"masks": "*i64", "counts": "*i32", "table": "*i32", "rest_table": "*i32"}
        check(count_kept, signature | {"mask_bytes": "i32"}, mask | {"ROWS": 16, "LANES": 32})
signature = {"X": "*bf16", "W": "*bf16", "out": "*bf16", "bias": "*bf16", "order": "*i64"}
signature |= {"ends": "*i64", "first": "i32", "count": "i32"}
tile = {"TILE_TOKENS": 64, "TILE_ROWS": 128, "TILE_COLUMNS": 64}
constants = {"O": 13824, "D": 5120, "BIAS_STRIDE": 13824, "EXPERTS": 16} | tile
check(multiply_grouped, signature, constants, aligned=("X", "W", "out"))
print("compiled")
"""


@pytest.mark.parametrize("bits", [None, 3, 4])
@pytest.mark.parametrize("sparsity", ["0.5", "0", "2:4", "1:4", "5:8"])
@pytest.mark.parametrize("shape", [(1, 24, 7), (2, 24, 40)])
def test_the_kernel_decides_as_pytorch_does(shape, sparsity, bits):
    experts, width, rows = shape
    pattern = SparsityPattern.parse(sparsity)
    X = torch.randn(experts, 3 * width, width, device=KERNEL_DEVICE)
    H = X.transpose(1, 2) @ X
    V = torch.linalg.cholesky(H.flip(1, 2)).flip(1, 2)
    W = torch.randn(experts, width, rows, device=KERNEL_DEVICE)
    grid = None
    if bits is not None:
        zero = torch.randint(0, 2**bits, (rows, -(-width // 8)), device=KERNEL_DEVICE).float()
        grid = AffineGrid(torch.rand_like(zero) * 0.3 + 0.1, zero, bits, 8)
    results = []
    for decide in (decide_columns, triton_decide.decide):
        weight = W.clone()
        kept, codes, loss, _ = sweeps.sweep(
            weight, V, pattern=pattern, grid=grid, block_size=16, decide=decide
        )
        results.append((weight, kept, codes, loss))
    (weight, kept, codes, loss), (weight_2, kept_2, codes_2, loss_2) = results
    assert torch.equal(kept, kept_2)
    torch.testing.assert_close(weight_2, weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss_2, loss, rtol=1e-4, atol=1e-6)
    if codes is not None:
        assert torch.equal(codes, codes_2)


def test_rounding_is_half_to_even():
    """On ties a code goes to the even neighbour, as in ``torch.round``."""
    W = torch.tensor([[[0.5, 1.5, 2.5, 3.5, -0.5, 0.4999, 6.5, 7.5]]], device=KERNEL_DEVICE)
    codes = torch.zeros_like(W, dtype=torch.uint8)
    grid = BlockGrid(torch.ones_like(W), torch.full_like(W, 2.0), codes, 15)
    mask, errors = torch.zeros_like(W, dtype=torch.bool), torch.empty_like(W)
    factor = torch.ones(1, 1, 1, device=KERNEL_DEVICE)
    triton_decide.decide(Block(W, factor, mask, errors, 0, 0, grid))
    assert codes.flatten().tolist() == [2, 4, 4, 6, 2, 2, 8, 10]


def test_a_gpu_with_triton_takes_the_kernel():
    assert deciders.triton_decide() is triton_decide.decide


def test_it_compiles_for_gpus():
    """Registers suffice. Ptxas comes with Triton; its interpreter has to be off for this."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]
