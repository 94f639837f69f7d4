"""Text of local files: .txt, and .jsonl and .parquet with rows of text or of conversations.

Nulls are skipped; whatever else is not a string of Unicode text is refused, with its place.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from sparse_expansion.data.rows import Rows, split_documents
from sparse_expansion.messages import first_line
from sparse_expansion.plain_files import check_plain

SUFFIXES = (".txt", ".jsonl", ".parquet")
TRAIN_NAMES = ("train", "valid", "validation")
TEST_NAMES = ("test",)
_BEGINNING_BYTES = 1 << 20


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


def check_beginning(path: Path, column: str | None) -> None:
    """Answer a file, or the files of a folder, that begins with something else than text.

    Its first mebibyte is looked at: what comes later is found when all of it is read. The columns
    of a .parquet file are left to that, too.

    Args:
        path: that ``check_local`` has seen.
        column: of rows, see ``Rows``.

    Raises:
        ValueError: it is not UTF-8, a single file is empty, or a line is not a JSON object with a
            text.
    """
    files = [path]
    if path.is_dir():
        files = [_find(path, names) for names in (TRAIN_NAMES, TEST_NAMES)]
    # What a template makes of a conversation is seen later.
    rows = Rows(column, chat=lambda _messages: "")
    for file in files:
        if file.suffix == ".parquet":
            continue
        with file.open("rb") as stream:
            begin = stream.read(_BEGINNING_BYTES)
            is_whole = not stream.read(1)
        try:
            text = codecs.getincrementaldecoder("utf-8-sig")().decode(begin, final=is_whole)
        except UnicodeDecodeError:
            raise _not_utf8(file) from None
        if is_whole and file == path and not text.strip():
            raise ValueError(f"dataset file {path} is empty: give one with text")
        if file.suffix == ".jsonl":
            lines = text.split("\n")
            # The last line of a part is a part of a line.
            for _ in _jsonl(lines if is_whole else lines[:-1], file, rows):
                pass


def read_local(path: Path, rows: Rows) -> tuple[str, str]:
    """Calibration text and evaluation text of a folder with a file for each, or of a single file.

    The documents of a single file are shared out as ``split_documents`` does.

    Raises:
        ValueError: a file cannot be read, or holds something else than text.
    """
    if path.is_dir():
        calibration, evaluation = _find(path, TRAIN_NAMES), _find(path, TEST_NAMES)
        return _read(calibration, " ", rows), _read(evaluation, "\n\n", rows)
    return split_documents(_records(path, rows))


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


def _read(path: Path, separator: str, rows: Rows) -> str:
    """The text of a file; ``separator`` joins documents that have no lines of their own."""
    return _text(path) if path.suffix == ".txt" else separator.join(_records(path, rows))


def _text(path: Path) -> str:
    """The text of a UTF-8 file, without the mark that some editors put before it.

    Raises:
        ValueError: the file is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise _not_utf8(path) from None


def _not_utf8(path: Path) -> ValueError:
    return ValueError(f"{path} is not UTF-8 text: convert it")


def _records(path: Path, rows: Rows) -> list[str]:
    """The documents of a file: the lines of .txt, the rows of .jsonl and .parquet.

    Raises:
        ValueError: the file has no readable text.
    """
    if path.suffix == ".txt":
        # Lines end with a line feed alone: other separators stand inside texts.
        return _text(path).split("\n")
    if path.suffix == ".jsonl":
        return list(_jsonl(_text(path).split("\n"), path, rows))
    return list(_parquet(path, rows))


def _jsonl(lines: list[str], path: Path, rows: Rows) -> Iterator[str]:
    """The texts of lines with one JSON object each; blank lines are skipped.

    Raises:
        ValueError: a line is not a JSON object with a text.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            # Numbers of thousands of digits are refused by Python, and are no text either.
            row = None
        found = rows.text_of(row, f"{path}, line {number}")
        if found is not None:
            yield found


def _parquet(path: Path, rows: Rows) -> Iterator[str]:
    """The texts of a Parquet file, of which one column is read.

    Raises:
        ValueError: there is no such column, it cannot be read, or it holds something else.
    """
    import pyarrow
    import pyarrow.parquet

    name, hint = rows.column_in(()), ""
    try:
        columns = pyarrow.parquet.read_schema(path).names
        name, hint = rows.column_in(columns), rows.hint(columns)
        values = pyarrow.parquet.read_table(path, columns=[name]).column(name).to_pylist()
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        line = first_line(error)
        raise ValueError(f"{path} has no readable column {name!r}: {line}{hint}") from None
    for number, value in enumerate(values, start=1):
        found = rows.text_of({name: value}, f"{path}, row {number}")
        if found is not None:
            yield found
