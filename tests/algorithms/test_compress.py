"""Experts of several linears: what is lost, and what is made up for."""

import pytest
import torch

from sparse_expansion.algorithms import compress
from sparse_expansion.algorithms.centring import InputMeans
from sparse_expansion.algorithms.compress import (
    compress_experts,
    compress_linears,
)
from sparse_expansion.algorithms.hessian import upper_cholesky_factor
from sparse_expansion.algorithms.output_weights import sensitivity_weights
from sparse_expansion.algorithms.quantization import dequantize, fit_grid
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


def test_what_outputs_lack_is_made_up_for():
    """The target is least squares for the outputs that are wanted, with a pull to W."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(5, 12, generator=generator)
    X = torch.randn(2, 80, 12, generator=generator)
    residual = 0.3 * X.roll(1, dims=2) + 0.1 * torch.randn(2, 80, 12, generator=generator)
    H, cross = X.transpose(1, 2) @ X, (residual @ W.T).transpose(1, 2) @ X
    factor = upper_cholesky_factor(H, damping_fraction=0.01)
    target = compress.compensated_target(W.T.expand(2, -1, -1).clone(), cross, factor).mT
    half = CompressionConfig(sparsity=SparsityPattern.parse("0.5"), block_size=4)
    pruned = compress.compress_linears({"": W}, H, half, {"": None}, cross_KOD=cross)[""]
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
    cross = 0.1 * torch.randn(2, 5, 12, generator=generator)
    made = compress.compress_linears({"": W}, H, config, {"": None}, cross_KOD=cross)[""]
    assert torch.equal(made.weight_KOD, W.expand(2, -1, -1)) and bool(made.kept_KOD.all())
    assert made.num_dead_K == (0, 1) and made.relative_error_K == (0, 0)
    with pytest.raises(CompressionError, match="finite"):
        compress.compress_linears({"": W}, H / 0, config, {"": None})


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_every_linear_of_a_group_makes_up_for_its_own_outputs(weighed, act_order):
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(rows, 12, generator=generator) for name, rows in {"a": 5, "b": 3}.items()
    }
    X = torch.randn(2, 80, 12, generator=generator)
    r = 0.3 * X.roll(1, dims=2)[:, :, :8] + 0.5
    H, cross = X.transpose(1, 2) @ X, r.transpose(1, 2) @ X
    # Inputs' means are not taken out of H here; outputs lack 0.5 on average all the same.
    means = InputMeans(X.mean(dim=1), r.mean(dim=1), (80, 80))
    setting = config("0.5", block_size=4, act_order=act_order)
    scales = {name: 0.5 + torch.rand(2, len(W), generator=generator) for name, W in weights.items()}
    together = compress_linears(
        weights,
        H,
        setting,
        dict.fromkeys(weights),
        cross_KOD=cross,
        means=means,
        output_weights=scales if weighed else None,
    )
    for name, rows in (("a", slice(0, 5)), ("b", slice(5, 8))):
        alone = compress_linears(
            {name: weights[name]},
            H,
            setting,
            {name: None},
            cross_KOD=cross[:, rows],
            means=InputMeans(means.input_KD, r[:, :, rows].mean(dim=1), (80, 80)),
            output_weights={name: scales[name]} if weighed else None,
        )[name]
        torch.testing.assert_close(together[name].weight_KOD, alone.weight_KOD)
        torch.testing.assert_close(together[name].bias_KO, alone.bias_KO)
        wanted = X @ weights[name].T + r[:, :, rows]
        plain = compress_linears({name: weights[name]}, H, setting, {name: None})[name]
        lost, left = (
            float((wanted - X @ found.weight_KOD.mT).square().sum()) for found in (plain, alone)
        )
        assert left < 0.95 * lost


def test_output_weights_by_hand():
    """Half by the expert's tokens, half by its group's, each over its mean, and a floor."""
    squares_KO = torch.tensor([[0.0, 2.0, 4.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    group_O = torch.tensor([9.0, 0.0, 0.0], dtype=torch.float64)
    found_KO = sensitivity_weights(squares_KO, group_O).square()
    assert torch.allclose(found_KO, torch.tensor([[2.0, 1.0, 1.5], [2.0, 0.5, 0.5]]))
    assert found_KO.dtype == torch.float32


def test_rows_that_count_for_more_keep_more():
    """By hand: of [3, 2] and [1, 1] the second row's weights are worth 5 each."""
    W, H = torch.tensor([[3.0, 2.0], [1.0, 1.0]]), torch.eye(2)[None]
    weights = {"": torch.tensor([[1.0, 5.0]])}
    settings = config(pruner="magnitude")
    plain = compress_linears({"": W}, H, settings, {"": None})[""]
    weighed = compress_linears({"": W}, H, settings, {"": None}, output_weights=weights)[""]
    assert plain.weight_KOD.tolist() == [[[3.0, 2.0], [0.0, 0.0]]]
    assert weighed.weight_KOD.tolist() == [[[0.0, 0.0], [1.0, 1.0]]]
    # Of 9 + 4 + 25 (1 + 1) the first row's 13 are lost.
    assert weighed.relative_error_K == pytest.approx((13 / 63,))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("pruner", ["sparsegpt", "admm"])
