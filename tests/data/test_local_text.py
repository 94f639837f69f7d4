"""Text of local files: what is text is read whole, and what is none is named with its place."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from sparse_expansion.data import local_text
from sparse_expansion.data.corpora import load_corpus
from sparse_expansion.data.names import check_text


def both(folder, write, suffix):
    """A folder with the same file for both texts."""
    for name in ("train", "test"):
        write(folder / f"{name}.{suffix}")
    return str(folder)


def jsonl(*values):
    return lambda path: path.write_text("".join(json.dumps({"text": v}) + "\n" for v in values))


def parquet(values):
    return lambda path: pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_nulls_are_skipped(suffix, tmp_path):
    write = jsonl(None, "real words", None) if suffix == "jsonl" else parquet([None, "real words"])
    corpus = load_corpus(both(tmp_path, write, suffix))
    assert (corpus.calibration, corpus.evaluation) == ("real words", "real words")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (["a", "b"], "a list"),
        ({"en": "a"}, "a mapping"),
        (5, "a number"),
        (0.5, "a number"),
        (True, "a truth value"),
    ],
)
def test_other_values_are_refused_with_their_line(value, kind, tmp_path):
    where = both(tmp_path, jsonl("words", value), "jsonl")
    with pytest.raises(ValueError, match=rf"train.jsonl, line 2: 'text' is {kind}, and not"):
        load_corpus(where)


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ([["a"], ["b"]], "a list"),
        ([1, 2], "a number"),
        (pyarrow.array([b"a", b"b"]), "bytes"),
        ([{"a": "b"}], "a mapping"),
    ],
)
def test_columns_of_other_types_are_refused_with_their_row(column, kind, tmp_path):
    where = both(tmp_path, parquet(column), "parquet")
    with pytest.raises(ValueError, match=rf"train.parquet, row 1: 'text' is {kind}, and not"):
        load_corpus(where)


def test_half_of_a_surrogate_pair_is_named(tmp_path):
    lines = '{"text": "fine"}\n{"text": "ab\\ud83d cd"}\n'
    where = both(tmp_path, lambda path: path.write_text(lines), "jsonl")
    with pytest.raises(ValueError, match=r"line 2: character 2 of 'text' .*\(U\+D83D\)"):
        load_corpus(where)
    # A whole pair is one character.
    (tmp_path / "train.jsonl").write_text('{"text": "ab\\ud83d\\ude00"}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "x"}\n')
    assert load_corpus(where).calibration == "ab\U0001f600"


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b", "\x1c"])
def test_line_separators_inside_strings_end_no_line(separator, tmp_path):
    text = f"one{separator}two"
    line = json.dumps({"text": text}, ensure_ascii=False)
    where = both(tmp_path, lambda path: path.write_text(f"{line}\n", encoding="utf-8"), "jsonl")
    assert load_corpus(where).calibration == text
    lines = [f"a{separator}b", *(f"c{i}" for i in range(9))]
    (tmp_path / "all.txt").write_text("\n".join(lines), encoding="utf-8")
    corpus = load_corpus(str(tmp_path / "all.txt"))
    assert corpus.calibration == " ".join(lines[:9]) and corpus.evaluation == "c8"


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_byte_order_mark_is_no_text(suffix, tmp_path):
    content = {"txt": "words", "jsonl": '{"text": "words"}'}[suffix]

    def write(path):
        path.write_bytes(b"\xef\xbb\xbf" + content.encode())

    assert load_corpus(both(tmp_path, write, suffix)).calibration == "words"


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_a_single_long_document_is_cut_at_white_space(suffix, tmp_path):
    text, path = "word " * 1000, tmp_path / f"one.{suffix}"
    {"txt": lambda p: p.write_text(text), "jsonl": jsonl(text), "parquet": parquet([text])}[suffix](
        path
    )
    corpus = load_corpus(str(path))
    assert corpus.calibration + corpus.evaluation == text
    assert corpus.evaluation.startswith("word ") and len(corpus.evaluation) == 495
    path = tmp_path / "solid.txt"
    path.write_text("x" * 100)
    corpus = load_corpus(str(path))
    assert (len(corpus.calibration), len(corpus.evaluation)) == (90, 10)


def test_json_of_great_depth_is_one_line(tmp_path):
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(ValueError, match="line 1: not a JSON object"):
        load_corpus(str(tmp_path / "deep.jsonl"))
    (tmp_path / "long.jsonl").write_text('{"text": %s}\n' % ("9" * 6000))
    with pytest.raises(ValueError, match="long.jsonl, line 1: not a JSON object"):
        load_corpus(str(tmp_path / "long.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe", "a.txt is not UTF-8 text"),
        # Cut inside of a character, at the file's end and not at that of what is looked at.
        ("a.txt", b"words \xc3", "a.txt is not UTF-8 text"),
        ("a.txt", b" \n", "a.txt is empty: give one with text"),
        ("a.jsonl", b"", "a.jsonl is empty: give one with text"),
        ("a.jsonl", b'{"text": "words"}\nwords', "a.jsonl, line 2: not a JSON object"),
        ("a.jsonl", b'{"body": "words"}', "name one of body by --text-column"),
        ("a.jsonl", b'{"messages": [{"content": "words"}]}', "has no 'role'"),
    ],
)
def test_what_begins_with_no_text_is_answered_before_anything_is_loaded(
    name, content, message, tmp_path
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        check_text(str(tmp_path / name))
    (tmp_path / "mine.txt").write_text("words")
    with pytest.raises(ValueError, match=message):
        check_text(f"{tmp_path / 'mine.txt'}:1,{tmp_path / name}:1")


def test_the_beginning_may_end_anywhere(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("äöü", encoding="utf-8-sig")
    rows = [{"body": "ä"}, {"body": None}, {"body": [{"role": "user", "content": "ö"}]}]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )
    for size in range(1, 100):
        monkeypatch.setattr(local_text, "_BEGINNING_BYTES", size)
        check_text(str(tmp_path / "a.txt"))
        check_text(tmp_path / "a.jsonl", "body")


def test_of_a_folder_both_texts_are_looked_at(tmp_path):
    (tmp_path / "train.txt").write_text("words")
    (tmp_path / "test.jsonl").write_text("words")
    with pytest.raises(ValueError, match=r"test.jsonl, line 1"):
        check_text(str(tmp_path))
