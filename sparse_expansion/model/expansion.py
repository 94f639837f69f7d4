"""The modules of an expanded model: routed linears whose experts are pruned and packed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sparse_expansion.algorithms.clustering import route
from sparse_expansion.algorithms.matvec import StoredMatrix, takes_stored_form
from sparse_expansion.algorithms.packing.experts import unpack_expert
from sparse_expansion.algorithms.packing.layout import PackedLayout
from sparse_expansion.algorithms.quantization import AffineGrid
from sparse_expansion.config import CompressionConfig, RoutingConfig
from sparse_expansion.model.expert_cache import ExpertCache
from sparse_expansion.model.families import linear_shape
from sparse_expansion.types import MODEL_DTYPES, Router

FLOAT32_MODULES = ("router", "grid")
"""Submodules of an ``ExpandedLinear`` that stay float32 whatever the model's dtype."""


class Routing:
    """The order that sorts the tokens of one input by expert, and every expert's count.

    ``order_T`` holds token indices, ``[T]`` int64; ``counts`` has one entry per expert.
    """

    def __init__(self, experts_T: torch.Tensor, num_clusters: int) -> None:
        """Sort ``experts_T``, the index of every token's expert; ties keep their order."""
        if experts_T.shape[0] == 1:
            # One token is sorted already; decoding is bound by the number of calls.
            self.order_T = torch.zeros_like(experts_T)
            self.counts = [0] * num_clusters
            self.counts[int(experts_T)] = 1
            return
        self.order_T = torch.argsort(experts_T, stable=True)
        self.counts = torch.bincount(experts_T, minlength=num_clusters).tolist()


