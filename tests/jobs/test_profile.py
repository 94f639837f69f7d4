"""What a run did, against what its devices can do."""

import json
from collections import Counter

import pytest
import torch

from sparse_expansion.cli import main
from sparse_expansion.config import RunConfig
from sparse_expansion.jobs.measurements import Measurements
from sparse_expansion.model.streaming import ModelShell
from sparse_expansion.planning.allocation import gap_units_of
from sparse_expansion.planning.expansion import expansion_units
from sparse_expansion.planning.shapes import model_shape
from sparse_expansion.report.describe import describe_machine
from sparse_expansion.report.tables import profile_table
from sparse_expansion.units import Unit, UnitReport
from tests.tiny import SMALL_RUN


def test_devices_of_all_workers():
    measured = Measurements()
    units = {key: Unit(key=key, stage="x") for key in "abc"}
    done = [("a", "H100", 5), ("b", "L40S", 7), ("c", "H100", 6)]
    measured.add(
        (
            UnitReport(key, 1, 0, {}, device=device, device_peak_memory_bytes=peak * 10**9)
            for key, device, peak in done
        ),
        units,
    )
    found = measured.machine()
    assert found["devices"] == ["H100", "L40S"] and found["device_peak_memory_bytes"] == 7 * 10**9
    text = describe_machine(found)
    assert "on H100, L40S (peak 7.0 GB of its memory); " in text
    assert f"torch {torch.__version__}" in text
    assert describe_machine({"seconds": {}}) == ""


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


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_profile_of_a_run(executor, llama_folder, text_folder, tmp_path, capsys, request):
    flags = ["--profile", "--eval-windows", "4"]
    if executor == "ray":
        flags += [*request.getfixturevalue("ray_flags"), "--num-workers", "1"]
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
    # What was done is what the plan says, and what it says of it; sparsities, which were measured,
    # change no operations.
    config, shape = RunConfig.from_dict(metrics["config"]), model_shape(ModelShell(llama_folder))
    units, flops, traffic = Counter(), Counter(), Counter()
    for unit in [*gap_units_of(config, shape, 1), *expansion_units(config, shape)]:
        units[unit.stage] += 1
        flops[unit.stage] += unit.cost
        traffic[unit.stage] += unit.traffic_bytes
    assert set(units) == set(stages) - {"evaluate"}
    for name in units:
        assert stages[name]["units"] == units[name]
        assert stages[name]["flops"] == pytest.approx(flops[name])
    for name in ("embed", "capture", "router", "gather"):
        assert stages[name]["traffic_bytes"] == traffic[name]
    # Three blocks of two groups, each of two ranges of two experts.
    assert stages["experts"]["units"] == 3 * 2 * 2
    # Four windows, dense and expanded: every block, and the head of 512 words.
    tokens = 2 * 4 * 48
    assert stages["evaluate"]["units"] == 2
    each = 3 * shape.block_flops(48) + 2 * 32 * 512
    assert stages["evaluate"]["flops"] == pytest.approx(tokens * each)


def test_profile_of_an_evaluation(llama_folder, text_folder, capsys):
    where = ["--model", str(llama_folder), "--dataset", str(text_folder)]
    flags = ["--seqlen", "32", "--eval-windows", "4", "--profile", "--threads", "1"]
    assert main(["evaluate", *where, *flags, "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["profile"]["stages"]
    assert set(stages) == {"evaluate"}
    assert stages["evaluate"]["flops"] > 0 and stages["evaluate"]["traffic_bytes"] > 0
