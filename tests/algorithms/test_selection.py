"""The smallest, by PyTorch and by Triton's kernels in their interpreter, against a sort."""

import pytest
import torch

from sparse_expansion.algorithms import selection
from sparse_expansion.algorithms.selection import smallest, smallest_mask
from tests.tiny import KERNEL_DEVICE

triton_select = pytest.importorskip("sparse_expansion.algorithms.kernels.triton_select")


def by_triton(bits, count):
    return triton_select.smallest(bits.to(KERNEL_DEVICE), count).cpu()


FINDERS = {"pytorch": smallest, "triton": by_triton}


def values(kind, shape):
    if kind == "ties":
        return torch.randint(0, 4, shape).float()
    if kind == "wide":
        return torch.randn(shape).square() * 10.0 ** torch.randint(-44, 38, shape)
    return torch.rand(shape)


@pytest.mark.parametrize("finder", FINDERS)
@pytest.mark.parametrize("kind", ["plain", "ties", "wide"])
@pytest.mark.parametrize("shape", [(1, 2), (3, 257), (2, 9001)])
def test_against_a_sort(shape, kind, finder, monkeypatch):
    found = values(kind, shape)
    found[0, -1] = 0.0
    found[-1, 0] = float("inf")
    monkeypatch.setattr(selection, "smallest", FINDERS[finder])
    order = torch.argsort(found, dim=1, stable=True)
    for count in {1, 2, shape[1] // 2, shape[1] - 1} & set(range(1, shape[1])):
        wanted = torch.zeros(shape, dtype=torch.bool).scatter_(1, order[:, :count], True)
        assert torch.equal(smallest_mask(found, count), wanted)


def test_numbers_with_all_their_bits():
    numbers = torch.tensor([[7, 0, 300, 2**31 - 1], [5, 5, 5, 1 << 24]], dtype=torch.int32)
    order = torch.tensor([[1, 0, 2, 3], [0, 1, 2, 3]])
    for finder in FINDERS.values():
        for count in range(1, 5):
            wanted = torch.zeros(2, 4, dtype=torch.bool).scatter_(1, order[:, :count], True)
            assert torch.equal(finder(numbers, count), wanted)


def test_none_and_all():
    assert smallest_mask(torch.ones(2, 3), 0).sum() == 0
    assert smallest_mask(torch.ones(2, 3), 3).sum() == 6
    for count in (-1, 4):
        with pytest.raises(ValueError, match="is outside 0 to 3"):
            smallest_mask(torch.ones(2, 3), count)


def test_a_gpu_with_triton_takes_the_kernel():
    assert selection.triton_smallest() is triton_select.smallest
