"""Columns of rows, and conversations by a chat template."""

import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from sparse_expansion.cli import main
from sparse_expansion.data.corpora import load_corpus
from sparse_expansion.data.rows import Rows
from sparse_expansion.data.tokenization import chat_of
from tests import tiny

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.name %}!{% endif %}{% endfor %}</>"
)


def conversation(i, **more):
    return [
        {"role": "user", "content": f"ask {i}", **more},
        {"role": "assistant", "content": f"say {i}"},
    ]


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def templated(messages):
    return "".join(f"<{m['role']}>{m['content']}" + "!" * ("name" in m) for m in messages)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("column", [None, "turns"])
def test_conversations_are_texts_by_the_template(suffix, column, tmp_path):
    name = column or "messages"
    # The first message alone has a name: in a table all of them have that column.
    turns = [conversation(0, name="x"), *(conversation(i) for i in range(1, 10))]
    rows = [{name: found, "id": i} for i, found in enumerate(turns)]
    where = write(tmp_path / f"chats{suffix}", rows)
    corpus = load_corpus(where, rows=Rows(column, templated))
    assert corpus.evaluation == "<user>ask 9<assistant>say 9"
    assert corpus.calibration.startswith("<user>ask 0!<assistant>say 0 <user>ask 1<assistant>say 1")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_column_by_name(suffix, tmp_path):
    rows = [{"text": f"t{i}", "body": f"b{i}"} for i in range(10)]
    where = write(tmp_path / f"rows{suffix}", rows)
    assert load_corpus(where, rows=Rows("body")).evaluation == "b9"
    assert load_corpus(where).evaluation == "t9"
    with pytest.raises(ValueError, match="'bdy'.*did you mean body"):
        load_corpus(where, rows=Rows("bdy"))
    others = write(tmp_path / f"others{suffix}", [{"body": "b", "title": "t"}])
    with pytest.raises(ValueError, match="name one of body, title by --text-column"):
        load_corpus(others)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"content": "a"}], "line 1: a message of 'messages' has no 'role'"),
        ([{"role": "user", "content": 3}], "line 1: the 'content' of a message"),
        ([{"role": "user", "content": "a"}, 3], "line 1: a message of 'messages' has no 'role'"),
        ([3], "line 1: 'messages' is a list, and not a string"),
        (conversation(0), "line 1: 'messages' is a conversation, and the model's tokenizer has no"),
    ],
)
def test_what_is_no_conversation(messages, message, tmp_path):
    where = write(tmp_path / "chats.jsonl", [{"messages": messages}])
    with pytest.raises(ValueError, match=message):
        load_corpus(where, rows=Rows())


def test_a_template_that_fails_is_a_line(tmp_path, tokenizer):
    def chat(messages):
        raise RuntimeError("roles must\nalternate")

    where = write(tmp_path / "chats.jsonl", [{"messages": conversation(0)}])
    with pytest.raises(ValueError, match="does not take this conversation: roles must alternate"):
        load_corpus(where, rows=Rows(chat=chat))
    assert chat_of(tokenizer) is None


def test_the_tokenizers_own_template_and_column_reach_the_commands(tmp_path, text_folder, capsys):
    """From `--text-column` to a perplexity, equal to that of the texts written out."""
    tokenizer = tiny.train_tokenizer((text_folder / "train.txt").read_text()[:20_000])
    tokenizer.chat_template = TEMPLATE
    model = str(tiny.save_random("llama", tmp_path / "model", tokenizer))
    chats = [conversation(i) for i in range(200)]
    written = [{"text": chat_of(tokenizer)(chat)} for chat in chats]
    assert written[3]["text"] == "<user>ask 3<assistant>say 3</>"
    files = {
        "turns": write(tmp_path / "chats.jsonl", [{"turns": chat} for chat in chats]),
        "text": write(tmp_path / "texts.jsonl", written),
    }
    found = []
    for column, where in files.items():
        line = ["evaluate", "--model", model, "--dataset", where, "--text-column", column]
        assert main([*line, "--seqlen", "16", "--threads", "1", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert found[0] == found[1] > 1
    assert os.path.exists(files["text"])
