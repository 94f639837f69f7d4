"""Experts of several linears: what is lost, and what is made up for."""

import pytest
import torch

from sparse_expansion.algorithms import compress
from sparse_expansion.algorithms.compress import compress_experts, compress_linears
from sparse_expansion.algorithms.hessian import upper_cholesky_factor
from sparse_expansion.algorithms.quantization import fit_grid
from sparse_expansion.config import CompressionConfig, SparsityPattern
from sparse_expansion.types import CompressionError
from tests.algorithms.test_sweep import config, problem


def test_linears_of_a_group_equal_one_at_a_time():
    W, H = problem()
    V = torch.randn(9, 20)
    both = compress_linears({"a": W, "b": V}, H, config(), {"a": None, "b": None})
    assert torch.equal(both["a"].weight_KOD, compress_experts(W, H, config(), None).weight_KOD)
    assert torch.equal(both["b"].weight_KOD, compress_experts(V, H, config(), None).weight_KOD)


def test_inputs_are_not_modified():
    W, H = problem()
    before = W.clone(), H.clone()
    compress_experts(W, H, config(), None)
    assert torch.equal(W, before[0]) and torch.equal(H, before[1])


@pytest.mark.parametrize("sparsity", ["0.5", "2:4", "0", "1"])
@pytest.mark.parametrize("bits", [None, 4])
def test_relative_error_is_the_share_of_output_energy_lost(sparsity, bits):
    W = torch.randn(8, 24)
    X = torch.randn(2, 50, 24)
    X[0, :, 5] = 0
    H = X.transpose(1, 2) @ X
    grid = None if bits is None else fit_grid(W, bits=4, symmetric=False, group_size=None)
    act_order = bits == 4 and sparsity == "0.5"
    setting = config(sparsity, bits=bits, block_size=8, act_order=act_order)
    found = compress_experts(W, H, setting, grid)
    for k in range(2):
        whole, lost = X[k] @ W.T, X[k] @ (W - found.weight_KOD[k]).T
        wanted = float(lost.square().sum() / whole.square().sum())
        assert found.relative_error_K[k] == pytest.approx(wanted, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("outlier", [1, 100])
def test_energy_of_many_rows_is_estimated_closely(outlier):
    W, H = problem(rows=2000, width=24)
    W[7] *= outlier
    found = compress._sketch(W)
    assert found.shape == (compress.SKETCH_ROWS, 24)
    whole, estimated = (float(torch.trace(V @ H[0] @ V.T)) for V in (W, found))
    assert estimated == pytest.approx(whole, rel=0.08)
    assert torch.equal(compress._sketch(W[:256]), W[:256])


def test_the_dense_residual_of_inputs_is_compensated():
    """The target is least squares for the outputs on the dense inputs, with a pull to W."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(5, 12, generator=generator)
    X = torch.randn(2, 80, 12, generator=generator)
    residual = 0.3 * X.roll(1, dims=2) + 0.1 * torch.randn(2, 80, 12, generator=generator)
    H, cross = X.transpose(1, 2) @ X, residual.transpose(1, 2) @ X
    factor = upper_cholesky_factor(H, damping_fraction=0.01)
    target = compress.compensated_target(W.T.expand(2, -1, -1).clone(), cross, factor).mT
    half = CompressionConfig(sparsity=SparsityPattern.parse("0.5"), block_size=4)
    pruned = compress.compress_linears({"": W}, H, half, {"": None}, cross_KDD=cross)[""]
    plain = compress.compress_linears({"": W}, H, half, {"": None})[""]
    for k in range(2):
        pull = (0.01 * H[k].diagonal().mean()).double().sqrt()
        rows = torch.cat([X[k].double(), pull * torch.eye(12, dtype=torch.float64)])
        outputs = (X[k] + residual[k]).double() @ W.double().T
        wanted = torch.cat([outputs, pull * W.double().T])
        solution = torch.linalg.lstsq(rows, wanted).solution.T
        torch.testing.assert_close(target[k].double(), solution, rtol=1e-4, atol=1e-4)

        def lost(found, k=k, outputs=outputs):
            return float((X[k].double() @ found.weight_KOD[k].double().T - outputs).square().sum())

        assert lost(pruned) < 0.9 * lost(plain)


@pytest.mark.parametrize("pruner", ["admm", "sparsegpt", "wanda", "magnitude"])
def test_without_zeros_and_grid_the_experts_are_the_dense_weight(pruner):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(5, 12, generator=generator)
    X = torch.randn(2, 80, 12, generator=generator)
    X[1, :, 3] = 0
    H = X.transpose(1, 2) @ X
    config = CompressionConfig(sparsity=SparsityPattern.parse("0"), pruner=pruner)
    cross = 0.1 * torch.randn(2, 12, 12, generator=generator)
    made = compress.compress_linears({"": W}, H, config, {"": None}, cross_KDD=cross)[""]
    assert torch.equal(made.weight_KOD, W.expand(2, -1, -1)) and bool(made.kept_KOD.all())
    assert made.num_dead_K == (0, 1) and made.relative_error_K == (0, 0)
    with pytest.raises(CompressionError, match="finite"):
        compress.compress_linears({"": W}, H / 0, config, {"": None})
