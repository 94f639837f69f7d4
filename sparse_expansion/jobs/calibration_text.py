"""Text of a model's own for a run's calibration: written before it, and kept for the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_expansion.config import CalibrationConfig, digest
from sparse_expansion.jobs.own_text import Sampling, read_written, write_documents
from sparse_expansion.jobs.whole_model import chosen_device, load_whole

BATCH_SIZE = 16
"""Documents that are written together."""


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Where, and with what, a dense model writes."""

    folder: Path
    """Of the model."""
    device: str
    """``cpu``, ``cuda`` or ``auto``."""
    dtype: str
    """Of the model while it writes, ``auto`` for the checkpoint's."""
    threads: int | None
    """CPU threads; None for PyTorch's own number."""
    cache_dir: Path
    """Where documents are kept, a file for all equal settings."""
    doing: Callable[[str], None]
    """Is told how far it is."""

    def write(self, calibration: CalibrationConfig, weights: str, documents: int) -> str:
        """Documents, one behind the other as one text; those that are kept are not written again.

        Args:
            calibration: says how long they are, and their seed.
            weights: digest of the model's files, by which what is kept is known again.
            documents: how many.

        Raises:
            ValueError: the model does not fit into the device's memory.
        """
        # Whole batches: what a document is depends on those that are written with it.
        sampling = Sampling(
            documents=-(-documents // BATCH_SIZE) * BATCH_SIZE,
            seqlen=calibration.seqlen,
            seed=calibration.seed,
            temperature=1.0,
            batch_size=BATCH_SIZE,
        )
        file = self._file(sampling, weights)
        texts = read_written(file, sampling) if file.exists() else []
        if len(texts) < sampling.documents:
            texts = self._written(sampling, file, texts)
        return " ".join(texts[:documents])

    def _file(self, sampling: Sampling, weights: str) -> Path:
        # Another kind of device, or of weights, gives other samples.
        device = chosen_device(self.device)
        name = digest(weights, sampling.same_documents(), device.partition(":")[0], self.dtype)
        return self.cache_dir / "own-text" / f"{name}.jsonl"

    def _written(self, sampling: Sampling, file: Path, texts: list[str]) -> list[str]:
        """All documents, of which some may be there."""

        def written(count: int) -> None:
            self.doing(f"having the model write text ({count} of {sampling.documents} documents)")

        file.parent.mkdir(parents=True, exist_ok=True)
        written(len(texts))
        try:
            with _threads(self.threads):
                model, tokenizer = load_whole(
                    self.folder, device=self.device, dtype=self.dtype, verify=False
                )
                return write_documents(
                    model, tokenizer, sampling, file=file, texts=texts, written=written
                )
        except torch.OutOfMemoryError:
            raise ValueError(
                f"--own-text: the whole model does not fit on {chosen_device(self.device)} to "
                "write text: write it on a larger device with write-text, and name that file in "
                "--dataset"
            ) from None
        finally:
            # The run needs the card for itself.
            model = tokenizer = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """PyTorch's threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
