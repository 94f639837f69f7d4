"""Models that a benchmark is named, wherever they come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparse_expansion.api.models import named_origin


def local_folder(model: str) -> Path:
    """The folder of a model: its own, a download's, or that of a converted GGUF file.

    Raises:
        ValueError: the name leads nowhere, or to a folder that is no model's.
    """
    return named_origin(model).fetch()


def named_folders(models: Sequence[str]) -> dict[str, Path]:
    """Folders by name: of ``NAME=MODEL``, or of the model itself.

    Raises:
        ValueError: two have one name, or there is no such model.
    """
    found: dict[str, Path] = {}
    for given in models:
        name, _, model = given.rpartition("=")
        name = name or Path(model).resolve().name
        if name in found:
            raise ValueError(f"two models are called {name}: name them, as in NAME={model}")
        found[name] = local_folder(model)
    return found
