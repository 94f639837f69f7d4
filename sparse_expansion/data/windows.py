"""Texts to windows of token ids."""

from __future__ import annotations

import random

import torch

from sparse_expansion.data.tokenization import Encode

Text = str | torch.Tensor
"""A text, or its token ids ``[T]`` int64 where these alone are known."""


def _tokens(text: Text, encode: Encode, most: int | None = None) -> torch.Tensor:
    """The first ``most`` token ids of a text, or all."""
    return encode(text, most=most) if isinstance(text, str) else text[:most]


def calibration_windows(
    text: Text, encode: Encode, *, num_windows: int, seqlen: int, seed: int
) -> torch.Tensor:
    """``num_windows`` random windows of the tokenised text, ``[N, L]`` int64.

    Windows start anywhere and may overlap, as in GPTQ and SparseGPT. The same seed gives the same
    windows.

    Raises:
        ValueError: the text has too few tokens for one window.
    """
    tokens = _tokens(text, encode)
    if len(tokens) <= seqlen:
        raise ValueError(
            f"the calibration text has {len(tokens)} tokens, {seqlen + 1} are needed for a window "
            f"of {seqlen}: give a longer text or a smaller --seqlen"
        )
    generator = random.Random(seed)
    starts = [generator.randint(0, len(tokens) - seqlen - 1) for _ in range(num_windows)]
    return torch.stack([tokens[start : start + seqlen] for start in starts])


def whole_windows(
    text: Text, encode: Encode, *, seqlen: int, kind: str, most: int | None = None
) -> torch.Tensor:
    """All windows ``[N, L]`` of the tokenised text, end to end; the remainder is dropped.

    Args:
        text: to be tokenised.
        encode: does so.
        seqlen: tokens in a window.
        kind: of the text, for the error.
        most: windows; all of them if None.

    Raises:
        ValueError: the text of this ``kind`` has too few tokens for one window.
    """
    tokens = _tokens(text, encode, None if most is None else most * seqlen)
    count = len(tokens) // seqlen
    if count == 0:
        raise ValueError(
            f"the {kind} text has {len(tokens)} tokens, {seqlen} are needed for a window: give "
            "a longer text or a smaller --seqlen"
        )
    return tokens[: count * seqlen].reshape(count, seqlen)


def evaluation_windows(
    text: Text, encode: Encode, *, seqlen: int, max_windows: int | None
) -> torch.Tensor:
    """The first ``max_windows`` windows ``[N, L]`` of the tokenised text, end to end, or all.

    Raises:
        ValueError: the text has too few tokens for one window, or for ``max_windows``.
    """
    windows = whole_windows(text, encode, seqlen=seqlen, kind="evaluation", most=max_windows)
    if max_windows is not None and max_windows > len(windows):
        raise ValueError(
            f"--eval-windows {max_windows} of {seqlen} tokens need {max_windows * seqlen} tokens, "
            f"the evaluation text has {len(windows)} windows: use --eval-windows {len(windows)}"
        )
    return windows[:max_windows]
