"""How a model continues a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from sparse_expansion.jobs.whole_model import load_whole


def continuation(folder: Path, prompt: str, num_tokens: int, *, device: str, dtype: str) -> str:
    """The text that follows a prompt, by the most likely token every time.

    Args:
        folder: of a dense or an expanded model, which is loaded whole and let go again.
        prompt: to continue.
        num_tokens: new tokens at most: the model may end before.
        device: ``cpu``, ``cuda`` or ``auto``.
        dtype: a name of ``config.DTYPES``.

    Raises:
        ValueError: the prompt has no tokens, or is too long for the model.
    """
    return continued(
        *load_whole(folder, device=device, dtype=dtype, verify=True), prompt, num_tokens
    )


def continued(model: Any, tokenizer: Any, prompt: str, num_tokens: int) -> str:
    """``continuation`` by a model of transformers that is loaded, with its tokenizer."""
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    count = tokens.shape[1]
    if not count:
        raise ValueError("--sample: the prompt has no tokens, give a few words")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and count + num_tokens > positions:
        raise ValueError(
            f"--sample: {count} tokens and {num_tokens} new ones are more than the model's "
            f"{positions} positions: give a shorter prompt, or fewer --sample-tokens"
        )
    end = model.generation_config.eos_token_id
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=num_tokens,
        eos_token_id=end,
        pad_token_id=end[0] if isinstance(end, list) else end,
    )
    with torch.no_grad():
        found = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), generation_config=greedy
        )
    return str(tokenizer.decode(found[0, count:], skip_special_tokens=True))
