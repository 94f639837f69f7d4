"""The manifest of an expanded folder: every tensor's file, size and digest, and their check.

``manifest.json`` is written last but for ``config.json``; with it a damaged, truncated or
exchanged file is found and named without the run folder.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

MANIFEST_NAME = "manifest.json"


def tensor_record(tensor: torch.Tensor) -> dict[str, Any]:
    """A tensor's dtype, shape and bytes, and the SHA-256 of its values as they are stored.

    Values are stored little-endian, in the order of a contiguous tensor.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().data if flat.numel() else b""
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "bytes": tensor.numel() * tensor.element_size(),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an expanded folder.

    Raises:
        ValueError: the folder has none, or it is not JSON.
    """
    path = folder / MANIFEST_NAME
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {MANIFEST_NAME}: it is not a finished run") from None
    except json.JSONDecodeError:
        raise ValueError(f"{path} is not valid JSON: finish the run again with --resume") from None
    return found
