"""Windows to group inputs: the only home of hooks, and of the buffers that hold activations."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_expansion.model.families import LinearGroup


class ActivationBuffers:
    """Tensors for activations: in memory up to a budget, beyond it in a mapped scratch file.

    A scratch file is unlinked as soon as it is mapped, so nothing is left behind however the
    process ends.
    """

    def __init__(self, *, memory_bytes: int, scratch: str | Path | None = None) -> None:
        self.memory_bytes = memory_bytes
        self.scratch = None if scratch is None else str(scratch)
        self.in_memory = 0
        self.spilled = 0
        self._maps: dict[int, mmap.mmap] = {}

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised CPU tensor; give it back with ``release``."""
        tensor = torch.empty(0, dtype=dtype)
        numel = 1
        for size in shape:
            numel *= size
        num_bytes = numel * tensor.element_size()
        if not num_bytes or self.in_memory + num_bytes <= self.memory_bytes:
            self.in_memory += num_bytes
            return torch.empty(shape, dtype=dtype)
        with tempfile.NamedTemporaryFile(prefix="sparse-expansion-", dir=self.scratch) as file:
            # Reserve the blocks now: a full disk must be an error here, not a crash (SIGBUS) when
            # the mapping is written.
            _reserve(file.fileno(), num_bytes)
            mapping = mmap.mmap(file.fileno(), num_bytes)
        mapped = torch.frombuffer(mapping, dtype=dtype, count=numel)
        self._maps[mapped.data_ptr()] = mapping
        self.spilled += num_bytes
        return mapped.view(shape)

    def let_go(self) -> None:
        """Give back the memory of what is in scratch files: it is read again when needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapping in self._maps.values():
                mapping.madvise(mmap.MADV_DONTNEED)

    def release(self, tensor: torch.Tensor) -> None:
        """Take the tensor's bytes off the account."""
        num_bytes = tensor.numel() * tensor.element_size()
        if self._maps.pop(tensor.data_ptr(), None) is not None:
            self.spilled -= num_bytes
        else:
            self.in_memory -= num_bytes


def outside_heap(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in memory of its own, which goes back to the system when the copy does.

    For what outlives the large tensors that are made and freed around it: on the heap it would
    keep the space between from being used again.
    """
    if not tensor.numel() or not hasattr(mmap, "MAP_ANONYMOUS"):
        return tensor.clone()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, tensor.numel() * tensor.element_size(), flags=flags)
    copy = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def _reserve(descriptor: int, num_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, num_bytes)
    else:
        os.truncate(descriptor, num_bytes)


class AllSeenError(Exception):
    """A block was stopped: the inputs that were wanted of it are there."""


class GroupInputs:
    """Collects what the first linear of each group is called with, while a block runs."""

    def __init__(
        self, block: nn.Module, groups: tuple[LinearGroup, ...], *, stop: bool = False
    ) -> None:
        """Of ``groups`` in the order in which data passes through them.

        Args:
            block: that will run.
            groups: of its linears.
            stop: raise ``AllSeenError`` where the last group would be multiplied.
        """
        self.inputs: dict[str, torch.Tensor] = {}
        self._last = groups[-1].name if stop else None
        self._handles = [
            block.get_submodule(group.linears[0]).register_forward_pre_hook(self._hook(group.name))
            for group in groups
        ]

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self.inputs[name] = args[0].detach().reshape(-1, args[0].shape[-1])
            if name == self._last:
                raise AllSeenError

        return hook

    def __enter__(self) -> GroupInputs:
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()


class AttentionOutputs:
    """Keeps what a block's attention puts out, or has kept outputs put out in its place.

    Attention comes before the MLP: on the same hidden states it puts out the same, however the MLP
    is compressed.
    """

    def __init__(self, block: nn.Module, name: str, *, replays: bool) -> None:
        """Of ``block``'s attention.

        Args:
            block: that will run.
            name: of the attention in it.
            replays: put ``output`` out, whatever the attention is called with.
        """
        self.output: torch.Tensor | None = None
        """``[N, L, D]``, of the last run or for the next one."""
        self._block, self._name = block, name
        self._attention = block.get_submodule(name)
        if replays:
            block.set_submodule(name, _Replay(self))
        else:
            self._handle = self._attention.register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, args: Any, out: tuple[Any, ...]) -> None:
        self.output = out[0].detach()

    def __enter__(self) -> AttentionOutputs:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._block.get_submodule(self._name) is self._attention:
            self._handle.remove()
        else:
            self._block.set_submodule(self._name, self._attention)


class _Replay(nn.Module):
    def __init__(self, outputs: AttentionOutputs) -> None:
        super().__init__()
        self._outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, None]:
        # The second is the attention's weights, which nothing asked for.
        return self._outputs.output, None
