"""Pruners by name."""

from __future__ import annotations

import importlib

from sparse_expansion.algorithms.pruners.base import Pruner
from sparse_expansion.config import PRUNERS


def pruner_of(name: str) -> Pruner:
    """The pruner of a name of ``PRUNERS``: ``PRUNER`` of the module of that name.

    Raises:
        ValueError: there is no such pruner.
    """
    if name not in PRUNERS:
        raise ValueError(f"pruner {name!r} is none of {', '.join(PRUNERS)}")
    pruner: Pruner = importlib.import_module(f"sparse_expansion.algorithms.pruners.{name}").PRUNER
    return pruner
