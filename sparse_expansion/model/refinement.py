"""Training of a block's kept weights against the dense block; masks and grids stay.

What a pruner makes up for is one linear's error. A block's own output also depends on how the
errors of its linears meet, and gradients through the whole block see that.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from sparse_expansion.algorithms.packing import pack_expert, unpack_kept
from sparse_expansion.algorithms.quantization import dequantize, quantize
from sparse_expansion.config import RefinementConfig
from sparse_expansion.model.expansion import ExpandedLinear
from sparse_expansion.model.streaming import BlockCall

STEP_TOKENS = 1024
"""A step of Adam sees so many tokens, or one window."""
WARM_UP = 5
"""Steps until the full learning rate."""
BETAS = (0.9, 0.95)
FLOOR = 1e-6


@dataclass(frozen=True)
class Batch:
    """Windows that go through a block together."""

    hidden: torch.Tensor
    """``[N, L, D]``, what the block gets."""
    call: BlockCall


class TrainedLinear(nn.Module):
    """An expanded linear with float32 weights that can be trained where they are kept."""

    def __init__(self, linear: ExpandedLinear) -> None:
        super().__init__()
        experts = range(len(linear.experts))
        kept = [unpack_kept(linear.tensors(k), linear.layout) for k in experts]
        self.kept_KOD = torch.stack(kept).to(linear.device)
        self.weight_KOD = nn.Parameter(
            torch.stack([linear.unpack(k, torch.float32) for k in experts])
        )
        # Not a submodule: its packed experts are not what is trained.
        self._linear = (linear,)
        # Scale and zero point of every weight, and the largest code.
        self._grid: tuple[torch.Tensor, torch.Tensor, int] | None = None
        if linear.grid is not None:
            grid = linear.grid.grid()
            columns_D = torch.arange(linear.in_features, device=linear.device)
            scale_DO, zero_DO = grid.columns(columns_D)
            self._grid = scale_DO.T, zero_DO.T, grid.max_code

    def effective(self, expert: int) -> torch.Tensor:
        """The expert's weight as it would be stored, in float32.

        On a grid it is rounded, and gradients pass as if it were not (the straight-through
        estimator, arXiv 1308.3432).
        """
        weight_OD = self.weight_KOD[expert]
        if self._grid is None:
            return weight_OD
        with torch.no_grad():
            scale_OD, zero_OD, _ = self._grid
            rounded = dequantize(quantize(weight_OD, *self._grid), scale_OD, zero_OD)
            change = (rounded - weight_OD).masked_fill_(~self.kept_KOD[expert], 0.0)
        return weight_OD + change

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """As ``ExpandedLinear.forward``, with gradients for the experts that have tokens."""
        linear = self._linear[0]
        with torch.no_grad():
            routing = linear.group_router(X)
        X_TD = X.reshape(-1, X.shape[-1])
        parts = X_TD[routing.order_T].split(routing.counts)
        made = [
            nn.functional.linear(tokens, self.effective(expert).to(X.dtype), linear.bias)
            for expert, tokens in enumerate(parts)
            if tokens.shape[0]
        ]
        out_TO = torch.cat(made)[torch.argsort(routing.order_T)]
        return out_TO.reshape(*X.shape[:-1], linear.out_features)

    def packed(self, expert: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The expert's streams: the mask that it had, and the trained values or codes."""
        weight_OD = self.weight_KOD[expert].detach()
        layout = self._linear[0].layout
        codes = None if self._grid is None else quantize(weight_OD, *self._grid).to(torch.uint8)
        return pack_expert(weight_OD, self.kept_KOD[expert], codes, layout=layout, dtype=dtype)


def trained_block(block: nn.Module) -> tuple[nn.Module, dict[str, TrainedLinear]]:
    """A copy whose expanded linears can be trained, and these by name."""
    copied = copy.deepcopy(block)
    found = {
        name: TrainedLinear(module)
        for name, module in copied.named_modules()
        if isinstance(module, ExpandedLinear)
    }
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    for name, linear in found.items():
        parent, _, leaf = name.rpartition(".")
        setattr(copied.get_submodule(parent) if parent else copied, leaf, linear)
    return copied, found


def output_loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error of every token relative to the target's mean square, averaged.

    Relative by token: the few with massive activations would decide alone otherwise.
    """
    error = (out.float() - target.float()).square().mean(dim=-1)
    return (error / (target.float().square().mean(dim=-1) + FLOOR)).mean()


@dataclass(frozen=True)
class Refined:
    """What training came to."""

    loss_before: float | None
    """Of the held-out windows, see ``output_loss``; None without any."""
    loss_after: float | None
    """The same after the epoch that was kept."""
    epoch: int
    """The epoch kept: 0 when none was better than no training at all."""
    steps: int


def refine(
    block: nn.Module,
    linears: dict[str, TrainedLinear],
    dense: nn.Module,
    config: RefinementConfig,
    *,
    batches: Callable[[int], Iterable[Batch]],
    held_out: Callable[[], Iterable[Batch]],
    num_steps: int,
) -> Refined:
    """Train the linears of a block by Adam so that its output is the dense block's.

    The weights of the epoch with the least loss on held-out windows are kept, the first ones
    included: training never makes the block worse there.

    Args:
        block: with trained linears, see ``trained_block``; holds the result afterwards.
        linears: of the block.
        dense: the block that they were made from.
        config: epochs and learning rate.
        batches: of one epoch, by its number from 1; the same number gives the same batches.
        held_out: of windows that are not trained on.
        num_steps: batches of all epochs, for the learning rate's schedule (half a cosine).
    """
    weights = [linear.weight_KOD for linear in linears.values()]
    optimizer = torch.optim.Adam(weights, lr=config.finetune_rate, betas=BETAS)

    def loss_of(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            target = batch.call.run(dense, batch.hidden)
        return output_loss(batch.call.run(block, batch.hidden), target)

    def held_out_loss() -> float | None:
        with torch.no_grad():
            found = [float(loss_of(batch)) for batch in held_out()]
        return sum(found) / len(found) if found else None

    before = best = held_out_loss()
    best_epoch, step = 0, 0
    best_weights = [weight.detach().clone() for weight in weights]
    for epoch in range(1, config.finetune + 1):
        for batch in batches(epoch):
            rate = min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / num_steps)) / 2
            for group in optimizer.param_groups:
                group["lr"] = config.finetune_rate * rate
            optimizer.zero_grad()
            loss_of(batch).backward()
            for linear in linears.values():
                # An expert without a token of this batch has no gradient of its own: zeros.
                if linear.weight_KOD.grad is not None:
                    linear.weight_KOD.grad.masked_fill_(~linear.kept_KOD, 0.0)
            optimizer.step()
            step += 1
        after = held_out_loss()
        # Without held-out windows there is nothing to choose by: the last epoch stays.
        if after is None or best is None or after < best:
            best, best_epoch = after, epoch
            for kept, weight in zip(best_weights, weights, strict=True):
                kept.copy_(weight.detach())
    with torch.no_grad():
        for kept, weight in zip(best_weights, weights, strict=True):
            weight.copy_(kept)
    return Refined(before, best, best_epoch, step)
