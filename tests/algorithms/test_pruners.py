"""Pruners: what each is worth by hand, counts, the errors they report, and how one is added."""

import dataclasses
import json
import pkgutil
import sys

import numpy as np
import pytest
import torch

import sparse_expansion.algorithms.pruners as package
from sparse_expansion.algorithms.compress import compress_experts
from sparse_expansion.algorithms.pruners import magnitude, wanda
from sparse_expansion.algorithms.pruners.base import Pruner
from sparse_expansion.algorithms.pruners.registry import pruner_of
from sparse_expansion.cli import main
from sparse_expansion.config import PRUNERS, CompressionConfig, PrunerTraits, SparsityPattern
from tests.tiny import SMALL_RUN

W = torch.tensor([[4.0, -1.0, 2.0, 3.0], [0.5, 6.0, -5.0, 1.0]])
# Norms of the inputs: 1, 10, 2, 1.
H = torch.diag(torch.tensor([1.0, 100.0, 4.0, 1.0])) + 0.5 * (1 - torch.eye(4))
SCORES = {"magnitude": magnitude.score, "wanda": wanda.score}
SHARED = {"base", "registry", "scores"}


def pattern(text):
    return SparsityPattern.parse(text)


def test_scores_by_hand():
    assert torch.equal(magnitude.score(W, H), W.abs())
    wanted = torch.tensor([[4.0, 10.0, 4.0, 3.0], [0.5, 60.0, 10.0, 1.0]])
    assert torch.equal(wanda.score(W, H), wanted)


def test_every_pruner_has_a_record_and_every_record_a_pruner():
    modules = {found.name for found in pkgutil.iter_modules(package.__path__)}
    assert modules - SHARED == set(PRUNERS)
    settings = {field.name for field in dataclasses.fields(CompressionConfig)}
    for name, traits in PRUNERS.items():
        assert traits.help and traits.help[0].islower() and not traits.help.endswith(".")
        assert isinstance(traits.takes_grid, bool) and set(traits.defaults) <= settings
        pruner = pruner_of(name)
        assert isinstance(pruner, Pruner) and isinstance(pruner.updates_weights, bool)
        # What is rounded is no longer what it was.
        assert pruner.updates_weights or not traits.takes_grid
        config = CompressionConfig(pruner=name, **traits.defaults)
        assert isinstance(pruner.needs_factor(config), bool)
        assert pruner.flops(6, 8, config) > 0 and pruner.extra_bytes(8, 24) >= 0
        assert callable(pruner.solve)


@pytest.mark.parametrize("name", PRUNERS)
def test_who_takes_grids_updates_weights(name):
    """What settings go by, which do not load the pruner."""
    assert pruner_of(name).updates_weights is PRUNERS[name].takes_grid


def test_a_name_that_is_none_is_refused():
    with pytest.raises(ValueError, match="'base' is none of sparsegpt, admm, wanda, magnitude"):
        pruner_of("base")


def test_operations_and_bytes_by_hand():
    """Six outputs and eight inputs; a product of 8 x 8 with 8 x 6 takes 768 operations."""

    def flops(name, **settings):
        config = CompressionConfig(pruner=name, block_size=4, **settings)
        return pruner_of(name).flops(6, 8, config)

    # 8^3 / 3 + 6 x 8 x (8 + 4)
    sweep = 512 / 3 + 576
    assert flops("sparsegpt") == flops("sparsegpt", bits=4) == pytest.approx(sweep)
    # An inverse; five products in six iterations, and the error.
    solved = 512 + 6 * 768
    assert flops("admm", solver_iterations=6) == pytest.approx(solved)
    assert flops("admm", solver_iterations=6, bits=4) == pytest.approx(solved + sweep)
    assert flops("wanda") == flops("magnitude") == 768
    # An inverse, and four arrays like the weight, in float32.
    assert pruner_of("admm").extra_bytes(8, 24) == 4 * 64 + 4 * 4 * 24
    assert {pruner_of(name).extra_bytes(8, 24) for name in PRUNERS if name != "admm"} == {0}


