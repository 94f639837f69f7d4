"""Rows of files and data sets as text: a column of strings, or conversations by a chat template."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from sparse_expansion.config.nearest import did_you_mean
from sparse_expansion.messages import one_line

TEXT, MESSAGES = "text", "messages"
"""The columns that are read where none is named: the first, or where it is missing the second."""
EVALUATION_SHARE = 10
"""One of so many documents of a text without a test split is for evaluation."""

Messages = list[dict[str, Any]]
Chat = Callable[[Messages], str]
"""Makes a conversation's text."""


@dataclass(frozen=True)
class Rows:
    """How rows become text."""

    column: str | None = None
    """Name of the column; None for ``text``, or where there is none, ``messages``."""
    chat: Chat | None = None
    """Makes the text of a conversation; None where there is no tokenizer that could."""

    def column_in(self, columns: Collection[str]) -> str:
        """The column to read, of those that there are; what is missing is named all the same."""
        if self.column is not None:
            return self.column
        return MESSAGES if TEXT not in columns and MESSAGES in columns else TEXT

    def text_of(self, row: Any, place: str) -> str | None:
        """The text of a row, None where it has a null.

        Args:
            row: of any form, as it was found.
            place: of the row, for the error.

        Raises:
            ValueError: the row has no such column, or that holds no text.
        """
        columns = row if isinstance(row, dict) else {}
        name = self.column_in(columns)
        if name not in columns:
            hint = self.hint(columns) or f': write {{"{name}": "..."}}'
            raise ValueError(f"{place}: not a JSON object with a {name!r}{hint}")
        value = columns[name]
        if value is None:
            return None
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = self._conversation(value, name, place)
        return checked_text(value, name, place)

    def hint(self, columns: Collection[str]) -> str:
        """What to do where the column is missing; empty where nothing can be said."""
        strings = [column for column in columns if isinstance(column, str)]
        if self.column is not None:
            return did_you_mean(self.column, strings)
        found = ", ".join(sorted(strings)[:8])
        return f": name one of {found} by --text-column" if found else ""

    def _conversation(self, messages: Messages, name: str, place: str) -> str:
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ValueError(f"{place}: a message of {name!r} has no 'role': give it one")
            if not isinstance(message.get("content"), str | list | None):
                raise ValueError(f"{place}: the 'content' of a message of {name!r} is no text")
        if self.chat is None:
            raise ValueError(
                f"{place}: {name!r} is a conversation, and the model's tokenizer has no chat "
                "template: take the tokenizer of a chat model, or write the texts out"
            )
        # Tables give every message all columns, and templates ask whether one is there.
        plain = [{key: value for key, value in m.items() if value is not None} for m in messages]
        try:
            return self.chat(plain)
        except Exception as error:
            # A template is a program of the model's maker, and may fail in any way.
            raise ValueError(
                f"{place}: the chat template does not take this conversation: {one_line(error)}"
            ) from None


def checked_text(value: Any, name: str, place: str) -> str:
    """A value that is text, as it is.

    Args:
        value: of any kind.
        name: of its column, for the error.
        place: of its row, for the error.

    Raises:
        ValueError: it is something else, or has half of a surrogate pair in it.
    """
    if not isinstance(value, str):
        raise ValueError(f"{place}: {name!r} is {_kind(value)}, and not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(value[error.start]):04X}"
        raise ValueError(
            f"{place}: character {error.start} of {name!r} is half of a surrogate pair ({code}), "
            "which is no text: write it as UTF-8, or leave it out"
        ) from None
    return value


def _kind(value: Any) -> str:
    """What a value is, for people."""
    kinds = {bool: "a truth value", int: "a number", float: "a number", list: "a list"}
    return {**kinds, dict: "a mapping", bytes: "bytes"}.get(type(value), type(value).__name__)


def split_documents(documents: list[str]) -> tuple[str, str]:
    """Calibration text and evaluation text of documents.

    The first nine tenths are the calibration text. Where it is one document alone, it is cut at
    white space behind nine tenths of its characters.
    """
    filled = [document for document in documents if document.strip()]
    if len(filled) == 1:
        return _cut(filled[0])
    cut = max(1, len(documents) * (EVALUATION_SHARE - 1) // EVALUATION_SHARE)
    return " ".join(documents[:cut]), "\n\n".join(documents[cut:])


def _cut(text: str) -> tuple[str, str]:
    """A text in two, at the first white space behind nine tenths of it."""
    place = len(text) * (EVALUATION_SHARE - 1) // EVALUATION_SHARE
    rest = text[place:].split(maxsplit=1)
    if len(rest) == 2:
        place = len(text) - len(rest[1])
    return text[:place], text[place:]
