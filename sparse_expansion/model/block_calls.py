"""What a model calls its blocks with, found by running it over recorders in their place.

Nothing here knows a particular model's forward signature: masks, position embeddings and the rest
are whatever the model hands to its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class BlockCall:
    """Everything that a block is called with besides its hidden states."""

    args: tuple[Any, ...]
    """The positional arguments after the hidden states."""
    kwargs: dict[str, Any]
    """The keyword arguments."""

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output on ``hidden``, both ``[N, L, D]``.

        Depending on the transformers version, blocks return the output itself or first in a tuple.
        """
        out = block(hidden, *self.args, **self.kwargs)
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result


@dataclass(frozen=True)
class RecordedCalls:
    """What one forward pass of the model over recorders found."""

    hidden: torch.Tensor
    """The hidden states that enter the first block, ``[N, L, D]``."""
    calls: list[BlockCall]
    """The call of every block."""
    returns_tuple: bool
    """Whether the model expects its blocks to return tuples."""


class _TupleExpectedError(Exception):
    """The model took ``[0]`` of the tensor that a recorder returned: it expects a tuple."""


class _BlockProxy(nn.Module):
    """Takes a block's place; attributes that the model reads off the block are the block's own."""

    def __init__(self, block: nn.Module, *, returns_tuple: bool) -> None:
        super().__init__()
        # The block is in a tuple so that it is not registered as a submodule.
        self._block = (block,)
        self.returns_tuple = returns_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def _returned(self, hidden: torch.Tensor) -> Any:
        return (hidden,) if self.returns_tuple else hidden


class BlockRecorder(_BlockProxy):
    """Keeps what the block was called with, and passes the hidden states on unchanged."""

    def __init__(self, block: nn.Module) -> None:
        """Take the block's place, and return tensors until the model turns out to want tuples."""
        super().__init__(block, returns_tuple=False)
        self.recorded: tuple[torch.Tensor, BlockCall] | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Record the call."""
        if hidden_states.dim() != 3:
            raise _TupleExpectedError
        self.recorded = hidden_states, BlockCall(args, kwargs)
        return self._returned(hidden_states)

    def take(self) -> tuple[torch.Tensor, BlockCall]:
        """The hidden states and the call that were recorded last; the recorder forgets both."""
        assert self.recorded is not None
        recorded, self.recorded = self.recorded, None
        return recorded


class BlockStandIn(_BlockProxy):
    """Takes the place of all blocks at once: it returns the given hidden states."""

    def __init__(self, block: nn.Module, hidden: torch.Tensor, *, returns_tuple: bool) -> None:
        """Return ``hidden [N, L, D]`` whatever the call; ``block`` is any block of the model."""
        super().__init__(block, returns_tuple=returns_tuple)
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The given hidden states."""
        return self._returned(self.hidden)


def record_calls(
    base_model: nn.Module, recorders: Sequence[BlockRecorder], tokens_NL: torch.Tensor
) -> RecordedCalls:
    """Run a model whose blocks are the recorders.

    Blocks return their hidden states, or a tuple with them first. Which of the two the model
    expects depends on the family and the transformers version, and shows in the shape of what it
    hands to the next block, or returns.

    Args:
        base_model: the model without its head, whose logits would be the largest tensor of a run.
        recorders: one per block, in order; they are in the model already.
        tokens_NL: token ids on the model's device.
    """
    run = {"input_ids": tokens_NL, "use_cache": False}
    try:
        if base_model(**run).last_hidden_state.dim() != 3:
            raise _TupleExpectedError
    except _TupleExpectedError:
        for recorder in recorders:
            recorder.returns_tuple = True
        base_model(**run)
    recorded = [recorder.take() for recorder in recorders]
    return RecordedCalls(recorded[0][0], [call for _, call in recorded], recorders[0].returns_tuple)
