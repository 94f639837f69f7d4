"""Names of models: what they mean, and what is said about those that mean nothing."""

import pytest

from sparse_expansion.model.sources import fetch_model, resolve_name


@pytest.mark.parametrize("size", ["12b", "12B"])
def test_pythia(size):
    found = resolve_name("pythia", size)
    assert (found.location, found.revision) == ("EleutherAI/pythia-12b-deduped", "step143000")


@pytest.mark.parametrize(
    ("size", "location"),
    [
        ("7B", "meta-llama/Llama-2-7b-hf"),
        ("13b", "meta-llama/Llama-2-13b-hf"),
        ("70B", "meta-llama/Llama-2-70b-hf"),
        ("8B", "meta-llama/Meta-Llama-3-8B"),
    ],
)
def test_llama(size, location):
    assert resolve_name("llama", size).location == location


def test_hub_id_and_folder(tmp_path):
    assert resolve_name("HuggingFaceTB/SmolLM2-135M").kind == "hub"
    assert resolve_name(str(tmp_path)).kind == "folder"


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        ("pythia", "3b", "one of 14m"),
        ("pythia", None, "needs --model_size"),
        ("llama", "12b", "7b, 13b, 70b"),
        ("gpt2", "7b", "goes with --model pythia"),
        ("./nowhere", None, "does not exist"),
        ("https://huggingface.co/o/n", None, "is a URL: give the hub id alone"),
        ("/nowhere/at/all", None, "does not exist"),
        ("model.gguf", None, "GGUF file model.gguf does not exist"),
    ],
)
def test_names_that_mean_nothing(model, size, message):
    with pytest.raises(ValueError, match=message):
        resolve_name(model, size)


def test_offline_and_not_cached_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="EleutherAI/pythia-14m-deduped.*local folder"):
        fetch_model(resolve_name("pythia", "14m"), cache_dir=str(tmp_path))


def test_not_a_hub_id(tmp_path):
    with pytest.raises(ValueError, match="check --model"):
        fetch_model(resolve_name("not a name!"), cache_dir=str(tmp_path))


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
