"""Numbers of clusters, against experts on random tokens and against plain SparseGPT."""

import json

import numpy as np
import pyarrow.parquet
import pytest
import torch

from sparse_expansion.algorithms.compress import compress_experts
from sparse_expansion.algorithms.hessian import hessian_sum
from sparse_expansion.cli import main
from sparse_expansion.config import CompressionConfig, SparsityPattern
from sparse_expansion.model.streaming import ModelShell
from sparse_expansion.work.sums import shuffled
from tests.studies.helpers import block_inputs, sweep
from tests.tiny import SMALL_RUN, digests


def test_one_cluster_is_sparsegpt_on_held_out_text(
    neox_folder, long_text_folder, windows, tmp_path, capsys
):
    path = tmp_path / "t.parquet"
    flags = ["--linear", "mlp.dense_h_to_4h", "--table", str(path), "--json"]
    assert sweep(neox_folder, long_text_folder, *flags) == 0
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


@pytest.mark.ray
def test_ray_gives_the_same(neox_folder, text_folder, capsys, ray_flags):
    found = []
    for executor in ([], ray_flags):
        flags = ["--linear", "mlp.dense_h_to_4h", "--json", *executor]
        assert sweep(neox_folder, text_folder, *flags) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]


def test_shuffled_keeps_sizes_and_follows_the_name():
    labels = torch.arange(6).repeat_interleave(20)
    one, again, other = (shuffled(labels, name) for name in ("a", "a", "b"))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(one.bincount(), labels.bincount()) and not torch.equal(one, labels)


def test_random_clusters_are_the_same_routers_with_other_experts(
    neox_folder, long_text_folder, tmp_path, capsys
):
    where = ["--model", str(neox_folder), "--dataset", str(long_text_folder), "--sparsity", "0.8"]
    rows, perplexity = {}, {}
    for clustering in ("kmeans", "random"):
        output = tmp_path / clustering
        flags = ["--clustering", clustering, "--calibration-inputs", "dense", *SMALL_RUN]
        # Random clusters have nothing to share out zeros by.
        flags += ["--expert-sparsity", "uniform"]
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
