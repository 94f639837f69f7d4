"""Experiments: numbers of clusters against random ones, and pruning of chosen neurons alone."""

import json

import numpy as np
import pyarrow.parquet
import pytest
import torch

from sparse_expansion.algorithms import neurons
from sparse_expansion.algorithms.hessian import hessian_sum
from sparse_expansion.algorithms.sweep import compress_experts
from sparse_expansion.cli import main
from sparse_expansion.config import RANKINGS, CompressionConfig, SparsityPattern
from sparse_expansion.data.activations import GroupInputs
from sparse_expansion.data.corpora import calibration_windows, evaluation_windows, load_corpus
from sparse_expansion.data.tokenization import encoder, load_tokenizer
from sparse_expansion.model.streaming import ModelShell
from sparse_expansion.stages import shuffled
from tests.tiny import SMALL_RUN

ON = "--dataset-size 40 --eval-windows 6 --seqlen 48 --block-size 16 --threads 1".split()
SWEEP = "--layer 1 --sparsity 0.8 --PCA_reduction_factor 4 --num_clusters 1,4".split()


def sweep(model, text, *flags):
    where = ["--model", str(model), "--dataset", str(text)]
    return main(["sweep-clusters", *where, *ON, *SWEEP, *flags])


def prune(model, text, *flags):
    where = ["--model", str(model), "--dataset", str(text), "--sparsity", "0.9"]
    return main(["prune-neurons", *where, *ON, *flags])


@pytest.fixture(scope="module")
def windows(neox_folder, text_folder):
    """Those to calibrate on and those held out, as the commands draw them."""
    encode = encoder(load_tokenizer(neox_folder))
    corpus = load_corpus(str(text_folder))
    return (
        calibration_windows(corpus.calibration, encode, num_windows=40, seqlen=48, seed=0),
        evaluation_windows(corpus.evaluation, encode, seqlen=48, max_windows=6),
    )


def block_inputs(folder, tokens, layer, group):
    """The dense block and what enters a group of its linears."""
    shell = ModelShell(folder)
    hidden = shell.embed(tokens)
    with torch.no_grad():
        for number in range(layer + 1):
            block = shell.load_block(number)
            with GroupInputs(block, shell.family.groups) as seen:
                hidden = shell.call(number, tokens).run(block, hidden)
    return block, seen.inputs[group]


def test_one_cluster_is_sparsegpt_on_held_out_text(
    neox_folder, text_folder, windows, tmp_path, capsys
):
    path = tmp_path / "t.parquet"
    flags = ["--linear", "mlp.dense_h_to_4h", "--table", str(path), "--json"]
    assert sweep(neox_folder, text_folder, *flags) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert pyarrow.parquet.read_table(path).to_pylist() == rows
    found = {(row["clustering"], row["num_clusters"]): row for row in rows}
    shell = ModelShell(neox_folder)
    (group,) = [g.name for g in shell.family.groups if "mlp.dense_h_to_4h" in g.linears]
    block, X = block_inputs(neox_folder, windows[0], 1, group)
    _, held = block_inputs(neox_folder, windows[1], 1, group)
    module = block.get_submodule("mlp.dense_h_to_4h")
    config = CompressionConfig(sparsity=SparsityPattern.parse("0.8"), block_size=16)
    made = compress_experts(module.weight, hessian_sum(X).sum_DD[None], config, None)
    with torch.no_grad():
        dense = module(held).double()
        change = held.double() @ (made.weight_KOD[0] - module.weight).double().T
    wanted = float(change.square().sum() / dense.square().sum())
    one = found["kmeans", 1]
    assert one["error"] == pytest.approx(wanted, rel=1e-3)
    wanted = np.median((change.square().mean(0) / dense.var(0, correction=0)).numpy())
    assert one["neuron_error"] == pytest.approx(wanted, rel=1e-3)
    # With one cluster random tokens are all tokens.
    assert one["error"] == found["random", 1]["error"]
    # Clusters help, random sets of tokens of their sizes do not.
    assert found["kmeans", 4]["error"] < 0.97 * one["error"]
    assert found["random", 4]["error"] > one["error"]


