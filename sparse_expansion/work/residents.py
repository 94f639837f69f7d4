"""Files of the run whose tensors are still on the device of the worker that made them."""

from __future__ import annotations

import torch

from sparse_expansion.data.activations import ActivationBuffers


class Residents:
    """Tensors of files by name, as far as the device's budget has room for them.

    They are what the files hold: a worker that does not have them reads these.
    """

    def __init__(self, buffers: ActivationBuffers) -> None:
        """Nothing is kept yet.

        Args:
            buffers: whose budget it is.
        """
        self.buffers = buffers
        self._kept: dict[str, tuple[int, dict[str, torch.Tensor]]] = {}

    def keep(self, name: str, tensors: dict[str, torch.Tensor], layer: int) -> None:
        """Keep a file's tensors, if all of them are on the device and may stay there.

        Args:
            name: of the file.
            tensors: that it holds; not to be written to any more.
            layer: last block whose units read the file.
        """
        if all(self.buffers.try_hold(tensor) for tensor in tensors.values()):
            self._kept[name] = layer, tensors

    def get(self, name: str) -> dict[str, torch.Tensor] | None:
        """A file's tensors; None where they are not kept."""
        kept = self._kept.get(name)
        return None if kept is None else kept[1]

    def forget_before(self, layer: int) -> None:
        """Drop what only earlier blocks' units read."""
        for name in [name for name, (last, _) in self._kept.items() if last < layer]:
            del self._kept[name]
