"""Kernels on stored streams against the unpacked product in float64; see conftest.py for where."""

from dataclasses import replace

import pytest
import torch

from sparse_expansion.algorithms import grouped_product
from sparse_expansion.algorithms.grouped_product import multiply_dense
from sparse_expansion.algorithms.packing.experts import pack_expert, unpack_expert
from sparse_expansion.algorithms.quantization import AffineGrid
from sparse_expansion.algorithms.stored_experts import (
    StoredExperts,
    StoredLinear,
)
from tests.algorithms.test_packing import layout, random_mask
from tests.tiny import KERNEL_DEVICE

triton_unpack = pytest.importorskip("sparse_expansion.algorithms.kernels.triton_unpack")
triton_matvec = pytest.importorskip("sparse_expansion.algorithms.kernels.triton_matvec")

EXPERTS = 3
MODES = [
    # Rows and columns, sparsity, bits, columns of a group of the grid, dtype.
    ((17, 72), "0.5", None, None, torch.bfloat16),
    ((9, 37), "0.7", None, None, torch.float32),
    ((5, 300), "0.3", None, None, torch.float16),
    ((3, 11), "1.0", None, None, torch.float32),
    ((6, 24), "0", None, None, torch.bfloat16),
    ((17, 72), "2:4", None, None, torch.bfloat16),
    ((9, 37), "2:4", None, None, torch.float32),
    ((5, 40), "4:8", None, None, torch.float16),
    ((9, 37), "1:2", None, None, torch.float32),
    ((4, 53), "9:16", None, None, torch.float32),
    ((4, 21), "4:4", None, None, torch.float32),
    ((7, 64), "16:32", None, None, torch.float32),
    ((17, 72), "2:4", 4, None, torch.bfloat16),
    ((9, 72), "0.5", 4, 16, torch.float32),
    ((9, 37), "0.5", 3, 10, torch.float32),
    ((5, 40), "2:4", 2, 8, torch.float32),
    ((5, 40), "1:4", 8, None, torch.float32),
    ((9, 37), "4:8", 5, 16, torch.float32),
    ((4, 33), "0.5", 6, None, torch.float32),
    ((4, 33), "0", 7, 16, torch.float32),
    ((6, 24), "0", 4, None, torch.float32),
    # By pairs and by windows; the last ones have more columns than a warp has at a time.
    ((5, 48), "2:4", None, None, torch.bfloat16),
    ((5, 48), "2:4", None, None, torch.float16),
    ((5, 48), "2:4", 4, 16, torch.bfloat16),
    ((5, 48), "2:4", 4, None, torch.float32),
    ((5, 72), "0.5", None, None, torch.float16),
    ((3, 528), "2:4", None, None, torch.bfloat16),
    ((3, 528), "2:4", 4, 48, torch.float32),
    ((3, 264), "0.6", None, None, torch.bfloat16),
]
PAIRED, WINDOWED = (21, 22, 23, 24, 26, 27), (0, 25, 28)
"""Places among them of those that are read by pairs, and by windows."""


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """The interpreter takes milliseconds for a program; the tallest weights still have two."""
    if KERNEL_DEVICE == "cpu":
        monkeypatch.setattr(triton_unpack, "ROWS", 16)


