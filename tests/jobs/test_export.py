"""One-expert models in other tools' formats, read back by those tools."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import sparse_expansion
from sparse_expansion.cli import main
from sparse_expansion.model.manifest import MANIFEST_NAME
from sparse_expansion.plain_files import SEAL
from tests import tiny
from tests.model.test_expansion import expand


@pytest.fixture(scope="module")
def plain(tmp_path_factory, neox_folder, text_folder):
    """Plain SparseGPT, and 2:4 with 4 bits in groups."""
    root = tmp_path_factory.mktemp("one")
    one = ["--num_clusters", "1", "--layer-sparsity", "uniform"]
    joint = [*one, "--sparsity", "2:4", "--quantize", "--group-size", "16"]
    return {
        "pruned": expand(neox_folder, text_folder, root / "pruned", *one),
        "joint": expand(neox_folder, text_folder, root / "joint", *joint),
        "symmetric": expand(neox_folder, text_folder, root / "symmetric", *joint, "--symmetric"),
        "uneven": expand(neox_folder, text_folder, root / "uneven", *joint, "--group-size", "24"),
    }


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(48).reshape(2, 24)
    with torch.no_grad():
        return model, model(tokens).logits


@pytest.mark.parametrize("kind", ["pruned", "joint"])
def test_dense_folder_is_a_plain_model(plain, kind, tmp_path):
    assert main(["export", str(plain[kind]), "--output", str(tmp_path / "out")]) == 0
    model, found = logits(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert type(model.gpt_neox.layers[0].mlp.dense_h_to_4h) is torch.nn.Linear
    weight = model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight
    assert 0.45 < float((weight == 0).float().mean()) < 0.65
    _, wanted = logits(plain[kind])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "out/tokenizer.json").is_file()


ROPES = {
    "gpt_neox": (
        {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        {"rotary_emb_base": 5000.0, "rotary_pct": 0.5, "rope_scaling": None},
    ),
    "qwen3": (
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_theta": 1e6, "rope_scaling": None},
    ),
    "llama": (
        {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "gemma3_text": (
        {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "opt": (None, {}),
}


@pytest.mark.parametrize("model_type", sorted(ROPES))
def test_an_export_has_the_names_of_both_generations(model_type, tmp_path, tokenizer, text_folder):
    """Those of version 4 as its own config classes read them, by hand; version 5 reads the same."""
    rope, older = ROPES[model_type]
    changes = {} if rope is None else {"rope_parameters": dict(rope)}
    folder = tiny.save_random(model_type, tmp_path / "dense", tokenizer, **changes)
    path = folder / "tokenizer_config.json"
    saved = json.loads(path.read_text())
    assert saved["tokenizer_class"] == "TokenizersBackend"
    path.write_text(json.dumps({**saved, "extra_special_tokens": ["<|x|>"]}))
    flags = ["--num_clusters", "1", "--layer-sparsity", "uniform", "--pruner", "magnitude"]
    output = expand(folder, text_folder, tmp_path / "x", *flags, "--dtype", "bfloat16")
    assert main(["export", str(output), "--output", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in older} == older
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    read = AutoConfig.from_pretrained(tmp_path / "out")
    assert read.dtype == torch.bfloat16
    assert getattr(read, "rope_parameters", None) == rope
    found = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert found["additional_special_tokens"] == ["<|x|>"] and "extra_special_tokens" not in found
    text = "def f(x): return x"
    ids = [AutoTokenizer.from_pretrained(one)(text).input_ids for one in (folder, tmp_path / "out")]
    assert ids[0] == ids[1]


def export_packed(folder, output):
    arguments = ["export", str(folder), "--output", str(output), "--json"]
    assert main([*arguments, "--format", "pack-quantized"]) == 0


def test_packed_folder_is_loaded_by_compressed_tensors(plain, tmp_path):
    export_packed(plain["symmetric"], tmp_path / "out")
    _, found = logits(tmp_path / "out")
    _, wanted = logits(plain["symmetric"])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with safe_open(tmp_path / "out/model-block-00000.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "gpt_neox.layers.0.mlp.dense_h_to_4h.weight_packed" in names
    assert "gpt_neox.layers.0.mlp.dense_h_to_4h.weight" not in names


@pytest.mark.parametrize("kind", ["joint", "uneven"])
def test_packed_weights_are_unpacked_by_compressed_tensors(kind, plain, tmp_path):
    """With zero points (which its loader in transformers takes at the wrong shape, 0.20).

    Groups of 24 columns do not divide the width, and its reader knows no shorter last group.
    """
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    export_packed(plain[kind], tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    described = config["config_groups"]["group_0"]
    assert described["weights"]["group_size"] == {"joint": 16, "uneven": 8}[kind]
    scheme = QuantizationScheme(
        targets=described["targets"], weights=QuantizationArgs(**described["weights"])
    )
    model = AutoModelForCausalLM.from_pretrained(plain[kind])
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h"
    with safe_open(tmp_path / "out/model-block-00001.safetensors", framework="pt") as file:
        state = {
            key.removeprefix(f"{name}."): file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118 - not a dictionary
            if key.startswith(f"{name}.weight")
        }
    found = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    wanted = model.get_submodule(name).unpack(0, torch.float32)
    assert torch.equal(found.float(), wanted)


def test_bad_input(plain, finished, tmp_path, capsys, neox_folder):
    def line(*arguments):
        assert main(["export", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    out = tmp_path / "out"
    packed = ["--format", "pack-quantized"]
    assert "not quantized" in line(plain["pruned"], *packed, "--output", out)
    assert "nothing to export" in line(neox_folder, "--output", out)
    assert "4 experts per linear" in line(finished, "--output", out)
    assert "not empty" in line(plain["pruned"], "--output", neox_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.clear(), "lacks .* tensors that are loaded"),
        (lambda tensors: tensors.pop(sorted(tensors)[0]), "lacks 1 tensors that are loaded"),
        (
            lambda tensors: tensors[sorted(tensors)[0]].update(file="../elsewhere.safetensors"),
            "names a file elsewhere, '../elsewhere.safetensors'",
        ),
    ],
)
def test_a_manifest_that_is_not_the_models(change, message, plain, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(plain["pruned"], folder)
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    change(manifest["tensors"])
    # By somebody who knows the seal.
    del manifest[SEAL]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        sparse_expansion.verify(folder)


def test_verify_names_what_is_damaged(plain, tmp_path, capsys, text_folder):
    folder = tmp_path / "copy"
    shutil.copytree(plain["pruned"], folder)
    assert sparse_expansion.verify(folder) > 10
    files = sorted(folder.glob("experts-*.safetensors"))
    original = files[0].read_bytes()
    damaged = bytearray(original)
    damaged[-1] ^= 1
    files[0].write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{files[0].name} is damaged in gpt_neox.layers.0"):
        sparse_expansion.verify(folder)
    arguments = ["evaluate", "--model", str(folder), "--dataset", str(text_folder)]
    assert main(arguments) == 2
    assert files[0].name in capsys.readouterr().err
    files[0].write_bytes(files[1].read_bytes())
    with pytest.raises(ValueError, match=f"{files[0].name} is damaged"):
        sparse_expansion.verify(folder)
    files[0].write_bytes(original[:-10])
    with pytest.raises(ValueError, match=f"{files[0].name} is damaged"):
        sparse_expansion.verify(folder)
    files[0].unlink()
    with pytest.raises(ValueError, match=f"{files[0].name} is missing"):
        sparse_expansion.verify(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_a_changed_bit_in_any_file_that_is_loaded_is_noticed(
    name, finished, tmp_path, text_folder, capsys
):
    folder = tmp_path / "m"
    shutil.copytree(finished, folder)
    data = bytearray((folder / name).read_bytes())
    data[data.index(b"1")] ^= 2
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} is damaged, or was changed by hand"):
        sparse_expansion.verify(folder)
    where = ["--model", str(folder), "--dataset", str(text_folder), "--seqlen", "48"]
    assert main(["evaluate", *where]) == 2
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        sparse_expansion.verify(folder)


def test_manifest_states_sizes_near_those_of_the_information(plain):
    for folder in plain.values():
        manifest = json.loads((folder / "manifest.json").read_text())
        stored = sum(record["bytes"] for record in manifest["tensors"].values())
        assert stored == manifest["bytes"]
        assert 1 <= manifest["bytes"] / manifest["information_bytes"] < 1.03
