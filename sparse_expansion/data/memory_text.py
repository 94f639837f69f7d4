"""Text that lies in memory: lists of strings, of rows or of token ids, and ``datasets`` objects."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch

from sparse_expansion.data.rows import EVALUATION_SHARE, Rows, checked_text, split_documents
from sparse_expansion.data.windows import Text

TRAIN_SPLITS, TEST_SPLITS = ("train",), ("test", "validation")


def read_memory(dataset: Any, rows: Rows) -> tuple[Text, Text]:
    """Calibration text and evaluation text.

    Args:
        dataset: a list of strings, of rows (dictionaries) or of lists of token ids, a
            ``datasets.Dataset``, or a ``datasets.DatasetDict`` with a split for each text. What
            has no splits is shared out as a single file is.
        rows: how rows become text.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(dataset, Mapping):
        return read_splits(dataset, rows)
    if not isinstance(dataset, list | tuple) and not _is_table(dataset):
        raise ValueError(
            f"dataset of type {type(dataset).__name__} is neither a name, a path, a "
            "datasets.Dataset, a list of strings nor a list of lists of token ids"
        )
    if isinstance(dataset, list | tuple) and dataset and _is_ids(dataset[0]):
        return _split_ids(dataset)
    return split_documents(documents(dataset, rows, "dataset"))


def read_splits(
    splits: Mapping[str, Any], rows: Rows, *, name: str = "dataset", most: int | None = None
) -> tuple[Text, Text]:
    """Calibration text and evaluation text of a data set by split.

    Where there is no split for evaluation, that for calibration is shared out.

    Args:
        splits: rows or strings by name of the split.
        rows: how rows become text.
        name: of the data set, for errors.
        most: characters of each text at which no more is read; None for all.

    Raises:
        ValueError: there is no split ``train``.
    """
    train = next((name for name in TRAIN_SPLITS if name in splits), None)
    if train is None:
        raise ValueError(
            f"{name} has the splits {', '.join(map(str, splits))}, and none called "
            f"{TRAIN_SPLITS[0]}: name one of them"
        )
    held_out = next((name for name in TEST_SPLITS if name in splits), None)
    calibration = documents(splits[train], rows, f"{name}, {train}", most=most)
    if held_out is None:
        return split_documents(calibration)
    evaluation = documents(splits[held_out], rows, f"{name}, {held_out}", most=most)
    return " ".join(calibration), "\n\n".join(evaluation)


def documents(items: Iterable[Any], rows: Rows, name: str, *, most: int | None = None) -> list[str]:
    """The texts of strings or rows, without nulls.

    Args:
        items: strings or rows.
        rows: how rows become text.
        name: of the whole, for errors.
        most: characters at which no more is read; None for all.

    Raises:
        ValueError: one is neither.
    """
    found = []
    length = 0
    for number, item in enumerate(items, start=1):
        place = f"{name}, row {number}"
        text = rows.text_of(item, place) if isinstance(item, Mapping) else item
        if text is not None:
            found.append(checked_text(text, "text", place))
            length += len(text)
            if most is not None and length >= most:
                break
    return found


def _is_table(dataset: Any) -> bool:
    """Whether it is a ``datasets.Dataset``: whoever has one has imported the library."""
    library = sys.modules.get("datasets")
    return library is not None and isinstance(dataset, library.Dataset)


def _is_ids(item: Any) -> bool:
    """Whether an item is a list of token ids, or an array of them."""
    if isinstance(item, list | tuple):
        return all(isinstance(token, int) and not isinstance(token, bool) for token in item)
    return hasattr(item, "tolist") and getattr(item, "ndim", 0) == 1


def _split_ids(items: Iterable[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids for calibration and for evaluation: of the first nine tenths, and of the rest."""
    texts: list[list[int]] = []
    for number, item in enumerate(items, start=1):
        ids = item.tolist() if hasattr(item, "tolist") else item
        if not _is_ids(ids) or any(not 0 <= token < 2**31 for token in ids):
            raise ValueError(f"dataset, row {number}: not a list of token ids, which are from 0 up")
        texts.append(list(ids))
    share = EVALUATION_SHARE
    if len(texts) == 1:
        place = len(texts[0]) * (share - 1) // share
        halves: tuple[list[list[int]], ...] = ([texts[0][:place]], [texts[0][place:]])
    else:
        cut = max(1, len(texts) * (share - 1) // share)
        halves = (texts[:cut], texts[cut:])
    first, second = (torch.tensor(list(chain(*half)), dtype=torch.int64) for half in halves)
    return first, second
