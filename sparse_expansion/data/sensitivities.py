"""How much a block's output depends on what single linears of it put out.

Shapes: K clusters, T tokens, D input features, O output features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sparse_expansion.algorithms.clustering import cluster_sums
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
        labels_T: torch.Tensor,
        num_clusters: int,
    ) -> None:
        """Hook the linears. The block is stopped behind them, by ``AllInputsSeenError``.

        Args:
            block: that will run; none of its parameters may require gradients.
            linears: names of the linears whose outputs are looked at, which share their inputs.
            behind: by name of a linear behind them the norms of its weight's columns ``[D]``, of
                all linears together that share its input.
            labels_T: clusters of all tokens that will run.
            num_clusters: K.
        """
        self.squares_KO: dict[str, torch.Tensor] = {}
        """By name of a linear the sums over every cluster's tokens, float64."""
        self._labels_T = labels_T
        self._num_clusters = num_clusters
        self._behind = behind
        self._outputs: dict[str, torch.Tensor] = {}
        self._ends: dict[str, torch.Tensor] = {}
        self._handles = [
            block.get_submodule(name).register_forward_hook(self._output_hook(name))
            for name in linears
        ]
        self._handles += [
            block.get_submodule(name).register_forward_pre_hook(self._input_hook(name))
            for name in behind
        ]
        self._grad = torch.enable_grad()

    def _output_hook(self, name: str) -> Any:
        """A hook that gives in place of an output a copy of it, in which gradients end."""

        def hook(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
            self._outputs[name] = out.detach().requires_grad_()
            return self._outputs[name]

        return hook

    def _input_hook(self, name: str) -> Any:
        """A hook that keeps what is behind the outputs, times the norms."""

        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self._ends[name] = (args[0].float() * self._behind[name]).sum()
            if len(self._ends) == len(self._behind):
                raise AllInputsSeenError

        return hook

    def add_up(self, rows: slice) -> None:
        """Add the tokens of one run of the block to their clusters.

        Args:
            rows: of the labels that are those of the run's tokens.
        """
        gradients = torch.autograd.grad(list(self._ends.values()), list(self._outputs.values()))
        labels_T = self._labels_T[rows].to(gradients[0].device, torch.int64)
        for name, gradient in zip(self._outputs, gradients, strict=True):
            squares_TO = gradient.flatten(0, -2).float().square()
            total_KO = cluster_sums(squares_TO, labels_T, self._num_clusters).double()
            before_KO = self.squares_KO.get(name)
            self.squares_KO[name] = total_KO if before_KO is None else before_KO + total_KO
        self._outputs, self._ends = {}, {}

    def __enter__(self) -> OutputSensitivities:
        self._grad.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._grad.__exit__(*exc)
        for handle in self._handles:
            handle.remove()
