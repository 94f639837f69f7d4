"""How text is read out of files and data sets."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_expansion.config.fields import setting
from sparse_expansion.config.kinds import check_kinds


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How text is read out of files and data sets; what it leads to is digested as tokens."""

    text_column: str | None = setting(
        None,
        "Column of .jsonl and .parquet files and hub data sets that is read: strings, or "
        "conversations (lists of messages with role and content), which the tokenizer's chat "
        "template makes texts of.",
        metavar="NAME",
        meanings={None: "text, or messages where there is no text"},
        group="data",
    )

    def __post_init__(self) -> None:
        """Check kinds."""
        check_kinds(self)
