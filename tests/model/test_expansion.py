"""The expanded model in transformers: loading, routing, generation, saving again."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparse_expansion
from sparse_expansion.algorithms import matvec
from sparse_expansion.algorithms.clustering import route
from sparse_expansion.algorithms.kernels import can_spread
from sparse_expansion.cli import main
from sparse_expansion.config import RoutingConfig
from sparse_expansion.model import expansion
from sparse_expansion.model.expansion import ExpandedLinear, GroupRouter, SparseExpansionConfig
from sparse_expansion.model.streaming import ModelShell
from sparse_expansion.types import Router
from tests import tiny
from tests.model.test_streaming import stream

FLAGS = (
    "--num_clusters 3 --dataset-size 6 --seqlen 32 --PCA_reduction_factor 4 --block-size 16 "
    "--experts-per-unit 2"
).split()


def expand(model: Path, text: Path, output: Path, *flags: str) -> Path:
    arguments = ["expand", "--model", str(model), "--dataset", str(text), "--output", str(output)]
    assert main([*arguments, *FLAGS, *flags]) == 0
    return output


@pytest.fixture(scope="module")
def expanded(tmp_path_factory, neox_folder, text_folder):
    return expand(neox_folder, text_folder, tmp_path_factory.mktemp("expanded") / "m")


@pytest.mark.parametrize("model_type", sorted(tiny.CONFIGS))
def test_every_family_expands_loads_and_generates(model_type, tmp_path, tokenizer, text_folder):
    folder = tiny.save_random(model_type, tmp_path / "dense", tokenizer)
    output = expand(folder, text_folder, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(output)
    tokens = torch.randint(1, 500, (2, 24))
    with torch.no_grad():
        logits = model(tokens).logits
    torch.testing.assert_close(logits, stream(ModelShell(output), tokens), rtol=1e-4, atol=1e-4)
    generated = model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert generated.shape == (2, 28)
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, ExpandedLinear)
    }
    wanted = {
        name.rsplit(".", 1)[-1]
        for group in ModelShell(folder).family.groups
        for name in group.linears
    }
    assert names == wanted


def test_loaded_logits_equal_those_before_saving(expanded, tmp_path):
    tokens = torch.randint(1, 500, (3, 30))
    model = AutoModelForCausalLM.from_pretrained(expanded)
    with torch.no_grad():
        before = model(tokens).logits
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, before)


def test_dense_weights_are_gone(expanded):
    index = json.loads((expanded / "model.safetensors.index.json").read_text())
    names = list(index["weight_map"])
    assert not [name for name in names if name.endswith("dense_h_to_4h.weight")]
    assert "gpt_neox.layers.0.mlp.dense_h_to_4h.bias" in names
    assert all((expanded / file).is_file() for file in index["weight_map"].values())
    config = json.loads((expanded / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "sparse_expansion"
    AutoTokenizer.from_pretrained(expanded)


def test_a_linear_equals_its_experts_one_token_at_a_time(expanded):
    model = AutoModelForCausalLM.from_pretrained(expanded)
    linear = model.gpt_neox.layers[1].mlp.dense_4h_to_h
    X = torch.randn(2, 9, linear.in_features)
    experts = route(X.reshape(18, -1), linear.group_router.router())
    slow = torch.stack(
        [
            linear.unpack(int(expert), torch.float32) @ x + linear.bias
            for x, expert in zip(X.reshape(18, -1), experts, strict=True)
        ]
    ).reshape(2, 9, -1)
    torch.testing.assert_close(linear(X), slow, rtol=1e-5, atol=1e-5)
    assert linear(X[:0]).shape == (0, 9, linear.out_features)


def test_a_group_is_routed_once(tmp_path, llama_folder, text_folder, monkeypatch):
    output = expand(llama_folder, text_folder, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(output)
    calls = []
    monkeypatch.setattr(expansion, "route", lambda X, r: calls.append(1) or route(X, r))
    tokens = torch.randint(1, 500, (1, 12))
    with torch.no_grad():
        model(tokens)
    # Three blocks, two groups each (gate and up share theirs).
    assert len(calls) == 6
    with torch.inference_mode():
        model(tokens)
    # Without version counters a change in place could go unseen, so nothing is shared.
    assert len(calls) == 6 + 9


def test_a_change_in_place_is_routed_again(expanded):
    model = AutoModelForCausalLM.from_pretrained(expanded)
    router = model.gpt_neox.layers[0].mlp.dense_h_to_4h.router
    X = torch.randn(40, 64)
    first = router(X)
    assert router(X) is first
    X.neg_()
    assert router(X) is not first


def test_generation_with_cache_batches_and_padding(expanded):
    tokenizer = AutoTokenizer.from_pretrained(expanded, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(expanded)
    prompts = ["The for statement is used", "A class definition defines a class object and"]
    alone = [
        model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)[
            0, -8:
        ]
        for prompt in prompts
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, -8:]
    uncached = model.generate(**batch, max_new_tokens=8, do_sample=False, use_cache=False)[:, -8:]
    assert torch.equal(together, uncached)
    assert torch.equal(together, torch.stack(alone))


def test_bf16_load_keeps_routers_in_float32(expanded):
    model = AutoModelForCausalLM.from_pretrained(expanded, dtype=torch.bfloat16)
    linear = model.gpt_neox.layers[0].mlp.dense_h_to_4h
    assert linear.router.centroids.dtype == torch.float32
    assert linear.experts[0].values.dtype == torch.bfloat16
    full = AutoModelForCausalLM.from_pretrained(expanded)
    wanted = full.gpt_neox.layers[0].mlp.dense_h_to_4h.router
    assert torch.equal(linear.router.centroids, wanted.centroids)
    with torch.no_grad():
        assert model(torch.ones(1, 5, dtype=torch.int64)).logits.dtype == torch.bfloat16


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


@pytest.mark.parametrize(
    "flags",
    [
        ["--sparsity", "2:4"],
        ["--sparsity", "(2, 4)", "--quantize", "--bits", "4"],
        ["--sparsity", "0", "--quantize", "--bits", "3", "--group-size", "20", "--act-order"],
        ["--sparsity", "0.7", "--no_PCA", "--calibration-inputs", "dense"],
        ["--sparsity", "0.5", "--dtype", "bfloat16"],
    ],
)
def test_modes_load_and_equal_the_streamed_model(flags, tmp_path, llama_folder, text_folder):
    output = expand(llama_folder, text_folder, tmp_path / "out", *flags)
    model = AutoModelForCausalLM.from_pretrained(output)
    tokens = torch.randint(1, 500, (1, 20))
    with torch.no_grad():
        logits = model(tokens).logits
    tolerance = 5e-2 if "bfloat16" in flags else 1e-4
    torch.testing.assert_close(
        logits, stream(ModelShell(output), tokens), rtol=tolerance, atol=tolerance
    )


def test_truncated_checkpoint_is_not_loaded(tmp_path, llama_folder, text_folder, capsys):
    output = expand(llama_folder, text_folder, tmp_path / "out")
    file = next(output.glob("experts-001-*"))
    file.write_bytes(file.read_bytes()[:-7])
    assert (
        main(["evaluate", "--model", str(output), "--dataset", str(text_folder), "--seqlen", "32"])
        == 2
    )
    assert file.name in capsys.readouterr().err


def test_config_from_a_newer_format_is_refused():
    with pytest.raises(ValueError, match="format_version 99"):
        SparseExpansionConfig(format_version=99)
    with pytest.raises(ValueError, match="expert_residency"):
        SparseExpansionConfig(expert_residency="cloud")
    assert "SparseExpansionConfig" in sparse_expansion.__all__


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
