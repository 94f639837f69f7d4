"""The block-at-a-time model and the folders that it opens."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_expansion.model.streaming import ModelShell
from tests import tiny
from tests.model.running import stream


def test_base_model_names_and_sharded_files(tmp_path, tokenizer):
    folder = tiny.save_random("llama", tmp_path / "m", tokenizer)
    tokens = torch.randint(1, 500, (1, 20))
    wanted = stream(ModelShell(folder), tokens)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    bare = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    names = sorted(bare)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: bare[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(stream(ModelShell(folder), tokens), wanted)


def test_truncated_file_is_named(tmp_path, llama_folder):
    folder = tmp_path / "m"
    shutil.copytree(llama_folder, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is truncated"):
        ModelShell(folder)


def test_missing_tensor_is_named(tmp_path, llama_folder):
    folder = tmp_path / "m"
    shutil.copytree(llama_folder, folder)
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"], state["model.norm.weight"]
    save_file(state, folder / "model.safetensors")
    shell = ModelShell(folder)
    with pytest.raises(ValueError, match="no tensor 'model.norm.weight'"):
        shell.embed(torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="no tensor 'model.layers.1.mlp.up_proj.weight'"):
        shell.load_block(1)


def test_wrong_shape_is_one_clear_error(tmp_path, llama_folder):
    folder = tmp_path / "m"
    shutil.copytree(llama_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 40
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit its config.json"):
        ModelShell(folder).load_block(0)


def test_dtype_is_the_sources_unless_asked(tmp_path, tokenizer):
    folder = tmp_path / "m"
    tiny.random_model("llama").bfloat16().save_pretrained(folder)
    assert ModelShell(folder).dtype == torch.bfloat16
    shell = ModelShell(folder, dtype="float32")
    assert {p.dtype for p in shell.load_block(0).parameters()} == {torch.float32}
    assert Path(folder).is_dir()
