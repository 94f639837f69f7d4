"""Where a folder's files have a model's tensors, whatever they call them and keep together."""

from __future__ import annotations

import torch

from sparse_expansion.model.checkpoint import CheckpointFiles
from sparse_expansion.model.families import Family
from sparse_expansion.model.plain_blocks import fused_part


class StoredTensors:
    """The tensors of a folder's files by the names that the model has for them."""

    def __init__(self, files: CheckpointFiles, family: Family, base_model: str) -> None:
        """``base_model`` is what the model calls itself without its head, maybe nothing."""
        self.files = files
        self.family = family
        self._prefixes = ("", f"{base_model}.") if base_model else ("",)

    def file_name(self, name: str) -> str | None:
        """The name under which the files hold the model's tensor ``name``; ``None`` without it.

        Checkpoints of a base model lack the prefix of the model around it (``layers.0`` for
        ``model.layers.0``).
        """
        names = [name.removeprefix(prefix) for prefix in self._prefixes]
        for candidate in (*names, *(alias for each in names for alias in self._aliases(each))):
            if candidate in self.files:
                return candidate
        return None

    def stored_name(self, name: str) -> str:
        """The name under which the model's tensor ``name`` is written.

        An alias that the source uses is kept, so that the same transformers versions read the
        result.
        """
        found = self.file_name(name)
        return found if found is not None and found in self._aliases(name) else name

    def weight_files_name(self, name: str) -> str | None:
        """The name of the files' tensor that holds a weight, by itself or among other experts'."""
        return self.file_name(name) or self._fused(name)[0]

    def read(self, name: str) -> torch.Tensor:
        """The model's tensor ``name`` on the CPU, in the dtype that it is stored in.

        Raises:
            ValueError: the files do not have the tensor.
        """
        found = self.file_name(name)
        tensor = self._read_fused(name) if found is None else self.files.read(found)
        linears = (f"{one}.weight" for group in self.family.groups for one in group.linears)
        if self.family.is_transposed and name.endswith(tuple(linears)):
            return tensor.T.contiguous()
        return tensor

    def _aliases(self, name: str) -> list[str]:
        """Other names of the tensor, which files of other transformers versions use."""
        return [
            name.replace(old, new, 1)
            for pair in self.family.aliases
            for old, new in (pair, pair[::-1])
            if old in name
        ]

    def _fused(self, name: str) -> tuple[str | None, int, tuple[int, int]]:
        """The files' tensor that has an expert's weight among others', and where: see there."""
        mixture = self.family.mixture
        part = None if mixture is None else fused_part(name, mixture)
        return (None, 0, (0, 1)) if part is None else (self.file_name(part[0]), *part[1:])

    def _read_fused(self, name: str) -> torch.Tensor:
        """An expert's weight out of a tensor that has those of all experts."""
        found, expert, (index, count) = self._fused(name)
        if found is None:
            raise ValueError(
                f"{self.files.folder} has no tensor {name!r}: the checkpoint is incomplete"
            )
        if expert >= self.files.shapes[found][0]:
            raise ValueError(
                f"{self.files.folder} does not fit its config.json: {found} has no expert {expert}"
            )
        return self.files.read_row(found, expert).chunk(count)[index].clone()
