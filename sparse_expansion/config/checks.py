"""Checks that settings classes share."""

from __future__ import annotations


def require(condition: bool, message: str) -> None:
    """Answer settings that cannot be used.

    Raises:
        ValueError: the condition does not hold.
    """
    if not condition:
        raise ValueError(message)


def require_layers(name: str, values: tuple[float, ...], num_layers: int) -> None:
    """Answer a list by block that is another model's.

    Raises:
        ValueError: it is neither empty nor of ``num_layers`` entries.
    """
    require(
        len(values) in (0, num_layers),
        f"{name} is of {len(values)} blocks, the model has {num_layers}: make it for this model",
    )
