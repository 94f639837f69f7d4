"""Text to token windows: hub datasets, the offline ``pydoc`` corpus, local folders and files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_expansion.data.tokenization import Encode

NAMED = ("wikitext2", "c4", "pydoc")
_SUFFIXES = (".txt", ".jsonl", ".parquet")
_TRAIN_NAMES = ("train", "valid", "validation")
_TEST_NAMES = ("test",)
_C4_EVALUATION_DOCUMENTS = 1100
_C4_CALIBRATION_DOCUMENTS = 20_000
"""About 9 million tokens: more than most calibrations draw from."""


@dataclass(frozen=True)
class Corpus:
    """Text for calibration and text for evaluation."""

    name: str
    """The name of the data set, or the path of a local one."""
    calibration: str
    """The text that a model is calibrated on."""
    evaluation: str
    """The text that perplexity is measured on."""


def check_dataset(dataset: str) -> None:
    """Reject a wrong ``--dataset`` before any long work.

    Raises:
        ValueError: the data set is neither a known name nor an existing folder or file that can
            hold text.
    """
    if dataset in NAMED:
        return
    path = Path(dataset).expanduser()
    if not path.exists():
        raise ValueError(
            f"dataset {dataset!r} is neither {', '.join(NAMED)} nor an existing folder or file: "
            "check --dataset"
        )
    if path.is_dir():
        for names in (_TRAIN_NAMES, _TEST_NAMES):
            _find(path, names)
    elif path.suffix not in _SUFFIXES:
        raise ValueError(f"dataset file {path} is none of {', '.join(_SUFFIXES)}")


def load_corpus(dataset: str, *, cache_dir: str | None = None) -> Corpus:
    """Read the calibration text and the evaluation text of a data set.

    The lines of WikiText-2 are joined as in GPTQ and SparseGPT: training lines by a space, test
    lines by a blank line. The first nine tenths of a single local file are the calibration text,
    and the rest is the evaluation text.

    Raises:
        ValueError: the text is missing or empty, or the hub cannot be reached.
    """
    check_dataset(dataset)
    if dataset == "pydoc":
        corpus = _pydoc()
    elif dataset == "wikitext2":
        corpus = _wikitext2(cache_dir)
    elif dataset == "c4":
        corpus = _c4(cache_dir)
    else:
        corpus = _local(Path(dataset).expanduser())
    for kind, text in (("calibration", corpus.calibration), ("evaluation", corpus.evaluation)):
        if not text.strip():
            raise ValueError(f"dataset {dataset!r} has an empty {kind} text: give one with text")
    return corpus


def _pydoc() -> Corpus:
    """The Python language reference, which every Python has offline.

    The first four fifths of its topics are the calibration text, the rest is the evaluation text.
    """
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    cut = len(texts) * 4 // 5
    return Corpus("pydoc", "\n\n".join(texts[:cut]), "\n\n".join(texts[cut:]))


def _wikitext2(cache_dir: str | None) -> Corpus:
    """WikiText-2, from the hub or its cache."""
    train = _hub_texts("Salesforce/wikitext", "wikitext-2-raw-v1", "train", cache_dir)
    test = _hub_texts("Salesforce/wikitext", "wikitext-2-raw-v1", "test", cache_dir)
    return Corpus("wikitext2", " ".join(train), "\n\n".join(test))


def _c4(cache_dir: str | None) -> Corpus:
    """The first documents of C4's first training file and of its first validation file."""
    files = {
        "train": ("en/c4-train.00000-of-01024.json.gz", _C4_CALIBRATION_DOCUMENTS),
        "validation": ("en/c4-validation.00000-of-00008.json.gz", _C4_EVALUATION_DOCUMENTS),
    }
    train, valid = (
        " ".join(_hub_texts("allenai/c4", None, split, cache_dir, *file))
        for split, file in files.items()
    )
    return Corpus("c4", train, valid)


def _hub_texts(
    repository: str,
    name: str | None,
    split: str,
    cache_dir: str | None,
    file: str | None = None,
    first: int | None = None,
) -> list[str]:
    """The documents of a hub data set's split.

    Args:
        repository: the hub id of the data set.
        name: the data set's configuration.
        split: the name of the split.
        cache_dir: the folder of downloads; ``None`` for the library's own.
        file: the file of the repository to read instead of the whole split.
        first: the number of documents to read; ``None`` for all.

    Raises:
        ValueError: the documents are not in the cache and cannot be downloaded.
    """
    from datasets import load_dataset

    # The library slices, not this function: a file of C4 is most of a gigabyte.
    chosen = split if first is None else f"{split}[:{first}]"
    options: dict[str, Any] = {"split": chosen, "cache_dir": cache_dir}
    if file is not None:
        options["data_files"] = {split: file}
    try:
        return list(load_dataset(repository, name, **options)["text"])
    except (OSError, ValueError, RuntimeError) as error:
        # The library reports a hub that cannot be reached as any of these.
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"dataset {repository} ({split}) is not in the cache and cannot be downloaded "
            f"({line}): run once with a network, or give --dataset pydoc (offline) or a folder "
            "with train.txt and test.txt"
        ) from None


