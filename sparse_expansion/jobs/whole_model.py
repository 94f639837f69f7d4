"""A model as any user of transformers loads it: whole, with its experts compressed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparse_expansion.model.quantizer  # noqa: F401 - registers the checkpoint format
from sparse_expansion.model.checkpoint import load_config


def chosen_device(device: str) -> str:
    """A device's name, where ``auto`` is a GPU if there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def load_whole(folder: Path, *, device: str, dtype: str, verify: bool) -> tuple[Any, Any]:
    """The model and its tokenizer; no code from the folder is run.

    Args:
        folder: of a dense or an expanded model.
        device: ``cpu``, ``cuda`` or ``auto``.
        dtype: dtype of weights and arithmetic, ``auto`` for the checkpoint's.
        verify: whether an expanded model's tensors are checked against their digests.
    """
    device = chosen_device(device)
    config = load_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        config.quantization_config["verify"] = verify
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return model.to(device).eval(), tokenizer
