"""Models that a benchmark is named, wherever they come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparse_expansion.api.models import Origin, named_origin


def named_folders(models: Sequence[str]) -> dict[str, Path]:
    """Folders by name of ``NAME=MODEL``, or of the model itself: its own, or a conversion's.

    Raises:
        ValueError: two have one name, or there is no such model.
    """
    found: dict[str, Origin] = {}
    for given in models:
        name, _, model = given.rpartition("=")
        name = name or Path(model).resolve().name
        if name in found:
            raise ValueError(f"two models are called {name}: name them, as in NAME={model}")
        found[name] = named_origin(model)
    # All names are right before any model is downloaded or converted.
    return {name: origin.fetch() for name, origin in found.items()}
