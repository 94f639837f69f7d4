"""Text of which most clusters see nothing, and weights of which nothing is left."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.model.running import expand


@pytest.fixture(scope="module")
def one_block(tmp_path_factory, tokenizer):
    """A Llama with one block: 48 experts of more take long."""
    folder = tmp_path_factory.mktemp("one") / "dense"
    return tiny.save_random("llama", folder, tokenizer, num_hidden_layers=1)


@pytest.fixture(scope="module")
def repeated(tmp_path_factory):
    """Two tokens in turn: far fewer kinds of input than clusters."""
    folder = tmp_path_factory.mktemp("repeated")
    for part in ("train", "test"):
        (folder / f"{part}.txt").write_text("ab " * 4000)
    return folder


@pytest.mark.parametrize(
    "flags",
    [
        ["--preset", "best"],
        ["--preset", "paper", "--calibration-inputs", "dense", "--balance", "0.5"],
        ["--preset", "best", "--sparsity", "2:4", "--quantize"],
        ["--preset", "best", "--sparsity", "1"],
    ],
)
def test_experts_without_a_token_are_experts_all_the_same(flags, tmp_path, one_block, repeated):
    output = expand(one_block, repeated, tmp_path / "out", "--num_clusters", "48", *flags)
    model = AutoModelForCausalLM.from_pretrained(output)
    linear = model.model.layers[0].mlp.down_proj
    assert len(linear.experts) == 48
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.randint(1, 500, (2, 30))).logits).all())
        for expert in range(48):
            assert bool(torch.isfinite(linear.unpack(expert, torch.float32)).all())


@pytest.mark.parametrize("flags", [[], ["--pruner", "sparsegpt", "--act-order"]])
def test_no_zeros_and_no_grid_change_no_weight(flags, tmp_path, one_block, repeated):
    output = expand(one_block, repeated, tmp_path / "out", "--sparsity", "0", *flags)
    dense = AutoModelForCausalLM.from_pretrained(one_block)
    expanded = AutoModelForCausalLM.from_pretrained(output)
    for wanted, found in zip(dense.model.layers, expanded.model.layers, strict=True):
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = getattr(wanted.mlp, name).weight
            linear = getattr(found.mlp, name)
            for expert in range(len(linear.experts)):
                assert torch.equal(linear.unpack(expert, weight.dtype), weight)
