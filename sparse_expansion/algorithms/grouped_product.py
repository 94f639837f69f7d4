"""One product over unpacked experts on a GPU: every token with its own expert's dense weight.

Shapes: T tokens, D input features, O output features, K experts, E of them that are unpacked.
"""

from __future__ import annotations

import torch


def multiply_dense(
    X_TD: torch.Tensor,
    W_EOD: torch.Tensor,
    bias_KO: torch.Tensor | None,
    order_T: torch.Tensor,
    ends_K: torch.Tensor,
    out_SO: torch.Tensor,
    *,
    first: int = 0,
) -> None:
    """Write ``W_k x`` with the bias for the tokens of some experts: one product over all of them.

    Args:
        X_TD: all tokens.
        W_EOD: the weights of E experts, of the tokens' dtype.
        bias_KO: of all experts; rows may be one and the same memory.
        order_T: sorts tokens by expert (int64).
        ends_K: where each expert's tokens end in that order (int64), of all experts.
        out_SO: is written where the experts' tokens are, S = T + 1: what the last row holds then
            is nobody's.
        first: the first of the experts.
    """
    from sparse_expansion.algorithms.kernels import triton_grouped as kernel

    count, rows, columns = W_EOD.shape
    if takes_grouped_product(W_EOD):
        _multiply_by_pytorch(X_TD, W_EOD, bias_KO, order_T, ends_K, out_SO, first)
        return
    tiles = -(-len(X_TD) // kernel.TILE_TOKENS) + count
    kernel.multiply_grouped[(tiles, -(-rows // kernel.TILE_ROWS))](
        X_TD.contiguous(),
        W_EOD,
        out_SO,
        out_SO if bias_KO is None else bias_KO,
        order_T,
        ends_K,
        first,
        count,
        O=rows,
        D=columns,
        BIAS_STRIDE=-1 if bias_KO is None else bias_KO.stride(0),
        EXPERTS=1 << max(0, count - 1).bit_length(),
        TILE_TOKENS=kernel.TILE_TOKENS,
        TILE_ROWS=kernel.TILE_ROWS,
        TILE_COLUMNS=kernel.TILE_COLUMNS,
    )


def _multiply_by_pytorch(
    X_TD: torch.Tensor,
    W_EOD: torch.Tensor,
    bias_KO: torch.Tensor | None,
    order_T: torch.Tensor,
    ends_K: torch.Tensor,
    out_SO: torch.Tensor,
    first: int,
) -> None:
    """``multiply_dense`` by PyTorch's product over groups of rows, which begin at the first row."""
    tokens, count = len(X_TD), len(W_EOD)
    place_T = torch.arange(tokens, device=X_TD.device)
    ends_E = ends_K[first : first + count]
    if count < len(ends_K):
        # The tokens of these experts come first, and after their last end nothing is multiplied.
        begin = ends_K[first - 1] if first else torch.zeros_like(ends_K[0])
        ends_E = ends_E - begin
        order_T = order_T[(place_T + begin) % tokens]
    product_TO = torch.nn.functional.grouped_mm(
        X_TD[order_T], W_EOD.transpose(1, 2), offs=ends_E.to(torch.int32)
    )
    if bias_KO is not None and bias_KO.stride(0) == 0:
        # One that all share need not be copied for every token.
        product_TO = product_TO + bias_KO[0]
    elif bias_KO is not None:
        expert_T = torch.bucketize(place_T, ends_E, right=True).clamp_(max=count - 1)
        product_TO = product_TO + bias_KO[first + expert_T]
    if count < len(ends_K):
        order_T = torch.where(place_T < ends_E[-1], order_T, tokens)
    out_SO[order_T] = product_TO


def takes_grouped_product(W_EOD: torch.Tensor) -> bool:
    """Whether PyTorch multiplies by such weights in one product: on GPUs from Hopper on."""
    _, rows, columns = W_EOD.shape
    return (
        W_EOD.is_cuda
        and W_EOD.dtype == torch.bfloat16
        and hasattr(torch.nn.functional, "grouped_mm")
        and torch.cuda.get_device_capability(W_EOD.device) >= (9, 0)
        # Rows of both begin at multiples of 16 bytes.
        and rows % 8 == 0
        and columns % 8 == 0
    )