def linear(wanted, group_size, dtype, *, bias=True, is_shared=False):
    """Random experts of a layout on the kernels' device, with biases of their own or of all.

    Where masks are free, every expert keeps another number of weights.
    """
    rows, columns = wanted.shape
    grid = None
    if wanted.bits is not None:
        size = group_size or columns
        groups = -(-columns // size)
        zero = torch.randint(0, 2**wanted.bits, (rows, groups), device=KERNEL_DEVICE).float()
        scale = torch.rand(rows, groups, device=KERNEL_DEVICE) + 0.1
        grid = AffineGrid(scale, zero, wanted.bits, size)
    experts, layouts = [], []
    for number in range(EXPERTS):
        each = wanted
        if wanted.is_sparse and wanted.group is None and wanted.num_kept:
            each = replace(wanted, num_kept=wanted.num_kept - number)
        layouts.append(each)
        kept = random_mask(each)
        codes = torch.randint(0, 2 ** (wanted.bits or 1), wanted.shape).to(torch.uint8)
        weight = (torch.randn(wanted.shape) * kept).to(dtype)
        packed = pack_expert(weight, kept, codes, layout=each, dtype=dtype)
        experts.append({name: part.to(KERNEL_DEVICE) for name, part in packed.items()})
    bias_KO = torch.randn(EXPERTS, rows, device=KERNEL_DEVICE).to(dtype)
    if is_shared:
        bias_KO = bias_KO[0].expand(EXPERTS, -1)
    return StoredLinear(experts, layouts, grid, bias_KO if bias else None)


def unpacked(one, dtype):
    """Every expert's weight by the compiled loops of a CPU, ``[K, O, D]``."""
    grid = one.grid
    if grid is not None:
        parts = (grid.scale_OG.cpu(), grid.zero_point_OG.cpu())
        grid = AffineGrid(*parts, grid.bits, grid.group_size)
    return torch.stack(
        [
            unpack_expert(
                {name: part.cpu() for name, part in streams.items()},
                layout=each,
                grid=grid,
                dtype=dtype,
            )
            for streams, each in zip(one.experts, one.layouts, strict=True)
        ]
    )


def check_products(found, one, X, experts):
    """``found [T, O]`` is within rounding of the product in float64, token by token."""
    weights = unpacked(one, torch.float32).double()
    biases = torch.zeros(EXPERTS, 1) if one.bias_KO is None else one.bias_KO.cpu()
    # The interpreter cuts float32 off where a GPU rounds it to bfloat16.
    unit = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[found.dtype]
    for token, expert in enumerate(experts.tolist()):
        x, bias = X[token].cpu().double(), biases[expert].double()
        scale = weights[expert].abs() @ x.abs() + abs(bias)
        error = (found[token].cpu().double() - weights[expert] @ x - bias).abs()
        assert bool((error <= unit * scale + 1e-30).all())


@pytest.mark.parametrize(("shape", "sparsity", "bits", "group_size", "dtype"), MODES)
def test_every_mode_is_multiplied_and_unpacked(shape, sparsity, bits, group_size, dtype):
    wanted = layout(shape, sparsity, bits, block_size=32 if sparsity == "16:32" else 16)
    one = linear(wanted, group_size, dtype)
    stored = StoredExperts([one])
    exact = torch.float32 if bits else dtype
    assert torch.equal(stored.unpack(0, EXPERTS, exact).cpu(), unpacked(one, exact))
    for tokens in (1, 5):
        X = torch.randn(tokens, shape[1], device=KERNEL_DEVICE).to(dtype)
        experts = torch.randint(0, EXPERTS, (tokens,), device=KERNEL_DEVICE)
        check_products(stored.multiply(X, experts)[0], one, X, experts)


def test_every_mode_is_read_in_the_quickest_way_that_it_allows():
    forms = []
    for shape, sparsity, bits, group_size, dtype in MODES:
        wanted = layout(shape, sparsity, bits, block_size=32 if sparsity == "16:32" else 16)
        forms.append(StoredExperts([linear(wanted, group_size, dtype)]).form)
    kernel = triton_matvec
    found = {form: [place for place, one in enumerate(forms) if one == form] for form in forms}
    assert found[kernel.PAIRS] == [*PAIRED] and found[kernel.WINDOWS] == [*WINDOWED]


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_values_that_begin_within_a_word_are_read_one_by_one(sparsity):
    wanted = layout((5, 48), sparsity, None, block_size=16)
    one = linear(wanted, None, torch.bfloat16)
    for streams in one.experts:
        moved = torch.cat([streams["values"][:1], streams["values"]])
        streams["values"] = moved[1:]
    stored = StoredExperts([one])
    assert stored.form == triton_matvec.UNITS
    X = torch.randn(2, 48, device=KERNEL_DEVICE).bfloat16()
    experts = torch.tensor([1, 2], device=KERNEL_DEVICE)
    check_products(stored.multiply(X, experts)[0], one, X, experts)


@pytest.mark.parametrize(
    "experts", [[0], [2, 2], [1, 1, 1, 1], [1] * 9, [0, 2, 0, 2, 0, 2, 2], [2] * 7 + [0] * 9]
)
def test_tokens_of_one_expert_are_multiplied_together(experts):
    """By fours, whatever their order, and none that no expert has."""
    wanted = layout((21, 40), "0.5")
    one = linear(wanted, None, torch.float32)
    X = torch.randn(len(experts), 40, device=KERNEL_DEVICE)
    chosen = torch.tensor(experts, device=KERNEL_DEVICE)
    found = StoredExperts([one]).multiply(X, chosen)[0]
    check_products(found, one, X, chosen)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [None, 4])
