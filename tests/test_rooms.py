"""The rooms of the code are none too full: sizes of files, classes and functions."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "sparse_expansion").rglob("*.py"))
FILE_LINES, CLASS_LINES, FUNCTION_LINES = 400, 250, 60
COMPILED = ROOT / "sparse_expansion" / "algorithms" / "kernels"
"""Compiled kernels are as long as what they compute."""


def lines(node: ast.AST) -> int:
    """Lines of a class or function, its docstring not counted."""
    text = ast.get_docstring(node, clean=False)
    return node.end_lineno - node.lineno + 1 - (text.count("\n") + 1 if text else 0)


def overfull(source: str) -> Iterator[str]:
    """What in a module is too long."""
    if source.count("\n") > FILE_LINES:
        yield f"{source.count(chr(10))} lines"
    for node in ast.walk(ast.parse(source)):
        limit = None
        if isinstance(node, ast.ClassDef):
            limit = CLASS_LINES
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            limit = FUNCTION_LINES
        if limit is not None and lines(node) > limit:
            yield f"{node.name} has {lines(node)} lines"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_is_not_overfull(module):
    if COMPILED not in module.parents:
        assert list(overfull(module.read_text())) == []


def test_what_is_too_long_is_found():
    body = "    x = 1\n" * 61
    assert list(overfull(f'def f():\n    """A\n\n    B.\n    """\n{body}')) == ["f has 62 lines"]
    assert list(overfull("x = 1\n" * 401)) == ["401 lines"]
    many = "".join(f"    def f{i}(self):\n        pass\n" for i in range(126))
    assert list(overfull(f"class C:\n{many}")) == ["C has 253 lines"]
    assert len(MODULES) > 100
