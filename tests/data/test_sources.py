"""What `--dataset` can name beside one text: mixtures with weights, and data sets of the hub."""

import json
from collections import Counter

import datasets
import pytest
import torch

from sparse_expansion.data.corpora import load_corpus
from sparse_expansion.data.names import (
    check_dataset,
    check_text,
    hub_name,
    needs_hub,
    weighted_sources,
    whole_name,
)
from sparse_expansion.data.rows import Rows
from sparse_expansion.data.texts import TextRequest, Texts


class Words:
    """A tokenizer of texts that are numbers."""

    def __call__(self, text, **options):
        return {"input_ids": [int(word) for word in text.split()]}


def numbers(path, first, count):
    """A file of so many numbers, each a token, in as many lines of ten."""
    lines = [range(start, start + 10) for start in range(first, first + count, 10)]
    path.write_text("\n".join(" ".join(map(str, line)) for line in lines))
    return path


def test_names_and_weights(tmp_path, monkeypatch):
    assert weighted_sources("a:0.7,b:0.3") == [("a", 0.7), ("b", 0.3)]
    assert weighted_sources("a:1,b:3") == [("a", 0.25), ("b", 0.75)]
    assert weighted_sources("a,b.txt:1,c:d:.5,hf:o/n:conf@train:0.5") == [
        ("a,b.txt", 0.5),
        ("c:d", 0.25),
        ("hf:o/n:conf@train", 0.25),
    ]
    # One text alone has no weight, nor has what is a path as a whole.
    for name in ("hf:o/n:2.0", "pydoc", "a,b", "a:0.5,b", "a:1"):
        assert weighted_sources(name) == [(name, 1.0)]
    path = tmp_path / "a:0.5,b:0.5"
    path.mkdir()
    assert weighted_sources(str(path)) == [(str(path), 1.0)]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("x")
    assert whole_name("x.txt:0.00001,pydoc:1") == f"{tmp_path}/x.txt:0.00001,pydoc:1"
    assert whole_name("hf:o/n:c@s") == "hf:o/n:c@s" and whole_name("x.txt") == f"{tmp_path}/x.txt"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pydoc:0,c4:1", "dataset 'pydoc' has weight 0"),
        ("pydoc:1,pydoc:2", "named twice"),
        ("pydoc:1,/nowhere:2", "dataset '/nowhere' is neither"),
        ("pydoc:1,c4", "nor several with weights"),
        ("wikitxt2", "did you mean wikitext2"),
        ("https://host/a.txt", "is a URL: download it, and give the file"),
        ("hf:name", "not of the form hf:owner/name"),
        ("hf:o/n@a b", "not of the form"),
        ("hf:o/n@train[:9]", "not of the form"),
        ("hf:../x/y", "not of the form"),
    ],
)
def test_wrong_names_are_answered_before_work(name, message):
    with pytest.raises(ValueError, match=message):
        check_text(name)


def test_which_texts_need_the_hub(tmp_path, monkeypatch):
    assert all(map(needs_hub, ("c4", "wikitext2", "hf:o/n", "pydoc:1,hf:o/n:2")))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf:x.txt").write_text("a file of such a name")
    assert not any(map(needs_hub, ("pydoc", "stdlib:1,pydoc:2", str(tmp_path), "hf:x.txt")))


@pytest.fixture
def mixed(tmp_path):
    """Two texts of which the second's tokens are from 10,000 up, at three to one."""
    first = numbers(tmp_path / "a.txt", 0, 4000)
    second = numbers(tmp_path / "b.txt", 10_000, 1000)
    return TextRequest(dataset=f"{first}:3,{second}:1").load(Words())


def shares(windows):
    """Windows of either text; none is of both."""
    of_second = windows >= 10_000
    assert torch.equal(of_second.all(1), of_second.any(1))
    return Counter(of_second.all(1).tolist())


def test_windows_are_shared_out_by_weight(mixed):
    windows = mixed.calibration(num_windows=20, seqlen=8, seed=1)
    assert shares(windows) == {False: 15, True: 5}
    assert torch.equal(windows, mixed.calibration(num_windows=20, seqlen=8, seed=1))
    assert not torch.equal(windows, mixed.calibration(num_windows=20, seqlen=8, seed=2))
    # Both are in the first half too: shards are cut in this order.
    assert len(shares(windows[:10])) == 2
    # Largest remainders: 7 windows are 5.25 and 1.75.
    assert shares(mixed.calibration(num_windows=7, seqlen=8, seed=0)) == {False: 5, True: 2}
    with pytest.raises(ValueError, match="--dataset-size 1 leaves no window to .*b.txt"):
        mixed.calibration(num_windows=1, seqlen=8, seed=0)


