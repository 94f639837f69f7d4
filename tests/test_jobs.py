"""`ray job submit` on a Ray of our own, on loopback, with token authentication."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from sparse_expansion.cli import main
from tests.execution.ray_helpers import BIN, free_port, ray_head
from tests.tiny import SMALL_RUN as SMALL
from tests.tiny import digests

pytestmark = pytest.mark.ray(group="ray commands")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def head(short_home, worker_program):
    """Address of a job server; everything it started ends with the tests."""
    home = short_home
    dashboard = free_port()
    address = f"http://127.0.0.1:{dashboard}"
    flags = [
        "--num-cpus=2",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
        # Of its own: by default it is one number for all, and a Ray that finds it taken by another
        # runs on without an agent, so without jobs.
        f"--dashboard-agent-listen-port={free_port()}",
        "--object-store-memory=100000000",
    ]

    def is_up():
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=2)
        except urllib.error.HTTPError as error:
            # An answer without the token: the server is up and lets no one in.
            assert error.code in (401, 403)
        except OSError:
            return False
        return True

    with ray_head(home, free_port(), flags, is_up, worker_program, RAY_JOB_STOP_WAIT_TIME_S="20"):
        yield address


@pytest.fixture(scope="module")
def client(head):
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(head)


def submitted(client, entry):
    """The id of a job. On a busy machine Ray may have lost sight of its agent for a moment."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return client.submit_job(
                entrypoint=" ".join(entry), runtime_env={"working_dir": str(ROOT)}
            )
        except RuntimeError as error:
            if "try again later" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)


def submit(head, *entry):
    command = [str(BIN / "ray"), "job", "submit", "--address", head, "--working-dir", str(ROOT)]
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(
            [*command, "--", *entry], capture_output=True, text=True, check=False, timeout=200
        )
        # The server answers before its agent does, and on a busy machine may lose sight of it.
        is_early = "No available agent" in done.stdout + done.stderr
        if not is_early or time.monotonic() > deadline:
            return done
        time.sleep(1)


def job_id(output):
    return next(word.strip("'") for word in output.split() if word.startswith("'raysubmit_"))


def entry(script, *flags):
    return [sys.executable, f"ray_jobs/{script}.py", *flags]


def test_success_and_the_result(head, client, tmp_path, neox_folder, text_folder):
    output = tmp_path / "o"
    flags = ["--model", str(neox_folder), "--dataset", str(text_folder), *SMALL]
    done = submit(
        head,
        *entry("run", *flags, "--eval-windows", "4", "--num-workers", "2", "--output", str(output)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout and "perplexity (per token)" in done.stdout
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["executor"] == "ray"
    local = tmp_path / "local"
    assert main(["expand", *flags, "--output", str(local)]) == 0
    assert digests(output) == digests(local)
    done = submit(
        head,
        *entry(
            "evaluate",
            "--model",
            str(output),
            "--dataset",
            str(text_folder),
            "--seqlen",
            "48",
            "--eval-windows",
            "4",
            "--threads",
            "1",
        ),
    )
    assert done.returncode == 0
    assert f"{metrics['perplexity_expanded']:.3f}" in done.stdout


def test_exit_codes_and_the_last_line_come_back(head, client):
    done = submit(head, *entry("expand", "--model", "/nowhere", "--output", "/tmp/x"))
    assert done.returncode != 0
    info = client.get_job_info(job_id(done.stdout))
    assert info.status == "FAILED" and info.driver_exit_code == 2
    assert "model folder /nowhere does not exist" in client.get_job_logs(job_id(done.stdout))
    # Quoted alike by all versions of Ray: older ones leave a word without spaces as it is.
    done = submit(head, "sh", "-c", "exit 7")
    assert client.get_job_info(job_id(done.stdout)).driver_exit_code == 7


def test_a_stopped_job_is_resumed_under_a_new_id(head, client, tmp_path, neox_folder, text_folder):
    output = tmp_path / "o"
    flags = [
        "--model",
        str(neox_folder),
        "--dataset",
        str(text_folder),
        *SMALL,
        "--dataset-size",
        "200",
        "--output",
        str(output),
    ]
    first = submitted(client, entry("expand", *flags, "--num-workers", "1"))
    marker = output / "run" / "units" / "layer-000" / "mlp.dense_h_to_4h" / "router.json"
    deadline = time.monotonic() + 120
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    client.stop_job(first)
    while client.get_job_status(first) not in ("STOPPED", "FAILED", "SUCCEEDED"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert client.get_job_status(first) == "STOPPED"
    assert "terminated: finished units are kept" in client.get_job_logs(first)
    assert not (output / "config.json").exists()
    done = submit(head, *entry("expand", *flags, "--num-workers", "2", "--resume"))
    assert done.returncode == 0, done.stdout
    local = tmp_path / "local"
    assert main(["expand", *flags[:-2], "--output", str(local)]) == 0
    assert digests(output) == digests(local)
