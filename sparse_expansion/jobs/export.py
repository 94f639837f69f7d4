"""An expanded folder with one expert per linear, as a folder that other tools read.

``dense`` is a plain Hugging Face folder (zeros stored). ``pack-quantized`` is the format of
compressed-tensors, for experts that are quantized: its own library packs the codes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparse_expansion.algorithms.packing.experts import unpack_kept
from sparse_expansion.algorithms.packing.streams import unpack_codes
from sparse_expansion.config import CompressionConfig
from sparse_expansion.jobs.export_config import companion_files, for_both_generations
from sparse_expansion.jobs.export_formats import DENSE, FORMATS, PACK_QUANTIZED
from sparse_expansion.model.block_linears import linear_shape
from sparse_expansion.model.expansion import ExpandedLinear, PackedExpert
from sparse_expansion.model.families import LinearGroup
from sparse_expansion.model.model_folder import CONFIG_NAME, INDEX_NAME
from sparse_expansion.model.streaming import ModelShell
from sparse_expansion.model.verification import verify
from sparse_expansion.store import Store


def export(folder: Path, output: str, form: str) -> dict[str, Any]:
    """Write the one expert of every linear to ``output``, a block at a time.

    Args:
        folder: a finished expanded folder with one cluster.
        output: a new or empty folder (or URL).
        form: one of ``FORMATS``.

    Returns:
        What was written: format, output, bytes and number of tensors.

    Raises:
        ValueError: an unknown format, more than one cluster, ``pack-quantized`` without
            quantization or without compressed-tensors, an output that is not empty, or a damaged
            folder.
    """
    shell = ModelShell(folder)
    compression = _exportable(shell, form)
    store = Store(output)
    if store.list(""):
        raise ValueError(f"--output {output} is not empty: choose another folder")
    verify(folder)
    files = _WeightFiles(store)
    files.write("model-trunk.safetensors", _trunk_tensors(shell))
    for layer in range(shell.num_blocks):
        tensors = _block_tensors(shell, layer, form, compression)
        files.write(f"model-block-{layer:05d}.safetensors", tensors)
    files.write_index()
    for name, data in companion_files(folder).items():
        store.write_bytes(name, data)
    config = for_both_generations(shell.config.to_dict(), shell.family)
    config.pop("quantization_config", None)
    if form == PACK_QUANTIZED:
        config["quantization_config"] = _quantization_config(compression, shell.family.groups)
    store.write_json(CONFIG_NAME, config)
    return {
        "format": form,
        "output": output,
        "bytes": files.num_bytes,
        "tensors": len(files.weight_map),
    }


def _exportable(shell: ModelShell, form: str) -> CompressionConfig:
    """How the model was compressed, once it is certain that the format has room for it."""
    if form not in FORMATS:
        raise ValueError(f"--format {form} is none of {', '.join(FORMATS)}")
    if shell.expansion is None:
        raise ValueError(f"{shell.folder} is not an expanded model: there is nothing to export")
    routing = shell.expansion.routing_config()
    if routing.most_clusters != 1:
        raise ValueError(
            f"{shell.folder} has {routing.most_clusters} experts per linear, and other formats "
            "have room for one: export a model made with --num_clusters 1"
        )
    compression = shell.expansion.compression_config()
    if form == PACK_QUANTIZED:
        if compression.bits is None:
            raise ValueError(f"{shell.folder} is not quantized: export it with --format {DENSE}")
        if shell.family.is_transposed:
            raise ValueError(
                f"compressed-tensors has no form for the transposed linears of "
                f"{shell.config.model_type}: export it with --format {DENSE}"
            )
        if shell.family.mixture is not None:
            raise ValueError(
                "no reader loads packed experts of a mixture by themselves: export "
                f"{shell.config.model_type} with --format {DENSE}"
            )
        _pack_to_int32()
        return _with_whole_groups(shell, compression)
    return compression


def _with_whole_groups(shell: ModelShell, compression: CompressionConfig) -> CompressionConfig:
    """The same with groups of columns that divide the width of every linear.

    Readers of the format know no shorter last group. Groups are split until there is none, and
    the parts have the scale of the whole.
    """
    if compression.group_size is None:
        return compression
    block = shell.meta_block(0)
    names = [name for group in shell.family.groups for name in group.linears]
    widths = [linear_shape(block, name)[1] for name in names]
    return replace(compression, group_size=math.gcd(compression.group_size, *widths))


class _WeightFiles:
    """The exported weight files, and the index over them."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.weight_map: dict[str, str] = {}
        self.num_bytes = 0

    def write(self, file: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write one file of tensors by name."""
        self.store.write_tensors(file, tensors)
        self.weight_map.update(dict.fromkeys(tensors, file))
        self.num_bytes += sum(tensor.nbytes for tensor in tensors.values())

    def write_index(self) -> None:
        """Write the index of all files."""
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": self.weight_map}
        self.store.write_json(INDEX_NAME, index)


def _trunk_tensors(shell: ModelShell) -> dict[str, torch.Tensor]:
    """All tensors outside the blocks, by the names under which they are stored."""
    blocks = tuple(shell.block_prefix(layer) for layer in range(shell.num_blocks))
    names = [name for name in shell.trunk_names() if not name.startswith(blocks)]
    return {shell.stored_name(name): shell.read(name) for name in names}


def _block_tensors(
    shell: ModelShell, layer: int, form: str, compression: CompressionConfig
) -> dict[str, torch.Tensor]:
    """All tensors of a block, with its expanded linears as the format has them."""
    prefix = shell.block_prefix(layer)
    block = shell.load_block(layer)
    expanded = {
        name: module for name, module in block.named_modules() if isinstance(module, ExpandedLinear)
    }
    # Guards are under the names that the source's files have, and so is what is in their place.
    tensors = {
        shell.stored_name(prefix + name): tensor
        for name, tensor in block.state_dict().items()
        if not any(name.startswith(f"{linear}.") for linear in expanded)
    }
    for name, linear in expanded.items():
        if linear.bias is not None:
            tensors[shell.stored_name(f"{prefix}{name}.bias")] = linear.bias
        if form == PACK_QUANTIZED:
            found = _packed(linear, shell.dtype, compression)
        else:
            W_OD = linear.unpack(0, shell.dtype)
            found = {"weight": W_OD.T.contiguous() if shell.family.is_transposed else W_OD}
        tensors.update(
            {shell.stored_name(f"{prefix}{name}.{key}"): value for key, value in found.items()}
        )
    return tensors


def _packed(
    linear: ExpandedLinear, dtype: torch.dtype, compression: CompressionConfig
) -> dict[str, torch.Tensor]:
    """Codes, scales and zero points as compressed-tensors names and packs them.

    A pruned weight gets its zero point as code, which is exactly 0.

    Args:
        linear: with one expert.
        dtype: of the scales.
        compression: with the groups of columns that are written.
    """
    pack_to_int32 = _pack_to_int32()
    expert = linear.experts[0]
    assert isinstance(expert, PackedExpert)
    layout, tensors = linear.layout, expert.tensors()
    assert linear.grid is not None and layout.bits is not None
    grid = linear.grid.grid()
    kept = unpack_kept(tensors, layout)
    zero = grid.zero_point_OG.to(torch.uint8)
    groups = torch.arange(layout.columns) // grid.group_size
    codes = zero[:, groups].masked_scatter_(
        kept, unpack_codes(tensors["codes"], layout.num_kept, layout.bits)
    )
    # compressed-tensors counts codes from -2^(bits - 1).
    offset = 1 << (layout.bits - 1)
    signed = (codes.to(torch.int16) - offset).to(torch.int8)
    # The group of the linear in which every group that is written lies.
    written = groups[:: compression.group_size or layout.columns]
    signed_zero = (zero.to(torch.int16) - offset).to(torch.int8)[:, written]
    found = {
        "weight_packed": pack_to_int32(signed, layout.bits),
        "weight_scale": grid.scale_OG.to(dtype)[:, written],
        "weight_shape": torch.tensor(layout.shape),
    }
    if not compression.symmetric:
        found["weight_zero_point"] = pack_to_int32(signed_zero, layout.bits, packed_dim=0)
    return found


def _pack_to_int32() -> Any:
    """The packing function of compressed-tensors, which is an optional dependency."""
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    except ImportError:
        raise ValueError(
            "--format pack-quantized needs compressed-tensors: pip install "
            "'sparse-expansion[export]'"
        ) from None
    return pack_to_int32


def _quantization_config(
    compression: CompressionConfig, groups: tuple[LinearGroup, ...]
) -> dict[str, Any]:
    """The ``quantization_config`` by which compressed-tensors finds and reads its linears."""
    grouped = compression.group_size is not None
    linears = [name for group in groups for name in group.linears]
    return {
        "quant_method": "compressed-tensors",
        "format": PACK_QUANTIZED,
        "quantization_status": "compressed",
        "ignore": [],
        "config_groups": {
            "group_0": {
                "targets": [f"re:.*{name.replace('.', '[.]')}$" for name in linears],
                "weights": {
                    "num_bits": compression.bits,
                    "type": "int",
                    "symmetric": compression.symmetric,
                    "strategy": "group" if grouped else "channel",
                    "group_size": compression.group_size,
                    "dynamic": False,
                },
            }
        },
    }
