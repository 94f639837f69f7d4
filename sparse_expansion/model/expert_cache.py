"""A bounded cache of experts in the forms that they are multiplied in."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Protocol

import torch

from sparse_expansion.algorithms.matvec import StoredMatrix
from sparse_expansion.algorithms.packing.layout import PackedLayout
from sparse_expansion.algorithms.semi_structured import for_matmul

DEFAULT_CACHE_BYTES = 1 << 30


class PackedExperts(Protocol):
    """The packed experts of one linear, as the cache reads them."""

    @property
    def layout(self) -> PackedLayout:
        """Shape and sparsity of every expert."""

    @property
    def device(self) -> torch.device:
        """The device that holds the experts."""

    def tensors(self, expert: int) -> dict[str, torch.Tensor]:
        """One expert's streams by name."""

    def unpack(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One expert's dense weight, ``[O, D]``."""

    def stored(self, expert: int) -> StoredMatrix:
        """One expert's streams, made ready for products with single tokens."""


class ExpertCache:
    """Recently used experts; the least recent ones are evicted beyond ``max_bytes``.

    An expert is cached in up to two forms: its dense weight, which multiplies any number of tokens
    (semi-structured on a GPU where that is faster), and what its stored streams need beside them
    to multiply a single token.
    """

    def __init__(self, max_bytes: int | None = DEFAULT_CACHE_BYTES) -> None:
        """Start empty; without a bound (``None``) nothing is ever evicted."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[tuple[int, int, type], tuple[Any, int]] = OrderedDict()

    def dense(self, linear: PackedExperts, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One expert's dense weight ``[O, D]``, unpacked if it is not cached."""
        key = (id(linear), expert, torch.Tensor)
        weight: torch.Tensor | None = self._find(key)
        if weight is not None and weight.dtype == dtype and weight.device == linear.device:
            return weight
        weight = for_matmul(linear.unpack(expert, dtype), linear.layout)
        self._insert(key, weight, weight.numel() * weight.element_size())
        return weight

    def stored(self, linear: PackedExperts, expert: int) -> StoredMatrix:
        """One expert's streams, ready to multiply one token."""
        key = (id(linear), expert, StoredMatrix)
        matrix: StoredMatrix | None = self._find(key)
        # The model may have been moved or loaded again since the entry was made.
        if matrix is None or not matrix.is_of(linear.tensors(expert)):
            matrix = linear.stored(expert)
            self._insert(key, matrix, matrix.num_bytes)
        return matrix

    def clear(self) -> None:
        """Evict everything."""
        self._entries.clear()
        self.num_bytes = 0

    def _find(self, key: tuple[int, int, type]) -> Any:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def _insert(self, key: tuple[int, int, type], value: Any, num_bytes: int) -> None:
        self._evict(key)
        if self.max_bytes is not None:
            while self._entries and self.num_bytes + num_bytes > self.max_bytes:
                self._evict(next(iter(self._entries)))
        self._entries[key] = (value, num_bytes)
        self.num_bytes += num_bytes

    def _evict(self, key: tuple[int, int, type]) -> None:
        _, num_bytes = self._entries.pop(key, (None, 0))
        self.num_bytes -= num_bytes

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertCache:
        # Entries are keyed by the identity of their linear, so a copied model starts with none.
        return ExpertCache(self.max_bytes)
