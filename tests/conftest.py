"""Tiny models and texts, made here: no network, no files from outside."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Ray reads these when it is imported. Token authentication is on, as on the shipped cluster; the
# token is the tests' own, so that nothing is read from or written to the user's home.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray's workers are niced by default, which starves them on a busy machine with few cores.
os.environ["RAY_worker_niceness"] = "0"
# Several processes share few cores: a thread that waits by spinning takes them from the others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

if not torch.cuda.is_available():
    # GPU kernels run in Triton's interpreter; it is chosen when they are imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests import tiny
from tests.execution import preforked

HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def short_home() -> Iterator[Path]:
    """A home with a short path: Ray's sockets lie in it, and Linux bounds the length of theirs."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as home:
        yield Path(home)


@pytest.fixture(scope="session")
def worker_program() -> Iterator[str]:
    """What Ray starts workers with: a stand-in for Python that has them forked."""
    with (
        tempfile.TemporaryDirectory(prefix="ray-") as folder,
        preforked.interpreter(Path(folder)) as program,
    ):
        yield program


@pytest.fixture(autouse=True)
def _quick_workers(request: pytest.FixtureRequest) -> Iterator[None]:
    """A Ray that a test starts in its own process has its workers forked."""
    if request.node.get_closest_marker("ray") is None:
        yield
        return
    with preforked.starting_workers(request.getfixturevalue("worker_program")):
        yield


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.txt and test.txt from the offline corpus."""
    from sparse_expansion.data.corpora import load_corpus

    folder = tmp_path_factory.mktemp("text")
    corpus = load_corpus("pydoc")
    (folder / "train.txt").write_text(corpus.calibration[:300_000])
    (folder / "test.txt").write_text(corpus.evaluation[:60_000])
    return folder


@pytest.fixture(scope="session")
def tokenizer(text_folder: Path):
    """A small byte-pair tokenizer trained on the text."""
    return tiny.train_tokenizer((text_folder / "train.txt").read_text())


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A tiny Llama with random weights."""
    return tiny.save_random("llama", tmp_path_factory.mktemp("llama"), tokenizer)


@pytest.fixture(scope="session")
def small_run(neox_folder: Path, text_folder: Path) -> list[str]:
    """The command of a run with measured shares and perplexities, without its output folder."""
    where = ["--model", str(neox_folder), "--dataset", str(text_folder)]
    return ["run", *where, *tiny.SMALL_RUN, "--eval-windows", "2"]


@pytest.fixture(scope="session")
def measured_run(small_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of that run; tests that change something take a copy."""
    from sparse_expansion.cli import main

    output = tmp_path_factory.mktemp("measured") / "out"
    assert main([*small_run, "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="session")
def neox_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer, text_folder: Path) -> Path:
    """A tiny GPT-NeoX, trained until it has learnt something."""
    return tiny.save_trained_neox(
        tmp_path_factory.mktemp("neox"), tokenizer, (text_folder / "train.txt").read_text()
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """How tests are dealt out to processes (`pytest -n`, `--dist loadgroup`).

    A file's tests stay together, since they share what they have made; so do all that start a Ray,
    for which two at a time would be too much for a small machine. Around all other hooks: xdist
    reads the marks in its own, which asks to be the first.
    """
    for item in items:
        group = "ray" if item.get_closest_marker("ray") else str(item.path.relative_to(HERE))
        item.add_marker(pytest.mark.xdist_group(group))
    # What takes longest first, so that no process is left with it at the end: the tests on Ray,
    # then those of documents and benchmarks, which lie in no folder of their own.
    items.sort(key=lambda item: (item.get_closest_marker("ray") is None, len(item.path.parts)))
    yield


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tests that are dealt out one by one make everything twice, and two Rays at a time."""
    if getattr(session.config.option, "loadgroup", False):
        alone = [item.nodeid for item in session.items if "@" not in item.nodeid]
        assert not alone, f"pytest-xdist has not grouped {alone[0]}: is pytest too new for it?"
