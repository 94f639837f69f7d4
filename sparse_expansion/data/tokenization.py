"""Text to token ids, in memory that does not grow with the text."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from sparse_expansion.data.rows import Chat, Messages
from sparse_expansion.messages import first_line


class Encode(Protocol):
    """A function from a text to its token ids, ``[T]`` int64."""

    def __call__(self, text: str, *, most: int | None = None) -> torch.Tensor:
        """The first ``most`` token ids, or all; what comes behind them need not be looked at."""
        ...


PIECE = 1 << 18
"""The number of characters that go through a tokenizer together."""
OVERLAP = 1 << 12
"""The number of characters at the end of a piece that the next piece begins with."""
_MOST_THREADS = 4
"""Pieces at work at a time: a tokenizer does not hold the interpreter's lock. Each piece takes some
forty megabytes."""


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


def chat_of(tokenizer: Any) -> Chat | None:
    """A function that makes a conversation's text; None where the tokenizer has no template."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None

    def chat(messages: Messages) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    return chat


def encoder(tokenizer: Any, *, piece: int = PIECE, overlap: int = OVERLAP) -> Encode:
    """A function that gives the token ids that the tokenizer gives for a whole text.

    A tokenizer at work keeps over half a kilobyte per token, which is gigabytes for the text of a
    long calibration. A text therefore goes through it in pieces that overlap. Where two pieces
    have the same tokens at the same places all over the middle of their overlap, the tokens of the
    first end there and those of the second begin. A text whose pieces do not agree (a word is as
    long as an overlap) goes through whole, and so does every text of a tokenizer that does not
    report where its tokens are. Pieces are worked on by several threads.

    Args:
        tokenizer: a transformers tokenizer.
        piece: the number of characters of a piece.
        overlap: the number of characters that neighbouring pieces share.
    """

    def encode(text: str, *, most: int | None = None) -> torch.Tensor:
        ids = (
            _in_pieces(tokenizer, text, piece, overlap, most)
            if getattr(tokenizer, "is_fast", False)
            else None
        )
        if ids is None:
            ids = np.array(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)
        return torch.from_numpy(ids[:most])

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
    tokenizer: Any, text: str, size: int, overlap: int, most: int | None
) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """The token ids of a text that goes through in pieces; None if two pieces do not agree.

    The text's end is not reached where ``most`` tokens are had before.
    """
    parts: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    count = 0
    before: _Piece | None = None
    for start, found in _pieces(tokenizer, text, size, overlap):
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
            count += len(parts[-1])
            if most is not None and count >= most:
                return np.concatenate(parts)
            found.ids, found.places = found.ids[new.start :], found.places[new.start :]
        before = found
    assert before is not None
    return np.concatenate([*parts, before.ids])


def _pieces(tokenizer: Any, text: str, size: int, overlap: int) -> Iterator[tuple[int, _Piece]]:
    """Every piece's first character and its tokens, in order."""
    starts = range(0, max(1, len(text) - overlap), size - overlap)

    def piece(start: int) -> _Piece:
        return _piece(tokenizer, text, start, min(start + size, len(text)))

    # The first by itself: it takes off whatever truncation and padding a tokenizer comes with,
    # which must not happen while others are at work.
    yield 0, piece(0)
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        pending: deque[tuple[int, Future[_Piece]]] = deque()
        try:
            for start in starts[1:]:
                pending.append((start, pool.submit(piece, start)))
                if len(pending) > _MOST_THREADS:
                    first, future = pending.popleft()
                    yield first, future.result()
            for first, future in pending:
                yield first, future.result()
        finally:
            for _, future in pending:
                future.cancel()


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
