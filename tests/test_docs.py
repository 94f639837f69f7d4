"""The commands and code in README and docs: all parse, and those on a local model are run."""

import ast
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_expansion.cli import main
from sparse_expansion.cli.parser import COMMANDS, parse_arguments
from sparse_expansion.cli.settings import execution_options, experiment_config, run_config
from sparse_expansion.config import SparsityPattern
from sparse_expansion.config.values import known_settings
from tests.published import MODELS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


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
    found = commands()
    assert {page for page, _ in found} == {"README.md", "findings.md", "how-to.md", "tutorial.md"}
    assert {command[0] for _, command in found} >= set(COMMANDS) - {"expand"}
    assert len(found) >= 30


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_command_parses(page, command, tmp_path, monkeypatch):
    """Flags that a command knows, whose values make settings."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "expanded").mkdir()
    (tmp_path / "expanded" / "run.yaml").write_text("model: ./my-model\n")
    args = parse_arguments(command)
    name = command[0]
    assert args.command == name and name in COMMANDS
    if name in ("run", "expand", "plan"):
        config = settings_as_if_files_were_there(args)
        assert config.calibration.seqlen == 512
        assert config.compression.sparsity == sparsity_in(command)
    elif name in ("sweep-clusters", "prune-neurons", "allocate"):
        config = experiment_config(args, 1, 512)
        assert config.calibration.calibration_inputs == "dense"
        assert config.compression.sparsity == sparsity_in(command)
    elif name in ("evaluate", "write-text"):
        assert args.model in command
    else:
        assert set(vars(args)) & {"folder", "folders"}
    if "executor" in args:
        assert execution_options(args).executor == args.executor


def sparsity_in(command):
    given = command[command.index("--sparsity") + 1] if "--sparsity" in command else "0.5"
    return SparsityPattern.parse(given)


def settings_as_if_files_were_there(args):
    """Settings of a run, without the files that other commands of the page write."""
    if args.layer_sparsity.endswith(".json"):
        args.layer_sparsity = "uniform"
    if args.layer_clusters:
        args.layer_clusters = ()
    return run_config(args, 512)


SMALL = {
    "--seqlen": "64",
    "--eval-windows": "4",
    "--dataset-size": "12",
    "--num_clusters": "4",
    "--windows": "4",
    "--layer": "1",
    "--neuron": "3",
}


def made_small(command, text_folder):
    """The command with a smaller text, window and number of clusters."""
    command = list(command)
    for flag, value in SMALL.items():
        if flag in command:
            place = command.index(flag) + 1
            # One cluster stays one, and a list stays a list.
            if command[place] != "1" and "," not in command[place]:
                command[place] = value
        elif command[0] in ("run", "expand") and flag in ("--dataset-size", "--num_clusters"):
            command += [flag, value]
    if "--dataset" in command:
        command[command.index("--dataset") + 1] = str(text_folder)
    return command


def run_script(monkeypatch, name, *arguments):
    """One of docs/, in this process: importing PyTorch takes longer than the script."""
    script = str(ROOT / "docs" / name)
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(script, run_name="__main__")


def test_the_list_of_flags_is_that_of_the_code(tmp_path, monkeypatch):
    run_script(monkeypatch, "build_flags.py", tmp_path / "flags.md")
    written = (ROOT / "docs" / "flags.md").read_text()
    assert written == (tmp_path / "flags.md").read_text(), "run: python docs/build_flags.py"
    assert "| `pca_reduction_factor` | `32` |" in written and "--ray-address" in written


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def on_a_local_model():
    """The blocks of commands that a person with a model can run, those on Ray marked."""
    for page, block in blocks():
        if page != "tutorial.md" and {"./my-model", "./smollm2"} & set(block[0]):
            marks = [pytest.mark.ray] if any("ray" in command for command in block) else []
            yield pytest.param(page, block, marks=marks)


@pytest.mark.parametrize(("page", "block"), on_a_local_model())
def test_commands_on_a_local_model_run(
    page, block, tmp_path, monkeypatch, neox_folder, llama_folder, text_folder, request
):
    """As written, but for a smaller text, window and model."""
    if request.node.get_closest_marker("ray"):
        *_, address = request.getfixturevalue("ray_flags")
        monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(neox_folder)
    (tmp_path / "smollm2").symlink_to(llama_folder)
    for command in block:
        assert main(made_small(command, text_folder)) == 0
        if command[0] == "run" and "./expanded" in command:
            metrics = json.loads((tmp_path / "expanded" / "metrics.json").read_text())
            assert metrics["perplexity_expanded"] > 1
    if page == "README.md":
        use, make = python_blocks("README.md")
        exec(compile(use, "README.md", "exec"), {})
        # What makes models is run in the notebook; here its settings have to be known.
        calls = [node for node in ast.walk(ast.parse(make)) if isinstance(node, ast.Call)]
        given = {keyword.arg for call in calls for keyword in call.keywords}
        assert given - {"eval_windows"} <= set(known_settings()) and len(given) == 5


def test_the_tutorial_from_its_beginning_to_its_end(
    tmp_path, monkeypatch, neox_folder, text_folder, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(neox_folder)
    here = [command for page, block in blocks() if page == "tutorial.md" for command in block]
    assert len(here) >= 9
    for command in here:
        if "--tasks" not in command:  # They download their data; see test_harness.py.
            assert main(made_small(command, text_folder)) == 0, command
    (code,) = python_blocks("docs/tutorial.md")
    exec(compile(code, "tutorial.md", "exec"), {})
    made = {path.name for path in tmp_path.iterdir()}
    assert made >= {"report.html", "experts.parquet", "neurons.parquet", "plots", "k8-random"}
    figures = {path.stem for path in (tmp_path / "plots").iterdir()}
    assert figures >= {
        "perplexity-cost",
        "timeline",
        "wasserstein-difficulty",
        "wasserstein-improvement",
        "neuron-3-mlp.dense_h_to_4h",
        "pruned-neurons",
    }


def test_the_notebook_from_its_beginning_to_its_end(tmp_path, monkeypatch, capsys):
    """Its cells, one after the other, as Jupyter would run them."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())
    assert notebook["nbformat"] == 4
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            # As it is kept: without what a run of it left.
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    plain, routed = (names["made"][count].metrics for count in (1, 8))
    assert plain["perplexity_dense"] == routed["perplexity_dense"] < 100
    assert plain["perplexity_dense"] < routed["perplexity_expanded"] < plain["perplexity_expanded"]
    assert names["mixed"].metrics["num_windows"] == 8
    said = capsys.readouterr().out
    assert "(did you mean num_clusters?)" in said and "ExpandedLinear" in said
    assert not list(tmp_path.iterdir())


def test_the_reference_of_the_modules_builds(tmp_path):
    # In a process of its own: pdoc suppresses programs that are started while it imports modules,
    # and Ray's classes, were they imported first there, would go on to suppress Ray's servers.
    script = ROOT / "docs" / "build_reference.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, cwd=ROOT)
    page = (tmp_path / "sparse_expansion" / "algorithms" / "sweep.html").read_text()
    assert "One pass over the columns" in page
    assert (tmp_path / "sparse_expansion" / "execution" / "ray.html").exists()


def test_every_submitted_job_parses():
    jobs = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        jobs += re.findall(r"^ray job submit .* -- +python ray_jobs/(\w+)\.py (.*)$", text, re.M)
    assert len(jobs) >= 2
    for command, line in jobs:
        assert (ROOT / "ray_jobs" / f"{command}.py").exists()
        parse_arguments([command, *shlex.split(line)])


@pytest.mark.parametrize("command", ["run", "expand", "evaluate", "analyze", "allocate"])
def test_a_job_is_its_command_on_the_jobs_own_cluster(command, monkeypatch):
    given = []
    monkeypatch.setattr("ray_jobs._entry.main", lambda arguments: given.append(arguments) or 7)
    monkeypatch.setattr(sys, "argv", ["x", "--num_workers", "2"])
    with pytest.raises(SystemExit, match="7"):
        runpy.run_path(str(ROOT / "ray_jobs" / f"{command}.py"), run_name="__main__")
    where = ["--executor", "ray", "--ray-address", "auto"]
    assert given == [[command, "--num-workers", "2", *where]]


def test_every_benchmark_that_is_named_is_there():
    named = set()
    for page in PAGES:
        text = page.read_text()
        named |= set(re.findall(r"python (?:-m benchmarks\.|benchmarks/)(\w+)", text))
    assert len(named) >= 8
    for name in named:
        file, package = ROOT / "benchmarks" / f"{name}.py", ROOT / "benchmarks" / name
        assert file.exists() or (package / "__main__.py").exists(), name


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_what_the_readme_says_a_large_model_costs(tmp_path, capsys):
    model, _ = MODELS["llama-2-13b"]
    model.save_pretrained(tmp_path)
    flags = f"plan --model {tmp_path} --num_clusters 16 --gpu h100 --price 3 --json"
    plans = []
    for more in ("--sparsity 0.5", "--sparsity 2:4 --quantize --bits 4"):
        assert main([*flags.split(), *more.split()]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    half, pattern = plans
    told = " ".join((ROOT / "README.md").read_text().split())
    assert (
        f"Llama 2 13B ({half['dense_checkpoint_bytes'] / 1e9:.0f} GB) becomes "
        f"{half['checkpoint_bytes'] / 1e9:.0f} GB with 16 experts at 50 %, and "
        f"{pattern['checkpoint_bytes'] / 1e9:.0f} GB at 2:4 with 4 bits. "
        f"`sparse-expansion plan` estimates {half['hours'] * 60:.0f} minutes for the one and "
        f"{pattern['hours'] * 60:.0f} for the other on one H100, {half['cost']:.2f} and "
        f"{pattern['cost']:.2f} at a price of 3 an hour."
    ) in told


def test_the_format_pages_test_vectors():
    import torch

    from sparse_expansion.algorithms.packing.experts import pack_expert
    from sparse_expansion.algorithms.packing.layout import PackedLayout
    from sparse_expansion.algorithms.packing.streams import pack_codes, pack_mask
    from sparse_expansion.config import CompressionConfig

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
