"""Write docs/flags.md, the flags of all commands and the settings that a run records.

    python docs/build_flags.py [FILE]

Both come from the code: argparse's help, and the text under the fields of the settings' classes.
"""

import argparse
import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from sparse_expansion import config
from sparse_expansion.flags import DEFAULT_PRESET, PRESETS, build_parser

HEAD = """# Flags and settings

Written by `docs/build_flags.py` from the code. Hyphens and underscores are the same in flags, and
so is their case. Where a flag of `run`, `expand` or `plan` is part of a preset, its default is that
of `--preset {preset}`.
"""
SETTINGS = (
    "The `config` of `metrics.json` and of `run/run.json`. Defaults are those of the Python "
    "classes, which are the paper's."
)
SECTIONS = (config.CompressionConfig, config.RoutingConfig, config.CalibrationConfig)


def cell(text: object) -> str:
    """Of a table, on one line."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def flag_rows(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, str]]:
    """Names, default and meaning of every flag."""
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or "--help" in action.option_strings:
            continue
        names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar}`"
        if action.choices:
            names += ": " + ", ".join(map(str, action.choices))
        shown = action.default not in (None, False, argparse.SUPPRESS)
        yield names, f"`{action.default}`" if shown else "", action.help or ""


def field_rows(section: type) -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of every field of a dataclass."""
    (tree,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(tree, ast.ClassDef)
    for node, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(node.target, ast.Name) and isinstance(text.value, ast.Constant)
            shown = node.value if isinstance(node.value, ast.Constant | ast.Tuple) else None
            default = "" if shown is None else f"`{ast.unparse(shown)}`"
            yield f"`{node.target.id}`", default, str(text.value.value).replace("``", "`")


def table(rows: Iterator[tuple[str, str, str]], head: tuple[str, str, str]) -> list[str]:
    """Lines of Markdown."""
    lines = [head, ("---", "---", "---"), *rows]
    return [f"| {' | '.join(map(cell, line))} |" for line in lines]


def page() -> str:
    """The whole page."""
    parser = build_parser(PRESETS[DEFAULT_PRESET])
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    lines = [HEAD.format(preset=DEFAULT_PRESET)]
    for name, command in commands.choices.items():
        lines += [f"## {name}", "", command.description or "", ""]
        lines += [*table(flag_rows(command), ("flag", "default", "meaning")), ""]
    lines += ["## Presets", "", "| flag | " + " | ".join(PRESETS) + " |"]
    lines.append("|---" * (len(PRESETS) + 1) + "|")
    for flag in next(iter(PRESETS.values())):
        values = " | ".join(f"`{preset[flag]}`" for preset in PRESETS.values())
        lines.append(f"| `--{flag.replace('_', '-')}` | {values} |")
    lines += ["", "## Settings", "", SETTINGS, ""]
    for section in (*SECTIONS, config.RunConfig):
        name = section.__name__.removesuffix("Config").lower().replace("run", "all")
        lines += [f"### {name}", "", section.__doc__ or "", ""]
        lines += [*table(field_rows(section), ("field", "default", "meaning")), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    target = sys.argv[1:] or [Path(__file__).with_name("flags.md")]
    Path(target[0]).write_text(page(), encoding="utf-8")
