"""What the cache of experts keeps, in which form, and for how long."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparse_expansion.algorithms import matvec
from sparse_expansion.algorithms.kernels.vectors import can_spread
from sparse_expansion.model.expansion import ExpandedLinear


def test_cache_of_dense_experts_is_bounded(expanded):
    model = AutoModelForCausalLM.from_pretrained(expanded)
    one = 64 * 256 * 4
    model.expert_cache.max_bytes = 2 * one
    with torch.no_grad():
        model(torch.randint(1, 500, (2, 30)))
    assert 0 < model.expert_cache.num_bytes <= 2 * one
    model.expert_cache.clear()
    model.expert_cache.max_bytes = None
    with torch.no_grad():
        model(torch.randint(1, 500, (4, 64)))
    assert model.expert_cache.num_bytes > 2 * one


@pytest.mark.skipif(not can_spread(), reason="this CPU has neither AVX-512 VBMI2 nor AVX2")
def test_a_single_token_is_multiplied_with_the_stored_streams(expanded, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(expanded)
    token = torch.tensor([[7]])
    with torch.no_grad():
        dense = model(token).logits
        assert model.expert_cache.num_bytes >= 64 * 256 * 4
        model.expert_cache.clear()
        monkeypatch.setattr(matvec, "MIN_WEIGHTS", 1)
        stored = model(token).logits
    assert 0 < model.expert_cache.num_bytes < 64 * 256 * 4
    torch.testing.assert_close(stored, dense, rtol=1e-4, atol=1e-4)
    # Moved or loaded anew: what was made of the old tensors is not used again.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        for linear in (m for m in model.modules() if isinstance(m, ExpandedLinear)):
            for one in linear.experts:
                one.values.zero_()
        assert not torch.equal(model(token).logits, stored)


@pytest.mark.skipif(not can_spread(), reason="this CPU has neither AVX-512 VBMI2 nor AVX2")
@pytest.mark.parametrize(("count", "is_stored"), [(2, True), (8, True), (9, False)])
def test_a_few_tokens_are_multiplied_with_the_stored_streams(
    count, is_stored, expanded, monkeypatch
):
    model = AutoModelForCausalLM.from_pretrained(expanded)
    tokens = torch.randint(1, 500, (1, count))
    with torch.no_grad():
        dense = model(tokens).logits
        model.expert_cache.clear()
        monkeypatch.setattr(matvec, "MIN_WEIGHTS", 1)
        found = model(tokens).logits
        assert (model.expert_cache.num_bytes < 64 * 256 * 4) == is_stored
        torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-4)
        # Experts that stay unpacked are used as they are.
        model.expert_cache.clear()
        model.expert_cache.max_bytes = None
        assert torch.equal(model(tokens).logits, dense)
        assert model.expert_cache.num_bytes >= 64 * 256 * 4


def test_the_least_recent_expert_is_evicted_first(expanded):
    model = AutoModelForCausalLM.from_pretrained(expanded)
    cache = model.expert_cache
    linear = model.gpt_neox.layers[0].mlp.dense_h_to_4h
    one = 64 * 256 * 4
    cache.clear()
    cache.max_bytes = 2 * one
    first, second = (cache.dense(linear, k, torch.float32) for k in (0, 1))
    assert cache.dense(linear, 0, torch.float32) is first
    third = cache.dense(linear, 2, torch.float32)
    assert cache.num_bytes == 2 * one
    assert cache.dense(linear, 0, torch.float32) is first
    assert cache.dense(linear, 2, torch.float32) is third
    again = cache.dense(linear, 1, torch.float32)
    assert again is not second and torch.equal(again, second)
    # Another dtype is another weight, which replaces the first.
    assert cache.dense(linear, 1, torch.bfloat16).dtype == torch.bfloat16
    assert cache.num_bytes == one + one // 2


def test_a_copied_model_shares_no_entries(expanded):
    model = AutoModelForCausalLM.from_pretrained(expanded)
    with torch.no_grad():
        model(torch.randint(1, 500, (1, 12)))
    copied = copy.deepcopy(model.expert_cache)
    assert copied.max_bytes == model.expert_cache.max_bytes
    assert copied.num_bytes == 0 < model.expert_cache.num_bytes


def test_experts_are_not_read_for_their_biases_alone(expanded, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(expanded)
    linear = next(m for m in model.modules() if isinstance(m, ExpandedLinear))
    X = torch.randn(1, 40, linear.in_features)
    with torch.no_grad():
        before = linear(X)
        reads = []
        monkeypatch.setattr(
            ExpandedLinear, "tensors", lambda self, k: reads.append(k) or self.experts[k].tensors()
        )
        assert torch.equal(linear(X), before) and not reads
        for one in linear.experts:
            one.bias += 1
        torch.testing.assert_close(linear(X), before + 1)
    assert reads
