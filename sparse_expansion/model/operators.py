"""Routing and products of expanded linears as PyTorch operators, for models that are compiled.

A compiler sees a whole model as one graph: what experts do by themselves, chosen by the tokens, is
one operator in it, which is run as without a compiler.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch

_MODULES: WeakValueDictionary[str, Any] = WeakValueDictionary()
"""Modules by their handles: operators take tensors and plain values alone."""
_numbers = itertools.count()


def handle_of(module: Any) -> str:
    """A new name by which operators find the module in this process.

    A string, which compilers take for a constant where they would take a number for a variable.
    """
    handle = f"{type(module).__name__}-{next(_numbers)}"
    _MODULES[handle] = module
    return handle


@torch.library.custom_op("sparse_expansion::route", mutates_args=())
def route_tokens(X_TD: torch.Tensor, router: str) -> torch.Tensor:
    """Expert of every token (int64), by the ``GroupRouter`` of that handle."""
    experts_T: torch.Tensor = _MODULES[router].experts(X_TD)
    return experts_T


@route_tokens.register_fake
def _(X_TD: torch.Tensor, router: str) -> torch.Tensor:
    return X_TD.new_empty(X_TD.shape[0], dtype=torch.int64)


@torch.library.custom_op("sparse_expansion::multiply", mutates_args=())
def multiply_experts(X_TD: torch.Tensor, experts_T: torch.Tensor, linear: str) -> torch.Tensor:
    """Output of every token, ``[T, O]``, by the ``ExpandedLinear`` of that handle."""
    out_TO: torch.Tensor = _MODULES[linear].multiply(X_TD, experts_T)
    return out_TO


@multiply_experts.register_fake
def _(X_TD: torch.Tensor, experts_T: torch.Tensor, linear: str) -> torch.Tensor:
    return X_TD.new_empty(X_TD.shape[0], _MODULES[linear].out_features)