def test_whole_texts_are_mixed_until_one_is_used_up(mixed):
    # 3,600 and 900 tokens: 450 and 112 windows of 8, of which the shares allow 336 and 112.
    windows = mixed.calibration(num_windows=None, seqlen=8, seed=0)
    assert shares(windows) == {False: 336, True: 112}
    assert len(torch.unique(windows)) == windows.numel()


def test_held_out_windows_have_the_same_shares_in_order(mixed):
    windows = mixed.evaluation(seqlen=10, max_windows=8)
    assert windows[:, 0].tolist() == [3600, 3610, 3620, 3630, 3640, 3650, 10_900, 10_910]
    # 400 and 100 held-out tokens.
    assert shares(mixed.evaluation(seqlen=10, max_windows=None)) == {False: 30, True: 10}
    with pytest.raises(ValueError, match="--eval-windows 1 leaves no window"):
        mixed.evaluation(seqlen=10, max_windows=1)
    with pytest.raises(ValueError, match="use --eval-windows"):
        mixed.evaluation(seqlen=10, max_windows=400)


def test_a_mixture_of_equal_parts_is_no_other_than_its_texts(tmp_path):
    """Windows of a text in a mixture are those that it has alone."""
    path = numbers(tmp_path / "a.txt", 0, 1000)
    alone = TextRequest(dataset=str(path)).load(Words())
    both = Texts(alone.corpora * 2, (0.5, 0.5), alone.encode)
    one = alone.calibration(num_windows=4, seqlen=8, seed=3)
    two = both.calibration(num_windows=8, seqlen=8, seed=3)
    assert sorted(two.tolist()) == sorted(one.tolist() * 2)


def test_parts_of_a_hub_name():
    found = hub_name("hf:Salesforce/wikitext:wikitext-2-raw-v1@test")
    assert (found.repository, found.config, found.split) == (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "test",
    )
    assert hub_name("hf:a/b@train").config is None and hub_name("hf:a/b:c").split is None


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose one data set lies on this disk; everything else is the real library."""
    for split, count in {"train": 20, "validation": 5}.items():
        rows = [{"text": f"{split}{i}", "id": i} for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    real = datasets.load_dataset
    calls = []

    def load(repository, config, *, streaming=False, **options):
        calls.append(streaming)
        assert (repository, config) == ("owner/name", "small")
        if streaming and load.refuses_streams:
            raise NotImplementedError("no streams\nof this")
        files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")}
        options["cache_dir"] = str(tmp_path / "cache")
        return real("json", data_files=files, streaming=streaming, **options)

    load.refuses_streams = False
    load.calls = calls
    monkeypatch.setattr(datasets, "load_dataset", load)
    return load


@pytest.mark.parametrize("refuses", [False, True])
def test_a_hub_data_set(hub, refuses):
    hub.refuses_streams = refuses
    corpus = load_corpus("hf:owner/name:small")
    assert corpus.calibration.split() == [f"train{i}" for i in range(20)]
    assert corpus.evaluation.split() == [f"validation{i}" for i in range(5)]
    assert hub.calls == ([True, False] if refuses else [True])
    one = load_corpus("hf:owner/name:small@train")
    assert one.calibration.split() == [f"train{i}" for i in range(18)]
    assert one.evaluation.split() == ["train18", "train19"]


def test_a_hub_data_set_is_read_from_its_beginning(hub, monkeypatch):
    monkeypatch.setattr("sparse_expansion.data.sources.MOST_CHARACTERS", 20)
    assert load_corpus("hf:owner/name:small").calibration.split() == [
        "train0",
        "train1",
        "train2",
        "train3",
    ]


def test_what_is_wrong_with_a_hub_data_set_is_a_line(hub, tmp_path):
    with pytest.raises(
        ValueError, match=r"hf:owner/name:small@dev cannot be had \(.*dev"
    ) as caught:
        load_corpus("hf:owner/name:small@dev")
    assert "\n" not in str(caught.value)
    # A wrong split downloads nothing.
    assert hub.calls == [True]
    with pytest.raises(ValueError, match="hf:owner/name:small, train, row 1: not a JSON object"):
        load_corpus("hf:owner/name:small", rows=Rows("body"))
    (tmp_path / "train.jsonl").write_text('{"text": "a", "id": 1}\n{"text": ')
    with pytest.raises(ValueError, match="cannot be had"):
        load_corpus("hf:owner/name:small")


def test_the_hub_out_of_reach_is_a_line(tmp_path):
    with pytest.raises(ValueError, match="without a network it must be in the cache") as caught:
        load_corpus("hf:owner/name", cache_dir=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_file_may_be_called_like_one_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf:x.txt").write_text("words " * 20)
    check_dataset("hf:x.txt")
    assert load_corpus("hf:x.txt").calibration.startswith("words")
