"""Training of a block's kept weights against the dense block; masks and grids stay as they are.

A pruner compensates the error of one linear. The output of a block also depends on how the errors
of its linears combine, and gradients through the whole block take that into account.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sparse_expansion.algorithms.packing.experts import pack_expert, unpack_kept
from sparse_expansion.algorithms.quantization import dequantize, quantize
from sparse_expansion.model.block_calls import BlockCall
from sparse_expansion.model.expansion import ExpandedLinear

STEP_TOKENS = 1024
"""Tokens of one step of Adam, or one window where that is more."""
WARM_UP_STEPS = 5
"""Steps until the full learning rate is reached."""
ADAM_BETAS = (0.9, 0.95)
MEAN_SQUARE_FLOOR = 1e-6
"""Added to a target's mean square before it divides."""


@dataclass(frozen=True)
class Batch:
    """Windows that pass through a block together."""

    hidden: torch.Tensor
    """The hidden states that enter the block, ``[N, L, D]``."""
    call: BlockCall
    """What the block is called with besides."""


class TrainableLinear(nn.Module):
    """An expanded linear whose kept weights are unpacked to float32 and can be trained."""

    def __init__(self, linear: ExpandedLinear) -> None:
        """Unpack all experts of ``linear``, which is not changed."""
        super().__init__()
        experts = range(len(linear.experts))
        kept = [unpack_kept(linear.tensors(k), linear.layouts[k]) for k in experts]
        self.kept_KOD = torch.stack(kept).to(linear.device)
        self.weight_KOD = nn.Parameter(
            torch.stack([linear.stored_weight(k, torch.float32) for k in experts])
        )
        # The linear is in a tuple so that it is not a submodule: its experts are not trained.
        self._linear = (linear,)
        # The scale and the zero point of every weight, and the largest code.
        self._grid: tuple[torch.Tensor, torch.Tensor, int] | None = None
        if linear.grid is not None:
            grid = linear.grid.grid()
            columns_D = torch.arange(linear.in_features, device=linear.device)
            scale_DO, zero_DO = grid.columns(columns_D)
            self._grid = scale_DO.T, zero_DO.T, grid.max_code

    def effective_weight(self, expert: int) -> torch.Tensor:
        """One expert's weight as it would be stored, in float32, ``[O, D]``.

        On a grid the weight is rounded, and gradients pass as if it were not: the straight-through
        estimator (Bengio et al., arXiv 1308.3432).
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
        """Map ``X [..., D]`` to ``[..., O]``; experts that have tokens get gradients."""
        linear = self._linear[0]
        with torch.no_grad():
            routing = linear.group_router(X)
        X_TD = routing.inputs_of_experts(X.reshape(-1, X.shape[-1]))
        parts = X_TD[routing.order_T].split(routing.counts)
        products = [
            nn.functional.linear(
                tokens, self.effective_weight(expert).to(X.dtype), linear.bias_of(expert, X.dtype)
            )
            for expert, tokens in enumerate(parts)
            if tokens.shape[0]
        ]
        out_TO = torch.cat(products)[torch.argsort(routing.order_T)]
        return out_TO.reshape(*X.shape[:-1], linear.out_features)

    def packed(self, expert: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """One expert's streams: mask and bias, which are unchanged, and trained values or codes."""
        weight_OD = self.weight_KOD[expert].detach()
        linear = self._linear[0]
        layout = linear.layouts[expert]
        bias_O = linear.own_bias(expert) if layout.has_bias else None
        codes = None if self._grid is None else quantize(weight_OD, *self._grid).to(torch.uint8)
        kept_OD = self.kept_KOD[expert]
        return pack_expert(weight_OD, kept_OD, codes, bias_O, layout=layout, dtype=dtype)

    def zero_pruned_gradients(self) -> None:
        """Set the gradients of pruned weights to zero, so that a step leaves them at zero."""
        # A linear that no token of a batch went through has no gradient at all.
        if self.weight_KOD.grad is not None:
            self.weight_KOD.grad.masked_fill_(~self.kept_KOD, 0.0)


