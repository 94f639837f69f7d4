import numpy as np
import pytest
import torch

from sparse_expansion.algorithms import hessian, products
from sparse_expansion.algorithms.hessian import (
    MAX_DAMPING_ATTEMPTS,
    hessian_sum,
    merge_hessians,
    merge_moments,
    moment_sum,
    regularise_hessian,
    shrink,
    upper_cholesky_factor,
)
from sparse_expansion.config import CompressionConfig
from sparse_expansion.types import CompressionError, HessianSum


def test_sum_by_hand():
    found = hessian_sum(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    assert found.num_tokens == 2
    assert found.sum_DD.tolist() == [[10.0, -1.0], [-1.0, 5.0]]


def test_half_precision_on_a_gpu_takes_tensor_cores(monkeypatch):
    """With a product in PyTorch's place: a CPU has none of bfloat16 that sums in float32."""
    X, residual = torch.randn(30, 5).bfloat16(), torch.randn(30, 5).bfloat16()
    wanted = hessian_sum(X, residual)
    asked = []

    def product(A, B, *, out_dtype):
        asked.append((A.dtype, B.dtype, out_dtype))
        return (A.double() @ B.double()).to(out_dtype)

    assert not products.has_float32_sums(X)
    for module in (hessian, products):
        monkeypatch.setattr(module, "has_float32_sums", lambda X: True)
    monkeypatch.setattr(torch, "mm", product)
    found = hessian_sum(X, residual)
    assert asked == [(torch.bfloat16, torch.bfloat16, torch.float32)] * 2
    torch.testing.assert_close(found.sum_DD, wanted.sum_DD)
    torch.testing.assert_close(found.cross_DD, wanted.cross_DD)


def test_merging_shards_of_unequal_size_is_the_sum_not_the_mean():
    X = torch.randn(37, 6)
    whole = hessian_sum(X)
    merged = merge_hessians([hessian_sum(X[:5]), hessian_sum(X[5:30]), hessian_sum(X[30:])])
    assert merged.num_tokens == 37
    torch.testing.assert_close(merged.sum_DD, whole.sum_DD)


def test_merge_leaves_its_inputs_alone_and_refuses_nothing():
    first = hessian_sum(torch.ones(1, 2))
    merge_hessians([first, first])
    assert first.sum_DD.tolist() == [[1, 1], [1, 1]]
    with pytest.raises(ValueError, match="no Hessian sums"):
        merge_hessians([])


def test_moments_merge():
    X = torch.randn(20, 3)
    merged = merge_moments([moment_sum(X[:7]), moment_sum(X[7:])])
    # Chunks are summed in float32, and their sums in float64.
    torch.testing.assert_close(merged.sum_D, X.double().sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged.gram.sum_DD, X.T @ X)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_activations_that_are_not_finite(bad):
    X = torch.randn(4, 3)
    X[2, 1] = bad
    with pytest.raises(CompressionError, match="not finite"):
        hessian_sum(X)


def test_no_tokens_have_no_energy():
    nothing = hessian_sum(torch.empty(0, 3))
    assert nothing.num_tokens == 0 and not bool(nothing.sum_DD.any())


def test_factor_is_upper_and_gives_the_damped_hessian():
    X = torch.randn(3, 40, 8)
    H = X.transpose(1, 2) @ X
    found = upper_cholesky_factor(H, damping_fraction=0.01)
    for k in range(3):
        V = found.factor_KDD[k].double()
        assert torch.equal(V, V.triu())
        damped = H[k].double() + 0.01 * H[k].diagonal().mean().double() * torch.eye(8)
        np.testing.assert_allclose((V @ V.T).numpy(), damped.numpy(), rtol=1e-5, atol=1e-5)
        # Its inverse is the factor that SparseGPT and GPTQ use.
        U = np.linalg.cholesky(np.linalg.inv(damped.numpy())).T
        np.testing.assert_allclose(np.linalg.inv(V.numpy()), U, rtol=2e-4, atol=1e-7)
    assert found.attempts_K == (1, 1, 1)


def test_factor_by_hand_2x2():
    # H = [[4, 2], [2, 3]] and no damping to speak of: V = [[a, b], [0, c]] with c^2 = 3, bc = 2,
    # a^2 + b^2 = 4.
    found = upper_cholesky_factor(torch.tensor([[[4.0, 2.0], [2.0, 3.0]]]), damping_fraction=1e-9)
    c = 3**0.5
    b = 2 / c
    a = (4 - b * b) ** 0.5
    torch.testing.assert_close(found.factor_KDD[0], torch.tensor([[a, b], [0.0, c]]))


def test_dead_features_are_reported_and_decoupled():
    X = torch.randn(30, 4)
    X[:, 2] = 0
    found = upper_cholesky_factor((X.T @ X)[None])
    assert found.dead_KD.tolist() == [[False, False, True, False]]
    assert bool(torch.isfinite(found.factor_KDD).all())
    V = found.factor_KDD[0]
    assert V[2, 3] == 0 and V[0, 2] == 0


def test_damping_is_raised_in_steps_for_the_bad_one_only():
    X = torch.randn(30, 4)
    good = X.T @ X
    bad = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.2]))
    found = upper_cholesky_factor(torch.stack([good, bad]), damping_fraction=0.01)
    # mean diagonal 0.7: 0.007 and 0.07 do not lift -0.2 above zero, 0.7 does.
    assert found.attempts_K == (1, 3)
    assert found.damping_fraction_K == (0.01, pytest.approx(1.0))


