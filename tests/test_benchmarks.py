"""The baseline that speed is measured against does the same work, and the benchmark runs."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import baseline, full_size, linear, published, serve, steps, sweep
from benchmarks.models import named_folders
from benchmarks.quality import __main__ as table
from benchmarks.quality import neox
from sparse_expansion import cli
from sparse_expansion.algorithms.compress import compress_experts
from sparse_expansion.algorithms.hessian import hessian_sum
from sparse_expansion.config import CompressionConfig
from tests.model.running import expand
from tests.model.test_sources import write_gguf


def test_the_baseline_prunes_as_we_do():
    torch.manual_seed(0)
    mixing = torch.randn(160, 160) / 12 + torch.eye(160)
    W, X = torch.randn(40, 160), torch.randn(600, 160) @ mixing
    sums = published.Hessians(160, 1)
    for index, part in enumerate(X.split(200)):
        sums.add(lambda rows: torch.zeros(len(rows), dtype=torch.int64), index, part)
    torch.testing.assert_close(sums.H[0], 2 / 600 * X.T @ X, rtol=1e-4, atol=1e-4)
    theirs = published.prune(W, sums.H[0], 0.5)
    ours = compress_experts(W, hessian_sum(X).sum_DD[None], CompressionConfig(), None)
    same = (theirs != 0) == ours.kept_KOD[0]
    assert float(same.float().mean()) > 0.995
    np.testing.assert_allclose(theirs[same], ours.weight_KOD[0][same], rtol=0.05, atol=0.02)


def test_the_baselines_experts_route_each_token():
    experts = [torch.eye(3), 2 * torch.eye(3)]
    linear = published.RoutedLinear(lambda X: (X[:, 0] > 0).long(), experts, torch.ones(3))
    X = torch.tensor([[[1.0, 2.0, 3.0], [-1.0, 2.0, 3.0]]])
    assert linear(X).tolist() == [[[3.0, 5.0, 7.0], [0.0, 3.0, 4.0]]]


def test_the_benchmark_compares_equal_work(llama_folder, text_folder, capsys):
    flags = "--layers 1 --windows 4 --seqlen 32 --clusters 2 --restarts 2 --threads 1".split()
    baseline.main([str(llama_folder), str(text_folder), *flags])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sum(result["baseline_parts"].values()) == pytest.approx(result["baseline_seconds"])
    assert min(result["baseline_parts"].values()) > 0
    assert result["expand_seconds"] > 0
    assert set(result["unavoidable_seconds"]) == {
        "passes",
        "hessians",
        "factorizations",
        "error products",
    }
    assert result["blocks"] == 1
    # Both prune half of every expert, and lose as much of the block's output by it.
    assert result["baseline_zeros"] == pytest.approx(0.5, abs=1e-3)
    assert result["expand_zeros"] == pytest.approx(result["baseline_zeros"], abs=1e-3)
    assert result["baseline_error"] > 0
    assert result["expand_error"] == pytest.approx(result["baseline_error"], rel=0.1)


def test_a_model_of_full_size_is_expanded_in_pieces(tmp_path, text_folder, capsys):
    """Ended at once, gone on, and done: the same command line, in processes of its own."""
    flags = f"tiny --work {tmp_path} --windows 4 --seqlen 32 --eval-windows 2 --device cpu "
    flags += f"--dataset {text_folder}"
    code = full_size.main([*flags.split(), "--seconds", "0"])
    assert code == full_size.UNFINISHED
    assert json.loads(capsys.readouterr().out)["finished"] is False
    made = (tmp_path / "tiny-3-32" / "model.safetensors").stat().st_mtime_ns
    assert full_size.main(flags.split()) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["finished"] and found["layers"] == 3 and found["tokens"] == 128
    assert found["perplexity_expanded"] > 1 and found["unit_seconds"]["experts"] > 0
    assert (tmp_path / "tiny-3-32" / "model.safetensors").stat().st_mtime_ns == made


def test_serving_is_measured_for_every_model(
    tmp_path, llama_folder, text_folder, monkeypatch, capsys
):
    output = expand(llama_folder, text_folder, tmp_path / "m")
    commands = []

    def run_here(line, **options):
        """The measuring process's work in this one: importing PyTorch takes longer."""
        commands.append(line[:3])
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert serve.main(line[3:]) == 0
        return subprocess.CompletedProcess(line, 0, out.getvalue())

    monkeypatch.setattr(serve.subprocess, "run", run_here)
    flags = "--device cpu --batches 1 2 --prefill 8 40 --window 20 --new-tokens 2 --repeat 1"
    assert serve.main([f"dense={llama_folder}", f"ours={output}", *flags.split()]) == 0
    assert commands == [[sys.executable, "-m", "benchmarks.serve"]] * 2
    lines = capsys.readouterr().out.splitlines()
    lines = lines[lines.index("| | dense | ours |") :]
    assert lines[0] == "| | dense | ours |"
    first, second = (json.loads(line) for line in lines[-2:])
    assert (first["name"], second["name"]) == ("dense", "ours")
    wanted = {"load_seconds", "tokens_per_second_1", "tokens_per_second_2", "prefill_seconds_8"}
    wanted |= {"prefill_seconds_40", "first_token_seconds", "memory_bytes"}
    for row in (first, second):
        assert row.keys() - {"name", "device"} == wanted
        assert all(row[key] > 0 for key in wanted)
    # Every figure is in the table, beside its ratio to the first model's.
    assert sum(row.startswith("| ") and "(1.00)" in row for row in lines) == len(wanted)


