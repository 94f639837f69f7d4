"""How much a block's output depends on its first linears', against its Jacobian in float64."""

import pytest
import torch
from torch import nn

from sparse_expansion.data.activations import AllInputsSeenError
from sparse_expansion.data.sensitivities import OutputSensitivities

WIDTH, HIDDEN, TOKENS = 5, 7, 6


class Gated(nn.Module):
    """SwiGLU, as in Llama."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, HIDDEN)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, X):
        return self.behind(self.gate(X), self.up(X))

    def behind(self, gate, up):
        return self.down(nn.functional.silu(gate) * up)


class Plain(nn.Module):
    """An MLP without a gate, as in GPT-NeoX."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, X):
        return self.behind(self.up(X))

    def behind(self, up):
        return self.down(nn.functional.gelu(up))


def oracle(block, first, X):
    """By linear the energy of all the block's outputs' derivatives by its own, ``[T, O]``."""
    block = block.double()
    outputs = tuple(block.get_submodule(name)(X.double()) for name in first)
    jacobians = torch.autograd.functional.jacobian(block.behind, outputs)
    # Of [T, O of the block, T, O of the linear] every token's own.
    return [torch.einsum("tito->tio", found).square().sum(dim=1) for found in jacobians]


@pytest.mark.parametrize(("kind", "first"), [(Gated, ("gate", "up")), (Plain, ("up",))])
def test_against_the_jacobian(kind, first):
    torch.manual_seed(0)
    block = kind().requires_grad_(False)
    X = torch.randn(TOKENS, WIDTH)
    labels_T = torch.tensor([0, 2, 2, 0, 0, 2], dtype=torch.int16)
    norms_D = block.down.weight.square().sum(dim=0).sqrt()
    plain = block(X)
    with (
        torch.no_grad(),
        OutputSensitivities(block, first, {"down": norms_D}, labels_T, 3) as found,
    ):
        for part in (slice(0, 2), slice(2, TOKENS)):
            with pytest.raises(AllInputsSeenError):
                block(X[None, part])
            found.add_up(part)
    wanted = oracle(block, first, X)
    assert set(found.squares_KO) == set(first)
    for name, wanted_TO in zip(first, wanted, strict=True):
        squares_KO = found.squares_KO[name]
        expected_KO = torch.stack([wanted_TO[labels_T == k].sum(dim=0) for k in range(3)])
        torch.testing.assert_close(squares_KO, expected_KO, rtol=1e-5, atol=1e-8)
        assert bool((squares_KO[1] == 0).all())
    # The hooks are gone, and nothing was changed.
    assert torch.equal(block.float()(X), plain) and not block(X).requires_grad


def test_gradients_are_as_they_were_behind_it():
    block, behind = Plain().requires_grad_(False), {"down": torch.ones(HIDDEN)}
    with torch.no_grad():
        with OutputSensitivities(block, ("up",), behind, torch.zeros(0), 1):
            assert torch.is_grad_enabled()
        assert not torch.is_grad_enabled()
