"""Tasks of lm-evaluation-harness, offline: a task of our own on the tiny trained model."""

import json
import math

import pytest
import torch

from sparse_expansion.cli import main

pytest.importorskip("lm_eval")
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{{target}}}}}"
{more}metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
QUESTIONS = [
    {"question": "The for", "choices": [" statement", " zzqx"], "answer": 0},
    {"question": "If the argument is", "choices": [" qqqj", " not"], "answer": 1},
    {"question": "The value of", "choices": [" the", " xvvw"], "answer": 0},
    {"question": "A function is", "choices": [" kjjz", " a"], "answer": 1},
]


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    choice = "doc_to_choice: choices\n"
    (folder / "words.yaml").write_text(
        TASK.format(
            name="words",
            file=file,
            kind="multiple_choice",
            target="answer",
            more=choice,
            metric="acc",
        )
    )
    return folder


@pytest.fixture(scope="module", autouse=True)
def _one_index(task_folder):
    """An index of our task file alone: reading the harness's thousands takes half a minute."""
    from lm_eval import tasks

    index = tasks.TaskManager(include_path=str(task_folder), include_defaults=False)

    def shared(include_path, include_defaults):
        assert include_defaults and include_path in (None, str(task_folder))
        return index

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "TaskManager", shared)
        yield


def log_likelihood(model, tokenizer, question, choice):
    """Of the choice after the question, by hand."""
    ids = tokenizer(question + choice, return_tensors="pt")["input_ids"]
    first = len(tokenizer(question)["input_ids"])
    with torch.no_grad():
        scores = model(ids).logits[0].log_softmax(dim=-1)
    return sum(float(scores[i - 1, ids[0, i]]) for i in range(first, ids.shape[1]))


def test_accuracy_is_that_of_the_likelier_choice(finished, task_folder, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = ["--model", str(finished), "--tasks", "words", "--task-path", str(task_folder)]
    assert main(["evaluate", *where, "--threads", "1", "--json"]) == 0
    out, progress = capsys.readouterr()
    result = json.loads(out)
    assert result["is_expanded"] and "agree with their digests" in progress
    assert f"task files of {task_folder} can run any code" in progress
    model = AutoModelForCausalLM.from_pretrained(finished).eval()
    tokenizer = AutoTokenizer.from_pretrained(finished)
    right = 0
    for row in QUESTIONS:
        scores = [
            log_likelihood(model, tokenizer, row["question"], choice) for choice in row["choices"]
        ]
        right += scores.index(max(scores)) == row["answer"]
    assert result["tasks"]["words"]["acc,none"] == right / len(QUESTIONS)
    assert right >= 3


def test_table_and_limit(finished, task_folder, capsys):
    where = ["--model", str(finished), "--tasks", "words", "--task-path", str(task_folder)]
    assert main(["evaluate", *where, "--limit", "2", "--num-fewshot", "0"]) == 0
    head, _, row = capsys.readouterr().out.strip().splitlines()
    assert head.split() == ["task", "metric", "value", "standard", "error"]
    name, metric, value, error = row.split()
    assert (name, metric) == ("words", "acc") and float(value) in (0.0, 0.5, 1.0)
    assert math.isfinite(float(error))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "no_such_task"], "the harness knows no no_such_task"),
        (["--tasks", "arc_easy,arc_eazy"], "knows no arc_eazy (did you mean arc_easy?)"),
        (["--tasks", "no_such_*"], "the harness knows no no_such_*"),
        (["--tasks", "words", "--task-path", "nowhere"], "is not a folder of task files"),
        (["--tasks", "words", "--limit", "0"], "--limit 0 must be at least 1"),
        (["--tasks", "words", "--executor", "ray"], "drop --executor ray"),
        (["--tasks", ","], "names no task"),
        (["--limit", "3"], "--limit needs --tasks"),
    ],
)
def test_bad_input(flags, message, finished, capsys):
    assert main(["evaluate", "--model", str(finished), *flags]) == 2
    assert message in capsys.readouterr().err


def test_code_in_task_files_is_refused(finished, tmp_path, capsys):
    (tmp_path / "evil.yaml").write_text("task: evil\nprocess_docs: !function evil.run\n")
    (tmp_path / "evil.py").write_text("raise SystemExit('was run')\n")
    where = ["--model", str(finished), "--tasks", "evil", "--task-path", str(tmp_path)]
    assert main(["evaluate", *where]) == 2
    assert "names a Python function" in capsys.readouterr().err
