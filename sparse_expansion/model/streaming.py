"""One block at a time: a model whose blocks stay on disk until they are needed.

Nothing here knows a particular model's forward signature. The embedding, masks and position
embeddings come from running the model itself with its blocks replaced by recorders; the head by
running it with one stand-in block that puts the given hidden states out.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sparse_expansion.model.expansion import (
    FLOAT32_PARTS,
    QUANT_METHOD,
    SparseExpansionConfig,
    expand_model,
)
from sparse_expansion.model.families import Family, block_list, family_of

INDEX_NAME = "model.safetensors.index.json"
TOKENS_PER_FORWARD = 4096


class CheckpointFiles:
    """The tensors of a local folder of safetensors files, by name, read through a memory map."""

    def __init__(self, folder: str | Path) -> None:
        """Open every file's header, so that a broken file is found before any work.

        Raises:
            ValueError: no safetensors, a missing shard, or a truncated or foreign file.
        """
        self.folder = Path(folder)
        index = self.folder / INDEX_NAME
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (json.JSONDecodeError, KeyError, AttributeError):
                raise ValueError(f"{index} is not a safetensors index: download it again") from None
            if any(Path(name).name != name for name in names):
                raise ValueError(f"{index} names files outside its folder: refusing to read them")
            files = [self.folder / name for name in names]
        else:
            files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise ValueError(
                f"{self.folder} has no *.safetensors files: convert the model with "
                "save_pretrained(), or give a folder or hub id that has them"
            )
        self._where: dict[str, Path] = {}
        self._files = files
        for file in files:
            try:
                with safe_open(str(file), framework="pt") as handle:
                    self._where.update(dict.fromkeys(handle.keys(), file))
            except FileNotFoundError:
                raise ValueError(f"{file} is missing: download the model again") from None
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file} is truncated or not a safetensors file ({error}): download it again"
                ) from None

    def names(self) -> Iterator[str]:
        """All tensor names."""
        return iter(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, mapped from its file.

        The file is opened anew each time: a map that stays open keeps every page that was ever
        read resident.
        """
        with safe_open(str(self._where[name]), framework="pt") as handle:
            tensor: torch.Tensor = handle.get_tensor(name)
        return tensor

    def fingerprint(self) -> str:
        """SHA-256 over sizes, headers and the first and last MiB of every file.

        Enough to tell two models or two revisions apart without reading hundreds of gigabytes.
        """
        digest = hashlib.sha256()
        for file in self._files:
            size = file.stat().st_size
            digest.update(f"{size}\n".encode())
            with file.open("rb") as stream:
                header = int.from_bytes(stream.read(8), "little")
                digest.update(stream.read(header + (1 << 20)))
                stream.seek(max(0, size - (1 << 20)))
                digest.update(stream.read())
        return digest.hexdigest()[:32]


class _TuplesExpectedError(Exception):
    """The model takes ``[0]`` of what its blocks return."""


class _Stub(nn.Module):
    """Stands for a block; what the model reads off the block itself is read off the real one."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that it is not registered as a submodule.
        self._block = (block,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)


class _Recorder(_Stub):
    """Keeps what the block was called with and passes the hidden states on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.hidden: torch.Tensor | None = None
        self.call: BlockCall | None = None
        self.returns_tuple = False

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.dim() != 3:
            raise _TuplesExpectedError
        self.hidden = hidden_states
        self.call = BlockCall(args, kwargs)
        return (hidden_states,) if self.returns_tuple else hidden_states


class _StandIn(_Stub):
    """Stands for all blocks at once: puts the given hidden states out."""

    def __init__(self, block: nn.Module, hidden: torch.Tensor, *, returns_tuple: bool) -> None:
        super().__init__(block)
        self.hidden = hidden
        self.returns_tuple = returns_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.hidden,) if self.returns_tuple else self.hidden


@dataclass(frozen=True)
class BlockCall:
    """Everything a block is called with besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Call the block; older transformers return a tuple with the hidden states first."""
        out = block(hidden, *self.args, **self.kwargs)
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result


