"""How a settings class says once, in its fields, what a setting is, means and defaults to.

The command line, its help and the pages of flags and settings are made from these fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
_KEY = "setting"


def plain_text(value: Any) -> str:
    """A value as a person would write it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A field of a settings class, and how it is given on the command line."""

    default: Any
    """The field's default."""
    help: str
    """One sentence that documents the field."""
    flag: str
    """The long flag, such as ``--block-size``; empty where the field has none."""
    short: tuple[str, ...]
    """Further spellings of the flag."""
    metavar: str | None
    """What stands for the value in the help."""
    choices: Collection[str]
    """The values that are allowed; empty where there is no list of them."""
    parse: Callable[[str], Any] | None
    """Makes the value of the flag's text; None where the field's type does."""
    show: Callable[[Any], str]
    """Inverse of ``parse``: the value as it would be given."""
    bare: Any
    """Value of the flag where no value follows it; None where one has to follow."""
    meanings: Mapping[Any, str]
    """What special values mean, by value: shown behind the default, or in place of None."""
    group: str
    """Heading of the flag in the help."""
    kind: type
    """Type of the value."""
    optional: bool
    """Whether the value may be None."""
    items: type | None
    """Type of the items where the value may be a tuple; None where it may not."""

    def text_of(self, value: Any) -> str:
        """A value as it would be given, and what it means where that is not plain to see."""
        meaning = self.meanings.get(value, "")
        if value is None or value == ():
            return meaning
        text = self.show(value)
        return f"{text} ({meaning})" if meaning else text


def setting(
    default: T,
    help: str,
    *,
    flag: str | None = None,
    short: tuple[str, ...] = (),
    metavar: str | None = None,
    choices: Collection[str] = (),
    parse: Callable[[str], Any] | None = None,
    show: Callable[[Any], str] = plain_text,
    bare: Any = None,
    meanings: Mapping[Any, str] | None = None,
    group: str = "",
) -> T:
    """A field of a settings class; see ``Setting`` for what the arguments are.

    Args:
        default: the field's default, which cannot be changed in place.
        help: one whole sentence, without the default.
        flag: by default the field's name with hyphens; empty for a field without a flag.
        short: further spellings.
        metavar: stands for the value in the help.
        choices: values that are allowed.
        parse: makes the value of the flag's text. It may raise ``ValueError``.
        show: inverse of ``parse``.
        bare: value of the flag where none follows it.
        meanings: of special values.
        group: heading in the help.
    """
    notes = {
        "help": help,
        "flag": flag,
        "short": short,
        "metavar": metavar,
        "choices": choices,
        "parse": parse,
        "show": show,
        "bare": bare,
        "meanings": meanings or {},
        "group": group,
    }
    found: T = dataclasses.field(default=default, metadata={_KEY: notes})
    return found


@cache
def settings_of(section: type) -> dict[str, Setting]:
    """The documented fields of a settings class by name, in their order."""
    hints = get_type_hints(section)
    found = {}
    for field in dataclasses.fields(section):
        if _KEY in field.metadata:
            notes = dict(field.metadata[_KEY])
            if notes["flag"] is None:
                notes["flag"] = "--" + field.name.replace("_", "-")
            hint = hints[field.name]
            options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            tuples = [get_args(option)[0] for option in options if get_origin(option) is tuple]
            items = get_origin(tuples[0]) or tuples[0] if tuples else None
            found[field.name] = Setting(
                default=field.default,
                kind=next(option for option in options if option is not NoneType),
                optional=NoneType in options,
                items=items,
                **notes,
            )
    return found
