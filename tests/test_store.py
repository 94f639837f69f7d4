import errno
import hashlib
import json
import os
import re
import sys

import pytest
import safetensors.torch
import torch

from sparse_expansion.cli import main
from sparse_expansion.report.parquet import write_table
from sparse_expansion.run_folder import open_run, read_timeline, read_windows, write_windows
from sparse_expansion.store import Store
from sparse_expansion.tensor_files import _CODES, file_pieces


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    root = str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}"
    yield Store(root)
    if request.param == "memory":
        Store(root).delete_folder("")


ROW = {"unit": "a", "stage": "b", "worker": "c", "started": 1.5, "seconds": 2}


def commit(store, key="layer-000/a", name="a.safetensors"):
    record = store.write_tensors(name, {"x": torch.arange(5.0)})
    store.commit(key, {"files": {name: record}, "stats": {}})
    return record


def test_tensors_come_back(store):
    record = commit(store)
    assert torch.equal(store.read_tensors("a.safetensors")["x"], torch.arange(5.0))
    described = record["tensors"]["x"]
    assert (described["bytes"], described["dtype"], described["shape"]) == (20, "float32", [5])
    assert described["sha256"] == hashlib.sha256(torch.arange(5.0).numpy().tobytes()).hexdigest()
    assert store.is_intact(store.record("layer-000/a"))
    assert list(store.records()) == ["layer-000/a"]
    assert store.list("") == ["a.safetensors", "run/units/layer-000/a.json"]


def test_a_file_is_what_safetensors_makes_of_the_tensors():
    kinds = [*_CODES]
    tensors = {f"{9 - place}.x": torch.ones(3, 5).to(kind) for place, kind in enumerate(kinds)}
    tensors |= {f"{place}.empty": torch.zeros(0, 4, dtype=kind) for place, kind in enumerate(kinds)}
    tensors |= {'a "quoted" é': torch.arange(3), "one": torch.tensor(2.0), "tail": torch.ones(1)}
    wanted = safetensors.torch.save(tensors, metadata={"format": "pt"})
    assert b"".join(file_pieces(tensors)) == wanted
    with pytest.raises(ValueError, match=r"z is torch.complex64, which is not one of"):
        file_pieces({"z": torch.ones(2, dtype=torch.complex64)})


def test_windows_come_back_by_shard(store):
    windows = torch.arange(7 * 3).view(7, 3) + 2**31 - 100
    write_windows(store, windows, 3)
    assert all(
        torch.equal(read_windows(store, shard), part)
        for shard, part in enumerate(windows.tensor_split(3))
    )
    assert read_windows(store, 0).dtype == torch.int64
    assert len(store.list("run/calibration")) == 3


def test_a_file_without_marker_is_not_finished(store):
    store.write_tensors("a.safetensors", {"x": torch.ones(1)})
    assert store.record("layer-000/a") is None


def test_damage_is_seen(store):
    commit(store)
    data = bytearray(store.read_bytes("a.safetensors"))
    data[-3] ^= 1
    store.write_bytes("a.safetensors", bytes(data))
    assert not store.is_intact(store.record("layer-000/a"))
    store.write_bytes("a.safetensors", bytes(data[:-5]))
    assert not store.is_intact(store.record("layer-000/a"))
    with pytest.raises(ValueError, match="is damaged"):
        store.read_tensors("a.safetensors")
    store.delete("a.safetensors")
    store.delete("a.safetensors")
    assert not store.is_intact(store.record("layer-000/a"))


def test_equal_tensors_give_equal_bytes(store):
    first = store.write_tensors("a.safetensors", {"b": torch.ones(2), "a": torch.zeros(3)})
    second = store.write_tensors("b.safetensors", {"b": torch.ones(2), "a": torch.zeros(3)})
    assert first["sha256"] == second["sha256"]


def test_claiming_a_folder(store):
    identity = {"digest": "1", "config": {"a": 1}}
    open_run(store, identity, resume=False)
    open_run(store, identity, resume=True)
    with pytest.raises(ValueError, match="add --resume"):
        open_run(store, identity, resume=False)
    with pytest.raises(ValueError, match="different config"):
        open_run(store, {"digest": "2", "config": {"a": 2}}, resume=True)


