import numpy as np
import pytest
import torch

from sparse_expansion.algorithms import hessian, products
from sparse_expansion.algorithms.hessian import (
    MAX_DAMPING_ATTEMPTS,
    hessian_sum,
    merge_hessians,
    upper_cholesky_factor,
)
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
    torch.testing.assert_close(found.cross_OD, wanted.cross_OD)


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


def test_all_parts_of_sums_merge():
    X, d = torch.randn(20, 3), torch.randn(20, 5)
    merged = merge_hessians([hessian_sum(X[:7], d[:7]), hessian_sum(X[7:], d[7:])])
    # Chunks are summed in float32, and their sums in float64.
    torch.testing.assert_close(merged.sum_D, X.double().sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged.residual_O, d.double().sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged.sum_DD, X.T @ X)
    torch.testing.assert_close(merged.cross_OD, d.T @ X)
    assert merged.residual_energy == pytest.approx(float(d.square().sum()), rel=1e-6)


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
