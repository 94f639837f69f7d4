"""Makers of tiny models and tokenizers for the tests."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 512
# A whole run in a second: the settings that the tests of faults, jobs and Ray share.
SMALL_RUN = (
    "--num_clusters 4 --dataset-size 12 --seqlen 48 --PCA_reduction_factor 4 --block-size 16 "
    "--experts-per-unit 2 --threads 1"
).split()
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": dict(
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    ),
    "mistral": dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=16,
    ),
    "qwen2": dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    ),
    "qwen3": dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
    ),
    "opt": dict(
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=16,
    ),
    "gpt_neox": dict(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        use_parallel_residual=True,
        tie_word_embeddings=False,
    ),
}


def train_tokenizer(text: str, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )


def random_model(model_type: str, **changes: Any) -> Any:
    """A seeded random model of a family."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(model_type, **{**COMMON, **CONFIGS[model_type], **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def save_random(model_type: str, folder: Path, tokenizer: Any, **changes: Any) -> Path:
    """A seeded random model, saved with the tokenizer."""
    random_model(model_type, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_trained_neox(
    folder: Path,
    tokenizer: Any,
    text: str,
    *,
    steps: int = 250,
    batch_shape: tuple[int, int] = (16, 64),
    rate: float = 3e-3,
    **changes: Any,
) -> Path:
    """A GPT-NeoX trained on random windows of the text, for a few seconds by default."""
    model = random_model("gpt_neox", **changes)
    windows, seqlen = batch_shape
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(0, len(tokens) - seqlen - 1, (windows,), generator=generator)
        batch = torch.stack([tokens[start : start + seqlen] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight file of a folder."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.glob("*.safetensors"))
    }
