"""The expanded model: routed linears, and the transformers plug-in that loads them.

Registered as quantization method ``sparse_expansion``: a folder whose ``config.json`` has
``quantization_config.quant_method = "sparse_expansion"`` is loaded by
``AutoModelForCausalLM.from_pretrained`` once ``sparse_expansion`` is imported.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparse_expansion.algorithms.clustering import route
from sparse_expansion.algorithms.matvec import StoredMatrix, takes_stored_form
from sparse_expansion.algorithms.packing import PackedLayout, unpack_expert
from sparse_expansion.algorithms.quantization import AffineGrid
from sparse_expansion.algorithms.semi_structured import for_matmul
from sparse_expansion.config import CompressionConfig, RoutingConfig
from sparse_expansion.model.families import block_list, family_of, linear_shape
from sparse_expansion.types import Router

QUANT_METHOD = "sparse_expansion"
FORMAT_VERSION = 2
DEFAULT_CACHE_BYTES = 1 << 30
FLOAT32_PARTS = ("router", "grid")


class ExpertCache:
    """Forms of recently used experts, the least recent dropped beyond ``max_bytes``.

    A form is the unpacked weight, which serves any number of tokens (on a GPU semi-structured where
    that is faster), or what a product of the stored streams with one token needs beside them.
    """

    def __init__(self, max_bytes: int | None = DEFAULT_CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._forms: OrderedDict[tuple[int, int, type], tuple[Any, int]] = OrderedDict()

    def dense(self, linear: ExpandedLinear, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """Unpacked weight of one expert, made on a miss."""
        key = (id(linear), expert, torch.Tensor)
        weight: torch.Tensor | None = self._find(key)
        if weight is not None and weight.dtype == dtype and weight.device == linear.device:
            return weight
        weight = for_matmul(linear.unpack(expert, dtype), linear.layout)
        self._keep(key, weight, weight.numel() * weight.element_size())
        return weight

    def stored(self, linear: ExpandedLinear, expert: int) -> StoredMatrix:
        """The expert's streams, ready to be multiplied by one token."""
        key = (id(linear), expert, StoredMatrix)
        matrix: StoredMatrix | None = self._find(key)
        # The model may have been moved or loaded anew since.
        if matrix is None or not matrix.is_of(linear.tensors(expert)):
            matrix = linear.stored(expert)
            self._keep(key, matrix, matrix.num_bytes)
        return matrix

    def _find(self, key: tuple[int, int, type]) -> Any:
        if key not in self._forms:
            return None
        self._forms.move_to_end(key)
        return self._forms[key][0]

    def _keep(self, key: tuple[int, int, type], form: Any, size: int) -> None:
        self._drop(key)
        if self.max_bytes is not None:
            while self._forms and self.num_bytes + size > self.max_bytes:
                self._drop(next(iter(self._forms)))
        self._forms[key] = (form, size)
        self.num_bytes += size

    def _drop(self, key: tuple[int, int, type]) -> None:
        _, size = self._forms.pop(key, (None, 0))
        self.num_bytes -= size

    def clear(self) -> None:
        """Forget everything."""
        self._forms.clear()
        self.num_bytes = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertCache:
        # Entries are keyed by module identity, so a copied module starts with none.
        return ExpertCache(self.max_bytes)


class Routing:
    """Tokens of one input, sorted by expert: ``order`` and the count of each expert."""

    def __init__(self, experts_T: torch.Tensor, num_clusters: int) -> None:
        if experts_T.shape[0] == 1:
            # Nothing to sort: decoding spends its time on calls, not on numbers.
            self.order_T = torch.zeros_like(experts_T)
            self.counts = [0] * num_clusters
            self.counts[int(experts_T)] = 1
            return
        self.order_T = torch.argsort(experts_T, stable=True)
        self.counts = torch.bincount(experts_T, minlength=num_clusters).tolist()


