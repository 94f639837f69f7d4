"""Text that a model writes itself."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_expansion.cli import main
from sparse_expansion.jobs import own_text
from sparse_expansion.jobs.own_text import LIKELIEST_TOKENS, first_tokens, write_batch
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
