"""What a run did, against what its devices can do."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparse_expansion.cli import main
from sparse_expansion.config import (
    CompressionConfig,
    RoutingConfig,
    RunConfig,
    SparsityPattern,
)
from sparse_expansion.jobs import Measurements, model_shape
from sparse_expansion.model.streaming import ModelShell
from sparse_expansion.plan import (
    GroupShape,
    ModelShape,
    experts_flops,
    mlp_flops_per_token,
)
from sparse_expansion.report import profile_table
from sparse_expansion.units import Unit, UnitReport
from tests.tiny import SMALL_RUN


def test_shares_by_hand():
    measured = Measurements()
    assert measured.profile() is None
    measured.ceilings = {"matmul_flops_per_second": 100.0, "copy_bytes_per_second": 10.0}
    units = {
        key: Unit(key=key, stage=stage, cost=cost, traffic_bytes=traffic)
        for key, stage, cost, traffic in (
            ("a", "x", 30.0, 5),
            ("b", "x", 20.0, 7),
            ("c", "y", 0.0, 8),
        )
    }
    reports = [UnitReport(key, seconds, 0, {}) for key, seconds in (("a", 1), ("b", 1), ("c", 4))]
    measured.add(reports, units)
    profile = measured.profile()
    assert profile["stages"]["x"] == {
        "units": 2,
        "seconds": 2,
        "flops": 50.0,
        "traffic_bytes": 12,
        "matmul_share": 0.25,
        "copy_share": 0.6,
    }
    assert profile["stages"]["y"]["copy_share"] == 0.2
    line = next(row for row in profile_table(profile).splitlines() if row.startswith("x"))
    assert line.split() == ["x", "2", "2.0", "0.000", "0.00", "25%", "60%"]


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
    # A product of 8 x 8 with 8 x 6 takes 768: five in six iterations, the target and the error.
    solved = 512 + 7 * 768
    assert flops(pruner="admm", solver_iterations=6) == pytest.approx(640 + solved)
    found = flops(pruner="admm", solver_iterations=6, bits=4)
    assert found == pytest.approx(640 + solved + sweep)
    assert flops(pruner="wanda") == pytest.approx(640 + 768)


def test_operations_per_token_by_hand():
    shape = ModelShape(3, 8, (GroupShape("up", 8, 12), GroupShape("down", 6, 8)))
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


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_profile_of_a_run(executor, llama_folder, text_folder, tmp_path, capsys):
    flags = ["--executor", executor, "--profile", "--eval-windows", "4"]
    flags += ["--num-workers", "1"] if executor == "ray" else []
    where = ["--model", str(llama_folder), "--dataset", str(text_folder)]
    assert main(["run", *where, "--output", str(tmp_path / "m"), *SMALL_RUN, *flags]) == 0
    assert "of matmul" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "m" / "metrics.json").read_text())
    profile = metrics["profile"]
    assert all(value > 1e8 for value in profile["ceilings"].values())
    stages = profile["stages"]
    assert set(stages) == set(metrics["unit_seconds"]) > {"capture", "experts", "evaluate"}
    for name, work in stages.items():
        assert work["units"] > 0 and work["seconds"] == metrics["unit_seconds"][name]
        assert 0 <= work["matmul_share"] < 1.5 and 0 <= work["copy_share"] < 1.5
    assert stages["experts"]["flops"] > 0 and stages["capture"]["traffic_bytes"] > 0


def test_profile_of_an_evaluation(llama_folder, text_folder, capsys):
    where = ["--model", str(llama_folder), "--dataset", str(text_folder)]
    flags = ["--seqlen", "32", "--eval-windows", "4", "--profile", "--threads", "1"]
    assert main(["evaluate", *where, *flags, "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["profile"]["stages"]
    assert set(stages) == {"evaluate"}
    assert stages["evaluate"]["flops"] > 0 and stages["evaluate"]["traffic_bytes"] > 0
