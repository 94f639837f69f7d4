"""Files of a model folder: broken ones are named, and equal ones are told apart from others."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from sparse_expansion.model.checkpoint import CheckpointFiles, is_companion, load_config


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no config.json"):
        load_config(tmp_path)
    with pytest.raises(ValueError, match=r"no \*.safetensors"):
        CheckpointFiles(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../secret.safetensors"}}'
    )
    with pytest.raises(ValueError, match="outside its folder"):
        CheckpointFiles(tmp_path)


def test_fingerprint_tells_models_apart(tmp_path, tokenizer, llama_folder):
    copy = tmp_path / "copy"
    shutil.copytree(llama_folder, copy)
    same = CheckpointFiles(copy).fingerprint()
    assert same == CheckpointFiles(llama_folder).fingerprint()
    state = load_file(copy / "model.safetensors")
    state["model.norm.weight"][0] += 1
    save_file(state, copy / "model.safetensors")
    assert CheckpointFiles(copy).fingerprint() != same


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer.model", "vocab.txt", "chat_template.jinja", "LICENSE.md"],
)
def test_files_that_travel_with_a_model(name):
    assert is_companion(name)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "README.md",
        "pytorch_model.bin",
    ],
)
def test_files_that_are_written_anew_or_left_behind(name):
    assert not is_companion(name)
