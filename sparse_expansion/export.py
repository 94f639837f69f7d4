"""An expanded folder with one expert per linear, as a folder that other tools read.

``dense`` is a plain Hugging Face folder (zeros stored). ``pack-quantized`` is the format of
compressed-tensors, for experts that are quantized: its own library packs the codes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparse_expansion.algorithms.packing import unpack_codes, unpack_kept
from sparse_expansion.jobs import is_companion
from sparse_expansion.model.expansion import ExpandedLinear, PackedExpert
from sparse_expansion.model.families import LinearGroup
from sparse_expansion.model.manifest import verify
from sparse_expansion.model.streaming import INDEX_NAME, ModelShell
from sparse_expansion.store import Store

FORMATS = ("dense", "pack-quantized")


def export(folder: Path, output: str, form: str) -> dict[str, Any]:
    """Write the one expert of every linear to ``output``, a block at a time.

    Args:
        folder: a finished expanded folder with one cluster.
        output: a new or empty folder (or URL).
        form: ``dense`` or ``pack-quantized``.

    Returns:
        What was written: format, files, bytes.

    Raises:
        ValueError: more than one cluster, ``pack-quantized`` without quantization or without
            compressed-tensors, an output that is not empty, or a damaged folder.
    """
    shell = ModelShell(folder)
    if shell.expansion is None:
        raise ValueError(f"{folder} is not an expanded model: there is nothing to export")
    routing = shell.expansion.routing_config()
    if routing.most_clusters != 1:
        raise ValueError(
            f"{folder} has {routing.most_clusters} experts per linear, and other formats have room "
            "for one: export a model made with --num_clusters 1"
        )
    compression = shell.expansion.compression_config()
    packing = form == "pack-quantized"
    if packing:
        if compression.bits is None:
            raise ValueError(f"{folder} is not quantized: export it with --format dense")
        _pack_to_int32()
    store = Store(output)
    if store.list(""):
        raise ValueError(f"--output {output} is not empty: choose another folder")
    verify(folder)
    weight_map: dict[str, str] = {}
    total = 0

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        store.write_tensors(file, tensors)
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    blocks = tuple(shell.block_prefix(layer) for layer in range(shell.num_blocks))
    names = [name for name in shell.trunk_names() if not name.startswith(blocks)]
    write("model-trunk.safetensors", {shell.stored_name(name): shell.read(name) for name in names})
    for layer in range(shell.num_blocks):
        prefix = shell.block_prefix(layer)
        block = shell.load_block(layer)
        expanded = {
            name: module
            for name, module in block.named_modules()
            if isinstance(module, ExpandedLinear)
        }
        tensors = {
            prefix + name: tensor
            for name, tensor in block.state_dict().items()
            if not any(name.startswith(f"{linear}.") for linear in expanded)
        }
        for name, linear in expanded.items():
            if linear.bias is not None:
                tensors[f"{prefix}{name}.bias"] = linear.bias
            if packing:
                found = _packed(linear, shell.dtype, symmetric=compression.symmetric)
            else:
                found = {"weight": linear.unpack(0, shell.dtype)}
            tensors.update({f"{prefix}{name}.{key}": value for key, value in found.items()})
        write(f"model-block-{layer:05d}.safetensors", tensors)
    store.write_json(INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for path in sorted(folder.iterdir()):
        if path.is_file() and is_companion(path.name):
            store.write_bytes(path.name, path.read_bytes())
    config = shell.config.to_dict()
    config.pop("quantization_config", None)
    if packing:
        config["quantization_config"] = _quantization_config(shell, shell.family.groups)
    store.write_json("config.json", config)
    return {"format": form, "output": output, "bytes": total, "tensors": len(weight_map)}


def _packed(
    linear: ExpandedLinear, dtype: torch.dtype, *, symmetric: bool
) -> dict[str, torch.Tensor]:
    """Codes, scales and zero points as compressed-tensors names and packs them.

    A pruned weight gets its zero point as code, which is exactly 0.
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
    signed_zero = (zero.to(torch.int16) - offset).to(torch.int8)
    found = {
        "weight_packed": pack_to_int32(signed, layout.bits),
        "weight_scale": grid.scale_OG.to(dtype),
        "weight_shape": torch.tensor(layout.shape),
    }
    if not symmetric:
        found["weight_zero_point"] = pack_to_int32(signed_zero, layout.bits, packed_dim=0)
    return found


def _pack_to_int32() -> Any:
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    except ImportError:
        raise ValueError(
            "--format pack-quantized needs compressed-tensors: pip install "
            "'sparse-expansion[export]'"
        ) from None
    return pack_to_int32


def _quantization_config(shell: ModelShell, groups: tuple[LinearGroup, ...]) -> dict[str, Any]:
    assert shell.expansion is not None
    compression = shell.expansion.compression_config()
    grouped = compression.group_size is not None
    linears = [name for group in groups for name in group.linears]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
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
