import math

import pytest
import torch

from sparse_expansion.algorithms.perplexity import window_nll
from sparse_expansion.types import NllSum


def test_by_hand():
    # Two words, logits ln 3 apart: the likelier has probability 3/4.
    logits = torch.tensor([[[math.log(3.0), 0.0]] * 3])
    (found,) = window_nll(logits, torch.tensor([[1, 0, 1]]))
    assert found.num_tokens == 2
    assert found.total == pytest.approx(-math.log(0.75) - math.log(0.25))


def test_perplexity_is_the_exponential_of_the_mean_over_equal_windows():
    logits, tokens = torch.randn(4, 6, 11), torch.randint(0, 11, (4, 6))
    parts = window_nll(logits, tokens)
    whole = sum(parts, NllSum(0.0, 0))
    means = [
        torch.nn.functional.cross_entropy(logit[:-1].double(), token[1:]).item()
        for logit, token in zip(logits, tokens, strict=True)
    ]
    assert whole.perplexity == pytest.approx(math.exp(sum(means) / 4), rel=1e-6)


def test_uniform_logits_give_the_vocabulary_size():
    (found,) = window_nll(torch.zeros(1, 5, 17), torch.zeros(1, 5, dtype=torch.int64))
    assert found.perplexity == pytest.approx(17, rel=1e-6)


def test_too_short():
    with pytest.raises(ValueError, match="at least 2 tokens"):
        window_nll(torch.zeros(1, 1, 3), torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="no tokens"):
        _ = NllSum(0.0, 0).perplexity
