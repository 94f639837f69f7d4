"""Ways to run a model folder that several tests share."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from sparse_expansion.cli import main
from sparse_expansion.model.expansion import ExpandedLinear
from sparse_expansion.model.streaming import ModelShell

FLAGS = (
    "--num_clusters 3 --dataset-size 6 --seqlen 32 --PCA_reduction_factor 4 --block-size 16 "
    "--experts-per-unit 2"
).split()


def expand(model: Path, text: Path, output: Path, *flags: str) -> Path:
    """An expanded folder, made by the command line."""
    arguments = ["expand", "--model", str(model), "--dataset", str(text), "--output", str(output)]
    assert main([*arguments, *FLAGS, *flags]) == 0
    return output


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """A model's logits, without gradients."""
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def expanded_linears(model: nn.Module) -> list[ExpandedLinear]:
    """All of a model's expanded linears, in order."""
    return [module for module in model.modules() if isinstance(module, ExpandedLinear)]


def stream(shell: ModelShell, tokens: torch.Tensor) -> torch.Tensor:
    """Logits ``[N, L, V]``, one block at a time."""
    hidden = shell.embed(tokens)
    with torch.no_grad():
        for layer in range(shell.num_blocks):
            hidden = shell.call(layer, tokens).run(shell.load_block(layer), hidden)
    return shell.head(tokens, hidden)
