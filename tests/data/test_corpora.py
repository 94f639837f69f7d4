import abc
import gzip
import inspect
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch

from sparse_expansion.data.corpora import load_corpus
from sparse_expansion.data.names import check_dataset
from sparse_expansion.data.windows import calibration_windows, evaluation_windows, whole_windows


def words(text, *, most=None):
    return torch.tensor([len(word) for word in text.split()][:most])


def test_pydoc_is_offline_english_and_split():
    corpus = load_corpus("pydoc")
    assert len(corpus.calibration) > 100_000 and len(corpus.evaluation) > 50_000
    assert "statement" in corpus.calibration
    assert corpus.evaluation[:2000] not in corpus.calibration


def test_stdlib_is_offline_source_code_and_split():
    corpus = load_corpus("stdlib")
    assert len(corpus.calibration) > len(corpus.evaluation) > 100_000
    assert inspect.getsource(abc) in corpus.calibration
    # Every fifth of the modules, which are in the order of their names: __future__ comes first.
    names = sorted(path.stem for path in Path(abc.__file__).parent.glob("*.py"))
    fifth = Path(abc.__file__).with_name(f"{names[4]}.py").read_text(encoding="utf-8")
    assert corpus.evaluation.startswith(fifth) and fifth not in corpus.calibration


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("train", ["train", "valid"])
def test_folders(tmp_path, suffix, train):
    texts = {train: ["one two", "three"], "test": ["four", "five six"]}
    for name, lines in texts.items():
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "txt":
            path.write_text("\n".join(lines))
        elif suffix == "jsonl":
            path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
        else:
            pyarrow.parquet.write_table(pyarrow.table({"text": lines}), path)
    corpus = load_corpus(str(tmp_path))
    separators = ("\n", "\n") if suffix == "txt" else (" ", "\n\n")
    assert corpus.calibration == separators[0].join(texts[train])
    assert corpus.evaluation == separators[1].join(texts["test"])


def test_a_single_file_is_split(tmp_path):
    path = tmp_path / "all.txt"
    path.write_text("\n".join(f"line{i}" for i in range(20)))
    corpus = load_corpus(str(path))
    assert corpus.calibration.split()[-1] == "line17"
    assert corpus.evaluation.split() == ["line18", "line19"]


def test_bad_datasets(tmp_path):
    with pytest.raises(ValueError, match="neither wikitext2, c4, pydoc, stdlib nor an existing"):
        check_dataset("wikitext3")
    with pytest.raises(ValueError, match="no train or valid"):
        check_dataset(str(tmp_path))
    (tmp_path / "train.txt").write_text("x")
    with pytest.raises(ValueError, match="no test"):
        check_dataset(str(tmp_path))
    (tmp_path / "test.txt").write_text(" \n")
    with pytest.raises(ValueError, match="empty evaluation text"):
        load_corpus(str(tmp_path))
    (tmp_path / "test.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_corpus(str(tmp_path))
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"no": 1}\n')
    with pytest.raises(ValueError, match=r"with a 'text': name one of no by"):
        load_corpus(str(tmp_path / "x.jsonl"))
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "b"\n')
    with pytest.raises(
        ValueError, match=r"line 2: not a JSON .* 'text': write {\"text\": \"...\"}"
    ):
        load_corpus(str(tmp_path / "x.jsonl"))
    (tmp_path / "x.parquet").write_text("nonsense")
    with pytest.raises(ValueError, match="no readable column 'text'"):
        load_corpus(str(tmp_path / "x.parquet"))
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(ValueError, match="none of .txt"):
        check_dataset(str(tmp_path / "x.csv"))


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_offline_and_not_cached(name, tmp_path):
    with pytest.raises(ValueError, match="--dataset pydoc"):
        load_corpus(name, cache_dir=str(tmp_path))


def test_c4_is_the_first_documents_of_two_files(tmp_path, monkeypatch):
    """The hub's files stand on this disk; everything else is the real library."""
    counts = {"train": 20_050, "validation": 1110}
    files = {"train": "en/c4-train.00000-of-01024.json.gz"}
    files["validation"] = "en/c4-validation.00000-of-00008.json.gz"
    for split, file in files.items():
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        lines = (json.dumps({"text": f"{split}{i}", "url": ""}) for i in range(counts[split]))
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    real = datasets.load_dataset

    def load(repository, name, *, data_files, **options):
        assert (repository, name) == ("allenai/c4", None)
        here = {split: str(tmp_path / file) for split, file in data_files.items()}
        return real("json", data_files=here, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    corpus = load_corpus("c4", cache_dir=str(tmp_path / "cache"))
    for split, text in (("train", corpus.calibration), ("validation", corpus.evaluation)):
        count = {"train": 20_000, "validation": 1100}[split]
        assert text.split() == [f"{split}{i}" for i in range(count)]


def test_calibration_windows_are_seeded_slices():
    text = " ".join("x" * (i % 50 + 1) for i in range(500))
    first = calibration_windows(text, words, num_windows=9, seqlen=16, seed=3)
    assert torch.equal(first, calibration_windows(text, words, num_windows=9, seqlen=16, seed=3))
    assert not torch.equal(
        first, calibration_windows(text, words, num_windows=9, seqlen=16, seed=4)
    )
    steps = first[:, 1:] - first[:, :-1]
    assert bool(((steps == 1) | (steps == -49)).all())


def test_whole_windows_are_the_text_end_to_end():
    windows = whole_windows("a bb ccc dddd eeeee", words, seqlen=2, kind="calibration")
    assert windows.tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match="the calibration text has 1 tokens, 2 are needed"):
        whole_windows("a", words, seqlen=2, kind="calibration")


def test_evaluation_windows_drop_the_remainder():
    windows = evaluation_windows("a bb ccc dddd eeeee", words, seqlen=2, max_windows=None)
    assert windows.tolist() == [[1, 2], [3, 4]]


def test_short_texts_say_how_many_tokens():
    with pytest.raises(ValueError, match="has 3 tokens, 5 are needed"):
        calibration_windows("a b c", words, num_windows=1, seqlen=4, seed=0)
    with pytest.raises(ValueError, match="has 3 tokens, 4 are needed"):
        evaluation_windows("a b c", words, seqlen=4, max_windows=None)
    with pytest.raises(ValueError, match="need 6 tokens, the evaluation text has 2 windows"):
        evaluation_windows("a b c d e", words, seqlen=2, max_windows=3)
