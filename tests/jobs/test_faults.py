"""Crashes, kills and full disks lose at most the unit in hand."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from sparse_expansion.cli import main
from sparse_expansion.report.describe import describe_machine
from sparse_expansion.run_folder import alone_in
from sparse_expansion.store import Store
from tests.jobs.processes import arguments, start, wait_for
from tests.tiny import digests


@pytest.mark.parametrize("schedule", ["compressed", "sequential", "cumulative", "dense"])
def test_sigkill_and_resume_give_the_same_bytes(
    schedule, tmp_path, neox_folder, text_folder, finished
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    extra = ["--calibration-inputs", schedule]
    if schedule == json.loads((finished / "metrics.json").read_text())["calibration_inputs"]:
        whole = finished
    else:
        assert main([*arguments(neox_folder, text_folder, whole), *extra]) == 0
    command = [*arguments(neox_folder, text_folder, cut), *extra]
    process = start(command, tmp_path / "log.txt")
    # In the middle of the second block.
    marker = cut / "run" / "units" / "layer-001" / "mlp.dense_h_to_4h" / "router.json"
    wait_for(marker.exists, process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed"
    assert not (cut / "config.json").exists()
    done = {file: file.stat().st_mtime_ns for file in (cut / "run" / "units").rglob("experts-*")}
    assert 0 < len(done) < 3 * 2 * 2
    assert main([*arguments(neox_folder, text_folder, cut), *extra, "--resume"]) == 0
    assert digests(cut) == digests(whole)
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert not (cut / "run" / "hidden").exists()


def test_a_crash_between_a_shards_rename_and_its_marker(
    tmp_path, neox_folder, text_folder, monkeypatch, finished
):
    """The file is there and whole, but no one vouches for it: it is made again."""
    output = tmp_path / "out"
    commit = Store.commit

    def crash(store, key, record):
        if key.startswith("layer-001/") and "/experts-" in key:
            raise KeyboardInterrupt
        commit(store, key, record)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "commit", crash)
        assert main(arguments(neox_folder, text_folder, output)) == 130
    # Of the unit whose marker failed, and of those that were computed by then.
    orphans = {file: file.stat().st_mtime_ns for file in output.glob("experts-001-*")}
    assert orphans
    assert not list((output / "run" / "units" / "layer-001").rglob("experts-*"))
    assert main([*arguments(neox_folder, text_folder, output), "--resume"]) == 0
    assert all(file.stat().st_mtime_ns != before for file, before in orphans.items())
    assert digests(output) == digests(finished)


def test_output_on_a_url(tmp_path, neox_folder, text_folder, capsys):
    """Any fsspec URL: here one in memory, and a local one."""
    run = ["run", *arguments(neox_folder, text_folder, "")[1:], "--eval-windows", "3", "--json"]
    perplexity = []
    for url in (f"memory://{tmp_path.name}", f"file://{tmp_path}/u", str(tmp_path / "plain")):
        run[run.index("--output") + 1] = url
        assert main(run) == 0
        perplexity.append(json.loads(capsys.readouterr().out)["perplexity_expanded"])
        assert main(["report", url]) == 0
        assert f"{perplexity[0]:.3f}" in capsys.readouterr().out
    assert perplexity[0] == perplexity[1] == perplexity[2]
    Store(f"memory://{tmp_path.name}").delete_folder("")


def test_a_damaged_shard_is_made_again(tmp_path, neox_folder, text_folder, finished):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    before = digests(output)
    file = next(output.glob("experts-001-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 255
    file.write_bytes(bytes(data))
    assert digests(output) != before
    assert main([*arguments(neox_folder, text_folder, output), "--resume"]) == 0
    assert digests(output) == before


def test_damaged_markers_and_timeline_are_made_again(tmp_path, neox_folder, text_folder, finished):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    markers = sorted((output / "run" / "units").rglob("*.json"))
    for marker in (markers[1], markers[-2]):
        marker.write_text(marker.read_text()[:-20])
    (output / "run" / "timeline.json").write_text("[{")
    assert main([*arguments(neox_folder, text_folder, output), "--resume"]) == 0
    assert digests(output) == digests(finished)
    assert all("files" in json.loads(marker.read_text()) for marker in markers)


def test_an_unfinished_folder_is_not_a_model(tmp_path, finished, text_folder, capsys):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    (output / "config.json").unlink()
    assert main(["evaluate", "--model", str(output), "--dataset", str(text_folder)]) == 2
    assert "an unfinished run" in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path):
    where = tmp_path / "small"
    where.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(where)],
        capture_output=True,
        check=False,
    )
    if mount.returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield where
    # An error that came from the thread that writes refers to itself by its frames, which have
    # files of the disk mapped: the collector frees them.
    gc.collect()
    subprocess.run(["umount", str(where)], check=True)


def test_a_full_disk_is_one_line_and_exit_1_and_can_be_resumed(
    small_disk, neox_folder, text_folder, capsys, finished, monkeypatch
):
    output = small_disk / "out"
    # The room that there was when the run began others have taken since.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))
    assert main(arguments(neox_folder, text_folder, output)) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1 and "no space left" in error[0] and "--resume" in error[0]
    assert not (output / "config.json").exists()
    assert not list(output.rglob(".writing-*"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert main([*arguments(neox_folder, text_folder, output), "--resume"]) == 0
    assert digests(output) == digests(finished)


def test_a_disk_without_room_is_answered_before_work(small_disk, neox_folder, text_folder, capsys):
    output = small_disk / "out"
    assert main(arguments(neox_folder, text_folder, output)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"--output {output} needs .* MB more, its disk has .* kB: free some", line)
    assert not output.exists()


def test_another_number_of_threads_is_told_and_kept(
    tmp_path, neox_folder, text_folder, capsys, finished
):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    (output / "config.json").unlink()
    shutil.rmtree(output / "run" / "units" / "layer-002")
    line = [*arguments(neox_folder, text_folder, output), "--resume", "--json", "--threads", "2"]
    assert main(line) == 0
    found = capsys.readouterr()
    assert "were done with 1 threads, the others get 2" in found.err
    assert json.loads(found.out)["unit_threads"] == [1, 2]
    assert "1 and 2 threads" in describe_machine(json.loads(found.out))
    assert json.loads((finished / "metrics.json").read_text())["unit_threads"] == [1]


def test_a_full_scratch_disk_is_an_error_not_a_crash(
    small_disk, tmp_path, neox_folder, text_folder, capsys
):
    flags = ["--activation-memory", "0", "--scratch", str(small_disk), "--dataset-size", "40"]
    assert main([*arguments(neox_folder, text_folder, tmp_path / "out"), *flags]) == 1
    assert "no space left" in capsys.readouterr().err


def test_spilling_does_not_change_a_byte(tmp_path, neox_folder, text_folder, finished):
    scratch, output = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    flags = ["--activation-memory", "0", "--scratch", str(scratch)]
    assert main([*arguments(neox_folder, text_folder, output), *flags]) == 0
    assert digests(output) == digests(finished)
    assert os.listdir(scratch) == []


def test_two_runs_in_one_folder(tmp_path, neox_folder, text_folder, capsys, finished):
    """The second is answered, and leaves what the first is writing alone."""
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    half_written = output / "run" / ".writing-0"
    half_written.write_text("{")
    with alone_in(Store(output)):
        assert main([*arguments(neox_folder, text_folder, output), "--resume"]) == 2
        assert f"--output {output} is in use by another run" in capsys.readouterr().err
        assert half_written.exists()
    assert main([*arguments(neox_folder, text_folder, output), "--resume"]) == 0
    assert not half_written.exists()


def test_interrupt(tmp_path, neox_folder, text_folder):
    output, log = tmp_path / "out", tmp_path / "log.txt"
    # Long enough not to be over first on a machine with much else to do.
    flags = ["--dataset-size", "2000"]
    process = start([*arguments(neox_folder, text_folder, output), *flags], log)
    wait_for((output / "run" / "units").exists, process)
    os.kill(process.pid, signal.SIGINT)
    process.join(timeout=60)
    error = log.read_text()
    assert process.exitcode == 130, error
    assert "interrupted: finished units are kept" in error and "Traceback" not in error


def test_activations_that_are_not_finite_name_the_layer(
    tmp_path, llama_folder, text_folder, capsys
):
    folder = tmp_path / "m"
    shutil.copytree(llama_folder, folder)
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.post_attention_layernorm.weight"][3] = float("inf")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(arguments(folder, text_folder, tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert "layer-001" in error and "not finite" in error
