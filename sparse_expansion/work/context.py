"""What every stage works with: the run's folder, the models block by block, the worker's caches."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_expansion.config import CompressionConfig, RunConfig
from sparse_expansion.data.activations import ActivationBuffers
from sparse_expansion.data.transfers import to_device
from sparse_expansion.model.block_linears import dense_linear
from sparse_expansion.model.families import LinearGroup
from sparse_expansion.model.sources import fetch_model
from sparse_expansion.model.streaming import ModelShell
from sparse_expansion.run_files import dense_hidden_file, hidden_file
from sparse_expansion.run_folder import read_windows
from sparse_expansion.store import Store
from sparse_expansion.types import CompressionError
from sparse_expansion.work.captures import Captures
from sparse_expansion.work.residents import Residents
from sparse_expansion.work.spec import WorkerSpec, resident_bytes, waiting_bytes, writing_threads
from sparse_expansion.work.writing import WriteBehind

DENSE, EXPANDED = "dense", "expanded"
"""Names of the two models of a run: its source, and what is made of it."""
Written = dict[str, Future[dict[str, Any]]]
"""Records of files, by name, as soon as they are written."""


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
        self.buffers = ActivationBuffers(
            memory_bytes=spec.activation_bytes,
            scratch=spec.scratch,
            device=self.device,
            device_bytes=resident_bytes(spec, self.device),
        )
        self.captures = Captures(self.buffers, spec.captured_bytes + self.buffers.device_bytes)
        self.residents = Residents(self.buffers)
        self.files = WriteBehind(
            self.store, waiting_bytes(self.device), writing_threads(self.device)
        )
        self.kept_block: tuple[tuple[int, int | None], nn.Module] | None = None
        """The last expanded block, with its number and the level before which it ends."""
        self.place: tuple[int | None, float] = (None, 0.0)
        """How far the unit in hand has come, where its stage says so: its block, and the share."""
        self._dense: tuple[int, nn.Module] | None = None
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

    @property
    def output_scale(self) -> float | None:
        """``Family.output_scale`` where blocks make up for all before them, else None."""
        shell = self.shell()
        is_asked = self.config.makes_up_for_all
        return shell.family.output_scale(shell.config) if is_asked else None

    def group(self, layer: int, name: str) -> LinearGroup:
        """The linear group of this name of a dense block.

        Raises:
            ValueError: the block has none.
        """
        for group in self.shell().groups(layer):
            if group.name == name:
                return group
        raise ValueError(f"no linear group {name!r}")

    def dense_block(self, layer: int) -> nn.Module:
        """A dense block on the worker's device, not to be changed.

        It stays there for the next call where the device's budget has room for it.
        """
        if self._dense is not None and self._dense[0] == layer:
            return self._dense[1]
        self._dense = None
        block = self.shell().load_block(layer)
        tensors = [*block.parameters(), *block.buffers()]
        if all(self.buffers.try_hold(tensor) for tensor in tensors):
            self._dense = layer, block
        return block

    def dense_tensor(self, layer: int, name: str) -> torch.Tensor:
        """A tensor of a dense block on the worker's device, not to be changed."""
        if self._dense is not None and self._dense[0] == layer:
            return self._dense[1].state_dict()[name]
        shell = self.shell()
        return to_device(shell.read(shell.block_prefix(layer) + name), self.device)

    def dense_weight(self, layer: int, linear: str) -> torch.Tensor:
        """A dense weight ``[O, D]`` on the worker's device, as it is stored; not to be changed.

        Raises:
            CompressionError: it has NaN or infinite entries.
        """
        shell = self.shell()
        dense_linear(shell.meta_block(layer), linear)
        weight = self.dense_tensor(layer, f"{linear}.weight")
        if not bool(torch.isfinite(weight).all()):
            raise CompressionError(f"the dense weight of {linear} has NaN or infinite entries")
        return weight

    def shard_tokens(self, shard: int) -> torch.Tensor:
        """A shard's calibration windows ``[N, L]``."""
        return read_windows(self.store, shard)

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """A file's tensors: from the device where this worker kept them, else from the store."""
        kept = self.residents.get(name)
        return self.store.read_tensors(name) if kept is None else kept

    def read_hidden(self, layer: int, shard: int) -> torch.Tensor:
        """A shard's hidden states ``[N, L, D]`` before a block."""
        return self.read(hidden_file(layer, shard))["hidden"]

    def write_hidden(self, layer: int, shard: int, hidden: torch.Tensor) -> Written:
        """Have a shard's hidden states before a block written, see ``write``."""
        return self.write(hidden_file(layer, shard), {"hidden": hidden}, read_in=layer)

    def read_dense_hidden(self, layer: int, shard: int) -> torch.Tensor:
        """The same before a block of the dense model."""
        # Nothing is compressed before the first one.
        name = dense_hidden_file(layer, shard) if layer else hidden_file(layer, shard)
        return self.read(name)["hidden"]

    def write_dense_hidden(self, layer: int, shard: int, hidden: torch.Tensor) -> Written:
        """Have these written, see ``write``."""
        name = dense_hidden_file(layer, shard)
        return self.write(name, {"hidden": hidden}, read_in=layer)

    def write(
        self, name: str, tensors: dict[str, torch.Tensor], *, read_in: int | None = None
    ) -> Written:
        """Have a file of the run written while the worker goes on; its record to come, by name.

        Args:
            name: of the file.
            tensors: on any device; not to be written to any more.
            read_in: last block whose units read the file again, None where nobody does.
        """
        if read_in is not None:
            self.residents.keep(name, tensors, read_in)
        return {name: self.files.write(name, tensors)}

    def make_room(self) -> None:
        """Drop all that is kept on the device and can be made again, and keep half of it at most.

        Values that other units handed on stay.
        """
        self.buffers.device_bytes //= 2
        self.kept_block = self._dense = None
        self.captures.drop_all()
        self.residents.forget_before(self.shell().num_blocks + 1)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def forget_before(self, layer: int) -> None:
        """Drop what only earlier blocks' units read of what this worker keeps."""
        self.captures.forget_before(layer)
        self.residents.forget_before(layer)
