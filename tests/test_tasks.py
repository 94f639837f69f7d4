"""Tasks that need no network: what their items are, and that scores are those of the models."""

import json
import math
import random
import re

import numpy as np
import pytest
import torch

from benchmarks.tasks import __main__ as tasks
from benchmarks.tasks import items as making
from sparse_expansion.data.corpora import load_corpus
from sparse_expansion.jobs.whole_model import load_whole

pytest.importorskip("lm_eval")
TEXT = load_corpus("pydoc").evaluation


def test_items_are_of_the_text_and_equal_each_time():
    made = making.make_items(TEXT, 40, 3)
    assert made == making.make_items(TEXT, 40, 3) != making.make_items(TEXT, 40, 4)
    # Fewer items are the first of more.
    assert made["cloze"][:20] == making.make_items(TEXT, 20, 3)["cloze"]
    assert {len(rows) for rows in made.values()} == {40}
    for row in made["last_word"]:
        assert row["text"] + row["target"] in TEXT and row["target"][1:].isalpha()
        assert 12 <= len(row["text"].split()) <= 64
    for row in made["cloze"]:
        right = row["choices"][row["answer"]]
        assert row["text"] + right in TEXT and len(set(row["choices"])) == 4
        assert all(one in TEXT and len(one.split()) == 8 for one in row["choices"])
    for row in made["ordering"]:
        right, wrong = row["choices"][row["answer"]], row["choices"][1 - row["answer"]]
        assert right in TEXT and wrong not in TEXT and sorted(right) == sorted(wrong)
    for row in made["arithmetic"]:
        lines = (row["text"] + row["target"]).splitlines()
        sums = [re.fullmatch(r"(\d+) \+ (\d+) = (\d+)", line).groups() for line in lines]
        assert len(sums) == 6 and all(int(a) + int(b) == int(c) for a, b, c in sums)
    assert {row["answer"] for row in made["cloze"]} == {0, 1, 2, 3}


def test_what_has_no_one_answer_is_left_out():
    before = "one two three four five six seven eight nine ten eleven twelve"
    found = {
        ending: making.last_words([f"{before} {ending}"], random.Random(0))
        for ending in ("thirteen.", "...", "thirteen 14 !", "foo.bar", "it's", "\nthirteen")
    }
    asked = {ending: rows[0]["target"] for ending, rows in found.items() if rows}
    # Where the end is no word of letters, an earlier one is asked for, if enough stands before it.
    assert asked == {"thirteen.": " thirteen", "thirteen 14 !": " thirteen"}
    assert making.passages_of("a b\nc\n \n  d\n\n" + "e " * 100 + "\nf\n") == [
        "a b\nc",
        "  d",
        ("e " * 100).strip(),
        "f",
    ]
    same = ["the very same words stand here two times over again"] * 2
    assert making.orders(same, random.Random(0)) == []


@pytest.fixture(scope="module")
def compared(neox_folder, measured_run, tmp_path_factory):
    """What the command writes for a model, the same again, and an expanded one, and the folder."""
    output = tmp_path_factory.mktemp("compared")
    # The tiny model's window and vocabulary are small.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "PAIR_WORDS", range(3, 13))
        patch.setattr(making, "CONTEXT_WORDS", 16)
        return output, scored(neox_folder, measured_run, output)


def scored(neox_folder, measured_run, output):
    models = [f"dense={neox_folder}", f"again={neox_folder}", f"expanded={measured_run}"]
    flags = "--items 12 --tokens 5 --batch-size 4 --threads 1 --resident".split()
    tasks.main([*models, "--output", str(output), *flags])
    return json.loads((output / "results.json").read_text())


def test_scores_are_those_of_the_models(compared, neox_folder, measured_run):
    output, found = compared
    rows = [json.loads(line) for line in (output / "tasks" / "last_word.jsonl").open()]
    nats = {}
    for name, folder in (("dense", neox_folder), ("expanded", measured_run)):
        model, tokenizer = load_whole(folder, device="cpu", dtype="auto", verify=True)
        nats[name] = []
        for row in rows:
            ids = tokenizer(row["text"] + row["target"], return_tensors="pt")["input_ids"]
            first = len(tokenizer(row["text"])["input_ids"])
            with torch.no_grad():
                scores = model(ids).logits[0].log_softmax(dim=-1)
            answer = range(first, ids.shape[1])
            nats[name].append(-sum(float(scores[i - 1, ids[0, i]]) for i in answer))
        prompt = tasks.PROMPTS[0]
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(5):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
        assert tokenizer.decode(ids[0]) == prompt + found["continuations"][prompt][name]
    scores = {row["model"]: row for row in found["scores"] if row["metric"] == "log-perplexity"}
    for name, each in nats.items():
        assert scores[name]["score"] == pytest.approx(np.mean(each), rel=1e-4)
        assert scores[name]["error"] == pytest.approx(np.std(each, ddof=1) / 12**0.5, rel=1e-4)
        assert scores[name]["perplexity"] == pytest.approx(math.exp(np.mean(each)), rel=1e-3)
    change = np.subtract(nats["expanded"], nats["dense"])
    assert scores["expanded"]["difference"] == pytest.approx(change.mean(), abs=1e-4)
    error = np.std(change, ddof=1) / 12**0.5
    assert scores["expanded"]["difference_error"] == pytest.approx(error, rel=1e-2)
    # Item by item, so that what both find hard does not count.
    assert error < scores["expanded"]["error"]


def test_all_tasks_are_scored_for_all_models(compared):
    output, found = compared
    kinds = {(row["task"], row["metric"]) for row in found["scores"]}
    assert kinds == {
        ("last_word", "acc"),
        ("last_word", "log-perplexity"),
        ("cloze", "acc"),
        ("cloze", "acc_norm"),
        ("ordering", "acc"),
        ("arithmetic", "acc"),
    }
    assert len(found["scores"]) == 3 * len(kinds)
    for row in found["scores"]:
        assert row["items"] == 12 and ("difference" in row) == (row["model"] != "dense")
        if row["model"] == "again":
            assert row["difference"] == row["difference_error"] == 0
        if row["metric"].startswith("acc"):
            assert 0 <= row["score"] <= 1 and (row["score"] * 12) % 1 == pytest.approx(0, abs=1e-9)
    printed = tasks.score_table(found["scores"])
    assert len(printed.splitlines()) == 2 + len(found["scores"]) and "less the first" in printed
    made = {path.name for path in (output / "tasks").iterdir()}
    assert made == {f"{task}.{end}" for task in tasks.METRICS for end in ("yaml", "jsonl")}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--items", "1"], "--items 1 must be at least 2"),
        (["--dataset", "nowhere"], "dataset 'nowhere' is neither"),
        (["--dataset", "{short}"], "the text gives 0 items for"),
        (["{model}"], "two models are called"),
        (["{short}"], "{short}"),
    ],
)
def test_bad_input(flags, message, neox_folder, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("One line.\nAnother line.\n" * 20)
    named = {"short": short, "model": neox_folder}
    given = [flag.format_map(named) for flag in flags]
    with pytest.raises(SystemExit) as ended:
        tasks.main([str(neox_folder), *given, "--output", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert message.format_map(named) in capsys.readouterr().err
