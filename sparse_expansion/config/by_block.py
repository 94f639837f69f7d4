"""Settings that differ by block, read from JSON files."""

from __future__ import annotations

from typing import Any

from sparse_expansion.config.checks import parse_json
from sparse_expansion.plain_files import read_plain


def read_by_block(path: str, name: str, kind: Any, example: str) -> list[Any]:
    """A JSON list of numbers, or an object that has it under a field's name.

    Args:
        path: of the file.
        name: of the field.
        kind: type, or union of types, of the numbers.
        example: a list as it could be, for the error.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    flag = "--" + name.replace("_", "-")
    try:
        data = read_plain(path).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {path}: {error}") from None
    remedy = f"give a list of numbers, such as {example}"
    found = parse_json(data, object, name=f"{flag} {path}", remedy=remedy)
    if isinstance(found, dict):
        found = found.get(name)
    numbers_alone = isinstance(found, list) and all(
        isinstance(value, kind) and not isinstance(value, bool) for value in found
    )
    if not found or not numbers_alone:
        raise ValueError(f"{flag} {path} holds no list of numbers, such as {example}")
    values: list[Any] = found
    return values
