"""Products by bfloat16 parts: by hand, and what the solver and the sweep lose by them."""

import pytest
import torch

from sparse_expansion.algorithms import products, sweep
from sparse_expansion.algorithms.compress import compress_experts, compress_linears
from sparse_expansion.algorithms.products import LeftFactor, takes_parts
from sparse_expansion.config import CompressionConfig, SparsityPattern
from tests import oracle


def test_parts_by_hand():
    """``(1 + e)^2`` less ``e^2``, the product of the two small parts: ``e`` is a half of 2^-8."""
    e = 2.0**-12
    found = LeftFactor(torch.full((1, 1, 1), 1 + e), "bfloat16x3").times(
        torch.full((1, 1, 1), 1 + e)
    )
    assert found.item() == 1 + 2 * e
    assert LeftFactor(torch.full((1, 1, 1), 1 + e), "float32").times(
        torch.full((1, 1, 1), 1 + e)
    ).item() == pytest.approx((1 + e) ** 2, abs=1e-7)


def test_sixteen_bits_are_right():
    A, B = torch.randn(2, 30, 40), torch.randn(2, 40, 50)
    exact = A.double() @ B.double()
    size = A.abs().double() @ B.abs().double()
    errors = {
        name: float(((LeftFactor(A, name).times(B) - exact).abs() / size).max())
        for name in ("float32", "bfloat16x3")
    }
    assert errors["float32"] < 2.0**-21
    assert errors["bfloat16x3"] < 2.0**-16
    plain = (A.bfloat16().double() @ B.bfloat16().double() - exact).abs() / size
    assert errors["bfloat16x3"] < float(plain.max()) / 50


def test_any_number_of_columns_at_a_time(monkeypatch):
    # Of eight bits: nothing is left over.
    A = torch.randint(-255, 256, (2, 5, 6)).float()
    B = torch.randint(-255, 256, (2, 6, 7)).float()
    monkeypatch.setattr(products, "COLUMNS", 3)
    assert torch.equal(LeftFactor(A, "bfloat16x3").times(B), A @ B)


def test_a_cpu_takes_float32_unless_asked():
    A = torch.randn(1, 3, 3)
    assert not takes_parts("auto", A) and not takes_parts("float32", A)
    assert takes_parts("bfloat16x3", A)
    B = torch.randn(1, 3, 5)
    assert torch.equal(LeftFactor(A, "auto").times(B), A @ B)


def problem(width, rows, seed):
    """Inputs of very unequal energy, and strongly correlated."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)
    mixed += 0.3 * torch.eye(width)
    X = torch.randn(4 * width, width, generator=generator) @ mixed
    X *= torch.logspace(0.7, -0.7, width)
    return torch.randn(rows, width, generator=generator), X.T @ X


def loss(W, V, H):
    E, W, H = (W - V).double(), W.double(), H.double()
    return float(((E @ H) * E).sum() / ((W @ H) * W).sum())


def solved_in_float64(W, H, num_pruned, damping, iterations):
    """The solver's equations, a matrix at a time, with a full sort for every selection."""
    W, H = W.double(), H.double()
    norm = H.diagonal().sqrt()
    A = H / norm / norm[:, None]
    A.diagonal().fill_(1 + damping)
    wanted = V = W * norm
    U = torch.zeros_like(V)
    inverse = torch.linalg.inv(A + torch.eye(len(A), dtype=torch.float64))
    choosing = iterations - iterations // 5
    for iteration in range(iterations):
        V = V + U
        if iteration < choosing:
            count = round((1 - (1 - (iteration + 1) / choosing) ** 4) * num_pruned)
            # Ties go by column, then row, as in the transposed matrix.
            order = V.abs().T.flatten().argsort(stable=True)
            pruned = torch.zeros(V.numel(), dtype=torch.bool)
            pruned[order[:count]] = True
            pruned = pruned.view(V.T.shape).T
        U, Z = V * pruned, V * ~pruned
        V = 1.8 * (wanted @ A + Z - U) @ inverse - 0.8 * Z
    return Z / norm, ~pruned


@pytest.mark.parametrize(("damping", "sparsity"), [(0.1, 0.5), (0.01, 0.5), (0.1, 0.7)])
def test_the_solver_loses_nothing_by_parts(damping, sparsity):
    W, H = problem(128, 160, seed=1)
    config = CompressionConfig(
        sparsity=SparsityPattern(fraction=sparsity), pruner="admm", damping_fraction=damping
    )
    num_pruned = W.numel() - config.sparsity.num_kept(*W.shape, config.block_size)
    wanted, kept = solved_in_float64(W, H, num_pruned, damping, config.solver_iterations)
    least = loss(W, wanted, H)
    for name in ("float32", "bfloat16x3"):
        made = compress_linears({"": W}, H[None], config, {"": None}, products=name)[""]
        assert float((made.kept_KOD[0] == kept).float().mean()) > 0.999, name
        # Of either sign: a few weights that are nearly equal change places.
        assert loss(W, made.weight_KOD[0], H) == pytest.approx(least, rel=2e-3), name


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_the_sweep_loses_nothing_by_parts(sparsity, monkeypatch):
    monkeypatch.setattr(sweep, "GATHERED_COLUMNS", 16)
    W, H = problem(64, 24, seed=2)
    config = CompressionConfig(sparsity=SparsityPattern.parse(sparsity), block_size=16)
    n_m = (2, 4) if sparsity == "2:4" else None
    wanted, kept = oracle.compress(
        W.numpy(), H.numpy(), fraction=None if n_m else 0.5, n_m=n_m, block=16
    )
    least = loss(W, torch.from_numpy(wanted), H)
    for name in ("float32", "bfloat16x3"):
        made = compress_linears({"": W}, H[None], config, {"": None}, products=name)[""]
        assert float((made.kept_KOD[0] == torch.from_numpy(kept)).float().mean()) > 0.998, name
        assert loss(W, made.weight_KOD[0], H) == pytest.approx(least, rel=2e-3), name
    assert torch.equal(made.kept_KOD, compress_experts(W, H[None], config, None).kept_KOD)
