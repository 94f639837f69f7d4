"""What the help of the commands says of every setting."""

import re
import subprocess
import sys

import pytest

from sparse_expansion.cli.flags import NotGiven, default_text
from sparse_expansion.cli.main import main
from sparse_expansion.cli.parser import COMMANDS, command_parsers
from sparse_expansion.config import (
    Cluster,
    ExecutionOptions,
    TextOptions,
)
from sparse_expansion.config.fields import settings_of
from sparse_expansion.config.values import RUN_SECTIONS

RUN = (*RUN_SECTIONS, TextOptions)
WHOLE_SECTIONS = {
    "run": (*RUN, ExecutionOptions),
    "expand": (*RUN, ExecutionOptions),
    "plan": (*RUN, Cluster),
    "evaluate": (ExecutionOptions,),
    "analyze": (ExecutionOptions,),
    "sweep-clusters": (ExecutionOptions,),
    "prune-neurons": (ExecutionOptions,),
    "allocate": (ExecutionOptions,),
}
"""Settings' classes that a command has all flags of."""


@pytest.fixture
def help_of(monkeypatch):
    """The help of a command, every flag on one line."""

    def text(command):
        monkeypatch.setenv("COLUMNS", "2000")
        raw = command_parsers()[1][command].format_help()
        # A long list of spellings has its help on the next line.
        return re.sub(r"\n {10,}", "  ", raw.partition("examples:")[0])

    return text


def lines_of(text, flag):
    spelling = re.compile(rf"  (?:[-\w]+(?: \S+)?, )*{re.escape(flag)}(?![-\w])")
    return [line for line in text.splitlines() if spelling.match(line)]


@pytest.mark.parametrize("command", WHOLE_SECTIONS)
def test_every_setting_is_in_the_help_once_with_its_default(command, help_of):
    text = help_of(command)
    actions = {action.dest: action for action in command_parsers()[1][command]._actions}
    missing = {"dataset", "text_column"} if command == "plan" else set()
    count = 0
    for section in WHOLE_SECTIONS[command]:
        for name, spec in settings_of(section).items():
            if not spec.flag or name in missing:
                continue
            (line,) = lines_of(text, spec.flag)
            default = default_text(actions[name])
            assert spec.help in line
            assert line.endswith(f"{spec.help} Default: {default}." if default else spec.help)
            assert line.count("Default:") == (1 if default else 0)
            count += 1
    assert count >= 14


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_of_fields_say_what_the_fields_say(command):
    """Also where a command has some of a class's fields, or a default of its own."""
    known = {}
    for section in (*RUN, ExecutionOptions, Cluster):
        for name, spec in settings_of(section).items():
            known.setdefault(name, []).append(spec)
    for action in command_parsers()[1][command]._actions:
        if isinstance(action.default, NotGiven):
            assert action.help in [spec.help for spec in known[action.dest]]


@pytest.mark.parametrize(
    ("command", "flag", "default"),
    [
        ("run", "--sparsity", "0.5"),
        ("run", "--damping-fraction", "0.2"),
        ("run", "--pruner", "admm"),
        ("run", "--shrink-hessians", "on"),
        ("run", "--dataset-size", "128"),
        ("run", "--activation-memory", "2GiB"),
        ("run", "--worker-timeout", "1800"),
        ("run", "--threads", "all cores"),
        ("plan", "--tflops", "0.7 of what --gpu's maker publishes; without, 15"),
        ("plan", "--bandwidth", "1GB"),
        ("plan", "--num-workers", "1"),
        ("allocate", "--damping-fraction", "0.01"),
        ("allocate", "--pruner", "sparsegpt"),
        ("allocate", "--dataset-size", "32"),
        ("allocate", "--mean-clusters", "16"),
        ("sweep-clusters", "--num-clusters", "1,2,4,8,16"),
        ("analyze", "--windows", "8"),
    ],
)
def test_defaults_in_the_help_are_those_of_the_command(command, flag, default, help_of):
    (line,) = lines_of(help_of(command), flag)
    assert line.endswith(f" Default: {default}.")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_a_sentence(command):
    for action in command_parsers()[1][command]._actions:
        if action.dest != "help":
            assert action.help and action.help[0].isupper() and action.help.endswith(".")
            assert "default" not in action.help.lower()


@pytest.mark.parametrize("command", ["run", "expand"])
def test_the_help_shows_a_dozen_flags_and_help_all_the_rest(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    texts = {}
    for flag in ("--help", "--help-all", "--help_all"):
        assert main([command, flag]) == 0
        texts[flag] = capsys.readouterr().out
    count = {flag: len(re.findall(r"^  -", text, re.M)) for flag, text in texts.items()}
    assert 12 <= count["--help"] <= 16 and count["--help-all"] > 50
    for flag in ("--model", "--dataset", "--num-clusters", "--output", "--help-all"):
        assert len(lines_of(texts["--help"], flag)) == 1
    assert not lines_of(texts["--help"], "--stall-timeout") and "examples:" in texts["--help"]
    assert texts["--help_all"] == texts["--help-all"]
    parser = command_parsers()[1][command]
    dests = {action.dest for action in parser._actions}
    assert set(parser.common) - dests <= {"eval_windows"}


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        (
            "run --model m --num-cluster 4",
            "arguments: --num-cluster 4 (did you mean --num-clusters?)",
        ),
        ("run --model m --Sparsty=0.5", "(did you mean --sparsity?)"),
        ("run --model m --pruner amdm", "(did you mean admm?)"),
        ("run --model m --preset papr", "(did you mean paper?)"),
        ("rnu --model m", "(did you mean run?)"),
        ("reprt x", "(did you mean report?)"),
        ("report x --htlm y", "(did you mean --html?)"),
        ("run --model m --zzz", "arguments: --zzz (see"),
        ("run --model m extra", "arguments: extra (see"),
        ("run --sparsity 0.5", "arguments are required: -m/--model (see"),
        ("expand --model m", "arguments are required: --output (see"),
    ],
)
def test_a_typo_is_answered_with_what_was_meant(line, hint, capsys):
    assert main(line.split()) == 2
    (answer,) = capsys.readouterr().err.splitlines()
    assert hint in answer


def test_parsing_imports_nothing_heavy():
    """As the console script does it, whose name the package looks at."""
    code = (
        "import sys; sys.argv[0] = '/x/bin/sparse-expansion'; import sparse_expansion.cli.main; "
        "from sparse_expansion.cli.main import main; "
        "assert main(['run', '--model', 'm', '--sparsity', '3']) == 2; "
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300
    )
    assert "sparsity 3.0 is outside 0 to 1" in done.stderr
    for name in ("torch", "transformers", "numpy", "ray", "sklearn", "yaml"):
        assert f"'{name}'" not in done.stdout
