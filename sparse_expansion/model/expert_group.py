"""The expanded linears that share an input, as a GPU multiplies by them: the host never waits."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from sparse_expansion.algorithms.grouped_product import multiply_dense
from sparse_expansion.algorithms.packing.layout import PackedLayout
from sparse_expansion.algorithms.stored_experts import (
    MAX_TOKENS,
    StoredExperts,
    StoredLinear,
    have_kernels,
)
from sparse_expansion.model.expert_cache import ExpertCache
from sparse_expansion.model.routing import Routing, Seen


class Linear(Protocol):
    """An expanded linear, as its group sees it."""

    layout: PackedLayout
    layouts: Sequence[PackedLayout]
    """Of every expert."""
    cache: ExpertCache
    bias: torch.nn.Parameter | None
    """That all experts share."""

    @property
    def device(self) -> torch.device:
        """The device that holds the experts."""

    def streams(self) -> StoredLinear:
        """All experts as they are stored."""

    def streams_state(self) -> tuple[Any, ...]:
        """What changes when any expert's tensors are moved, loaded again, or written to."""

    def holders(self) -> list[nn.Module]:
        """The modules whose parameters ``streams`` are made of."""


class Table(NamedTuple):
    """What kernels find the experts of linears by that are multiplied by in one launch."""

    linears: list[int]
    """Their identities: a table does not keep them alive."""
    seen: Seen
    """The parameters that it is of."""
    stored: StoredExperts


class ExpertGroup:
    """Linears of one group in their order, and the tables that kernels find their experts by.

    Linears of one shape (gate and up) are multiplied by in one launch: the first that is called
    with an input leaves the others' outputs for them.
    """

    def __init__(self) -> None:
        """Start without a linear; see ``add``."""
        # Linears refer to their group: were they referred to from here too, a block's experts would
        # not be freed with the block, but when the garbage collector comes.
        self._linears: list[weakref.ref[Linear]] = []
        # By a linear's identity, and whether the table is of it alone.
        self._tables: dict[tuple[int, bool], Table] = {}
        # An input, its version, and outputs of linears that were not yet asked for them.
        self._waiting: tuple[weakref.ref[torch.Tensor], int, dict[int, torch.Tensor]] | None = None

    @property
    def linears(self) -> list[Linear]:
        """Those that are still there."""
        found = (each() for each in self._linears)
        return [one for one in found if one is not None]

    def add(self, linear: Linear) -> None:
        """Make a linear the group's next one."""
        # It may have the identity of one that is gone.
        self.forget()
        self._linears.append(weakref.ref(linear))

    @property
    def dense_weights(self) -> int:
        """Weights of all linears before they were expanded."""
        return sum(one.layout.rows * one.layout.columns for one in self.linears)

    def kept_weights(self) -> list[int]:
        """How many of them every expert keeps."""
        each = zip(*(one.layouts for one in self.linears), strict=True)
        return [sum(layout.num_kept for layout in layouts) for layouts in each]

    @property
    def num_tables(self) -> int:
        """Launches that tables are held for."""
        return len({id(table) for table in self._tables.values()})

    def has_kernels(self, linear: Linear, X: torch.Tensor) -> bool:
        """Whether kernels multiply such an input with the linear's experts where they are."""
        return have_kernels(X.device) and linear.device == X.device

    def multiply(
        self, linear: Linear, X: torch.Tensor, routing: Routing, dtype: torch.dtype
    ) -> torch.Tensor:
        """One linear's output ``[T, O]`` for ``X [..., D]``, in ``dtype``."""
        X_TD = routing.inputs_of_experts(X.reshape(-1, X.shape[-1]).to(dtype))
        if len(X_TD) <= MAX_TOKENS:
            return self._multiply_stored(linear, X, X_TD, routing)
        return self._multiply_unpacked(linear, X_TD, routing)

    def _multiply_stored(
        self, linear: Linear, X: torch.Tensor, X_TD: torch.Tensor, routing: Routing
    ) -> torch.Tensor:
        # An inference tensor has no version counter, so that a change in place would go unseen.
        version = None if X.is_inference() else X._version
        if self._waiting is not None and version is not None:
            seen, seen_version, outputs = self._waiting
            if seen() is X and seen_version == version and id(linear) in outputs:
                found = outputs.pop(id(linear))
                if found.dtype == X_TD.dtype:
                    return found
        mates, _, stored = self._table(linear, is_alone=version is None)
        out = stored.multiply(X_TD, routing.experts_T)
        others = dict(zip(mates, out, strict=True))
        found = others.pop(id(linear))
        self._waiting = None if version is None else (weakref.ref(X), version, others)
        return found

    def _multiply_unpacked(
        self, linear: Linear, X_TD: torch.Tensor, routing: Routing
    ) -> torch.Tensor:
        mates, _, stored = self._table(linear)
        index = mates.index(id(linear))
        rows, columns = linear.layout.shape
        out_SO = X_TD.new_empty(len(X_TD) + 1, rows)
        where = routing.order_T, routing.ends_K, out_SO
        if linear.cache.max_bytes is None:
            weights = linear.cache.all_dense(
                linear,
                X_TD.dtype,
                lambda: stored.unpack(0, stored.num_experts, X_TD.dtype, linear=index),
            )
            multiply_dense(X_TD, weights, stored.biases[index], *where)
            return out_SO[:-1]
        # Experts that have tokens, into memory that the next ones take over.
        step = max(1, linear.cache.max_bytes // (rows * columns * X_TD.element_size()))
        for first in range(0, stored.num_experts, step):
            count = min(step, stored.num_experts - first)
            weights = stored.unpack(first, count, X_TD.dtype, routing.sizes_K, linear=index)
            multiply_dense(X_TD, weights, stored.biases[index], *where, first=first)
        return out_SO[:-1]

    def forget(self) -> None:
        """Drop tables and outputs: the linears' tensors are about to be moved."""
        self._tables, self._waiting = {}, None

    def _mates(self, linear: Linear) -> list[Linear]:
        """The linears that are multiplied by in one launch with this one, itself among them."""

        def form(one: Linear) -> tuple[Any, ...]:
            dtype = None if one.bias is None else one.bias.dtype
            return one.layout, one.device, dtype

        wanted = form(linear)
        return [one for one in self.linears if form(one) == wanted]

    def _table(self, linear: Linear, *, is_alone: bool = False) -> Table:
        """A linear's table, made again when one of its linears was moved, loaded or written to.

        Args:
            linear: that is multiplied by.
            is_alone: whether by it alone, without those of its form.
        """
        found = self._tables.get((id(linear), is_alone))
        if found is None or not found.seen.is_as_it_was():
            mates = [linear] if is_alone else self._mates(linear)
            seen = Seen(module for one in mates for module in one.holders())
            # What a compiled model or one in training is run with may be used in any mode later.
            with torch.inference_mode(False), torch.no_grad():
                stored = StoredExperts([one.streams() for one in mates])
            found = Table([id(one) for one in mates], seen, stored)
            self._tables |= {(one, is_alone): found for one in found.linears}
        return found

    def __getstate__(self) -> dict[str, Any]:
        # Tables are of addresses in this process.
        return {"linears": self.linears}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ExpertGroup.__init__(self)
        for linear in state["linears"]:
            self.add(linear)
