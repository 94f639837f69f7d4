"""Data sets of the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sparse_expansion.data.memory_text import documents, read_splits
from sparse_expansion.data.names import HubName, hub_name
from sparse_expansion.data.rows import Rows, split_documents
from sparse_expansion.data.windows import Text
from sparse_expansion.messages import first_line

MOST_CHARACTERS = 40_000_000
"""Of a hub data set's text, from its beginning: some ten million tokens, more than most
calibrations draw from."""


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
