"""What a release says of itself: one version, true links, and files that are all there."""

import importlib.util
import json
import re
import sys
from types import SimpleNamespace

import pytest
import yaml

import sparse_expansion
from tests.test_docs import ROOT

REPOSITORY = "https://example.org/someone/sparse-expansion"


def toml(name):
    if sys.version_info < (3, 11):
        pytest.skip("the standard library reads TOML from Python 3.11 on")
    import tomllib

    return tomllib.loads((ROOT / name).read_text())


@pytest.fixture
def build(monkeypatch):
    """hatch_build.py; what it is a plug-in of is there in builds alone."""
    interface = SimpleNamespace(MetadataHookInterface=object)
    monkeypatch.setitem(sys.modules, "hatchling.metadata.plugin.interface", interface)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "hatch_build", module)
    spec.loader.exec_module(module)
    return module


def test_the_version_is_written_once_and_the_rest_agrees():
    version = sparse_expansion.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    images = []
    for name in ("Dockerfile", "rayjob.yaml"):
        images += re.findall(
            r"your-registry/sparse-expansion:(\S+)", (ROOT / "deploy" / name).read_text()
        )
    assert set(images) == {version} and len(images) == 3
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## (\S+)", changes, re.M)[1] == version
    project = toml("pyproject.toml")
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["hatch"]["version"]["path"] == "sparse_expansion/__init__.py"


def test_the_paper_is_the_same_everywhere():
    (paper,) = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    assert paper["url"].endswith("2405.15756")
    readme = (ROOT / "README.md").read_text()
    (entry,) = re.findall(r"```bibtex\n(.*?)```", readme, re.DOTALL)
    assert f"title = {{{paper['title']}}}" in entry and paper["url"] in entry
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert f"author = {{{' and '.join(names)}}}" in entry


def test_links_in_a_packages_description_are_absolute(build, monkeypatch):
    hook = build.ProjectMetadata()
    hook.root = str(ROOT)
    metadata = {"version": "1.2"}
    monkeypatch.setenv("SPARSE_EXPANSION_REPOSITORY", f"{REPOSITORY}/")
    hook.update(metadata)
    text = metadata["readme"]["text"]
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) > 10
    assert all(target.startswith(("https://", "#")) for target in targets)
    assert f"![x]({REPOSITORY}/raw/v1.2/docs/a.svg)" == build.absolute_links(
        "![x](docs/a.svg)", REPOSITORY, "1.2"
    )
    same = "[a](https://a.b/c) [d](#e) [f](mailto:g@h)"
    assert build.absolute_links(same, REPOSITORY, "1.2") == same
    assert metadata["urls"]["Changelog"] == f"{REPOSITORY}/blob/v1.2/CHANGELOG.md"
    # Every link leads to a file of the tag.
    for target in targets:
        name = re.sub(rf"{REPOSITORY}/(raw|blob)/v1.2/|#.*", "", target)
        assert target.startswith(("http", "#")) and (
            not target.startswith(REPOSITORY) or (ROOT / name).exists()
        )


def test_without_an_address_none_is_made_up(build, monkeypatch):
    monkeypatch.delenv("SPARSE_EXPANSION_REPOSITORY", raising=False)
    hook = build.ProjectMetadata()
    hook.root = str(ROOT)
    metadata = {"version": "1.2"}
    hook.update(metadata)
    assert metadata["readme"]["text"] == (ROOT / "README.md").read_text()
    assert metadata["urls"] == {"Paper": "https://arxiv.org/abs/2405.15756"}


def test_the_workflow_runs_what_is_there_on_the_pythons_that_are_named():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    jobs = workflow["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    scripts = [command for command in commands if command.startswith(".ci/")]
    assert scripts == [".ci/run", ".ci/package"]
    assert all((ROOT / script).stat().st_mode & 0o111 for script in scripts)
    pythons = jobs["checks"]["strategy"]["matrix"]["python"]
    named = toml("pyproject.toml")["project"]["classifiers"]
    assert [f"Programming Language :: Python :: {version}" for version in pythons] == [
        line for line in named if re.search(r":: 3\.\d+$", line)
    ]
    targets = re.findall(r"make (?:-C \S+ )?([\w-]+)", "\n".join(commands))
    assert targets == ["cluster-setup", "docs", "demo"]
    assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in targets)
    assert json.dumps(workflow["permissions"]) == '{"contents": "read"}'
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"TORCH \?= (\S+)", makefile)[1] == workflow["env"]["TORCH"]


def test_the_image_is_not_run_as_root_and_gets_no_clutter():
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    users = re.findall(r"^USER (\S+)", dockerfile, re.M)
    assert users[-1] == "1000:100"
    left_out = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "demo"} <= set(left_out)
    assert not {
        "sparse_expansion",
        "ray_jobs",
        "pyproject.toml",
        "README.md",
        "hatch_build.py",
        "Makefile",
        "benchmarks",
    } & set(left_out)
