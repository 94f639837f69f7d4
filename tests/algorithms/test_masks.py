"""Masks: by hand, against a sort, and exact counts where saliencies are equal."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_expansion.algorithms.kernels import decide
from sparse_expansion.algorithms.masks import (
    n_m_mask,
    ranks,
    score_mask,
    unstructured_mask,
)
from sparse_expansion.algorithms.pruners import wanda
from sparse_expansion.config import SparsityPattern

W = torch.tensor([[4.0, -1.0, 2.0, 3.0], [0.5, 6.0, -5.0, 1.0]])
# Norms of the inputs: 1, 10, 2, 1.
H = torch.diag(torch.tensor([1.0, 100.0, 4.0, 1.0])) + 0.5 * (1 - torch.eye(4))


def pattern(text):
    return SparsityPattern.parse(text)


def test_masks_by_hand():
    magnitude = score_mask(W.abs(), pattern("0.5"), 128, by_row=False)
    assert magnitude.tolist() == [[False, True, True, False], [True, False, False, True]]
    # The whole matrix for magnitude: one row may lose more than another.
    skewed = score_mask(W.abs() * torch.tensor([[1.0], [9.0]]), pattern("0.5"), 128, by_row=False)
    assert skewed.sum(dim=1).tolist() == [4, 0]
    worth = wanda.score(W, H)
    by_row = score_mask(worth, pattern("0.5"), 128, by_row=True)
    # 4 and 4 are equal in the first row: the first of them goes.
    assert by_row.tolist() == [[True, False, False, True], [True, False, False, True]]
    n_m = score_mask(worth, pattern("1:2"), 128, by_row=True)
    assert n_m.tolist() == [[True, False, False, True], [True, False, False, True]]


def test_a_count_that_does_not_divide_takes_the_cheapest_next_weights():
    # 3 of 8: one of every row, and one more where the next one is worth least.
    found = score_mask(W.abs(), pattern("0.375"), 128, by_row=True)
    assert found.tolist() == [[False, True, False, False], [True, False, False, True]]


def test_masks_with_ties():
    mask = unstructured_mask(torch.ones(2, 3, 4), 5)
    assert mask.sum(dim=(1, 2)).tolist() == [5, 5]
    assert mask[0].flatten().tolist() == [True] * 5 + [False] * 7
    mask = n_m_mask(torch.ones(1, 4, 3), 2)
    assert mask[0].T.tolist() == [[True, True, False, False]] * 3


@pytest.mark.parametrize("shape", [(300, 4, 500), (5, 3, 7), (2, 16, 5), (0, 4, 5)])
def test_n_m_mask_against_a_sort(shape):
    saliency = torch.randint(0, 3, shape).float()
    for pruned in range(shape[1] + 1):
        order = torch.argsort(saliency, dim=1, stable=True)
        expected = torch.zeros(shape, dtype=torch.bool).scatter_(1, order[:, :pruned], True)
        assert torch.equal(n_m_mask(saliency, pruned), expected)
        # What a GPU compares by.
        assert torch.equal(ranks(saliency) < pruned, expected)


def test_mask_count_out_of_bounds():
    with pytest.raises(ValueError, match="outside 0 to 4"):
        unstructured_mask(torch.ones(1, 2, 2), 5)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_compiled_selection_counts_exactly_with_ties(rows, columns, seed):
    generator = np.random.default_rng(seed)
    W = generator.integers(-2, 3, (columns, rows)).astype(np.float32)
    for num_pruned in range(1, rows * columns + 1):
        mask = np.full((columns, rows), 7, np.uint8)
        decide.prune_block(W, np.ones(columns, np.float32), num_pruned, mask)
        order = np.argsort((W**2).reshape(-1), kind="stable")[:num_pruned]
        assert set(np.flatnonzero(mask)) == set(order)
        assert int(mask.max()) == 1
