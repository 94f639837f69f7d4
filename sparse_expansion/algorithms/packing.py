"""Compact storage of an expert: a bitmask of the kept weights and their values or codes.

All bit streams are little-endian: bit ``i`` of a stream is bit ``i % 8`` of byte ``i // 8``.
Weights are taken row by row. ``docs/format.md`` is the specification.
"""

from __future__ import annotations

import numpy as np
import torch

from sparse_expansion.algorithms.quantization import AffineGrid, dequantize


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` fields of ``bits`` bits."""
    return -(-count * bits // 8)


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Bool tensor -> uint8 stream of ``ceil(numel / 8)`` bytes."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1), bitorder="little"))


def unpack_mask(stream: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Inverse of ``pack_mask``.

    Raises:
        ValueError: the stream's length does not fit the shape.
    """
    count = int(np.prod(shape))
    _check_length(stream, packed_bytes(count, 1))
    bits = np.unpackbits(stream.cpu().numpy(), count=count, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).reshape(shape)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes below ``2^bits`` -> dense stream of ``bits``-bit fields."""
    flat = codes.cpu().numpy().reshape(-1)
    if bits == 8:
        return torch.from_numpy(flat.copy())
    if bits == 4:
        padded = np.zeros(len(flat) + len(flat) % 2, dtype=np.uint8)
        padded[: len(flat)] = flat
        return torch.from_numpy(padded[0::2] | (padded[1::2] << 4))
    fields = np.unpackbits(flat[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(fields.reshape(-1), bitorder="little"))


def unpack_codes(stream: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """Inverse of ``pack_codes`` (uint8, flat).

    Raises:
        ValueError: the stream's length does not fit the count.
    """
    _check_length(stream, packed_bytes(count, bits))
    data = stream.cpu().numpy()
    if bits == 8:
        return torch.from_numpy(data[:count].copy())
    if bits == 4:
        out = np.empty(2 * len(data), dtype=np.uint8)
        out[0::2] = data & 15
        out[1::2] = data >> 4
        return torch.from_numpy(out[:count].copy())
    fields = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    return torch.from_numpy(np.packbits(fields, axis=1, bitorder="little").reshape(-1))


def _check_length(stream: torch.Tensor, expected: int) -> None:
    if stream.numel() != expected:
        raise ValueError(f"packed stream has {stream.numel()} bytes, {expected} expected")


def pack_expert(
    weight_OD: torch.Tensor,
    kept_OD: torch.Tensor,
    codes_OD: torch.Tensor | None,
    *,
    sparse: bool,
    bits: int | None,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Named tensors of one expert.

    Sparse experts have ``bitmask``; values are ``values`` (``dtype``) or, when quantized, ``codes``
    (packed). Only kept weights have values or codes.
    """
    tensors: dict[str, torch.Tensor] = {}
    if sparse:
        tensors["bitmask"] = pack_mask(kept_OD)
    if bits is None:
        values = weight_OD[kept_OD] if sparse else weight_OD.reshape(-1)
        tensors["values"] = values.to(dtype).cpu()
    else:
        assert codes_OD is not None
        codes = codes_OD[kept_OD] if sparse else codes_OD.reshape(-1)
        tensors["codes"] = pack_codes(codes, bits)
    return tensors


def unpack_expert(
    tensors: dict[str, torch.Tensor],
    shape: tuple[int, int],
    *,
    grid: AffineGrid | None,
    num_kept: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The dense weight ``[O, D]`` of one expert in ``dtype``: the inverse of ``pack_expert``.

    Args:
        tensors: as ``pack_expert`` named them.
        shape: O, D.
        grid: the linear's grid when the expert is quantized.
        num_kept: kept weights, to find the end of the code stream.
        dtype: of the result.
        device: of the result.

    Raises:
        ValueError: a stream's length does not fit the shape, or mask and values disagree.
    """
    if grid is None:
        values = tensors["values"].to(device=device, dtype=dtype)
    else:
        codes = unpack_codes(tensors["codes"], num_kept, grid.bits)
    mask = None
    if "bitmask" in tensors:
        mask = unpack_mask(tensors["bitmask"], shape)
        if int(mask.sum()) != num_kept:
            raise ValueError(f"bitmask keeps {int(mask.sum())} weights, {num_kept} expected")
    if grid is None:
        if mask is None:
            return values.reshape(shape).clone()
        dense = torch.zeros(shape, dtype=dtype, device=device)
        return dense.masked_scatter_(mask.to(device), values)
    codes = codes.to(device)
    if mask is None:
        full = codes.reshape(shape)
    else:
        mask = mask.to(device)
        full = torch.zeros(shape, dtype=torch.uint8, device=device).masked_scatter_(mask, codes)
    columns = torch.arange(shape[1], device=device)
    scale_DO, zero_DO = grid.columns(columns)
    dense = dequantize(full.float(), scale_DO.T.to(device), zero_DO.T.to(device))
    if mask is not None:
        dense.masked_fill_(~mask, 0)
    return dense.to(dtype)
