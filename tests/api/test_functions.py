"""`expand` and `evaluate`: the commands' results and errors, from Python."""

import json
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from sparse_expansion import Result, evaluate, expand
from sparse_expansion.api.listener import Listener
from sparse_expansion.cli import main
from sparse_expansion.config import CompressionConfig, RoutingConfig, RunConfig, SparsityPattern
from sparse_expansion.data.texts import TextRequest
from tests.tiny import digests

SETTINGS = dict(
    preset="paper",
    num_clusters=2,
    dataset_size=4,
    seqlen=32,
    pca_reduction_factor=4,
    block_size=16,
    sparsity="2:4",
    threads=1,
)


@pytest.fixture(scope="module")
def texts(text_folder):
    return (text_folder / "train.txt").read_text()[:60_000].split("\n\n")


@pytest.fixture(scope="module")
def heard():
    """What was said while the model was made."""
    return []


@pytest.fixture(scope="module")
def made(tmp_path_factory, llama_folder, tokenizer, texts, heard):
    """A loaded model and texts in memory, expanded."""

    class Ear(Listener):
        def say(self, text):
            heard.append(text)

        def start(self, title, num_blocks):
            heard.append((title, num_blocks))

    return expand(
        AutoModelForCausalLM.from_pretrained(llama_folder),
        texts,
        tokenizer=tokenizer,
        output=tmp_path_factory.mktemp("api") / "out",
        measure=True,
        eval_windows=2,
        listener=Ear(),
        **SETTINGS,
    )


def test_the_bytes_are_those_of_the_command(made, texts, llama_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    line = "--preset paper -nc 2 -ds 4 --seqlen 32 -pcrf 4 --block-size 16 -s 2:4 --threads 1"
    where = ["--model", str(llama_folder), "--dataset", str(rows), "--output", str(tmp_path / "o")]
    assert main(["expand", *where, *line.split()]) == 0
    assert digests(tmp_path / "o") == digests(Path(made.folder)) != {}


def test_the_result(made, heard, texts, tokenizer):
    assert set(made.paths) == {"model", "metrics", "settings", "card"}
    saved = json.loads(Path(made.paths["metrics"]).read_text())
    assert saved.items() >= json.loads(json.dumps(made.metrics)).items()
    assert ("evaluate expanded", 3) in heard and any("perplexity" in str(word) for word in heard)
    model = made.load()
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "ExpandedLinear"
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
    found = evaluate(made, texts, seqlen=32, eval_windows=2, threads=1)
    assert found.metrics["perplexity"] == pytest.approx(made.metrics["perplexity_expanded"])
    assert found.metrics["is_expanded"] and found.folder == made.folder
    # A loaded model, and text as token ids, measured without leaving a file.
    ids = tokenizer("\n\n".join(texts))["input_ids"]
    dense = evaluate(model, [ids], tokenizer=tokenizer, seqlen=32, eval_windows=2, threads=1)
    assert dense.metrics["is_expanded"] and dense.paths == {}
    with pytest.raises(ValueError, match="only what is in a local folder can be loaded"):
        dense.load()


def test_what_lay_in_memory_is_not_asked_for_by_another_name(made, capsys):
    written = yaml.safe_load(Path(made.paths["settings"]).read_text())
    assert written["dataset"] == "<in memory>"
    assert main(["run", "--config", made.paths["settings"]]) == 2
    assert "'<in memory>' is neither" in capsys.readouterr().err


def test_without_a_folder_the_result_has_one_of_its_own(llama_folder, text_folder):
    config = RunConfig(
        compression=CompressionConfig(sparsity=SparsityPattern.parse("0.5"), block_size=16),
        routing=RoutingConfig(num_clusters=2, pca_reduction_factor=None, max_iterations=3),
    )
    made = expand(
        llama_folder,
        text_folder,
        config=config,
        seqlen=32,
        dataset_size=4,
        executor="local",
        threads=1,
    )
    saved = made.metrics["config"]
    assert saved["routing"]["pca_reduction_factor"] is None
    assert saved["routing"]["max_iterations"] == 3 and saved["calibration"]["seqlen"] == 32
    # The settings of the class are the paper's, whatever the default preset.
    assert saved["compression"]["pruner"] == "sparsegpt"
    folder = Path(made.folder)
    assert (folder / "config.json").exists() and made.load() is not None
    del made
    assert not folder.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsty": 0.5}, r"setting 'sparsty' is unknown \(did you mean sparsity\?\)"),
        ({"outptu": "x"}, r"'outptu' is unknown \(did you mean output\?\)"),
        ({"pruner": "amdm"}, r"pruner 'amdm' is none of .* \(did you mean admm\?\)"),
        ({"preset": "bset"}, r"did you mean best"),
        ({"num_clusters": "4"}, "num_clusters '4' must be a whole number"),
        ({"num_clusters": True}, "num_clusters True must be a whole number"),
        ({"tf32": 1}, "tf32 1 must be true or false"),
        ({"quantize": "yes"}, "quantize 'yes' must be true or false"),
        ({"layer_sparsity": ["a"]}, "layer_sparsity 'a' must be a number"),
        ({"sparsity": object()}, "is no value of this setting"),
        ({"config": {"a": 1}}, "config of type dict is no RunConfig"),
        ({"executor": 3}, "executor of type int"),
        ({"tokenizer": 3}, "tokenizer goes with a loaded model"),
        ({"output": 3}, "output 3 must be a text"),
        ({"measure": "yes"}, "measure 'yes' must be true or false"),
        ({"resume": 1}, "resume 1 must be true or false"),
        ({"eval_windows": "4"}, "eval_windows '4' must be a whole number"),
        ({"eval_windows": 1.5}, "eval_windows 1.5 must be a whole number"),
        ({"model_size": 13}, "model_size 13 must be a text"),
        ({"model_revision": 1}, "model_revision 1 must be a text"),
        ({"cache_dir": 1}, "cache_dir 1 must be a text"),
        ({"listener": print}, "is no Listener"),
    ],
)
def test_wrong_settings(settings, message, llama_folder):
    with pytest.raises(ValueError, match=message):
        expand(llama_folder, "pydoc", **settings)


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"sparsity": 3}, ["--sparsity", "3"]),
        ({"bits": 9, "quantize": True}, ["--bits", "9", "--quantize"]),
        ({"eval_windows": 0}, ["--eval-windows", "0"]),
        ({"seqlen": 1}, ["--seqlen", "1"]),
        ({"dataset": "/nowhere"}, ["--dataset", "/nowhere"]),
        ({"model": "/nowhere"}, ["--model", "/nowhere"]),
        ({"model_size": "7b"}, ["--model-size", "7b"]),
        ({"seqlen": 300}, ["--seqlen", "300"]),
        ({"device": "mps"}, ["--device", "mps"]),
        ({"num_workers": 2}, ["--num-workers", "2"]),
        ({"output": ""}, ["--output", ""]),
        ({"dataset": " "}, ["--dataset", " "]),
        ({"model": ""}, ["--model", ""]),
    ],
)
def test_errors_are_the_commands_lines(settings, flags, llama_folder, text_folder, capsys):
    base = {"model": llama_folder, "dataset": text_folder}
    with pytest.raises(ValueError) as caught:
        expand(**{**base, **settings}, measure=True)
    given = [word for flag, value in base.items() for word in (f"--{flag}", str(value))]
    assert main(["run", *given, *flags]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.removeprefix("sparse-expansion: error: ").replace("3.0 ", "3 ") == str(
        caught.value
    ).replace("3.0 ", "3 ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_clusters": 4}, "'num_clusters' is unknown"),
        ({"seqln": 4}, "did you mean seqlen"),
        ({"seqlen": 1}, "--seqlen 1 must be at least 2"),
        ({"listener": 3}, "listener of type int is no Listener"),
        ({"eval_windows": "all"}, "eval_windows 'all' must be a whole number"),
        ({"cache_dir": 1}, "cache_dir 1 must be a text"),
    ],
)
def test_wrong_settings_of_evaluate(settings, message, llama_folder):
    with pytest.raises(ValueError, match=message):
        evaluate(llama_folder, "pydoc", **settings)


