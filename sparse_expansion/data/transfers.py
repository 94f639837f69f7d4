"""Where tensors cross between a device and the host: everything that does goes through here.

On a CPU nothing crosses, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def is_on_device(tensor: torch.Tensor) -> bool:
    """Whether a tensor is in the memory of a device, and not in the host's."""
    return tensor.device.type != "cpu"


def num_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def to_device(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The tensor on a device: itself where it is there, else a copy, which may be under way."""
    return tensor.to(device, non_blocking=tensor.device.type == "cpu" and tensor.is_pinned())


def put(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy values to a tensor that may be elsewhere; those for pinned memory may be under way."""
    target.copy_(source, non_blocking=target.is_pinned())


def settle(device: str) -> None:
    """Wait until what ``put`` began has arrived: from now on the host may read it."""
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.synchronize(device)


def host_tensor(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised host tensor that a GPU reads and writes without a stop: pinned memory.

    PyTorch keeps pinned memory for the next one. Without a GPU it is ordinary memory.
    """
    return torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())


class HostCopies:
    """Contiguous host tensors, by name: copies from a device may still be under way."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Begin to copy what is on a device; what is on the host is taken as it is."""
        self.num_bytes = sum(map(num_bytes, tensors.values()))
        self._copies: dict[str, torch.Tensor] = {}
        self._arrivals: list[torch.cuda.Event] = []
        for key, tensor in tensors.items():
            if is_on_device(tensor):
                self._copies[key] = host_tensor(tensor.shape, tensor.dtype)
                self._copies[key].copy_(tensor, non_blocking=True)
            else:
                self._copies[key] = tensor.contiguous()
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            if torch.cuda.is_available():
                self._arrivals.append(torch.cuda.current_stream(device).record_event())

    def wait(self) -> dict[str, torch.Tensor]:
        """The tensors, once they have arrived; any thread may wait."""
        for arrival in self._arrivals:
            arrival.synchronize()
        return self._copies
