"""Captured activations: a block's inputs on a shard, kept while units of that block need them."""

from __future__ import annotations

from collections import OrderedDict

import torch

from sparse_expansion.data.activations import ActivationBuffers

LACKING = " lacks in its outputs"
"""Ends the name under which stands what a group's dense outputs lack, beside its inputs."""
UPSTREAM = " lacks of the blocks before"
"""Ends the name under which stands, for a sample of the tokens, what the output of the whole block
lacks besides."""
ATTENTION = "attention's outputs"
"""Name under which attention's outputs stand beside the groups' inputs."""


class Captures:
    """Captured activations by block and shard, and the clusters that routers sort them into."""

    def __init__(self, buffers: ActivationBuffers, max_bytes: int) -> None:
        """Nothing is captured yet.

        Args:
            buffers: that the activations are allocated from.
            max_bytes: bytes of activations that are kept, as far as other blocks' can be dropped.
        """
        self.buffers = buffers
        self.max_bytes = max_bytes
        self.labels: dict[tuple[int, int, str], torch.Tensor] = {}
        """Cluster of every token (int16), by block, shard and group."""
        self._kept: OrderedDict[tuple[int, int], dict[str, torch.Tensor]] = OrderedDict()

    def get(self, layer: int, shard: int) -> dict[str, torch.Tensor] | None:
        """Activations of a block on a shard by name, each ``[T, D]``; None if not captured."""
        return self._kept.get((layer, shard))

    def keep(self, layer: int, shard: int, captured: dict[str, torch.Tensor]) -> None:
        """Keep a block's activations on a shard."""
        self._kept[layer, shard] = captured

    def make_room(self, layer: int) -> None:
        """Drop the oldest other blocks' shards until another shard of the largest size fits."""
        sizes = {
            key: sum(tensor.numel() * tensor.element_size() for tensor in captured.values())
            for key, captured in self._kept.items()
        }
        excess = sum(sizes.values()) + max(sizes.values(), default=0) - self.max_bytes
        for key, size in sizes.items():
            if excess <= 0:
                break
            if key[0] != layer:
                self.drop(*key)
                excess -= size

    def drop(self, layer: int, shard: int) -> None:
        """Give back what a block's activations on a shard take."""
        for tensor in self._kept.pop((layer, shard), {}).values():
            self.buffers.release(tensor)
        for key in [key for key in self.labels if key[:2] == (layer, shard)]:
            del self.labels[key]

    def drop_all(self) -> None:
        """Give back all of them; who needs some captures them again."""
        for key in list(self._kept):
            self.drop(*key)

    def forget_before(self, layer: int) -> None:
        """Drop the activations of earlier blocks: nothing reads them any more."""
        for key in [key for key in self._kept if key[0] < layer]:
            self.drop(*key)
