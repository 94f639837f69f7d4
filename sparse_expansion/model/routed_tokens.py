"""How many tokens every expert of a block was given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparse_expansion.model.expansion import ExpandedLinear


@contextmanager
def counted_tokens(block: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Count tokens by expert while the block runs.

    Args:
        block: with expanded linears or without.

    Yields:
        By the name of every linear that owns its group's router, tokens of each expert (int64,
        ``[K]``), on the device and complete when the block has run.
    """
    counts: dict[str, torch.Tensor] = {}

    def count(name: str, linear: ExpandedLinear, X: torch.Tensor) -> None:
        # It has routed this very input, and remembers how.
        sizes_K = linear.group_router(X).sizes_K
        counts[name] = counts[name] + sizes_K if name in counts else sizes_K

    def hook_of(name: str) -> Any:
        return lambda module, inputs, output: count(name, module, inputs[0])

    hooks = [
        module.register_forward_hook(hook_of(name))
        for name, module in block.named_modules()
        if isinstance(module, ExpandedLinear) and hasattr(module, "router")
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
