"""Exact selection of the smallest, without a sort and without a stop at the host.

Shapes: K experts, N values of each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

VALUE_BITS = 31
"""Bits of a float32 that is not negative; as whole numbers they are ordered as the values are."""


def smallest_mask(values_KN: torch.Tensor, count: int) -> torch.Tensor:
    """True at the ``count`` smallest of every row; among equal ones those with the lowest index.

    Args:
        values_KN: float32, none negative or NaN.
        count: from 0 to N.

    Raises:
        ValueError: ``count`` is out of bounds.
    """
    width = values_KN.shape[1]
    if not 0 <= count <= width:
        raise ValueError(f"num_pruned {count} is outside 0 to {width}")
    if count in (0, width):
        return torch.full_like(values_KN, count == width, dtype=torch.bool)
    bits_KN = values_KN.contiguous().view(torch.int32)
    find = (triton_smallest() if values_KN.is_cuda else None) or smallest
    return find(bits_KN, count)


def smallest(bits_KN: torch.Tensor, count: int) -> torch.Tensor:
    """The mask of the ``count`` smallest of every row of int32 numbers that are not negative.

    Bit by bit from the highest: a bit is set if too few numbers lie below with it set. That finds
    the last number that is taken; of its equals the first ones are.
    """
    last_K1 = bits_KN.new_zeros(len(bits_KN), 1)
    for bit in reversed(range(VALUE_BITS)):
        higher_K1 = last_K1 | (1 << bit)
        below_K1 = (bits_KN < higher_K1).sum(dim=1, keepdim=True, dtype=torch.int32)
        last_K1 = torch.where(below_K1 < count, higher_K1, last_K1)
    mask_KN = bits_KN < last_K1
    missing_K1 = count - mask_KN.sum(dim=1, keepdim=True, dtype=torch.int32)
    ties_KN = bits_KN == last_K1
    return mask_KN.logical_or_(ties_KN & (ties_KN.cumsum(dim=1, dtype=torch.int32) <= missing_K1))


def triton_smallest() -> Callable[[torch.Tensor, int], torch.Tensor] | None:
    """Triton's kernels, where Triton is installed: they look at the numbers six times, not 34."""
    try:
        from sparse_expansion.algorithms.kernels.triton_select import smallest
    except ImportError:
        return None
    return smallest
