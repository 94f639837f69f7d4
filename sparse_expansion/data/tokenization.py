"""Text to token ids, in memory that does not grow with the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

Encode = Callable[[str], torch.Tensor]
"""Text to its token ids, ``[T]`` int64."""

PIECE = 1 << 18
"""Characters that go through a tokenizer together."""
OVERLAP = 1 << 12
"""Characters at the end of a piece that the next one begins with."""


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder} has no readable tokenizer: {line}") from None


def encoder(tokenizer: Any, *, piece: int = PIECE, overlap: int = OVERLAP) -> Encode:
    """Token ids as the tokenizer gives them for a whole text.

    While at work a tokenizer keeps over half a kilobyte per token: gigabytes for the text of a long
    calibration. So a text goes through it in pieces that overlap. Where, all over the middle of an
    overlap, both pieces have the same tokens at the same places, the one's tokens end and the
    other's begin. A text whose pieces do not agree (a word as long as an overlap) goes through
    whole, as it does with a tokenizer that does not say where its tokens are.
    """

    def encode(text: str) -> torch.Tensor:
        ids = (
            _in_pieces(tokenizer, text, piece, overlap)
            if getattr(tokenizer, "is_fast", False)
            else None
        )
        if ids is None:
            ids = np.array(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)
        return torch.from_numpy(ids)

    return encode


@dataclass
class _Piece:
    ids: np.ndarray[Any, np.dtype[np.int64]]
    places: np.ndarray[Any, np.dtype[np.int64]]
    """Of every token: where in the whole text it begins."""
    end: int


def _in_pieces(
    tokenizer: Any, text: str, size: int, overlap: int
) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """The ids, or None where two pieces do not agree."""
    parts = []
    start = 0
    before: _Piece | None = None
    while True:
        found = _piece(tokenizer, text, start, min(start + size, len(text)))
        if before is not None:
            low, high = start + overlap // 4, before.end - overlap // 4
            ends, begins = (np.searchsorted(p.places, (low, high)) for p in (before, found))
            old, new = slice(*ends), slice(*begins)
            if not (
                np.array_equal(before.ids[old], found.ids[new])
                and np.array_equal(before.places[old], found.places[new])
                and len(before.ids[old])
            ):
                return None
            parts.append(before.ids[: old.start])
            found.ids, found.places = found.ids[new.start :], found.places[new.start :]
        if found.end == len(text):
            return np.concatenate([*parts, found.ids])
        before, start = found, found.end - overlap


def _piece(tokenizer: Any, text: str, start: int, end: int) -> _Piece:
    """Tokens of a part of the text; what is put around a text is there at its own ends alone."""
    made = tokenizer(
        text[start:end],
        verbose=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    of_text = np.flatnonzero(np.array(made["special_tokens_mask"]) == 0)
    first = of_text[0] if start and len(of_text) else 0
    last = of_text[-1] + 1 if end < len(text) and len(of_text) else None
    ids = np.array(made["input_ids"], dtype=np.int64)[first:last]
    places = np.array([place for place, _ in made["offset_mapping"]], dtype=np.int64)
    # What is put behind a text claims to begin where the text does.
    places = np.maximum.accumulate(places)
    return _Piece(ids, places[first:last] + start, end)
