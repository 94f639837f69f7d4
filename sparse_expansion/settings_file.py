"""Settings in a YAML file, which may come from anywhere: a flat mapping of names to plain values.

Numbers and words are read as YAML 1.2 has them: ``2:4`` is a text and not the 124 of base 60, and
``no`` is not false. Tags, anchors and nested mappings are no part of such a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from sparse_expansion.config.checks import require
from sparse_expansion.plain_files import read_plain

MOST_BYTES = 1 << 18
"""More than shares of thousands of blocks take."""
_MOST_NESTED = 8
"""Brackets in brackets; a list of numbers needs none."""
_HEAD = """\
# What was asked for, with everything that was left open filled in. It is done again by
#   sparse-expansion run --config run.yaml --output OTHER
# Flags override what stands here.
"""
_SCALARS = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?(?:0|[1-9][0-9]*)"),
    "float": re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"),
}
"""What a plain word is, first come first served; all else is a text."""


def read_settings(path: str | Path) -> dict[str, Any]:
    """The values of a file by name, with underscores in names.

    Values are texts, numbers, truth values, None, and lists of numbers.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    import yaml

    where = f"--config {path}"
    try:
        text = read_plain(Path(path).expanduser(), most=MOST_BYTES).decode("utf-8-sig")
        found = yaml.load(text, _loader())  # noqa: S506 - a safe loader that allows less
    except FileNotFoundError:
        raise ValueError(
            f"{where} does not exist: give the run.yaml of a run, or your own"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"{where} is not UTF-8 text: convert it") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is no YAML file of settings: {_reason(error)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be read: {error}") from None
    if found is None:
        return {}
    require(isinstance(found, dict), f"{where} holds no mapping: write lines such as sparsity: 0.5")
    settings: dict[str, Any] = {}
    for key, value in found.items():
        require(isinstance(key, str), f"{where}: {key!r} is no name of a setting")
        name = key.lower().replace("-", "_")
        require(name not in settings, f"{where} has {key!r} twice: keep one")
        require(_is_plain(value), f"{where}: {key} is neither a plain value nor a list of numbers")
        settings[name] = value
    return settings


def settings_text(settings: Mapping[str, Any]) -> str:
    """The content of a file that ``read_settings`` reads."""
    import yaml

    body = yaml.safe_dump(
        dict(settings), sort_keys=False, allow_unicode=True, default_flow_style=None, width=1 << 20
    )
    return _HEAD + str(body)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, int | float) and not isinstance(item, bool) for item in value)
    return value is None or isinstance(value, str | int | float)


def _reason(error: Any) -> str:
    """What is wrong in a line, and where."""
    mark = getattr(error, "problem_mark", None)
    place = f", line {mark.line + 1}" if mark is not None else ""
    return f"{getattr(error, 'problem', None) or 'it has characters that no text has'}{place}"


@cache
def _loader() -> Any:
    """The class that reads: PyYAML's safe loader, with less that it takes."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads plain mappings."""

        # The first letter chooses which patterns are tried; None stands for all of them.
        yaml_implicit_resolvers = {
            None: [(f"tag:yaml.org,2002:{name}", rule) for name, rule in _whole(_SCALARS)]
        }

        def fetch_flow_collection_start(self, kind: Any) -> None:
            """A bracket or brace, of which few stand in one another."""
            if self.flow_level > _MOST_NESTED:
                mark = self.get_mark()
                raise yaml.scanner.ScannerError(None, None, "it is nested too deeply", mark)
            super().fetch_flow_collection_start(kind)

        def compose_node(self, parent: Any, index: Any) -> Any:
            """A node, which must not be an alias: aliases of aliases grow without bound."""
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.composer.ComposerError(None, None, "it has an alias (*name)", mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            """A mapping, in which no key stands twice."""
            keys = [key.value for key, _ in node.value if isinstance(key.value, str)]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"it has {key!r} twice", node.start_mark
                    )
            return super().construct_mapping(node, deep)

    return Loader


def _whole(rules: Mapping[str, re.Pattern[str]]) -> list[tuple[str, re.Pattern[str]]]:
    return [(name, re.compile(f"(?:{rule.pattern})$")) for name, rule in rules.items()]
