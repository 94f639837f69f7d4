"""The ``--config`` of a command: a file's settings in place of the flags' defaults."""

from __future__ import annotations

import argparse
import reprlib
from collections.abc import Collection, Sequence
from typing import Any

from sparse_expansion.config.kinds import checked_choice, checked_value
from sparse_expansion.config.nearest import did_you_mean
from sparse_expansion.config.presets import PRESETS
from sparse_expansion.config.pruners import PRUNERS
from sparse_expansion.config.values import known_settings
from sparse_expansion.settings_file import read_settings

_NOT_IN_FILES = ("help", "help_all", "config")


def config_path(arguments: Sequence[str]) -> str | None:
    """The file that flags name, before the rest of them is understood."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", nargs="?")
    try:
        found: str | None = parser.parse_known_args(list(arguments))[0].config
    except argparse.ArgumentError:
        # Whatever is wrong is told by the parser of all flags.
        return None
    return found


def use_config(
    parser: argparse.ArgumentParser, path: str, arguments: Sequence[str], known: Collection[str]
) -> None:
    """Make a file's settings the defaults of a command's flags.

    Args:
        parser: of the command.
        path: of the file.
        arguments: the flags that are given: a preset among them overrides the file's values of all
            that presets are about.
        known: names that other commands have, which are left alone.

    Raises:
        ValueError: the file cannot be read, has an unknown name, or a value of another kind.
    """
    actions = _by_name(parser)
    found: dict[str, Any] = {}
    for name, value in read_settings(path).items():
        if name in actions:
            action = actions[name]
            found[action.dest] = _checked(action, name, value)
        elif name not in known:
            hint = did_you_mean(name, [*actions, *known])
            raise ValueError(f"--config {path}: setting {name!r} is unknown{hint}")
    if any(flag == "--preset" or flag.startswith("--preset=") for flag in arguments):
        for values in (*PRESETS.values(), *(traits.defaults for traits in PRUNERS.values())):
            for name in values:
                found.pop(name, None)
    for action in parser._actions:
        action.required = action.required and action.dest not in found
    parser.set_defaults(**found)


def names_in_files(parser: argparse.ArgumentParser) -> set[str]:
    """The names that a file may have for a command."""
    return set(_by_name(parser))


def _by_name(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """A command's flags by the names that a file may call them: those of fields, and of flags."""
    found: dict[str, argparse.Action] = {}
    for action in parser._actions:
        if action.dest in _NOT_IN_FILES or not action.option_strings:
            continue
        found[action.dest] = action
        for option in action.option_strings:
            if option.startswith("--") and not option.startswith("--no-"):
                found[option[2:].replace("-", "_")] = action
    return found


def _checked(action: argparse.Action, name: str, value: Any) -> Any:
    """A value of a file, as the flag would have it.

    Raises:
        ValueError: it is of another kind.
    """
    spec = known_settings().get(action.dest)
    if spec is not None:
        return checked_value(spec, name, value)
    if value is None:
        return None
    if action.choices:
        return checked_choice(name, value, list(action.choices))
    is_switch = action.nargs == 0
    kind = bool if is_switch else action.type if isinstance(action.type, type) else str
    if isinstance(value, kind) and isinstance(value, bool) == is_switch:
        return value
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    wanted = "true or false" if is_switch else "a whole number" if kind is int else "a text"
    raise ValueError(f"{name} {reprlib.repr(value)} must be {wanted}")