def test_serving_names_a_model_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as ended:
        serve.main(["dense=/nowhere/model"])
    assert ended.value.code == 2
    assert "/nowhere/model" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("benchmark", [linear, steps])
def test_what_measures_a_gpu_runs_there_and_says_so_elsewhere(benchmark, capsys):
    small = "--rows 64 --columns 640 --experts 2 --repeat 1".split()
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit) as ended:
            benchmark.main(small)
        assert ended.value.code == 2 and "no CUDA device here" in capsys.readouterr().err
        return
    given = ["--tokens", "1", "20"] if benchmark is linear else ["--only", "half", "sweep", "pack"]
    assert benchmark.main([*small, *given]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]
    times = [value for row in rows for name, value in row.items() if name.endswith("ms")]
    assert times and min(times) > 0


def test_benchmarks_take_models_wherever_they_come_from(tmp_path, llama_folder, monkeypatch):
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "tiny.gguf"
    write_gguf(gguf, np, file, llama_folder)
    monkeypatch.setenv("SPARSE_EXPANSION_CACHE", str(tmp_path / "cache"))
    found = named_folders([str(file), f"ours={llama_folder}"])
    assert list(found) == ["tiny.gguf", "ours"]
    assert found["ours"] == llama_folder
    assert (found["tiny.gguf"] / "config.json").is_file()
    with pytest.raises(ValueError, match="two models are called a"):
        named_folders([f"a={llama_folder}", f"a={file}"])


def test_the_sweeps_benchmark_finds_equal_masks(capsys):
    sweep.main("--width 160 --rows 40 96 --threads 1".split())
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(row) for row in lines if row.startswith("{")]
    assert [row["rows"] for row in rows] == [40, 96]
    assert all(row["same_mask"] > 0.995 and row["ratio"] > 0 for row in rows)


def test_the_quality_tables_model_is_trained_and_loads(text_folder, tmp_path, monkeypatch, capsys):
    # One package in place of the whole standard library.
    library = {"stdlib": str(Path(json.__file__).parent)}
    monkeypatch.setattr(neox.sysconfig, "get_paths", lambda *_: library)
    neox.main([str(text_folder), str(tmp_path / "model"), "--steps", "3"])
    model = AutoModelForCausalLM.from_pretrained(capsys.readouterr().out.strip())
    tokens = torch.tensor(
        [AutoTokenizer.from_pretrained(tmp_path / "model")("def it")["input_ids"]]
    )
    loss = model(input_ids=tokens, labels=tokens).loss
    assert (model.config.vocab_size, model.config.hidden_size) == (4096, 128)
    assert loss.isfinite()


def test_docstrings_are_read_and_tests_left_out(tmp_path):
    for name in ("a.py", "test/b.py", "site-packages/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(
            f'"""Of {name}."""\ndef f():\n    """Of f."""\ndef g(): 1 / 0\n'
        )
    assert list(neox.docstrings(tmp_path)) == ["Of a.py.", "Of f.", ""]


@pytest.fixture
def run_in_process(monkeypatch, capsys):
    """The quality table's commands in this process, where importing PyTorch takes no time again."""
    commands = []

    def run_here(*arguments):
        commands.append(arguments[0])
        capsys.readouterr()
        assert cli.main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    monkeypatch.setattr(table, "command", run_here)
    return commands


