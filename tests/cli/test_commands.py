"""The commands: results and errors."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from datetime import datetime, timedelta, timezone

import pytest
import torch
from safetensors.torch import load_file

from sparse_expansion.cli import main
from sparse_expansion.config import CompressionConfig, RunConfig
from sparse_expansion.data.corpora import load_corpus
from sparse_expansion.data.tokenization import encoder, load_tokenizer
from sparse_expansion.report.card import model_card
from sparse_expansion.work.hardware import device_name
from tests.tiny import KERNEL_DEVICE, digests

SMALL = (
    "--num_clusters 2 --dataset-size 4 --seqlen 32 --PCA_reduction_factor 4 --block-size 16 "
    "--eval-windows 3 --preset paper"
).split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, neox_folder, text_folder):
    output = tmp_path_factory.mktemp("run") / "out"
    code = main(
        [
            "run",
            "--model",
            str(neox_folder),
            "--dataset",
            str(text_folder),
            "--output",
            str(output),
            "--json",
            *SMALL,
        ]
    )
    assert code == 0
    return output


def test_metrics(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert 1 < metrics["perplexity_dense"] < metrics["perplexity_expanded"] < 512
    assert metrics["num_eval_tokens"] == 3 * 31
    for key in ("expand", "evaluate_dense", "evaluate_expanded"):
        assert metrics["seconds"][key] > 0
    assert metrics["peak_memory_bytes"] > 10**8
    assert metrics["devices"] == [device_name(KERNEL_DEVICE)]
    assert (metrics["device_peak_memory_bytes"] > 0) == (KERNEL_DEVICE != "cpu")
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["routers_reproducible"] is True
    ended = datetime.fromisoformat(metrics["date"])
    assert timedelta() < datetime.now(timezone.utc) - ended < timedelta(hours=1)
    weights = sum(f.stat().st_size for f in finished.glob("*.safetensors"))
    assert metrics["checkpoint_bytes"] == weights
    assert metrics["config"]["routing"]["num_clusters"] == 2
    assert metrics["num_experts"] == 3 * 2 * 2


def test_plan_foretells_the_bytes_and_units(finished, neox_folder, capsys):
    flags = [flag for flag in SMALL if flag not in ("--eval-windows", "3")]
    assert main(["plan", "--model", str(neox_folder), "--json", *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    metrics = json.loads((finished / "metrics.json").read_text())
    headers = 300 * 1024
    assert 0 <= metrics["checkpoint_bytes"] - plan["checkpoint_bytes"] < headers
    index = json.loads((finished / "model.safetensors.index.json").read_text())
    assert plan["checkpoint_bytes"] == index["metadata"]["total_size"]
    assert plan["dense_checkpoint_bytes"] == metrics["dense_checkpoint_bytes"]
    assert main(["plan", "--model", str(neox_folder), *flags]) == 0
    assert "expanded checkpoint" in capsys.readouterr().out


def test_plan_counts_tied_embeddings_once(llama_folder, capsys):
    assert main(["plan", "--model", str(llama_folder), "--json", "--block-size", "16"]) == 0
    plan = json.loads(capsys.readouterr().out)
    stored = sum(f.stat().st_size for f in llama_folder.glob("*.safetensors"))
    assert 0 < stored - plan["dense_checkpoint_bytes"] < 64 * 1024
    assert plan["dense_checkpoint_bytes"] == 4 * plan["parameters"]


def test_evaluate_repeats_the_runs_figures(finished, neox_folder, text_folder, capsys):
    metrics = json.loads((finished / "metrics.json").read_text())
    for model, key in ((finished, "perplexity_expanded"), (neox_folder, "perplexity_dense")):
        assert (
            main(
                [
                    "evaluate",
                    "--model",
                    str(model),
                    "--dataset",
                    str(text_folder),
                    "--seqlen",
                    "32",
                    "--eval-windows",
                    "3",
                    "--json",
                ]
            )
            == 0
        )
        result = json.loads(capsys.readouterr().out)
        assert result["perplexity"] == pytest.approx(metrics[key], rel=1e-6)
        assert result["is_expanded"] == (model == finished)


def test_analyze_and_report(finished, tmp_path, capsys):
    import pyarrow.parquet

    table = tmp_path / "t" / "experts.parquet"
    assert main(["analyze", str(finished), "--json", "--table", str(table)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert pyarrow.parquet.read_table(table).to_pylist() == rows
    assert len(rows) == 3 * 2 * 2
    tokens = sum(
        row["tokens"] for row in rows if row["layer"] == 0 and row["linear"] == "mlp.dense_h_to_4h"
    )
    assert tokens == 4 * 32
    assert all(0 < row["relative_error"] < 1 for row in rows)
    asked = json.loads((finished / "metrics.json").read_text())["config"]["compression"]
    assert {row["sparsity"] for row in rows} == {asked["sparsity"]["fraction"]}
    assert main(["analyze", str(finished)]) == 0
    assert "mlp.dense_4h_to_h" in capsys.readouterr().out
    assert main(["report", str(finished)]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main(["report", str(finished), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["is_finished"] is True


def test_model_card(finished, neox_folder, text_folder):
    from huggingface_hub import ModelCard

    card = ModelCard((finished / "README.md").read_text())
    metrics = json.loads((finished / "metrics.json").read_text())
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["sparse-expansion", "pruned"]
    assert card.data.base_model is None
    assert f"{metrics['perplexity_expanded']:.3f}" in card.text
    again = shlex.split(card.text.rpartition("Made by\n\n```\n")[2].partition("\n")[0])
    assert again[:4] == ["sparse-expansion", "run", "--model", str(neox_folder)]
    assert metrics["command"] == shlex.join(again)
    # The same command, somewhere else, makes the same bytes.
    again[again.index("--output") + 1] = str(finished.parent / "again")
    assert main(again[1:]) == 0
    assert digests(finished.parent / "again") == digests(finished)


def test_model_card_of_a_hub_model_links_it():
    from huggingface_hub import ModelCard

    config = RunConfig(compression=CompressionConfig(bits=4)).to_dict()
    numbers = dict.fromkeys(
        ("checkpoint_bytes", "dense_checkpoint_bytes", "starved_experts", "num_experts"), 1
    )
    metrics = {"config": config, "command": "sparse-expansion expand", **numbers}
    card = ModelCard(model_card(metrics, "EleutherAI/pythia-70m", is_hub_id=True))
    assert card.data.base_model == "EleutherAI/pythia-70m"
    assert card.data.tags[-1] == "quantized"
    assert "# pythia-70m, expanded" in card.text and "perplexity" not in card.text
    metrics["command"] = "sparse-expansion run --model \x1b[8m"
    assert "--model \\x1b[8m" in model_card(metrics, "m\x1b", is_hub_id=False)


def test_more_experts_at_equal_cost_help(finished, neox_folder, long_text_folder, tmp_path):
    """The point of the method, on a trained model and text it was not calibrated on."""
    perplexity = {}
    for clusters in ("1", "8"):
        output = tmp_path / clusters
        assert (
            main(
                [
                    "run",
                    "--model",
                    str(neox_folder),
                    "--dataset",
                    str(long_text_folder),
                    "--output",
                    str(output),
                    "--sparsity",
                    "0.8",
                    "--num_clusters",
                    clusters,
                    "--dataset-size",
                    "48",
                    "--seqlen",
                    "64",
                    "--eval-windows",
                    "24",
                    "--PCA_reduction_factor",
                    "4",
                ]
            )
            == 0
        )
        metrics = json.loads((output / "metrics.json").read_text())
        perplexity[clusters] = metrics["perplexity_expanded"]
    assert perplexity["8"] < perplexity["1"]


def test_the_whole_text(neox_folder, text_folder, tmp_path, capsys):
    flags = [*SMALL, "--dataset-size", "all", "--json"]
    base = ["--model", str(neox_folder), *flags]
    run = ["run", *base, "--dataset", str(text_folder), "--output", str(tmp_path)]
    assert main(run) == 0
    made = json.loads(capsys.readouterr().out)
    shards = sorted((tmp_path / "run" / "calibration").iterdir())
    assert len(shards) == made["config"]["calibration"]["data_shards"] == 4
    tokens = torch.cat([load_file(shard)["tokens"] for shard in shards])
    assert made["config"]["calibration"]["dataset_size"] == len(tokens) > 32
    # End to end: the tokens are the text's, but for the remainder.
    encode = encoder(load_tokenizer(neox_folder))
    whole = encode(load_corpus(str(text_folder)).calibration)
    assert torch.equal(tokens.flatten().long(), whole[: tokens.numel()])
    assert len(whole) - tokens.numel() < tokens.shape[1]
    assert main([*run, "--resume"]) == 0
    capsys.readouterr()
    assert main(["plan", *[flag for flag in base if flag not in ("--eval-windows", "3")]]) == 2
    assert "give the number of windows" in capsys.readouterr().err


def test_without_output_nothing_is_kept(neox_folder, text_folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["run", "--model", str(neox_folder), "--dataset", str(text_folder), *SMALL]) == 0
    captured = capsys.readouterr()
    assert "perplexity" in captured.out and "expand ·" in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sparsity", "1.5"], "sparsity 1.5 is outside 0 to 1"),
        (["--sparsity", "nonsense"], "neither a share of zeros"),
        (["--sparsity", "5:4"], "needs 0 <= N <= M"),
        (["--sparsity", "2:5"], "must divide block_size"),
        (["--num_clusters", "0"], "num_clusters 0 is outside"),
        (["--bits", "4"], "--bits 4 needs --quantize"),
        (["--quantize", "--bits", "9"], "bits 9 is outside 2 to 8"),
        (["--symmetric"], "--symmetric needs --quantize"),
        (["--group-size", "128"], "--group-size needs --quantize"),
        (["--quantize", "--group-size", "0"], "group_size 0 must be at least 1"),
        (["--quantize", "--group-size", "x"], "'x' is no whole number, row or auto"),
        (["--PCA_reduction_factor", "0"], "PCA_reduction_factor 0"),
        (["--dataset-size", "0"], "dataset_size 0"),
        (["--dataset-size", "some"], "'some' is neither a number nor all"),
        (["--seqlen", "1"], "seqlen 1"),
        (["--seqlen", "300"], "more than the model's 256 positions"),
        (["--eval-windows", "0"], "--eval-windows 0"),
        (["--eval-windows", "99999"], "use --eval-windows"),
        (["--dataset", "/nowhere"], "neither wikitext2"),
        (["--model", "/nowhere"], "does not exist"),
        (["--model_size", "7b"], "goes with --model pythia"),
        (["--resume"], "--resume needs the --output"),
        (["--activation-memory", "lots"], "size 'lots'"),
        (["--damping-fraction", "nan"], "damping_fraction nan"),
        (["--data-shards", "0"], "data_shards 0"),
        (["--balance", "2"], "balance 2.0 is outside 0 to 0.9"),
        (["--finetune", "-1"], "finetune -1 is outside 0 to 1000"),
        (["--finetune-rate", "0"], "finetune_rate 0.0 is outside 0 to 1"),
        (["--no-such-flag"], "unrecognized arguments"),
        (["--sparsity", "2:4", "--act-order"], "act_order reorders"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(flags, message, neox_folder, text_folder, capsys):
    base = {"--model": str(neox_folder), "--dataset": str(text_folder), "--seqlen": "32"}
    arguments = [
        word for flag, value in base.items() if flag not in flags for word in (flag, value)
    ]
    assert main(["run", *arguments, *flags]) == 2
    captured = capsys.readouterr()
    # A machine that is slow for a moment says what it does.
    said = [line for line in captured.err.splitlines() if not line.endswith(" elapsed")]
    error = [line for line in said if "model " != line[:6]]
    assert len(error) == 1 and message in error[0], captured.err
    assert captured.out == ""


def test_empty_text(tmp_path, neox_folder, capsys):
    (tmp_path / "train.txt").write_text("")
    (tmp_path / "test.txt").write_text("some text")
    assert main(["run", "--model", str(neox_folder), "--dataset", str(tmp_path)]) == 2
    assert "empty calibration text" in capsys.readouterr().err


def test_an_output_that_holds_something_else(tmp_path, neox_folder, text_folder, finished, capsys):
    base = ["run", "--model", str(neox_folder), "--dataset", str(text_folder), *SMALL]
    (tmp_path / "mine.txt").write_text("precious")
    assert main([*base, "--output", str(tmp_path)]) == 2
    assert "not empty and holds no run" in capsys.readouterr().err
    assert main([*base, "--output", str(finished)]) == 2
    assert "add --resume" in capsys.readouterr().err
    assert main([*base, "--output", str(finished), "--resume", "--sparsity", "0.6"]) == 2
    assert "holds another run (different config)" in capsys.readouterr().err
    assert main([*base, "--output", str(tmp_path / "mine.txt")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert main(["analyze", str(tmp_path / "no")]) == 2


def test_resuming_a_finished_run_does_nothing_new(finished, neox_folder, text_folder):
    before = {f.name: f.stat().st_mtime_ns for f in finished.glob("experts-*")}
    assert (
        main(
            [
                "run",
                "--model",
                str(neox_folder),
                "--dataset",
                str(text_folder),
                *SMALL,
                "--output",
                str(finished),
                "--resume",
            ]
        )
        == 0
    )
    assert {f.name: f.stat().st_mtime_ns for f in finished.glob("experts-*")} == before


def test_console_script_and_module():
    # It may be installed beside the interpreter's own scripts, or in another folder of the path.
    folders = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    script = shutil.which("sparse-expansion", path=folders)
    for command in ([script], [sys.executable, "-m", "sparse_expansion.cli"]):
        done = subprocess.run([*command, "run"], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "--model" in done.stderr


def test_slow_products_are_named(monkeypatch):
    import torch

    from sparse_expansion.jobs.prepare import slow_dtype

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert slow_dtype(torch.float32) is None
    assert "bfloat16" in slow_dtype(torch.bfloat16) and "AVX2" in slow_dtype(torch.bfloat16)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert slow_dtype(torch.bfloat16) is None
