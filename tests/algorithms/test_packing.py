import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_expansion.algorithms import packing
from sparse_expansion.algorithms.quantization import AffineGrid, dequantize


def test_mask_by_hand():
    mask = torch.tensor([[True, False, False, True, False], [False, False, False, False, True]])
    stream = packing.pack_mask(mask)
    assert stream.tolist() == [0b00001001, 0b00000010]
    assert torch.equal(packing.unpack_mask(stream, (2, 5)), mask)


def test_codes_by_hand():
    # 3-bit fields 5, 1, 7: bits 101 100 111 read from the lowest, so 0b11_001_101 and 0b1.
    assert packing.pack_codes(torch.tensor([5, 1, 7], dtype=torch.uint8), 3).tolist() == [
        0b11001101,
        0b1,
    ]
    assert packing.pack_codes(torch.tensor([5, 1, 7], dtype=torch.uint8), 4).tolist() == [0x15, 7]


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), count=st.integers(0, 70), seed=st.integers(0, 9))
def test_codes_come_back(bits, count, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (count,), generator=generator).to(torch.uint8)
    stream = packing.pack_codes(codes, bits)
    assert stream.numel() == packing.packed_bytes(count, bits)
    assert torch.equal(packing.unpack_codes(stream, count, bits), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("shape", [(7, 13), (1, 1), (16, 8)])
def test_experts_come_back_bit_for_bit(shape, sparse, dtype):
    weight = torch.randn(shape).to(dtype)
    kept = torch.rand(shape) < 0.5 if sparse else torch.ones(shape, dtype=torch.bool)
    weight = weight * kept
    packed = packing.pack_expert(weight, kept, None, sparse=sparse, bits=None, dtype=dtype)
    back = packing.unpack_expert(packed, shape, grid=None, num_kept=int(kept.sum()), dtype=dtype)
    assert torch.equal(back, weight)
    assert ("bitmask" in packed) == sparse


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sparse", [True, False])
def test_quantized_experts_come_back_bit_for_bit(bits, sparse):
    shape = (6, 11)
    grid = AffineGrid(torch.rand(6, 3) + 0.1, torch.randint(0, 2**bits, (6, 3)).float(), bits, 4)
    codes = torch.randint(0, 2**bits, shape).to(torch.uint8)
    kept = torch.rand(shape) < 0.5 if sparse else torch.ones(shape, dtype=torch.bool)
    scale, zero = grid.columns(torch.arange(11))
    weight = dequantize(codes.float(), scale.T, zero.T) * kept
    packed = packing.pack_expert(weight, kept, codes, sparse=sparse, bits=bits, dtype=torch.float32)
    back = packing.unpack_expert(
        packed, shape, grid=grid, num_kept=int(kept.sum()), dtype=torch.float32
    )
    assert torch.equal(back, weight)
    assert packed["codes"].numel() == packing.packed_bytes(int(kept.sum()), bits)


def test_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match="3 bytes, 2 expected"):
        packing.unpack_mask(torch.zeros(3, dtype=torch.uint8), (2, 8))
    packed = packing.pack_expert(
        torch.ones(2, 4),
        torch.ones(2, 4, dtype=torch.bool),
        None,
        sparse=True,
        bits=None,
        dtype=torch.float32,
    )
    with pytest.raises(ValueError, match="keeps 8 weights, 5 expected"):
        packing.unpack_expert(packed, (2, 4), grid=None, num_kept=5, dtype=torch.float32)
