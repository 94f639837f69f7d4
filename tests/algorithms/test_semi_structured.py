import pytest
import torch

from sparse_expansion.algorithms import semi_structured
from tests.algorithms.test_packing import layout

CUDA = torch.device("cuda")


def takes(shape=(64, 128), sparsity="2:4", dtype=torch.bfloat16, device=CUDA, capability=(8, 0)):
    return semi_structured.takes_semi_structured(layout(shape, sparsity), dtype, device, capability)


def test_what_sparse_tensor_cores_take():
    assert takes() and takes(dtype=torch.float16) and takes(capability=(9, 0))


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (40, 128)},
        {"shape": (64, 96)},
        {"sparsity": "0.5"},
        {"sparsity": "1:4"},
        {"sparsity": "4:8"},
        {"dtype": torch.float32},
        {"device": torch.device("cpu")},
        {"capability": (7, 5)},
    ],
)
def test_what_they_do_not_take(changes):
    assert not takes(**changes)


def test_the_weight_is_converted_where_it_can_be(monkeypatch):
    weight = torch.randn(64, 128).bfloat16()
    assert semi_structured.for_matmul(weight, layout((64, 128), "2:4")) is weight
    monkeypatch.setattr(semi_structured, "takes_semi_structured", lambda *what: True)
    monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", lambda given: given + 1)
    assert torch.equal(semi_structured.for_matmul(weight, layout((64, 128), "2:4")), weight + 1)
