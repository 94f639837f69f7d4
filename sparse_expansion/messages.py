"""Text for people: errors of libraries as one line, names from files with nothing to obey."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What an error says first; the name of its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """All that an error says, or its kind, in one line: some say what is wrong in their last."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    r"""A text whose control characters are shown and not obeyed: ``\x1b`` for an escape.

    Names come from files that may be anybody's, and a terminal does what such characters say: it
    hides text, or shows another. Line feeds stay.
    """
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )


def shown(value: object) -> object:
    """What a template writes for a value: a text as `printable` has it, all else as it is."""
    # Markup is a kind of text too, made by the program itself.
    return printable(value) if type(value) is str else value
