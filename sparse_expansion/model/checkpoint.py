"""A model folder on disk: its tensors, its config, and the files that travel with them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig

from sparse_expansion.messages import one_line
from sparse_expansion.model.fit import check_config
from sparse_expansion.model.manifest import MANIFEST_NAME
from sparse_expansion.model.model_folder import (
    CONFIG_NAME,
    INDEX_NAME,
    check_model_folder,
    open_weights,
    weight_files,
)
from sparse_expansion.types import MODEL_DTYPES

_log = logging.getLogger(__name__)
_READ_BYTES = 1 << 24
_DEFINING_STARTS = (CONFIG_NAME, "tokenizer", "vocab", "merges", "special_tokens", "added_tokens")
"""How files begin that say, beside the weights, what a model computes."""


class CheckpointFiles:
    """The tensors of a local folder of safetensors files, by name, read through a memory map."""

    def __init__(self, folder: str | Path) -> None:
        """Open every file's header, so that a broken file is found before any work.

        Raises:
            ValueError: there are no safetensors, a file is missing, truncated or of another format,
                or two files have a tensor of one name.
        """
        self.folder = Path(folder)
        self._files = weight_files(self.folder)
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of all tensors by name."""
        for file in self._files:
            with open_weights(file, framework="pt") as handle:
                names = list(handle.keys())
                shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in names}
            for name in names:
                if name in self._file_of:
                    raise ValueError(
                        f"{self.folder} has {name} twice, in {self._file_of[name].name} and in "
                        f"{file.name}: download it again"
                    )
                self._file_of[name] = file
            self.shapes.update(shapes)

    def names(self) -> Iterator[str]:
        """The names of all tensors."""
        return iter(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def num_bytes(self) -> int:
        """Bytes of the files."""
        return sum(file.stat().st_size for file in self._files)

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, mapped from its file.

        The file is opened for every read: a map that stays open keeps every page resident that was
        ever read.
        """
        with safe_open(str(self._file_of[name]), framework="pt") as handle:
            tensor: torch.Tensor = handle.get_tensor(name)
        return tensor

    def read_row(self, name: str, row: int) -> torch.Tensor:
        """A tensor's part ``[row]`` on the CPU, and nothing else of it."""
        with safe_open(str(self._file_of[name]), framework="pt") as handle:
            tensor: torch.Tensor = handle.get_slice(name)[row]
        return tensor

    def fingerprint(self) -> str:
        """32 hex digits of a SHA-256 over all that defines the model.

        Those are the XXH3 digests of its weight files, configuration and tokenizer. XXH3 is as fast
        as memory: reading the disk is what takes time.
        """
        # Loading a model, which this module is imported for, does without.
        import xxhash

        digest = hashlib.sha256()
        defining = {
            path for path in self.folder.iterdir() if path.name.startswith(_DEFINING_STARTS)
        }
        for file in (*self._files, *sorted(path for path in defining if path.is_file())):
            found = xxhash.xxh3_128()
            with file.open("rb") as stream:
                while chunk := stream.read(_READ_BYTES):
                    found.update(chunk)
            digest.update(f"{file.name}\n{found.hexdigest()}\n".encode())
        return digest.hexdigest()[:32]


def load_config(folder: Path) -> Any:
    """The folder's transformers config.

    Raises:
        ValueError: the folder has none, or it cannot be read.
    """
    check_model_folder(folder)
    path = folder / CONFIG_NAME
    try:
        # Left to itself transformers asks at the terminal, and waits.
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        # A setting that is of another type, or fits no other, ends in whatever its check raises.
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from None
    check_config(config, path)
    return config


def resolve_dtype(name: str, config: Any, files: CheckpointFiles) -> torch.dtype:
    """The dtype to load a model in.

    Args:
        name: a dtype's name, or ``auto`` for the config's dtype, and where the config names none
            for that of the first floating tensor.
        config: the model's transformers config.
        files: the model's tensors.

    Raises:
        ValueError: the dtype is none of float32, bfloat16 and float16.
    """
    if name != "auto":
        found = getattr(torch, name)
    else:
        found = getattr(config, "dtype", None)
        if isinstance(found, str):
            found = getattr(torch, found)
        if found is None:
            for tensor_name in files.names():
                tensor = files.read(tensor_name)
                if tensor.is_floating_point():
                    found = tensor.dtype
                    break
    if found not in MODEL_DTYPES:
        raise ValueError(f"model dtype {found} is not supported: use --dtype float32 or bfloat16")
    return found


def companions(folder: Path) -> list[Path]:
    """The files of a model's folder that travel with it, see ``is_companion``.

    A link that leads out of the folder is left out: what it leads to may be anybody's. The hub's
    cache is a folder of links into another folder beside it, which belongs to it.
    """
    home = folder.resolve()
    homes = [home]
    repository = home.parent.parent
    if home.parent.name == "snapshots" and repository.name.startswith("models--"):
        homes.append(repository / "blobs")
    found = []
    for path in sorted(home.iterdir()):
        if not is_companion(path.name) or not path.is_file():
            continue
        target = path.resolve()
        if not any(target.is_relative_to(one) for one in homes):
            _log.warning("%s is a link to %s, out of its folder: it is not copied", path, target)
            continue
        found.append(path)
    return found


def is_companion(name: str) -> bool:
    """Whether a file travels with a model unchanged: tokenizer, generation and licence files."""
    if name in (CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, "README.md"):
        return False
    if name.endswith((".model", ".jinja")) or name.upper().startswith(("LICENSE", "NOTICE")):
        return True
    starts = (
        "tokenizer",
        "vocab",
        "merges",
        "special_tokens",
        "added_tokens",
        "generation_config",
        "chat_template",
    )
    return name.startswith(starts) and name.endswith((".json", ".txt"))
