"""The manifest of an expanded folder: every tensor's file, size and digest, and their check.

``manifest.json`` is written last but for ``config.json``; with it a damaged, truncated or
exchanged file is found and named without the run folder.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from sparse_expansion.config.checks import parse_json
from sparse_expansion.plain_files import read_plain
from sparse_expansion.tensor_files import tensor_bytes

MANIFEST_NAME = "manifest.json"
_TENSOR_FORM = {"file": str, "dtype": str, "shape": [int], "bytes": int, "sha256": str}
MANIFEST_FORM = {"tensors": {...: _TENSOR_FORM}}
"""What its readers rely on."""


def tensor_record(tensor: torch.Tensor) -> dict[str, Any]:
    """A tensor's dtype, shape and bytes, and the SHA-256 of its values as they are stored.

    Values are stored little-endian, in the order of a contiguous tensor.
    """
    data = tensor_bytes(tensor.detach().cpu().contiguous())
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "bytes": tensor.numel() * tensor.element_size(),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an expanded folder.

    Raises:
        ValueError: the folder has none, or it is not JSON, or not a manifest.
    """
    path = folder / MANIFEST_NAME
    try:
        data = read_plain(path)
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {MANIFEST_NAME}: it is not a finished run") from None
    remedy = "finish the run again with --resume"
    found: dict[str, Any] = parse_json(data, MANIFEST_FORM, name=str(path), remedy=remedy)
    return found