def test_what_needs_a_factor():
    def needs(name, **settings):
        return pruner_of(name).needs_factor(CompressionConfig(pruner=name, **settings))

    assert needs("sparsegpt") and needs("sparsegpt", bits=4)
    assert needs("admm", bits=4) and not needs("admm")
    assert not needs("wanda") and not needs("magnitude")


RANDOM_SCORES = """
import torch
from sparse_expansion.algorithms.pruners.scores import pruner_by_score


def score(W_OD, H_DD):
    found_OD = torch.rand(W_OD.shape, generator=torch.Generator().manual_seed(0))
    return found_OD.to(W_OD.device)


PRUNER = pruner_by_score(score, by_row=False)
"""
RANDOM_SOLUTIONS = """
import torch
from sparse_expansion.algorithms.masks import unstructured_mask
from sparse_expansion.algorithms.pruners.base import Pruner, Solution


def solve(problem):
    assert problem.factor is not None
    worth_KDO = torch.rand(problem.target_KDO.shape, generator=torch.Generator().manual_seed(0))
    worth_KDO = worth_KDO.to(problem.target_KDO.device)
    kept_KDO = ~unstructured_mask(worth_KDO, problem.num_pruned)
    return Solution(weight_KDO=problem.target_KDO * kept_KDO, kept_KDO=kept_KDO)


PRUNER = Pruner(
    solve=solve,
    updates_weights=True,
    needs_factor=lambda config: True,
    flops=lambda rows, width, config: 2.0 * rows * width**2,
)
"""


@pytest.fixture
def added(tmp_path, monkeypatch):
    """Adds a pruner by the steps of docs/how-to.md: a module, and an entry of ``PRUNERS``."""
    folder = tmp_path / "pruners"
    folder.mkdir()
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])

    def add(source):
        (folder / "random.py").write_text(source)
        traits = PrunerTraits(help="removes random weights", takes_grid=False)
        monkeypatch.setitem(PRUNERS, "random", traits)

    yield add
    sys.modules.pop("sparse_expansion.algorithms.pruners.random", None)
    vars(package).pop("random", None)


@pytest.mark.parametrize(
    ("source", "sparsity"),
    [(RANDOM_SCORES, "0.3"), (RANDOM_SCORES, "2:4"), (RANDOM_SOLUTIONS, "0.3")],
)
def test_an_added_pruner_runs_from_the_command_line(
    source, sparsity, added, llama_folder, text_folder, tmp_path, capsys
):
    from transformers import AutoModelForCausalLM

    where = ["--model", str(llama_folder), "--dataset", str(text_folder)]
    flags = [
        *SMALL_RUN,
        "--sparsity",
        sparsity,
        "--layer-sparsity",
        "uniform",
        "--expert-sparsity",
        "uniform",
        "--no-permute-channels",
        "--eval-windows",
        "4",
    ]
    command = [
        "run",
        *where,
        *flags,
        "--eval-windows",
        "4",
        "--pruner",
        "random",
        "--output",
        str(tmp_path / "m"),
    ]
    assert main(command) == 2
    assert "invalid choice: 'random'" in capsys.readouterr().err
    added(source)
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["compression"]["pruner"] == "random"
    dense = AutoModelForCausalLM.from_pretrained(llama_folder)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    for layer, block in enumerate(made.model.layers):
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = dense.model.layers[layer].mlp.get_submodule(name).weight.detach().float()
            wanted = pattern(sparsity).num_kept(*weight.shape, block_size=16)
            for expert in range(4):
                unpacked = block.mlp.get_submodule(name).unpack(expert, torch.float32)
                assert int((unpacked != 0).sum()) == wanted
                # Compensated targets are other weights; scores keep the dense ones.
                if source == RANDOM_SCORES:
                    assert torch.equal(unpacked, torch.where(unpacked != 0, weight, 0.0))
                if sparsity == "2:4":
                    groups = (unpacked != 0).reshape(len(weight), -1, 4)
                    assert bool((groups.sum(dim=2) == 2).all())


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
        worth = SCORES[pruner](dense, hessians[k])
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
    where += ["--layer-sparsity", "uniform", "--expert-sparsity", "uniform"]
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
