from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_expansion.algorithms.kernels import vectors
from sparse_expansion.algorithms.packing import device, experts, patterns, streams
from sparse_expansion.algorithms.packing.layout import PackedLayout, packed_bytes
from sparse_expansion.algorithms.quantization import AffineGrid, dequantize
from sparse_expansion.config import CompressionConfig, SparsityPattern


def test_mask_by_hand():
    mask = torch.tensor([[True, False, False, True, False], [False, False, False, False, True]])
    stream = streams.pack_mask(mask)
    assert stream.tolist() == [0b00001001, 0b00000010]
    assert torch.equal(streams.unpack_mask(stream, (2, 5)), mask)


def test_codes_by_hand():
    # 3-bit fields 5, 1, 7: bits 101 100 111 read from the lowest, so 0b11_001_101 and 0b1.
    assert streams.pack_codes(torch.tensor([5, 1, 7], dtype=torch.uint8), 3).tolist() == [
        0b11001101,
        0b1,
    ]
    assert streams.pack_codes(torch.tensor([5, 1, 7], dtype=torch.uint8), 4).tolist() == [0x15, 7]


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), count=st.integers(0, 70), seed=st.integers(0, 9))
def test_codes_come_back(bits, count, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (count,), generator=generator).to(torch.uint8)
    stream = streams.pack_codes(codes, bits)
    assert stream.numel() == packed_bytes(count, bits)
    assert torch.equal(streams.unpack_codes(stream, count, bits), codes)


def layout(shape, sparsity="0.5", bits=None, block_size=16):
    config = CompressionConfig(
        sparsity=SparsityPattern.parse(sparsity), bits=bits, block_size=block_size
    )
    return PackedLayout.of(*shape, config)


def random_mask(wanted):
    """A mask that fits a layout, by another way than the sweep."""
    rows, columns = wanted.shape
    kept = torch.zeros(rows, columns, dtype=torch.bool)
    if wanted.group is None:
        kept.view(-1)[torch.randperm(kept.numel())[: wanted.num_kept]] = True
        return kept
    whole = columns // wanted.group * wanted.group
    parts = [(kept[:, :whole].unflatten(1, (-1, wanted.group)), wanted.group_kept)] if whole else []
    for part, count in [*parts, (kept[:, whole:], wanted.rest_kept)]:
        part.copy_(torch.rand(part.shape).argsort(-1).argsort(-1) < count)
    return kept


def test_patterns_by_hand():
    """2:4 has six patterns, 0011 0101 0110 1001 1010 1100; three bits each."""
    mask = torch.tensor([[1, 1, 0, 0, 0, 1, 0, 1], [0, 0, 1, 1, 1, 0, 0, 1]]).bool()
    weight = torch.arange(16.0).reshape(2, 8) * mask
    packed = experts.pack_expert(
        weight, mask, None, layout=layout((2, 8), "2:4"), dtype=torch.float32
    )
    # Fields 0, 4, 5, 3: 0b011_101_100_000 from the lowest.
    assert packed["patterns"].tolist() == [0b01100000, 0b0111]
    assert packed["values"].tolist() == [0, 1, 5, 7, 10, 11, 12, 15]


@pytest.mark.parametrize("sparsity", ["1:4", "2:4", "3:4"])
@pytest.mark.parametrize("shape", [(4, 8), (40, 4096)])
def test_pairs_of_groups_are_the_same_stream(shape, sparsity, monkeypatch):
    wanted = layout(shape, sparsity)
    mask = streams.pack_mask(random_mask(wanted))
    fast = patterns.pack_patterns(mask, wanted)
    broken = torch.full_like(fast, 255)
    if sparsity == "2:4":
        with pytest.raises(ValueError, match="out of range"):
            patterns.unpack_patterns(broken, wanted)
    with pytest.raises(ValueError, match=f"keep {wanted.group_kept} weights"):
        patterns.pack_patterns(torch.full_like(mask, 255), wanted)
    assert torch.equal(patterns.unpack_patterns(fast, wanted), mask)
    monkeypatch.setattr(patterns, "_has_pairs", lambda layout: False)
    assert torch.equal(patterns.pack_patterns(mask, wanted), fast)
    assert torch.equal(patterns.unpack_patterns(fast, wanted), mask)


