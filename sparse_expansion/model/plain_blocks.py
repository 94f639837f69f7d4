"""Blocks whose linears are PyTorch's own, in place of what transformers has made of them.

Shapes: T tokens, E experts of a mixture, D and F input and inner width of an expert, R experts that
take each token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparse_expansion.model.block_linears import block_list
from sparse_expansion.model.families import Family, Mixture

Activation = Callable[[torch.Tensor], torch.Tensor]


class MixtureExpert(nn.Module):
    """One expert of a mixture: a gated MLP whose linears have the names that files give them."""

    def __init__(
        self, names: Mixture, shape: tuple[int, int], activation: Activation, dtype: torch.dtype
    ) -> None:
        """Make its linears on the meta device; ``shape`` is ``(F, D)``."""
        super().__init__()
        inner, width = shape
        for name, columns, rows in (
            (names.gate, width, inner),
            (names.up, width, inner),
            (names.down, inner, width),
        ):
            linear = nn.Linear(columns, rows, bias=False, device="meta", dtype=dtype)
            self.add_module(name, linear)
        self._names = names
        self._activation = activation

    def forward(self, X_TD: torch.Tensor) -> torch.Tensor:
        """The expert's output ``[T, D]`` for the tokens that were routed to it."""
        gate, up, down = (
            self.get_submodule(name)
            for name in (self._names.gate, self._names.up, self._names.down)
        )
        out_TD: torch.Tensor = down(self._activation(gate(X_TD)) * up(X_TD))
        return out_TD


class MixtureExperts(nn.ModuleList):
    """The experts of a mixture as modules of their own, in place of transformers' fused ones."""

    def __init__(self, fused: nn.Module, names: Mixture) -> None:
        """Make as many experts of the same shape as ``fused`` has, on the meta device."""
        down_EDF = fused.get_parameter("down_proj")
        count, width, inner = down_EDF.shape
        activation: Any = fused.act_fn
        super().__init__(
            MixtureExpert(names, (inner, width), activation, down_EDF.dtype) for _ in range(count)
        )

    def forward(
        self, X_TD: torch.Tensor, experts_TR: torch.Tensor, weights_TR: torch.Tensor
    ) -> torch.Tensor:
        """Every token's outputs of its experts, weighted and added up in order of the experts.

        It is what transformers' own loop over experts computes (``experts_implementation="eager"``)
        in the same order; each expert sees its tokens in their order.

        Args:
            X_TD: the tokens.
            experts_TR: the experts that the mixture's router chose for each token.
            weights_TR: the weight of each of them.
        """
        flat_N = experts_TR.flatten()
        order_N = torch.argsort(flat_N, stable=True)
        # The one time that a GPU is waited for.
        counts = torch.bincount(flat_N, minlength=len(self)).tolist()
        weights_N = weights_TR.flatten()
        out_TD = torch.zeros_like(X_TD)
        for expert, chosen in zip(self, order_N.split(counts), strict=True):
            if len(chosen):
                token = chosen // experts_TR.shape[1]
                part = expert(X_TD[token]) * weights_N[chosen, None]
                out_TD.index_add_(0, token, part.to(out_TD.dtype))
        return out_TD


def plain_blocks(model: nn.Module, family: Family) -> list[nn.Module]:
    """The model's decoder blocks, with linears of PyTorch in place of transformers' own kinds.

    The blocks are changed: a ``Conv1D`` gets an ``nn.Linear`` of its shape in its place, on the
    meta device, whose weight ``[O, D]`` is the transposed one, and the fused experts of a mixture
    get ``MixtureExperts``.

    Raises:
        ValueError: the module path does not lead to a list of blocks.
    """
    blocks = list(block_list(model, family))
    for block in blocks:
        separate_experts(block, family)
        for name in (name for group in family.groups for name in group.linears):
            with contextlib.suppress(AttributeError):
                old = block.get_submodule(name)
                if isinstance(old, Conv1D):
                    new = nn.Linear(old.nx, old.nf, device="meta", dtype=old.weight.dtype)
                    block.set_submodule(name, new)
    return blocks


def separate_experts(block: nn.Module, family: Family) -> None:
    """Put ``MixtureExperts`` in the place of a block's fused experts, where it has any."""
    if family.mixture is None:
        return
    with contextlib.suppress(AttributeError):
        fused = block.get_submodule(family.mixture.experts)
        if not isinstance(fused, MixtureExperts):
            block.set_submodule(family.mixture.experts, MixtureExperts(fused, family.mixture))


def fused_part(name: str, mixture: Mixture) -> tuple[str, int, tuple[int, int]] | None:
    """Where a file of fused experts has one expert's weight; None for another tensor.

    Args:
        name: of the weight, ``model.layers.0.mlp.experts.3.up_proj.weight`` for example.
        mixture: the names of its parts.

    Returns:
        The fused parameter's name, the number of the expert in it, and which of how many equal
        parts of the expert's rows.
    """
    before, found, after = name.partition(f".{mixture.experts}.")
    number, _, linear = after.partition(".")
    parts = {
        f"{mixture.gate}.weight": ("gate_up_proj", (0, 2)),
        f"{mixture.up}.weight": ("gate_up_proj", (1, 2)),
        f"{mixture.down}.weight": ("down_proj", (0, 1)),
    }
    if not found or not number.isdecimal() or linear not in parts:
        return None
    parameter, part = parts[linear]
    return f"{before}.{mixture.experts}.{parameter}", int(number), part


def tokens_share(block: nn.Module, family: Family, config: Any) -> float:
    """The share of the tokens that one expert of a block's mixture gets on average.

    Args:
        block: of the form that ``plain_blocks`` gives it; without a mixture the share is 1.
        family: of the model.
        config: of transformers.

    Raises:
        ValueError: the config has a token go to more experts than there are.
    """
    with contextlib.suppress(AttributeError):
        if family.mixture is not None:
            experts: Any = block.get_submodule(family.mixture.experts)
            chosen, count = int(config.num_experts_per_tok), len(experts)
            if not 1 <= chosen <= count:
                raise ValueError(
                    f"config.json has num_experts_per_tok {chosen}, and blocks of {count} experts: "
                    "download the model again"
                )
            return chosen / count
    return 1.0
