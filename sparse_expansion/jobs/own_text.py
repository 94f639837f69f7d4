"""Text that a model writes itself: what it was trained on is in it, where calibration text is not.

A. Williams et al., Self-calibration for language model quantization and pruning (arXiv
2410.17170), calibrate on such text alone. A document begins as in LLM-QAT (Z. Liu et al., arXiv
2305.17888, section 3.1): with a random token, and the likeliest few after it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_expansion.plain_files import read_plain
from sparse_expansion.store import Store

LIKELIEST_TOKENS = 3
"""Tokens behind the first that are the likeliest: a random word is followed by what belongs to it
before anything else is left to chance."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How documents are written. Equal settings write equal documents on one kind of device."""

    documents: int
    """How many."""
    seqlen: int
    """Tokens of each."""
    seed: int
    """Of first tokens and of samples."""
    temperature: float
    """Of the distribution that tokens are drawn from; 1 is the model's own."""
    batch_size: int
    """Documents that are written together."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        for name, least in (("documents", 2), ("seqlen", 2), ("seed", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} {getattr(self, name)} must be at least {least}")
        if not 0 < self.temperature <= 10:
            raise ValueError(
                f"--temperature {self.temperature:g} is outside 0 (exclusive) to 10: 1 samples "
                "from the model's own distribution"
            )

    def same_documents(self) -> dict[str, Any]:
        """The settings that a document depends on, whatever their number."""
        return {name: value for name, value in asdict(self).items() if name != "documents"}


def first_tokens(tokenizer: Any, count: int, generator: torch.Generator) -> torch.Tensor:
    """Random tokens ``[count, 1]`` of the vocabulary, none of them a special one."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    plain = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    return plain[torch.randint(len(plain), (count, 1), generator=generator)]


def write_batch(
    model: Any, tokenizer: Any, sampling: Sampling, *, first: int, count: int
) -> list[str]:
    """Documents of a batch, special tokens written out; which they are its number decides alone.

    Args:
        model: a whole language model of transformers.
        tokenizer: the model's.
        sampling: the settings.
        first: number of the batch's first document.
        count: documents of the batch.
    """
    seed = sampling.seed * 1_000_003 + first
    start = first_tokens(tokenizer, count, torch.Generator().manual_seed(seed)).to(model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        likeliest = min(sampling.seqlen, 1 + LIKELIEST_TOKENS)
        ids = _continued(model, start, likeliest, do_sample=False)
        ids = _continued(
            model,
            ids,
            sampling.seqlen,
            do_sample=True,
            temperature=sampling.temperature,
            top_k=0,
            top_p=1.0,
        )
    return [str(text) for text in tokenizer.batch_decode(ids, skip_special_tokens=False)]


def _continued(model: Any, ids: torch.Tensor, length: int, **how: Any) -> torch.Tensor:
    """Documents ``[N, L]`` with more tokens up to a length."""
    if ids.shape[1] >= length:
        return ids
    found: torch.Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length - ids.shape[1],
        # A document that ends early is followed by the next, as in training.
        eos_token_id=None,
        pad_token_id=0,
        **how,
    )
    return found


def read_written(file: Path, sampling: Sampling) -> list[str]:
    """The documents of a file that an interrupted command left, in whole batches.

    Raises:
        ValueError: it was written with other settings, or is no such file.
    """
    found = []
    for number, line in enumerate(read_plain(file).decode("utf-8", "replace").splitlines(), 1):
        try:
            row = json.loads(line)
            text, how = row.pop("text"), row
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{file}:{number} is no document that this command has written: give another "
                "--output, or remove it"
            ) from None
        if how != sampling.same_documents():
            other = ", ".join(f"{name} {value}" for name, value in how.items())
            raise ValueError(
                f"{file} was written with other settings ({other}): give the same, or another "
                "--output"
            )
        found.append(text)
    return found[: len(found) // sampling.batch_size * sampling.batch_size]


def write_documents(
    model: Any,
    tokenizer: Any,
    sampling: Sampling,
    *,
    file: Path,
    texts: list[str],
    written: Callable[[int], None],
) -> list[str]:
    """Write JSON lines of ``text``, and the settings; the file is whole after every batch.

    Args:
        model: a whole language model of transformers.
        tokenizer: the model's.
        sampling: the settings.
        file: to write, in a folder that is there.
        texts: whole batches that are written already, which the file keeps.
        written: is told the number of documents there are after every batch.

    Returns:
        All documents.
    """
    texts = list(texts)
    store = Store(file.parent)
    for first, count in _batches(len(texts), sampling):
        texts += write_batch(model, tokenizer, sampling, first=first, count=count)
        rows = ({"text": text, **sampling.same_documents()} for text in texts)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        store.write_bytes(file.name, lines.encode())
        written(len(texts))
    return texts


def _batches(done: int, sampling: Sampling) -> Iterator[tuple[int, int]]:
    for first in range(done, sampling.documents, sampling.batch_size):
        yield first, min(sampling.batch_size, sampling.documents - first)