def _find(folder: Path, names: tuple[str, ...]) -> Path:
    """The first file in the folder that has one of the names and a known ending.

    Raises:
        ValueError: there is no such file.
    """
    for name in names:
        for suffix in _SUFFIXES:
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    raise ValueError(
        f"dataset folder {folder} has no {' or '.join(names)} with ending "
        f"{', '.join(_SUFFIXES)}: put one there"
    )


def _local(path: Path) -> Corpus:
    """The corpus of a folder with a file for each text, or of a single file."""
    if path.is_dir():
        calibration, evaluation = _find(path, _TRAIN_NAMES), _find(path, _TEST_NAMES)
        return Corpus(str(path), _read(calibration, " "), _read(evaluation, "\n\n"))
    records = _records(path)
    cut = max(1, len(records) * 9 // 10)
    return Corpus(str(path), " ".join(records[:cut]), "\n\n".join(records[cut:]))


def _read(path: Path, separator: str) -> str:
    """The text of a file; ``separator`` joins documents that have no lines of their own."""
    if path.suffix == ".txt":
        return _text(path)
    return separator.join(_records(path))


def _text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        ValueError: the file is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: convert it") from None


def _records(path: Path) -> list[str]:
    """The documents of a file: the lines of .txt, the ``text`` fields of .jsonl and .parquet.

    Raises:
        ValueError: the file has no readable text.
    """
    if path.suffix == ".txt":
        return _text(path).splitlines()
    if path.suffix == ".jsonl":
        return list(_jsonl(path))
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, columns=["text"])
    except (pyarrow.ArrowInvalid, KeyError, OSError) as error:
        line = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} has no readable column 'text': {line}") from None
    return [text for text in table.column("text").to_pylist() if text is not None]


def _jsonl(path: Path) -> Iterator[str]:
    """The ``text`` fields of a file with one JSON object per line; blank lines are skipped.

    Raises:
        ValueError: a line is not a JSON object with a ``text``.
    """
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield str(json.loads(line)["text"])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: not a JSON object with a 'text'") from None


def calibration_windows(
    text: str, encode: Encode, *, num_windows: int, seqlen: int, seed: int
) -> torch.Tensor:
    """``num_windows`` random windows of the tokenised text, ``[N, L]`` int64.

    Windows start anywhere and may overlap, as in GPTQ and SparseGPT. The same seed gives the same
    windows.

    Raises:
        ValueError: the text has too few tokens for one window.
    """
    tokens = encode(text)
    if len(tokens) <= seqlen:
        raise ValueError(
            f"the calibration text has {len(tokens)} tokens, {seqlen + 1} are needed for a window "
            f"of {seqlen}: give a longer text or a smaller --seqlen"
        )
    generator = random.Random(seed)
    starts = [generator.randint(0, len(tokens) - seqlen - 1) for _ in range(num_windows)]
    return torch.stack([tokens[start : start + seqlen] for start in starts])


def whole_windows(text: str, encode: Encode, *, seqlen: int, kind: str) -> torch.Tensor:
    """All windows ``[N, L]`` of the tokenised text, end to end; the remainder is dropped.

    Raises:
        ValueError: the text of this ``kind`` has too few tokens for one window.
    """
    tokens = encode(text)
    count = len(tokens) // seqlen
    if count == 0:
        raise ValueError(
            f"the {kind} text has {len(tokens)} tokens, {seqlen} are needed for a window: give "
            "a longer text or a smaller --seqlen"
        )
    return tokens[: count * seqlen].reshape(count, seqlen)


def evaluation_windows(
    text: str, encode: Encode, *, seqlen: int, max_windows: int | None
) -> torch.Tensor:
    """The first ``max_windows`` windows ``[N, L]`` of the tokenised text, end to end, or all.

    Raises:
        ValueError: the text has too few tokens for one window, or for ``max_windows``.
    """
    windows = whole_windows(text, encode, seqlen=seqlen, kind="evaluation")
    if max_windows is not None and max_windows > len(windows):
        raise ValueError(
            f"--eval-windows {max_windows} of {seqlen} tokens need {max_windows * seqlen} tokens, "
            f"the evaluation text has {len(windows)} windows: use --eval-windows {len(windows)}"
        )
    return windows[:max_windows]
