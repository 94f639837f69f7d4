"""What every stage works with: the run's folder, the models block by block, the worker's caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_expansion.config import CompressionConfig, RunConfig
from sparse_expansion.data.activations import ActivationBuffers
from sparse_expansion.model.families import LinearGroup, dense_linear
from sparse_expansion.model.sources import fetch_model
from sparse_expansion.model.streaming import ModelShell
from sparse_expansion.run_files import hidden_file
from sparse_expansion.run_folder import read_windows
from sparse_expansion.store import Store
from sparse_expansion.types import CompressionError
from sparse_expansion.work.captures import Captures
from sparse_expansion.work.spec import WorkerSpec

DENSE, EXPANDED = "dense", "expanded"
"""Names of the two models of a run: its source, and what is made of it."""


class WorkContext:
    """One worker's view of a run. All that it caches can be made again, with the same bytes."""

    config: RunConfig
    """Settings of the graph that the unit in hand belongs to."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Choose the device; models are opened when first needed."""
        self.spec = spec
        self.store = Store(spec.store)
        self.device = spec.device
        if spec.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.buffers = ActivationBuffers(memory_bytes=spec.activation_bytes, scratch=spec.scratch)
        self.captures = Captures(self.buffers, spec.captured_bytes)
        self.kept_block: tuple[tuple[int, str], nn.Module] | None = None
        """The last expanded block, with its number and the group before which it ends."""
        self._shells: dict[tuple[str, str], ModelShell] = {}

    def use(self, config: RunConfig) -> None:
        """Take the settings of the graph whose units come next."""
        self.config = config
        # Products of float32 stay float32 unless asked: TF32 changes masks and grids.
        torch.backends.cuda.matmul.allow_tf32 = config.tf32

    def shell(self, model: str = DENSE) -> ModelShell:
        """A model without its blocks: ``dense``, ``expanded``, or the folder of another one."""
        name = model, self.config.dtype
        if name not in self._shells:
            if model == DENSE:
                spec = self.spec
                folder = fetch_model(spec.source, cache_dir=spec.cache_dir, revision=spec.revision)
            elif model == EXPANDED:
                folder = self.store.fetch_folder(self.spec.scratch)
            else:
                folder = Path(model)
            self._shells[name] = ModelShell(folder, device=self.device, dtype=self.config.dtype)
        return self._shells[name]

    def compression(self, layer: int) -> CompressionConfig:
        """A block's settings of pruning and quantization."""
        return self.config.compression.at(layer)

    def group(self, name: str) -> LinearGroup:
        """The dense model's linear group of this name.

        Raises:
            ValueError: the family has none.
        """
        for group in self.shell().family.groups:
            if group.name == name:
                return group
        raise ValueError(f"no linear group {name!r}")

    def dense_weight(self, layer: int, linear: str) -> torch.Tensor:
        """A dense weight ``[O, D]`` on the CPU, as it is stored.

        Raises:
            CompressionError: it has NaN or infinite entries.
        """
        shell = self.shell()
        dense_linear(shell.meta_block(layer), linear)
        weight = shell.read(f"{shell.block_prefix(layer)}{linear}.weight")
        if not bool(torch.isfinite(weight).all()):
            raise CompressionError(f"the dense weight of {linear} has NaN or infinite entries")
        return weight

    def shard_tokens(self, shard: int) -> torch.Tensor:
        """A shard's calibration windows ``[N, L]``."""
        return read_windows(self.store, shard)

    def read_hidden(self, layer: int, shard: int) -> torch.Tensor:
        """A shard's hidden states ``[N, L, D]`` before a block."""
        return self.store.read_tensors(hidden_file(layer, shard))["hidden"]

    def write_hidden(self, layer: int, shard: int, hidden: torch.Tensor) -> dict[str, Any]:
        """Write a shard's hidden states before a block; returns the file's record by its name."""
        return self.write(hidden_file(layer, shard), {"hidden": hidden})

    def write(self, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Write a file of the run; returns its record by its name."""
        return {name: self.store.write_tensors(name, tensors)}
