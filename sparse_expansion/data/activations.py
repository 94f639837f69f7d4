"""Hooks that collect a running block's activations, and the buffers that hold them."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_expansion.data.transfers import host_tensor, is_on_device, num_bytes, put
from sparse_expansion.model.families import AttentionOutput, LinearGroup


class ActivationBuffers:
    """Memory for activations and values: a device's, the host's, and mapped scratch files.

    Each is filled up to its budget before the next is used; without a device only the last two
    are. A scratch file is unlinked as soon as it is mapped, so that nothing is left behind however
    the process ends.
    """

    def __init__(
        self,
        *,
        memory_bytes: int,
        scratch: str | Path | None = None,
        device: str = "cpu",
        device_bytes: int = 0,
    ) -> None:
        """Start without any tensors.

        Args:
            memory_bytes: the budget of tensors in memory.
            scratch: the folder of scratch files; ``None`` for the system's temporary folder.
            device: that the tensors are computed on.
            device_bytes: the budget of tensors that stay there; 0 for a CPU.
        """
        self.memory_bytes = memory_bytes
        self.scratch = None if scratch is None else str(scratch)
        self.device = device
        self.device_bytes = device_bytes
        self.bytes_in_memory = 0
        self.bytes_spilled = 0
        self._bytes_on_device = 0
        self._held: set[int] = set()
        # Filled by finalizers, which may run at any time and in any thread.
        self._gone: deque[tuple[int, int]] = deque()
        self._maps: dict[int, mmap.mmap] = {}

    @property
    def bytes_on_device(self) -> int:
        """Bytes of tensors that stay on the device."""
        while self._gone:
            identity, size = self._gone.popleft()
            self._held.discard(identity)
            self._bytes_on_device -= size
        return self._bytes_on_device

    def fits_device(self, size: int) -> bool:
        """Whether the device's budget has room for so many bytes more."""
        return 0 < size <= self.device_bytes - self.bytes_on_device

    def try_hold(self, tensor: torch.Tensor) -> bool:
        """Count a tensor on the device for as long as it lives; False where the budget is full."""
        if not is_on_device(tensor):
            return False
        size = num_bytes(tensor)
        if id(tensor) not in self._held:
            if size and not self.fits_device(size):
                return False
            self._bytes_on_device += size
            self._held.add(id(tensor))
            weakref.finalize(tensor, self._gone.append, (id(tensor), size))
        return True

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor where it may stay for long: itself, or a host copy where the device is full.

        Its bytes on the device count until nothing refers to it.
        """
        if not is_on_device(tensor) or self.try_hold(tensor):
            return tensor
        return copy_to_host(tensor)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor for long: on the device, or on the host where that is full.

        Its bytes on the device count until nothing refers to it.
        """
        if self.fits_device(_size_of(shape, dtype)):
            tensor = torch.empty(shape, dtype=dtype, device=self.device)
            self.try_hold(tensor)
            return tensor
        return torch.empty(shape, dtype=dtype)

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor, to be given back with ``release``.

        Raises:
            OSError: the disk has no room for the scratch file.
        """
        size = _size_of(shape, dtype)
        if self.fits_device(size):
            return self.empty(shape, dtype)
        if not size or self.bytes_in_memory + size <= self.memory_bytes:
            self.bytes_in_memory += size
            return (
                torch.empty(shape, dtype=dtype)
                if self.device == "cpu"
                else host_tensor(shape, dtype)
            )
        with tempfile.NamedTemporaryFile(prefix="sparse-expansion-", dir=self.scratch) as file:
            # The blocks are reserved now, so that a full disk is an error here and not a crash
            # (SIGBUS) when the mapping is written.
            _reserve(file.fileno(), size)
            mapping = mmap.mmap(file.fileno(), size)
        mapped = torch.frombuffer(mapping, dtype=dtype)
        self._maps[mapped.data_ptr()] = mapping
        self.bytes_spilled += size
        return mapped.view(shape)

    def evict_mapped_pages(self) -> None:
        """Give back the memory of tensors in scratch files; they are read again when needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapping in self._maps.values():
                mapping.madvise(mmap.MADV_DONTNEED)

    def release(self, tensor: torch.Tensor) -> None:
        """Take back a tensor from ``allocate``: its bytes no longer count."""
        if is_on_device(tensor):
            # It counts until it is gone.
            return
        if self._maps.pop(tensor.data_ptr(), None) is not None:
            self.bytes_spilled -= num_bytes(tensor)
        else:
            self.bytes_in_memory -= num_bytes(tensor)


def copy_outside_heap(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU copy in a memory mapping of its own, which the system gets back with the copy.

    It serves tensors that outlive the large ones that are made and freed around them: on the heap
    they would keep the space between them from being used again. A tensor on a device is returned
    as it is.
    """
    return tensor if is_on_device(tensor) else copy_to_host(tensor)


def copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU copy, see ``copy_outside_heap``."""
    if not tensor.numel() or not hasattr(mmap, "MAP_ANONYMOUS"):
        return tensor.to("cpu", copy=True)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, num_bytes(tensor), flags=flags)
    copy = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def _size_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor of this shape."""
    return math.prod(shape) * dtype.itemsize


def _reserve(descriptor: int, size: int) -> None:
    """Make the file as long as that, with blocks on the disk where the system can reserve them."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


