"""Memory of a worker: a plan against a real run."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig

from sparse_expansion.cli import main
from sparse_expansion.config import Cluster, RunConfig
from sparse_expansion.jobs.forecast import forecast
from tests import tiny


@pytest.mark.parametrize(("clusters", "layers", "width"), [(1, 2, 1024), (8, 1, 768)])
def test_memory_is_foretold_within_a_fifth(
    tmp_path, tokenizer, long_text_folder, clusters, layers, width, capsys
):
    """Wide enough that the arrays, not the libraries, decide."""
    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4}
    sizes["num_hidden_layers"] = layers
    model = tiny.save_random("llama", tmp_path / "m", tokenizer, **sizes, num_attention_heads=8)
    flags = f"--model {model} --num_clusters {clusters} --experts-per-unit 8 --dataset-size 32 "
    # The solver's iterations take time and no memory.
    flags += "--seqlen 256 --calibration-inputs dense --solver-iterations 2 --json "
    # So do measured shares, which one of the two models has.
    flags += "--layer-sparsity uniform" if layers > 1 else ""
    assert main(["plan", *flags.split()]) == 0
    plan = json.loads(capsys.readouterr().out)
    output = [
        "--dataset",
        str(long_text_folder),
        "--output",
        str(tmp_path / "out"),
        "--threads",
        "2",
    ]
    output += ["--device", "cpu"]
    # In a process of its own, whose peak is that of this run.
    line = [sys.executable, "-m", "sparse_expansion.cli", "expand", *flags.split(), *output]
    found = json.loads(subprocess.run(line, check=True, capture_output=True).stdout)
    assert plan["memory_bytes"]["peak"] > 1.8 * plan["memory_bytes"]["held: libraries"]
    assert found["peak_memory_bytes"] == pytest.approx(plan["memory_bytes"]["peak"], rel=0.2)


def planned(gpu_bytes, **given):
    cluster = Cluster(gpu_bytes=gpu_bytes, gpu_share=given.pop("gpu_share", 1.0))
    config = RunConfig(experts_per_unit=1)
    model = LlamaConfig(num_hidden_layers=2)
    return forecast(config, model, cluster, **given)["memory_bytes"]


def test_cudas_context_is_in_the_process(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    cpu, gpu = planned(None), planned(80 * 10**9, device_bytes=0)
    assert gpu["gpu_resident"] == 0 and gpu["held: cuda_context"] == 750 << 20
    # Nothing stays on the card: the host holds all that it holds without one, and pinned files.
    files = gpu["held: writing"] - cpu["held: writing"]
    assert gpu["peak"] - cpu["peak"] == (750 << 20) + files
    # A build for GPUs has the larger libraries without one too.
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert planned(None)["peak"] - cpu["peak"] == planned(None)["held: cuda_libraries"] == 300 << 20
    assert planned(80 * 10**9, device_bytes=0) == gpu


def test_what_stays_on_the_card_is_not_the_hosts():
    none, some, plenty = (planned(80 * 10**9, device_bytes=size) for size in (0, 1 << 30, 1 << 40))
    assert some["gpu_resident"] == 1 << 30
    assert some["gpu_peak"] - none["gpu_peak"] == 1 << 30
    assert plenty["held: captured"] == plenty["held: values"] == 0
    assert none["held: captured"] >= some["held: captured"] > 0
    assert plenty["peak"] < some["peak"] <= none["peak"]


def test_what_stays_on_a_shared_card_is_bounded_by_the_share():
    """And makes way for the arrays of the largest unit, unless its size is given."""
    whole, half, small = (planned(80 * 10**9, gpu_share=share) for share in (1.0, 0.5, 0.12))
    working = whole["gpu_peak"] - whole["gpu_resident"]
    assert whole["gpu_resident"] <= 40 * 10**9 and half["gpu_resident"] <= 20 * 10**9
    assert half["gpu_peak"] <= 40 * 10**9
    assert small["gpu_resident"] == min(max(0, int(9.6 * 10**9) - working), int(4.8 * 10**9))
    assert Cluster(gpu="h100", gpu_share=0.5).product_rate == Cluster(gpu="h100").product_rate / 2
    with pytest.raises(ValueError, match="--gpus-per-worker 2 is outside 0 to 1"):
        Cluster(gpu_share=2)
