"""What ``--dataset`` names: one text or several with weights, and data sets of the hub."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_expansion.data.memory_text import documents, read_splits
from sparse_expansion.data.rows import Rows, split_documents
from sparse_expansion.data.windows import Text
from sparse_expansion.messages import first_line

NAMED = ("wikitext2", "c4", "pydoc", "stdlib")
HUB = "hf:"
"""What the names of other data sets of the hub begin with."""
MOST_CHARACTERS = 40_000_000
"""Of a hub data set's text, from its beginning: some ten million tokens, more than most
calibrations draw from."""
_WEIGHT = re.compile(r":(\d+(?:\.\d*)?|\.\d+)$")
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([^@]+))?(?:@([\w.-]+))?")


def weighted_sources(dataset: str) -> list[tuple[str, float]]:
    """The texts that a name stands for, with their shares, which add up to 1.

    Several texts are written ``a:0.7,b:0.3``, each with a weight. What is a name or a path as a
    whole is one text, whatever commas and colons are in it; one text alone has no weight.

    Raises:
        ValueError: a weight is no share, or a text is named twice.
    """
    entries = _entries(dataset)
    names = [name for name, _ in entries]
    if len(entries) == 1:
        return [(dataset, 1.0)]
    for name, weight in entries:
        if not 0 < float(weight) < math.inf:
            raise ValueError(f"dataset {name!r} has weight {weight}: give it more, or leave it out")
        if names.count(name) > 1:
            raise ValueError(f"dataset {name!r} is named twice: add up its weights")
    total = sum(float(weight) for _, weight in entries)
    return [(name, float(weight) / total) for name, weight in entries]


def _entries(dataset: str) -> list[tuple[str, str]]:
    """Names and weights as they are written; the name alone, with an empty weight, of one text."""
    found: list[tuple[str, str]] = []
    rest = ""
    for word in dataset.split(","):
        rest = f"{rest},{word}" if rest else word
        match = _WEIGHT.search(rest)
        if match:
            found.append((rest[: match.start()], match[1]))
            rest = ""
    if len(found) < 2 or rest or dataset in NAMED or Path(dataset).expanduser().exists():
        return [(dataset, "")]
    return found


def whole_name(dataset: str) -> str:
    """A name that means the same in whatever folder it is read: paths are made whole."""
    entries = _entries(dataset)
    if len(entries) == 1:
        return _whole_path(dataset)
    return ",".join(f"{_whole_path(name)}:{weight}" for name, weight in entries)


def _whole_path(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if name not in NAMED and path.exists() else name


@dataclass(frozen=True)
class HubName:
    """A data set of the hub."""

    repository: str
    config: str | None
    split: str | None


def hub_name(dataset: str) -> HubName:
    """What ``hf:owner/name[:config][@split]`` names.

    Raises:
        ValueError: it is not of this form.
    """
    match = _HUB_NAME.fullmatch(dataset.removeprefix(HUB))
    if match is None:
        raise ValueError(
            f"dataset {dataset!r} is not of the form {HUB}owner/name[:config][@split], "
            f"e.g. {HUB}Salesforce/wikitext:wikitext-2-raw-v1@test"
        )
    return HubName(*match.groups())


def read_hub(dataset: str, cache_dir: str | None, rows: Rows) -> tuple[Text, Text]:
    """Calibration text and evaluation text of a hub data set, from their beginnings.

    Of a split that is named the first nine tenths are the calibration text. Otherwise that is the
    split ``train``, and the evaluation text ``test`` or ``validation`` where there is one.

    Raises:
        ValueError: it cannot be had, or its rows are no text.
    """
    name = hub_name(dataset)
    found = _load(dataset, name, cache_dir)
    if name.split is not None:
        texts = documents(_rows(dataset, found), rows, dataset, most=MOST_CHARACTERS)
        return split_documents(texts)
    splits = {split: _rows(dataset, items) for split, items in found.items()}
    return read_splits(splits, rows, name=dataset, most=MOST_CHARACTERS)


def _load(dataset: str, name: HubName, cache_dir: str | None) -> Any:
    """The data set, streamed from the hub or from its cache; downloaded where streams fail.

    Raises:
        ValueError: it cannot be had.
    """
    from datasets import load_dataset

    options: dict[str, Any] = {"split": name.split, "cache_dir": cache_dir}
    try:
        try:
            return load_dataset(name.repository, name.config, streaming=True, **options)
        except NotImplementedError:
            # Some kinds of archives. A wrong split must not lead to a download of all the others.
            return load_dataset(name.repository, name.config, **options)
    except Exception as error:
        # The library reports a hub that cannot be reached as one of many exceptions.
        raise _refusal(dataset, error) from None


def _rows(dataset: str, items: Iterable[Any]) -> Iterator[Any]:
    """The rows of a split, which may be downloaded while they are read."""
    rows = iter(items)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise _refusal(dataset, error) from None
        yield row


def _refusal(dataset: str, error: Exception) -> ValueError:
    return ValueError(
        f"dataset {dataset} cannot be had ({first_line(error)}): check its name, config and split; "
        "without a network it must be in the cache, or give --dataset pydoc (offline) or a folder"
    )
