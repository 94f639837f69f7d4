"""Exchanges of zeros: by hand, against every mask there is, and against their own formulas."""

import itertools

import pytest
import torch

from sparse_expansion.algorithms import exchanges
from sparse_expansion.algorithms.exchanges import (
    Curvatures,
    Fit,
    LeastSquares,
    exchange_products,
    exchange_zeros,
)
from sparse_expansion.algorithms.pruners.admm import solve_under_zeros
from sparse_expansion.algorithms.spectrum import leading_vectors, takes_subspace_iteration
from sparse_expansion.config import SparsityPattern

FREE, TWO_OF_FOUR = SparsityPattern(fraction=0.5), SparsityPattern.parse("2:4")


def hessians(experts, width, seed=0, damping=0.1):
    """With unit energies, damped, of a few strong directions."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator) * torch.logspace(0.7, -0.7, width)
    X = torch.randn(experts, 8 * width, width, generator=generator) @ mixed.T
    H = X.mT @ X
    energy = H.diagonal(dim1=1, dim2=2).sqrt()
    A = H / energy[:, :, None] / energy[:, None]
    A.diagonal(dim1=1, dim2=2).add_(damping)
    return A


def errors(A, W, V):
    """Of every row, in float64."""
    E = (W - V).double()
    return (E * (A.double() @ E)).sum(dim=1)


def least_squares(A, w, kept):
    """The best weights of one row under a mask, and their error, in float64."""
    A, w = A.double(), w.double()
    chosen = torch.nonzero(kept).flatten()
    found = torch.zeros_like(w)
    found[chosen] = torch.linalg.solve(A[chosen][:, chosen], A[chosen] @ w)
    missing = w - found
    return found, float(missing @ A @ missing)


def exchanged(A, W, V, pattern, rounds, penalty=1.0):
    inverse = torch.linalg.inv(A + penalty * torch.eye(A.shape[1]))
    return exchange_zeros(
        V.clone(),
        V != 0,
        W,
        squares=LeastSquares(A, "float32"),
        curvatures=Curvatures(inverse, penalty, pattern),
        rounds=rounds,
    )


def started(W, pattern, seed=0):
    """A mask that nobody looked for: zeros anywhere in every row, or two of every four."""
    size = pattern.group or W.shape[1]
    noise = torch.rand(W.shape, generator=torch.Generator().manual_seed(seed))
    experts, width, rows = W.shape
    ranks = noise.view(experts, width // size, size, rows).argsort(dim=2).argsort(dim=2)
    return W.masked_fill((ranks < size // 2).view(W.shape), 0)


def test_independent_inputs_by_hand():
    """The two largest of four are kept, whatever was kept before, in one round."""
    W = torch.tensor([[5.0, 1.0, 4.0, 2.0], [1.0, 2.0, 3.0, 4.0]]).T[None]
    kept = torch.tensor([[False, True, False, True], [True, True, False, False]]).T[None]
    A = torch.eye(4)[None]
    V, mask = exchanged(A, W, W * kept, FREE, 1)
    wanted = torch.tensor([[5.0, 0.0, 4.0, 0.0], [0.0, 0.0, 3.0, 4.0]])
    torch.testing.assert_close(V[0].T, wanted)
    assert torch.equal(mask[0].T, wanted != 0)


def test_groups_exchange_one_pair_at_a_time_by_hand():
    """Two of four: the pair that gains the most goes first, and the next round has the other."""
    W = torch.tensor([[5.0, 1.0, 4.0, 2.0]]).T[None]
    kept = torch.tensor([[False, True, False, True]]).T[None]
    A = torch.eye(4)[None]
    once, _ = exchanged(A, W, W * kept, TWO_OF_FOUR, 1)
    assert once[0].T.tolist() == [[5.0, 0.0, 0.0, 2.0]]
    twice, mask = exchanged(A, W, W * kept, TWO_OF_FOUR, 2)
    assert twice[0].T.tolist() == [[5.0, 0.0, 4.0, 0.0]]
    assert mask[0].T.tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("pattern", [FREE, TWO_OF_FOUR], ids=str)
def test_what_an_exchange_is_worth_by_hand(pattern):
    """Against the change of a row's error where all other features follow under the penalty."""
    A, penalty = hessians(1, 8, seed=3), 1.0
    W = torch.randn(1, 8, 3, generator=torch.Generator().manual_seed(1))
    V = started(W, pattern)
    r = A @ (W - V)
    curvatures = Curvatures(torch.linalg.inv(A + penalty * torch.eye(8)), penalty, pattern)
    found = curvatures.candidates(Fit(V, V != 0, r, errors(A, W, V).float()), 2)
    assert found.gain_KCO.shape[1] == 2
    for row in range(3):
        for c in range(2):
            out, in_ = int(found.out_KCO[0, c, row]), int(found.in_KCO[0, c, row])
            assert V[0, out, row] != 0 and V[0, in_, row] == 0
            columns = [out, in_] if pattern.group else None
            if pattern.group:
                assert out // 4 == in_ // 4
            gain = 0.0
            change = [-float(V[0, out, row]), float(found.value_KCO[0, c, row])]
            for part in [columns] if columns else [[out], [in_]]:
                others = [j for j in range(8) if j not in part]
                B = A[0].double()
                follow = torch.linalg.inv(B[others][:, others] + penalty * torch.eye(len(others)))
                curve = B[part][:, part] - B[part][:, others] @ follow @ B[others][:, part]
                step = torch.tensor(change if columns else [change[part == [in_]]]).double()
                gain += float(2 * step @ r[0, part, row].double() - step @ curve @ step)
            assert float(found.gain_KCO[0, c, row]) == pytest.approx(gain, rel=1e-4)
    assert (found.gain_KCO[:, 0] >= found.gain_KCO[:, 1]).all()


