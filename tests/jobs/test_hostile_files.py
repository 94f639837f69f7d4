"""What lies in place of a file, or is named in one, is answered in a line and not followed."""

import json
import os
import shutil
import signal
import stat

import pytest

from sparse_expansion.cli import main
from sparse_expansion.model.checkpoint import companions
from sparse_expansion.plain_files import read_plain, sealed
from sparse_expansion.store import Store
from tests import tiny
from tests.jobs.processes import arguments
from tests.model.running import expand


@pytest.fixture(scope="module")
def expanded(tmp_path_factory, neox_folder, text_folder):
    return expand(neox_folder, text_folder, tmp_path_factory.mktemp("hostile") / "m")


@pytest.fixture
def no_hang():
    """A read that waits without end ends the test, and not the suite."""

    def stop(*_):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def put(kind, path):
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


KINDS = {"pipe": "is a named pipe and not a file", "device": "is a device and not a file"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors.index.json",
        "manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "trunk-00000.safetensors",
        "metrics.json",
        "run/run.json",
    ],
)
def test_what_is_no_file_is_refused_at_once(
    kind, name, expanded, text_folder, tmp_path, capsys, no_hang
):
    folder = tmp_path / "copy"
    shutil.copytree(expanded, folder)
    put(kind, folder / name)
    where = ["--model", str(folder), "--dataset", str(text_folder), "--seqlen", "32"]
    lines = [["report", str(folder)], ["compare", str(folder)]]
    if "/" not in name:
        lines = [["evaluate", *where, "--eval-windows", "1"]]
    for line in lines:
        assert main(line) == 2
        found = capsys.readouterr().err
        assert found.count("error: ") == 1
        assert KINDS[kind] in found or "compare" in line, found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text.parquet"])
def test_text_that_is_no_file(kind, name, llama_folder, tmp_path, capsys, no_hang):
    put(kind, tmp_path / name)
    (tmp_path / "folder").mkdir()
    put(kind, tmp_path / "folder" / name.replace("text", "train"))
    (tmp_path / "folder" / "test.txt").write_text("a")
    for dataset in (tmp_path / name, tmp_path / "folder"):
        assert main(["evaluate", "--model", str(llama_folder), "--dataset", str(dataset)]) == 2
        assert KINDS[kind] in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_by_block_that_are_no_file(kind, llama_folder, tmp_path, capsys, no_hang):
    path = tmp_path / "shares.json"
    put(kind, path)
    line = ["expand", "--model", str(llama_folder), "--dataset", "pydoc", "--num_clusters", "2"]
    assert main([*line, "--output", str(tmp_path / "o"), "--layer-sparsity", str(path)]) == 2
    assert KINDS[kind] in capsys.readouterr().err


def test_a_marker_or_shard_that_is_no_file_is_made_again(
    finished, neox_folder, text_folder, tmp_path, no_hang
):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    put("pipe", output / "run" / "units" / "layer-000" / "mlp.dense_h_to_4h" / "router.json")
    put("device", next(output.glob("experts-001-*")))
    put("pipe", next(output.glob("experts-002-*")))
    assert main([*arguments(neox_folder, text_folder, output), "--resume"]) == 0
    assert tiny.digests(output) == tiny.digests(finished)


