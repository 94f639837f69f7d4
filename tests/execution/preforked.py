"""Ray's workers forked from a process that has imported what they need.

Importing PyTorch, transformers and scikit-learn takes a worker longer than all that a test has it
do. Ray starts workers with the interpreter of the process that started Ray; `interpreter` stands in
for it while a test's cluster is made. It hands the command line of a worker to the server and
stays until that worker has ended; whatever else Ray starts with it, it starts.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Not Ray: when it is imported it reads from the environment what differs from worker to worker.
IMPORTED = (
    "sklearn.cluster",
    "sparse_expansion.work.worker",
    "transformers.models.gpt_neox.modeling_gpt_neox",
    "transformers.models.llama.modeling_llama",
)
CLIENT = """
import json, os, socket, sys
real, address, *command = sys.argv[1:]
if not command or not command[0].endswith(("/setup_worker.py", "/default_worker.py")):
    os.execv(real, [real, *command])
with socket.socket(socket.AF_UNIX) as server:
    server.connect(address)
    socket.send_fds(server, [b"w"], [0, 1, 2])
    request = {"command": command, "environment": dict(os.environ), "folder": os.getcwd()}
    server.sendall(json.dumps(request).encode())
    server.shutdown(socket.SHUT_WR)
    # Nothing is ever sent: this is the end of the worker, by whatever cause.
    server.recv(1)
"""


def interpreter(folder: Path, lives_with: int) -> str:
    """Path of a program to start workers with.

    Args:
        folder: for its files; a socket is among them, so that its path has to be short. It is
            removed at the end.
        lives_with: number of the process that the server of workers ends with.
    """
    address = folder / "workers.sock"
    program = folder / "python"
    client = folder / "client.py"
    client.write_text(CLIENT)
    # -S: without site-packages an interpreter starts in a fiftieth of a second.
    program.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -S -E "{client}" "{sys.executable}" "{address}" "$@"\n'
    )
    program.chmod(0o700)
    command = [sys.executable, "-m", __name__, str(address), str(lives_with)]
    # By itself: it outlives the process of tests that starts it, whose pipes it must not hold.
    server = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    while not address.exists():
        assert server.poll() is None, "the server of workers has ended"
        time.sleep(0.05)
    return str(program)


@contextmanager
def starting_workers(program: str) -> Iterator[None]:
    """What starts Ray inside the block has its workers started with ``program``."""
    real = sys.executable
    sys.executable = program
    try:
        yield
    finally:
        sys.executable = real


def serve(address: str, lives_with: int) -> None:
    """Fork a process for every request, while the process ``lives_with`` is there."""
    for name in IMPORTED:
        importlib.import_module(name)
    # Nobody waits for them: the kernel is to clear them away.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address + ".new")
        listener.listen(64)
        listener.settimeout(1)
        os.rename(address + ".new", address)
        while is_there(lives_with):
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection:
                if os.fork() == 0:
                    listener.close()
                    become_worker(connection)
    shutil.rmtree(os.path.dirname(address), ignore_errors=True)


def is_there(process: int) -> bool:
    """Whether a process of ours has not ended."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def become_worker(connection: socket.socket) -> None:
    """Run the worker that is asked for; its end closes the connection."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("rb") as sent:
        request = json.loads(sent.read())
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    command = request["command"]
    if command[0].endswith("/setup_worker.py"):
        # What it does, but for starting another interpreter.
        from ray._private.runtime_env.context import RuntimeEnvContext
        from ray._private.utils import update_envs
        from ray._private.workers.setup_worker import parser

        setup, command = parser.parse_known_args(command[1:])
        update_envs(RuntimeEnvContext.deserialize(setup.serialized_runtime_env_context).env_vars)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
