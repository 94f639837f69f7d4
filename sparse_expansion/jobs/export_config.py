"""Config and tokenizer of an exported folder, for readers that have transformers 4 too.

What transformers 5 has renamed is under both names; it reads the older ones, and means the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparse_expansion.config.checks import has_form
from sparse_expansion.model.checkpoint import companions
from sparse_expansion.model.families import Family
from sparse_expansion.plain_files import read_plain
from sparse_expansion.store import json_bytes

_TOKENIZER_CONFIG = "tokenizer_config.json"


def for_both_generations(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """A config as transformers 5 writes it, with the names that version 4 knows.

    Args:
        config: as a dictionary.
        family: of the model.
    """
    found = {**config, "torch_dtype": config.get("dtype")}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):
        places = [name.rpartition(".")[::2] for name, _ in family.rope_names]
        for (kind, leaf), (_, older) in zip(places, family.rope_names, strict=True):
            settings = _rope_settings(rope, kind)
            found |= {older: settings[leaf]} if leaf in settings else {}
        renamed = [leaf for _, leaf in places]
        first = _rope_settings(rope, places[0][0])
        scaling = {name: value for name, value in first.items() if name not in renamed}
        is_plain = scaling.get("rope_type", "default") == "default"
        found["rope_scaling"] = None if is_plain else scaling
    return found


def _rope_settings(rope: dict[str, Any], kind: str) -> dict[str, Any]:
    """Settings of rotary positions, of one kind of attention where kinds have their own."""
    found = rope.get(kind) if kind else rope
    return found if isinstance(found, dict) else {}


def companion_files(folder: Path) -> dict[str, bytes]:
    """The files that travel with a model, by name, with the older names of what is in them."""
    files = {path.name: read_plain(path) for path in companions(folder)}
    if _TOKENIZER_CONFIG in files:
        files[_TOKENIZER_CONFIG] = _tokenizer_config(files[_TOKENIZER_CONFIG])
    return files


def _tokenizer_config(data: bytes) -> bytes:
    """A tokenizer's config whose class, and the form of its extra tokens, version 4 knows."""
    config = json.loads(data)
    if not isinstance(config, dict):
        return data
    changes: dict[str, Any] = {}
    if config.get("tokenizer_class") == "TokenizersBackend":
        changes["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = config.get("extra_special_tokens")
    if extra is not None and has_form(extra, list):
        changes["additional_special_tokens"] = extra
        config = {key: value for key, value in config.items() if key != "extra_special_tokens"}
    return json_bytes({**config, **changes}) if changes else data
