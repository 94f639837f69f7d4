"""Experts that keep different numbers of weights: what is stored, loaded, trained and counted."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparse_expansion import evaluate
from sparse_expansion.config import SparsityPattern
from sparse_expansion.model.streaming import ModelShell
from sparse_expansion.report.experts import finished_experts
from sparse_expansion.store import Store
from tests.model.running import expand, expanded_linears, logits, stream

SHARED = ("--sparsity", "0.6", "--expert-sparsity", "measured")


@pytest.fixture(scope="module")
def shared(llama_folder, text_folder, tmp_path_factory):
    return expand(llama_folder, text_folder, tmp_path_factory.mktemp("shared") / "out", *SHARED)


def shares_of(folder):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config["compression"]["expert_sparsity"]


def test_every_expert_has_the_zeros_of_its_share(shared):
    model = AutoModelForCausalLM.from_pretrained(shared)
    for block, shares in zip(model.model.layers, shares_of(shared), strict=True):
        assert set(shares) == {"mlp.gate_proj", "mlp.down_proj"}
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(block.mlp, name)
            own = shares["mlp.down_proj" if name == "down_proj" else "mlp.gate_proj"]
            assert len(set(own)) > 1
            for expert, share in enumerate(own):
                weight = linear.unpack(expert, torch.float32)
                kept = SparsityPattern(fraction=share).num_kept(*weight.shape, 16)
                assert linear.layouts[expert].num_kept == kept
                assert int((weight != 0).sum()) <= kept
                assert linear.tensors(expert)["values"].numel() == kept
            assert torch.allclose(linear.group_router.sparsity, torch.tensor(own))


def test_a_token_costs_what_was_asked_for(shared):
    """On the tokens that the router was fitted on: all of them here."""
    rows = finished_experts(Store(str(shared)))
    tokens = {(row.layer, row.linear, row.expert): row.tokens for row in rows}
    zeros = {(row.layer, row.linear, row.expert): row.sparsity for row in rows}
    asked = json.loads((shared / "run" / "allocation.json").read_text())["layer_sparsity"]
    for layer, groups in enumerate(shares_of(shared)):
        for first, shares in groups.items():
            counts = [tokens[layer, first, expert] for expert in range(len(shares))]
            assert [zeros[layer, first, expert] for expert in range(len(shares))] == shares
            mean = sum(n * s for n, s in zip(counts, shares, strict=True)) / sum(counts)
            assert mean == pytest.approx(asked[layer], abs=1e-3)


def test_it_is_loaded_saved_and_streamed(shared, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(shared)
    ids = torch.randint(1, 500, (2, 12))
    wanted = logits(model, ids)
    torch.testing.assert_close(stream(ModelShell(shared), ids), wanted)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, ids), wanted)
    assert [one.layouts for one in expanded_linears(again)] == [
        one.layouts for one in expanded_linears(model)
    ]


def test_refined_experts_keep_their_shares(llama_folder, text_folder, tmp_path):
    folder = expand(llama_folder, text_folder, tmp_path / "out", *SHARED, "--finetune", "1")
    model = AutoModelForCausalLM.from_pretrained(folder)
    counts = {layout.num_kept for one in expanded_linears(model) for layout in one.layouts}
    assert len(counts) > 3


def test_quantized_experts_have_shares_too(llama_folder, text_folder, tmp_path):
    folder = expand(llama_folder, text_folder, tmp_path / "out", *SHARED, "--quantize")
    ids = torch.randint(1, 500, (2, 12))
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(stream(ModelShell(folder), ids), logits(model, ids))
    assert any(shares_of(folder))


@pytest.mark.parametrize(
    "flags",
    [
        ("--sparsity", "2:4", "--expert-sparsity", "measured"),
        ("--sparsity", "0", "--expert-sparsity", "measured"),
        (*SHARED, "--num_clusters", "1"),
        (*SHARED, "--clustering", "random"),
        ("--sparsity", "0.6", "--expert-sparsity", "uniform"),
    ],
)
def test_others_are_uniform(flags, llama_folder, text_folder, tmp_path):
    folder = expand(llama_folder, text_folder, tmp_path / "out", *flags)
    assert shares_of(folder) == "uniform"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert all(len(set(one.layouts)) == 1 for one in expanded_linears(model))


def test_evaluation_says_what_a_text_costs(shared, text_folder):
    """Weights that its tokens are multiplied with, by the model's own routing."""
    result = evaluate(shared, text_folder, seqlen=32, eval_windows=4).metrics
    found = result["routed"]["kept_share"]
    assert 0.3 < found < 0.5 and found != pytest.approx(0.4, abs=1e-6)
