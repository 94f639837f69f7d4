"""What is answered before work begins, in every command that runs a model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_expansion.api import opening
from sparse_expansion.cli import main
from tests import tiny

EXPERIMENT = "--dataset-size 2 --eval-windows 1".split()
COMMANDS = {
    "run": ["--eval-windows", "1"],
    "expand": ["--output", "{folder}/out"],
    "evaluate": ["--eval-windows", "1"],
    "plan": [],
    "analyze": ["--windows", "1"],
    "sweep-clusters": [*EXPERIMENT, "--layer", "0", "--num_clusters", "1"],
    "prune-neurons": [*EXPERIMENT, "--shares", "0.1"],
    "allocate": EXPERIMENT,
}


def line(name, model, text, folder, *more):
    """The command line of a small piece of work."""
    given = [name, *([str(model)] if name == "analyze" else ["--model", str(model)])]
    if name != "plan":
        given += ["--dataset", str(text), "--threads", "1"]
    return [*given, *(word.format(folder=folder) for word in COMMANDS[name]), *more]


def complaint(capsys):
    """The one line that an error is, beside progress."""
    (found,) = [row for row in capsys.readouterr().err.splitlines() if "error: " in row]
    return found


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("family", ["llama_folder", "opt"])
def test_windows_longer_than_the_models_positions(
    name, family, request, tokenizer, text_folder, tmp_path, capsys
):
    if family == "opt":
        model = tiny.save_random("opt", tmp_path / "opt", tokenizer)
    else:
        model = request.getfixturevalue(family)
    capsys.readouterr()
    assert main(line(name, model, text_folder, tmp_path, "--seqlen", "300")) == 2
    assert "seqlen 300 is more than the model's 256 positions: use --seqlen 256" in complaint(
        capsys
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "plan"])
@pytest.mark.parametrize(
    ("device", "message"),
    [("mps", "--device mps is none of auto, cpu and cuda"), ("cuda:9", "--device cuda:9: ")],
)
def test_a_device_that_is_not_there(
    name, device, message, llama_folder, text_folder, tmp_path, capsys
):
    capsys.readouterr()
    command = line(name, llama_folder, text_folder, tmp_path, "--seqlen", "32")
    assert main([*command, "--device", device]) == 2
    assert message in complaint(capsys)


@pytest.fixture
def endless(tmp_path, llama_folder):
    """A model whose loss alone is not finite: the last norm has an infinite weight."""
    folder = tmp_path / "m"
    shutil.copytree(llama_folder, folder)
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][0] = float("inf")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("preset", ["paper", "best"])
def test_a_loss_that_is_no_number_is_an_error(preset, endless, text_folder, tmp_path, capsys):
    flags = ["--preset", preset, "--eval-windows", "2", "--json", *tiny.SMALL_RUN]
    where = ["--model", str(endless), "--dataset", str(text_folder)]
    capsys.readouterr()
    assert main(["run", *where, *flags]) == 1
    found = capsys.readouterr()
    (error,) = [row for row in found.err.splitlines() if "error: " in row]
    assert "is not finite (NaN or infinity)" in error and "NaN" not in found.out
    assert main(["evaluate", *where, "--seqlen", "32", "--eval-windows", "2", "--json"]) == 1
    assert "on 2 of 2 windows" in complaint(capsys)


def test_a_model_that_was_saved_again_is_evaluated(llama_folder, text_folder, tmp_path, capsys):
    """`save_pretrained` writes no manifest: there is nothing to check tensors against."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first, again = tmp_path / "first", tmp_path / "again"
    where = ["--dataset", str(text_folder)]
    expand = ["expand", "--model", str(llama_folder), *where, *tiny.SMALL_RUN]
    assert main([*expand, "--output", str(first)]) == 0
    AutoModelForCausalLM.from_pretrained(first).save_pretrained(again)
    AutoTokenizer.from_pretrained(first).save_pretrained(again)
    perplexity = []
    for folder in (first, again):
        capsys.readouterr()
        flags = ["--seqlen", "48", "--eval-windows", "3", "--threads", "1", "--json"]
        assert main(["evaluate", "--model", str(folder), *where, *flags]) == 0
        found = capsys.readouterr()
        perplexity.append(json.loads(found.out)["perplexity"])
        assert ("no manifest.json" in found.err) is (folder == again)
    assert perplexity[0] == perplexity[1]


def test_a_missing_driver_is_seen_without_pytorch(monkeypatch):
    def load(name):
        assert name == "libcuda.so.1"
        if is_missing:
            raise OSError(name)

    monkeypatch.setattr(opening.ctypes, "CDLL", load)
    for is_missing, platform in ((True, "linux"), (False, "linux"), (True, "win32")):
        monkeypatch.setattr(opening.sys, "platform", platform)
        # Where AMD's device is, PyTorch's ROCm build calls it cuda.
        is_certain = is_missing and platform == "linux" and not Path("/dev/kfd").exists()
        assert opening._lacks_driver() is is_certain
        if is_certain:
            with pytest.raises(ValueError, match="no driver of a GPU: use --device cpu"):
                opening.check_devices("local", "cuda:0")
            # On a cluster the workers have the devices.
            opening.check_devices("ray", "cuda")


def test_the_device_check_knows_what_there_is(monkeypatch):
    from sparse_expansion.work.spec import check_device

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("auto", "cpu", "cuda", "cuda:1"):
        check_device(name)
    with pytest.raises(ValueError, match="this machine has 2 CUDA devices"):
        check_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="sees no CUDA device here: use --device cpu"):
        check_device("cuda")
