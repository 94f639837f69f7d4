"""The plan: published sizes, arithmetic by hand, and the verdict."""

import copy
import json
from dataclasses import replace

import pytest

from sparse_expansion.cli import main
from sparse_expansion.config import (
    CalibrationConfig,
    Cluster,
    CompressionConfig,
    RefinementConfig,
    RoutingConfig,
    RunConfig,
    SparsityPattern,
)
from sparse_expansion.config.cluster import GPUS
from sparse_expansion.jobs.forecast import forecast
from sparse_expansion.planning.durations import PASSES
from sparse_expansion.work.registry import stage_of
from tests.published import MODELS

GPU = Cluster(num_workers=16, gpu_bytes=48_000_000_000, host_bytes=128_000_000_000)


def config(sparsity="0.5", bits=None, clusters=16, **changes):
    calibration = {"dataset_size": 128, "seqlen": 2048, "data_shards": 8, **changes}
    return RunConfig(
        compression=CompressionConfig(sparsity=SparsityPattern.parse(sparsity), bits=bits),
        routing=RoutingConfig(num_clusters=clusters),
        calibration=CalibrationConfig(calibration_inputs="dense", **calibration),
    )


@pytest.mark.parametrize("name", sorted(MODELS))
def test_published_parameter_counts(name):
    model, parameters = MODELS[name]
    plan = forecast(config(), model, GPU)
    assert plan["parameters"] == parameters
    assert plan["dense_checkpoint_bytes"] == 2 * parameters