class Float32Module(nn.Module):
    """Parameters that may be moved, and stay float32 where the model is cast.

    A rounded centroid would send tokens to other experts than those that were made for them.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> Float32Module:
        kept = {name: one.detach() for name, one in self.named_parameters(recurse=False)}
        super()._apply(fn, recurse)
        for name, one in self.named_parameters(recurse=False):
            if one.dtype != kept[name].dtype and not one.is_meta:
                self.register_parameter(name, _frozen(kept[name].to(one.device)))
        return self


class GroupRouter(Float32Module):
    """The router of a linear group."""

    def __init__(self, width: int, config: RoutingConfig) -> None:
        """Make empty parameters for inputs of ``width`` features."""
        super().__init__()
        components = config.num_components(width)
        self.mean = _frozen(torch.empty(width, dtype=torch.float32))
        self.register_parameter(
            "components",
            None
            if config.pca_reduction_factor is None
            else _frozen(torch.empty(components, width, dtype=torch.float32)),
        )
        self.centroids = _frozen(torch.empty(config.num_clusters, components, dtype=torch.float32))
        # The last input, its version, and its routing.
        self._last_routing: tuple[weakref.ref[torch.Tensor], int, Routing] | None = None
        # The state that the plain tensors were made from, and these.
        self._plain: tuple[tuple[Any, ...], Router] | None = None

    def router(self) -> Router:
        """The router as plain tensors, made again when the model was moved or loaded again."""
        components = self._parameters["components"]
        parts = [part for part in (self.mean, components, self.centroids) if part is not None]
        state = tensor_state(parts)
        if self._plain is None or self._plain[0] != state:
            self._plain = state, Router(self.mean, components, self.centroids)
        return self._plain[1]

    def forward(self, X: torch.Tensor) -> Routing:
        """Route ``X [..., D]``; linears of the group that get the same tensor share one routing."""
        # An inference tensor has no version counter, so that a change in place would go unseen.
        version = None if X.is_inference() else X._version
        if self._last_routing is not None and version is not None:
            seen, seen_version, routing = self._last_routing
            if seen() is X and seen_version == version:
                return routing
        X_TD = X.reshape(-1, X.shape[-1])
        # A choice has no gradient, and in less than float32 it would be another one.
        with torch.no_grad(), torch.autocast(X.device.type, enabled=False):
            routing = Routing(route(X_TD, self.router()), self.centroids.shape[0])
        self._last_routing = None if version is None else (weakref.ref(X), version, routing)
        return routing

    def __getstate__(self) -> dict[str, Any]:
        # What was seen last can be made again, and a weak reference cannot be pickled.
        return {**self.__dict__, "_last_routing": None, "_plain": None}


class Grid(Float32Module):
    """The affine quantization grid that all experts of one linear share."""

    def __init__(self, rows: int, width: int, config: CompressionConfig) -> None:
        """Make an empty scale and zero point for every group of every row."""
        super().__init__()
        assert config.bits is not None
        self.bits = config.bits
        self.group_size = width if config.group_size is None else min(config.group_size, width)
        groups = -(-width // self.group_size)
        self.scale = _frozen(torch.empty(rows, groups, dtype=torch.float32))
        self.zero_point = _frozen(torch.empty(rows, groups, dtype=torch.float32))

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
            self.register_parameter(name, _frozen(torch.empty(count, dtype=stream_dtype)))

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
        router: GroupRouter | None,
        cache: ExpertCache,
        dtype: torch.dtype,
    ) -> None:
        """Make empty experts of the right shapes.

        Args:
            in_features: the width D of the input.
            out_features: the width O of the output.
            bias: whether the dense linear has a bias, which all experts share.
            compression: the settings of pruning and quantization.
            routing: the settings of the router.
            router: the group's router; ``None`` for its first linear, which makes and owns it.
            cache: holds unpacked experts.
            dtype: the dtype of kept values and of the bias.
        """
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.layout = PackedLayout.of(out_features, in_features, compression)
        self.experts = nn.ModuleList(
            PackedExpert(self.layout, dtype) for _ in range(routing.num_clusters)
        )
        self.grid = (
            None if compression.bits is None else Grid(out_features, in_features, compression)
        )
        if router is None:
            self.router = GroupRouter(in_features, routing)
            router = self.router
        # It is in a list so that a shared router is not registered, and saved, more than once.
        self._shared = [router]
        self.bias = _frozen(torch.empty(out_features, dtype=dtype)) if bias else None
        self.cache = cache

    @property
    def device(self) -> torch.device:
        """The device that holds the experts."""
        return next(self.experts[0].parameters()).device

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
        """One expert's dense weight, ``[O, D]``."""
        return unpack_expert(
            self.tensors(expert),
            layout=self.layout,
            grid=None if self.grid is None else self.grid.grid(),
            dtype=dtype,
        )

    def stored(self, expert: int) -> StoredMatrix:
        """One expert's streams, made ready for products with single tokens."""
        grid = None if self.grid is None else self.grid.grid()
        return StoredMatrix.of(self.tensors(expert), self.layout, grid)

    def _takes_stored_form(self) -> bool:
        grid = None if self.grid is None else self.grid.grid()
        stored = self.experts[0].get_parameter("codes" if grid is not None else "values")
        return takes_stored_form(self.layout, grid, stored.dtype, stored.device)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """Map ``X [..., D]`` to ``[..., O]`` with one product per expert that has tokens.

        On a CPU a single token is multiplied by the stored streams: they are fewer bytes than the
        dense weight, and nothing has to be unpacked.
        """
        check_dtype(X.dtype)
        routing = self.group_router(X)
        X_TD = X.reshape(-1, X.shape[-1])
        # The stored streams' product has no gradient, and no other dtype than its input's.
        is_plain = not (torch.is_grad_enabled() and X.requires_grad)
        is_plain = is_plain and not torch.is_autocast_enabled(X.device.type)
        if X_TD.shape[0] == 1 and is_plain and self._takes_stored_form():
            matrix = self.cache.stored(self, routing.counts.index(1))
            out = matrix.matvec(X_TD[0])
            out = out if self.bias is None else out + self.bias
            return out.reshape(*X.shape[:-1], self.out_features)
        parts = X_TD[routing.order_T].split(routing.counts)
        products = [
            nn.functional.linear(tokens, self.cache.dense(self, expert, X.dtype), self.bias)
            for expert, tokens in enumerate(parts)
            if tokens.shape[0]
        ]
        # Under autocast the products have another dtype than their factors.
        product_TO = torch.cat(products) if products else X_TD.new_empty(0, self.out_features)
        out = torch.empty_like(product_TO)
        out[routing.order_T] = product_TO
        return out.reshape(*X.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """The text that ``print(model)`` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"experts={len(self.experts)}, bias={self.bias is not None}"
        )


def guard_tensors(linears: Iterable[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Empty tensors under the names of the dense weights that a checkpoint does not have.

    A reader that does not know the format finds them of another shape than the weights that it
    looks for, and refuses the model. Without them transformers warns, and makes the weights up.

    Args:
        linears: module paths of the expanded linears.
        dtype: of the model.
    """
    return {guard_name(name): torch.empty(0, dtype=dtype) for name in linears}


def guard_name(linear: str) -> str:
    """The name of an expanded linear's guard: that of the dense weight."""
    return f"{linear}.weight"


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


def tensor_state(tensors: Iterable[torch.Tensor]) -> tuple[Any, ...]:
    """What changes when tensors are moved, loaded again, or written to."""
    return tuple(
        (one.data_ptr(), one.device, None if one.is_inference() else one._version)
        for one in tensors
    )


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def expand_block(
    block: nn.Module,
    groups: tuple[tuple[str, ...], ...],
    compression: CompressionConfig,
    routing: RoutingConfig,
    *,
    cache: ExpertCache,
    dtype: torch.dtype,
) -> None:
    """Replace the MLP linears of a block by empty expanded ones, in place.

    Args:
        block: a dense block.
        groups: the names of the linears in each linear group.
        compression: the block's settings of pruning and quantization.
        routing: the block's settings of the routers.
        cache: holds unpacked experts.
        dtype: the dtype of kept values and biases.
    """
    for linears in groups:
        router: GroupRouter | None = None
        for name in linears:
            rows, width = linear_shape(block, name)
            old = block.get_submodule(name)
            new = ExpandedLinear(
                width,
                rows,
                bias=getattr(old, "bias", None) is not None,
                compression=compression,
                routing=routing,
                router=router,
                cache=cache,
                dtype=dtype,
            )
            router = new.group_router
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent) if parent else block, leaf, new)