def test_one_neurons_distributions(neox_folder, text_folder, tmp_path, capsys):
    flags = ["--linear", "mlp.dense_h_to_4h", "--neuron", "3", "--plots", str(tmp_path / "p")]
    assert sweep(neox_folder, text_folder, *flags) == 0
    out = capsys.readouterr().out
    assert "error, neuron 3" in out and "held-out text" in out
    names = {path.name for path in (tmp_path / "p").iterdir()}
    assert {"neuron-3-mlp.dense_h_to_4h.svg", "clusters-mlp.dense_h_to_4h.png"} <= names
    markup = (tmp_path / "p" / "neuron-3-mlp.dense_h_to_4h.svg").read_text()
    assert "4 clusters" in markup and "1 cluster (sparse)" in markup


def test_pruning_one_ranking_by_hand(neox_folder, text_folder, windows, capsys):
    """Against a whole model in memory whose rows were replaced in a loop."""
    from transformers import AutoModelForCausalLM

    flags = ["--rankings", "wasserstein,magnitude", "--shares", "0.1,0.5", "--json"]
    assert prune(neox_folder, text_folder, *flags) == 0
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
def test_ray_gives_the_same(neox_folder, text_folder, capsys):
    found = []
    for executor in ([], ["--executor", "ray", "--num-workers", "2"]):
        flags = ["--linear", "mlp.dense_h_to_4h", "--json", *executor]
        assert sweep(neox_folder, text_folder, *flags) == 0
        flags = ["--rankings", "random", "--shares", "0.3", "--json", *executor]
        swept = json.loads(capsys.readouterr().out)
        assert prune(neox_folder, text_folder, *flags) == 0
        found.append((swept, json.loads(capsys.readouterr().out)["rows"]))
    (swept, pruned), (swept_ray, pruned_ray) = found
    assert swept == swept_ray
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


def test_shuffled_keeps_sizes_and_follows_the_name():
    labels = torch.arange(6).repeat_interleave(20)
    one, again, other = (shuffled(labels, name) for name in ("a", "a", "b"))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(one.bincount(), labels.bincount()) and not torch.equal(one, labels)


def test_random_clusters_are_the_same_routers_with_other_experts(
    neox_folder, text_folder, tmp_path, capsys
):
    from tests.tiny import digests

    where = ["--model", str(neox_folder), "--dataset", str(text_folder), "--sparsity", "0.8"]
    rows, perplexity = {}, {}
    for clustering in ("kmeans", "random"):
        output = tmp_path / clustering
        flags = ["--clustering", clustering, "--calibration-inputs", "dense", *SMALL_RUN]
        flags += [
            "--dataset-size",
            "200",
            "--eval-windows",
            "12",
            "--json",
            "--output",
            str(output),
        ]
        assert main(["run", *where, *flags]) == 0
        perplexity[clustering] = json.loads(capsys.readouterr().out)["perplexity_expanded"]
        assert main(["analyze", str(output), "--json"]) == 0
        rows[clustering] = json.loads(capsys.readouterr().out)
    sizes = {name: [row["tokens"] for row in found] for name, found in rows.items()}
    assert sizes["kmeans"] == sizes["random"]
    files = {name: digests(tmp_path / name) for name in rows}
    same = {name for name in files["kmeans"] if files["kmeans"][name] == files["random"][name]}
    assert {name for name in files["kmeans"] if name.startswith("router")} <= same
    assert not {name for name in same if name.startswith("experts")}
    assert perplexity["kmeans"] < perplexity["random"]
    assert main(["report", str(tmp_path / "random")]) == 0
    assert "control: made on random tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layer", "9"], "--layer 9 is outside 0 to 2"),
        (["--linear", "mlp.nothing"], "--linear mlp.nothing is none of"),
        (["--neuron", "64"], "--neuron 64 is outside 0 to 63 of mlp.dense_4h_to_h"),
        (["--num_clusters", "0,2"], "must be at least 1"),
        (["--num_clusters", "two"], "is not a list of numbers"),
        (["--sparsity", "2"], "sparsity 2"),
        (["--table", "x.csv"], "must end in .parquet"),
    ],
)
def test_bad_input_to_the_sweep(flags, message, neox_folder, text_folder, capsys):
    assert sweep(neox_folder, text_folder, *flags) == 2
    assert message in capsys.readouterr().err


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


def test_an_expanded_model_is_refused(neox_folder, text_folder, tmp_path, capsys):
    where = ["--model", str(neox_folder), "--dataset", str(text_folder)]
    assert main(["expand", *where, "--output", str(tmp_path / "o"), *SMALL_RUN]) == 0
    assert prune(tmp_path / "o", text_folder) == 2
    assert "experiments need the dense one" in capsys.readouterr().err
