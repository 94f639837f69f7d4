"""One block at a time: a model whose blocks stay on disk until they are needed.

Nothing here knows a particular model's forward signature. The embedding, masks and position
embeddings come from running the model itself with its blocks replaced by recorders; the logits
from running it with one stand-in block that returns the given hidden states.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn

from sparse_expansion.model.block_calls import (
    BlockCall,
    BlockRecorder,
    BlockStandIn,
    record_calls,
)
from sparse_expansion.model.block_linears import block_groups, block_list, numbered_groups
from sparse_expansion.model.checkpoint import (
    CheckpointFiles,
    load_config,
    resolve_dtype,
)
from sparse_expansion.model.expansion import FLOAT32_TENSORS
from sparse_expansion.model.expert_cache import ExpertCache
from sparse_expansion.model.families import Family, LinearGroup, family_of
from sparse_expansion.model.fit import build_without_weights, check_shapes, check_sizes
from sparse_expansion.model.model_folder import CONFIG_NAME
from sparse_expansion.model.plain_blocks import plain_blocks, separate_experts
from sparse_expansion.model.quantizer import QUANT_METHOD, SparseExpansionConfig, expand_model
from sparse_expansion.model.stored_tensors import StoredTensors

TOKENS_PER_FORWARD = 4096
"""Tokens that pass through a block together, or one window where that is more."""


def windows_together(seqlen: int) -> int:
    """How many windows of so many tokens pass through a block together."""
    return max(1, TOKENS_PER_FORWARD // seqlen)


class ModelShell:
    """A model without its blocks: embedding and head in memory, blocks read on demand.

    It opens dense and expanded folders alike.
    """

    def __init__(self, folder: str | Path, *, device: str = "cpu", dtype: str = "auto") -> None:
        """Build the model on the meta device; nothing large is read yet.

        Raises:
            ValueError: the folder is not a model's, its architecture is not supported, or a
                file is broken.
        """
        self.folder = Path(folder)
        self.device = torch.device(device)
        self.config = load_config(self.folder)
        self.family: Family = family_of(self.config.model_type)
        self.files = CheckpointFiles(self.folder)
        self.dtype = resolve_dtype(dtype, self.config, self.files)
        path = self.folder / CONFIG_NAME
        check_sizes(self.config, self.files.shapes, self.family.blocks, path)
        self._model = build_without_weights(self.config, self.dtype).eval()
        self.expansion = self._expansion()
        self.expert_cache = ExpertCache()
        if self.expansion is not None:
            with init_empty_weights(include_buffers=False):
                self.expert_cache = expand_model(self._model, self.expansion, self.dtype)
        parent, _, self._blocks_name = self.family.blocks.rpartition(".")
        self._blocks_parent = self._model.get_submodule(parent)
        self._stored = StoredTensors(self.files, self.family, self._model.base_model_prefix)
        # Files have experts one by one, and a ``Conv1D`` as transformers has it.
        for block in block_list(self._model, self.family):
            separate_experts(block, self.family)
        check_shapes(self._model.state_dict(), self.file_name, self.files.shapes, self.folder)
        self._blocks = plain_blocks(self._model, self.family)
        self._groups = [block_groups(block, self.family) for block in self._blocks]
        self._recorders = [BlockRecorder(block) for block in self._blocks]
        self._put_in_place(nn.ModuleList(self._recorders))
        # A mixture's model may add a loss of its routers, of which stand-ins have none.
        has_routers = hasattr(self.config, "output_router_logits")
        self._no_router_loss = {"output_router_logits": False} if has_routers else {}
        self._is_loaded = False
        self._returns_tuple: bool | None = None
        self._calls: dict[tuple[int, int], list[BlockCall]] = {}

    def _expansion(self) -> SparseExpansionConfig | None:
        """The settings of the folder's expansion; ``None`` for a dense model."""
        quantization = getattr(self.config, "quantization_config", None)
        if quantization is None:
            return None
        settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
        if settings.get("quant_method") != QUANT_METHOD:
            raise ValueError(
                f"{self.folder} is already quantized ({settings.get('quant_method')}): expand "
                "the unquantized model"
            )
        return SparseExpansionConfig(
            **{key: value for key, value in settings.items() if key != "quant_method"}
        )

    def _put_in_place(self, blocks: nn.ModuleList) -> None:
        """Make ``blocks`` the model's list of blocks."""
        setattr(self._blocks_parent, self._blocks_name, blocks)

    @property
    def architecture(self) -> str:
        """The class name of the model, as ``config.json`` lists it under ``architectures``."""
        return type(self._model).__name__

    @property
    def num_blocks(self) -> int:
        """The number of decoder blocks."""
        return len(self._blocks)

    def meta_block(self, layer: int) -> nn.Module:
        """A block's structure, without weights."""
        return self._blocks[layer]

    def groups(self, layer: int) -> tuple[LinearGroup, ...]:
        """The linear groups of a block's MLP, see ``block_groups``."""
        return self._groups[layer]

    def group_names(self) -> list[list[str]]:
        """The linears of every group that any block has, as the family's entry names them."""
        return [
            list(group.linears)
            for group in self.family.groups
            if any(numbered_groups(block, self.family, (group,)) for block in self._blocks)
        ]

    def block_prefix(self, layer: int) -> str:
        """The prefix of the block's tensors in a state dict, with the dot."""
        return f"{self.family.blocks}.{layer}."

    def file_name(self, name: str) -> str | None:
        """The name under which the files hold the model's tensor ``name``; ``None`` without it.

        Checkpoints of a base model lack the prefix of the model around it (``layers.0`` for
        ``model.layers.0``).
        """
        return self._stored.file_name(name)

    def stored_name(self, name: str) -> str:
        """The name under which the model's tensor ``name`` is written.

        An alias that the source uses is kept, so that the same transformers versions read the
        result.
        """
        return self._stored.stored_name(name)

    def expanded_names(self) -> list[str]:
        """Module paths of the linears that an expansion replaces, in order."""
        return [
            self.block_prefix(layer) + name
            for layer in range(self.num_blocks)
            for group in self.groups(layer)
            for name in group.linears
        ]

    def dense_weights(self) -> set[str]:
        """The names under which the files hold the weights that an expansion replaces."""
        names = (f"{name}.weight" for name in self.expanded_names())
        return {found for name in names if (found := self._stored.weight_files_name(name))}

    def trunk_names(self) -> list[str]:
        """The model's names of all tensors but dense MLP weights; tied tensors are named once."""
        names = [name for name in self._model.state_dict() if self.file_name(name)]
        for layer, block in enumerate(self._blocks):
            prefix = self.block_prefix(layer)
            linears = {f"{name}.weight" for group in self.groups(layer) for name in group.linears}
            names += [prefix + name for name in block.state_dict() if name not in linears]
        return names

    def read(self, name: str) -> torch.Tensor:
        """The model's tensor ``name`` on the CPU.

        Floating tensors come in the shell's dtype, routers and grids in float32, and integers as
        they are.

        Raises:
            ValueError: the files do not have the tensor.
        """
        tensor = self._stored.read(name)
        if not tensor.is_floating_point():
            return tensor
        keep = self.expansion is not None and any(part in name for part in FLOAT32_TENSORS)
        return tensor.float() if keep else tensor.to(self.dtype)

    def load_block(self, layer: int) -> nn.Module:
        """A block with its weights, on the device; it lives as long as the caller keeps it.

        Raises:
            ValueError: a tensor is missing, or has a shape that does not fit the config.
        """
        block = copy.deepcopy(self._blocks[layer])
        self._fill(block, self.block_prefix(layer))
        return block.to(self.device)

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Load a module's tensors, whose names begin with ``prefix`` in the whole model."""
        state = {name: self.read(prefix + name) for name in module.state_dict()}
        try:
            module.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[-1].strip()
            raise ValueError(f"{self.folder} does not fit its config.json: {first}") from None
        for parameter in module.parameters():
            parameter.requires_grad_(False)

    def _load_shell(self) -> None:
        """Load everything but the blocks, once."""
        if self._is_loaded:
            return
        state = {
            name: self.read(name)
            for name in self._model.state_dict()
            if self.file_name(name) is not None
        }
        self._model.load_state_dict(state, strict=False, assign=True)
        # Told what the files lack, transformers leaves a head of its own as it is.
        self._model.tie_weights(missing_keys=set(self._model.state_dict()) - set(state))
        missing = [name for name, p in self._model.named_parameters() if p.is_meta]
        if missing:
            raise ValueError(
                f"{self.folder} has no tensor {missing[0]!r}: the checkpoint is incomplete"
            )
        self._model.to(self.device)
        self._is_loaded = True

    def batches(self, tokens_NL: torch.Tensor) -> list[slice]:
        """Slices of the windows that pass through a block together, see ``TOKENS_PER_FORWARD``."""
        size = windows_together(tokens_NL.shape[1])
        return [
            slice(start, min(start + size, len(tokens_NL)))
            for start in range(0, len(tokens_NL), size)
        ]

    @torch.no_grad()
    def embed(self, tokens_NL: torch.Tensor) -> torch.Tensor:
        """The hidden states ``[N, L, D]`` that enter the first block, on the device."""
        self._load_shell()
        base_model = self._model.base_model
        recorded = record_calls(base_model, self._recorders, tokens_NL.to(self.device))
        self._calls[tokens_NL.shape[0], tokens_NL.shape[1]] = recorded.calls
        self._returns_tuple = recorded.returns_tuple
        return recorded.hidden

    def call(self, layer: int, tokens_NL: torch.Tensor) -> BlockCall:
        """The call of block ``layer`` for windows of this shape.

        Masks and positions depend on the shape alone, since windows have no padding.
        """
        shape = (tokens_NL.shape[0], tokens_NL.shape[1])
        if shape not in self._calls:
            self.embed(tokens_NL)
        return self._calls[shape][layer]

    @torch.no_grad()
    def head(self, tokens_NL: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The logits ``[N, L, V]`` of the last block's hidden states ``[N, L, D]``."""
        self._load_shell()
        if self._returns_tuple is None:
            self.embed(tokens_NL[:1])
        stand_in = BlockStandIn(
            self._blocks[0], hidden.to(self.device), returns_tuple=bool(self._returns_tuple)
        )
        num_blocks = self.config.num_hidden_layers
        self._put_in_place(nn.ModuleList([stand_in]))
        try:
            self.config.num_hidden_layers = self._model.config.num_hidden_layers = 1
            logits: torch.Tensor = self._model(
                input_ids=tokens_NL.to(self.device), use_cache=False, **self._no_router_loss
            ).logits
        finally:
            self.config.num_hidden_layers = self._model.config.num_hidden_layers = num_blocks
            self._put_in_place(nn.ModuleList(self._recorders))
        return logits
