"""The modules of an expanded model: routed linears whose experts are pruned and packed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sparse_expansion.algorithms.matvec import StoredMatrix, takes_stored_form
from sparse_expansion.algorithms.packing.experts import unpack_expert
from sparse_expansion.algorithms.packing.layout import PackedLayout
from sparse_expansion.algorithms.quantization import AffineGrid
from sparse_expansion.algorithms.stored_experts import StoredExperts, StoredLinear, have_kernels
from sparse_expansion.config import CompressionConfig, RoutingConfig
from sparse_expansion.model.block_linears import linear_shape
from sparse_expansion.model.expert_cache import ExpertCache
from sparse_expansion.model.expert_group import ExpertGroup
from sparse_expansion.model.operators import handle_of, multiply_experts, route_tokens
from sparse_expansion.model.routing import (
    Float32Module,
    GroupRouter,
    Routing,
    frozen,
    tensor_state,
    without_autocast,
)
from sparse_expansion.types import MODEL_DTYPES

FLOAT32_TENSORS = (
    *("router.mean", "router.components", "router.centroids", "router.sparsity"),
    *("grid.scale", "grid.zero_point"),
)
"""Tensors of an ``ExpandedLinear`` that stay float32 whatever the model's dtype.

By name each, for a router holds integers too, and older versions of transformers give all that
such a name is part of this dtype.
"""
GUARD_HINT = "Before loading, import sparse_expansion"
"""The name of a guard that no weight stands behind, see ``guard_tensors``."""
STORED_TOKENS = 8
"""Most tokens that a CPU multiplies with the stored streams, one after another."""


class Grid(Float32Module):
    """The affine quantization grid that all experts of one linear share."""

    def __init__(self, rows: int, width: int, config: CompressionConfig) -> None:
        """Make an empty scale and zero point for every group of every row."""
        super().__init__()
        assert config.bits is not None
        self.bits = config.bits
        self.group_size = width if config.group_size is None else min(config.group_size, width)
        groups = -(-width // self.group_size)
        self.scale = frozen(torch.empty(rows, groups, dtype=torch.float32))
        self.zero_point = frozen(torch.empty(rows, groups, dtype=torch.float32))

    def grid(self) -> AffineGrid:
        """The grid as plain tensors."""
        found: AffineGrid = self()
        return found

    def forward(self) -> AffineGrid:
        """The same, as a call: whatever hooks a module, to load it from a disk say, sees it."""
        return AffineGrid(self.scale.detach(), self.zero_point.detach(), self.bits, self.group_size)


class PackedExpert(nn.Module):
    """One expert as it is stored: the streams of its layout, each a parameter."""

    def __init__(self, layout: PackedLayout, dtype: torch.dtype) -> None:
        """Make empty streams; ``dtype`` is that of the kept values."""
        super().__init__()
        for name, (kind, count) in layout.streams().items():
            stream_dtype = torch.uint8 if kind == "uint8" else dtype
            self.register_parameter(name, frozen(torch.empty(count, dtype=stream_dtype)))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The streams by name, as ``packing.pack_expert`` made them."""
        found: dict[str, torch.Tensor] = self()
        return found

    def forward(self) -> dict[str, torch.Tensor]:
        """The same, as a call: whatever hooks a module, to load it from a disk say, sees it."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}


class ExpandedLinear(nn.Module):
    """K packed experts in place of one linear; every token goes through exactly one of them."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        compression: CompressionConfig,
        routing: RoutingConfig,
        shares: Sequence[float],
        first: ExpandedLinear | None,
        cache: ExpertCache,
        dtype: torch.dtype,
    ) -> None:
        """Make empty experts of the right shapes.

        Args:
            in_features: the width D of the input.
            out_features: the width O of the output.
            bias: whether the dense linear has a bias, which all experts share; those that the
                settings give experts of their own come on top.
            compression: the settings of pruning and quantization.
            routing: the settings of the router.
            shares: of zeros, of every expert; none where all have the configuration's.
            first: the group's first linear, which owns its router; ``None`` for that one itself.
            cache: holds unpacked experts.
            dtype: the dtype of kept values and of biases.
        """
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.layout = PackedLayout.of(out_features, in_features, compression)
        """What experts have in common: all but the number of weights where that is an expert's."""
        self.layouts: Sequence[PackedLayout] = PackedLayout.of_experts(
            out_features, in_features, compression, shares, routing.num_clusters
        )
        self.experts = nn.ModuleList(PackedExpert(layout, dtype) for layout in self.layouts)
        self.grid = (
            None if compression.bits is None else Grid(out_features, in_features, compression)
        )
        if first is None:
            self.router = GroupRouter(
                in_features,
                routing,
                has_columns=compression.permutes,
                has_sparsity=bool(shares),
            )
        self.group: ExpertGroup = ExpertGroup() if first is None else first.group
        self.group.add(self)
        # It is in a list so that a shared router is not registered, and saved, more than once.
        self._shared = [self.router if first is None else first.group_router]
        self.handle = handle_of(self)
        self.bias = frozen(torch.empty(out_features, dtype=dtype)) if bias else None
        self.cache = cache

    @property
    def device(self) -> torch.device:
        """The device that holds the experts."""
        # Not by ``parameters()``: this is asked for before every product.
        some = next(iter(self.experts[0]._parameters.values()))
        assert some is not None
        return some.device

    def state(self, expert: int) -> tuple[Any, ...]:
        """What changes when an expert's tensors are moved, loaded again, or written to."""
        # Not by a call: hooks that load what is held back need not run for what is cached.
        parts = list(self.experts[expert].parameters())
        if self.grid is not None:
            parts += self.grid.parameters()
        return tensor_state(parts)

    @property
    def group_router(self) -> GroupRouter:
        """The router that the linears of the group share."""
        return self._shared[0]

    def tensors(self, expert: int) -> dict[str, torch.Tensor]:
        """One expert's streams by name."""
        packed = self.experts[expert]
        assert isinstance(packed, PackedExpert)
        return packed.tensors()

    def unpack(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One expert's dense weight, ``[O, D]``, its columns in the order of the inputs' features.

        ``stored_weight`` has them as they are stored.
        """
        stored_OD = self.stored_weight(expert, dtype)
        columns_D = self.group_router.router().columns_D
        return stored_OD if columns_D is None else stored_OD[:, torch.argsort(columns_D)]

    def stored_weight(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One expert's dense weight, ``[O, D]``, for a routing's ``inputs_of_experts``."""
        grid = None if self.grid is None else self.grid.grid()
        streams = self.tensors(expert)
        if have_kernels(next(iter(streams.values())).device):
            stored = StoredExperts([StoredLinear([streams], [self.layouts[expert]], grid)])
            return stored.unpack(0, 1, dtype)[0]
        return unpack_expert(streams, layout=self.layouts[expert], grid=grid, dtype=dtype)

    def stored(self, expert: int) -> StoredMatrix:
        """One expert's streams, made ready for products with single tokens."""
        grid = None if self.grid is None else self.grid.grid()
        return StoredMatrix.of(self.tensors(expert), self.layouts[expert], grid)

    def _takes_stored_form(self) -> bool:
        grid = None if self.grid is None else self.grid.grid()
        stored = self.experts[0].get_parameter("codes" if grid is not None else "values")
        return takes_stored_form(self.layout, grid, stored.dtype, stored.device)

    def streams(self) -> StoredLinear:
        """All experts as they are stored."""
        grid = None if self.grid is None else self.grid.grid()
        return StoredLinear(
            [self.tensors(expert) for expert in range(len(self.experts))],
            self.layouts,
            grid,
            self._biases(),
        )

    def own_bias(self, expert: int) -> torch.Tensor:
        """One expert's bias as it is stored, ``[O]``."""
        return self.tensors(expert)["bias"]

    def bias_of(self, expert: int, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to an expert's products ``[O]``, None where that is nothing."""
        if not self.layout.has_bias:
            return self.bias
        own_O = self.cache.bias(self, expert, dtype)
        return own_O if self.bias is None else own_O + self.bias

    def _biases(self) -> torch.Tensor | None:
        """``bias_of`` every expert, ``[K, O]``: one and the same memory where they share it."""
        if self.layout.has_bias:
            own_KO = torch.stack([self.own_bias(k) for k in range(len(self.experts))])
            return own_KO if self.bias is None else own_KO + self.bias.detach()
        return None if self.bias is None else self.bias.detach().expand(len(self.experts), -1)

    def holders(self) -> list[nn.Module]:
        """The modules whose parameters ``streams`` are made of."""
        return [*self.experts, self] if self.grid is None else [*self.experts, self.grid, self]

    def streams_state(self) -> tuple[Any, ...]:
        """What changes when any expert's tensors are moved, loaded again, or written to."""
        parts = (part for module in self.holders() for part in module._parameters.values())
        return tensor_state(part for part in parts if part is not None)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """Map ``X [..., D]`` to ``[..., O]``: every token's product with its own expert."""
        check_dtype(X.dtype)
        has_gradient = torch.is_grad_enabled() and X.requires_grad
        if torch.compiler.is_compiling() and not has_gradient:
            X_TD = X.reshape(-1, self.in_features)
            experts_T = route_tokens(X_TD, self.group_router.handle)
            out_TO = multiply_experts(X_TD.to(_product_dtype(X)), experts_T, self.handle)
        else:
            routing = self.group_router(X)
            if not has_gradient and self.group.has_kernels(self, X):
                out_TO = self.group.multiply(self, X, routing, _product_dtype(X))
            else:
                out_TO = self._multiply_by_expert(X.reshape(-1, self.in_features), routing)
        return out_TO.reshape(*X.shape[:-1], self.out_features)

    def multiply(self, X_TD: torch.Tensor, experts_T: torch.Tensor) -> torch.Tensor:
        """Output ``[T, O]`` of tokens whose experts are known, in the tokens' dtype."""
        routing = self.group_router.routing_of(experts_T)
        with torch.no_grad(), without_autocast(X_TD.device.type):
            if self.group.has_kernels(self, X_TD):
                return self.group.multiply(self, X_TD, routing, X_TD.dtype)
            return self._multiply_by_expert(X_TD, routing)

    def _multiply_by_expert(self, X_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
        """One product per expert that has tokens, each a call: for CPUs, and for gradients.

        On a CPU a few tokens are multiplied with the stored streams: they are fewer bytes than the
        dense weight, and unpacking takes as long as some eight products with them.
        """
        X_TD = routing.inputs_of_experts(X_TD)
        # The stored streams' product has no gradient, and no other dtype than its input's.
        is_plain = not (torch.is_grad_enabled() and X_TD.requires_grad)
        is_plain = is_plain and not torch.is_autocast_enabled(X_TD.device.type)
        # Where all experts are to stay unpacked, several tokens are faster with what is there.
        most = 1 if self.cache.max_bytes is None else STORED_TOKENS
        if 0 < X_TD.shape[0] <= most and is_plain and self._takes_stored_form():
            experts = routing.experts_T.tolist()
            matrices = [self.cache.stored(self, expert) for expert in experts]
            pairs = zip(matrices, X_TD, strict=True)
            out_TO = torch.stack([matrix.matvec(x_D) for matrix, x_D in pairs])
            biases = [self.bias_of(expert, X_TD.dtype) for expert in experts]
            known = [bias for bias in biases if bias is not None]
            return out_TO + torch.stack(known) if known else out_TO
        parts = X_TD[routing.order_T].split(routing.counts)
        products = [
            nn.functional.linear(
                tokens,
                self.cache.dense(self, expert, X_TD.dtype),
                self.bias_of(expert, X_TD.dtype),
            )
            for expert, tokens in enumerate(parts)
            if tokens.shape[0]
        ]
        # Under autocast the products have another dtype than their factors.
        product_TO = torch.cat(products) if products else X_TD.new_empty(0, self.out_features)
        out_TO = torch.empty_like(product_TO)
        out_TO[routing.order_T] = product_TO
        return out_TO

    def _apply(self, fn: Any, recurse: bool = True) -> ExpandedLinear:
        # Tables of tensors that are left behind would be in the way where memory is short.
        self.group.forget()
        super()._apply(fn, recurse)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.handle = handle_of(self)

    def extra_repr(self) -> str:
        """The text that ``print(model)`` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"experts={len(self.experts)}, bias={self.bias is not None or self.layout.has_bias}"
        )


def guard_tensors(linears: Iterable[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Empty tensors under the names of the dense weights that a checkpoint does not have.

    A reader that does not know the format finds them of another shape than the weights that it
    looks for, and refuses the model. Without them transformers warns, and makes the weights up.
    One more has a name that says what to do: transformers lists the tensors that it cannot place.

    Args:
        linears: module paths of the expanded linears.
        dtype: of the model.
    """
    names = [GUARD_HINT, *(guard_name(name) for name in linears)]
    return {name: torch.empty(0, dtype=dtype) for name in names}


def guard_name(linear: str) -> str:
    """The name of an expanded linear's guard: that of the dense weight."""
    return f"{linear}.weight"


def _product_dtype(X: torch.Tensor) -> torch.dtype:
    """Of a product with ``X``: autocast's where that is on."""
    kind = X.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else X.dtype


def check_dtype(dtype: torch.dtype) -> None:
    """Answer a dtype that experts cannot be unpacked to.

    Raises:
        ValueError: it is none of float32, bfloat16 and float16.
    """
    if dtype not in MODEL_DTYPES:
        raise ValueError(
            f"expanded models compute in float32, bfloat16 or float16, and not in {dtype}: load or "
            "cast them to one of these"
        )


def expand_block(
    block: nn.Module,
    groups: tuple[tuple[str, ...], ...],
    compression: CompressionConfig,
    routing: RoutingConfig,
    *,
    cache: ExpertCache,
    dtype: torch.dtype,
    shares: Mapping[str, Sequence[float]],
) -> None:
    """Replace the MLP linears of a block by empty expanded ones, in place.

    Args:
        block: a dense block.
        groups: the names of the linears in each linear group.
        compression: the block's settings of pruning and quantization.
        routing: the block's settings of the routers.
        cache: holds unpacked experts.
        dtype: the dtype of kept values and biases.
        shares: of zeros, by a group's first linear and expert; none where all have the settings'.
    """
    for linears in groups:
        first: ExpandedLinear | None = None
        for name in linears:
            rows, width = linear_shape(block, name)
            old = block.get_submodule(name)
            new = ExpandedLinear(
                width,
                rows,
                bias=getattr(old, "bias", None) is not None,
                compression=compression,
                routing=routing,
                shares=shares.get(linears[0], ()),
                first=first,
                cache=cache,
                dtype=dtype,
            )
            first = first or new
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent) if parent else block, leaf, new)