PATTERNS = ["0.5", "0.9", "1.0", "0", "2:4", "1:4", "3:4", "4:8", "5:16", "8:16", "1:2", "4:4"]


def assert_same_on_a_device(packed, weight, kept, codes, layout, grid, dtype):
    """What a GPU does gives the same streams, and the same weight of them."""
    made = experts.pack_expert(weight, kept, codes, layout=layout, dtype=dtype, compiled=False)
    assert made.keys() == packed.keys()
    assert all(torch.equal(made[name], packed[name]) for name in packed)
    back = experts.unpack_expert(packed, layout=layout, grid=grid, dtype=dtype, compiled=False)
    assert torch.equal(back, weight.to(dtype))
    if layout.is_sparse:
        assert torch.equal(experts.unpack_kept(packed, layout, compiled=False), kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", PATTERNS)
@pytest.mark.parametrize("shape", [(7, 13), (1, 1), (16, 8), (3, 35), (9, 64)])
def test_experts_come_back_bit_for_bit(shape, sparsity, dtype):
    wanted = layout(shape, sparsity)
    kept = random_mask(wanted)
    weight = torch.randn(shape).to(dtype) * kept
    packed = experts.pack_expert(weight, kept, None, layout=wanted, dtype=dtype)
    stored = {name: tensor.numel() for name, tensor in packed.items()}
    assert stored == {name: count for name, (_, count) in wanted.streams().items()}
    assert torch.equal(experts.unpack_expert(packed, layout=wanted, grid=None, dtype=dtype), weight)
    assert torch.equal(experts.unpack_kept(packed, wanted), kept)
    assert_same_on_a_device(packed, weight, kept, None, wanted, None, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "size"), [(11, 4), (48, 16), (80, 80)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sparsity", PATTERNS)
def test_quantized_experts_come_back_bit_for_bit(bits, sparsity, columns, size, dtype):
    shape, groups = (6, columns), -(-columns // size)
    zero_point = torch.randint(0, 2**bits, (6, groups)).float()
    grid = AffineGrid(torch.rand(6, groups) + 0.1, zero_point, bits, size)
    codes = torch.randint(0, 2**bits, shape).to(torch.uint8)
    wanted = layout(shape, sparsity, bits)
    kept = random_mask(wanted)
    scale, zero = grid.columns(torch.arange(columns))
    weight = dequantize(codes.float(), scale.T, zero.T).masked_fill(~kept, 0)
    packed = experts.pack_expert(weight, kept, codes, layout=wanted, dtype=dtype)
    back = experts.unpack_expert(packed, layout=wanted, grid=grid, dtype=dtype)
    assert torch.equal(back, weight.to(dtype))
    assert packed["codes"].numel() == packed_bytes(wanted.num_kept, bits)
    assert_same_on_a_device(packed, weight, kept, codes, wanted, grid, dtype)


def test_zero_points_that_are_no_codes():
    """As a foreign file may have them; the vectors' way of dropping weights needs codes."""
    wanted = layout((4, 32), "0.5", 4)
    kept = random_mask(wanted)
    codes = torch.randint(0, 16, (4, 32)).to(torch.uint8)
    grid = AffineGrid(torch.rand(4, 1) + 0.1, torch.tensor([[0.5], [-3.0], [300.0], [7.0]]), 4, 32)
    weight = dequantize(codes.float(), grid.scale_OG, grid.zero_point_OG).masked_fill(~kept, 0)
    packed = experts.pack_expert(weight, kept, codes, layout=wanted, dtype=torch.float32)
    back = experts.unpack_expert(packed, layout=wanted, grid=grid, dtype=torch.float32)
    assert torch.equal(back, weight)


def test_cpus_without_wide_vectors_give_the_same(monkeypatch):
    for bits in (None, 4):
        wanted = layout((16, 64), "0.5", bits)
        kept = random_mask(wanted)
        codes = torch.randint(0, 16, (16, 64)).to(torch.uint8)
        grid = None if bits is None else AffineGrid(torch.rand(16, 1), torch.ones(16, 1), 4, 64)
        weight = torch.randn(16, 64) * kept
        packed = experts.pack_expert(weight, kept, codes, layout=wanted, dtype=torch.float32)
        found = []
        for answer in (False, vectors.can_spread()):
            monkeypatch.setattr(vectors, "can_spread", lambda answer=answer: answer)
            found.append(
                experts.unpack_expert(packed, layout=wanted, grid=grid, dtype=torch.float32)
            )
        assert torch.equal(*found)


@pytest.mark.parametrize("columns", [1032, 1040])
@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
@pytest.mark.parametrize("bits", [None, 4, 3])
def test_any_number_of_threads_gives_the_same(sparsity, bits, columns):
    shape = (512, columns)
    wanted = layout(shape, sparsity, bits, block_size=128)
    kept = random_mask(wanted)
    codes = torch.randint(0, 8, shape).to(torch.uint8)
    grid = None if bits is None else AffineGrid(torch.rand(512, 9), torch.ones(512, 9), bits, 128)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        packed = experts.pack_expert(
            codes.float(), kept, codes, layout=wanted, dtype=torch.bfloat16
        )
        back = experts.unpack_expert(packed, layout=wanted, grid=grid, dtype=torch.float32)
        results.append((packed, back))
    for packed, back in results[1:]:
        assert all(torch.equal(packed[name], results[0][0][name]) for name in packed)
        assert torch.equal(back, results[0][1])
    if bits is None:
        assert torch.equal(results[0][1], codes * kept.float())


def test_two_in_four_takes_three_bits_for_four_weights():
    wanted = layout((64, 128), "2:4", 4)
    assert wanted.num_bytes(2) == 64 * 128 * 3 // 4 // 8 + 64 * 128 // 2 * 4 // 8
    assert layout((64, 128), "8:16").pattern_bits == 14
    assert layout((64, 128), "20:32", block_size=32).streams()["bitmask"] == ("uint8", 1024)


@pytest.mark.parametrize("bits", range(17))
def test_fields_on_a_device_are_the_same_stream(bits, monkeypatch):
    monkeypatch.setattr(device, "CHUNK_FIELDS", 64)
    for count in (0, 1, 64, 333):
        fields = torch.randint(0, 1 << bits, (count,), dtype=torch.int32)
        narrow = fields.to(torch.uint8) if bits <= 8 else fields.to(torch.uint16)
        stream = streams.pack_codes(narrow, bits)
        assert torch.equal(device.pack_fields(fields, bits), stream)
        assert torch.equal(device.unpack_fields(stream, count, bits).int(), fields)


PACKERS = {
    name: [partial(one, compiled=compiled) for one in (experts.pack_expert, experts.unpack_expert)]
    for name, compiled in (("cpu", True), ("device", False))
}


@pytest.mark.parametrize("packer", PACKERS)
def test_what_does_not_fit_is_refused(packer):
    pack, unpack = PACKERS[packer]
    with pytest.raises(ValueError, match="3 bytes, 2 expected"):
        streams.unpack_mask(torch.zeros(3, dtype=torch.uint8), (2, 8))
    ones = torch.ones(2, 4, dtype=torch.bool)
    half = layout((2, 4))
    with pytest.raises(ValueError, match="keeps 8 weights, 4 expected"):
        pack(ones.float(), ones, None, layout=half, dtype=torch.float32)
    stored = {"bitmask": streams.pack_mask(ones), "values": torch.ones(4)}
    with pytest.raises(ValueError, match="keeps 8 weights, 4 expected"):
        unpack(stored, layout=half, grid=None, dtype=torch.float32)
    n_m = layout((2, 4), "2:4")
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    with pytest.raises(ValueError, match="2 groups of 4"):
        pack(mask.float(), mask, None, layout=n_m, dtype=torch.float32)
    stored = {"patterns": torch.tensor([0b00111110], dtype=torch.uint8), "values": torch.ones(4)}
    with pytest.raises(ValueError, match="2 pattern indices"):
        unpack(stored, layout=n_m, grid=None, dtype=torch.float32)
    stored = {"patterns": torch.tensor([0], dtype=torch.uint8), "values": torch.ones(3)}
    with pytest.raises(ValueError, match="3 values, 4 expected"):
        unpack(stored, layout=n_m, grid=None, dtype=torch.float32)


@pytest.mark.parametrize("packer", PACKERS)
def test_bits_after_the_last_weight_are_refused(packer):
    unpack = PACKERS[packer][1]
    wanted = layout((1, 4), "0.5")
    stored = {"bitmask": torch.tensor([0b10011], dtype=torch.uint8), "values": torch.ones(2)}
    with pytest.raises(ValueError, match="bits after the last weight"):
        unpack(stored, layout=wanted, grid=None, dtype=torch.float32)


MUTATIONS = {
    "int64": lambda stream: stream.long() + 300,
    "int8": lambda stream: stream.view(torch.int8) if stream.dtype == torch.uint8 else None,
    "float64": lambda stream: stream.double(),
    "short": lambda stream: stream[:-1],
    "long": lambda stream: torch.cat([stream, stream[:1]]),
    "matrix": lambda stream: stream[None],
    "empty": lambda stream: stream[:0],
}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("kind", MUTATIONS)
@pytest.mark.parametrize("bits", [None, 4, 3])
@pytest.mark.parametrize("sparsity", ["0.5", "2:4", "3:8", "0"])
def test_streams_of_another_form_are_refused(sparsity, bits, kind, packer):
    """Compiled loops trust what they are given: a wrong type or length ends the process."""
    wanted = layout((16, 32), sparsity, bits)
    kept, codes = random_mask(wanted), torch.randint(0, 8, (16, 32)).to(torch.uint8)
    grid = None if bits is None else AffineGrid(torch.rand(16, 1), torch.ones(16, 1), bits, 32)
    pack, unpack = PACKERS[packer]
    packed = pack(codes.float(), kept, codes, layout=wanted, dtype=torch.float32)
    for name, stream in packed.items():
        changed = MUTATIONS[kind](stream)
        if changed is None:
            continue
        with pytest.raises(ValueError, match=name):
            unpack({**packed, name: changed}, layout=wanted, grid=grid, dtype=torch.float32)
        with pytest.raises(ValueError, match=f"has no {name}"):
            rest = {other: packed[other] for other in packed if other != name}
            unpack({"x": stream, **rest}, layout=wanted, grid=grid, dtype=torch.float32)
    if grid is not None:
        small = AffineGrid(grid.scale_OG[:3], grid.zero_point_OG[:3], bits, 32)
        with pytest.raises(ValueError, match="a grid has shape"):
            unpack(packed, layout=wanted, grid=small, dtype=torch.float32)


@pytest.mark.parametrize("sparsity", ["0.5", "2:4", "3:8", "5:16", "0"])
@pytest.mark.parametrize("bits", [None, 4, 3])
def test_damaged_bytes_are_refused_or_harmless(sparsity, bits):
    """Any bytes in streams of the right form: an error in a line, or a weight."""
    wanted = layout((16, 32), sparsity, bits)
    kept, codes = random_mask(wanted), torch.randint(0, 8, (16, 32)).to(torch.uint8)
    grid = None if bits is None else AffineGrid(torch.rand(16, 1), torch.ones(16, 1), bits, 32)
    packed = experts.pack_expert(codes.float(), kept, codes, layout=wanted, dtype=torch.float32)
    refused = 0
    for _ in range(60):
        damaged = {name: stream.clone() for name, stream in packed.items()}
        for stream in damaged.values():
            data = stream.view(torch.uint8)
            places = torch.randint(0, len(data), (3,))
            data[places] = torch.randint(0, 256, (3,), dtype=torch.uint8)
        found = []
        for _, unpack in PACKERS.values():
            try:
                found.append(unpack(damaged, layout=wanted, grid=grid, dtype=torch.float32))
            except ValueError as error:
                found.append(str(error))
        assert type(found[0]) is type(found[1])
        refused += isinstance(found[0], str)
    assert refused or not wanted.is_sparse
