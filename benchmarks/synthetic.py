"""Models of given shapes with random weights, and runs of the command line on them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparse_expansion.data.corpora import load_corpus
from tests.tiny import VOCABULARY, train_tokenizer


def save_model(folder: Path, model_type: str, dtype: torch.dtype, **sizes: Any) -> Path:
    """A seeded random model with a small tokenizer of the offline corpus."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCABULARY, tie_word_embeddings=False, dtype=dtype, **sizes
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    train_tokenizer(load_corpus("pydoc").calibration[:200_000]).save_pretrained(folder)
    return folder


def command(*arguments: str | Path) -> dict[str, Any]:
    """The JSON result of `sparse-expansion ARGUMENTS --json`, in a process of its own."""
    line = [sys.executable, "-m", "sparse_expansion.cli", *map(str, arguments), "--json"]
    out = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(out)
    return result
