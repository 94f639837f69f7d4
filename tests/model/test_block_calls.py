"""Recorders find out what a model calls its blocks with, whatever form it expects back."""

from types import SimpleNamespace

import pytest
import torch

from sparse_expansion.model.block_calls import (
    BlockCall,
    BlockRecorder,
    BlockStandIn,
    record_calls,
)


class Block(torch.nn.Module):
    kind = "full"

    def __init__(self, returns_tuple):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.returns_tuple_here = returns_tuple

    def forward(self, hidden, scale, *, shift):
        out = scale * self.linear(hidden) + shift
        return (out, None) if self.returns_tuple_here else out


class Model(torch.nn.Module):
    """An embedding, and blocks whose calls differ by place and by a mark on the block."""

    def __init__(self, returns_tuple, blocks):
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 4)
        self.blocks = torch.nn.ModuleList(blocks)
        self.takes_first = returns_tuple

    def forward(self, input_ids, use_cache):
        assert not use_cache
        hidden = self.embedding(input_ids)
        for place, block in enumerate(self.blocks):
            out = block(hidden, 2.0 + place, shift=torch.ones(1) * len(block.kind))
            hidden = out[0] if self.takes_first else out
        return SimpleNamespace(last_hidden_state=hidden)


@pytest.mark.parametrize("returns_tuple", [False, True])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_recorded_calls_run_the_blocks_as_the_model_does(returns_tuple, num_blocks):
    blocks = [Block(returns_tuple) for _ in range(num_blocks)]
    model = Model(returns_tuple, blocks)
    tokens = torch.randint(0, 10, (2, 5))
    wanted = model(tokens, use_cache=False).last_hidden_state
    recorders = [BlockRecorder(block) for block in blocks]
    model.blocks = torch.nn.ModuleList(recorders)
    found = record_calls(model, recorders, tokens)
    assert found.returns_tuple is returns_tuple
    assert torch.equal(found.hidden, model.embedding(tokens))
    assert [call.args for call in found.calls] == [(2.0 + i,) for i in range(num_blocks)]
    hidden = found.hidden
    for call, block in zip(found.calls, blocks, strict=True):
        hidden = call.run(block, hidden)
    assert torch.equal(hidden, wanted)
    # Nothing of the pass stays in the recorders, and their blocks' weights are not theirs.
    assert all(recorder.recorded is None for recorder in recorders)
    assert not list(torch.nn.ModuleList(recorders).parameters())


@pytest.mark.parametrize("returns_tuple", [False, True])
def test_a_stand_in_returns_what_it_was_given(returns_tuple):
    hidden = torch.randn(2, 5, 4)
    stand_in = BlockStandIn(Block(returns_tuple), hidden, returns_tuple=returns_tuple)
    model = Model(returns_tuple, [stand_in])
    tokens = torch.randint(0, 10, (2, 5))
    assert model(tokens, use_cache=False).last_hidden_state is hidden
    assert stand_in.kind == "full"
    with pytest.raises(AttributeError):
        _ = stand_in.nothing


def test_a_block_may_return_a_tuple_or_its_output():
    x = torch.randn(1, 3, 4)
    bare, first = Block(False), Block(True)
    first.load_state_dict(bare.state_dict())
    call = BlockCall((3.0,), {"shift": 1.0})
    assert torch.equal(call.run(bare, x), call.run(first, x))
    assert torch.equal(call.run(bare, x), 3 * bare.linear(x) + 1)
