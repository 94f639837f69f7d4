"""The alternating solver: by hand, against every mask there is, and against least squares."""

import itertools

import numpy as np
import pytest
import torch

from sparse_expansion.algorithms.compress import compress_experts
from sparse_expansion.algorithms.pruners import admm
from sparse_expansion.algorithms.quantization import dequantize, fit_grid
from sparse_expansion.config import CompressionConfig, SparsityPattern


def config(sparsity, **settings):
    pattern = SparsityPattern.parse(sparsity)
    return CompressionConfig(sparsity=pattern, **{"pruner": "admm", "block_size": 8, **settings})


def inputs(experts, tokens, width, seed=0, mixing=1.0):
    """Correlated, of unequal energy."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator) + mixing * torch.eye(width)
    X = torch.randn(experts, tokens, width, generator=generator) @ mixed
    return X * torch.logspace(0.5, -0.5, width)


def error(W, V, H):
    E = (W - V).double()
    return float(((E @ H.double()) * E).sum() / ((W.double() @ H.double()) * W.double()).sum())


def test_independent_inputs_by_hand():
    """Nothing to make up for: the smallest ``|w| ||x||`` go, the others stay as they are."""
    W = torch.tensor([[3.5, -1.0, 2.0, 3.0], [0.5, 6.0, -5.0, 1.0]])
    H = torch.diag(torch.tensor([1.0, 100.0, 4.0, 1.0]))[None]
    made = compress_experts(W, H, config("0.5", block_size=4), None)
    # Of 3.5, 10, 4, 3 and 0.5, 60, 10, 1 the four smallest.
    wanted = torch.tensor([[[0.0, -1.0, 2.0, 0.0], [0.0, 6.0, -5.0, 0.0]]])
    assert made.kept_KOD.tolist() == (wanted != 0).tolist()
    # The damping is counted as data: of a diagonal it takes nothing away from what is kept.
    torch.testing.assert_close(made.weight_KOD, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_close_to_the_best_of_all_masks(seed):
    """One row of eight weights, half of them: 70 masks, each with its least squares."""
    W = torch.randn(1, 8, generator=torch.Generator().manual_seed(seed))
    X = inputs(1, 64, 8, seed, mixing=4.0)[0].double()
    H = X.T @ X
    best = np.inf
    for mask in itertools.combinations(range(8), 4):
        chosen = list(mask)
        found = torch.zeros(1, 8, dtype=torch.float64)
        solution = torch.linalg.solve(H[chosen][:, chosen], H[chosen] @ W.double().T)
        found[0, chosen] = solution[:, 0]
        best = min(best, error(W, found, H))
    settings = config("0.5", damping_fraction=1e-4, solver_iterations=200)
    made = compress_experts(W, H.float()[None], settings, None)
    one_pass = compress_experts(W, H.float()[None], config("0.5", pruner="sparsegpt"), None)
    assert best <= error(W, made.weight_KOD[0], H) * (1 + 1e-4)
    assert error(W, made.weight_KOD[0], H) <= 1.05 * best
    assert error(W, made.weight_KOD[0], H) <= error(W, one_pass.weight_KOD[0], H) * (1 + 1e-4)


@pytest.mark.parametrize("sparsity", ["0.5", "0.7", "2:4"])
def test_kept_weights_become_the_least_squares(sparsity):
    W = torch.randn(12, 24, generator=torch.Generator().manual_seed(3))
    X = inputs(2, 400, 24)
    H = X.transpose(1, 2) @ X
    made = compress_experts(W, H, config(sparsity, solver_iterations=1000), None)
    for k in range(2):
        damped = H[k].double()
        damped.diagonal().mul_(1.01)
        for weight, dense, kept in zip(made.weight_KOD[k], W, made.kept_KOD[k], strict=True):
            solution = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ dense.double())
            torch.testing.assert_close(weight[kept].double(), solution, rtol=5e-3, atol=5e-3)
            assert not weight[~kept].any()


@pytest.mark.parametrize("sparsity", ["0.3", "0.7", "1", "2:4", "3:4", "1:8"])
def test_counts_and_error(sparsity):
    W = torch.randn(7, 26, generator=torch.Generator().manual_seed(1))
    X = inputs(3, 90, 26)
    X[2, :, 5] = 0
    H = X.transpose(1, 2) @ X
    settings = config(sparsity)
    made = compress_experts(W, H, settings, None)
    assert made.num_dead_K == (0, 0, 1)
    assert not made.weight_KOD[2, :, 5].any()
    for k in range(3):
        kept = made.kept_KOD[k]
        assert int(kept.sum()) == settings.sparsity.num_kept(7, 26, 8)
        if settings.sparsity.group:
            whole = kept[:, :24].reshape(7, -1, settings.sparsity.group)
            assert (~whole).sum(dim=2).eq(settings.sparsity.pruned).all()
        assert made.relative_error_K[k] == pytest.approx(
            error(W, made.weight_KOD[k], H[k]), rel=1e-3, abs=1e-6
        )


def test_loses_less_than_one_pass():
    """Most where features differ in energy and the mask may follow them over the whole matrix."""
    W = torch.randn(64, 96, generator=torch.Generator().manual_seed(5))
    X = inputs(2, 600, 96)
    H = X.transpose(1, 2) @ X
    for sparsity, share in (("0.5", 0.5), ("0.7", 0.5), ("2:4", 0.98)):
        solved = compress_experts(W, H, config(sparsity, block_size=32), None)
        settings = config(sparsity, pruner="sparsegpt", block_size=32)
        swept = compress_experts(W, H, settings, None)
        for found, other in zip(solved.relative_error_K, swept.relative_error_K, strict=True):
            assert found < share * other


@pytest.mark.parametrize("act_order", [False, True])
def test_rounding_keeps_the_mask_and_stays_on_the_grid(act_order):
    W = torch.randn(16, 32, generator=torch.Generator().manual_seed(2))
    X = inputs(2, 200, 32)
    H = X.transpose(1, 2) @ X
    grid = fit_grid(W, bits=4, symmetric=False, group_size=None)
    sparsity = "0.5" if act_order else "2:4"
    plain = compress_experts(W, H, config(sparsity), None)
    made = compress_experts(W, H, config(sparsity, bits=4, act_order=act_order), grid)
    if not act_order:
        assert torch.equal(made.kept_KOD, plain.kept_KOD)
    assert made.codes_KOD is not None
    for k in range(2):
        values = dequantize(made.codes_KOD[k].float(), grid.scale_OG, grid.zero_point_OG)
        assert torch.equal(made.weight_KOD[k], values.masked_fill(~made.kept_KOD[k], 0))
        # Rounding each solved weight by itself is worse than the sweep.
        codes = (plain.weight_KOD[k] / grid.scale_OG).round() + grid.zero_point_OG
        near = dequantize(codes.clamp(0, 15), grid.scale_OG, grid.zero_point_OG)
        near = near.masked_fill(~plain.kept_KOD[k], 0)
        assert made.relative_error_K[k] < error(W, near, H[k])
        found = error(W, made.weight_KOD[k], H[k])
        assert made.relative_error_K[k] == pytest.approx(found, rel=1e-3)


def test_one_expert_does_not_depend_on_the_others_of_its_unit():
    W = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    X = inputs(3, 100, 16)
    H = X.transpose(1, 2) @ X
    together = compress_experts(W, H, config("0.5"), None)
    alone = compress_experts(W, H[1:2], config("0.5"), None)
    assert torch.equal(together.kept_KOD[1:2], alone.kept_KOD)
    torch.testing.assert_close(together.weight_KOD[1:2], alone.weight_KOD)


def test_hessians_that_are_not_finite_are_refused():
    H = torch.eye(4)[None].repeat(2, 1, 1)
    H[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="Hessian 1 of the batch is not finite"):
        compress_experts(torch.randn(3, 4), H, config("0.5"), None)


def test_the_share_of_zeros_rises(monkeypatch):
    """A quartic up to the fixed mask, which the last fifth of the iterations leaves alone."""
    seen = []
    smallest = admm.smallest

    def count(V, num_pruned):
        seen.append(num_pruned)
        return smallest(V, num_pruned)

    monkeypatch.setattr(admm, "smallest", count)
    X = inputs(1, 100, 16)
    H = X.transpose(1, 2) @ X
    compress_experts(torch.randn(10, 16), H, config("0.5", solver_iterations=5), None)
    # 80 x (1 - (1 - i / 4)^4)
    assert seen == [55, 75, 80, 80]
