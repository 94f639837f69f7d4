import os

import pytest
import torch

from sparse_expansion.data.activations import (
    ActivationBuffers,
    AllInputsSeenError,
    AttentionOutputs,
    CapturedRows,
    GroupInputs,
    copy_outside_heap,
)
from sparse_expansion.model.families import LinearGroup


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(4, 6)
        self.b = torch.nn.Linear(6, 4)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def test_group_inputs_are_what_the_linears_get():
    block = Block()
    x = torch.randn(2, 3, 4)
    with GroupInputs(block, (LinearGroup(("a",)), LinearGroup(("b",)))) as seen:
        block(x)
    assert torch.equal(seen.inputs["a"], x.reshape(6, 4))
    assert torch.equal(seen.inputs["b"], torch.relu(block.a(x)).reshape(6, 6))
    assert not block.a._forward_pre_hooks


def test_a_stopped_block_has_seen_all_but_its_last_product():
    block = Block()
    groups = LinearGroup(("a",)), LinearGroup(("b",))
    block.b.register_forward_hook(lambda *args: pytest.fail("multiplied"))
    with GroupInputs(block, groups, stop=True) as seen, pytest.raises(AllInputsSeenError):
        block(torch.randn(2, 3, 4))
    assert list(seen.inputs) == ["a", "b"]


class Attention(torch.nn.Module):
    """Returns its output first in a tuple, or by itself."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x, *, scale):
        return (x * scale, None) if self.form == "tuple" else x * scale


class Attending(torch.nn.Module):
    def __init__(self, form):
        super().__init__()
        self.attention, self.form = Attention(form), form

    def forward(self, x):
        out = self.attention(x, scale=2.0)
        if self.form == "tuple":
            out, _ = out
        return x + out


@pytest.mark.parametrize("form", ["tuple", "tensor"])
def test_attention_is_put_out_again_without_being_run(form):
    block, x = Attending(form), torch.randn(2, 3, 4)
    attention = block.attention
    with AttentionOutputs(block, "attention", form=form, replays=False) as seen:
        first = block(x)
    assert torch.equal(seen.output, 2 * x)
    assert not attention._forward_hooks
    attention.register_forward_hook(lambda *args: pytest.fail("run"))
    with AttentionOutputs(block, "attention", form=form, replays=True) as kept:
        kept.output = seen.output
        assert torch.equal(block(x), first)
    assert block.attention is attention


def test_buffers_spill_beyond_the_budget_and_leave_nothing_behind(tmp_path):
    buffers = ActivationBuffers(memory_bytes=100, scratch=tmp_path)
    small = buffers.allocate((5, 5), torch.float32)
    large = buffers.allocate((8, 8), torch.bfloat16)
    assert (buffers.bytes_in_memory, buffers.bytes_spilled) == (100, 128)
    large.fill_(3)
    assert float(large.float().sum()) == 192
    assert os.listdir(tmp_path) == []
    buffers.release(small)
    buffers.release(large)
    assert (buffers.bytes_in_memory, buffers.bytes_spilled) == (0, 0)
    buffers.allocate((5, 5), torch.float32)
    assert buffers.bytes_spilled == 0


def test_rows_of_batches_are_put_together_and_given_back():
    """Of all tokens in their places; of some of them one after another, however many there are."""
    buffers = ActivationBuffers(memory_bytes=1 << 20)
    rows = CapturedRows(buffers, 5)
    batches = torch.randn(5, 3).split([2, 3])
    for part, place in zip(batches, (slice(0, 2), slice(2, 5)), strict=True):
        rows.put("all", part, place)
        rows.put("some", part[1:], None)
    rows.put("once", batches[0], None)
    found = rows.take()
    assert torch.equal(found["all"], torch.cat(batches))
    assert torch.equal(found["some"], torch.cat([part[1:] for part in batches]))
    assert torch.equal(found["once"], batches[0])
    assert buffers.bytes_in_memory == 4 * 3 * (5 + 3 + 2)
    for tensor in found.values():
        buffers.release(tensor)
    assert buffers.bytes_in_memory == 0


def test_group_names():
    assert LinearGroup(("mlp.gate_proj", "mlp.up_proj")).name == "mlp.gate_proj+up_proj"
    with pytest.raises(AttributeError):
        LinearGroup(("x",)).name = "y"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_outside_the_heap_is_equal_and_its_own(dtype):
    original = torch.randn(7, 5).to(dtype)
    copy = copy_outside_heap(original)
    assert torch.equal(copy, original) and copy.dtype == dtype
    copy[0, 0] = 9
    assert original[0, 0] != 9
    assert copy_outside_heap(torch.empty(0, 5)).shape == (0, 5)
