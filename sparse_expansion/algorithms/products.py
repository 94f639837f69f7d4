"""Large products of float32 matrices, as the solver and the sweep take them.

A float32 number is, to 16 bits, the sum of two of bfloat16: its rounding, and the rounding of the
rest. Of the four products of such parts the three that count are exact in float32 and summed in
float32, by tensor cores on a GPU: a third of the time of a float32 product there, and errors of
2^-17 of the terms in place of 2^-24. On a CPU the same numbers are multiplied in float32.

Shapes: K experts, M rows, D inner features, N columns.
"""

from __future__ import annotations

import torch

from sparse_expansion.config import AUTO_PRODUCTS, BFLOAT16X3

COLUMNS = 4096
"""Columns of the right factor that are split and multiplied at a time."""


class LeftFactor:
    """A left factor ``[K, M, D]`` of one or several products."""

    def __init__(self, A_KMD: torch.Tensor, products: str) -> None:
        """Split it, where products are to be taken by parts; it is not kept then.

        Args:
            A_KMD: float32.
            products: ``float32``, ``bfloat16x3``, or ``auto`` for the latter on a GPU.
        """
        self._whole: torch.Tensor | None = A_KMD
        if takes_parts(products, A_KMD):
            self._whole, self._parts = None, _parts(A_KMD)

    def times(self, B_KDN: torch.Tensor) -> torch.Tensor:
        """The product ``[K, M, N]`` with a float32 right factor."""
        if self._whole is not None:
            return self._whole @ B_KDN
        high_KMD, low_KMD = self._parts
        rows, columns = high_KMD.shape[1], B_KDN.shape[2]
        out_KMN = B_KDN.new_empty(len(B_KDN), rows, columns)
        for k, B_DN in enumerate(B_KDN):
            for start in range(0, columns, COLUMNS):
                high_DN, low_DN = _parts(B_DN[:, start : start + COLUMNS])
                # The small terms first: they are not lost against the large.
                found_MN = exact_terms(low_KMD[k], high_DN)
                found_MN += exact_terms(high_KMD[k], low_DN)
                found_MN += exact_terms(high_KMD[k], high_DN)
                out_KMN[k, :, start : start + COLUMNS] = found_MN
        return out_KMN


def product(A_MD: torch.Tensor, B_DN: torch.Tensor, products: str) -> torch.Tensor:
    """The product of two float32 matrices, see ``LeftFactor``."""
    if takes_parts(products, A_MD):
        return LeftFactor(A_MD[None], products).times(B_DN[None])[0]
    return A_MD @ B_DN


def takes_parts(products: str, A_KMD: torch.Tensor) -> bool:
    """Whether products with this factor are taken by parts in bfloat16."""
    if products == AUTO_PRODUCTS:
        return A_KMD.is_cuda and _has_product()
    return products == BFLOAT16X3


def _parts(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A float32 tensor's rounding to bfloat16, and the rounding of what is left."""
    high = A.to(torch.bfloat16)
    return high, (A - high).to(torch.bfloat16)


def has_float32_sums(A: torch.Tensor) -> bool:
    """Whether a GPU multiplies such factors many times as fast as float32, with float32 sums."""
    return A.is_cuda and A.dtype in (torch.bfloat16, torch.float16) and _has_product()


def _has_product() -> bool:
    """Whether PyTorch has such products: from 2.8 on."""
    return "dtype" in torch.ops.aten.mm.overloads()


def exact_terms(A_MD: torch.Tensor, B_DN: torch.Tensor) -> torch.Tensor:
    """A product of factors of half precision: its terms are exact in float32, and summed in it."""
    if has_float32_sums(A_MD):
        return torch.mm(A_MD, B_DN, out_dtype=torch.float32)
    return A_MD.float() @ B_DN.float()
