"""The expanded model in transformers: loading, generation, saving again."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers import HfQuantizer

import sparse_expansion
from sparse_expansion.cli import main
from sparse_expansion.model.quantizer import SparseExpansionConfig, SparseExpansionQuantizer
from sparse_expansion.model.streaming import ModelShell
from tests.model.running import expand, logits, stream


@pytest.mark.parametrize("rest", [(), ("model",)], ids=["before 5.21", "from 5.21 on"])
def test_conversions_are_asked_for_as_every_transformers_does(rest, monkeypatch):
    """Its 5.21 hands the model on too; Python 3.10 has no version after 5.20."""

    def of_that_version(self, conversions, *given):
        assert given == rest
        return [*conversions, "its own"]

    monkeypatch.setattr(HfQuantizer, "update_weight_conversions", of_that_version, raising=False)
    quantizer = SparseExpansionQuantizer(SparseExpansionConfig())
    assert quantizer.update_weight_conversions(["one"], *rest) == ["one", "its own"]


def test_loaded_logits_equal_those_before_saving(expanded, tmp_path):
    tokens = torch.randint(1, 500, (3, 30))
    model = AutoModelForCausalLM.from_pretrained(expanded)
    with torch.no_grad():
        before = model(tokens).logits
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, before)


def test_a_folder_of_before_loads_without_a_word(expanded, tmp_path, caplog):
    """It has no empty tensors under the names of the dense weights."""
    older = tmp_path / "older"
    shutil.copytree(expanded, older)
    index = json.loads((older / "model.safetensors.index.json").read_text())
    dense = re.compile(r"mlp\.dense_\w+\.weight$")
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if not dense.search(n)}
    (older / "model.safetensors.index.json").write_text(json.dumps(index))
    trunk = older / index["weight_map"]["gpt_neox.embed_in.weight"]
    state = {n: tensor for n, tensor in load_file(trunk).items() if not dense.search(n)}
    save_file(state, trunk, metadata={"format": "pt"})
    # What is changed here is no damage.
    (older / "manifest.json").unlink()
    tokens = torch.randint(1, 500, (3, 30))
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(expanded)(tokens).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(older)(tokens).logits, wanted)
        assert torch.equal(stream(ModelShell(older), tokens), stream(ModelShell(expanded), tokens))
    assert not caplog.records


def test_dense_weights_are_gone(expanded):
    index = json.loads((expanded / "model.safetensors.index.json").read_text())
    names = list(index["weight_map"])
    with safe_open(expanded / index["weight_map"]["gpt_neox.embed_in.weight"], "pt") as file:
        guards = [name for name in names if name.endswith("dense_h_to_4h.weight")]
        assert len(guards) == 3
        assert all(file.get_slice(name).get_shape() == [0] for name in guards)
    assert "gpt_neox.layers.0.mlp.dense_h_to_4h.bias" in names
    assert all((expanded / file).is_file() for file in index["weight_map"].values())
    config = json.loads((expanded / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "sparse_expansion"
    AutoTokenizer.from_pretrained(expanded)


def test_generation_with_cache_batches_and_padding(expanded):
    tokenizer = AutoTokenizer.from_pretrained(expanded, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(expanded)
    prompts = ["The for statement is used", "A class definition defines a class object and"]
    alone = [
        model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)[
            0, -8:
        ]
        for prompt in prompts
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, -8:]
    uncached = model.generate(**batch, max_new_tokens=8, do_sample=False, use_cache=False)[:, -8:]
    assert torch.equal(together, uncached)
    assert torch.equal(together, torch.stack(alone))


def test_bf16_load_keeps_routers_in_float32(expanded):
    model = AutoModelForCausalLM.from_pretrained(expanded, dtype=torch.bfloat16)
    linear = model.gpt_neox.layers[0].mlp.dense_h_to_4h
    assert linear.router.centroids.dtype == torch.float32
    assert linear.experts[0].values.dtype == torch.bfloat16
    full = AutoModelForCausalLM.from_pretrained(expanded)
    wanted = full.gpt_neox.layers[0].mlp.dense_h_to_4h.router
    assert torch.equal(linear.router.centroids, wanted.centroids)
    with torch.no_grad():
        assert model(torch.ones(1, 5, dtype=torch.int64)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "flags",
    [
        ["--sparsity", "2:4"],
        ["--sparsity", "(2, 4)", "--quantize", "--bits", "4"],
        ["--sparsity", "0", "--quantize", "--bits", "3", "--group-size", "20", "--act-order"],
        ["--sparsity", "0.7", "--no_PCA", "--calibration-inputs", "dense"],
        ["--sparsity", "0.5", "--dtype", "bfloat16"],
    ],
)
def test_modes_load_and_equal_the_streamed_model(flags, tmp_path, llama_folder, text_folder):
    output = expand(llama_folder, text_folder, tmp_path / "out", *flags)
    model = AutoModelForCausalLM.from_pretrained(output)
    tokens = torch.randint(1, 500, (1, 20))
    with torch.no_grad():
        logits = model(tokens).logits
    tolerance = 5e-2 if "bfloat16" in flags else 1e-4
    torch.testing.assert_close(
        logits, stream(ModelShell(output), tokens), rtol=tolerance, atol=tolerance
    )


def test_truncated_checkpoint_is_not_loaded(tmp_path, llama_folder, text_folder, capsys):
    output = expand(llama_folder, text_folder, tmp_path / "out")
    file = next(output.glob("experts-001-*"))
    file.write_bytes(file.read_bytes()[:-7])
    assert (
        main(["evaluate", "--model", str(output), "--dataset", str(text_folder), "--seqlen", "32"])
        == 2
    )
    assert file.name in capsys.readouterr().err


@pytest.mark.parametrize("version", [2, 3])
def test_folders_of_earlier_versions_are_read_as_before(
    version, neox_folder, text_folder, tmp_path
):
    """They have none of what came later, and settings that say nothing of it."""
    flags = ["--expert-sparsity", "uniform", "--no-permute-channels"]
    later = {"expert_sparsity": "uniform", "permute_channels": False}
    if version == 2:
        flags.append("--no-expert-biases")
        later["expert_biases"] = False
    made = expand(neox_folder, text_folder, tmp_path / "m", *flags)
    tokens = torch.randint(1, 500, (3, 30))
    before = logits(AutoModelForCausalLM.from_pretrained(made), tokens)
    config = json.loads((made / "config.json").read_text())
    assert config["quantization_config"]["format_version"] == 4
    config["quantization_config"]["format_version"] = version
    for name, value in later.items():
        assert config["quantization_config"]["compression"].pop(name) == value
    (made / "config.json").write_text(json.dumps(config))
    manifest = json.loads((made / "manifest.json").read_text())
    del manifest["sha256_of_the_rest"], manifest["files"]["config.json"]
    (made / "manifest.json").write_text(json.dumps(manifest))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(made), tokens), before)


def test_config_from_a_newer_format_is_refused():
    with pytest.raises(ValueError, match="format_version 99"):
        SparseExpansionConfig(format_version=99)
    with pytest.raises(ValueError, match="expert_residency"):
        SparseExpansionConfig(expert_residency="cloud")
    with pytest.raises(ValueError, match="'bits' is unknown, it is a setting of .*expand"):
        SparseExpansionConfig(bits=3)
    with pytest.raises(
        ValueError, match="'expert_residence' is unknown .did you mean expert_resid"
    ):
        SparseExpansionConfig(expert_residence="dense")
    for name, value in {"groups": [3], "routing": "x", "cache_bytes": "1", "verify": 0}.items():
        with pytest.raises(ValueError, match=f"'{name}' is of another form"):
            SparseExpansionConfig(**{name: value})
    assert "SparseExpansionConfig" in sparse_expansion.__all__
