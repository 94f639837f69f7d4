"""Text to token ids, in memory that does not grow with the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_expansion.messages import first_line

Encode = Callable[[str], torch.Tensor]
"""A function from a text to its token ids, ``[T]`` int64."""

PIECE = 1 << 18
"""The number of characters that go through a tokenizer together."""
OVERLAP = 1 << 12
"""The number of characters at the end of a piece that the next piece begins with."""


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer.

    Raises:
        ValueError: the folder has none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        line = first_line(error)
        raise ValueError(f"{folder} has no readable tokenizer: {line}") from None


def encoder(tokenizer: Any, *, piece: int = PIECE, overlap: int = OVERLAP) -> Encode:
    """A function that gives the token ids that the tokenizer gives for a whole text.

    A tokenizer at work keeps over half a kilobyte per token, which is gigabytes for the text of a
    long calibration. A text therefore goes through it in pieces that overlap. Where two pieces
    have the same tokens at the same places all over the middle of their overlap, the tokens of the
    first end there and those of the second begin. A text whose pieces do not agree (a word is as
    long as an overlap) goes through whole, and so does every text of a tokenizer that does not
    report where its tokens are.

    Args:
        tokenizer: a transformers tokenizer.
        piece: the number of characters of a piece.
        overlap: the number of characters that neighbouring pieces share.
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
    """The tokens of a part of a text."""

    ids: np.ndarray[Any, np.dtype[np.int64]]
    """The token ids."""
    places: np.ndarray[Any, np.dtype[np.int64]]
    """The character of the whole text at which every token begins."""
    end: int
    """The character of the whole text behind the piece."""


def _in_pieces(
    tokenizer: Any, text: str, size: int, overlap: int
) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """The token ids of a text that goes through in pieces; None if two pieces do not agree."""
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
    """The tokens of the characters from ``start`` to ``end``.

    Special tokens that a tokenizer puts around a text are only kept at the ends of the whole text.
    """
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
    # A special token behind the text is reported to begin where the text does.
    places = np.maximum.accumulate(places)
    return _Piece(ids, places[first:last] + start, end)