def test_llama_2_7b_by_hand():
    model, parameters = MODELS["llama-2-7b"]
    mlp = 32 * 3 * 4096 * 11008
    plan = forecast(config(), model, GPU)
    # Half of 16 copies in two bytes, and a bit for each of their weights.
    assert plan["expert_bytes"] == 16 * mlp * (2 // 2 + 1 / 8)
    plan = forecast(config("2:4", 4), model, GPU)
    assert plan["expert_bytes"] == 16 * mlp * (3 / 4 + 4 / 2) / 8
    grids = 32 * (2 * 11008 + 4096) * 2 * 4
    routers = 32 * 4 * sum(d + (d // 32) * (d + 16) for d in (4096, 11008))
    assert plan["router_bytes"] == grids + routers
    assert plan["checkpoint_bytes"] == (
        plan["expert_bytes"] + plan["router_bytes"] + 2 * (parameters - mlp)
    )
    assert plan["units"]["experts"] == 32 * 2 * 4
    assert plan["units"]["capture"] == 32 * 8


def test_disk_by_hand():
    model, _ = MODELS["llama-2-7b"]
    plan = forecast(config(), model, GPU)
    hidden = 128 * 2048 * 4096 * 2
    assert plan["disk_bytes"] == plan["checkpoint_bytes"] + 2 * hidden
    trained = config()
    trained = replace(trained, refinement=RefinementConfig(finetune=1))
    more = forecast(trained, model, GPU)["disk_bytes"] - plan["disk_bytes"]
    assert more == 2 * (plan["expert_bytes"] // 32)


@pytest.mark.parametrize("name", sorted(GPUS))
def test_a_gpus_published_figures(name):
    cluster = Cluster(gpu=name)
    assert cluster.gpu_memory_bytes == GPUS[name].memory_bytes
    assert cluster.product_rate == 0.7 * GPUS[name].float32_rate
    own = Cluster(gpu=name, gpu_bytes=7, flops_per_second=3.0)
    assert (own.gpu_memory_bytes, own.product_rate) == (7, 3.0)


def test_a_gpu_is_planned_for():
    model, _ = MODELS["llama-2-13b"]
    h100, h200, a100 = (forecast(config(), model, Cluster(gpu=g)) for g in ("h100", "h200", "a100"))
    assert h100["worker_seconds"] == h200["worker_seconds"]
    assert a100["worker_seconds"]["experts"] > 3 * h100["worker_seconds"]["experts"]
    assert "gpu_peak" in h100["memory_bytes"]
    small = forecast(config(), MODELS["llama-2-70b"][0], Cluster(gpu="l40s"))
    assert "its GPU has 48.0 GB" in small["verdict"]["text"]
    with pytest.raises(ValueError, match="gpu 'h1' is none of h100, h200, a100, l40s"):
        Cluster(gpu="h1")


@pytest.mark.parametrize(("preset", "measured"), [("paper", 16.6), ("best", 37.4)])
def test_what_was_measured_on_a_gpu(preset, measured, tmp_path, capsys):
    """Two blocks of Llama 2 13B's shape, expanded on one H200; see docs/performance.md."""
    model, _ = MODELS["llama-2-13b"]
    blocks = copy.deepcopy(model)
    blocks.num_hidden_layers = 2
    blocks.save_pretrained(tmp_path)
    flags = "--gpu h200 --num_clusters 16 --dataset-size 64 --seqlen 2048 --json"
    assert main(["plan", "--model", str(tmp_path), "--preset", preset, *flags.split()]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert 3600 * plan["hours"] == pytest.approx(measured, rel=0.25)


def seconds(plan, stage, units=0):
    """What a stage takes beside the fixed cost of its units."""
    return plan["worker_seconds"][stage] - 0.05 * plan["units"][stage]


def test_rates_of_a_gpus_stages_by_hand():
    """Tensor cores take passes in half precision, and the solver's products by parts."""
    model, _ = MODELS["llama-2-7b"]
    plan = forecast(config(), model, Cluster(gpu="a100"))
    swept = 32 * 16 * sum(d**3 / 3 + o * d * (d + 128) for d, o in ((4096, 22016), (11008, 4096)))
    rest = plan["flops"]["experts"] - swept
    by_hand = swept / (0.22 * 19.5e12) + rest / (0.086 * 312e12)
    assert seconds(plan, "experts") == pytest.approx(by_hand, rel=1e-6)
    assert seconds(plan, "embed") == pytest.approx(plan["flops"]["embed"] / (0.16 * 312e12))
    assert seconds(plan, "router") == pytest.approx(plan["flops"]["router"] / (0.3 * 19.5e12))
    half = forecast(config(), model, Cluster(gpu="a100", flops_per_second=0.35 * 19.5e12))
    assert seconds(half, "router") == pytest.approx(2 * seconds(plan, "router"))
    whole = forecast(replace(config(), dtype="float32"), model, Cluster(gpu="a100"))
    assert seconds(whole, "embed") == pytest.approx(plan["flops"]["embed"] / (0.7 * 19.5e12))
    unknown = forecast(config(), model, Cluster(gpu_bytes=80_000_000_000, flops_per_second=15e12))
    for stage in ("embed", "router", "experts"):
        assert seconds(unknown, stage) == pytest.approx(unknown["flops"][stage] / 15e12)


def test_rates_are_of_stages_that_there_are():
    model, _ = MODELS["llama-2-7b"]
    preset = forecast(config(), model, Cluster(gpu="h100"))
    assert {*preset["units"]} & PASSES == {"embed", "capture", "gather"}
    assert all(stage_of(name) for name in PASSES)


def test_the_solver_has_the_rate_of_parts_and_what_rounds_that_of_sweeps():
    model, _ = MODELS["llama-2-7b"]

    def made(bits):
        compression = CompressionConfig(pruner="admm", sparsity="2:4", bits=bits)
        return forecast(replace(config(), compression=compression), model, Cluster(gpu="h100"))

    solved, rounded = made(None), made(4)
    assert seconds(solved, "experts") == pytest.approx(
        solved["flops"]["experts"] / (0.086 * 989e12)
    )
    more = rounded["flops"]["experts"] - solved["flops"]["experts"]
    assert seconds(rounded, "experts") - seconds(solved, "experts") == pytest.approx(
        more / (0.22 * 67e12), rel=1e-3
    )


def test_verdicts():
    seventy, _ = MODELS["llama-2-70b"]
    plan = forecast(config(), seventy, GPU)
    assert not plan["verdict"]["fits"]
    assert "its GPU has 48.0 GB; use --experts-per-unit " in plan["verdict"]["text"]
    fewer = int(plan["verdict"]["text"].split("--experts-per-unit ")[1].split()[0])
    settings = config().to_dict()
    settings["experts_per_unit"] = fewer
    assert forecast(RunConfig.from_dict(settings), seventy, GPU)["verdict"]["fits"]
    tiny_gpu = Cluster(num_workers=2, gpu_bytes=4_000_000_000)
    text = forecast(config(), seventy, tiny_gpu)["verdict"]["text"]
    assert "at the least settings it needs" in text
    assert forecast(config(), MODELS["pythia-12b"][0], GPU)["verdict"]["text"] == "fits"
    small_host = Cluster(num_workers=2, host_bytes=60_000_000_000)
    text = forecast(config(dataset_size=4096), MODELS["llama-2-13b"][0], small_host)["verdict"]
    assert "object stores take" in text["text"] and "--num-workers" in text["text"]


def test_more_workers_take_less_time_and_the_cost_is_theirs():
    model, _ = MODELS["pythia-12b"]
    few = forecast(config(), model, Cluster(num_workers=4, price_per_hour=2.0))
    many = forecast(config(), model, Cluster(num_workers=16, price_per_hour=2.0))
    assert many["hours"] < few["hours"] / 3
    assert many["cost"] == pytest.approx(2.0 * 16 * many["hours"])
    assert 0.8 < many["utilisation"] <= 1


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--num-workers", "0", "at least 1"),
        ("--tflops", "0", "more than 0"),
        ("--gpu-memory", "much", "not a number of bytes"),
        ("--price", "-1", "not be negative"),
        ("--bandwidth", "0", "more than 0"),
    ],
)
def test_bad_cluster(flag, value, words, neox_folder, capsys):
    assert main(["plan", "--model", str(neox_folder), flag, value]) == 2
    assert words in capsys.readouterr().err
