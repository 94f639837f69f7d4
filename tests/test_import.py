"""What importing the package does, and what it leaves to those who need it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import sparse_expansion

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "ray", "rich", "sklearn"}
AS_CONSOLE_SCRIPT = "import sys; sys.argv[0] = '/x/bin/sparse-expansion'; "
IS_REGISTERED = (
    "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as configs; "
    "print('sparse_expansion' in configs)"
)


def python(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """An interpreter of its own, started in ``folder``, which must succeed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_program_that_imports_the_package_can_load_expanded_models():
    # The order of the README: the package first, then transformers.
    code = "import sparse_expansion; from transformers import AutoModelForCausalLM; "
    assert python("-c", code + IS_REGISTERED).stdout == "True\n"


def test_a_persons_own_module_can_too(tmp_path):
    # The package is imported while runpy still looks for the module, as with the package's own.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import sparse_expansion\n")
    (tmp_path / "mine" / "tool.py").write_text(IS_REGISTERED)
    done = python("-m", "mine.tool", "-m", "sparse_expansion", folder=tmp_path)
    assert done.stdout == "True\n"


@pytest.mark.parametrize("name", ["/x/bin/sparse-expansion", "sparse-expansion.exe"])
def test_the_console_script_imports_nothing_heavy(name):
    code = (
        f"import sys; sys.argv[0] = {name!r}; "
        "import sparse_expansion, sparse_expansion.cli; print(*sys.modules)"
    )
    imported = set(python("-c", code).stdout.split())
    assert "sparse_expansion.config" in imported and not imported & HEAVY


@pytest.mark.parametrize("flags", [["-m", "sparse_expansion.cli"], ["-msparse_expansion.cli"]])
def test_the_command_line_as_a_module_imports_nothing_heavy(flags):
    done = python("-X", "importtime", *flags, "--version")
    assert sparse_expansion.__version__ in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "sparse_expansion.config" in imported and not imported & HEAVY


def test_wrong_names_are_answered_before_libraries_are_loaded(tmp_path):
    (tmp_path / "mine.txt").write_text("text")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "rows.jsonl").write_text('{"text": "words"}\nno JSON\n')
    for folder, files in {
        "full": {"notes": "precious"},
        "model": {"config.json": "{}", "tokenizer.json": "{}"},
        "mute": {"config.json": "{}"},
        "broken": {"config.json": "{"},
        "thin": {"config.json": "{}"},
        "foreign": {"config.json": '{"model_type": "mamba"}'},
        "cut": {"config.json": "{}", "tokenizer.json": "{}", "model.safetensors": "cut"},
    }.items():
        (tmp_path / folder).mkdir()
        if folder in ("model", "mute"):
            save_file({"a": np.zeros(1)}, tmp_path / folder / "model.safetensors")
        for name, content in files.items():
            (tmp_path / folder / name).write_text(content)
    names = {path.name for path in tmp_path.iterdir()}
    text, no_text, no_model = "--dataset mine.txt", "--dataset no.txt", "--model ./no"
    no_gpu = "--device cuda"
    lines = [
        f"run --model model {text} {no_gpu}",
        "run --model model --dataset rows.jsonl",
        f"run --model broken {text}",
        f"run --model thin {text}",
        f"run --model foreign {text}",
        "plan --model foreign",
        f"run --model cut {text}",
        f"run --model mute {text}",
        "run --model model --dataset empty.txt",
        f"run --model . {text}",
        "evaluate --model model --tasks arc_eazy",
        f"write-text --model model --output out.jsonl {no_gpu}",
        f"run {no_model} {text}",
        f"run --model model {no_text}",
        f"run --model model {text} --output full",
        f"expand {no_model} {text} --output out",
        f"evaluate {no_model} {text}",
        f"evaluate {no_model} --tasks arc_easy",
        f"plan {no_model}",
        f"allocate --model . {no_text}",
        f"sweep-clusters {no_model} {text} --layer 0",
        f"prune-neurons --model . {no_text} --shares 0.1",
        f"write-text {no_model} --output out.jsonl",
        "report no",
        "report . --baseline no",
        "compare . no",
        "analyze no",
        f"analyze . {no_text}",
        f"analyze . {text} --one-cluster no",
        "export no --output out",
    ]
    code = AS_CONSOLE_SCRIPT + (
        "from sparse_expansion.cli.main import main\n"
        # As on a machine without a GPU.
        "import sparse_expansion.api.opening as opening\n"
        "opening._lacks_driver = lambda: True\n"
        "from sparse_expansion.cli.parser import COMMANDS\n"
        f"assert {{line.split()[0] for line in {lines!r}}} == set(COMMANDS)\n"
        f"for line in {lines!r}:\n"
        f"    print(main(line.split()), {HEAVY!r} & set(sys.modules))\n"
    )
    done = python("-c", code, folder=tmp_path)
    assert done.stdout == "2 set()\n" * len(lines), (done.stdout, done.stderr)
    # One line each, and nothing of them was begun; where the disk is slow, what is looked for too.
    said = done.stderr.splitlines()
    answers = [line for line in said if line.startswith("sparse-expansion: error: ")]
    assert len(answers) == len(lines)
    others = [line for line in said if line not in answers]
    assert all("elapsed" in line and "libraries" not in line for line in others), others
    assert {path.name for path in tmp_path.iterdir()} == names


def test_public_names_are_there_when_they_are_read():
    code = (
        "import sparse_expansion as package; names = [n for n in package.__all__ if n[0] != '_']; "
        "assert set(names) <= set(dir(package)); assert 'torch' not in sys.modules; "
        "print(*(getattr(package, name).__name__ for name in names)); "
    )
    names = (
        "ExpandedLinear Result SparseExpansionConfig SparseExpansionQuantizer "
        "evaluate expand verify\n"
    )
    assert python("-c", AS_CONSOLE_SCRIPT + code + IS_REGISTERED).stdout == names + "True\n"


def test_what_opens_models_registers_the_format():
    # What takes long is imported once; the package itself by each of two processes.
    modules = ["model.streaming", "jobs.harness"]
    code = (
        "import importlib, os, transformers.quantizers.auto\n"
        f"for module in {modules!r}:\n"
        "    if os.fork() == 0:\n"
        "        importlib.import_module('sparse_expansion.' + module)\n"
        f"        {IS_REGISTERED}; break\n"
        "    assert os.wait()[1] == 0\n"
    )
    assert python("-c", AS_CONSOLE_SCRIPT + code).stdout == "True\nTrue\n"


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="'sparse_expansion' has no attribute 'nothing'"):
        _ = sparse_expansion.nothing
    assert set(vars(sparse_expansion)) >= set(sparse_expansion.__all__)
