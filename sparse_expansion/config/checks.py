"""Checks that settings classes share."""

from __future__ import annotations

import json
from typing import Any

from sparse_expansion.plain_files import is_seal_whole

NUMBER = (int, float)
"""The form of a number, see ``has_form``."""


def require(condition: bool, message: str) -> None:
    """Answer settings that cannot be used.

    Raises:
        ValueError: the condition does not hold.
    """
    if not condition:
        raise ValueError(message)


def require_text(name: str, value: str) -> None:
    """Answer an empty name, which as a path would be the current folder.

    It is what a variable of the shell leaves that was never set.

    Raises:
        ValueError: there is nothing in the text but blanks.
    """
    require(bool(value.strip()), f"{name} {value!r} is empty: give a name, or leave it out")


def require_layers(name: str, values: tuple[float, ...], num_layers: int) -> None:
    """Answer a list by block that is another model's.

    Raises:
        ValueError: it is neither empty nor of ``num_layers`` entries.
    """
    require(
        len(values) in (0, num_layers),
        f"{name} is of {len(values)} blocks, the model has {num_layers}: make it for this model",
    )


def has_form(value: Any, form: Any) -> bool:
    """Whether a value out of a file is what its readers take it for.

    Args:
        value: out of JSON.
        form: a type or several; ``[form]`` is a list of such; ``{key: form}`` a dictionary that has
            these keys, with ``...`` in place of a key for the form of all its values.
    """
    if isinstance(form, list):
        return isinstance(value, list) and all(has_form(item, form[0]) for item in value)
    if not isinstance(form, dict):
        return isinstance(value, form)
    if not isinstance(value, dict):
        return False
    if ... in form and not all(has_form(item, form[...]) for item in value.values()):
        return False
    keys = [key for key in form if key is not ...]
    return all(key in value and has_form(value[key], form[key]) for key in keys)


def parse_json(data: bytes | str, form: Any, *, name: str, remedy: str) -> Any:
    """The content of a JSON file, which may come from anywhere.

    Args:
        data: the file's content.
        form: what it has to be, see ``has_form``.
        name: of the file, for the error.
        remedy: for the error.

    Raises:
        ValueError: it is not JSON, nested too deeply, changed since it was sealed, or of another
            form.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError(f"{name} is not valid JSON: {remedy}") from None
    if isinstance(found, dict) and not is_seal_whole(found):
        raise ValueError(f"{name} is damaged, or was changed by hand: {remedy}")
    if not has_form(found, form):
        raise ValueError(f"{name} has not the form that it should have: {remedy}")
    return found
