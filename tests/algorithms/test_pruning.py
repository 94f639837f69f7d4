"""Pruners that score every weight by itself: masks by hand, counts, and the error they report."""

import json

import numpy as np
import pytest
import torch

from sparse_expansion.algorithms.pruning import score, score_mask
from sparse_expansion.algorithms.sweep import compress_experts
from sparse_expansion.cli import main
from sparse_expansion.config import CompressionConfig, SparsityPattern
from tests.tiny import SMALL_RUN

W = torch.tensor([[4.0, -1.0, 2.0, 3.0], [0.5, 6.0, -5.0, 1.0]])
# Norms of the inputs: 1, 10, 2, 1.
H = torch.diag(torch.tensor([1.0, 100.0, 4.0, 1.0])) + 0.5 * (1 - torch.eye(4))


def pattern(text):
    return SparsityPattern.parse(text)


def test_scores_by_hand():
    assert torch.equal(score("magnitude", W, H), W.abs())
    wanted = torch.tensor([[4.0, 10.0, 4.0, 3.0], [0.5, 60.0, 10.0, 1.0]])
    assert torch.equal(score("wanda", W, H), wanted)


def test_masks_by_hand():
    magnitude = score_mask(W.abs(), pattern("0.5"), 128, by_row=False)
    assert magnitude.tolist() == [[False, True, True, False], [True, False, False, True]]
    # The whole matrix for magnitude: one row may lose more than another.
    skewed = score_mask(W.abs() * torch.tensor([[1.0], [9.0]]), pattern("0.5"), 128, by_row=False)
    assert skewed.sum(dim=1).tolist() == [4, 0]
    wanda = score("wanda", W, H)
    by_row = score_mask(wanda, pattern("0.5"), 128, by_row=True)
    # 4 and 4 are equal in the first row: the first of them goes.
    assert by_row.tolist() == [[True, False, False, True], [True, False, False, True]]
    n_m = score_mask(wanda, pattern("1:2"), 128, by_row=True)
    assert n_m.tolist() == [[True, False, False, True], [True, False, False, True]]


def test_a_count_that_does_not_divide_takes_the_cheapest_next_weights():
    # 3 of 8: one of every row, and one more where the next one is worth least.
    found = score_mask(W.abs(), pattern("0.375"), 128, by_row=True)
    assert found.tolist() == [[False, True, False, False], [True, False, False, True]]


@pytest.mark.parametrize("pruner", ["magnitude", "wanda"])
@pytest.mark.parametrize("sparsity", ["0", "0.3", "0.7", "1", "2:4", "3:4"])
def test_counts_weights_and_error(pruner, sparsity):
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(7, 26, generator=generator)
    X = torch.randn(2, 40, 26, generator=generator) * torch.linspace(0.1, 3, 26)
    hessians = X.transpose(1, 2) @ X
    config = CompressionConfig(sparsity=pattern(sparsity), pruner=pruner, block_size=8)
    made = compress_experts(dense, hessians, config, None)
    for k in range(2):
        kept = made.kept_KOD[k]
        assert int(kept.sum()) == config.sparsity.num_kept(7, 26, 8)
        assert torch.equal(made.weight_KOD[k], torch.where(kept, dense, 0.0))
        worth = score(pruner, dense, hessians[k])
        if sparsity == "0.7":
            groups = worth if pruner == "wanda" else worth.reshape(1, -1)
            for values, mask in zip(groups, kept.reshape(groups.shape), strict=True):
                assert values[~mask].max() <= values[mask].min()
        outputs = X[k].double() @ dense.double().T
        lost = outputs - X[k].double() @ made.weight_KOD[k].double().T
        wanted = float(lost.square().sum() / outputs.square().sum())
        assert made.relative_error_K[k] == pytest.approx(wanted, rel=1e-4, abs=1e-7)


def test_pruners_that_make_up_for_what_they_remove_lose_least(neox_folder, text_folder, capsys):
    where = ["--model", str(neox_folder), "--dataset", str(text_folder), "--sparsity", "0.7"]
    flags = [*SMALL_RUN, "--num_clusters", "1", "--dataset-size", "60", "--eval-windows", "6"]
    found = {}
    for pruner in ("admm", "sparsegpt", "wanda", "magnitude"):
        assert main(["run", *where, *flags, "--pruner", pruner, "--json"]) == 0
        found[pruner] = json.loads(capsys.readouterr().out)
    perplexity = [found[name]["perplexity_expanded"] for name in found]
    assert perplexity == sorted(perplexity)
    assert found["wanda"]["config"]["compression"]["pruner"] == "wanda"
    assert found["wanda"]["raised_damping"] == 0
    # Equal work per token: the same number of weights is kept.
    assert len({metrics["mlp_flops_per_token"]["experts"] for metrics in found.values()}) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pruner", "wanda", "--quantize"], "pruner wanda leaves kept weights as they are"),
        (["--pruner", "magnitude", "--act-order"], "use --pruner sparsegpt"),
        (["--pruner", "alps"], "invalid choice"),
        (["--pruner", "admm", "--solver-iterations", "0"], "is outside 1 to 1000"),
    ],
)
def test_bad_input(flags, message, neox_folder, text_folder, capsys):
    where = ["--model", str(neox_folder), "--dataset", str(text_folder), "--output", "nowhere"]
    assert main(["expand", *where, *flags]) == 2
    assert message in capsys.readouterr().err


def test_saved_experts_are_the_dense_weights_where_kept(neox_folder, text_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    import sparse_expansion

    where = ["--model", str(neox_folder), "--dataset", str(text_folder), "--pruner", "wanda"]
    assert main(["expand", *where, "--output", str(tmp_path / "o"), *SMALL_RUN]) == 0
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    dense = AutoModelForCausalLM.from_pretrained(neox_folder)
    linear = made.gpt_neox.layers[1].mlp.dense_h_to_4h
    assert isinstance(linear, sparse_expansion.ExpandedLinear)
    weight = dense.gpt_neox.layers[1].mlp.dense_h_to_4h.weight.detach()
    for expert in range(4):
        found = linear.unpack(expert, torch.float32)
        assert torch.equal(found, torch.where(found != 0, weight, 0.0))
        assert np.isclose(float((found != 0).float().mean()), 0.5, atol=0.01)
