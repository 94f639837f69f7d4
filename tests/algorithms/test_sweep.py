import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_expansion.algorithms import sweep as sweeps
from sparse_expansion.algorithms.compress import compress_experts, compress_linears
from sparse_expansion.algorithms.masks import unstructured_mask
from sparse_expansion.algorithms.quantization import fit_grid
from sparse_expansion.config import CompressionConfig, SparsityPattern
from tests import oracle


def problem(rows=6, width=20, tokens=60, seed=0, experts=1):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, width, generator=generator)
    X = torch.randn(experts, tokens, width, generator=generator)
    X = X @ torch.randn(width, width, generator=generator)
    return W, X.transpose(1, 2) @ X


def config(sparsity="0.5", **changes):
    return CompressionConfig(sparsity=SparsityPattern.parse(sparsity), **changes)


@pytest.mark.parametrize("block", [4, 8, 128])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_unstructured_against_the_oracle(fraction, block):
    W, H = problem()
    found = compress_experts(W, H, config(str(fraction), block_size=block), None)
    wanted, kept = oracle.compress(W.numpy(), H[0].numpy(), fraction=fraction, block=block)
    assert np.array_equal(found.kept_KOD[0].numpy(), kept)
    np.testing.assert_allclose(found.weight_KOD[0].numpy(), wanted, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("gathered", [4, 8, 12])
def test_blocks_that_gather_together(gathered, monkeypatch):
    monkeypatch.setattr(sweeps, "GATHERED_COLUMNS", gathered)
    W, H = problem(width=30)
    found = compress_experts(W, H, config("0.5", block_size=4), None)
    wanted, kept = oracle.compress(W.numpy(), H[0].numpy(), fraction=0.5, block=4)
    assert np.array_equal(found.kept_KOD[0].numpy(), kept)
    np.testing.assert_allclose(found.weight_KOD[0].numpy(), wanted, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("n_m", ["2:4", "1:4", "3:4", "1:2", "4:8", "0:4", "4:4"])
def test_n_m_against_the_oracle(n_m):
    W, H = problem(width=24)
    pruned, group = map(int, n_m.split(":"))
    found = compress_experts(W, H, config(n_m, block_size=8), None)
    wanted, kept = oracle.compress(W.numpy(), H[0].numpy(), n_m=(pruned, group), block=8)
    assert np.array_equal(found.kept_KOD[0].numpy(), kept)
    np.testing.assert_allclose(found.weight_KOD[0].numpy(), wanted, rtol=2e-3, atol=2e-4)
    zeros = (found.weight_KOD[0] == 0).reshape(6, 24 // group, group).sum(dim=2)
    assert bool((zeros == pruned).all())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 5])
def test_gptq_against_the_oracle(bits, symmetric, group_size):
    W, H = problem()
    grid = fit_grid(W, bits=bits, symmetric=symmetric, group_size=group_size)
    settings_ = config("0", bits=bits, symmetric=symmetric, group_size=group_size, block_size=8)
    found = compress_experts(W, H, settings_, grid)
    numbers = (
        grid.scale_OG.double().numpy(),
        grid.zero_point_OG.double().numpy(),
        bits,
        grid.group_size,
    )
    wanted, _ = oracle.compress(W.numpy(), H[0].numpy(), grid=numbers, block=8)
    np.testing.assert_allclose(found.weight_KOD[0].numpy(), wanted, rtol=1e-5, atol=1e-5)
    steps = found.weight_KOD[0] / grid.scale_OG.repeat_interleave(grid.group_size, 1)[:, :20]
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_joint_against_the_oracle(sparsity):
    W, H = problem(width=24)
    grid = fit_grid(W, bits=4, symmetric=False, group_size=None)
    found = compress_experts(W, H, config(sparsity, bits=4, block_size=8), grid)
    numbers = (grid.scale_OG.double().numpy(), grid.zero_point_OG.double().numpy(), 4, 24)
    how = {"fraction": 0.5} if sparsity == "0.5" else {"n_m": (2, 4)}
    wanted, kept = oracle.compress(W.numpy(), H[0].numpy(), grid=numbers, block=8, **how)
    assert np.array_equal(found.kept_KOD[0].numpy(), kept)
    np.testing.assert_allclose(found.weight_KOD[0].numpy(), wanted, rtol=1e-5, atol=1e-5)
    assert bool((found.weight_KOD[0][~found.kept_KOD[0]] == 0).all())


@pytest.mark.parametrize("group_size", [None, 5])
def test_act_order_with_static_groups_against_the_oracle(group_size):
    W, H = problem()
    grid = fit_grid(W, bits=3, symmetric=False, group_size=group_size)
    found = compress_experts(
        W, H, config("0.25", bits=3, group_size=group_size, act_order=True, block_size=8), grid
    )
    order = np.argsort(-H[0].diagonal().numpy(), kind="stable")
    numbers = (
        grid.scale_OG.double().numpy(),
        grid.zero_point_OG.double().numpy(),
        3,
        grid.group_size,
    )
    wanted, kept = oracle.compress(
        W.numpy(), H[0].numpy(), fraction=0.25, grid=numbers, block=8, order=order
    )
    assert np.array_equal(found.kept_KOD[0].numpy(), kept)
    np.testing.assert_allclose(found.weight_KOD[0].numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_by_hand_2x2():
    # One row [1, 3], H = [[2, 1], [1, 2]], half pruned, tiny damping. H^-1 = [[2,-1],[-1,2]]/3.
    # Saliencies 1/(2/3) = 1.5 and 9/(1/2) = 18: the first goes, and
    # w2 += 1/(2/3) * 1/3 = 0.5, so [0, 3.5].
    found = compress_experts(
        torch.tensor([[1.0, 3.0]]),
        torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]),
        config("0.5", damping_fraction=1e-9),
        None,
    )
    torch.testing.assert_close(found.weight_KOD[0], torch.tensor([[0.0, 3.5]]))