def test_linears_of_one_shape_are_multiplied_in_one_launch(bits, bias):
    wanted = layout((18, 40), "2:4", bits)
    both = [linear(wanted, 8, torch.float32, bias=bias) for _ in range(2)]
    stored = StoredExperts(both)
    X = torch.randn(6, 40, device=KERNEL_DEVICE)
    experts = torch.randint(0, EXPERTS, (6,), device=KERNEL_DEVICE)
    out = stored.multiply(X, experts)
    assert out.shape == (2, 6, 18)
    for found, one in zip(out, both, strict=True):
        check_products(found, one, X, experts)
    second = stored.unpack(1, 2, torch.float32, linear=1).cpu()
    assert torch.equal(second, unpacked(both[1], torch.float32)[1:])
    assert stored.multiply(X[:0], experts[:0]).shape == (2, 0, 18)


def test_experts_without_a_token_are_not_unpacked():
    wanted = layout((4, 16), "0.5")
    one = linear(wanted, None, torch.float32)
    stored, sizes = StoredExperts([one]), torch.tensor([2, 0, 1], device=KERNEL_DEVICE)
    empty = torch.empty

    def marked(*shape, **settings):
        return empty(*shape, **settings).fill_(7.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", marked)
        found = stored.unpack(0, EXPERTS, torch.float32, sizes)
    wanted_weights = unpacked(one, torch.float32)
    assert torch.equal(found[[0, 2]].cpu(), wanted_weights[[0, 2]])
    assert bool((found[1] == 7).all())


@pytest.mark.parametrize(
    ("step", "dtype", "grouped", "is_shared"),
    [
        (EXPERTS, torch.float32, False, False),
        (2, torch.float32, False, False),
        (2, torch.float32, False, True),
        (2, torch.float16, False, False),
        # By PyTorch's own product; the interpreter multiplies no bfloat16.
        (EXPERTS, torch.bfloat16, True, False),
        (EXPERTS, torch.bfloat16, True, True),
        (2, torch.bfloat16, True, False),
        (1, torch.bfloat16, True, True),
    ],
)
def test_unpacked_experts_are_multiplied_in_one_product(
    step, dtype, grouped, is_shared, monkeypatch
):
    """More tokens than a tile has, experts without any, and pieces that do not hold all experts."""
    monkeypatch.setattr(grouped_product, "takes_grouped_product", lambda weights: grouped)
    wanted = layout((24, 72), "0.5")
    one = linear(wanted, None, dtype, is_shared=is_shared)
    stored = StoredExperts([one])
    for sizes in ([70, 0, 3], [0, 5, 0], [0, 0, 67]):
        experts = torch.repeat_interleave(torch.arange(EXPERTS), torch.tensor(sizes))
        experts = experts[torch.randperm(len(experts))].to(KERNEL_DEVICE)
        X = torch.randn(len(experts), 72, device=KERNEL_DEVICE).to(dtype)
        ends = torch.tensor(sizes, device=KERNEL_DEVICE).cumsum(0)
        out = torch.full((len(experts) + 1, 24), 7.0, device=KERNEL_DEVICE, dtype=dtype)
        for first in range(0, EXPERTS, step):
            weights = stored.unpack(first, min(step, EXPERTS - first), dtype)
            order = torch.argsort(experts, stable=True)
            multiply_dense(X, weights, one.bias_KO, order, ends, out, first=first)
        check_products(out[:-1], one, X, experts)


def damage_bitmask(streams):
    streams["bitmask"][1] ^= 4


def damage_tail(streams):
    streams["bitmask"][-1] |= 128


def damage_pattern(streams):
    streams["patterns"][0] |= 7


def shorten(streams):
    streams["values"] = streams["values"][:-1]


@pytest.mark.parametrize(
    ("sparsity", "damage", "message"),
    [
        ("0.5", damage_bitmask, "masks of experts keep other weights"),
        ("0.5", damage_tail, "masks of experts keep other weights"),
        ("2:4", damage_pattern, "masks of experts keep other weights"),
        ("0.5", shorten, "values of an expert"),
    ],
)
def test_damaged_streams_are_refused_before_a_kernel_trusts_them(sparsity, damage, message):
    wanted = layout((5, 20), sparsity)
    one = linear(wanted, None, torch.float32)
    StoredExperts([one])
    damage(one.experts[1])
    with pytest.raises(ValueError, match=message):
        StoredExperts([one])


def test_what_kernels_take_beside_the_streams_is_as_small_as_said():
    wanted = layout((40, 80), "0.5")
    stored = StoredExperts([linear(wanted, None, torch.float32)])
    assert stored.starts.numel() * stored.starts.element_size() == 4 * 40 * EXPERTS
    assert (stored.masks.numel() + stored.values.numel()) * 8 == 16 * EXPERTS
