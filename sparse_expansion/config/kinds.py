"""Values of settings that may be of any kind, made into those that the settings have."""

from __future__ import annotations

import os
import reprlib
import typing
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

from sparse_expansion.config.checks import require
from sparse_expansion.config.fields import Setting, settings_of
from sparse_expansion.config.nearest import did_you_mean

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def check_kinds(section: Any) -> None:
    """Bring all documented fields of a settings class to their kinds, before it checks bounds.

    A text may stand for a value as on the command line, so that ``sparsity="2:4"`` means the same
    wherever it is said.

    Raises:
        ValueError: a value is of another kind, or no choice.
    """
    kind: type = type(section)
    for name, spec in settings_of(kind).items():
        given = getattr(section, name)
        value = checked_value(spec, name, given)
        if value is None and not spec.optional:
            value = of_kind(spec.kind, name, None)
        if value is not given:
            # Settings cannot be changed once they are made; they are still being made here.
            object.__setattr__(section, name, value)


def checked_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """A value that is one of several texts.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, str) and value in choices:
        return value
    hint = did_you_mean(value, choices) if isinstance(value, str) else ""
    raise ValueError(f"{name} {reprlib.repr(value)} is none of {', '.join(choices)}{hint}")


def checked_value(spec: Setting, name: str, value: Any) -> Any:
    """A value of a setting that may be of any kind, as the setting has it.

    Args:
        spec: of the setting.
        name: as it was given, for the error.
        value: a text may stand for it, as in a flag.

    Raises:
        ValueError: it is of another kind, or no choice.
    """
    if value is None and (spec.optional or None in spec.meanings):
        return None
    if isinstance(value, list | tuple) and spec.items is not None:
        return tuple(of_kind(spec.items, name, item) for item in value)
    if spec.choices:
        return checked_choice(name, value, spec.choices)
    if spec.parse is None or _is_of_kind(spec.kind, value):
        return of_kind(spec.kind, name, value)
    if isinstance(value, Real | tuple) and not isinstance(value, bool):
        value = str(value)
    require(isinstance(value, str), f"{name} {reprlib.repr(value)} is no value of this setting")
    return spec.parse(value)


def _is_of_kind(kind: Any, value: Any) -> bool:
    """Whether a value need not be read as a text; one that is a text always is."""
    if kind in (int, float):
        number = Integral if kind is int else Real
        return isinstance(value, number) and not isinstance(value, bool)
    # Python 3.10 calls a parameterized container such as tuple[int, ...] a type.
    is_plain = isinstance(kind, type) and typing.get_origin(kind) is None
    return is_plain and kind is not str and isinstance(value, kind)


def of_kind(kind: type, name: str, value: Any) -> Any:
    """A value of a plain kind; whole numbers are numbers too, and truth values are neither.

    Raises:
        ValueError: it is of another kind.
    """
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind in (int, float) and _is_of_kind(kind, value):
        # Those of NumPy too.
        return value if type(value) is kind else kind(value)
    is_right = isinstance(value, kind) and kind not in (int, float)
    expected = _KINDS.get(kind, f"a {getattr(kind, '__name__', kind)}")
    require(is_right, f"{name} {reprlib.repr(value)} must be {expected}")
    return value
