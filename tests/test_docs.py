"""The commands and code in README and docs: all parse, and those on a local model are run."""

import json
import re
import shlex
from pathlib import Path

import pytest

from sparse_expansion.cli import main
from sparse_expansion.flags import build_parser, normalise_flags

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands():
    found = []
    for page in PAGES:
        fences = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.M)
        for block in [text for language, text in fences if not language]:
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("sparse-expansion "):
                    found.append((page.name, shlex.split(line, comments=True)[1:]))
    return found


def test_there_are_commands():
    assert len(commands()) >= 4
    assert {page for page, _ in commands()} >= {"README.md", "how-to.md"}


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_command_parses(page, command):
    build_parser().parse_args(normalise_flags(command))


@pytest.mark.parametrize(
    ("page", "command"), [item for item in commands() if "./my-model" in item[1]]
)
def test_commands_on_a_local_model_run(
    page, command, tmp_path, monkeypatch, neox_folder, text_folder
):
    """As written, but for a smaller text, window and model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(neox_folder)
    small = {
        "--seqlen": "64",
        "--eval-windows": "4",
        "--dataset-size": "8",
        "--num_clusters": "4",
        "--dataset": str(text_folder),
    }
    for flag, value in small.items():
        if flag in command:
            command[command.index(flag) + 1] = value
        elif flag in ("--dataset-size", "--num_clusters"):
            command = [*command, flag, value]
    assert main(command) == 0
    metrics = json.loads((tmp_path / "expanded" / "metrics.json").read_text())
    assert metrics["perplexity_expanded"] > 1
    if page == "README.md":
        text = (ROOT / "README.md").read_text()
        (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        exec(compile(code, "README.md", "exec"), {})


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_format_pages_test_vectors():
    import torch

    from sparse_expansion.algorithms.packing import pack_codes, pack_mask

    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 1]]).bool()
    codes = torch.tensor([5, 1, 7], dtype=torch.uint8)
    page = (ROOT / "docs" / "format.md").read_text()
    for stream in (pack_mask(mask), pack_codes(codes, 3), pack_codes(codes, 4)):
        assert f"`{' '.join(f'{byte:02x}' for byte in stream.tolist())}`" in page
