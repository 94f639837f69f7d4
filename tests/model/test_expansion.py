"""Routed linears: who is routed where, how often, and what comes out."""

import gc
import weakref

import torch
from transformers import AutoModelForCausalLM

from sparse_expansion.algorithms.clustering import route
from sparse_expansion.config import RoutingConfig
from sparse_expansion.model import routing
from sparse_expansion.model.routing import GroupRouter
from sparse_expansion.types import Router
from tests.model.running import expand


def test_a_linear_equals_its_experts_one_token_at_a_time(expanded):
    model = AutoModelForCausalLM.from_pretrained(expanded)
    linear = model.gpt_neox.layers[1].mlp.dense_4h_to_h
    X = torch.randn(2, 9, linear.in_features)
    experts = route(X.reshape(18, -1), linear.group_router.router())
    slow = torch.stack(
        [
            linear.unpack(int(expert), torch.float32) @ x
            + linear.bias_of(int(expert), torch.float32)
            for x, expert in zip(X.reshape(18, -1), experts, strict=True)
        ]
    ).reshape(2, 9, -1)
    torch.testing.assert_close(linear(X), slow, rtol=1e-5, atol=1e-5)
    assert linear(X[:0]).shape == (0, 9, linear.out_features)


def test_a_group_is_routed_once(tmp_path, llama_folder, text_folder, monkeypatch):
    output = expand(llama_folder, text_folder, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(output)
    calls = []
    monkeypatch.setattr(routing, "route", lambda X, r: calls.append(1) or route(X, r))
    tokens = torch.randint(1, 500, (1, 12))
    with torch.no_grad():
        model(tokens)
    # Three blocks, two groups each (gate and up share theirs).
    assert len(calls) == 6
    with torch.inference_mode():
        model(tokens)
    # Without version counters a change in place could go unseen, so nothing is shared.
    assert len(calls) == 6 + 9


def test_a_block_that_goes_takes_its_experts_with_it(expanded):
    """At once: two blocks of a large model do not fit beside each other."""
    model = AutoModelForCausalLM.from_pretrained(expanded)
    with torch.no_grad():
        model(torch.randint(1, 500, (1, 12)))
    mlp = model.gpt_neox.layers[0].mlp
    experts = [weakref.ref(mlp.dense_h_to_4h.experts[0]), weakref.ref(mlp.dense_4h_to_h.router)]
    gc.disable()
    try:
        del mlp.dense_h_to_4h, mlp.dense_4h_to_h
        assert [each() for each in experts] == [None, None]
    finally:
        gc.enable()


def test_a_change_in_place_is_routed_again(expanded):
    model = AutoModelForCausalLM.from_pretrained(expanded)
    router = model.gpt_neox.layers[0].mlp.dense_h_to_4h.router
    X = torch.randn(40, 64)
    first = router(X)
    assert router(X) is first
    X.neg_()
    assert router(X) is not first


def test_a_router_that_was_loaded_again_routes_anew():
    config = RoutingConfig(num_clusters=3, pca_reduction_factor=2)
    router = GroupRouter(8, config)
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 8, generator=generator)

    def state():
        shapes = {name: value.shape for name, value in router.state_dict().items()}
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    for assign in (False, True, False):
        router.load_state_dict(state(), assign=assign)
        wanted = route(X, Router(router.mean, router.components, router.centroids))
        assert router.router() is router.router()
        assert torch.equal(router(X.clone()).order_T, torch.argsort(wanted, stable=True))
