"""Published configurations of real models, and their published parameter counts."""

from transformers import GPTNeoXConfig, LlamaConfig


def llama(vocab_size: int, heads: int, kv_heads: int, **sizes: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=False,
        dtype="float16",
        max_position_embeddings=4096,
        **sizes,
    )


MODELS = {
    "pythia-12b": (
        GPTNeoXConfig(
            vocab_size=50688,
            hidden_size=5120,
            intermediate_size=20480,
            num_hidden_layers=36,
            num_attention_heads=40,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            dtype="float16",
        ),
        11_846_072_320,
    ),
    "llama-2-7b": (
        llama(32000, 32, 32, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32),
        6_738_415_616,
    ),
    "llama-2-13b": (
        llama(32000, 40, 40, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40),
        13_015_864_320,
    ),
    "llama-2-70b": (
        llama(32000, 64, 8, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80),
        68_976_648_192,
    ),
    "llama-3-8b": (
        llama(128256, 32, 8, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32),
        8_030_261_248,
    ),
}