def test_hessian_that_stays_indefinite_ends_in_an_error():
    bad = torch.diag(torch.tensor([1.0, -1e9, 1e9]))
    bad[0, 2] = bad[2, 0] = 1e12
    with pytest.raises(CompressionError, match=f"{MAX_DAMPING_ATTEMPTS} attempts"):
        upper_cholesky_factor(bad[None])


def test_hessian_with_nan_is_named():
    H = torch.eye(3).repeat(2, 1, 1)
    H[1, 0, 2] = float("nan")
    with pytest.raises(CompressionError, match="Hessian 1 .*not finite"):
        upper_cholesky_factor(H)


def test_all_dead():
    found = upper_cholesky_factor(torch.zeros(1, 3, 3))
    assert bool(torch.isfinite(found.factor_KDD).all())
    assert bool(found.dead_KD.all())


def test_counts_travel():
    assert (
        merge_hessians([HessianSum(torch.eye(1), 3), HessianSum(torch.eye(1), 4)]).num_tokens == 7
    )


def test_shrinking_by_hand():
    """Two tokens (2, 0) and (0, 2) against a group whose mean is the identity."""
    part = hessian_sum(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    whole = HessianSum(torch.eye(2) * 10, 10)
    # S = 2 I, mean |x|^4 = 16, |S|^2 = 8, |S - T|^2 = 2: (16 - 8) / 1 / 2 is more than 1.
    found, weight = shrink(part, whole)
    assert weight == 1.0 and torch.equal(found.sum_DD, 2 * torch.eye(2)) and found.num_tokens == 2
    whole = HessianSum(torch.eye(2) * -30, 10)
    # T = -3 I: |S - T|^2 = 50, the weight 8 / 50.
    found, weight = shrink(part, whole)
    assert weight == pytest.approx(0.16)
    assert torch.allclose(found.sum_DD, 2 * (0.84 * 2 - 0.16 * 3) * torch.eye(2))


@pytest.mark.parametrize("count", [0, 1])
def test_too_little_to_know_anything_is_all_the_groups(count):
    part = HessianSum(torch.full((2, 2), 9.0 * count), count, torch.ones(2, 2), 324.0 * count)
    found, weight = shrink(part, HessianSum(torch.eye(2) * 6, 3))
    assert weight == 1.0 and torch.equal(found.sum_DD, 2 * torch.eye(2))
    assert torch.equal(found.cross_DD, torch.zeros(2, 2))


def test_residuals_are_drawn_towards_nothing_by_a_weight_of_their_own():
    """Four tokens (2, 0), (2, 0), (2, 0) and (0, 2) whose residuals are half of them."""
    X = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    part = hessian_sum(X, X / 2)
    assert part.cross_fourth == 16
    # C = diag(3, 1) / 2, mean |d|^2 |x|^2 = 4, |C|^2 = 2.5: (4 - 2.5) / 3 / 2.5, for any group.
    for whole in (HessianSum(torch.eye(2) * -30, 10), part):
        found, _ = shrink(part, whole)
        assert torch.allclose(found.cross_DD, 0.8 * torch.diag(torch.tensor([6.0, 2.0])))


def test_one_cluster_keeps_what_a_later_linear_makes_up_for():
    """Its expert is its group, whose sums it is all drawn to, but its residuals are well known."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(4000, 4, generator=generator)
    part = hessian_sum(X, X * torch.tensor([0.1, 0.2, 0.0, -0.1]))
    found, weight = shrink(part, part)
    assert weight == 1.0
    torch.testing.assert_close(found.sum_DD, part.sum_DD)
    torch.testing.assert_close(found.cross_DD, part.cross_DD, rtol=0.01, atol=1.0)


@pytest.mark.parametrize("count", [5, 20, 100, 2000])
def test_shrinking_is_nearer_the_truth(count):
    """Of normal inputs with a known second moment, averaged over draws, in float64."""
    generator = torch.Generator().manual_seed(count)
    scale = torch.linspace(0.2, 2.0, 12)
    truth, target = torch.diag(scale**2), torch.eye(12) * 1.5
    whole = HessianSum(target * 1000, 1000)
    errors, weights = torch.zeros(3, dtype=torch.float64), []
    for _ in range(40):
        part = hessian_sum(torch.randn(count, 12, generator=generator) * scale)
        found, weight = shrink(part, whole)
        weights.append(weight)
        for i, guess in enumerate((found.sum_DD / count, part.sum_DD / count, target)):
            errors[i] += (guess.double() - truth).square().sum()
    assert errors[0] <= 1.1 * errors[1:].min()
    assert errors[0] < 0.98 * errors[1] or count == 2000
    assert sum(weights) / 40 < 0.05 if count == 2000 else sum(weights) > 0


def test_fourth_powers_are_summed():
    X = torch.randn(50, 7)
    halves = merge_hessians([hessian_sum(X[:20]), hessian_sum(X[20:])])
    oracle = float(X.double().square().sum(dim=1).square().sum())
    assert hessian_sum(X).fourth == pytest.approx(oracle, rel=1e-6)
    assert halves.fourth == pytest.approx(oracle, rel=1e-6)


def test_regularising_takes_the_groups_sums_for_few_tokens():
    part = HessianSum(torch.eye(2), 4, torch.ones(2, 2), 9.0)
    group = HessianSum(torch.eye(2) * 30, 20, None, 7.0)
    found, share = regularise_hessian(part, group, CompressionConfig(min_tokens_per_expert=5))
    assert share == 1.0 and torch.equal(found.sum_DD, group.sum_DD) and found.num_tokens == 20
    assert torch.equal(found.cross_DD, torch.zeros(2, 2))
    found, share = regularise_hessian(part, group, CompressionConfig(min_tokens_per_expert=4))
    assert found is part and share == 0.0
    shrunk = CompressionConfig(min_tokens_per_expert=4, shrink_hessians=True)
    found, share = regularise_hessian(part, group, shrunk)
    assert torch.equal(found.sum_DD, shrink(part, group)[0].sum_DD)
    assert share == shrink(part, group)[1] > 0


@pytest.mark.parametrize("least", [0, 5])
def test_without_a_token_all_features_count_alike(least):
    """As for an expert of a mixture that nothing was routed to."""
    nothing = HessianSum(torch.zeros(3, 3), 0, torch.zeros(2, 3), 0.0)
    settings = CompressionConfig(min_tokens_per_expert=least, shrink_hessians=True)
    found, share = regularise_hessian(nothing, nothing, settings)
    assert torch.equal(found.sum_DD, torch.eye(3)) and share == 1.0
    assert found.num_tokens == 0 and torch.equal(found.cross_DD, torch.zeros(2, 3))
