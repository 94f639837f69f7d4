"""Damage is noticed before a model is used: digests while loading, numbers that are none."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from sparse_expansion.cli import main
from sparse_expansion.model.verification import verify


@pytest.fixture
def copy(expanded, tmp_path):
    """A folder to be damaged."""
    folder = tmp_path / "copy"
    shutil.copytree(expanded, folder)
    return folder


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def change_tensor(folder, name, change):
    """Change a tensor in its file; the folder is one without digests."""
    (folder / "manifest.json").unlink(missing_ok=True)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    state = load_file(path)
    change(state[name])
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize("pattern", ["trunk-*", "router-001-*", "experts-002-*"])
def test_a_flipped_bit_of_any_file_is_not_loaded(pattern, copy):
    file = sorted(copy.glob(pattern))[0]
    with safe_open(file, "pt") as handle:
        names = set(handle.keys())
    flip(file, -1)
    with pytest.raises(ValueError, match=rf"{file.name} is damaged in (\S+):") as found:
        AutoModelForCausalLM.from_pretrained(copy)
    assert any(name in str(found.value) for name in names)
    assert "quantization_config['verify'] = False" in str(found.value)


def test_who_does_not_want_it_checked_says_so(copy, tmp_path):
    flip(sorted(copy.glob("experts-002-*"))[0], -1)
    config = AutoConfig.from_pretrained(copy)
    config.quantization_config["verify"] = False
    model = AutoModelForCausalLM.from_pretrained(copy, config=config)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "verify" not in saved["quantization_config"]
    # What was saved has no digests.
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_a_changed_file_beside_the_weights_is_noticed(name, copy):
    text = (copy / name).read_text()
    (copy / name).write_text(text + " ")
    with pytest.raises(ValueError, match=f"{name} is damaged, or was changed by hand"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_what_the_hub_was_not_asked_for_is_not_missed(copy):
    (copy / "tokenizer.json").unlink()
    AutoModelForCausalLM.from_pretrained(copy)
    with pytest.raises(ValueError, match="tokenizer.json is missing"):
        verify(copy)


def test_offloaded_blocks_are_checked_too(copy, tmp_path):
    names = ("embed_in", "final_layer_norm", "rotary_emb", "emb_dropout", "layers.0", "layers.1")
    # Older versions of transformers 5 have another name for the head.
    is_new = hasattr(AutoModelForCausalLM.from_pretrained(copy), "lm_head")
    head = "lm_head" if is_new else "embed_out"
    where = {head: "cpu", **{f"gpt_neox.{name}": "cpu" for name in names}}
    where["gpt_neox.layers.2"] = "disk"
    load = {"device_map": where, "offload_folder": str(tmp_path / "offload")}
    AutoModelForCausalLM.from_pretrained(copy, **load)
    flip(sorted(copy.glob("experts-002-*"))[0], -1)
    with pytest.raises(ValueError, match="is damaged in"):
        AutoModelForCausalLM.from_pretrained(copy, **load)


def test_a_changed_digit_of_the_manifest_is_noticed(copy):
    path = copy / "manifest.json"
    text = path.read_text()
    for old in ('"bytes": ', '"information_bytes": ', '"sha256": "'):
        place = text.index(old) + len(old)
        changed = text[:place] + ("7" if text[place] != "7" else "8") + text[place + 1 :]
        path.write_text(changed)
        with pytest.raises(ValueError, match="manifest.json is damaged, or was changed by hand"):
            AutoModelForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gpt_neox.layers.0.mlp.dense_h_to_4h.router.centroids", float("nan")),
        ("gpt_neox.layers.1.mlp.dense_4h_to_h.router.mean", float("inf")),
        ("gpt_neox.embed_in.weight", float("-inf")),
        ("gpt_neox.layers.2.mlp.dense_4h_to_h.experts.0.values", float("nan")),
    ],
)
def test_evaluate_refuses_what_is_no_number(name, value, copy, text_folder, capsys):
    def change(tensor):
        tensor.view(-1)[-1] = value

    change_tensor(copy, name, change)
    line = ["evaluate", "--model", str(copy), "--dataset", str(text_folder), "--seqlen", "32"]
    assert main([*line, "--eval-windows", "1"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(error) == 1 and name in error[0] and "copy the folder again" in error[0]
    assert f"has {value} in" in error[0]


def test_a_grid_that_is_no_number(llama_folder, text_folder, tmp_path, capsys):
    from tests.model.running import expand

    output = expand(llama_folder, text_folder, tmp_path / "q", "--quantize", "--bits", "4")
    name = "model.layers.1.mlp.up_proj.grid.scale"
    change_tensor(output, name, lambda tensor: tensor[0].fill_(torch.nan))
    line = ["evaluate", "--model", str(output), "--dataset", str(text_folder), "--seqlen", "32"]
    assert main([*line, "--eval-windows", "1"]) == 2
    assert f"has nan in {name}" in capsys.readouterr().err
