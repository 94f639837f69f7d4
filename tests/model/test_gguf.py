"""GGUF files become folders of safetensors, once."""

import pytest

from sparse_expansion.model.gguf import convert_gguf
from sparse_expansion.model.sources import fetch_model, resolve_name


def test_gguf_is_converted_once(tmp_path, llama_folder):
    gguf = pytest.importorskip("gguf")
    import numpy as np

    file = tmp_path / "tiny.gguf"
    write_gguf(gguf, np, file, llama_folder)
    folder = fetch_model(resolve_name(str(file)), cache_dir=str(tmp_path / "cache"))
    assert (folder / "config.json").is_file() and list(folder.glob("*.safetensors"))
    before = (folder / "config.json").stat().st_mtime_ns
    again = fetch_model(resolve_name(str(file)), cache_dir=str(tmp_path / "cache"))
    assert again == folder and (folder / "config.json").stat().st_mtime_ns == before
    from safetensors.torch import load_file

    ours = load_file(folder / "model.safetensors")
    theirs = load_file(llama_folder / "model.safetensors")
    assert set(ours) == set(theirs)
    for name in theirs:
        np.testing.assert_array_equal(ours[name].numpy(), theirs[name].numpy(), err_msg=name)
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def write_gguf(gguf, np, file, folder):
    """The tiny Llama as an unquantized GGUF file, with llama.cpp's permutation of q and k."""
    import json

    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    config = json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    vocabulary = tokenizer.get_vocab()
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in load_file(folder / "model.safetensors").items():
        array = tensor.numpy()
        if name == "model.embed_tokens.weight":
            target = "token_embd.weight"
        elif name == "model.norm.weight":
            target = "output_norm.weight"
        else:
            _, _, layer, rest = name.split(".", 3)
            part = rest.removesuffix(".weight")
            target = f"blk.{layer}.{names[part]}.weight"
            heads = {
                "self_attn.q_proj": config["num_attention_heads"],
                "self_attn.k_proj": config["num_key_value_heads"],
            }.get(part)
            if heads:
                rows, columns = array.shape
                array = (
                    array.reshape(heads, 2, rows // heads // 2, columns)
                    .swapaxes(1, 2)
                    .reshape(rows, columns)
                )
        writer.add_tensor(target, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5])
def test_a_truncated_file_is_named(share, tmp_path, llama_folder):
    gguf = pytest.importorskip("gguf")
    import numpy as np

    file = tmp_path / "broken.gguf"
    write_gguf(gguf, np, file, llama_folder)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="broken.gguf cannot be converted"):
        convert_gguf(file, tmp_path / "cache")
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []
