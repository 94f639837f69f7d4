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


def blocks():
    """Page and commands of every fenced block that has some."""
    found = []
    for page in PAGES:
        fences = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.M)
        for block in [text for language, text in fences if not language]:
            lines = block.replace("\\\n", " ").splitlines()
            here = [
                shlex.split(line, comments=True)[1:]
                for line in lines
                if line.startswith("sparse-expansion ")
            ]
            if here:
                found.append((page.name, here))
    return found


def commands():
    return [(page, command) for page, block in blocks() for command in block]


def test_there_are_commands():
    assert len(commands()) >= 4
    assert {page for page, _ in commands()} >= {"README.md", "how-to.md"}


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_command_parses(page, command):
    build_parser().parse_args(normalise_flags(command))


@pytest.mark.parametrize(
    ("page", "block"), [item for item in blocks() if "./my-model" in item[1][0]]
)
def test_commands_on_a_local_model_run(
    page, block, tmp_path, monkeypatch, neox_folder, text_folder
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
    for command in block:
        for flag, value in small.items():
            if flag in command and command[command.index(flag) + 1] != "1":
                command[command.index(flag) + 1] = value
            elif flag in ("--dataset-size", "--num_clusters") and flag not in command:
                command = [*command, flag, value] if command[0] in ("run", "expand") else command
        assert main(command) == 0
        if command[0] == "run":
            metrics = json.loads((tmp_path / "expanded" / "metrics.json").read_text())
            assert metrics["perplexity_expanded"] > 1
    if page == "README.md":
        text = (ROOT / "README.md").read_text()
        (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        exec(compile(code, "README.md", "exec"), {})


def test_every_submitted_job_parses():
    jobs = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        jobs += re.findall(r"^ray job submit .* -- +python ray_jobs/(\w+)\.py (.*)$", text, re.M)
    assert len(jobs) >= 2
    for command, line in jobs:
        assert (ROOT / "ray_jobs" / f"{command}.py").exists()
        build_parser().parse_args(normalise_flags([command, *shlex.split(line)]))


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_format_pages_test_vectors():
    import torch

    from sparse_expansion.algorithms.packing import PackedLayout, pack_codes, pack_expert, pack_mask
    from sparse_expansion.config import CompressionConfig, SparsityPattern

    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 1]]).bool()
    codes = torch.tensor([5, 1, 7], dtype=torch.uint8)
    page = (ROOT / "docs" / "format.md").read_text()
    n_m = torch.tensor([[1, 1, 0, 0, 0, 1, 0, 1], [0, 0, 1, 1, 1, 0, 0, 1]]).bool()
    two_in_four = CompressionConfig(sparsity=SparsityPattern.parse("2:4"))
    patterns = pack_expert(
        n_m.float(),
        n_m,
        None,
        layout=PackedLayout.of(2, 8, two_in_four),
        dtype=torch.float32,
    )["patterns"]
    for stream in (pack_mask(mask), pack_codes(codes, 3), pack_codes(codes, 4), patterns):
        assert f"`{' '.join(f'{byte:02x}' for byte in stream.tolist())}`" in page