def trainable_block(block: nn.Module) -> tuple[nn.Module, dict[str, TrainableLinear]]:
    """A copy of an expanded block whose linears can be trained, and these linears by name."""
    copied = copy.deepcopy(block)
    linears = {
        name: TrainableLinear(module)
        for name, module in copied.named_modules()
        if isinstance(module, ExpandedLinear)
    }
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    for name, linear in linears.items():
        parent, _, leaf = name.rpartition(".")
        setattr(copied.get_submodule(parent) if parent else copied, leaf, linear)
    return copied, linears


def output_loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The squared error of every token relative to its target's mean square, averaged.

    The error is relative for every token, because the few tokens with massive activations would
    decide alone otherwise.
    """
    error = (out.float() - target.float()).square().mean(dim=-1)
    return (error / (target.float().square().mean(dim=-1) + MEAN_SQUARE_FLOOR)).mean()


def scheduled_rate(step: int, *, num_steps: int, learning_rate: float) -> float:
    """The learning rate of one step, counted from 0: a warm-up times half a cosine."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    return learning_rate * (warm_up * (1 + math.cos(math.pi * step / num_steps)) / 2)


@dataclass(frozen=True)
class Refined:
    """The result of training one block."""

    loss_before: float | None
    """The mean ``output_loss`` of the held-out windows before training; None without any."""
    loss_after: float | None
    """The same after the epoch whose weights were kept."""
    epoch: int
    """The epoch whose weights were kept; 0 when none was better than no training at all."""
    steps: int
    """The steps that were taken, over all epochs."""


class _BestWeights:
    """The weights of the epoch with the least loss so far."""

    def __init__(self, weights: Sequence[nn.Parameter], loss: float | None) -> None:
        self.loss = loss
        self.epoch = 0
        self._weights = weights
        self._copies = [weight.detach().clone() for weight in weights]

    def offer(self, epoch: int, loss: float | None) -> None:
        """Keep the present weights if their loss is the least, or if there is no loss to ask."""
        if loss is None or self.loss is None or loss < self.loss:
            self.loss, self.epoch = loss, epoch
            for kept, weight in zip(self._copies, self._weights, strict=True):
                kept.copy_(weight.detach())

    def restore(self) -> None:
        """Put the kept weights back."""
        with torch.no_grad():
            for kept, weight in zip(self._copies, self._weights, strict=True):
                weight.copy_(kept)


def refine(
    block: nn.Module,
    linears: dict[str, TrainableLinear],
    dense: nn.Module,
    *,
    batches: Callable[[int], Iterable[Batch]],
    held_out: Callable[[], Iterable[Batch]],
    num_steps: int,
    epochs: int,
    learning_rate: float,
) -> Refined:
    """Train the linears of a block by Adam so that its output becomes the dense block's.

    The weights of the epoch with the least loss on held-out windows are kept, the untrained ones
    included: training never makes the block worse there. Without held-out windows the weights of
    the last epoch are kept.

    Args:
        block: a block with trainable linears, see ``trainable_block``; it holds the result.
        linears: the block's trainable linears by name.
        dense: the block that the experts were made from.
        batches: gives the batches of an epoch, counted from 1; the same epoch gives the same ones.
        held_out: gives batches of windows that are not trained on.
        num_steps: the number of batches in all epochs, which the learning rate's schedule ends at.
        epochs: the number of passes over the batches.
        learning_rate: the learning rate after the warm-up, before it falls.
    """
    weights = [linear.weight_KOD for linear in linears.values()]
    optimizer = torch.optim.Adam(weights, lr=learning_rate, betas=ADAM_BETAS)

    def loss_of(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            target = batch.call.run(dense, batch.hidden)
        return output_loss(batch.call.run(block, batch.hidden), target)

    def held_out_loss() -> float | None:
        with torch.no_grad():
            losses = [float(loss_of(batch)) for batch in held_out()]
        return sum(losses) / len(losses) if losses else None

    loss_before = held_out_loss()
    best = _BestWeights(weights, loss_before)
    step = 0
    for epoch in range(1, epochs + 1):
        for batch in batches(epoch):
            rate = scheduled_rate(step, num_steps=num_steps, learning_rate=learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            loss_of(batch).backward()
            for linear in linears.values():
                linear.zero_pruned_gradients()
            optimizer.step()
            step += 1
        best.offer(epoch, held_out_loss())
    best.restore()
    return Refined(loss_before, best.loss, best.epoch, step)