def test_the_quality_table_grows_and_is_not_run_twice(
    neox_folder, text_folder, tmp_path, run_in_process, capsys
):
    commands = run_in_process
    settings = {
        "common": "--seqlen 48 --threads 1",
        "evaluation": "--eval-windows 4",
        "calibrations": {"16 windows": "--dataset-size 16 --block-size 16"},
        "points": {"70 %": "--sparsity 0.7", "4 bits": "--sparsity 0.5 --quantize"},
        "methods": {
            "one cluster": "--num_clusters 1",
            "magnitude": "--num_clusters 1 --pruner magnitude",
        },
        "leave_out": [["4 bits", "magnitude"]],
        "seeds": [0],
        "reference": "one cluster",
    }
    file = tmp_path / "settings.json"
    output = tmp_path / "out"
    line = [str(neox_folder), str(text_folder), "--output", str(output)]
    line += ["--settings", str(file), "--hold-out", "0.1"]

    def rows_after_a_run():
        file.write_text(json.dumps(settings))
        table.main(line)
        return json.loads((output / "rows.json").read_text()), capsys.readouterr().out

    rows, text = rows_after_a_run()
    assert [(row["point"], row["method"]) for row in rows] == [
        ("70 %", "one cluster"),
        ("70 %", "magnitude"),
        ("4 bits", "one cluster"),
    ]
    assert (commands.count("expand"), commands.count("evaluate")) == (3, 3 + 1)
    assert rows[0]["gap"] < rows[1]["gap"] and rows[0]["hold_out"] == 0.1
    ratio = rows[0]["perplexity"] / rows[0]["perplexity_dense"]
    np.testing.assert_allclose(rows[0]["gap"], np.log(ratio))
    assert f"{rows[1]['gap'] / rows[0]['gap']:.3f} (0.000)" in text
    assert 0 < rows[2]["size"] < rows[0]["size"] < 1 and f"{rows[0]['size']:.2f}" in text
    # Half of the weights in 4 bits and a bit for each of all, then grids and routers.
    assert 3 < rows[2]["bits"] < rows[0]["bits"] and f"{rows[2]['bits']:.2f}" in text
    assert f"{rows[2]['memory_bytes'] / 1e6:.0f}" in text
    assert (output / "ratios-0.svg").exists() and (output / "summary.parquet").exists()
    assert not (output / "tokens-0.svg").exists()
    settings["calibrations"]["8 windows"] = "--dataset-size 8 --block-size 16"
    settings["seeds"] = [0, 1]
    settings["points"] = {"70 %": "--sparsity 0.7"}
    more, text = rows_after_a_run()
    assert (commands.count("expand"), commands.count("evaluate")) == (9, 9 + 1)
    assert more[:3] == rows and [row["seed"] for row in more[3:]] == [0, 0, 1, 1, 1, 1]
    assert "4 bits" not in text
    assert {row["calibration_tokens"] for row in more} == {8 * 48, 16 * 48}
    curve = (output / "tokens-0.svg").read_text()
    assert "calibration tokens" in curve and "magnitude" in curve and "384" in curve
    mixed = "--dataset-size 8 --block-size 16 --dataset {dataset}:1,{other}:1"
    settings |= {
        "also": {"other": str(text_folder)},
        "calibrations": {"both": mixed},
        "methods": {"one cluster": "--num_clusters 1", "two": "--num_clusters 2"},
        "seeds": [0],
    }
    both, text = rows_after_a_run()
    assert (commands.count("expand"), commands.count("evaluate")) == (11, 10 + 2 + 2 * 2)
    one, two = both[-2:]
    # The other text is the same one, and as much of it is kept aside.
    np.testing.assert_allclose(one["others"]["other"]["gap"], one["gap"])
    assert (one["used_experts"], one["others"]["other"]["used_experts"]) == (1, 1)
    assert 1 < two["used_experts"] <= 2 and "thin_share" in two["others"]["other"]
    assert f"{two['others']['other']['gap'] / one['gap']:.3f} (0.000)" in text
    assert "70 %, both, two, other" in text
    bars = (output / "texts-0-0.svg").read_text()
    assert "calibrated on" in bars and "other" in bars and "two" in bars


def test_a_dense_models_grid_is_a_row_of_the_ledger(
    neox_folder, text_folder, tmp_path, run_in_process, capsys
):
    """The flags of the settings file, on a smaller text: a code a weight, and what grids take."""
    settings = json.loads(Path(table.__file__).with_name("ledger.json").read_text())
    settings |= {
        "common": "--seqlen 48 --threads 1",
        "evaluation": "--eval-windows 4",
        "calibrations": {"16 windows": "--dataset-size 16 --block-size 16"},
    }
    dense = ("dense, 8 bits", "dense, 4 bits", "dense, 4 bits, groups of 128")
    settings["methods"] = {name: settings["methods"][name] for name in dense}
    settings["reference"] = dense[0]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    line = [str(neox_folder), str(text_folder), "--output", str(tmp_path / "out")]
    table.main([*line, "--settings", str(tmp_path / "settings.json")])
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())
    bits = {row["method"]: row["bits"] for row in rows}
    shapes = [
        tuple(weight.shape)
        for name, weight in AutoModelForCausalLM.from_pretrained(neox_folder).named_parameters()
        if "mlp" in name and name.endswith("weight")
    ]
    weights = sum(rows * columns for rows, columns in shapes)
    # A scale and a zero point a row or group; a mean and one centroid a router. All float32.
    routers = sum(2 * 32 * columns for _, columns in shapes)
    for name, code in zip(dense[:2], (8, 4), strict=True):
        grids = sum(2 * 32 * rows for rows, _ in shapes)
        assert bits[name] == pytest.approx(code + (grids + routers) / weights)
    grids = sum(2 * 32 * rows * -(-columns // 128) for rows, columns in shapes)
    assert bits[dense[2]] == pytest.approx(4 + (grids + routers) / weights)
    assert rows[0]["gap"] < rows[1]["gap"] and rows[0]["cost"] == 1
    assert "dense, 4 bits, groups of 128" in capsys.readouterr().out
