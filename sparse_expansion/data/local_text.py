"""Text of local files: .txt, .jsonl with a field ``text``, .parquet with a column ``text``.

Nulls are skipped; whatever else is not a string of Unicode text is refused, with its place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparse_expansion.messages import first_line
from sparse_expansion.plain_files import check_plain

SUFFIXES = (".txt", ".jsonl", ".parquet")
TRAIN_NAMES = ("train", "valid", "validation")
TEST_NAMES = ("test",)
EVALUATION_SHARE = 10
"""One of so many documents of a single file is for evaluation."""


def check_local(path: Path) -> None:
    """Answer a folder or file that cannot hold text, before anything is read.

    Raises:
        ValueError: the folder lacks a file for one of the two texts, or the file's name ends in
            something else than text does, or it is no file but a pipe or a device.
    """
    if path.is_dir():
        for names in (TRAIN_NAMES, TEST_NAMES):
            _find(path, names)
    elif path.suffix not in SUFFIXES:
        raise ValueError(f"dataset file {path} is none of {', '.join(SUFFIXES)}")
    else:
        check_plain(path)


def read_local(path: Path) -> tuple[str, str]:
    """Calibration text and evaluation text of a folder with a file for each, or of a single file.

    The first nine tenths of a single file's documents are the calibration text. Where it is one
    document alone, it is cut at white space behind nine tenths of its characters.

    Raises:
        ValueError: a file cannot be read, or holds something else than text.
    """
    if path.is_dir():
        calibration, evaluation = _find(path, TRAIN_NAMES), _find(path, TEST_NAMES)
        return _read(calibration, " "), _read(evaluation, "\n\n")
    records = _records(path)
    filled = [record for record in records if record.strip()]
    if len(filled) == 1:
        return _cut(filled[0])
    cut = max(1, len(records) * (EVALUATION_SHARE - 1) // EVALUATION_SHARE)
    return " ".join(records[:cut]), "\n\n".join(records[cut:])


def _cut(text: str) -> tuple[str, str]:
    """A text in two, at the first white space behind nine tenths of it."""
    place = len(text) * (EVALUATION_SHARE - 1) // EVALUATION_SHARE
    rest = text[place:].split(maxsplit=1)
    if len(rest) == 2:
        place = len(text) - len(rest[1])
    return text[:place], text[place:]


def _find(folder: Path, names: tuple[str, ...]) -> Path:
    """The first file in the folder that has one of the names and a known ending.

    Raises:
        ValueError: there is no such file.
    """
    for name in names:
        for suffix in SUFFIXES:
            path = folder / f"{name}{suffix}"
            if path.exists():
                check_plain(path)
                return path
    raise ValueError(
        f"dataset folder {folder} has no {' or '.join(names)} with ending "
        f"{', '.join(SUFFIXES)}: put one there"
    )


def _read(path: Path, separator: str) -> str:
    """The text of a file; ``separator`` joins documents that have no lines of their own."""
    return _text(path) if path.suffix == ".txt" else separator.join(_records(path))


def _text(path: Path) -> str:
    """The text of a UTF-8 file, without the mark that some editors put before it.

    Raises:
        ValueError: the file is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: convert it") from None


def _records(path: Path) -> list[str]:
    """The documents of a file: the lines of .txt, the ``text`` fields of .jsonl and .parquet.

    Raises:
        ValueError: the file has no readable text.
    """
    if path.suffix == ".txt":
        # Lines end with a line feed alone: other separators stand inside texts.
        return _text(path).split("\n")
    return list(_jsonl(path) if path.suffix == ".jsonl" else _parquet(path))


def _jsonl(path: Path) -> Iterator[str]:
    """The ``text`` fields of a file with one JSON object per line; blank lines are skipped.

    Raises:
        ValueError: a line is not a JSON object with a ``text``, or that is no text.
    """
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{path}, line {number}: not a JSON object with a 'text'") from None
        if value is not None:
            yield _checked(value, f"{path}, line {number}")


def _parquet(path: Path) -> Iterator[str]:
    """The column ``text`` of a Parquet file.

    Raises:
        ValueError: there is no such column, it cannot be read, or it holds something else.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        column = pyarrow.parquet.read_table(path, columns=["text"]).column("text")
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        line = first_line(error)
        raise ValueError(f"{path} has no readable column 'text': {line}") from None
    for number, value in enumerate(column.to_pylist(), start=1):
        if value is not None:
            yield _checked(value, f"{path}, row {number}")


def _checked(value: Any, place: str) -> str:
    """A value that is text, as it is.

    Raises:
        ValueError: it is something else, or has half of a surrogate pair in it.
    """
    if not isinstance(value, str):
        raise ValueError(f"{place}: 'text' is {_kind(value)}, and not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(value[error.start]):04X}"
        raise ValueError(
            f"{place}: character {error.start} of 'text' is half of a surrogate pair ({code}), "
            "which is no text: write it as UTF-8, or leave it out"
        ) from None
    return value


def _kind(value: Any) -> str:
    """What a value is, for people."""
    kinds = {bool: "a truth value", int: "a number", float: "a number", list: "a list"}
    return {**kinds, dict: "a mapping", bytes: "bytes"}.get(type(value), type(value).__name__)