def test_less_is_lost_as_outputs_are_weighed(pruner, bits):
    W, H = problem(rows=12, width=24, experts=2)
    scale_O = torch.logspace(-1, 1, 12)
    settings = config(pruner=pruner, bits=bits, block_size=8, damping_fraction=0.1)
    grid = None if bits is None else fit_grid(W, bits=bits, symmetric=False, group_size=None)

    def made(**weights):
        return compress_linears({"": W}, H, settings, {"": grid}, **weights)[""]

    def lost(found, scale_O):
        E = (W - found.weight_KOD) * scale_O[:, None]
        return torch.einsum("kod,kde,koe->k", E, H, E)

    plain, weighed = made(), made(output_weights={"": scale_O.expand(2, -1)})
    assert torch.equal(plain.kept_KOD.sum(dim=(1, 2)), weighed.kept_KOD.sum(dim=(1, 2)))
    assert bool((lost(weighed, scale_O) < 0.9 * lost(plain, scale_O)).all())
    ones = torch.ones(12)
    assert bool((lost(weighed, ones) > lost(plain, ones)).all())
    rows_K = weighed.kept_KOD.sum(dim=2)
    assert bool((rows_K[:, -1] > rows_K[:, 0]).all())
    assert bool((weighed.weight_KOD[~weighed.kept_KOD] == 0).all())
    energy = torch.einsum("od,kde,oe->k", W * scale_O[:, None], H, W * scale_O[:, None])
    expected = (lost(weighed, scale_O) / energy).tolist()
    assert weighed.relative_error_K == pytest.approx(expected, rel=1e-3)
    if grid is not None:
        scale, zero = (part.T for part in grid.columns(torch.arange(24)))
        on_grid = dequantize(weighed.codes_KOD.float(), scale, zero)
        torch.testing.assert_close(
            weighed.weight_KOD, on_grid * weighed.kept_KOD, rtol=1e-5, atol=1e-6
        )


def test_others_are_not_weighed():
    W, H = problem()
    weights = {"a": torch.linspace(0.1, 3.0, 6)[None]}
    found = compress_linears(
        {"a": W, "b": W}, H, config(), {"a": None, "b": None}, output_weights=weights
    )
    assert torch.equal(found["b"].weight_KOD, compress_experts(W, H, config(), None).weight_KOD)
    assert not torch.equal(found["a"].kept_KOD, found["b"].kept_KOD)


def test_every_expert_has_weights_of_its_own():
    W, H = problem(experts=2)
    scale_KO = torch.stack([torch.linspace(0.1, 3.0, 6), torch.linspace(3.0, 0.1, 6)])
    settings = config(bits=4, act_order=True, block_size=8)
    grid = fit_grid(W, bits=4, symmetric=False, group_size=None)

    def made(chosen):
        weights = {"": scale_KO[chosen]}
        return compress_linears({"": W}, H[chosen], settings, {"": grid}, output_weights=weights)[
            ""
        ]

    both = made(slice(0, 2))
    for k in range(2):
        alone = made(slice(k, k + 1))
        for field in ("weight_KOD", "kept_KOD", "codes_KOD"):
            assert torch.equal(getattr(both, field)[k], getattr(alone, field)[0])
        for field in ("damping_fraction_K", "num_dead_K", "relative_error_K"):
            assert getattr(both, field)[k] == getattr(alone, field)[0]
