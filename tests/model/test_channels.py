"""Columns in an order of their own: what is stored, and that every way to multiply knows it."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparse_expansion.model.expansion import FLOAT32_TENSORS
from sparse_expansion.model.routing import GroupRouter
from sparse_expansion.model.streaming import ModelShell
from tests.model.running import expand, expanded_linears, logits, stream

PERMUTED = ("--sparsity", "2:4", "--permute-channels")
UNPERMUTED = ("--sparsity", "2:4", "--no-permute-channels")


@pytest.fixture(scope="module")
def permuted(llama_folder, text_folder, tmp_path_factory):
    return expand(llama_folder, text_folder, tmp_path_factory.mktemp("permuted") / "out", *PERMUTED)


def test_stored_columns_are_2_4_in_their_own_order(permuted):
    model = AutoModelForCausalLM.from_pretrained(permuted)
    for linear in expanded_linears(model):
        columns = linear.group_router.columns
        assert columns.dtype == torch.int32
        assert sorted(columns.tolist()) == list(range(linear.in_features))
        assert columns.tolist() != list(range(linear.in_features))
        for expert in range(len(linear.experts)):
            weight = linear.unpack(expert, torch.float32)
            assert torch.equal(weight[:, columns], linear.stored_weight(expert, torch.float32))
            zeros = (weight[:, columns] == 0).view(len(weight), -1, 4).sum(dim=2)
            assert int(zeros.min()) == 2
            assert int((weight == 0).view(len(weight), -1, 4).sum(dim=2).min()) < 2


def test_a_linear_multiplies_inputs_in_their_own_places(permuted):
    """By stored streams, by unpacked weights, with gradients, and as an operator."""
    model = AutoModelForCausalLM.from_pretrained(permuted)
    for linear in expanded_linears(model)[:3]:
        for tokens in (1, 5, 40):
            X = torch.randn(tokens, linear.in_features)
            experts = linear.group_router(X).experts_T
            slow = torch.stack(
                [
                    linear.unpack(int(expert), torch.float32) @ x
                    + linear.bias_of(int(expert), torch.float32)
                    for x, expert in zip(X, experts, strict=True)
                ]
            )
            with torch.no_grad():
                torch.testing.assert_close(linear(X), slow, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(linear.multiply(X, experts), slow, rtol=1e-5, atol=1e-5)
            grown = X.clone().requires_grad_()
            torch.testing.assert_close(linear(grown), slow, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_order_stays_whole_numbers_in_every_dtype(permuted, dtype):
    model = AutoModelForCausalLM.from_pretrained(permuted, dtype=dtype)
    routers = [part for part in model.modules() if isinstance(part, GroupRouter)]
    assert len(routers) > 1
    for router in routers:
        assert router.columns.dtype == torch.int32
        assert router.columns.sort().values.tolist() == list(range(len(router.columns)))
        assert {part.dtype for name, part in router.named_parameters() if name != "columns"} == {
            torch.float32
        }


@pytest.mark.parametrize("flags", ["--sparsity 2:4 --quantize", "--sparsity 0.5"])
def test_tensors_that_stay_in_float32_are_named_and_no_others(
    flags, llama_folder, text_folder, tmp_path
):
    """Older versions of transformers cast all whose name has such a part, integers too."""
    folder = expand(llama_folder, text_folder, tmp_path / "out", *flags.split())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    named = re.compile("|".join(FLOAT32_TENSORS))
    for name, parameter in model.named_parameters():
        assert (parameter.dtype == torch.float32) == bool(named.search(name)), name


def test_the_order_is_saved_again(permuted, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(permuted)
    ids = torch.randint(1, 500, (2, 12))
    wanted = logits(model, ids)
    torch.testing.assert_close(stream(ModelShell(permuted), ids), wanted)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for one, other in zip(expanded_linears(model), expanded_linears(again), strict=True):
        assert torch.equal(one.group_router.columns, other.group_router.columns)


def test_an_order_is_worth_its_while(permuted, llama_folder, text_folder, tmp_path):
    plain = expand(llama_folder, text_folder, tmp_path / "plain", *UNPERMUTED)
    lost = []
    for folder in (permuted, plain):
        files = sorted((folder / "run").rglob("experts-*.json"))
        assert files
        found = [json.loads(file.read_text())["stats"]["relative_error"] for file in files]
        lost.append(sum(sum(errors) for one in found for errors in one.values()))
    assert lost[0] < lost[1]


@pytest.mark.parametrize("flags", [("--sparsity", "0.5", "--permute-channels"), UNPERMUTED])
def test_other_models_have_no_order(flags, llama_folder, text_folder, tmp_path):
    folder = expand(llama_folder, text_folder, tmp_path / "out", *flags)
    names = [name for file in folder.glob("router-*") for name in load_file(file)]
    assert names
    assert not [name for name in names if name.endswith("columns")]


def test_one_expert_stays_what_other_programs_know(llama_folder, text_folder, tmp_path):
    folder = expand(llama_folder, text_folder, tmp_path / "out", *PERMUTED, "--num_clusters", "1")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["compression"]["permute_channels"] is False
