"""How much a block's output depends on what single linears of it put out.

Shapes: K clusters, T tokens, D input features, O output features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sparse_expansion.data.activations import AllInputsSeenError


class OutputSensitivities:
    """A context in which a block's dependence on linears' outputs is added up by cluster.

    With ``z`` such an output of a token, ``a`` the inputs of the linears behind it and ``w_i`` the
    columns of their weights, ``sum_i |w_i|^2 (da_i / dz)^2`` is the energy by which the block's
    output changes for a small change of ``z``: exactly, where every ``a_i`` depends on one output
    of each of these linears alone, as in all MLPs, gated or not. Summed over tokens it is what an
    output's errors count for. Gradients go through activations only, and through no product.
    """

    def __init__(
        self,
        block: nn.Module,
        linears: Sequence[str],
        behind: Mapping[str, torch.Tensor],
        num_clusters: int,
    ) -> None:
        """Hook the linears. The block is stopped behind them, by ``AllInputsSeenError``.

        Args:
            block: that will run; none of its parameters may require gradients.
            linears: names of the linears whose outputs are looked at, which share their inputs.
            behind: by name of a linear behind them the norms of its weight's columns ``[D]``, of
                all linears together that share its input.
            num_clusters: K.
        """
        self._sums: list[torch.Tensor | None] = [None] * len(linears)
        self._num_clusters = num_clusters
        self._outputs: list[torch.Tensor | None] = [None] * len(linears)
        self._behind = behind
        self._ends: dict[str, torch.Tensor] = {}
        self._handles = [
            block.get_submodule(name).register_forward_hook(self._output_hook(place))
            for place, name in enumerate(linears)
        ]
        self._handles += [
            block.get_submodule(name).register_forward_pre_hook(self._input_hook(name))
            for name in behind
        ]
        self._grad = torch.enable_grad()

    def _output_hook(self, place: int) -> Any:
        """A hook that gives in place of an output a copy of it, in which gradients end."""

        def hook(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
            found = out.detach().requires_grad_()
            self._outputs[place] = found
            return found

        return hook

    def _input_hook(self, name: str) -> Any:
        """A hook that keeps what is behind the outputs, times the norms."""

        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self._ends[name] = (args[0].float() * self._behind[name]).sum()
            if len(self._ends) == len(self._behind):
                raise AllInputsSeenError

        return hook

    def add_up(self, labels_T: torch.Tensor) -> None:
        """Add the tokens of one run of the block to their clusters.

        Args:
            labels_T: clusters of the run's tokens.
        """
        outputs = [out for out in self._outputs if out is not None]
        gradients = torch.autograd.grad(list(self._ends.values()), outputs)
        self._outputs, self._ends = [None] * len(outputs), {}
        # A product, for additions by index are made in any order on a GPU.
        labels_T = labels_T.to(gradients[0].device, torch.int64)
        is_in_KT = nn.functional.one_hot(labels_T, self._num_clusters).T.float()
        for place, gradient in enumerate(gradients):
            total_KO = is_in_KT @ gradient.flatten(0, -2).float().square()
            before_KO = self._sums[place]
            self._sums[place] = total_KO.double() if before_KO is None else before_KO + total_KO

    def squares(self) -> list[torch.Tensor]:
        """Of every linear the sums over every cluster's tokens ``[K, O]``, float64."""
        return [sums_KO for sums_KO in self._sums if sums_KO is not None]

    def __enter__(self) -> OutputSensitivities:
        self._grad.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._grad.__exit__(*exc)
        for handle in self._handles:
            handle.remove()
