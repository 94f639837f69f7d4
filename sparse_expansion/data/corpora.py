"""Texts by name: hub data sets, two offline corpora, local folders and files, memory."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_expansion.data.local_text import read_local
from sparse_expansion.data.memory_text import read_memory
from sparse_expansion.data.names import check_dataset, is_of_hub
from sparse_expansion.data.rows import Rows
from sparse_expansion.data.sources import read_hub
from sparse_expansion.data.windows import Text
from sparse_expansion.messages import first_line
from sparse_expansion.run_files import IN_MEMORY

_C4_EVALUATION_DOCUMENTS = 1100
_C4_CALIBRATION_DOCUMENTS = 20_000
"""About 9 million tokens: more than most calibrations draw from."""


@dataclass(frozen=True)
class Corpus:
    """Text for calibration and text for evaluation."""

    name: str
    """The name of the data set, or the path of a local one."""
    calibration: Text
    """The text that a model is calibrated on."""
    evaluation: Text
    """The text that perplexity is measured on."""


def load_corpus(dataset: Any, *, cache_dir: str | None = None, rows: Rows | None = None) -> Corpus:
    """Read the calibration text and the evaluation text of a data set.

    The lines of WikiText-2 are joined as in GPTQ and SparseGPT: training lines by a space, test
    lines by a blank line. The first nine tenths of a single local file are the calibration text,
    and the rest is the evaluation text.

    Args:
        dataset: name, path, or what ``read_memory`` takes.
        cache_dir: the folder of downloads; ``None`` for the library's own.
        rows: how rows become text.

    Raises:
        ValueError: the text is missing or empty, or the hub cannot be reached.
    """
    check_dataset(dataset)
    rows = rows or Rows()
    if not isinstance(dataset, str | Path):
        corpus = Corpus(IN_MEMORY, *read_memory(dataset, rows))
    elif dataset == "pydoc":
        corpus = _pydoc()
    elif dataset == "stdlib":
        corpus = _stdlib()
    elif dataset == "wikitext2":
        corpus = _wikitext2(cache_dir)
    elif dataset == "c4":
        corpus = _c4(cache_dir)
    elif is_of_hub(dataset):
        corpus = Corpus(str(dataset), *read_hub(str(dataset), cache_dir, rows))
    else:
        corpus = Corpus(str(dataset), *read_local(Path(dataset).expanduser(), rows))
    for kind, text in (("calibration", corpus.calibration), ("evaluation", corpus.evaluation)):
        if not (text.strip() if isinstance(text, str) else len(text)):
            raise ValueError(
                f"dataset {corpus.name!r} has an empty {kind} text: give one with text"
            )
    return corpus


def _pydoc() -> Corpus:
    """The Python language reference, which every Python has offline.

    The first four fifths of its topics are the calibration text, the rest is the evaluation text.
    """
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    cut = len(texts) * 4 // 5
    return Corpus("pydoc", "\n\n".join(texts[:cut]), "\n\n".join(texts[cut:]))


def _stdlib() -> Corpus:
    """Source code of the modules at the top level of the installed Python's standard library.

    Every fifth module is part of the evaluation text, the others of the calibration text.
    """
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in modules]
    kept = [text for number, text in enumerate(texts) if number % 5 != 4]
    return Corpus("stdlib", "\n".join(kept), "\n".join(texts[4::5]))


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
        return [
            text for text in load_dataset(repository, name, **options)["text"] if text is not None
        ]
    except (OSError, ValueError, RuntimeError) as error:
        # The library reports a hub that cannot be reached as any of these.
        line = first_line(error)
        raise ValueError(
            f"dataset {repository} ({split}) is not in the cache and cannot be downloaded "
            f"({line}): run once with a network, or give --dataset pydoc (offline) or a folder "
            "with train.txt and test.txt"
        ) from None