def test_wrong_models(llama_folder):
    with pytest.raises(ValueError, match="model of type int is neither a path"):
        expand(3, "pydoc")
    with pytest.raises(ValueError, match="needs its tokenizer"):
        expand(torch.nn.Module.__new__(AutoModelLike), "pydoc")
    with pytest.raises(ValueError, match="was in memory"):
        Result({}, None).load()


class AutoModelLike(torch.nn.Module):
    def save_pretrained(self, folder):
        raise AssertionError("nothing is written before the settings are in order")


def windows(dataset, tokenizer):
    texts = TextRequest(dataset=dataset).load(tokenizer)
    first = texts.calibration(num_windows=3, seqlen=16, seed=0)
    return torch.cat([first, texts.evaluation(seqlen=16, max_windows=2)])


def test_texts_in_memory_are_one_text(texts, tokenizer):
    filled = [text for text in texts if text.strip()][:40]
    wanted = windows(filled, tokenizer)
    assert torch.equal(windows(tuple(filled), tokenizer), wanted)
    assert torch.equal(windows(datasets.Dataset.from_dict({"text": filled}), tokenizer), wanted)
    assert torch.equal(windows([{"text": text} for text in filled], tokenizer), wanted)
    split = {"train": [{"text": text} for text in filled[:36]], "test": filled[36:]}
    assert torch.equal(windows(split, tokenizer), wanted)


def test_token_ids_are_taken_as_they_are(tokenizer):
    documents = [list(range(10 * i, 10 * i + 10)) for i in range(20)]
    texts = TextRequest(dataset=documents).load(tokenizer)
    assert texts.evaluation(seqlen=10, max_windows=None).tolist() == documents[18:]
    first = texts.calibration(num_windows=None, seqlen=10, seed=0)
    assert first.tolist() == documents[:18]
    arrays = TextRequest(dataset=[torch.tensor(ids) for ids in documents]).load(tokenizer)
    assert torch.equal(arrays.corpora[0].calibration, texts.corpora[0].calibration)
    one = TextRequest(dataset=[list(range(100))]).load(tokenizer)
    assert one.corpora[0].evaluation.tolist() == list(range(90, 100))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (3, "dataset of type int is neither"),
        ([], "empty calibration text"),
        (["text", 3], "row 2: 'text' is a number"),
        ([[1, 2], [-1]], "row 2: not a list of token ids"),
        ([[1, 2], "text"], "row 2: not a list of token ids"),
        ([{"body": "x"}], "row 1: not a JSON object with a 'text'"),
        ({"dev": ["a"]}, "none called train"),
    ],
)
def test_wrong_texts_in_memory(dataset, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        TextRequest(dataset=dataset).load(tokenizer)
