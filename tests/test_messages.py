"""Errors of libraries, as one line."""

import pytest

from sparse_expansion.messages import first_line


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
