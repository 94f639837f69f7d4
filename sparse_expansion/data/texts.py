"""The text that a command is given, one or a mixture of several, cut into windows of tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_expansion.data.corpora import Corpus, load_corpus
from sparse_expansion.data.names import weighted_sources
from sparse_expansion.data.rows import Rows
from sparse_expansion.data.tokenization import Encode, chat_of, encoder
from sparse_expansion.data.windows import calibration_windows, evaluation_windows, whole_windows
from sparse_expansion.run_files import IN_MEMORY


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """What text is asked for."""

    dataset: Any
    """Name, path, or several of them with weights; or what ``memory_text.read_memory`` takes."""
    cache_dir: str | None = None
    """The folder of downloads; ``None`` for the library's own."""
    column: str | None = None
    """Of rows, see ``Rows``."""

    @property
    def name(self) -> str:
        """What results call it."""
        return str(self.dataset) if isinstance(self.dataset, str | Path) else IN_MEMORY

    def load(self, tokenizer: Any) -> Texts:
        """Read it, for a model's tokenizer.

        Raises:
            ValueError: the text is missing or empty, or the hub cannot be reached.
        """
        rows = Rows(self.column, chat_of(tokenizer))
        sources = self._sources()
        found = [
            load_corpus(dataset, cache_dir=self.cache_dir, rows=rows) for dataset, _ in sources
        ]
        return Texts(tuple(found), tuple(share for _, share in sources), encoder(tokenizer))

    def _sources(self) -> Sequence[tuple[Any, float]]:
        is_named = isinstance(self.dataset, str)
        return weighted_sources(self.dataset) if is_named else [(self.dataset, 1.0)]


@dataclass(frozen=True)
class Texts:
    """Texts in a model's tokens, and how windows are shared out over them."""

    corpora: tuple[Corpus, ...]
    shares: tuple[float, ...]
    """Of the windows, by text; they add up to 1."""
    encode: Encode

    def calibration(self, *, num_windows: int | None, seqlen: int, seed: int) -> torch.Tensor:
        """Windows ``[N, L]`` of the calibration texts.

        Those of several texts are shuffled.

        Args:
            num_windows: at random places; None for all of the text's, end to end, and of several
                texts for as many as their shares allow.
            seqlen: tokens in a window.
            seed: of the places, and of the order.

        Raises:
            ValueError: a text is too short, or so small a number leaves one of them out.
        """
        texts = [corpus.calibration for corpus in self.corpora]
        if num_windows is None:
            whole = [
                whole_windows(text, self.encode, seqlen=seqlen, kind="calibration")
                for text in texts
            ]
            parts = self._in_shares(whole)
        else:
            parts = [
                calibration_windows(text, self.encode, num_windows=count, seqlen=seqlen, seed=seed)
                for text, count in zip(
                    texts, self._counts(num_windows, "--dataset-size"), strict=True
                )
            ]
        return parts[0] if len(parts) == 1 else shuffled(parts, seed)

    def evaluation(self, *, seqlen: int, max_windows: int | None) -> torch.Tensor:
        """The first ``max_windows`` windows ``[N, L]`` of the evaluation texts, or all.

        Of several texts these are the first of each, in their shares, one text behind the other.

        Raises:
            ValueError: a text is too short, or so small a number leaves one of them out.
        """
        counts: Sequence[int | None] = [None] * len(self.corpora)
        if max_windows is not None:
            counts = self._counts(max_windows, "--eval-windows")
        parts = [
            evaluation_windows(corpus.evaluation, self.encode, seqlen=seqlen, max_windows=count)
            for corpus, count in zip(self.corpora, counts, strict=True)
        ]
        return torch.cat(self._in_shares(parts) if max_windows is None else parts)

    def _counts(self, total: int, flag: str) -> list[int]:
        """Windows of every text: its share, the largest remainders rounded up.

        Raises:
            ValueError: a text would have none.
        """
        exact = [total * share for share in self.shares]
        counts = [math.floor(number) for number in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
        for i in by_remainder[: total - sum(counts)]:
            counts[i] += 1
        for corpus, count in zip(self.corpora, counts, strict=True):
            if count == 0:
                raise ValueError(
                    f"{flag} {total} leaves no window to {corpus.name}: give more windows, or the "
                    "text a larger weight"
                )
        return counts

    def _in_shares(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """As many windows of every text as its share allows, where one text is used up."""
        if len(parts) == 1:
            return parts
        total = min(len(part) / share for part, share in zip(parts, self.shares, strict=True))
        # A hair more, so that a share that was rounded down takes no window away.
        counts = [math.floor(total * share + 1e-9) for share in self.shares]
        return [part[: max(1, count)] for part, count in zip(parts, counts, strict=True)]


def shuffled(parts: Sequence[torch.Tensor], seed: int) -> torch.Tensor:
    """Windows ``[N, L]`` of several texts, so that each shard of them has some of every text."""
    order = list(range(sum(map(len, parts))))
    random.Random(seed).shuffle(order)
    return torch.cat(list(parts))[order]
