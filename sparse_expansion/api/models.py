"""The model of a job: where it comes from, and how it gets there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_expansion.run_files import IN_MEMORY

if TYPE_CHECKING:
    from sparse_expansion.model.sources import ModelSource
    from sparse_expansion.model.streaming import ModelShell


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model is read from, and how it is downloaded."""

    source: ModelSource
    name: str
    """How results name it."""
    cache_dir: str | None = None
    """The folder of downloads and conversions; ``None`` for the libraries' own."""
    revision: str | None = None
    """The revision on the hub; ``None`` for the source's."""

    def fetch(self) -> Path:
        """The local folder, downloaded or converted where it has to be.

        Raises:
            ValueError: it cannot be had.
        """
        from sparse_expansion.model.sources import fetch_model

        return fetch_model(self.source, cache_dir=self.cache_dir, revision=self.revision)

    def shell(self, dtype: str) -> ModelShell:
        """The model without its blocks.

        Args:
            dtype: a name of ``config.DTYPES``.

        Raises:
            ValueError: it cannot be had, or is no model that is supported.
        """
        from sparse_expansion.model.streaming import ModelShell

        return ModelShell(self.fetch(), dtype=dtype)


def named_origin(
    model: str,
    size: str | None = None,
    *,
    cache_dir: str | None = None,
    revision: str | None = None,
) -> Origin:
    """Where a model of this name comes from; nothing is downloaded.

    Args:
        model: name of a family, hub id or path.
        size: of a family's model.
        cache_dir: the folder of downloads.
        revision: on the hub.

    Raises:
        ValueError: the name leads nowhere, or to a folder that is no model's.
    """
    from sparse_expansion.model.model_folder import check_model_folder
    from sparse_expansion.model.sources import resolve_name

    source = resolve_name(model, size)
    if source.kind == "folder":
        check_model_folder(Path(source.location))
    return Origin(source=source, name=source.location, cache_dir=cache_dir, revision=revision)


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """What model is asked for."""

    model: Any
    """A path, a hub id, the name of a family (with ``size``), or a loaded model."""
    tokenizer: Any = None
    """That of a loaded model."""
    size: str | None = None
    revision: str | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        """Check that what is given goes together."""
        if isinstance(self.model, str | Path):
            if self.tokenizer is not None:
                raise ValueError("tokenizer goes with a loaded model: a folder has its own")
        elif not hasattr(self.model, "save_pretrained"):
            raise ValueError(
                f"model of type {type(self.model).__name__} is neither a path, a hub id nor a "
                "loaded model of transformers"
            )
        elif self.tokenizer is None:
            raise ValueError("a loaded model needs its tokenizer: give tokenizer=")

    def check(self) -> None:
        """Look at the model's name, and at its folder, before anything is loaded.

        Raises:
            ValueError: the name leads nowhere, or to a folder without configuration, weights or
                tokenizer.
        """
        if not isinstance(self.model, str | Path):
            return
        from sparse_expansion.model.model_folder import check_contents

        source = named_origin(str(self.model), self.size).source
        if source.kind == "folder":
            check_contents(Path(source.location))

    def settings(self) -> dict[str, Any]:
        """What ``run.yaml`` has of it: by which names and paths it is asked for again."""
        name = str(self.model) if isinstance(self.model, str | Path) else IN_MEMORY
        path = Path(name).expanduser()
        found = {
            # The name of a family is no path, whatever folder is called so.
            "model": str(path.resolve()) if self.size is None and path.exists() else name,
            "model_size": self.size,
            "model_revision": self.revision,
            "cache_dir": self.cache_dir and str(Path(self.cache_dir).expanduser().resolve()),
        }
        return {name: value for name, value in found.items() if value is not None}

    @contextmanager
    def opened(self, scratch: str | None) -> Iterator[Origin]:
        """Where the model is read from. A loaded one is written to a folder, and that deleted.

        Args:
            scratch: folder for that folder; ``None`` for the system's.

        Raises:
            ValueError: the name leads nowhere.
        """
        from sparse_expansion.model.sources import ModelSource

        if isinstance(self.model, str | Path):
            yield named_origin(
                str(self.model), self.size, cache_dir=self.cache_dir, revision=self.revision
            )
            return
        with tempfile.TemporaryDirectory(prefix="sparse-expansion-", dir=scratch) as folder:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            name = getattr(self.model, "name_or_path", "") or IN_MEMORY
            yield Origin(source=ModelSource(folder, kind="folder"), name=name)
