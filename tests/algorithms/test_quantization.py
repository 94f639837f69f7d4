import pytest
import torch

from sparse_expansion.algorithms.quantization import dequantize, fit_grid, quantize


def test_asymmetric_by_hand():
    # Row [-1, 0, 2], 2 bits: scale 3/3 = 1, zero point 1, codes 0..3 are -1, 0, 1, 2.
    grid = fit_grid(torch.tensor([[-1.0, 0.0, 2.0]]), bits=2, symmetric=False, group_size=None)
    assert grid.scale_OG.tolist() == [[1.0]]
    assert grid.zero_point_OG.tolist() == [[1.0]]
    codes = quantize(
        torch.tensor([-5.0, -0.4, 0.6, 9.0]), grid.scale_OG[0], grid.zero_point_OG[0], 3
    )
    assert codes.tolist() == [0, 1, 2, 3]
    assert dequantize(codes, grid.scale_OG[0], grid.zero_point_OG[0]).tolist() == [-1, 0, 1, 2]


def test_symmetric_by_hand():
    # max |w| = 3, 2 bits: scale 6/3 = 2, zero point 2.
    grid = fit_grid(torch.tensor([[-1.0, 3.0]]), bits=2, symmetric=True, group_size=None)
    assert (grid.scale_OG.item(), grid.zero_point_OG.item()) == (2.0, 2.0)


def test_positive_rows_keep_zero_on_the_grid():
    grid = fit_grid(torch.tensor([[2.0, 5.0]]), bits=4, symmetric=False, group_size=None)
    assert grid.zero_point_OG.item() == 0 and grid.scale_OG.item() == pytest.approx(5 / 15)


def test_all_zero_row():
    grid = fit_grid(torch.zeros(1, 4), bits=4, symmetric=False, group_size=None)
    assert grid.scale_OG.item() == 1.0 and grid.zero_point_OG.item() == 0.0


def test_groups_have_their_own_ranges_and_a_shorter_last_one():
    W = torch.tensor([[1.0, -1.0, 10.0, -10.0, 100.0]])
    grid = fit_grid(W, bits=8, symmetric=True, group_size=2)
    torch.testing.assert_close(grid.scale_OG, torch.tensor([[2.0, 20.0, 200.0]]) / 255)
    scale, _ = grid.columns(torch.arange(5))
    torch.testing.assert_close(scale[:, 0], torch.tensor([2.0, 2, 20, 20, 200]) / 255)


@pytest.mark.parametrize("bits", range(2, 9))
def test_rounding_error_is_at_most_half_a_step(bits):
    W = torch.randn(5, 64)
    grid = fit_grid(W, bits=bits, symmetric=False, group_size=None)
    codes = quantize(W, grid.scale_OG, grid.zero_point_OG, grid.max_code)
    assert float(codes.min()) >= 0 and float(codes.max()) <= 2**bits - 1
    error = (dequantize(codes, grid.scale_OG, grid.zero_point_OG) - W).abs()
    # The zero point is rounded too, which can push the two ends out by half a step more.
    assert bool((error <= grid.scale_OG * 1.001).all())
    assert float((error <= 0.5001 * grid.scale_OG).float().mean()) > 0.9
