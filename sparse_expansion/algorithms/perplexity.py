"""Token negative log-likelihoods, summed; sums and counts travel, means never."""

from __future__ import annotations

import torch

from sparse_expansion.types import NllSum


def window_nll(logits_NLV: torch.Tensor, tokens_NL: torch.Tensor) -> list[NllSum]:
    """Summed NLL (nats) of each window's ``L - 1`` next tokens.

    Perplexity is then ``exp(sum / count)``: with windows of one length this is the protocol of
    GPTQ and SparseGPT, the exponential of the mean over windows of the mean token NLL.

    Args:
        logits_NLV: any floating dtype; scored in float32.
        tokens_NL: the windows' token ids.

    Raises:
        ValueError: a window has fewer than two tokens.
    """
    if tokens_NL.shape[1] < 2:
        raise ValueError("a window needs at least 2 tokens to score 1: raise --seqlen")
    sums = []
    for logits_LV, tokens_L in zip(logits_NLV, tokens_NL, strict=True):
        # A window at a time: float32 logits of a large vocabulary are the peak of an evaluation.
        nll_L = torch.nn.functional.cross_entropy(
            logits_LV[:-1].float(), tokens_L[1:], reduction="none"
        )
        sums.append(NllSum(float(nll_L.double().sum()), nll_L.numel()))
    return sums