class GroupRouter(nn.Module):
    """A linear group's router; float32 whatever the model's dtype."""

    def __init__(self, width: int, config: RoutingConfig) -> None:
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
        self._last: tuple[weakref.ref[torch.Tensor], int, Routing] | None = None
        self._made: tuple[tuple[Any, ...], Router] | None = None

    def router(self) -> Router:
        """The router as plain tensors; made anew when the model was moved or loaded again."""
        components = self._parameters["components"]
        parts = [part for part in (self.mean, components, self.centroids) if part is not None]
        state = tuple(
            (part.data_ptr(), part.device, None if part.is_inference() else part._version)
            for part in parts
        )
        if self._made is None or self._made[0] != state:
            self._made = state, Router(self.mean, components, self.centroids)
        return self._made[1]

    def forward(self, X: torch.Tensor) -> Routing:
        """Route ``X [..., D]``; linears of the group that get the same tensor route once."""
        # An inference tensor has no version counter, so a change in place could go unseen.
        version = None if X.is_inference() else X._version
        if self._last is not None and version is not None:
            seen, seen_version, routing = self._last
            if seen() is X and seen_version == version:
                return routing
        X_TD = X.reshape(-1, X.shape[-1])
        routing = Routing(route(X_TD, self.router()), self.centroids.shape[0])
        self._last = None if version is None else (weakref.ref(X), version, routing)
        return routing

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupRouter:
        clone = GroupRouter.__new__(GroupRouter)
        nn.Module.__init__(clone)
        memo[id(self)] = clone
        for name, parameter in self._parameters.items():
            copy = None if parameter is None else _frozen(parameter.detach().clone())
            clone.register_parameter(name, copy)
        clone._last = None
        clone._made = None
        return clone


