"""The text that a command is given: how it is named, read, and cut into windows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_expansion.data.corpora import Corpus, check_dataset, load_corpus
from sparse_expansion.data.rows import Rows
from sparse_expansion.data.tokenization import Encode, chat_of, encoder
from sparse_expansion.data.windows import calibration_windows, evaluation_windows, whole_windows
from sparse_expansion.run_files import IN_MEMORY


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """What text is asked for."""

    dataset: Any
    """Name, path, or what ``memory_text.read_memory`` takes."""
    cache_dir: str | None = None
    """The folder of downloads; ``None`` for the library's own."""

    @property
    def name(self) -> str:
        """What results call it."""
        return str(self.dataset) if isinstance(self.dataset, str | Path) else IN_MEMORY

    def check(self) -> None:
        """Reject a wrong data set before any long work.

        Raises:
            ValueError: it is not there.
        """
        check_dataset(self.dataset)

    def load(self, tokenizer: Any) -> Texts:
        """Read it, for a model's tokenizer.

        Raises:
            ValueError: the text is missing or empty, or the hub cannot be reached.
        """
        rows = Rows(chat=chat_of(tokenizer))
        corpus = load_corpus(self.dataset, cache_dir=self.cache_dir, rows=rows)
        return Texts(corpus, encoder(tokenizer))


@dataclass(frozen=True)
class Texts:
    """A text in a model's tokens."""

    corpus: Corpus
    encode: Encode

    def calibration(self, *, num_windows: int | None, seqlen: int, seed: int) -> torch.Tensor:
        """Windows ``[N, L]`` of the calibration text.

        Args:
            num_windows: at random places; None for all of the text's, end to end.
            seqlen: tokens in a window.
            seed: of the places.

        Raises:
            ValueError: the text is too short.
        """
        text = self.corpus.calibration
        if num_windows is None:
            return whole_windows(text, self.encode, seqlen=seqlen, kind="calibration")
        return calibration_windows(
            text, self.encode, num_windows=num_windows, seqlen=seqlen, seed=seed
        )

    def evaluation(self, *, seqlen: int, max_windows: int | None) -> torch.Tensor:
        """The first ``max_windows`` windows ``[N, L]`` of the evaluation text, or all.

        Raises:
            ValueError: the text is too short.
        """
        return evaluation_windows(
            self.corpus.evaluation, self.encode, seqlen=seqlen, max_windows=max_windows
        )