def test_by_hand_4x4_identity_is_magnitude_pruning():
    W = torch.tensor([[4.0, 1, -2, 3], [0.5, -5, 6, 0.1], [1.5, 2.5, -0.2, 7], [8, -0.3, 0.4, -9]])
    found = compress_experts(W, torch.eye(4)[None], config("0.5", block_size=4), None)
    wanted = W.clone()
    wanted[W.abs() < 2.1] = 0
    assert torch.equal(found.weight_KOD[0], wanted)
    found = compress_experts(W, torch.eye(4)[None], config("2:4", block_size=4), None)
    assert found.weight_KOD[0].tolist() == [
        [4, 0, 0, 3],
        [0, -5, 6, 0],
        [0, 2.5, 0, 7],
        [8, 0, 0, -9],
    ]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 7),
    width=st.integers(1, 40),
    block=st.integers(1, 17),
    fraction=st.floats(0, 1),
)
def test_exact_count_in_every_block(rows, width, block, fraction):
    W, H = problem(rows, width, tokens=2 * width + 2, seed=rows * 100 + width)
    setting = config(repr(fraction), block_size=block)
    found = compress_experts(W, H, setting, None)
    kept = found.kept_KOD[0]
    for start in range(0, width, block):
        part = kept[:, start : start + block]
        assert int((~part).sum()) == setting.sparsity.num_pruned(part.numel())
    assert int(kept.sum()) == setting.sparsity.num_kept(rows, width, block)


def test_sparsity_zero_changes_nothing_and_one_leaves_nothing():
    W, H = problem()
    assert torch.equal(compress_experts(W, H, config("0"), None).weight_KOD[0], W)
    assert int(compress_experts(W, H, config("1"), None).weight_KOD[0].count_nonzero()) == 0


def test_columns_that_are_no_multiple_of_m():
    W, H = problem(width=22)
    found = compress_experts(W, H, config("2:4", block_size=8), None)
    # Five whole groups lose two; of the last two columns one goes in every row.
    assert bool(((~found.kept_KOD[0]).sum(dim=1) == 11).all())
    assert int(found.kept_KOD[0].sum()) == config("2:4").sparsity.num_kept(6, 22, 8)


def test_dead_features_get_zero_columns():
    W, H = problem()
    H[0, 3] = 0
    H[0, :, 3] = 0
    for sparsity, grid in (
        ("0.5", None),
        ("0", fit_grid(W, bits=4, symmetric=False, group_size=None)),
    ):
        bits = None if grid is None else 4
        found = compress_experts(W, H, config(sparsity, bits=bits), grid)
        assert bool((found.weight_KOD[0][:, 3] == 0).all())
        assert found.num_dead_K == (1,)


def test_a_batch_of_experts_equals_one_at_a_time():
    W, H = problem(experts=5)
    grid = fit_grid(W, bits=4, symmetric=False, group_size=None)
    together = compress_experts(W, H, config(bits=4, block_size=8), grid)
    for k in range(5):
        alone = compress_experts(W, H[k : k + 1], config(bits=4, block_size=8), grid)
        torch.testing.assert_close(
            together.weight_KOD[k], alone.weight_KOD[0], rtol=1e-5, atol=1e-6
        )


def test_beats_magnitude_pruning():
    # Features of unequal size with one common factor: what a language model's look like.
    W = torch.randn(32, 64)
    X = torch.randn(400, 64) * torch.randn(64).exp() + torch.randn(400, 1)
    H = (X.T @ X)[None]
    found = compress_experts(W, H, config("0.5"), None).weight_KOD[0]
    magnitude = W.clone()
    magnitude[unstructured_mask(W.abs()[None], W.numel() // 2)[0]] = 0

    def loss(V):
        return float((((W - V) @ H[0]) * (W - V)).sum())

    assert loss(found) < 0.5 * loss(magnitude)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize(
    ("sparsity", "act_order"),
    [
        ("0.5", False),
        ("0.7", True),
        ("2:4", False),
        ("3:5", False),
        ("7:11", False),
        ("4:16", False),
    ],
)
def test_both_sweeps_agree(sparsity, act_order, bits, threads):
    """The one for a GPU, in PyTorch, and the compiled one, on any number of threads."""
    W, H = problem(rows=150, width=72, tokens=300, experts=3)
    group = int(sparsity.split(":")[1]) if ":" in sparsity else 1
    block = 32 // group * group
    settings_ = config(sparsity, bits=bits, act_order=act_order, group_size=24, block_size=block)
    grid = None if bits is None else fit_grid(W, bits=4, symmetric=False, group_size=24)
    torch.set_num_threads(threads)
    one, other = (
        compress_linears({"": W}, H, settings_, {"": grid}, compiled=compiled)[""]
        for compiled in (True, False)
    )
    # A saliency next to the threshold may fall to either side.
    same = one.kept_KOD == other.kept_KOD
    assert float(same.float().mean()) > 0.995
    np.testing.assert_allclose(one.relative_error_K, other.relative_error_K, rtol=1e-2)
    close = torch.isclose(one.weight_KOD, other.weight_KOD, rtol=1e-3, atol=1e-3)
    assert float(close.float().mean()) > (0.98 if bits is None else 0.9)
