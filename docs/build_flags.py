"""Write docs/flags.md, the flags of all commands and the settings that a run records.

    python docs/build_flags.py [FILE]

Both come from the code: the parsers of the commands, and the fields of the settings' classes.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from sparse_expansion.cli.flags import default_text
from sparse_expansion.cli.parser import command_parsers
from sparse_expansion.config.calibration import CalibrationConfig
from sparse_expansion.config.compression import CompressionConfig
from sparse_expansion.config.fields import settings_of
from sparse_expansion.config.presets import DEFAULT_PRESET, PRESETS
from sparse_expansion.config.routing import RoutingConfig
from sparse_expansion.config.run import RefinementConfig, RunConfig

HEAD = f"""# Flags and settings

Written by `docs/build_flags.py` from the code. Hyphens and underscores are the same in flags, and
so is their case. Where a flag of `run`, `expand` or `plan` is part of a preset, its default is that
of `--preset {DEFAULT_PRESET}`. Explicit flags override the preset, and the preset overrides the
defaults that belong to a pruner.
"""
PRESETS_HEAD = "Settings that are the same in all presets are left out."
SETTINGS_HEAD = (
    "The `config` of `metrics.json` and of `run/run.json`. Defaults are those of the Python "
    "classes, which are the paper's."
)
SECTIONS = {
    "compression": CompressionConfig,
    "routing": RoutingConfig,
    "calibration": CalibrationConfig,
    "refinement": RefinementConfig,
    "all": RunConfig,
}
"""Settings' classes by heading."""


def cell(text: object) -> str:
    """A table's cell, on one line."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def code(text: str) -> str:
    """A value as code; words that say what happens without one stay words."""
    value, space, meaning = text.partition(" ")
    if not text or (space and not meaning.startswith("(")):
        return text
    return f"`{value}`{space}{meaning}"


def flag_rows(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, str]]:
    """Names, default and meaning of every flag."""
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or action.dest == "help":
            continue
        names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar}`"
        if action.choices:
            names += ": " + ", ".join(map(str, action.choices))
        yield names, code(default_text(action)), action.help or ""


def field_rows(section: type) -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of every field of a settings class."""
    for name, spec in settings_of(section).items():
        is_section = type(spec.default) in SECTIONS.values()
        default = "" if is_section else code(spec.text_of(spec.default))
        yield f"`{name}`", default, spec.help


def preset_rows() -> Iterator[tuple[str, ...]]:
    """Flag and its value in every preset."""
    for section in SECTIONS.values():
        for name, spec in settings_of(section).items():
            if any(name in values for values in PRESETS.values()):
                given = [values.get(name, spec.default) for values in PRESETS.values()]
                yield f"`{spec.flag}`", *(code(spec.text_of(value)) for value in given)


def table(rows: Iterator[tuple[str, ...]], head: tuple[str, ...]) -> list[str]:
    """Lines of Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(map(cell, line))} |" for line in lines]


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for name, command in command_parsers()[1].items():
        lines += [f"## {name}", "", command.description or "", ""]
        lines += [*table(flag_rows(command), ("flag", "default", "meaning")), ""]
    lines += ["## Presets", "", PRESETS_HEAD, ""]
    lines += [*table(preset_rows(), ("flag", *PRESETS)), ""]
    lines += ["## Settings", "", SETTINGS_HEAD, ""]
    for name, section in SECTIONS.items():
        lines += [f"### {name}", "", section.__doc__ or "", ""]
        lines += [*table(field_rows(section), ("field", "default", "meaning")), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    target = sys.argv[1:] or [Path(__file__).with_name("flags.md")]
    Path(target[0]).write_text(page(), encoding="utf-8")
