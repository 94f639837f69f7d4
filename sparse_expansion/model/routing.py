"""The router of a linear group: which expert every token goes to."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable
from functools import cached_property
from operator import is_
from typing import Any

import torch
from torch import nn

from sparse_expansion.algorithms.clustering import route
from sparse_expansion.config import RoutingConfig
from sparse_expansion.model.operators import handle_of
from sparse_expansion.types import Router, in_columns


class Routing:
    """Every token's expert, and the order that sorts the tokens of one input by expert.

    All but ``counts`` is worked out where the tokens are, without a stop at the host.
    """

    def __init__(
        self, experts_T: torch.Tensor, num_clusters: int, columns_D: torch.Tensor | None = None
    ) -> None:
        """Take what is known.

        Args:
            experts_T: the index of every token's expert (int64).
            num_clusters: of the router.
            columns_D: the order in which experts take features, see ``types.Router``.
        """
        self.experts_T = experts_T
        self.num_clusters = num_clusters
        self.columns_D = columns_D

    def inputs_of_experts(self, X_TD: torch.Tensor) -> torch.Tensor:
        """Tokens with their features in the order of the experts' columns."""
        return in_columns(X_TD, self.columns_D)

    @cached_property
    def order_T(self) -> torch.Tensor:
        """Indices of tokens (int64), by expert; those of one expert keep their order."""
        # One token is sorted already; decoding is bound by the number of calls.
        if self.experts_T.shape[0] == 1:
            return torch.zeros_like(self.experts_T)
        return torch.argsort(self.experts_T, stable=True)

    @cached_property
    def ends_K(self) -> torch.Tensor:
        """Where each expert's tokens end in that order (int64)."""
        each_K = torch.arange(self.num_clusters, device=self.experts_T.device)
        return torch.searchsorted(self.experts_T[self.order_T], each_K, right=True)

    @cached_property
    def sizes_K(self) -> torch.Tensor:
        """Tokens of every expert (int64)."""
        return self.ends_K.diff(prepend=self.ends_K.new_zeros(1))

    @cached_property
    def counts(self) -> list[int]:
        """Tokens of every expert, which the host waits for."""
        return torch.bincount(self.experts_T, minlength=self.num_clusters).tolist()


class Float32Module(nn.Module):
    """Parameters that may be moved, and stay float32 where the model is cast.

    A rounded centroid would send tokens to other experts than those that were made for them.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> Float32Module:
        kept = {name: one.detach() for name, one in self.named_parameters(recurse=False)}
        super()._apply(fn, recurse)
        for name, one in self.named_parameters(recurse=False):
            if one.dtype != kept[name].dtype and not one.is_meta:
                self.register_parameter(name, frozen(kept[name].to(one.device)))
        return self


class GroupRouter(Float32Module):
    """The router of a linear group."""

    def __init__(
        self,
        width: int,
        config: RoutingConfig,
        *,
        has_columns: bool = False,
        has_sparsity: bool = False,
    ) -> None:
        """Make empty parameters.

        Args:
            width: features of the inputs.
            config: settings of the router.
            has_columns: whether experts take features in an order of their own.
            has_sparsity: whether experts have shares of zeros of their own.
        """
        super().__init__()
        components = config.num_components(width)
        self.mean = frozen(torch.empty(width, dtype=torch.float32))
        self.register_parameter(
            "components",
            None
            if config.pca_reduction_factor is None
            else frozen(torch.empty(components, width, dtype=torch.float32)),
        )
        self.centroids = frozen(torch.empty(config.num_clusters, components, dtype=torch.float32))
        self.register_parameter(
            "columns", frozen(torch.arange(width, dtype=torch.int32)) if has_columns else None
        )
        self.register_parameter(
            "sparsity", frozen(torch.empty(config.num_clusters)) if has_sparsity else None
        )
        self.handle = handle_of(self)
        # The last input, its version, and its routing.
        self._last_routing: tuple[weakref.ref[torch.Tensor], int, Routing] | None = None
        # The plain tensors, and the parameters that they were made from.
        self._plain: tuple[Seen, Router] | None = None

    def router(self) -> Router:
        """The router as plain tensors, made again when the model was moved or loaded again."""
        if self._plain is None or not self._plain[0].is_as_it_was():
            components, columns = (self._parameters[name] for name in ("components", "columns"))
            router = Router(self.mean, components, self.centroids, columns)
            self._plain = Seen([self]), router
        return self._plain[1]

    def forward(self, X: torch.Tensor) -> Routing:
        """Route ``X [..., D]``; linears of the group that get the same tensor share one routing."""
        # An inference tensor has no version counter, so that a change in place would go unseen.
        version = None if X.is_inference() else X._version
        if self._last_routing is not None and version is not None:
            seen, seen_version, routing = self._last_routing
            if seen() is X and seen_version == version:
                return routing
        routing = self.routing_of(self.experts(X.reshape(-1, X.shape[-1])))
        self._last_routing = None if version is None else (weakref.ref(X), version, routing)
        return routing

    def routing_of(self, experts_T: torch.Tensor) -> Routing:
        """The routing of tokens whose experts are known."""
        return Routing(experts_T, self.centroids.shape[0], self._parameters["columns"])

    def experts(self, X_TD: torch.Tensor) -> torch.Tensor:
        """Index of every token's expert (int64)."""
        # A choice has no gradient, and in less than float32 it would be another one.
        with torch.no_grad(), without_autocast(X_TD.device.type):
            return route(X_TD, self.router())

    def __getstate__(self) -> dict[str, Any]:
        # What was seen last can be made again, and a weak reference cannot be pickled.
        return {**self.__dict__, "_last_routing": None, "_plain": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.handle = handle_of(self)


def tensor_state(tensors: Iterable[torch.Tensor]) -> tuple[Any, ...]:
    """What changes when tensors are moved, loaded again, or written to."""
    return tuple(
        (one.data_ptr(), one.device, None if one.is_inference() else one._version)
        for one in tensors
    )


def without_autocast(kind: str) -> contextlib.AbstractContextManager[Any]:
    """A context in which that kind of device computes in the dtypes of the operands."""
    # Entering PyTorch's takes as long as a small product.
    if not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


class Seen:
    """Parameters as they were seen: a quick look says whether all are as they were.

    It is taken before every product, where ``tensor_state`` of all experts would take longer than
    the product.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        """Remember the modules' own parameters."""
        self._places = [
            (module._parameters, name)
            for module in modules
            for name, part in module._parameters.items()
            if part is not None
        ]
        self._parts = self._found()
        self._addresses = list(map(torch.Tensor.data_ptr, self._parts))
        # Inference tensors have no version.
        self._versioned = [part for part in self._parts if not part.is_inference()]
        self._versions = [part._version for part in self._versioned]

    def _found(self) -> list[Any]:
        return [parameters.get(name) for parameters, name in self._places]

    def is_as_it_was(self) -> bool:
        """Whether none of them was moved, loaded again, or written to."""
        return (
            all(map(is_, self._found(), self._parts))
            and [part._version for part in self._versioned] == self._versions
            and list(map(torch.Tensor.data_ptr, self._parts)) == self._addresses
        )


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    """A parameter that is not trained."""
    return nn.Parameter(tensor, requires_grad=False)
