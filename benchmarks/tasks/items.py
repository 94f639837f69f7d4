"""Items of tasks made from a text, and the files that lm-evaluation-harness reads them from.

Everything is drawn with a seed: the same text gives the same items. A passage is a paragraph, and a
word what stands between white space.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Item = dict[str, Any]
LONG_LINE = 200
"""Characters from which a line is a paragraph by itself, as in WikiText."""
CONTEXT_WORDS = 64
"""Most words before what is asked for."""
LEAST_CONTEXT = 12
CONTINUATION_WORDS = 8
CHOICES = 4
PAIR_WORDS = range(8, 81)
"""Words of letters in a passage whose place is asked for: not a heading, and not a page."""
SHOTS = 5
LARGEST_TERM = 20
LEAST_ITEMS = 10
"""Fewer say nothing."""
_WORD = re.compile(r"\S+")
_LETTERS = re.compile(r"[^\W\d_]{2,}")
_LAST_WORD = re.compile(r"(?<=\S) [^\W\d_]{3,}\b(?!\S*\w)")
"""Letters alone after one space: no punctuation, number, part of a name or line break."""


def passages_of(text: str) -> list[str]:
    """The paragraphs of a text, in order: between blank lines, and long lines by themselves."""
    found = []
    for block in re.split(r"\n(?:[^\S\n]*\n)+", text):
        lines = block.split("\n")
        is_wrapped = max(map(len, lines)) < LONG_LINE
        found += [block] if is_wrapped else map(str.strip, lines)
    return [passage.rstrip() for passage in found if passage.strip()]


def last_words(passages: Sequence[str], rng: random.Random) -> list[Item]:
    """A passage up to its last word of letters, and that word."""
    found = []
    for passage in dict.fromkeys(passages):
        matches = list(_LAST_WORD.finditer(passage))
        context = passage[: matches[-1].start()] if matches else ""
        words = list(_WORD.finditer(context))
        if len(words) >= LEAST_CONTEXT:
            text = context[words[-CONTEXT_WORDS:][0].start() :]
            found.append({"text": text, "target": matches[-1].group()})
    rng.shuffle(found)
    return found


def clozes(passages: Sequence[str], rng: random.Random) -> list[Item]:
    """The beginning of a passage, how it goes on, and how other passages go on from some place."""
    cuts = []
    for passage in dict.fromkeys(passages):
        words = list(_WORD.finditer(passage))
        last = min(CONTEXT_WORDS, len(words) - CONTINUATION_WORDS)
        places = [
            place
            for place in range(LEAST_CONTEXT, last + 1)
            if passage[words[place - 1].end() : words[place].start()] == " "
        ]
        if places:
            place = rng.choice(places)
            end = words[place + CONTINUATION_WORDS - 1].end()
            text = passage[words[0].start() : words[place - 1].end()]
            cuts.append((text, passage[words[place - 1].end() : end]))
    endings = list(dict.fromkeys(ending for _, ending in cuts))
    if len(endings) < CHOICES:
        return []
    found = []
    for text, right in cuts:
        wrong = [one for one in rng.sample(endings, CHOICES) if one != right][: CHOICES - 1]
        found.append({"text": text, **_choices(right, wrong, rng)})
    rng.shuffle(found)
    return found


def orders(passages: Sequence[str], rng: random.Random) -> list[Item]:
    """Two passages that follow each other, in their order and in the other; none is used twice."""
    found = []
    for pair in dict.fromkeys(zip(passages[::2], passages[1::2], strict=False)):
        first, second = pair
        if first != second and all(len(_LETTERS.findall(one)) in PAIR_WORDS for one in pair):
            right, wrong = f"{first}\n\n{second}", f"{second}\n\n{first}"
            found.append({"text": "", **_choices(right, [wrong], rng)})
    rng.shuffle(found)
    return found


def sums(count: int, rng: random.Random) -> list[Item]:
    """Additions of two small numbers after a few that are done; the line's end is asked for too."""

    def line() -> tuple[str, str]:
        a, b = rng.randint(1, LARGEST_TERM), rng.randint(1, LARGEST_TERM)
        return f"{a} + {b} =", f" {a + b}\n"

    found = []
    for _ in range(count):
        *shots, (text, target) = [line() for _ in range(SHOTS + 1)]
        found.append({"text": "".join(map("".join, shots)) + text, "target": target})
    return found


def _choices(right: str, wrong: list[str], rng: random.Random) -> Item:
    answer = rng.randrange(len(wrong) + 1)
    return {"choices": [*wrong[:answer], right, *wrong[answer:]], "answer": answer}


MAKERS: dict[str, Callable[[Sequence[str], random.Random], list[Item]]] = {
    "last_word": last_words,
    "cloze": clozes,
    "ordering": orders,
}
"""What makes the items of a task from passages."""
METRICS = {
    "last_word": ("acc", "perplexity"),
    "cloze": ("acc", "acc_norm"),
    "ordering": ("acc",),
    "arithmetic": ("acc",),
}
"""The harness's names of what every task is scored by."""


def make_items(text: str, count: int, seed: int) -> dict[str, list[Item]]:
    """At most ``count`` items of every task.

    Raises:
        ValueError: the text has too few passages for a task.
    """
    passages = passages_of(text)
    # A generator for each, so that no task's items change with another's.
    found = {
        task: maker(passages, random.Random(f"{task} {seed}"))[:count]
        for task, maker in MAKERS.items()
    }
    found["arithmetic"] = sums(count, random.Random(f"arithmetic {seed}"))
    for task, items in found.items():
        if len(items) < min(LEAST_ITEMS, count):
            raise ValueError(
                f"the text gives {len(items)} items for {task}, at least {LEAST_ITEMS} are needed: "
                "give a --dataset with more paragraphs"
            )
    return found


def write_tasks(items: dict[str, list[Item]], folder: Path) -> None:
    """Write a ``.jsonl`` and a task file for every task; templates alone, no code.

    Args:
        items: by task.
        folder: is made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for task, rows in items.items():
        file = folder.resolve() / f"{task}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        is_choice = "choices" in rows[0]
        config = {
            "task": task,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}},
            "test_split": "test",
            "output_type": "multiple_choice" if is_choice else "loglikelihood",
            "doc_to_text": "text",
            "doc_to_target": "answer" if is_choice else "target",
            **({"doc_to_choice": "choices"} if is_choice else {}),
            "target_delimiter": "",
            "metric_list": [
                {
                    "metric": metric,
                    "aggregation": "perplexity" if metric == "perplexity" else "mean",
                    "higher_is_better": metric != "perplexity",
                }
                for metric in METRICS[task]
            ],
            "metadata": {"version": 1.0},
        }
        # JSON is YAML.
        (folder / f"{task}.yaml").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
