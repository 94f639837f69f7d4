"""Tiny models, made here: no network, no files from outside."""

from __future__ import annotations

import lzma
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
# Agents of every node look at all processes of the machine, and at all files of logs, again and
# again; nobody looks at what they find.
os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")
os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "5")
# Several processes share few cores: a thread that waits by spinning takes them from the others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from filelock import FileLock

if not torch.cuda.is_available():
    # GPU kernels run in Triton's interpreter; it is chosen when they are imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import PreTrainedTokenizerFast

from tests import tiny
from tests.execution import preforked

# Fixtures of a module are made before those of a test: bytes depend on the number of threads.
torch.set_num_threads(1)

HERE = Path(__file__).resolve().parent
MadeOnce = Callable[[str, Callable[[Path], object]], Path]
_SHARED_RAY: list[Any] = []
"""The cluster of ``ray_flags`` while there are tests that may use it."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def short_home() -> Iterator[Path]:
    """A home with a short path: Ray's sockets lie in it, and Linux bounds the length of theirs."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as home:
        yield Path(home)


@pytest.fixture(autouse=True)
def _quick_workers(request: pytest.FixtureRequest) -> Iterator[None]:
    """A Ray that a test starts in its own process has its workers forked."""
    if request.node.get_closest_marker("ray") is None:
        yield
        return
    with preforked.starting_workers(request.getfixturevalue("worker_program")):
        yield


@pytest.fixture(scope="session")
def worker_program(made_once: MadeOnce) -> str:
    """What Ray starts workers with: a stand-in for Python that has them forked.

    One server forks those of all processes of a session of tests.
    """

    def make(folder: Path) -> None:
        folder.mkdir()
        session = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
        short = Path(tempfile.mkdtemp(prefix="ray-"))
        (folder / "program").write_text(preforked.interpreter(short, session))

    return (made_once("workers", make) / "program").read_text()


@pytest.fixture(scope="session")
def ray_flags(worker_program: str) -> list[str]:
    """Flags for a run by two workers of a Ray that the tests share: starting one takes long."""
    import ray._common.utils
    from ray.cluster_utils import Cluster

    with preforked.starting_workers(worker_program):
        head = {"num_cpus": 2, "object_store_memory": 100_000_000, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        # Tests that are given no address are not to find this one.
        ray._common.utils.reset_ray_address()
    _SHARED_RAY.append(cluster)
    return ["--executor", "ray", "--num-workers", "2", "--ray-address", cluster.address]


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the shared Ray after the last test on Ray: its agents take a tenth of a processor."""
    if nextitem is None or nextitem.get_closest_marker("ray") is None:
        while _SHARED_RAY:
            _SHARED_RAY.pop().shutdown()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Makes a folder that all processes of a session of tests read: the first that asks does."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        made, done = root / "shared" / name, root / "shared" / f"{name}.done"
        made.parent.mkdir(exist_ok=True)
        with FileLock(made.with_suffix(".lock")):
            if not done.exists():
                shutil.rmtree(made, ignore_errors=True)
                make(made)
                done.touch()
        return made

    return folder


@pytest.fixture(scope="session")
def long_text_folder(made_once: MadeOnce) -> Path:
    """train.txt and test.txt, long enough to compare perplexities on.

    They are kept with the tests: every Python's reference is another, and so is what a model that
    is trained on it takes for likely.
    """

    def make(folder: Path) -> None:
        folder.mkdir()
        for name in ("train.txt", "test.txt"):
            (folder / name).write_bytes(
                lzma.decompress((HERE / "text" / f"{name}.xz").read_bytes())
            )

    return made_once("long-text", make)


@pytest.fixture(scope="session")
def text_folder(long_text_folder: Path, made_once: MadeOnce) -> Path:
    """The beginnings of both: every run tokenizes all of its text."""

    def make(folder: Path) -> None:
        folder.mkdir()
        for name, most in (("train.txt", 60_000), ("test.txt", 30_000)):
            (folder / name).write_text((long_text_folder / name).read_text()[:most])

    return made_once("text", make)


@pytest.fixture(scope="session")
def tokenizer(long_text_folder: Path, made_once: MadeOnce) -> PreTrainedTokenizerFast:
    """A small byte-pair tokenizer trained on the text."""

    def make(folder: Path) -> None:
        text = (long_text_folder / "train.txt").read_text()
        tiny.train_tokenizer(text).save_pretrained(folder)

    return PreTrainedTokenizerFast.from_pretrained(made_once("tokenizer", make))


@pytest.fixture(scope="session")
def llama_folder(made_once: MadeOnce, tokenizer) -> Path:
    """A tiny Llama with random weights."""
    return made_once("llama", lambda folder: tiny.save_random("llama", folder, tokenizer))


@pytest.fixture(scope="session")
def small_run(neox_folder: Path, text_folder: Path) -> list[str]:
    """The command of a run with measured shares and perplexities, without its output folder."""
    where = ["--model", str(neox_folder), "--dataset", str(text_folder)]
    return ["run", *where, *tiny.SMALL_RUN, "--eval-windows", "2"]


@pytest.fixture(scope="session")
def measured_run(small_run: list[str], made_once: MadeOnce) -> Path:
    """The output folder of that run; tests that change something take a copy."""

    def make(output: Path) -> None:
        from sparse_expansion.cli import main

        assert main([*small_run, "--output", str(output)]) == 0

    return made_once("measured", make)


@pytest.fixture(scope="session")
def neox_folder(made_once: MadeOnce, tokenizer, long_text_folder: Path) -> Path:
    """A tiny GPT-NeoX, trained until it has learnt something."""
    text = (long_text_folder / "train.txt").read_text()
    return made_once("neox", lambda folder: tiny.save_trained_neox(folder, tokenizer, text))


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """How tests are dealt out to processes (`pytest -n`, `--dist loadgroup`).

    A file's tests stay together, since they share what they have made; so do those that start a
    Ray in their own process or join the shared one, for which more than one at a time would be too
    much for a small machine. Those that start `ray` as a command, with a home and ports of their
    own, wait for it most of the time: they are a group beside. Around all other hooks: xdist reads
    the marks in its own, which asks to be the first.
    """
    for item in items:
        ray = item.get_closest_marker("ray")
        group = ray.kwargs.get("group", "ray") if ray else str(item.path.relative_to(HERE))
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