@pytest.mark.parametrize("pattern", [FREE, TWO_OF_FOUR], ids=str)
def test_close_to_the_best_of_all_masks(pattern):
    """Rows of eight weights, half of them: every mask with its least squares, in float64."""
    A = hessians(1, 8, seed=5)
    W = torch.randn(1, 8, 24, generator=torch.Generator().manual_seed(2))
    V = started(W, pattern)
    found, mask = exchanged(A, W, V, pattern, 12)
    best = torch.full((24,), torch.inf, dtype=torch.float64)
    for chosen in itertools.combinations(range(8), 4):
        kept = torch.zeros(8, dtype=torch.bool)
        kept[list(chosen)] = True
        if pattern.group and kept[:4].sum() != 2:
            continue
        for row in range(24):
            best[row] = min(best[row], least_squares(A[0], W[0, :, row], kept)[1])
    ratio = errors(A, W, found)[0] / best
    assert (ratio > 1 - 1e-4).all()
    # More than half of the rows end with the best mask of all, where hardly one started near it.
    assert float(ratio.median()) < 1.001 and float(ratio.mean()) < 1.5
    before = [least_squares(A[0], W[0, :, row], V[0, :, row] != 0)[1] for row in range(24)]
    assert float((torch.tensor(before) / best).median()) > 2
    assert torch.equal(mask, found != 0)


