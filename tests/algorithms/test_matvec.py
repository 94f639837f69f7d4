import pytest
import torch

from sparse_expansion.algorithms import matvec
from sparse_expansion.algorithms.kernels import vectors
from sparse_expansion.algorithms.kernels.vectors import can_spread
from sparse_expansion.algorithms.packing import experts
from sparse_expansion.algorithms.quantization import AffineGrid
from tests.algorithms.test_packing import layout, random_mask

CPU = torch.device("cpu")
needs_spreading = pytest.mark.skipif(
    not can_spread(), reason="this CPU has neither AVX-512 VBMI2 nor AVX2"
)


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    monkeypatch.setattr(matvec, "MIN_WEIGHTS", 1)


def expert(shape, sparsity, bits, group_size=None, dtype=torch.float32):
    """An expert's streams, layout, grid, and dense weight."""
    torch.manual_seed(1)
    wanted = layout(shape, sparsity, bits)
    kept = random_mask(wanted)
    codes = grid = None
    if bits is not None:
        size = group_size or shape[1]
        groups = -(-shape[1] // size)
        zero = torch.randint(0, 2**bits, (shape[0], groups)).float()
        grid = AffineGrid(torch.rand(shape[0], groups) + 0.1, zero, bits, size)
        codes = torch.randint(0, 2**bits, shape).to(torch.uint8)
    weight = (torch.randn(shape) * kept).to(dtype)
    packed = experts.pack_expert(weight, kept, codes, layout=wanted, dtype=dtype)
    return (
        packed,
        wanted,
        grid,
        experts.unpack_expert(packed, layout=wanted, grid=grid, dtype=dtype),
    )


def check(packed, wanted, grid, weight, threads=2):
    assert matvec.takes_stored_form(wanted, grid, packed[max(packed)].dtype, CPU)
    matrix = matvec.StoredMatrix.of(packed, wanted, grid)
    x = torch.randn(wanted.columns)
    torch.set_num_threads(threads)
    expected = weight.double() @ x.double()
    scale = weight.double().abs() @ x.double().abs()
    assert bool(((matrix.matvec(x) - expected).abs() <= 1e-5 * scale + 1e-30).all())
    assert matrix.matvec(x.bfloat16()).dtype == torch.bfloat16
    return matrix


@needs_spreading
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", ["0.5", "0.9", "1.0", "2:4", "3:8", "9:16"])
def test_kept_values_against_the_dense_weight(sparsity, dtype, threads):
    matrix = check(*expert((37, 80), sparsity, None, dtype=dtype), threads)
    assert matrix.num_bytes <= 37 * 80 // 8 + 37 * 8


@needs_spreading
@pytest.mark.parametrize("group_size", [None, 16, 48])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_kept_codes_against_the_dense_weight(sparsity, bits, group_size):
    check(*expert((21, 112), sparsity, bits, group_size))


@pytest.mark.parametrize("group_size", [None, 32, 64])
def test_dense_codes_of_four_bits_against_the_dense_weight(group_size):
    assert check(*expert((19, 96), "0", 4, group_size)).num_bytes == 0


def test_what_has_no_stored_product(monkeypatch):
    def takes(shape, sparsity, bits, group_size=None, dtype=torch.float32, device=CPU):
        packed, wanted, grid, _ = expert(shape, sparsity, bits, group_size, dtype)
        return matvec.takes_stored_form(wanted, grid, packed[max(packed)].dtype, device)

    monkeypatch.setattr(vectors, "can_spread", lambda: True)
    assert takes((4, 32), "0.5", None)
    assert not takes((4, 32), "0.5", None, device=torch.device("meta"))
    assert not takes((4, 32), "0.5", None, dtype=torch.float16)
    assert not takes((4, 40), "0.5", None)
    assert not takes((4, 32), "0.5", 4, group_size=8)
    assert not takes((4, 32), "0", None)
    assert not takes((4, 32), "0", 8)
    assert not takes((4, 48), "0", 4)
    monkeypatch.setattr(vectors, "can_spread", lambda: False)
    assert not takes((4, 32), "0.5", None)
    assert takes((4, 32), "0", 4)
    monkeypatch.setattr(matvec, "MIN_WEIGHTS", 1 << 20)
    assert not takes((4, 32), "0", 4)
