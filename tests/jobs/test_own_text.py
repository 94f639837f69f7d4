"""Text that a model writes itself."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_expansion import expand
from sparse_expansion.cli import main
from sparse_expansion.data.tokenization import encoder
from sparse_expansion.data.windows import calibration_windows
from sparse_expansion.jobs import calibration_text, own_text
from sparse_expansion.jobs.own_text import LIKELIEST_TOKENS, Sampling, first_tokens, write_batch
from sparse_expansion.run_folder import read_windows
from sparse_expansion.store import Store
from tests import tiny

WRITE = ["--seqlen", "24", "--documents", "5", "--batch-size", "2", "--threads", "1"]


def write(model, output, *more):
    where = ["--model", str(model), "--output", str(output)]
    return main(["write-text", *where, *WRITE, *more])


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def written(llama_folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "own.jsonl"
    assert write(llama_folder, file) == 0
    return file


def test_documents_are_those_of_their_seed(written, llama_folder, tmp_path, capsys):
    assert len(rows(written)) == 5
    assert len({row["text"] for row in rows(written)}) == 5
    assert write(llama_folder, tmp_path / "same.jsonl", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["documents"], result["tokens"]) == (5, 120)
    assert result["bytes"] == written.stat().st_size
    assert (tmp_path / "same.jsonl").read_bytes() == written.read_bytes()
    assert write(llama_folder, tmp_path / "other.jsonl", "--seed", "1") == 0
    other = {row["text"] for row in rows(tmp_path / "other.jsonl")}
    assert not other & {row["text"] for row in rows(written)}


def test_cold_documents_take_the_likeliest_tokens(llama_folder, tmp_path):
    """By hand: from the first token on, the largest logit's token again and again."""
    assert write(llama_folder, tmp_path / "cold.jsonl", "--temperature", "1e-4") == 0
    model = AutoModelForCausalLM.from_pretrained(llama_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    ids = first_tokens(tokenizer, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        while ids.shape[1] < 24:
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    wanted = tokenizer.batch_decode(ids)
    assert [row["text"] for row in rows(tmp_path / "cold.jsonl")[:2]] == wanted


def test_an_end_is_followed_by_more(llama_folder, tokenizer, tmp_path):
    """All tokens but the ends of documents are unlikely: documents are as long all the same."""
    model = tiny.random_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path / "ends")
    tokenizer.save_pretrained(tmp_path / "ends")
    assert write(tmp_path / "ends", tmp_path / "cold.jsonl") == 0
    # Equal logits: the likeliest is the first of the vocabulary, which ends documents.
    for row in rows(tmp_path / "cold.jsonl"):
        assert row["text"].count("<|end|>") >= LIKELIEST_TOKENS
        assert len(tokenizer.tokenize(row["text"])) > LIKELIEST_TOKENS + 2


def test_resume_keeps_whole_batches(written, llama_folder, tmp_path, monkeypatch, capsys):
    lines = written.read_text().splitlines(keepends=True)
    part = tmp_path / "part.jsonl"
    part.write_text("".join(lines[:3]))
    assert write(llama_folder, part) == 2
    assert "is there already" in capsys.readouterr().err
    assert write(llama_folder, part, "--resume", "--seed", "1") == 2
    assert "with other settings" in capsys.readouterr().err
    begun = []

    def counted(*args, first, count):
        begun.append((first, count))
        return write_batch(*args, first=first, count=count)

    monkeypatch.setattr(own_text, "write_batch", counted)
    assert write(llama_folder, part, "--resume") == 0
    assert begun == [(2, 2), (4, 1)]
    assert part.read_bytes() == written.read_bytes()
    part.write_text("no JSON\n")
    assert write(llama_folder, part, "--resume") == 2
    assert "no document that this command has written" in capsys.readouterr().err


def test_a_model_is_calibrated_on_it(written, llama_folder, text_folder, tmp_path):
    text = f"{text_folder}:1,{written}:1"
    shape = ["--num_clusters", "2", "--seqlen", "16", "--dataset-size", "4", "--threads", "1"]
    where = ["--model", str(llama_folder), "--dataset", text, "--output", str(tmp_path / "out")]
    assert main(["expand", *where, *shape, "--layer-sparsity", "uniform"]) == 0
    assert (tmp_path / "out/metrics.json").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "own.txt"], "--output own.txt must be a local file that ends in .jsonl"),
        (["--output", "s3://bucket/own.jsonl"], "must be a local file"),
        (["--output", "nowhere/own.jsonl"], "its folder does not exist"),
        (["--documents", "1"], "--documents 1 must be at least 2"),
        (["--seqlen", "1"], "--seqlen 1 must be at least 2"),
        (["--seqlen", "100000"], "100000"),
        (["--seed", "-1"], "--seed -1 must be at least 0"),
        (["--temperature", "0"], "--temperature 0 is outside 0 (exclusive) to 10"),
        (["--temperature", "nan"], "--temperature nan is outside"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--threads", "0"], "--threads 0 must be at least 1"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_bad_input(flags, message, llama_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert write(llama_folder, "own.jsonl", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "own.jsonl").exists()


SHAPE = ["--num_clusters", "2", "--seqlen", "16", "--threads", "1", "--layer-sparsity", "uniform"]


def expand_with(llama_folder, text_folder, output, cache, *flags):
    """`expand` into a folder, with documents in a cache that the test knows."""
    where = ["--model", str(llama_folder), "--dataset", str(text_folder), "--output", str(output)]
    return main(["expand", *where, "--cache-dir", str(cache), *SHAPE, *flags])


def windows_of(output, shards=4):
    return torch.cat([read_windows(Store(output), shard) for shard in range(shards)])


def test_a_share_of_the_windows_is_of_its_own_text(llama_folder, text_folder, tmp_path):
    """By hand: two of eight windows are of the documents, which are there for the next run."""
    flags = ["--dataset-size", "8", "--own-text", "0.25", "--seed", "3"]
    assert expand_with(llama_folder, text_folder, tmp_path / "a", tmp_path / "c", *flags) == 0
    model = AutoModelForCausalLM.from_pretrained(llama_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    sampling = Sampling(documents=16, seqlen=16, seed=3, temperature=1.0, batch_size=16)
    own = " ".join(write_batch(model, tokenizer, sampling, first=0, count=16)[:2])
    texts = (" ".join((text_folder / "train.txt").read_text().splitlines()), own)
    parts = [
        calibration_windows(text, encoder(tokenizer), num_windows=count, seqlen=16, seed=3)
        for text, count in zip(texts, (6, 2), strict=True)
    ]
    order = list(range(8))
    random.Random(3).shuffle(order)
    written = windows_of(tmp_path / "a")
    own_rows = [place for place, row in enumerate(order) if row >= 6]
    assert torch.equal(written[own_rows], torch.cat(parts)[order][own_rows])
    metrics = json.loads((tmp_path / "a/metrics.json").read_text())
    assert metrics["config"]["calibration"]["own_text"] == 0.25
    assert "own_text: 0.25" in (tmp_path / "a/run.yaml").read_text()


def test_own_text_is_written_once_and_goes_on_where_it_ended(
    llama_folder, text_folder, tmp_path, monkeypatch
):
    flags, cache = ["--own-text", "0.5", "--dataset-size", "36"], tmp_path / "c"
    begun = []

    def counted(*args, first, count):
        begun.append(first)
        if first == 16 and len(begun) == 2:
            raise KeyboardInterrupt
        return write_batch(*args, first=first, count=count)

    monkeypatch.setattr(own_text, "write_batch", counted)
    assert expand_with(llama_folder, text_folder, tmp_path / "a", cache, *flags) > 2
    assert not (tmp_path / "a/run").exists()
    for output in ("a", "b"):
        assert expand_with(llama_folder, text_folder, tmp_path / output, cache, *flags) == 0
    assert begun == [0, 16, 16]
    assert torch.equal(windows_of(tmp_path / "a"), windows_of(tmp_path / "b"))
    # Less of it is the beginning of the same; another seed is another text.
    shorter = ["--own-text", "0.5", "--dataset-size", "8"]
    assert expand_with(llama_folder, text_folder, tmp_path / "d", cache, *shorter) == 0
    assert len(begun) == 3
    other = [*shorter, "--seed", "1"]
    assert expand_with(llama_folder, text_folder, tmp_path / "e", cache, *other) == 0
    assert begun[3:] == [0]


def test_a_whole_text_has_windows_of_its_own_beside_it(llama_folder, tmp_path):
    counts = []
    for more in ({}, {"own_text": 0.25, "cache_dir": str(tmp_path)}):
        made = expand(
            str(llama_folder),
            ["one two three four five six seven eight nine ten " * 30],
            dataset_size="all",
            seqlen=16,
            num_clusters=2,
            layer_sparsity="uniform",
            threads=1,
            **more,
        )
        counts.append(made.metrics["config"]["calibration"]["dataset_size"])
    assert counts[1] == pytest.approx(counts[0] / 0.75, abs=1) and counts[1] > counts[0] > 8


def test_a_text_that_is_too_short_is_named_before_anything_is_written(
    llama_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(calibration_text, "load_whole", None)
    short = tmp_path / "short"
    short.mkdir()
    for name in ("train.txt", "test.txt"):
        (short / name).write_text("for one")
    own = ["--own-text", "0.5", "--dataset-size"]
    assert expand_with(llama_folder, short, tmp_path / "a", tmp_path / "c", *own, "4") == 2
    assert "the calibration text has" in capsys.readouterr().err
    assert expand_with(llama_folder, short, tmp_path / "a", tmp_path / "c", *own, "1") == 2
    assert "--dataset-size 1 leaves no window to the text" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_perplexity_is_of_the_text_alone(llama_folder, text_folder, tmp_path, capsys):
    where = ["--model", str(llama_folder), "--dataset", str(text_folder)]
    command = ["run", *where, *SHAPE, "--dataset-size", "4", "--eval-windows", "3"]
    own = ["--own-text", "0.5", "--cache-dir", str(tmp_path)]
    tokens = []
    for more in ([], own):
        assert main([*command, *more, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        tokens.append((found["num_eval_tokens"], found["perplexity_dense"]))
    assert tokens[0] == tokens[1]
    assert main([*command, *own]) == 0
    assert "4 x 16 tokens (50 % written by the model)" in capsys.readouterr().out


def test_a_model_that_does_not_fit_to_write(
    llama_folder, text_folder, tmp_path, monkeypatch, capsys
):
    def too_large(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(calibration_text, "load_whole", too_large)
    flags = ["--own-text", "0.5", "--dataset-size", "4"]
    assert expand_with(llama_folder, text_folder, tmp_path / "a", tmp_path / "c", *flags) == 2
    told = capsys.readouterr().err
    assert "--own-text: the whole model does not fit on cpu to write text" in told
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("share", ["1", "-0.1", "nan", "half"])
def test_a_share_that_is_none(share, llama_folder, text_folder, tmp_path, capsys):
    flags = ["--own-text", share]
    assert expand_with(llama_folder, text_folder, tmp_path / "a", tmp_path / "c", *flags) == 2
    assert "own" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "c").exists()
