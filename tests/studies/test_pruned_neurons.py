"""Pruning of chosen neurons alone, against a whole model in memory, and the rankings."""

import json

import pytest
import torch

from sparse_expansion.algorithms import neurons
from sparse_expansion.algorithms.compress import compress_experts
from sparse_expansion.algorithms.hessian import hessian_sum
from sparse_expansion.config import RANKINGS, CompressionConfig, SparsityPattern
from sparse_expansion.model.streaming import ModelShell
from tests.studies.helpers import block_inputs, prune


def test_pruning_one_ranking_by_hand(neox_folder, long_text_folder, windows, capsys):
    """Against a whole model in memory whose rows were replaced in a loop."""
    from transformers import AutoModelForCausalLM

    flags = ["--rankings", "wasserstein,magnitude", "--shares", "0.1,0.5", "--json"]
    assert prune(neox_folder, long_text_folder, *flags) == 0
    result = json.loads(capsys.readouterr().out)
    found = {(row["ranking"], row["share"]): row["perplexity"] for row in result["rows"]}
    model = AutoModelForCausalLM.from_pretrained(neox_folder).eval()
    config = CompressionConfig(sparsity=SparsityPattern.parse("0.9"), block_size=16)

    def perplexity():
        with torch.no_grad():
            scores = model(windows[1]).logits[:, :-1].flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(scores, windows[1][:, 1:].flatten()).exp())

    assert result["perplexity_dense"] == pytest.approx(perplexity(), rel=1e-4)
    shell = ModelShell(neox_folder)
    changes = []
    for layer in range(shell.num_blocks):
        for group in shell.family.groups:
            block, X = block_inputs(neox_folder, windows[0], layer, group.name)
            (linear,) = group.linears
            module = block.get_submodule(linear)
            with torch.no_grad():
                order = neurons.rank("wasserstein", module.weight, module(X), seed=0)
            rows = order[: round(0.1 * len(order))]
            H = hessian_sum(X).sum_DD[None]
            made = compress_experts(module.weight[rows], H, config, None)
            changes.append((model.gpt_neox.layers[layer].get_submodule(linear), rows, made))
    with torch.no_grad():
        for module, rows, made in changes:
            module.weight[rows] = made.weight_KOD[0]
    assert found["wasserstein", 0.1] == pytest.approx(perplexity(), rel=1e-3)
    for ranking in ("wasserstein", "magnitude"):
        assert result["perplexity_dense"] < found[ranking, 0.1] < found[ranking, 0.5]


def test_all_rankings_as_a_table_and_a_plot(neox_folder, text_folder, tmp_path, capsys):
    flags = ["--shares", "0.2", "--plots", str(tmp_path)]
    assert prune(neox_folder, text_folder, *flags) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[2 : 2 + len(RANKINGS)]] == list(RANKINGS)
    assert "20 %" in out and (tmp_path / "pruned-neurons.png").stat().st_size > 5000


@pytest.mark.ray
def test_ray_gives_the_same(neox_folder, text_folder, capsys, ray_flags):
    found = []
    for executor in ([], ray_flags):
        flags = ["--rankings", "random", "--shares", "0.3", "--json", *executor]
        assert prune(neox_folder, text_folder, *flags) == 0
        found.append(json.loads(capsys.readouterr().out)["rows"])
    pruned, pruned_ray = found
    assert [row["perplexity"] for row in pruned_ray] == pytest.approx(
        [row["perplexity"] for row in pruned], rel=1e-6
    )


@pytest.mark.parametrize("ranking", RANKINGS)
def test_ranks_by_hand(ranking):
    # Four neurons: constant, far from normal, wide, with large weights.
    generator = torch.Generator().manual_seed(0)
    Y = torch.randn(400, 4, generator=generator)
    Y[:, 0] = 0.1
    Y[:, 1] = torch.cat([torch.full((396,), -0.1), torch.full((4,), 9.9)])
    Y[:, 2] = 30 * Y[:, 2] - 2
    W = torch.ones(4, 3)
    W[3] = 5
    order = neurons.rank(ranking, W, Y, seed=4).tolist()
    assert sorted(order) == [0, 1, 2, 3]
    first = {"wasserstein": 1, "mean": 2, "variance": 2, "magnitude": 3}
    if ranking in first:
        assert order[0] == first[ranking]
    else:
        assert order == neurons.rank(ranking, W, Y, seed=4).tolist()
    with pytest.raises(ValueError, match="is none of"):
        neurons.rank("size", W, Y, seed=0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rankings", "size"], "--rankings 'size' is none of wasserstein"),
        (["--shares", "0,0.5"], "--shares 0 is outside 0 to 1"),
        (["--shares", ""], "is not a list of numbers"),
        (["--eval-windows", "0"], "must be at least 1"),
    ],
)
def test_bad_input_to_pruning(flags, message, neox_folder, text_folder, capsys):
    assert prune(neox_folder, text_folder, *flags) == 2
    assert message in capsys.readouterr().err


def test_an_expanded_model_is_refused(folders, text_folder, capsys):
    assert prune(folders / "4", text_folder) == 2
    assert "experiments need the dense one" in capsys.readouterr().err
