"""Errors of libraries, as one line."""

import pytest

from sparse_expansion.messages import first_line, printable


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  no such file\ncalled from here"), "no such file"),
        (OSError(2, "gone"), "[Errno 2] gone"),
        # Some libraries raise without a word.
        (RuntimeError(), "RuntimeError"),
        (KeyError(" "), "' '"),
        (ValueError(" \n"), "ValueError"),
    ],
)
def test_the_first_line_or_the_kind(error, line):
    assert first_line(error) == line


def test_control_characters_are_shown_and_not_obeyed():
    name = "a\x1b[2Jb\rc\u202ed\x9b1me\tf\u2028\ud800"
    assert printable(name) == r"a\x1b[2Jb\rc\u202ed\x9b1me\tf\u2028\ud800"
    for whole in ("Perplexität · 3.2\n→ 模型", "a\\b $x_{"):
        assert printable(whole) == whole
