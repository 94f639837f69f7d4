"""Files of a model folder: broken ones are named, and equal ones are told apart from others."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_expansion.model.checkpoint import CheckpointFiles, is_companion, load_config
from sparse_expansion.model.streaming import ModelShell
from tests.model.running import stream


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


def test_nobody_is_asked_whether_to_run_a_models_code(tmp_path, llama_folder, monkeypatch):
    """Transformers asks at the terminal where a folder brings code of its own."""

    def asked(*args):
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", asked)
    copy = tmp_path / "copy"
    shutil.copytree(llama_folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "their_own", "auto_map": {"AutoConfig": "theirs.TheirConfig"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "theirs.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(ValueError, match="'their_own' is not supported"):
        load_config(copy)
    del config["model_type"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cannot be read: .*(custom code|trust_remote_code)"):
        load_config(copy)
    config["auto_map"]["AutoModelForCausalLM"] = "theirs.TheirModel"
    config["model_type"] = "llama"
    (copy / "config.json").write_text(json.dumps(config))
    assert ModelShell(copy).num_blocks == 3


def test_fingerprint_tells_models_apart(tmp_path, tokenizer, llama_folder):
    copy = tmp_path / "copy"
    shutil.copytree(llama_folder, copy)
    same = CheckpointFiles(copy).fingerprint()
    assert same == CheckpointFiles(llama_folder).fingerprint()
    state = load_file(copy / "model.safetensors")
    state["model.norm.weight"][0] += 1
    save_file(state, copy / "model.safetensors")
    assert CheckpointFiles(copy).fingerprint() != same


@pytest.mark.parametrize("what", ["middle of a file", "config", "tokenizer", "licence"])
def test_fingerprint_covers_all_that_defines_a_model(what, tmp_path, llama_folder):
    copy = tmp_path / "copy"
    shutil.copytree(llama_folder, copy)
    # Its middle is far from both ends.
    save_file({"a": torch.ones(1 << 20)}, copy / "model.safetensors")
    (copy / "LICENSE").write_text("free")
    before = CheckpointFiles(copy).fingerprint()
    if what == "middle of a file":
        data = bytearray((copy / "model.safetensors").read_bytes())
        data[len(data) // 2] ^= 128
        (copy / "model.safetensors").write_bytes(data)
    elif what == "config":
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-2}))
    elif what == "tokenizer":
        with (copy / "tokenizer.json").open("a") as stream:
            stream.write(" ")
    else:
        (copy / "LICENSE").write_text("not free")
    is_same = CheckpointFiles(copy).fingerprint() == before
    assert is_same == (what == "licence")


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


def indexed(folder, names, file):
    """Write an index that says so many tensors are in one file."""
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_which_files_count_is_what_transformers_loads(tmp_path, llama_folder):
    """A single file counts more than an index; neither an index nor a single file is no model."""
    from transformers import AutoModelForCausalLM

    copy = tmp_path / "copy"
    shutil.copytree(llama_folder, copy)
    state = load_file(copy / "model.safetensors")
    other = {name: tensor * 1.5 for name, tensor in state.items()}
    save_file(other, copy / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    indexed(copy, other, "model-00001-of-00001.safetensors")
    name = "model.norm.weight"
    for wanted in (state, other):
        loaded = AutoModelForCausalLM.from_pretrained(copy).state_dict()[name]
        assert torch.equal(CheckpointFiles(copy).read(name), wanted[name])
        assert torch.equal(loaded, wanted[name])
        (copy / "model.safetensors").unlink(missing_ok=True)
    (copy / "model.safetensors.index.json").unlink()
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(copy)
    with pytest.raises(ValueError, match="but model-00001-of-00001.safetensors, which are not"):
        CheckpointFiles(copy)


def test_a_variant_beside_a_model_is_not_the_model(tmp_path, llama_folder):
    copy = tmp_path / "copy"
    shutil.copytree(llama_folder, copy)
    state = load_file(copy / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in state.items()}, copy / "model.fp16.safetensors")
    files = CheckpointFiles(copy)
    assert torch.equal(files.read("model.norm.weight"), state["model.norm.weight"])
    assert files.num_bytes == (copy / "model.safetensors").stat().st_size


def test_a_name_that_is_held_twice_is_refused(tmp_path):
    halves = {"a.safetensors": ["x", "y"], "b.safetensors": ["y", "z"]}
    for file, names in halves.items():
        save_file({name: torch.zeros(2) for name in names}, tmp_path / file)
    index = {"weight_map": {name: file for file, names in halves.items() for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"has y twice, in a.safetensors and in b.safetensors"):
        CheckpointFiles(tmp_path)


def test_a_head_of_its_own_beside_a_tied_config(tmp_path, llama_folder):
    """transformers keeps the file's head, and so does what is expanded from it."""
    from transformers import AutoModelForCausalLM

    copy = tmp_path / "copy"
    shutil.copytree(llama_folder, copy)
    assert json.loads((copy / "config.json").read_text())["tie_word_embeddings"]
    state = load_file(copy / "model.safetensors")
    state["lm_head.weight"] = 0.05 * torch.randn(512, 32)
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.randint(1, 500, (2, 20))
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(copy)(tokens).logits
        tied = AutoModelForCausalLM.from_pretrained(llama_folder)(tokens).logits
    shell = ModelShell(copy)
    torch.testing.assert_close(stream(shell, tokens), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(wanted, tied, atol=1e-2)
    assert "lm_head.weight" in shell.trunk_names()