@pytest.mark.parametrize("pattern", [FREE, TWO_OF_FOUR, SparsityPattern.parse("4:8")], ids=str)
@pytest.mark.parametrize("width", [40, 200])
def test_rows_keep_their_zeros_and_lose_no_more_than_before(pattern, width):
    """Where the others are at their least squares for the mask that the exchanges end with."""
    A = hessians(2, width)
    W = torch.randn(2, width, 30, generator=torch.Generator().manual_seed(1))
    V = started(W, pattern)
    before, last = errors(A, W, V), None
    for rounds in (0, 1, 4, 12):
        found, mask = exchanged(A, W, V, pattern, rounds)
        after = errors(A, W, found)
        assert (after <= before * (1 + 1e-5)).all()
        assert torch.equal(mask.sum(dim=1), (V != 0).sum(dim=1))
        assert not found[~mask].any()
        if pattern.group:
            grouped = mask.view(2, -1, pattern.group, 30)
            assert (grouped.sum(dim=2) == pattern.group // 2).all()
        assert last is None or float(after.sum()) < last
        last = float(after.sum())
    own = [
        least_squares(A[k], W[k, :, row], mask[k, :, row])[1] for k in range(2) for row in range(30)
    ]
    assert last == pytest.approx(sum(own), rel=1e-2)


@pytest.mark.parametrize(("sparsity", "share"), [("0.5", 0.98), ("0.7", 0.99), ("2:4", 0.97)])
def test_the_solver_ends_with_less_error(sparsity, share):
    """For N:M less than with more iterations, as many as have the products of the exchanges."""
    pattern = SparsityPattern.parse(sparsity)
    generator = torch.Generator().manual_seed(4)
    mixed = torch.randn(96, 96, generator=generator) * torch.logspace(0.7, -0.7, 96)
    X = torch.randn(1, 900, 96, generator=generator) @ mixed.T
    H, W = X.mT @ X, torch.randn(1, 96, 64, generator=generator)
    pruned = round(96 * 64 * pattern.fraction)

    def lost(iterations, rounds):
        V, kept = solve_under_zeros(
            W,
            H,
            pattern=pattern,
            num_pruned=pruned,
            damping_fraction=0.2,
            iterations=iterations,
            exchanges=rounds,
        )
        assert int((~kept).sum()) == pruned and not V[~kept].any()
        energy = H.diagonal(dim1=1, dim2=2)
        damped = H + torch.diag_embed(0.2 * energy)
        return float(errors(damped, W, V).sum())

    assert exchange_products(3) == 16 and exchange_products(0) == 0
    assert lost(10, 3) < share * lost(10, 0)
    assert pattern.group is None or lost(10, 3) < 0.98 * lost(26, 0)


def test_nothing_to_exchange():
    """Rows without kept weights, without zeros, without error; features that no token used."""
    A = hessians(1, 16)
    W = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(1))
    W[:, 3] = 0
    V = W.clone()
    V[0, :, 1] = 0
    V[0, ::2, 2] = 0
    kept = V != 0
    kept[0, :, 3] = True
    inverse = torch.linalg.inv(A + torch.eye(16))
    found, mask = exchange_zeros(
        V.clone(),
        kept,
        W,
        squares=LeastSquares(A, "float32"),
        curvatures=Curvatures(inverse, 1.0, FREE),
        rounds=4,
    )
    assert torch.equal(mask.sum(dim=1), kept.sum(dim=1)) and found.isfinite().all()
    for row in (0, 1, 3):
        assert torch.equal(found[0, :, row], V[0, :, row])
    assert not mask[0, 3, :3].any()
    for width in (1, 3):
        narrow = torch.tensor([[1.0, 0.0]]).expand(1, width, 2)
        for pattern in (FREE, TWO_OF_FOUR):
            one, _ = exchanged(torch.eye(width)[None], narrow, narrow, pattern, 2)
            assert torch.equal(one, narrow)


def test_few_steps_are_enough_because_large_eigenvalues_are_taken_out(monkeypatch):
    """The least squares of a given mask after three steps, with and without."""
    A = hessians(1, 160, damping=0.2)
    W = torch.randn(1, 160, 16, generator=torch.Generator().manual_seed(1))
    V = started(W, FREE)
    least = sum(least_squares(A[0], W[0, :, row], V[0, :, row] != 0)[1] for row in range(16))

    def beyond(vectors):
        monkeypatch.setattr(exchanges, "NUM_VECTORS", vectors)
        found, _ = exchanged(A, W, V, FREE, 0)
        return float(errors(A, W, found).sum()) / least - 1

    assert 0 < beyond(16) < 0.3 * beyond(1)


def test_by_parts_the_errors_are_the_same():
    """Not the exchanges one by one: rough steps let rows go other ways to the same end."""
    A = hessians(8, 64)
    W = torch.randn(8, 64, 20, generator=torch.Generator().manual_seed(1))
    V = started(W, TWO_OF_FOUR)
    curvatures = Curvatures(torch.linalg.inv(A + torch.eye(64)), 1.0, TWO_OF_FOUR)
    made = {
        products: exchange_zeros(
            V.clone(),
            V != 0,
            W,
            squares=LeastSquares(A, products),
            curvatures=curvatures,
            rounds=12,
        )
        for products in ("float32", "bfloat16x3")
    }
    whole, parts = (float(errors(A, W, found).sum()) for found, _ in made.values())
    assert parts == pytest.approx(whole, rel=1e-2)


@pytest.mark.parametrize("width", [12, 120])
def test_leading_vectors_against_the_whole_decomposition(width):
    A = hessians(1, width, seed=2)[0]
    assert takes_subspace_iteration(width, 4) == (width == 120)
    values, vectors = leading_vectors(A, 4)
    wanted = torch.linalg.eigvalsh(A.double())[-4:]
    torch.testing.assert_close(values.double(), wanted, rtol=1e-3, atol=0)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(A @ vectors, vectors * values, rtol=0, atol=0.02 * float(values[-1]))