class CapturedRows:
    """Activations of a shard by name, put together from the batches that its windows pass in."""

    def __init__(self, buffers: ActivationBuffers, num_tokens: int) -> None:
        """Start without any.

        Args:
            buffers: to allocate from.
            num_tokens: tokens of the shard.
        """
        self._buffers = buffers
        self._num_tokens = num_tokens
        self._whole: dict[str, torch.Tensor] = {}
        self._pieces: dict[str, list[torch.Tensor]] = {}

    def put(self, name: str, X_TD: torch.Tensor, rows: slice | None) -> None:
        """Keep one batch's activations.

        Args:
            name: of the activations.
            X_TD: those of the batch.
            rows: their place among the shard's tokens; None where only some tokens have any, so
                that their number is not known before all batches have passed.
        """
        if rows is None:
            piece = self._buffers.allocate(tuple(X_TD.shape), X_TD.dtype)
            put(piece, X_TD)
            self._pieces.setdefault(name, []).append(piece)
            return
        if name not in self._whole:
            shape = (self._num_tokens, X_TD.shape[1])
            self._whole[name] = self._buffers.allocate(shape, X_TD.dtype)
        put(self._whole[name][rows], X_TD)

    def take(self) -> dict[str, torch.Tensor]:
        """All of them ``[T, D]``, once transfers have settled; each to be given back."""
        found, self._whole = self._whole, {}
        while self._pieces:
            name, pieces = self._pieces.popitem()
            if len(pieces) == 1:
                found[name] = pieces[0]
                continue
            shape = (sum(map(len, pieces)), pieces[0].shape[1])
            joined = self._buffers.allocate(shape, pieces[0].dtype)
            for piece, part in zip(pieces, joined.split(list(map(len, pieces))), strict=True):
                part.copy_(piece)
                self._buffers.release(piece)
            found[name] = joined
        return found


class AllInputsSeenError(Exception):
    """The block was stopped because all the inputs that were asked for have been collected."""


class GroupInputs:
    """A context in which the inputs of linear groups are collected while their block runs."""

    def __init__(
        self, block: nn.Module, groups: tuple[LinearGroup, ...], *, stop: bool = False
    ) -> None:
        """Hook the first linear of every group.

        Args:
            block: the block that will run.
            groups: groups of the block's linears, in the order in which data passes through them.
            stop: whether the block is stopped, by ``AllInputsSeenError``, before the product of
                the last group.
        """
        self.inputs: dict[str, torch.Tensor] = {}
        """The latest input of every group by its name, ``[T, D]``; of an expert of a mixture that
        got no token it may be an earlier run's, see ``take``."""
        self._last = groups[-1].name if stop else None
        self._handles = [
            block.get_submodule(group.linears[0]).register_forward_pre_hook(self._hook(group.name))
            for group in groups
        ]

    def _hook(self, name: str) -> Any:
        """A hook that collects the input of the group ``name``."""

        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self.inputs[name] = args[0].detach().reshape(-1, args[0].shape[-1])
            if name == self._last:
                raise AllInputsSeenError

        return hook

    def take(self) -> dict[str, torch.Tensor]:
        """The inputs of one run, and no longer here; not of a group that no token reached."""
        found, self.inputs = self.inputs, {}
        return found

    def __enter__(self) -> GroupInputs:
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()


class AttentionOutputs:
    """A context in which a block's attention is recorded, or recorded outputs replace it.

    Attention comes before the MLP: on the same hidden states its output is the same, however the
    MLP is compressed.
    """

    def __init__(
        self, block: nn.Module, name: str, *, form: AttentionOutput, replays: bool
    ) -> None:
        """Hook the attention, or replace it until the context ends.

        Args:
            block: the block that will run.
            name: the name of the attention in the block.
            form: ``tuple`` for an attention that returns its output and its weights, ``tensor``
                for one that returns its output alone, see ``Family.attention_output``.
            replays: whether ``output`` is returned, whatever the attention is called with.
        """
        self.output: torch.Tensor | None = None
        """The output ``[N, L, D]`` of the latest run, or the one to return in the next run."""
        self._block, self._name, self._form = block, name, form
        self._attention = block.get_submodule(name)
        self._handle: torch.utils.hooks.RemovableHandle | None = None
        if replays:
            block.set_submodule(name, _Replay(self, form))
        else:
            self._handle = self._attention.register_forward_hook(self._record)

    def _record(self, module: nn.Module, args: Any, out: Any) -> None:
        """Keep the output; a forward hook."""
        output: torch.Tensor = out[0] if self._form == "tuple" else out
        self.output = output.detach()

    def __enter__(self) -> AttentionOutputs:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._handle is None:
            self._block.set_submodule(self._name, self._attention)
        else:
            self._handle.remove()


class _Replay(nn.Module):
    """Takes the place of an attention and returns a recorded output."""

    def __init__(self, outputs: AttentionOutputs, form: AttentionOutput) -> None:
        super().__init__()
        self._outputs = outputs
        self._form = form

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # The second of a tuple is the attention's weights, which no block uses.
        return (self._outputs.output, None) if self._form == "tuple" else self._outputs.output