def test_a_file_that_is_too_large(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(ValueError, match="config.json has 1099511627776 bytes, no such file"):
        read_plain(path)


@pytest.mark.parametrize("part", ["run", "run/units", "run/hidden", "run/units/layer-001"])
def test_folders_of_a_run_that_are_links(
    part, finished, neox_folder, text_folder, tmp_path, capsys
):
    """Nothing is written or deleted where they lead."""
    output, outside = tmp_path / "out", tmp_path / "outside"
    shutil.copytree(finished, output)
    (output / "config.json").unlink()
    shutil.rmtree(output / "run" / "units" / "layer-002")
    shutil.rmtree(output / "run" / "units" / "layer-001" / "mlp.dense_h_to_4h")
    if (output / part).exists():
        shutil.copytree(output / part, outside)
        shutil.rmtree(output / part)
    else:
        outside.mkdir()
    for name in ("layer-001-shard-000.safetensors", ".writing-0", "experts-001-x.safetensors"):
        (outside / name).write_text("mine")
    (output / part).symlink_to(outside)
    before = {path: path.stat().st_mtime_ns for path in outside.rglob("*")}
    assert main([*arguments(neox_folder, text_folder, output), "--resume"]) == 2
    error = capsys.readouterr().err
    assert f"{output / part} is a link to {outside}" in error and "replace it by a" in error
    assert {path: path.stat().st_mtime_ns for path in outside.rglob("*")} == before


def test_files_of_a_run_that_are_links(finished, neox_folder, text_folder, tmp_path):
    """They are replaced, and what they lead to stays."""
    output, outside = tmp_path / "out", tmp_path / "outside"
    shutil.copytree(finished, output)
    shard = next(output.glob("experts-001-*"))
    names = ["metrics.json", "config.json", "manifest.json", "run/command.json", shard.name]
    for name in names:
        target = outside / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("mine")
        (output / name).unlink()
        (output / name).symlink_to(target)
    assert main([*arguments(neox_folder, text_folder, output), "--resume"]) == 0
    assert all((outside / name).read_text() == "mine" for name in names)
    assert not any((output / name).is_symlink() for name in names)
    assert tiny.digests(output) == tiny.digests(finished)


def test_an_output_that_is_a_link_itself_is_where_the_run_goes(
    finished, neox_folder, text_folder, tmp_path
):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert main(arguments(neox_folder, text_folder, tmp_path / "out")) == 0
    assert tiny.digests(tmp_path / "disk") == tiny.digests(finished)


def test_links_in_a_loop_are_not_walked(tmp_path):
    store = Store(tmp_path)
    store.write_bytes("run/units/a.json", b"{}")
    (tmp_path / "run" / "units" / "loop").symlink_to(tmp_path / "run")
    assert store.list("run") == ["run/units/a.json"]


def test_companions_that_link_elsewhere_are_not_copied(llama_folder, text_folder, tmp_path, caplog):
    folder = tmp_path / "model"
    shutil.copytree(llama_folder, folder)
    (tmp_path / "secret").write_text("secret")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    (folder / "tokenizer_more.json").symlink_to("../secret")
    (folder / "NOTICE").symlink_to("LICENSE.real")
    (folder / "LICENSE.real").write_text("terms")
    (folder / "vocab.json").symlink_to("nowhere")
    output = expand(folder, text_folder, tmp_path / "out", "--num_clusters", "1")
    assert main(["export", str(output), "--output", str(tmp_path / "plain")]) == 0
    for made in (output, tmp_path / "plain"):
        names = {path.name for path in made.iterdir()}
        assert {"LICENSE.real", "NOTICE", "tokenizer.json"} <= names
        assert not {"LICENSE", "tokenizer_more.json", "vocab.json"} & names
    assert "LICENSE is a link to" in caplog.text and "not copied" in caplog.text


def hub_cache(folder, where):
    """The model as the hub's cache holds it: links into a folder of contents."""
    repository = where / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in folder.iterdir():
        shutil.copy(path, repository / "blobs" / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-{path.name}")
    return snapshot


def test_the_hubs_cache_of_links_is_copied(llama_folder, tmp_path):
    snapshot = hub_cache(llama_folder, tmp_path)
    (tmp_path / "secret").write_text("secret")
    (snapshot / "LICENSE").symlink_to(tmp_path / "secret")
    (tmp_path / "named").symlink_to(snapshot)
    wanted = [path.name for path in companions(llama_folder)]
    assert "tokenizer.json" in wanted
    for folder in (snapshot, tmp_path / "named"):
        assert [path.name for path in companions(folder)] == wanted


def test_names_are_shown_and_not_obeyed(finished, tmp_path, capsys):
    output = tmp_path / "a\x1b[2Jb"
    shutil.copytree(finished, output)
    path = output / "run" / "run.json"
    found = {**json.loads(path.read_text()), "model": "x\x1b]0;title\x07"}
    found.pop("sha256_of_the_rest")
    path.write_text(json.dumps(sealed(found)))
    assert main(["report", str(output)]) == 0
    assert main(["report", str(tmp_path / "no\x1b[31m")]) == 2
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err and "\x07" not in shown.out
    assert r"x\x1b]0;title\x07" in shown.out and r"no\x1b[31m" in shown.err
    assert main(["report", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "x\x1b]0;title\x07"


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_the_umask_is_kept(umask, file, folder, neox_folder, text_folder, tmp_path):
    output, plots = tmp_path / "out", tmp_path / "plots"
    page = tmp_path / "page" / "x.html"
    run = arguments(neox_folder, text_folder, output)
    report = ["report", str(output), "--html", str(page), "--plots", str(plots)]
    before = os.umask(umask)
    try:
        assert main([*run, "--num_clusters", "1"]) == 0
        assert main(["export", str(output), "--output", str(tmp_path / "plain")]) == 0
        assert main(report) == 0
    finally:
        os.umask(before)
    made = [
        path
        for part in (output, plots, page.parent, tmp_path / "plain")
        for path in part.rglob("*")
    ]
    assert len(made) > 40
    for path in made:
        assert stat.S_IMODE(path.stat().st_mode) == (folder if path.is_dir() else file), path