class Grid(nn.Module):
    """The affine grid that all experts of one linear share (float32)."""

    def __init__(self, rows: int, width: int, config: CompressionConfig) -> None:
        super().__init__()
        assert config.bits is not None
        self.bits = config.bits
        self.group_size = width if config.group_size is None else min(config.group_size, width)
        groups = -(-width // self.group_size)
        self.scale = _frozen(torch.empty(rows, groups, dtype=torch.float32))
        self.zero_point = _frozen(torch.empty(rows, groups, dtype=torch.float32))

    def grid(self) -> AffineGrid:
        """The grid as plain tensors."""
        return AffineGrid(self.scale.detach(), self.zero_point.detach(), self.bits, self.group_size)


class PackedExpert(nn.Module):
    """One expert as it is stored: the streams of its layout."""

    def __init__(self, layout: PackedLayout, dtype: torch.dtype) -> None:
        super().__init__()
        for name, (kind, count) in layout.streams().items():
            kept_as = torch.uint8 if kind == "uint8" else dtype
            self.register_parameter(name, _frozen(torch.empty(count, dtype=kept_as)))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Named tensors, as ``packing.pack_expert`` made them."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}


class ExpandedLinear(nn.Module):
    """K packed experts in place of one linear; every token goes through exactly one."""

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
        """Empty experts of the right shapes; a group's first linear (``router=None``) owns it."""
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
        # In a list, so that a shared router is not registered (and saved) twice.
        self._shared = [router]
        self.bias = _frozen(torch.empty(out_features, dtype=dtype)) if bias else None
        self.cache = cache

    @property
    def device(self) -> torch.device:
        """Where the experts are."""
        return next(self.experts[0].parameters()).device

    @property
    def group_router(self) -> GroupRouter:
        """The router that this linear shares with its group."""
        return self._shared[0]

    def tensors(self, expert: int) -> dict[str, torch.Tensor]:
        """One expert's streams by name."""
        packed = self.experts[expert]
        assert isinstance(packed, PackedExpert)
        return packed.tensors()

    def unpack(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """Dense weight ``[O, D]`` of one expert."""
        return unpack_expert(
            self.tensors(expert),
            layout=self.layout,
            grid=None if self.grid is None else self.grid.grid(),
            dtype=dtype,
            device=self.device,
        )

    def stored(self, expert: int) -> StoredMatrix:
        """One expert's streams for products with single tokens."""
        grid = None if self.grid is None else self.grid.grid()
        return StoredMatrix.of(self.tensors(expert), self.layout, grid)

    def _takes_stored_form(self) -> bool:
        grid = None if self.grid is None else self.grid.grid()
        stored = self.experts[0].get_parameter("codes" if grid is not None else "values")
        return takes_stored_form(self.layout, grid, stored.dtype, stored.device)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """``X [..., D]`` -> ``[..., O]``: one matmul per expert that has tokens.

        On a CPU a single token is multiplied with the stored streams: fewer bytes than the dense
        weight, and nothing to unpack.
        """
        routing = self.group_router(X)
        X_TD = X.reshape(-1, X.shape[-1])
        if X_TD.shape[0] == 1 and self._takes_stored_form():
            matrix = self.cache.stored(self, routing.counts.index(1))
            out = matrix.matvec(X_TD[0])
            out = out if self.bias is None else out + self.bias
            return out.reshape(*X.shape[:-1], self.out_features)
        parts = X_TD[routing.order_T].split(routing.counts)
        out = X_TD.new_empty(X_TD.shape[0], self.out_features)
        made = [
            nn.functional.linear(tokens, self.cache.dense(self, expert, X.dtype), self.bias)
            for expert, tokens in enumerate(parts)
            if tokens.shape[0]
        ]
        if made:
            out[routing.order_T] = torch.cat(made)
        return out.reshape(*X.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"experts={len(self.experts)}, bias={self.bias is not None}"
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
    """Replace a block's MLP linears by empty expanded ones, in place."""
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


def expand_model(
    model: nn.Module, config: SparseExpansionConfig, dtype: torch.dtype
) -> ExpertCache:
    """Replace the MLP linears of every block; returns the cache that the model's experts share."""
    family = family_of(model.config.model_type)  # type: ignore[union-attr, arg-type]
    cache = ExpertCache(None if config.expert_residency == "dense" else config.cache_bytes)
    compression, routing = config.compression_config(), config.routing_config()
    for layer, block in enumerate(block_list(model, family)):
        expand_block(
            block,
            tuple(tuple(group) for group in config.groups),
            compression.at(layer),
            routing.at(layer),
            cache=cache,
            dtype=dtype,
        )
    return cache


@register_quantization_config(QUANT_METHOD)
class SparseExpansionConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of an expanded model.

    Args:
        groups: for each linear group of a block, its linears' names.
        compression: ``CompressionConfig`` as a dictionary.
        routing: ``RoutingConfig`` as a dictionary.
        format_version: of the tensors, see ``docs/format.md``.
        expert_residency: ``compressed`` keeps experts packed and unpacks those in use into a
            bounded cache; ``dense`` keeps every expert it has unpacked.
        cache_bytes: bound of that cache.
    """

    def __init__(
        self,
        groups: list[list[str]] | None = None,
        compression: dict[str, Any] | None = None,
        routing: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        expert_residency: str = "compressed",
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        **kwargs: Any,
    ) -> None:
        """Check what a file may get wrong."""
        self.quant_method = QUANT_METHOD
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"checkpoint format_version {format_version} is not {FORMAT_VERSION}: load it "
                "with the release of sparse-expansion that wrote it"
            )
        if expert_residency not in ("compressed", "dense"):
            raise ValueError(
                f"expert_residency {expert_residency!r} is neither 'compressed' nor 'dense'"
            )
        self.groups = groups or []
        self.compression = compression or {}
        self.routing = routing or {}
        self.format_version = format_version
        self.expert_residency = expert_residency
        self.cache_bytes = cache_bytes

    def compression_config(self) -> CompressionConfig:
        """The checked settings of pruning and quantization."""
        return CompressionConfig.from_dict(self.compression)

    def routing_config(self) -> RoutingConfig:
        """The checked settings of the routers."""
        return RoutingConfig.from_dict(self.routing)


@register_quantizer(QUANT_METHOD)
class SparseExpansionQuantizer(HfQuantizer):
    """Swaps the expanded linears in before transformers loads the tensors."""

    requires_calibration = True
    quantization_config: SparseExpansionConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        dtype = kwargs.get("dtype") or model.config.dtype or torch.float32
        # Routers and grids stay float32: a rounded centroid would route other tokens than the
        # ones its expert was made for.
        strict = getattr(model, "_keep_in_fp32_modules_strict", None) or set()
        model._keep_in_fp32_modules_strict = {*strict, *FLOAT32_PARTS}
        model.expert_cache = expand_model(model, self.quantization_config, dtype)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """The state is the packed tensors themselves, so it can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed experts take no gradients."""
        return False
