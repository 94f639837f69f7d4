"""Flags made from the fields of settings classes, and how they are spelled and filled in."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_expansion.config.compression import CompressionConfig
from sparse_expansion.config.fields import Setting, plain_text, settings_of
from sparse_expansion.config.presets import PRESETS, not_given


@dataclass(frozen=True)
class NotGiven:
    """Stands among parsed flags for one that was not given."""

    default: Any
    """Default of the command, or of the field."""
    shown: str
    """What the help shows as the default."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Appends the default to the help of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = default_text(action)
        text = f"{action.help} Default: {default}." if default else str(action.help)
        return text.replace("%", "%%")


def default_text(action: argparse.Action) -> str:
    """The default of a flag for its readers; empty where there is none to speak of."""
    if isinstance(action.default, NotGiven):
        return action.default.shown
    if action.default in (None, False, argparse.SUPPRESS):
        return ""
    return plain_text(action.default)


def normalise_flags(arguments: Sequence[str]) -> list[str]:
    """Write every long flag one way: hyphens for underscores, lower case.

    Values are left as they are; so is everything after a bare ``--``.
    """
    result: list[str] = []
    for position, argument in enumerate(arguments):
        if argument == "--":
            return result + list(arguments[position:])
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            argument = flag.replace("_", "-").lower() + equals + value
        result.append(argument)
    return result


def add_settings(
    parser: argparse.ArgumentParser,
    *sections: type,
    names: Collection[str] | None = None,
    without: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
    preset: str | None = None,
) -> dict[str, argparse._ArgumentGroup]:
    """Give a command the flags of settings classes.

    Args:
        parser: of the command.
        sections: settings classes; fields without a flag are left out.
        names: of the fields to take; by default all.
        without: names of fields to leave out.
        defaults: by name of the field, where the command's is another than the field's.
        preset: name of the preset that the command uses where none is given; None for a command
            without presets.

    Returns:
        The groups of flags in the help by heading, for flags that belong beside them.
    """
    values = PRESETS[preset] if preset else {}
    pruner = values.get("pruner", CompressionConfig.pruner)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for section in sections:
        for name, spec in settings_of(section).items():
            if not spec.flag or name in without or (names is not None and name not in names):
                continue
            default = (defaults or {}).get(name, spec.default)
            shown = spec.text_of(not_given(name, default, values, pruner))
            if spec.group not in groups:
                groups[spec.group] = parser.add_argument_group(spec.group)
            action = groups[spec.group].add_argument(
                *spec.short,
                spec.flag,
                dest=name,
                default=NotGiven(default, shown),
                **_value_arguments(spec),
            )
            # Set here, since some versions of argparse add the default to a switch's help.
            action.help = spec.help
    return groups


def _value_arguments(spec: Setting) -> dict[str, Any]:
    """Arguments of ``add_argument`` that say which values a flag takes.

    A text that has a ``parse`` stays a text here: settings are made of it later, so that all of
    their errors look alike.
    """
    if spec.kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    found: dict[str, Any] = {"type": str if spec.parse else spec.kind}
    if spec.choices:
        found["choices"] = tuple(spec.choices)
    else:
        found["metavar"] = spec.metavar
    if spec.bare is not None:
        found |= {"nargs": "?", "const": spec.bare}
    return found


def fill_in(args: argparse.Namespace) -> argparse.Namespace:
    """Give every flag that was not given its value.

    Explicit flags override the preset, which overrides the pruner's defaults, which override the
    command's and the field's own.
    """
    preset = PRESETS[args.preset] if "preset" in args else {}
    pruner = getattr(args, "pruner", CompressionConfig.pruner)
    if isinstance(pruner, NotGiven):
        pruner = preset.get("pruner", pruner.default)
    for name, value in vars(args).items():
        if isinstance(value, NotGiven):
            setattr(args, name, not_given(name, value.default, preset, pruner))
    return args