def test_temporaries_of_a_killed_process_are_swept(tmp_path):
    store = Store(tmp_path)
    identity = {"digest": "1"}
    open_run(store, identity, resume=False)
    (tmp_path / "run" / ".writing-abc").write_text("half")
    open_run(store, identity, resume=True)
    assert not (tmp_path / "run" / ".writing-abc").exists()


def test_a_first_write_that_was_cut_short_is_no_dead_end(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".writing-abc").write_text("{")
    open_run(Store(tmp_path), {"digest": "1"}, resume=False)
    assert os.listdir(tmp_path / "run") == ["run.json"]
    other = tmp_path / "other"
    (other / "run").mkdir(parents=True)
    (other / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        open_run(Store(other), {"digest": "1"}, resume=True)


DEEP = b"[" * 100_000


@pytest.mark.parametrize("content", [b"", b'{"digest": "1', b"[]", b"\xff\xfe", DEEP])
def test_a_damaged_identity_says_what_to_do(store, content):
    store.write_bytes("run/run.json", content)
    with pytest.raises(ValueError, match="is damaged.*delete the folder --output"):
        open_run(store, {"digest": "1"}, resume=True)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b'{"files": {}}',
        b'{"files": [], "stats": {}}',
        b'{"files": {"a": {"bytes": 1}}, "stats": {}}',
        b'{"files": {"../a": {"bytes": 1, "sha256": "", "tensors": {}}}, "stats": {}}',
        b'{"files": {"/a": {"bytes": 1, "sha256": "", "tensors": {}}}, "stats": {}}',
        DEEP,
    ],
)
def test_a_unit_with_a_damaged_marker_is_not_finished(store, content):
    commit(store)
    assert list(store.records()) == ["layer-000/a"]
    store.write_bytes("run/units/layer-000/a.json", content)
    assert store.record("layer-000/a") is None and store.records() == {}


@pytest.mark.parametrize("content", [b"[{", b"{}", b"[1]", DEEP])
def test_a_damaged_timeline_is_none(store, content):
    store.write_bytes("run/timeline.json", content)
    assert read_timeline(store) == []
    store.write_bytes("run/timeline.json", json.dumps([ROW]).encode())
    assert read_timeline(store) == [ROW]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_asks_for(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        Store(tmp_path).write_bytes("a", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.write_bytes("a", b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.write_bytes("a", b"new")
    assert store.read_bytes("a") == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    write_table({"a": [1, 2]}, str(tmp_path / "new" / "t.parquet"))
    before = (tmp_path / "new" / "t.parquet").read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_table({"a": [3, 4, 5]}, str(tmp_path / "new" / "t.parquet"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.parquet"]
    assert (tmp_path / "new" / "t.parquet").read_bytes() == before


def test_urls_are_not_local_paths():
    with pytest.raises(ValueError, match="not a local folder"):
        Store("memory://x").local_path()


def test_bad_json_is_named(store):
    store.write_bytes("run/run.json", b"{")
    with pytest.raises(ValueError, match="not valid JSON"):
        store.read_json("run/run.json")


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [("s3://b/run", "s3fs", "s3"), ("gs://b/run", "gcsfs", "gcs"), ("gcs://b/run", "gcsfs", "gcs")],
)
def test_a_url_says_what_is_to_be_installed(url, package, extra, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    for protocol in ("s3", "gs", "gcs"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    said = f"{url} needs a package for {url[: url.index(':')]}:// URLs: "
    with pytest.raises(ValueError, match=re.escape(said)):
        Store(url)
    # Before the model and the text are looked for: neither is there.
    flags = ["--model", "./nowhere", "--dataset", "./nowhere.txt", "--output", url]
    assert main(["run", *flags]) == 2
    assert f"{said}pip install 'sparse-expansion[{extra}]'" in capsys.readouterr().err


def test_an_unknown_protocol_is_one_line():
    with pytest.raises(ValueError, match=r"^nfs://a/b cannot be used \(Protocol not known: nfs\)"):
        Store("nfs://a/b")


def test_two_colons_in_a_path_are_part_of_it(tmp_path):
    """fsspec would read them as a chain of file systems."""
    store = Store(f"{tmp_path}/x::y/z")
    store.write_json("a.json", [1])
    assert json.loads((tmp_path / "x::y" / "z" / "a.json").read_text()) == [1]
    assert store.list("") == ["a.json"] and store.local_path() == tmp_path / "x::y" / "z"
    with pytest.raises(ValueError, match="chains file systems by '::'"):
        Store("simplecache::memory://somewhere")
