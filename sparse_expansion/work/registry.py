"""The registry of stages: what a unit of work may ask a worker to do.

A stage is a function of a module in ``work.stages``, marked with ``@stage``. Its keyword parameters
are the unit's; they are checked when the unit is planned, so that a unit that does not fit its
stage fails on the driver, before anything has run.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sparse_expansion.units import Unit


@dataclass
class Done:
    """What a stage has made."""

    stats: dict[str, Any] = field(default_factory=dict)
    """Small, plain values for the unit's report and its marker."""
    outputs: dict[str, Any] = field(default_factory=dict)
    """Values that are handed on to other units, by name."""
    files: dict[str, Future[dict[str, Any]]] = field(default_factory=dict)
    """Records of its files, by name, as soon as they are written."""


@dataclass(frozen=True, eq=False)
class Stage:
    """A stage, and all that is special about it."""

    function: Callable[..., Done]
    """Takes the worker's context, the unit's input values, and its parameters by keyword."""
    name: str
    """Name that its units carry."""
    is_final: bool = False
    """Whether its files are part of the result, and not only of the way there."""
    replaces: str | None = None
    """Stage whose files are drafts where this one is planned too."""
    makes_captures: bool = False
    """Whether it captures the activations that units of the same affinity read."""
    keeps_expanded_block: bool = False
    """Whether the next unit may want the expanded block that this one was run with."""
    loads_block: bool = False
    """Whether it reads the weights of a whole block."""

    @cached_property
    def parameters(self) -> Mapping[str, tuple[Any, bool]]:
        """Type of every parameter, and whether it may be left out."""
        hints = typing.get_type_hints(self.function)
        found = inspect.signature(self.function).parameters.values()
        return {
            one.name: (hints[one.name], one.default is not one.empty)
            for one in found
            if one.kind is one.KEYWORD_ONLY
        }

    def unit(self, *, key: str, params: dict[str, Any] | None = None, **fields: Any) -> Unit:
        """Plan a unit of this stage.

        Args:
            key: of the unit.
            params: the stage's parameters.
            fields: other fields of ``Unit``.

        Raises:
            TypeError: a parameter is unknown, missing, or of another type than the stage takes.
        """
        params = params or {}
        for name in params:
            if name not in self.parameters:
                known = ", ".join(self.parameters) or "none"
                raise TypeError(f"{key}: stage {self.name} has no parameter {name!r} (has {known})")
        for name, (kind, is_optional) in self.parameters.items():
            if name in params and not _fits(params[name], kind):
                raise TypeError(f"{key}: {name} {params[name]!r} of stage {self.name} is no {kind}")
            if name not in params and not is_optional:
                raise TypeError(f"{key}: stage {self.name} needs a parameter {name!r}")
        return Unit(
            key=key, stage=self.name, params=params, makes_captures=self.makes_captures, **fields
        )


_STAGES: dict[str, Stage] = {}


def stage(name: str | None = None, **special: Any) -> Callable[[Callable[..., Done]], Stage]:
    """Register a function as a stage.

    Args:
        name: by default the function's.
        special: other fields of ``Stage``.
    """

    def register(function: Callable[..., Done]) -> Stage:
        made = Stage(function, name or function.__name__, **special)
        known = _STAGES.setdefault(made.name, made)
        if known.function.__module__ != function.__module__:
            raise ValueError(f"stage {made.name} is registered twice")
        _STAGES[made.name] = made
        return made

    return register


def stage_of(name: str) -> Stage:
    """The stage of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in _STAGES:
        package = importlib.import_module("sparse_expansion.work.stages")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    if name not in _STAGES:
        raise ValueError(f"no stage {name!r} (known: {', '.join(sorted(_STAGES))})")
    return _STAGES[name]


def _fits(value: Any, kind: Any) -> bool:
    """Whether a plain value is of an annotated type: unions and containers included."""
    if value.__class__ is kind:
        # Most are; a large plan has hundreds of thousands, and what follows is slow.
        return True
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inside)
    if kind is None or kind is types.NoneType:
        return value is None
    if kind is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is None:
        return isinstance(value, kind)
    if not isinstance(value, origin):
        return False
    if origin is dict:
        return all(_fits(k, inside[0]) and _fits(v, inside[1]) for k, v in value.items())
    if origin is tuple and inside[-1] is not Ellipsis:
        return len(value) == len(inside) and all(map(_fits, value, inside))
    return all(_fits(item, inside[0]) for item in value)
