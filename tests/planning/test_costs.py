"""Operations that units of work are taken to cost: by hand, and against a count."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparse_expansion.config import (
    CompressionConfig,
    RoutingConfig,
    RunConfig,
    SparsityPattern,
)
from sparse_expansion.model.streaming import ModelShell
from sparse_expansion.planning.costs import experts_flops, mlp_flops_per_token
from sparse_expansion.planning.shapes import GroupShape, ModelShape, model_shape


@pytest.mark.parametrize("folder", ["llama_folder", "neox_folder"])
def test_operations_of_a_block_against_a_count(folder, request):
    shell = ModelShell(request.getfixturevalue(folder))
    windows = torch.randint(1, 400, (2, 32))
    hidden = shell.embed(windows)
    block = shell.load_block(0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shell.call(0, windows).run(block, hidden)
    estimated = windows.numel() * model_shape(shell).block_flops(32)
    assert estimated == pytest.approx(counter.get_total_flops(), rel=0.25)


def test_operations_of_an_expert_by_hand():
    # 10 tokens x 8^2 (half a Hessian) + 8^3 + 6 x 8 x (8 + 4)
    def flops(**settings):
        config = CompressionConfig(block_size=4, **settings)
        return experts_flops(GroupShape("up", 8, 6), config, 10)

    sweep = 512 / 3 + 576
    assert flops() == pytest.approx(640 + sweep)
    # A product of 8 x 8 with 8 x 6 takes 768: five in six iterations, and the error.
    solved = 512 + 6 * 768
    assert flops(pruner="admm", solver_iterations=6) == pytest.approx(640 + solved)
    found = flops(pruner="admm", solver_iterations=6, bits=4)
    assert found == pytest.approx(640 + solved + sweep)
    assert flops(pruner="wanda") == pytest.approx(640 + 768)


def test_operations_per_token_by_hand():
    shape = ModelShape(3, 8, (GroupShape("up", 8, 12), GroupShape("down", 6, 8, level=1)))
    routing = RoutingConfig(num_clusters=4, pca_reduction_factor=2)
    compression = CompressionConfig(sparsity=SparsityPattern.parse("2:4"))
    config = RunConfig(compression=compression, routing=routing)
    assert mlp_flops_per_token(config, shape) == {
        "dense": 3 * 2 * (8 * 12 + 6 * 8),
        # Of six columns, the last two are half a group: one of them is kept.
        "experts": 3 * 2 * (4 * 12 + 3 * 8),
        # Four clusters are no more than up's four features, but more than down's three.
        "router": 3 * 2 * (8 * 4 + 3 * (6 + 4)),
    }
    one = RunConfig(routing=RoutingConfig(num_clusters=1))
    assert mlp_flops_per_token(one, shape)["router"] == 0
