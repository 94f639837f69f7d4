"""A safetensors file in pieces, the tensors' own memory among them: nothing is copied to write one.

safetensors' own ``save`` puts the whole file together in memory, twice, which takes longer than a
GPU takes for what is in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

# In the order in which safetensors stores them: what wants the most alignment comes first.
_CODES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_PLACES = {dtype: place for place, dtype in enumerate(_CODES)}
_ALIGNMENT = 8
_METADATA = {"format": "pt"}


def file_pieces(tensors: Mapping[str, torch.Tensor]) -> list[memoryview]:
    """What a file holds, in order: its header, and the values of every tensor.

    Args:
        tensors: on the host and contiguous; not to be written to while the pieces are in use.

    Raises:
        ValueError: a tensor has a dtype that no file of ours has.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _CODES:
            raise ValueError(f"{name} is {tensor.dtype}, which is not one of {[*_CODES]}")
    names = sorted(tensors, key=lambda name: (_PLACES[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": _METADATA}
    begin = 0
    for name in names:
        tensor = tensors[name]
        end = begin + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = memoryview(len(text).to_bytes(8, "little") + text)
    return [start, *(tensor_bytes(tensors[name]) for name in names)]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host: little-endian values, as files have them."""
    flat = tensor.detach().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
