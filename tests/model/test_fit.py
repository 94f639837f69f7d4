"""A config that is huge, or another model's, is answered before anything is built."""

import json
import shutil

import pytest

from sparse_expansion.cli import main
from sparse_expansion.model.checkpoint import load_config
from sparse_expansion.model.streaming import ModelShell

HUGE = {
    "num_hidden_layers": 1_000_000,
    "hidden_size": 1_000_000_000,
    "intermediate_size": 1 << 40,
    "vocab_size": -1,
    "num_attention_heads": 0,
}


def changed(folder, tmp_path, **changes):
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    return copy


@pytest.mark.parametrize("name", sorted(HUGE))
def test_a_huge_config_is_one_line(name, llama_folder, text_folder, tmp_path, capsys):
    folder = changed(llama_folder, tmp_path, **{name: HUGE[name]})
    where = ["--model", str(folder), "--dataset", str(text_folder), "--seqlen", "32"]
    plan = ["plan", "--model", str(folder), "--num_clusters", "2", "--dataset-size", "2"]
    for line in (["evaluate", *where], [*plan, "--seqlen", "32"]):
        assert main(line) == 2
        found = capsys.readouterr().err
        assert "config.json" in found and found.count("error: ") == 1
        assert name == "num_attention_heads" or f"{name} {HUGE[name]}" in found


@pytest.mark.parametrize("source", ["llama_folder", "neox_folder"])
def test_more_blocks_than_the_files_have(source, request, tmp_path):
    folder = changed(request.getfixturevalue(source), tmp_path, num_hidden_layers=4000)
    with pytest.raises(ValueError, match="has 4000 blocks, the weight files have 3"):
        ModelShell(folder)


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"hidden_size": 64}, r"embed_tokens.weight is of shape \[512, 32\], and \[512, 64\] by"),
        ({"intermediate_size": 80}, r"layers.0.mlp.\w+.weight is of shape \[\d+, \d+\]"),
        ({"vocab_size": 500}, r"embed_tokens.weight is of shape \[512, 32\], and \[500, 32\] by"),
    ],
)
def test_another_models_config(changes, tensor, llama_folder, tmp_path):
    folder = changed(llama_folder, tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"does not fit its config.json: \S*{tensor}"):
        ModelShell(folder)


def test_wider_than_any_tensor(llama_folder, expanded, tmp_path):
    for folder in (llama_folder, expanded):
        with pytest.raises(ValueError, match="has hidden_size 16777216, and no tensor of the"):
            ModelShell(changed(folder, tmp_path, hidden_size=1 << 24))


def test_an_expanded_folders_config(expanded, tmp_path):
    with pytest.raises(ValueError, match="does not fit its config.json"):
        ModelShell(changed(expanded, tmp_path, intermediate_size=128))
    with pytest.raises(ValueError, match="'shape' is unknown"):
        config = json.loads((expanded / "config.json").read_text())["quantization_config"]
        ModelShell(changed(expanded, tmp_path, quantization_config={**config, "shape": [1]}))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_an_attention_from_elsewhere_is_not_fetched(key, llama_folder, tmp_path):
    for name in ("someone/kernel", "kernels-community/flash-attn2:x", "flash_attention_2"):
        folder = changed(llama_folder, tmp_path, **{key: name})
        with pytest.raises(ValueError, match=f"attention implementation '{name}'"):
            load_config(folder)
    assert ModelShell(changed(llama_folder, tmp_path, **{key: "eager"})).num_blocks == 3


@pytest.mark.parametrize("key", ["hidden_act", "dtype", "pad_token_id", "use_cache", "head_dim"])
@pytest.mark.parametrize("value", ["$\x1b[2J", -1.5, [1], {"a": {"b": 1}}, 10**12])
def test_a_setting_of_another_type_is_one_line(
    key, value, llama_folder, text_folder, tmp_path, capsys
):
    """transformers' own checks raise errors of their own kind."""
    folder = changed(llama_folder, tmp_path, **{key: value})
    where = ["--model", str(folder), "--dataset", str(text_folder), "--eval-windows", "1"]
    plan = ["plan", "--model", str(folder), "--num_clusters", "2", "--dataset-size", "2"]
    for line in (["evaluate", *where, "--seqlen", "16"], [*plan, "--seqlen", "16"]):
        code = main(line)
        found = capsys.readouterr().err
        # transformers overlooks a type for some of them.
        assert code in (0, 2) and found.count("error: ") == (code == 2), found
