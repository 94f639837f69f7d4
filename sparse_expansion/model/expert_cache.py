"""A bounded cache of experts in the forms that they are multiplied in."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import torch

from sparse_expansion.algorithms.matvec import StoredMatrix

DEFAULT_CACHE_BYTES = 1 << 30
ALL_EXPERTS = -1
"""Stands for an expert's number where all of them are one entry."""


class StatefulExperts(Protocol):
    """Experts whose tensors may change."""

    def streams_state(self) -> tuple[Any, ...]:
        """What changes when any expert's tensors are moved, loaded again, or written to."""


class PackedExperts(Protocol):
    """The packed experts of one linear, as the cache reads them."""

    def state(self, expert: int) -> tuple[Any, ...]:
        """What changes when an expert's tensors are moved, loaded again, or written to."""

    def stored_weight(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One expert's dense weight, ``[O, D]``, as it is multiplied with."""

    def own_bias(self, expert: int) -> torch.Tensor:
        """One expert's bias as it is stored, ``[O]``."""

    def stored(self, expert: int) -> StoredMatrix:
        """One expert's streams, made ready for products with single tokens."""


class ExpertCache:
    """Recently used experts; the least recent ones are evicted beyond ``max_bytes``.

    An expert is cached in up to two forms: its dense weight, which multiplies any number of tokens,
    and what its stored streams need beside them to multiply a single token. So is its bias. Where a
    GPU multiplies by all experts at once, a cache without a bound has them in one piece.
    """

    def __init__(self, max_bytes: int | None = DEFAULT_CACHE_BYTES) -> None:
        """Start empty; without a bound (``None``) nothing is ever evicted."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._forms: OrderedDict[tuple[int, int, type], tuple[Any, int]] = OrderedDict()
        # Several threads may use one model.
        self._lock = threading.Lock()

    def dense(self, linear: PackedExperts, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One expert's dense weight ``[O, D]``, unpacked if it is not cached."""
        key = (id(linear), expert, torch.Tensor)
        return self._weights(
            key, linear.state(expert), dtype, lambda: linear.stored_weight(expert, dtype)
        )

    def bias(self, linear: PackedExperts, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One expert's bias ``[O]``: experts that are held back are not loaded for it alone."""
        key = (id(linear), expert, torch.nn.Parameter)
        state = linear.state(expert)
        return self._weights(key, state, dtype, lambda: linear.own_bias(expert).to(dtype))

    def all_dense(
        self, linear: StatefulExperts, dtype: torch.dtype, unpack: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """All experts' dense weights ``[K, O, D]``, made by ``unpack`` if they are not cached."""
        key = (id(linear), ALL_EXPERTS, torch.Tensor)
        return self._weights(key, linear.streams_state(), dtype, unpack)

    def stored(self, linear: PackedExperts, expert: int) -> StoredMatrix:
        """One expert's streams, ready to multiply one token."""
        key = (id(linear), expert, StoredMatrix)
        state = linear.state(expert)
        found: tuple[Any, StoredMatrix] | None = self._find(key)
        if found is not None and found[0] == state:
            return found[1]
        matrix = linear.stored(expert)
        self._insert(key, (state, matrix), matrix.num_bytes)
        return matrix

    def _weights(
        self,
        key: tuple[int, int, type],
        state: tuple[Any, ...],
        dtype: torch.dtype,
        unpack: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        found: tuple[Any, torch.Tensor] | None = self._find(key)
        # The model may have been moved, loaded again or written to since the entry was made.
        if found is not None and found[0] == state and found[1].dtype == dtype:
            return found[1]
        # A weight that is made for inference alone could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            weights = unpack()
        self._insert(key, (state, weights), weights.numel() * weights.element_size())
        return weights

    def clear(self) -> None:
        """Evict everything."""
        with self._lock:
            self._forms.clear()
            self.num_bytes = 0

    def _find(self, key: tuple[int, int, type]) -> Any:
        with self._lock:
            if key not in self._forms:
                return None
            self._forms.move_to_end(key)
            return self._forms[key][0]

    def _insert(self, key: tuple[int, int, type], value: Any, num_bytes: int) -> None:
        with self._lock:
            self._evict(key)
            if self.max_bytes is not None:
                while self._forms and self.num_bytes + num_bytes > self.max_bytes:
                    self._evict(next(iter(self._forms)))
            self._forms[key] = (value, num_bytes)
            self.num_bytes += num_bytes

    def _evict(self, key: tuple[int, int, type]) -> None:
        _, num_bytes = self._forms.pop(key, (None, 0))
        self.num_bytes -= num_bytes

    def __reduce__(self) -> tuple[Any, ...]:
        # Entries are keyed by the identity of their linear: copies and pickles take none along.
        return ExpertCache, (self.max_bytes,)
