"""Neurons of a dense and an expanded model on a text."""

import json

import numpy as np
import pyarrow.parquet
import pytest
import torch

from sparse_expansion.algorithms import neurons
from sparse_expansion.cli import main
from sparse_expansion.data.activations import GroupInputs
from sparse_expansion.data.corpora import load_corpus
from sparse_expansion.data.tokenization import encoder, load_tokenizer
from sparse_expansion.data.windows import evaluation_windows
from sparse_expansion.model.streaming import ModelShell

ON = ["--windows", "4", "--seqlen", "48", "--threads", "1"]


def analyze(model, text, table, *flags):
    where = [str(model), "--dataset", str(text), "--table", str(table)]
    assert main(["analyze", *where, *ON, *flags]) == 0
    return pyarrow.parquet.read_table(table).to_pydict()


def test_a_dense_model_against_its_own_outputs(neox_folder, text_folder, tmp_path, capsys):
    columns = analyze(neox_folder, text_folder, tmp_path / "t" / "n.parquet")
    assert "medians over neurons, on 192 tokens" in capsys.readouterr().out
    shell = ModelShell(neox_folder)
    encode = encoder(load_tokenizer(neox_folder))
    text = load_corpus(str(text_folder)).evaluation
    windows = evaluation_windows(text, encode, seqlen=48, max_windows=4)
    hidden = shell.embed(windows)
    blocks = 0
    for layer in range(shell.num_blocks):
        block = shell.load_block(layer)
        with torch.no_grad(), GroupInputs(block, shell.family.groups) as seen:
            hidden = shell.call(layer, windows).run(block, hidden)
            for g, group in enumerate(shell.family.groups):
                X = seen.inputs[group.name]
                Y = block.get_submodule(group.linears[0])(X)
                expected = neurons.describe(X, Y, seed=layer * len(shell.family.groups) + g)
                rows = [
                    i
                    for i, found in enumerate(zip(columns["layer"], columns["linear"], strict=True))
                    if found == (layer, group.linears[0])
                ]
                assert [columns["neuron"][i] for i in rows] == list(range(Y.shape[1]))
                for name, values in expected.items():
                    got = np.array(columns[name])[rows]
                    np.testing.assert_allclose(got, values, rtol=1e-3, atol=1e-4)
                blocks += 1
    assert blocks == shell.num_blocks * len(shell.family.groups)
    assert not any("expanded" in name for name in columns)


def test_experts_are_nearer_to_the_dense_outputs(folders, text_folder, tmp_path, capsys):
    flags = ["--one-cluster", str(folders / "1"), "--json"]
    columns = analyze(folders / "4", text_folder, tmp_path / "n.parquet", *flags)
    result = json.loads(capsys.readouterr().out)
    error = np.array(columns["error.expanded"])
    one = np.array(columns["error.one_cluster"])
    assert (error > 0).all() and np.median(error) < np.median(one)
    np.testing.assert_allclose(columns["improvement"], 1 - error / one, rtol=1e-9)
    # With one cluster its inside is everything.
    np.testing.assert_allclose(columns["wasserstein_clusters.one_cluster"], columns["wasserstein"])
    assert set(result["correlations"]) == {
        "difficulty",
        "error.expanded",
        "error.one_cluster",
        "improvement",
    }
    first = result["linears"][0]
    chosen = [i for i, layer in enumerate(columns["layer"]) if layer == 0]
    chosen = [i for i in chosen if columns["linear"][i] == first["linear"]]
    assert first["neurons"] == len(chosen)
    assert first["error.expanded"] == pytest.approx(np.median(error[chosen]))


@pytest.mark.ray
def test_ray_gives_the_same(folders, text_folder, tmp_path, ray_flags):
    one = analyze(folders / "4", text_folder, tmp_path / "l.parquet")
    assert analyze(folders / "4", text_folder, tmp_path / "r.parquet", *ray_flags) == one


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--table", "x.csv"], "must end in .parquet"),
        (["--one-cluster", "x"], "need --dataset"),
        (["--dataset", "pydoc", "--windows", "0"], "must be at least 1"),
        (["--dataset", "no-such"], "no-such"),
    ],
)
def test_bad_input(flags, message, folders, capsys):
    assert main(["analyze", str(folders / "4"), *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_comparison_must_be_expanded(folders, neox_folder, text_folder, capsys):
    where = [str(folders / "4"), "--dataset", str(text_folder), "--one-cluster", str(neox_folder)]
    assert main(["analyze", *where, *ON]) == 2
    assert "is not an expanded model" in capsys.readouterr().err