class ModelShell:
    """A model without its blocks: embedding and head in memory, blocks read on demand.

    Serves dense and expanded folders alike.
    """

    def __init__(self, folder: str | Path, *, device: str = "cpu", dtype: str = "auto") -> None:
        """Build the model on the meta device; nothing large is read yet.

        Raises:
            ValueError: not a model folder, an unsupported architecture, or broken files.
        """
        self.folder = Path(folder)
        self.device = torch.device(device)
        self.config = load_config(self.folder)
        self.family: Family = family_of(self.config.model_type)
        self.files = CheckpointFiles(self.folder)
        self.dtype = resolve_dtype(dtype, self.config, self.files)
        with init_empty_weights(include_buffers=False):
            self._model = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype)
        self._model.eval()
        self.expansion: SparseExpansionConfig | None = None
        quantization = getattr(self.config, "quantization_config", None)
        if quantization is not None:
            data = quantization if isinstance(quantization, dict) else quantization.to_dict()
            if data.get("quant_method") != QUANT_METHOD:
                raise ValueError(
                    f"{self.folder} is already quantized ({data.get('quant_method')}): expand "
                    "the unquantized model"
                )
            self.expansion = SparseExpansionConfig(
                **{key: value for key, value in data.items() if key != "quant_method"}
            )
            with init_empty_weights(include_buffers=False):
                self.cache = expand_model(self._model, self.expansion, self.dtype)
        blocks = block_list(self._model, self.family)
        self._blocks = list(blocks)
        parent, _, self._leaf = self.family.blocks.rpartition(".")
        self._parent = self._model.get_submodule(parent)
        self._recorders = nn.ModuleList(_Recorder(block) for block in self._blocks)
        setattr(self._parent, self._leaf, self._recorders)
        self._prefixes = self._name_prefixes()
        self._loaded = False
        self._returns_tuple: bool | None = None
        self._calls: dict[tuple[int, int], list[BlockCall]] = {}

    @property
    def num_blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self._blocks)

    def meta_block(self, layer: int) -> nn.Module:
        """A block's structure, without weights."""
        return self._blocks[layer]

    def block_prefix(self, layer: int) -> str:
        """The block's name prefix in a state dict, with the dot."""
        return f"{self.family.blocks}.{layer}."

    def file_name(self, name: str) -> str | None:
        """The name under which the files have the model's tensor ``name``.

        Base-model checkpoints lack the wrapper's prefix (``layers.0`` for ``model.layers.0``).
        """
        for candidate in (
            *(name.removeprefix(prefix) for prefix in self._prefixes),
            *self._aliases(name),
        ):
            if candidate in self.files:
                return candidate
        return None

    def stored_name(self, name: str) -> str:
        """The name to write ``name`` under.

        An alias that the source uses stays, so that the same transformers versions read the
        result.
        """
        found = self.file_name(name)
        return found if found is not None and found in self._aliases(name) else name

    def _aliases(self, name: str) -> list[str]:
        return [
            new + name.removeprefix(old)
            for pair in self.family.aliases
            for old, new in (pair, pair[::-1])
            if name.startswith(old)
        ]

    def _name_prefixes(self) -> tuple[str, ...]:
        base = getattr(self._model, "base_model_prefix", "")
        return ("", f"{base}.") if base else ("",)

    def trunk_names(self) -> list[str]:
        """All tensors but the dense MLP weights, tied ones once, by the model's names."""
        names = [name for name in self._model.state_dict() if self.file_name(name)]
        linears = {f"{name}.weight" for group in self.family.groups for name in group.linears}
        for layer, block in enumerate(self._blocks):
            prefix = self.block_prefix(layer)
            names += [prefix + name for name in block.state_dict() if name not in linears]
        return names

    def read(self, name: str) -> torch.Tensor:
        """The model's tensor ``name`` in the shell's dtype (integers as they are).

        Raises:
            ValueError: the files do not have it.
        """
        found = self.file_name(name)
        if found is None:
            raise ValueError(f"{self.folder} has no tensor {name!r}: the checkpoint is incomplete")
        tensor = self.files.read(found)
        if not tensor.is_floating_point():
            return tensor
        keep = self.expansion is not None and any(part in name for part in FLOAT32_PARTS)
        return tensor.float() if keep else tensor.to(self.dtype)

    def load_block(self, layer: int) -> nn.Module:
        """A block with its weights, on the device; the caller drops it when done.

        Raises:
            ValueError: a tensor is missing, or has a shape that does not fit the config.
        """
        block = copy.deepcopy(self._blocks[layer])
        self._fill(block, self.block_prefix(layer))
        return block.to(self.device)

    def _fill(self, module: nn.Module, prefix: str) -> None:
        state = {name: self.read(prefix + name) for name in module.state_dict()}
        try:
            module.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[-1].strip()
            raise ValueError(f"{self.folder} does not fit its config.json: {first}") from None
        for parameter in module.parameters():
            parameter.requires_grad_(False)

    def _load_shell(self) -> None:
        if self._loaded:
            return
        state = {
            name: self.read(name)
            for name in self._model.state_dict()
            if self.file_name(name) is not None
        }
        self._model.load_state_dict(state, strict=False, assign=True)
        self._model.tie_weights()
        missing = [name for name, p in self._model.named_parameters() if p.is_meta]
        if missing:
            raise ValueError(
                f"{self.folder} has no tensor {missing[0]!r}: the checkpoint is incomplete"
            )
        self._model.to(self.device)
        self._loaded = True

    def batches(self, tokens_NL: torch.Tensor) -> list[slice]:
        """Slices of windows that go through a block together (a fixed number of tokens)."""
        size = max(1, TOKENS_PER_FORWARD // tokens_NL.shape[1])
        return [
            slice(start, min(start + size, len(tokens_NL)))
            for start in range(0, len(tokens_NL), size)
        ]

    @torch.no_grad()
    def embed(self, tokens_NL: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[N, L, D]`` that the first block gets, on the device."""
        self._load_shell()
        self._record(tokens_NL)
        first, shape = self._recorders[0], (tokens_NL.shape[0], tokens_NL.shape[1])
        assert isinstance(first, _Recorder) and first.hidden is not None
        calls = []
        for recorder in self._recorders:
            assert isinstance(recorder, _Recorder) and recorder.call is not None
            calls.append(recorder.call)
        self._calls[shape] = calls
        self._returns_tuple = bool(self._returns_tuple)
        hidden = first.hidden
        for recorder in self._recorders:
            recorder.hidden = recorder.call = None  # type: ignore[assignment]
        return hidden

    def _record(self, tokens_NL: torch.Tensor) -> None:
        """Run the model over the recorders.

        Blocks return their hidden states, or a tuple with them first: it depends on the family and
        the transformers version, and shows in the shape that the next one is given.
        """
        # The base model: the head's logits would be the largest tensor of the whole run.
        run = {"input_ids": tokens_NL.to(self.device), "use_cache": False}
        try:
            if self._model.base_model(**run).last_hidden_state.dim() != 3:
                raise _TuplesExpectedError
        except _TuplesExpectedError:
            self._returns_tuple = True
            for recorder in self._recorders:
                recorder.returns_tuple = True  # type: ignore[assignment]
            self._model.base_model(**run)

    def call(self, layer: int, tokens_NL: torch.Tensor) -> BlockCall:
        """What block ``layer`` is called with for windows of this shape.

        Masks and positions depend on the shape alone, since windows have no padding.
        """
        shape = (tokens_NL.shape[0], tokens_NL.shape[1])
        if shape not in self._calls:
            self.embed(tokens_NL)
        return self._calls[shape][layer]

    @torch.no_grad()
    def head(self, tokens_NL: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[N, L, V]`` from the last block's hidden states."""
        self._load_shell()
        if self._returns_tuple is None:
            self.embed(tokens_NL[:1])
        shown = _StandIn(
            self._blocks[0], hidden.to(self.device), returns_tuple=bool(self._returns_tuple)
        )
        stand_in = nn.ModuleList([shown])
        layers = self.config.num_hidden_layers
        setattr(self._parent, self._leaf, stand_in)
        try:
            self.config.num_hidden_layers = self._model.config.num_hidden_layers = 1
            logits: torch.Tensor = self._model(
                input_ids=tokens_NL.to(self.device), use_cache=False
            ).logits
        finally:
            self.config.num_hidden_layers = self._model.config.num_hidden_layers = layers
            setattr(self._parent, self._leaf, self._recorders)
        return logits


def load_config(folder: Path) -> Any:
    """The folder's transformers config.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"model folder {folder} does not exist: check --model")
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has no config.json: it is not a model folder"
            + (" (an unfinished run: finish it with --resume)" if (folder / "run").is_dir() else "")
        )
    try:
        return AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        line = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder / 'config.json'} cannot be read: {line}") from None


def resolve_dtype(name: str, config: Any, files: CheckpointFiles) -> torch.dtype:
    """The dtype asked for; ``auto`` is the config's, else the first floating tensor's."""
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
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"model dtype {found} is not supported: use --dtype float32 or bfloat16")
    return found
