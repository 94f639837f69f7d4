"""JSON files of a run's folder that are something else: a line and an exit code, no traceback."""

import json
import shutil

import pytest

from sparse_expansion.cli import main
from sparse_expansion.config.checks import NUMBER, has_form

MARKER = "run/units/layer-000/mlp.dense_h_to_4h/router.json"
FILES = [
    "config.json",
    "manifest.json",
    "metrics.json",
    "model.safetensors.index.json",
    "run/allocation.json",
    "run/command.json",
    "run/run.json",
    "run/timeline.json",
    MARKER,
]
DRAWN = {"run/allocation.json", "run/timeline.json"}
DEEP = "[" * 100_000 + "]" * 100_000
FORMS = {"list": "[1]", "null": "null", "empty": "{}", "text": '"x"', "cut": '{"a": ', "deep": DEEP}


def scrambled(value):
    """JSON of the same keys whose values are of other types, level by level."""
    if isinstance(value, dict):
        yield {key: [item] for key, item in value.items()}
        for key, item in value.items():
            for other in scrambled(item):
                yield {**value, key: other}
                break
    elif isinstance(value, list) and value:
        yield {"a": value}


@pytest.mark.parametrize("name", FILES)
def test_what_reads_it_says_so_in_a_line(
    name, measured_run, small_run, text_folder, tmp_path, capsys
):
    assert all((measured_run / each).is_file() for each in FILES)
    original = (measured_run / name).read_text()
    others = [json.dumps(other) for other in scrambled(json.loads(original))]
    contents = [*FORMS.values(), *others[:5]]
    folder = tmp_path / "out"
    shutil.copytree(measured_run, folder)
    where = ["--model", str(folder), "--dataset", str(text_folder), "--seqlen", "48"]
    evaluate = ["evaluate", *where, "--eval-windows", "1", "--threads", "1"]
    # The page's figures take long, and show what tables do not.
    html = ["--html", str(tmp_path / "page.html")] if name in DRAWN else []
    for content in contents:
        for line in (
            # What lies in run/ and the metrics are no part of the model.
            *([evaluate] if "/" not in name and name != "metrics.json" else []),
            ["report", str(folder), *html],
            ["compare", str(folder), str(measured_run)],
            ["analyze", str(folder)],
        ):
            (folder / name).write_text(content)
            code = main(line)
            found = capsys.readouterr().err
            assert code in (0, 2), (line, content[:200], found)
            assert (code == 2) == ("error: " in found), (line, content[:200], found)


@pytest.mark.parametrize("name", [name for name in FILES if name != "run/run.json"])
@pytest.mark.parametrize("content", ["[1]", '{"files": 3}'])
def test_a_resumed_run_makes_it_again(name, content, measured_run, small_run, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(measured_run, folder)
    (folder / name).write_text(content)
    code = main([*small_run, "--output", str(folder), "--resume"])
    found = capsys.readouterr().err
    if name == "run/allocation.json":
        assert code == 2 and "delete it, and continue with --resume" in found
        (folder / name).unlink()
        assert main([*small_run, "--output", str(folder), "--resume"]) == 0
    else:
        assert code == 0, found
    for made in ("config.json", "manifest.json", "model.safetensors.index.json", MARKER):
        assert (
            json.loads((folder / made).read_text()).keys()
            == json.loads((measured_run / made).read_text()).keys()
        )


def test_forms_by_hand():
    form = {"a": [NUMBER], "b": {...: {"c": str}}}
    assert has_form({"a": [1, 2.5], "b": {"x": {"c": "y", "d": 1}}, "more": None}, form)
    assert has_form({"a": [], "b": {}}, form)
    for other in ({"a": [], "b": []}, {"a": ["1"], "b": {}}, {"a": [], "b": {"x": {}}}, [], None):
        assert not has_form(other, form)
