"""Memory of a worker: a plan against a real run."""

import json
import subprocess
import sys

import pytest
from transformers import LlamaConfig

from sparse_expansion.cli import main
from sparse_expansion.config import Cluster, RunConfig
from sparse_expansion.jobs.forecast import forecast
from tests import tiny


@pytest.mark.parametrize(("clusters", "layers", "width"), [(1, 2, 1024), (8, 1, 768)])
def test_memory_is_foretold_within_a_fifth(
    tmp_path, tokenizer, text_folder, clusters, layers, width, capsys
):
    """Wide enough that the arrays, not the libraries, decide."""
    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4}
    sizes["num_hidden_layers"] = layers
    model = tiny.save_random("llama", tmp_path / "m", tokenizer, **sizes, num_attention_heads=8)
    flags = f"--model {model} --num_clusters {clusters} --experts-per-unit 8 --dataset-size 32 "
    # The solver's iterations take time and no memory.
    flags += "--seqlen 256 --calibration-inputs dense --solver-iterations 2 --json"
    assert main(["plan", *flags.split()]) == 0
    plan = json.loads(capsys.readouterr().out)
    output = ["--dataset", str(text_folder), "--output", str(tmp_path / "out"), "--threads", "2"]
    output += ["--device", "cpu"]
    # In a process of its own, whose peak is that of this run.
    line = [sys.executable, "-m", "sparse_expansion.cli", "expand", *flags.split(), *output]
    found = json.loads(subprocess.run(line, check=True, capture_output=True).stdout)
    assert plan["memory_bytes"]["peak"] > 1.8 * plan["memory_bytes"]["held: libraries"]
    assert found["peak_memory_bytes"] == pytest.approx(plan["memory_bytes"]["peak"], rel=0.2)


def test_cudas_context_is_in_the_process():
    plans = [
        forecast(RunConfig(), LlamaConfig(num_hidden_layers=2), Cluster(gpu_bytes=size))[
            "memory_bytes"
        ]
        for size in (None, 80 * 10**9)
    ]
    assert plans[1]["peak"] - plans[0]["peak"] == plans[1]["held: cuda_context"] == 750 << 20
